"""Small files in the schemas of published benchmarks, with made texts that say their scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

Made = list[dict[str, Any]]


def text_with(score: float, words: int = 1) -> str:
    """A text that says its score, so that a test knows it without a model."""
    return " ".join(["word"] * words) + f" <{score}>"


def made_reward_bench(rng: random.Random, subsets: Sequence[str], n: int = 6) -> Made:
    return [
        {
            "prompt": f"question {subset} {i}",
            "chosen": text_with(rng.choice([0, 1, 2]), rng.randint(1, 4)),
            "rejected": text_with(rng.choice([0, 1, 2]), rng.randint(1, 4)),
            "chosen_model": "x",
            "rejected_model": "y",
            "subset": subset,
            "id": i,
        }
        for subset in subsets
        for i in range(n)
    ]


def made_reward_bench_2(rng: random.Random, n: int = 8) -> Made:
    rows: Made = [
        {
            "id": f"{subset}-{i}",
            "prompt": f"question {subset} {i}",
            "chosen": [text_with(rng.choice([1, 2, 3]))],
            "rejected": [text_with(rng.choice([0, 1, 2, 3])) for _ in range(3)],
            "num_correct": 1,
            "num_incorrect": 3,
            "total_completions": 4,
            "subset": subset,
        }
        for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
        for i in range(n)
    ]
    for i, kind in product(range(n), ("ref", "tied")):
        right = 1 if kind == "ref" else rng.randint(2, 4)
        rows.append(
            {
                "id": f"{kind}:{i}",
                "prompt": f"name one, {kind} {i}",
                "chosen": [text_with(rng.choice([2, 2, 3, 4])) for _ in range(right)],
                "rejected": [text_with(rng.choice([0, 1, 1.5, 2])) for _ in range(5)],
                "num_correct": right,
                "subset": "Ties",
            }
        )
    return rows


def made_rm_bench(rng: random.Random, n: int = 5) -> Made:
    return [
        {
            "id": f"{domain}-{i}",
            "prompt": f"question {domain} {i}",
            "chosen": [text_with(rng.choice([0, 1, 2, 3]), k + 1) for k in range(3)],
            "rejected": [text_with(rng.choice([0, 1, 2]), k + 1) for k in range(3)],
            "domain": domain,
        }
        for domain in ("chat", "code", "math", "safety-refuse", "safety-response")
        for i in range(n + (domain == "safety-refuse"))
    ]


SOURCES = (
    ("mmlu-pro-law", "Knowledge"),
    ("mmlu-pro-math", "Knowledge"),
    ("livebench-reasoning", "Reasoning"),
    ("livebench-math", "Math"),
    ("livecodebench", "Coding"),
)


def made_judge_bench(rng: random.Random, n: int = 4) -> Made:
    return [
        {
            "pair_id": f"{source}-{i}",
            "original_id": str(i),
            "source": source,
            "question": f"question {source} {i}",
            "response_model": "m",
            "response_A": text_with(rng.choice([0, 1, 2])),
            "response_B": text_with(rng.choice([0, 1, 2])),
            "label": rng.choice(["A>B", "B>A"]),
        }
        for k, (source, _) in enumerate(SOURCES)
        for i in range(n + k)
    ]


def made_ppe(rng: random.Random, n: int = 40) -> Made:
    flags = ("hard_prompt", "easy_prompt", "if_prompt", "is_code", "math_prompt")
    return [
        {
            "question_id": str(i),
            "model_a": "a",
            "model_b": "b",
            "winner": rng.choice(["model_a", "model_b", "model_b", "tie", "tie (bothbad)"]),
            "language": rng.choice(["English", "French"]),
            "prompt": f"question {i}",
            "response_1": text_with(rng.choice([0, 1, 2])),
            "response_2": text_with(rng.choice([0, 1, 2])),
            **{flag: rng.random() < 0.4 for flag in flags},
        }
        for i in range(n)
    ]


def made_process_bench(rng: random.Random, n: int = 9) -> Made:
    rows: Made = []
    for subset, i in product(("gsm8k", "math", "olympiadbench", "omnimath"), range(n)):
        steps = [text_with(rng.choice([0.1, 0.3, 0.7]), k + 1) for k in range(rng.randint(1, 5))]
        rows.append(
            {
                "id": f"{subset}-{i}",
                "generator": "m",
                "problem": f"question {subset} {i}",
                "steps": steps,
                "final_answer_correct": rng.random() < 0.5,
                "label": rng.randint(-1, len(steps) - 1) if i > 1 else i - 1,
            }
        )
    return rows


CATEGORIES = {
    "Simplicity": ("redundency", "circular"),
    "Soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "Sensitivity": ("missing_condition", "deception", "multi_solutions"),
}


def made_prm_bench(rng: random.Random, n: int = 5) -> Made:
    rows: Made = []
    for category, i in product([x for own in CATEGORIES.values() for x in own], range(n)):
        size = rng.randint(3, 6)
        steps = [text_with(rng.choice([0.2, 0.4, 0.9]), rng.randint(1, 4)) for _ in range(size)]
        wrong = sorted(rng.sample(range(1, size + 1), 2)) if category != "multi_solutions" else []
        rows.append(
            {
                "original_question": "q",
                "modified_question": f"question {category} {i}",
                "original_process": ["1. a"],
                "modified_process": steps,
                "modified_steps": wrong,
                "error_steps": wrong,
                "reason": "",
                "idx": f"{category}_{i}",
                "question": "q",
                "classification": category,
            }
        )
    return rows


#: name of a benchmark -> a made file
MADE = {
    "rewardbench": lambda rng: made_reward_bench(rng, ["donotanswer", "hep-go", "mt-bench-hard"]),
    "rewardbench2": made_reward_bench_2,
    "rmbench": made_rm_bench,
    "judgebench": made_judge_bench,
    "ppe": made_ppe,
    "processbench": made_process_bench,
    "prmbench": made_prm_bench,
}
