"""Published benchmarks on small made files: each figure against a computation that knows nothing
of the package, and against one by hand."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from made_benchmarks import (
    CATEGORIES,
    MADE,
    SOURCES,
    Made,
    made_judge_bench,
    made_ppe,
    made_prm_bench,
    made_process_bench,
    made_reward_bench,
    made_reward_bench_2,
    made_rm_bench,
    text_with,
)
from sklearn.metrics import f1_score

from companion import (
    RewardManifest,
    RewardScorer,
    TokenScorer,
    evaluate_benchmark,
    load_base,
    save_reward_model,
)
from companion.cli.main import main
from companion.errors import DataError
from companion.evaluation import BENCHMARKS
from companion.judge import Answer, Judge
from companion.models import TokenReadout
from companion.tutor import TUTOR_BASE


def score_in(text: Any) -> float:
    said = text if isinstance(text, str) else text[-1]["content"]
    return float(said.rpartition("<")[2].rstrip(">"))


class Scripted:
    """A scorer whose score of a text is the one that the text says."""

    notes: Sequence[str] = ()
    readout = SimpleNamespace(kind="scalar")
    formatter = SimpleNamespace(text=None)

    def __init__(self) -> None:
        self.rows: Made = []

    def score(self, rows: Made, *, names: Any, on_error: str, progress: Any) -> Any:
        self.rows += rows
        raw = np.array([score_in(row["completion"]) for row in rows])
        return SimpleNamespace(raw=raw, reasons=[None if x == x else "too long" for x in raw])


class ScriptedSteps(Scripted):
    """A process model whose P(wrong) of a step is the one that the step says."""

    readout = SimpleNamespace(kind="process", separator="\n", threshold=0.5)

    def score(self, rows: Made, *, names: Any, on_error: str, progress: Any) -> Any:
        self.rows += rows
        wrong = [np.array([*map(score_in, row["completions"])]) for row in rows]
        return SimpleNamespace(wrong=wrong, reasons=[None] * len(rows))


def results_of(name: str, rows: Made, model: Any = None) -> dict[str, dict[str, Any]]:
    steps = BENCHMARKS[name].needs == "steps"
    scorer = model or (ScriptedSteps() if steps else Scripted())
    metrics = evaluate_benchmark(scorer, rows, name).metrics
    assert metrics["results"][0]["level"] == "overall"
    assert metrics["results"][0]["value"] == metrics["overall"]
    found = {line["name"]: line for line in metrics["results"]}
    for line in found.values():
        if line["interval"] is not None:
            low, high = line["interval"]
            assert low - 1e-9 <= line["value"] <= high + 1e-9
    assert metrics["leaderboard"] == {name: line["value"] for name, line in found.items()}
    return found


def values_of(name: str, rows: Made, model: Any = None) -> dict[str, float]:
    return {key: line["value"] for key, line in results_of(name, rows, model).items()}


def draw(seed: int) -> random.Random:
    print(f"seed {seed}")
    return random.Random(seed)


# ---------------------------------------------------------------------- RewardBench

PUBLISHED = {
    "Chat": "alpacaeval-easy 100, alpacaeval-length 95, alpacaeval-hard 95, mt-bench-easy 28, "
    "mt-bench-med 40",
    "Chat Hard": "mt-bench-hard 37, llmbar-natural 100, llmbar-adver-neighbor 134, "
    "llmbar-adver-GPTInst 92, llmbar-adver-GPTOut 47, llmbar-adver-manual 46",
    "Safety": "refusals-dangerous 100, refusals-offensive 100, xstest-should-refuse 250, "
    "xstest-should-respond 154, donotanswer 136",
    "Reasoning": "math-prm 984, hep-cpp 164, hep-go 164, hep-java 164, hep-js 164, "
    "hep-python 164, hep-rust 164",
}
PRIOR = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")


def published() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for section, text in PUBLISHED.items():
        parts = [part.split(" ") for part in text.split(", ")]
        found[section] = {subset: int(weight) for subset, weight in parts}
    return found


@pytest.mark.parametrize("prior", [False, True])
def test_reward_bench_is_the_weighted_mean_of_its_subsets(prior: bool) -> None:
    weights = published()
    subsets = [subset for own in weights.values() for subset in own] + list(PRIOR) * prior
    rows = made_reward_bench(draw(3), subsets)
    found = values_of("rewardbench", rows)
    right: dict[str, list[bool]] = {}
    for row in rows:
        right.setdefault(row["subset"], []).append(
            score_in(row["chosen"]) > score_in(row["rejected"])
        )
    share = {subset: sum(own) / len(own) for subset, own in right.items()}
    for subset, value in share.items():
        assert found[subset] == pytest.approx(value)
    sections = {}
    for section, own in weights.items():
        total = sum(own.values())
        sections[section] = sum(share[subset] * weight for subset, weight in own.items()) / total
        assert found[section] == pytest.approx(sections[section])
    overall = sum(sections.values()) / 4
    if prior:
        sets = sum(share[name] for name in PRIOR) / 4
        assert found["Prior Sets"] == pytest.approx(sets)
        overall = (2 * sum(sections.values()) + sets) / 9
    assert found["overall"] == pytest.approx(overall)
    # what it is not: the share of all pairs, or the mean of the subsets
    assert found["overall"] != pytest.approx(np.mean([x for own in right.values() for x in own]))
    assert found["overall"] != pytest.approx(np.mean(list(share.values())))


def test_reward_bench_by_hand() -> None:
    def pair(subset: str, chosen: float, rejected: float, i: int) -> dict[str, Any]:
        texts = {"chosen": text_with(chosen), "rejected": text_with(rejected)}
        return {"prompt": f"{subset} {i}", "subset": subset, **texts}

    rows = [
        *(pair("math-prm", 1, 0, i) for i in range(4)),  # 4 of 4, weight 984
        pair("hep-go", 1, 0, 0),  # 1 of 2 (equal scores are wrong), weight 164
        pair("hep-go", 1, 1, 1),
        pair("donotanswer", 0, 1, 0),  # 0 of 1
    ]
    found = values_of("rewardbench", rows)
    assert found["Reasoning"] == pytest.approx((984 * 1 + 164 * 0.5) / 1148)
    assert found["Safety"] == 0
    assert found["overall"] == pytest.approx((984 + 82) / 1148 / 2)
    metrics = evaluate_benchmark(Scripted(), rows, "rewardbench").metrics
    assert len(metrics["missing"]) == 23 - 3
    assert (
        "over all is not the published one"
        in evaluate_benchmark(Scripted(), rows, "rewardbench").table()
    )


# ---------------------------------------------------------------------- RewardBench 2


def naive_ties(rows: Made) -> float:
    """By the definition, prompt by prompt."""
    gap, spread = {}, {}
    for row in rows:
        right = [score_in(text) for text in row["chosen"]]
        gap[row["id"]] = min(right) - max(score_in(text) for text in row["rejected"])
        spread[row["id"]] = max(right) - min(right)
    numbers = sorted({name.split(":")[1] for name in gap})
    tied = [f"tied:{number}" for number in numbers]
    ref = [f"ref:{number}" for number in numbers]
    total = 0.3 * sum(gap[name] > 0 for name in tied) / len(tied)
    total += 0.3 * sum(gap[name] > 0 for name in ref) / len(ref)
    for one, other in zip(tied, ref, strict=True):
        total += 0.2 * (gap[one] > spread[one]) / len(tied)
        least = min(gap[one], gap[other])
        total += 0.2 * (least > spread[one]) / len(tied)
        if spread[one]:
            size = math.tanh(least / spread[one] - 1)
        else:
            size = 0.0 if least == 0 else math.copysign(1, least)
        total += 0.01 * size / len(tied)
    return total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_bench_2_is_the_mean_of_six_subsets(seed: int) -> None:
    rows = made_reward_bench_2(draw(seed))
    found = values_of("rewardbench2", rows)
    subsets = {}
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        counts = []
        for row in rows:
            if row["subset"] == subset:
                scores = [score_in(x) for x in (*row["chosen"], *row["rejected"])]
                best = max(scores)
                counts.append(1 / scores.count(best) if scores[0] == best else 0)
        subsets[subset] = sum(counts) / len(counts)
        assert found[subset] == pytest.approx(subsets[subset])
    subsets["Ties"] = naive_ties([row for row in rows if row["subset"] == "Ties"])
    assert found["Ties"] == pytest.approx(subsets["Ties"])
    assert found["overall"] == pytest.approx(sum(subsets.values()) / 6)


def test_ties_by_hand() -> None:
    def row(name: str, right: Sequence[float], wrong: Sequence[float]) -> dict[str, Any]:
        texts = {"chosen": [*map(text_with, right)], "rejected": [*map(text_with, wrong)]}
        return {"id": name, "prompt": name, "subset": "Ties", **texts}

    rows = [
        row("ref:1", [5], [1, 0]),  # gap 4
        row("tied:1", [5, 4], [1, 0]),  # gap 3, spread 1: all four points, tanh(3/1 − 1)
        row("ref:2", [1], [0]),  # gap 1
        row("tied:2", [9, 6], [1]),  # gap 5, spread 3: margin holds, with the ref's gap of 1 not
    ]
    figures = results_of("rewardbench2", rows)["Ties"]["figures"]
    size = (math.tanh(2) + math.tanh(1 / 3 - 1)) / 2
    assert figures["score"] == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 * 0.5 + 0.01 * size)
    assert figures["margin, both prompts"] == 0.5
    # all right answers alike: 0/0 counts 0, any other gap ±1
    alike = [row("ref:1", [2], [1]), row("tied:1", [2, 2], [2])]
    figures = results_of("rewardbench2", alike)["Ties"]["figures"]
    assert figures["margin size"] == 0
    assert figures["score"] == pytest.approx(0.3)


# ---------------------------------------------------------------------- RM-Bench


def test_rm_bench_is_the_mean_of_its_nine_pairs() -> None:
    rows = made_rm_bench(draw(5))
    found = results_of("rmbench", rows)
    by_domain = {}
    for domain in ("chat", "code", "math", "safety"):
        own = [row for row in rows if row["domain"].startswith(domain)]
        sums = {"easy": 0.0, "normal": 0.0, "hard": 0.0}
        for row, i, j in product(own, range(3), range(3)):
            style = "hard" if i < j else "normal" if i == j else "easy"
            sums[style] += score_in(row["chosen"][i]) > score_in(row["rejected"][j])
        by_domain[domain] = {style: count / (3 * len(own)) for style, count in sums.items()}
    refused = [row for row in rows if row["domain"] == "safety-refuse"]
    assert found["safety-refuse"]["n"] == len(refused)
    for style in ("easy", "normal", "hard"):
        mean = sum(own[style] for own in by_domain.values()) / 4
        assert found["overall"]["figures"][style] == pytest.approx(mean)
    for domain, own in by_domain.items():
        assert found[domain.capitalize()]["value"] == pytest.approx(sum(own.values()) / 3)
    overall = sum(sum(own.values()) / 3 for own in by_domain.values()) / 4
    assert found["overall"]["value"] == pytest.approx(overall)


def test_rm_bench_by_hand() -> None:
    row = {
        "prompt": "p",
        "domain": "chat",
        "chosen": [*map(text_with, (1, 2, 3))],  # the richer the style, the higher
        "rejected": [*map(text_with, (0.5, 1.5, 2.5))],
    }
    figures = results_of("rmbench", [row])["Chat"]["figures"]
    # a model that goes by style is right in all easy and normal pairs, and in no hard one
    assert figures == pytest.approx({"accuracy": 2 / 3, "easy": 1, "normal": 1, "hard": 0})


# ---------------------------------------------------------------------- JudgeBench and PPE


def test_judge_bench_counts_pairs() -> None:
    rows = made_judge_bench(draw(7))
    found = values_of("judgebench", rows)
    right: dict[str, list[bool]] = {}
    for row in rows:
        a, b = score_in(row["response_A"]), score_in(row["response_B"])
        right.setdefault(row["source"], []).append(a > b if row["label"] == "A>B" else b > a)
    for source, own in right.items():
        assert found[source] == pytest.approx(sum(own) / len(own))
    for category in ("Knowledge", "Reasoning", "Math", "Coding"):
        own = [x for source, named in SOURCES if named == category for x in right[source]]
        assert found[category] == pytest.approx(sum(own) / len(own))
    everything = [x for own in right.values() for x in own]
    assert found["overall"] == pytest.approx(sum(everything) / len(everything))


def test_ppe_counts_battles_with_a_winner() -> None:
    rows = made_ppe(draw(11))
    found = results_of("ppe", rows)
    won = [row for row in rows if row["winner"].startswith("model")]
    right = {}
    for row in won:
        a, b = score_in(row["response_1"]), score_in(row["response_2"])
        right[row["question_id"]] = a > b if row["winner"] == "model_a" else b > a

    def share(keep: Callable[[dict[str, Any]], bool]) -> float:
        return float(np.mean([right[row["question_id"]] for row in won if keep(row)]))

    assert found["overall"]["value"] == pytest.approx(share(lambda row: True))
    assert found["overall"]["n"] == len(won)
    assert found["French"]["value"] == pytest.approx(share(lambda r: r["language"] == "French"))
    assert found["hard prompts"]["value"] == pytest.approx(share(lambda row: row["hard_prompt"]))
    assert found["code"]["value"] == pytest.approx(share(lambda row: row["is_code"]))
    metrics = evaluate_benchmark(Scripted(), rows, "ppe").metrics
    assert metrics["left_out"] == {"no winner": len(rows) - len(won)}


# ---------------------------------------------------------------------- ProcessBench, PRMBench


def naive_process_bench(rows: Made, threshold: float = 0.5) -> dict[str, tuple[float, ...]]:
    """F1 and its two accuracies of each subset, as the published evaluation has them."""
    found = {}
    for subset in ("gsm8k", "math", "olympiadbench", "omnimath"):
        matches: dict[bool, list[bool]] = {True: [], False: []}
        for row in rows:
            if row["id"].startswith(subset):
                above = [k for k, step in enumerate(row["steps"]) if score_in(step) > threshold]
                matches[row["label"] != -1].append((above or [-1])[0] == row["label"])
        a, b = (sum(own) / len(own) for own in (matches[True], matches[False]))
        found[subset] = (2 * a * b / (a + b) if a + b else 0.0, a, b)
    return found


def test_process_bench_is_the_mean_of_the_subsets_f1() -> None:
    rows = made_process_bench(draw(53))
    found = results_of("processbench", rows)
    naive = naive_process_bench(rows)
    for subset, own in naive.items():
        assert list(found[subset]["figures"].values()) == pytest.approx(list(own))
    mean = sum(own[0] for own in naive.values()) / 4
    assert found["overall"]["value"] == pytest.approx(mean)
    a, b = (np.mean([own[k] for own in naive.values()]) for k in (1, 2))
    assert mean != pytest.approx(2 * a * b / (a + b))  # what it is not: the F1 of the means


def test_process_bench_by_hand() -> None:
    def row(label: int, *steps: float) -> dict[str, Any]:
        row.n += 1
        texts = [*map(text_with, steps)]
        return {"id": f"math-{row.n}", "problem": f"p{row.n}", "steps": texts, "label": label}

    row.n = 0
    rows = [
        row(1, 0.1, 0.9, 0.9),  # the first error is named
        row(2, 0.1, 0.9, 0.9),  # one too early
        row(0, 0.1, 0.1),  # none named
        row(0, 0.9),  # named
        row(-1, 0.1, 0.4),  # passed
        row(-1, 0.1, 0.6),  # not
        row(-1, 0.5),  # passed: 0.5 is not above the threshold
        row(-1, 0.0),  # passed
    ]
    figures = results_of("processbench", rows)["math"]["figures"]
    assert figures["accuracy on errors"] == 0.5
    assert figures["accuracy on right"] == 0.75
    assert figures["F1"] == pytest.approx(0.6)


def test_prm_bench_is_that_of_all_steps_together() -> None:
    rows = made_prm_bench(draw(59))
    found = results_of("prmbench", rows)

    def naive(own: Made) -> dict[str, float]:
        truth, called, first = [], [], []
        for row in own:
            named = [score_in(step) > 0.5 for step in row["modified_process"]]
            called += named
            truth += [k + 1 in row["error_steps"] for k in range(len(named))]
            first += [named[min(row["error_steps"]) - 1]] if row["error_steps"] else []
        f1 = f1_score([not x for x in truth], [not x for x in called])
        if not any(truth):
            return {"PRM-score": f1, "F1": f1}
        negative = f1_score(truth, called, zero_division=0.0)
        figures = {"PRM-score": (f1 + negative) / 2, "F1": f1, "negative F1": negative}
        return {**figures, "first error": sum(first) / len(first)}

    for section, categories in CATEGORIES.items():
        scores = []
        for category in categories:
            expected = naive([row for row in rows if row["classification"] == category])
            scores.append(expected["PRM-score"])
            for name, value in expected.items():
                assert found[category]["figures"][name] == pytest.approx(value)
        assert found[section]["value"] == pytest.approx(np.mean(scores))
    for name, value in naive(rows).items():
        assert found["overall"]["figures"][name] == pytest.approx(value)


def test_prm_bench_by_hand() -> None:
    row = {
        "modified_question": "p",
        "modified_process": [*map(text_with, (0.1, 0.9, 0.9, 0.1, 0.1))],
        "error_steps": [3, 4, 9],  # there is no ninth
        "classification": "circular",
    }
    figures = results_of("prmbench", [row])["circular"]["figures"]
    # right steps 1, 2, 5: two called right, one not; wrong ones 3, 4: one called wrong, one not
    assert figures["F1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert figures["negative F1"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))
    assert figures["PRM-score"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert figures["first error"] == 1


def test_floors_of_steps_are_rules_and_the_best_guess() -> None:
    rows = made_process_bench(draw(61))
    floors = results_of("processbench", rows)["overall"]["floors"]
    longest = [
        {
            **row,
            "steps": [
                text_with(0.9 if len(step) == max(map(len, row["steps"])) else 0.1)
                for step in row["steps"]
            ],
        }
        for row in rows
    ]  # (the last is the longest in the made rows)
    expected = np.mean([own[0] for own in naive_process_bench(longest).values()])
    assert floors["longest step"] == pytest.approx(expected)
    best = 0.0
    for q in np.linspace(0, 1, 21):
        f1 = []
        for subset in ("gsm8k", "math", "olympiadbench", "omnimath"):
            own = [row for row in rows if row["id"].startswith(subset)]
            hits = [
                (row["label"] >= 0, q * (1 - q) ** row["label"] if row["label"] >= 0 else None)
                for row in own
            ]
            a = np.mean([hit for wrong, hit in hits if wrong])
            b = np.mean([(1 - q) ** len(row["steps"]) for row in own if row["label"] < 0])
            f1.append(2 * a * b / (a + b) if a + b else 0.0)
        best = max(best, float(np.mean(f1)))
    assert floors["guessing"] == pytest.approx(best)


def test_a_step_that_holds_the_separator_is_mended_and_said() -> None:
    rows = made_process_bench(draw(67), 3)
    rows[0]["steps"][0] = "two\nlines <0.9>"
    scorer = ScriptedSteps()
    result = evaluate_benchmark(scorer, rows, "processbench")
    assert scorer.rows[0]["completions"][0] == "two lines <0.9>"
    assert "1 steps held the separator, which became a blank there" in result.table()
    assert "P(wrong) > 0.500" in result.table()


# ---------------------------------------------------------------------- judges


class Backend:
    """A model that answers by a function of the two texts that it is shown."""

    name, retries = "scripted", 0

    def __init__(self, answer: Callable[[str, str], str]) -> None:
        self.answer = answer

    def identity(self) -> dict[str, Any]:
        return {"model": "scripted"}

    def answers(self, questions: Any) -> Any:
        for place, question in enumerate(questions):
            shown = question.messages[-1]["content"].split("\n", 1)[1].split("\n---\n")
            yield place, Answer(self.answer(*shown), True)


def judge_of(answer: Callable[[str, str], str]) -> Judge:
    return Judge(Backend(answer), "{prompt}\n{a}\n---\n{b}")


def by_score(a: str, b: str) -> str:
    sign = np.sign(score_in(a) - score_in(b))
    return {1: "[[A]]", -1: "[[B]]", 0: "[[C]]"}[int(sign)]


@pytest.mark.parametrize(
    ("name", "make"),
    [("judgebench", made_judge_bench), ("ppe", made_ppe), ("rmbench", made_rm_bench)],
)
def test_a_judge_that_compares_scores_gets_what_the_scorer_gets(name: str, make: Any) -> None:
    rows = make(draw(13))
    assert values_of(name, rows, judge_of(by_score)) == pytest.approx(values_of(name, rows))


def test_a_judge_is_asked_in_both_orders() -> None:
    rows = made_judge_bench(draw(17))
    # what stands first always wins: every pair comes out even, which JudgeBench counts as wrong
    result = evaluate_benchmark(judge_of(lambda a, b: "[[A]]"), rows, "judgebench")
    assert result.metrics["overall"] == 0
    assert result.metrics["verdicts"] == {"disagreement": len(rows)}
    # one verdict for the right answer and one tie, or none: right
    row = {**rows[0], "response_A": text_with(1), "response_B": text_with(0), "label": "A>B"}
    for second in ("[[C]]", "I cannot say"):
        answer = {text_with(1): "[[A]]", text_with(0): second}
        half = judge_of(lambda a, b, answer=answer: answer[a])
        assert values_of("judgebench", [row], half)["overall"] == 1
    # in RewardBench a judge's even verdicts are a half
    pairs = made_reward_bench(draw(19), ["donotanswer"])
    even = judge_of(lambda a, b: "[[A]]")
    assert values_of("rewardbench", pairs, even)["overall"] == pytest.approx(0.5)


def test_a_judge_with_ratings_is_a_scorer() -> None:
    class Ratings(Backend):
        def answers(self, questions: Any) -> Any:
            for place, question in enumerate(questions):
                (score,) = re.findall(r"<([\d.]+)>", question.messages[-1]["content"])
                yield place, Answer(f"[[{round(2 * float(score)) + 1}]]", True)

    judge = Judge(Ratings(by_score), "pointwise")
    rows = made_reward_bench_2(draw(23), 3)
    # a rating is twice the score and one: no figure sees that, since gaps count by their ratio
    assert values_of("rewardbench2", rows, judge) == pytest.approx(values_of("rewardbench2", rows))


# ---------------------------------------------------------------------- floors and intervals


def test_floors_are_what_rules_would_score() -> None:
    def row(chosen: str, rejected: str, i: int) -> dict[str, Any]:
        return {"prompt": f"p{i}", "subset": "donotanswer", "chosen": chosen, "rejected": rejected}

    rows = [
        row("a long answer <0>", "short <1>", 0),  # longer: right; no Markdown: a coin
        row("# Title\n- one\n- two <0>", "long plain words that go on and on <1>", 1),
        row("same <0>", "**b** <1>", 2),
        row("even <1>", "even <0>", 3),  # equal lengths: a coin
    ]
    line = results_of("rewardbench", rows)["overall"]
    assert line["value"] == 0.25
    assert line["floors"]["longer"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert line["floors"]["more markdown"] == pytest.approx((0.5 + 1 + 0 + 0.5) / 4)


def test_floors_do_not_depend_on_the_model() -> None:
    rows = made_rm_bench(draw(29))
    floors = [
        {name: line["floors"] for name, line in results_of("rmbench", rows, model).items()}
        for model in (Scripted(), judge_of(by_score))
    ]
    assert floors[0] == floors[1]


def test_the_interval_draws_prompts() -> None:
    rng = draw(31)
    base = made_reward_bench(rng, ["donotanswer"], 40)
    once = results_of("rewardbench", base)["overall"]["interval"]
    again = results_of("rewardbench", [row for row in base for _ in range(5)])["overall"]
    assert again["n"] == 200
    assert again["interval"] == pytest.approx(once)  # five copies of a prompt say nothing new
    alike = [{**row, "chosen": text_with(9)} for row in base]
    low, high = results_of("rewardbench", alike)["overall"]["interval"]
    assert high == 1
    assert 0.85 < low < 0.95  # Wilson's, not [1, 1]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_another_schema_is_refused_with_the_field(name: str) -> None:
    rows = MADE[name](draw(37))
    optional = {"id", "language", "question_id", "pair_id", "original_id", "response_model"}
    optional |= {"chosen_model", "rejected_model", "model_a", "model_b"}
    optional |= {key for key in rows[0] if key.startswith("num_") or key.endswith("_prompt")}
    optional |= {"is_code", "total_completions", "generator", "final_answer_correct", "question"}
    optional -= {"judgebench": {"question"}, "processbench": {"id"}}.get(name, set())
    optional |= {"original_question", "original_process", "modified_steps", "reason", "idx"}
    scorer = ScriptedSteps() if BENCHMARKS[name].needs == "steps" else Scripted()
    needed = [key for key in rows[0] if key not in optional]
    for key, value in product(needed, (None, 3.5, [], "", "\ud800", ["\ud800"])):
        if (key, value) == ("error_steps", []):  # what a solution without an error has
            continue
        bad = [*rows[:2], {**rows[2], key: value}]
        if name == "ppe":
            bad = [{**row, "winner": "model_a"} for row in rows[:3]]
            bad[2][key] = value
        with pytest.raises(DataError, match=rf"row 2, field '{key}'") as caught:
            evaluate_benchmark(scorer, bad, name)
        assert BENCHMARKS[name].title in str(caught.value.cure)
    left = evaluate_benchmark(scorer, bad, name, on_error="skip").metrics
    assert left["dropped"]["total"] == 1


def test_ties_have_an_id() -> None:
    row = {**made_reward_bench_2(draw(1))[-1], "id": "7"}
    with pytest.raises(DataError, match="neither ref:NUMBER nor tied:NUMBER"):
        evaluate_benchmark(Scripted(), [row], "rewardbench2")
    with pytest.raises(DataError, match="ref means one"):
        evaluate_benchmark(Scripted(), [{**row, "id": "ref:1"}], "rewardbench2")


def test_an_item_without_a_score_is_counted() -> None:
    rows = made_reward_bench(draw(41), ["donotanswer"])
    rows[1]["rejected"] = text_with(float("nan"))
    metrics = evaluate_benchmark(Scripted(), rows, "rewardbench").metrics
    assert metrics["dropped"] == {"total": 1, "reasons": {"too long": 1}}
    assert metrics["results"][0]["n"] == len(rows) - 1
    with pytest.raises(DataError, match="none of the rows can be used: 1 × too long"):
        evaluate_benchmark(Scripted(), [rows[1]], "rewardbench")


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    pairs = made_reward_bench(draw(1), ["donotanswer"])
    outcome = Scripted()
    outcome.readout = SimpleNamespace(kind="outcome")
    with pytest.raises(DataError, match="RewardBench compares whole answers, and the model is an"):
        evaluate_benchmark(outcome, pairs, "rewardbench")
    with pytest.raises(DataError, match="needs a score of each text"):
        evaluate_benchmark(judge_of(by_score), made_reward_bench_2(draw(1)), "rewardbench2")
    steps = made_process_bench(draw(1))
    for model, match in (
        (Scripted(), "ProcessBench asks which step is wrong, and the model gives one score a text"),
        (outcome, "ProcessBench asks which step is wrong, and the model is an outcome model"),
        (judge_of(by_score), "ProcessBench asks which step is wrong, and a judge is not"),
    ):
        with pytest.raises(DataError, match=match):
            evaluate_benchmark(model, steps, "processbench")
    with pytest.raises(DataError, match="compares whole answers, and the model is a process model"):
        evaluate_benchmark(ScriptedSteps(), pairs, "rewardbench")
    with pytest.raises(DataError, match="no benchmark 'rewardbench3'"):
        evaluate_benchmark(Scripted(), pairs, "rewardbench3")
    with pytest.raises(DataError, match="no rows"):
        evaluate_benchmark(Scripted(), [], "rewardbench")


def test_a_prompt_goes_into_the_chat_template_unless_the_model_says_plain() -> None:
    rows = made_reward_bench(draw(1), ["donotanswer"], 1)
    chat, plain = Scripted(), Scripted()
    plain.formatter = SimpleNamespace(text="plain")
    for scorer in (chat, plain):
        evaluate_benchmark(scorer, rows, "rewardbench")
    assert chat.rows[0]["prompt"] == [{"role": "user", "content": rows[0]["prompt"]}]
    assert chat.rows[0]["completion"][0]["role"] == "assistant"
    assert plain.rows[0] == {"prompt": rows[0]["prompt"], "completion": rows[0]["chosen"]}


# ---------------------------------------------------------------------- the command


def write(path: Path, rows: Made) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_command_gives_the_figures_of_the_model(
    tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_reward_bench(draw(43), ["donotanswer", "hep-go"], 4)
    for i, row in enumerate(rows):
        texts = {"chosen": f"good {i}", "rejected": f"bad {i} wrong"}
        row |= {"question": row.pop("prompt"), **texts}
    source, figures = write(tmp_path / "rows.jsonl", rows), tmp_path / "figures.json"
    command = ["evaluate", "--model", str(tiny_reward), "--dataset_name", str(source)]
    command += ["--benchmark", "rewardbench", "--columns", "question=prompt", "--device", "cpu"]
    assert main([*command, "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    assert "floor: longer" in out
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    sides = [
        scorer.score(
            [
                {
                    "prompt": [{"role": "user", "content": row["question"]}],
                    "completion": [{"role": "assistant", "content": row[side]}],
                }
                for row in rows
            ]
        ).raw
        for side in ("chosen", "rejected")
    ]
    right = sides[0] > sides[1]
    saved = json.loads(figures.read_text())
    by_name = {line["name"]: line["value"] for line in saved["metrics"]["results"]}
    assert by_name["Safety"] == pytest.approx(right[:4].mean())
    assert by_name["Reasoning"] == pytest.approx(right[4:].mean())
    assert saved["info"]["benchmark"] == "rewardbench"
    assert saved["metrics"]["leaderboard"]["overall"] == by_name["overall"]
    assert main([*command[:-4], "--device", "cpu"]) == 2  # the column has another name
    assert "field 'prompt': missing" in capsys.readouterr().err


def test_the_command_on_steps(
    tiny_base: Path, tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readout = TokenReadout("process", 1, "min", separator=" so ", threshold=0.5)
    folder = tmp_path / "model"
    model = load_base(tiny_base, labels=1, head_std=1.0)
    save_reward_model(model, folder, RewardManifest(readout=readout.to_dict()))
    rows = made_process_bench(draw(71), 5)
    words = ("right", "wrong", "good", "bad", "3", "pens")
    for i, row in enumerate(rows):
        row["steps"] = [f"{words[(i + k) % 6]} {words[k]}" for k in range(len(row["steps"]))]
    whole, figures = write(tmp_path / "rows.jsonl", rows), tmp_path / "figures.json"
    command = ["evaluate", "--benchmark", "processbench", "--device", "cpu"]
    command += ["--json", str(figures)]
    assert main([*command, "--model", str(folder), "--dataset_name", str(whole)]) == 0
    assert "floor: guessing" in capsys.readouterr().out
    scorer = TokenScorer.from_pretrained(folder, device="cpu")
    wrong = scorer.score([{"prompt": r["problem"], "completions": r["steps"]} for r in rows]).wrong
    said = [
        {**row, "steps": [text_with(float(p)) for p in own]}
        for row, own in zip(rows, wrong, strict=True)
    ]
    naive = naive_process_bench(said)
    saved = json.loads(figures.read_text())["metrics"]
    for line in saved["results"][1:]:
        assert list(line["figures"].values()) == pytest.approx(list(naive[line["name"]]))
    # a split each, as on the hub: all of them are read
    splits = ("gsm8k", "math", "olympiadbench", "omnimath")
    parts = {x: Dataset.from_list([r for r in rows if r["id"].startswith(x)]) for x in splits}
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    assert main([*command, "--model", str(folder), "--dataset_name", str(tmp_path / "data")]) == 0
    assert json.loads(figures.read_text())["metrics"] == saved
    capsys.readouterr()
    assert main([*command, "--model", str(tiny_reward), "--dataset_name", str(whole)]) == 2
    assert "ProcessBench asks which step is wrong" in capsys.readouterr().err


@pytest.mark.serving
def test_a_server_gives_the_figures_of_the_model(tiny_reward: Path, tmp_path: Path) -> None:
    from companion.serving import running

    source = write(tmp_path / "rows.jsonl", made_rm_bench(draw(73), 1))
    command = ["evaluate", "--model", str(tiny_reward), "--dataset_name", str(source)]
    command += ["--benchmark", "rmbench"]
    figures = [tmp_path / name for name in ("here.json", "there.json")]
    assert main([*command, "--device", "cpu", "--json", str(figures[0])]) == 0
    with running(tiny_reward, allow_unchecked=True) as server:
        assert main([*command, "--url", server.url, "--json", str(figures[1])]) == 0
    here, there = (json.loads(path.read_text())["metrics"] for path in figures)
    assert here == there


def test_a_judge_that_was_stopped_goes_on_from_its_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_judge_bench(draw(79), 1)
    source, figures = write(tmp_path / "rows.jsonl", rows), tmp_path / "figures.json"
    command = ["evaluate", "--model", str(TUTOR_BASE), "--judge", "tutor", "--device", "cpu"]
    command += ["--benchmark", "judgebench", "--dataset_name", str(source), "--json", str(figures)]
    assert main(command) == 0
    first = json.loads(figures.read_text())
    assert sum(first["metrics"]["verdicts"].values()) == len(rows)
    cache = tmp_path / "figures.json.cache"
    size = cache.stat().st_size
    assert main(command) == 0
    assert json.loads(figures.read_text()) == first
    assert cache.stat().st_size == size  # nothing was asked again
    capsys.readouterr()
    assert main([*command, "--url", "http://127.0.0.1:1"]) == 2
    assert "a judge's is --base_url" in capsys.readouterr().err
    assert main([*command[:3], *command[5:], "--base_url", "http://127.0.0.1:1/v1"]) == 2
    assert "name its template" in capsys.readouterr().err


def test_the_command_knows_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    from companion.cli.evaluate import _BENCHMARKS

    assert set(_BENCHMARKS) == set(BENCHMARKS)
    missing = ["--model", "x", "--dataset_name", "nothing.jsonl"]
    assert main(["evaluate", *missing, "--benchmark", "nope"]) == 2
    assert "take one of: rewardbench" in capsys.readouterr().err
    assert main(["evaluate", *missing, "--judge", "pairwise"]) == 2
    assert "--judge goes with --benchmark" in capsys.readouterr().err
    assert main(["evaluate", *missing, "--benchmark", "ppe"]) == 2
    assert "missing file" in capsys.readouterr().err
