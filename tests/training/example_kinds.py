"""Each kind of training by example: rows of text, rows of token ids, settings, a whole run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from companion import (
    ModelArguments,
    evaluate_pairs,
    evaluate_rankings,
    evaluate_tokens,
    load_base,
    load_rows,
    load_scorer,
)
from companion.evaluation import Evaluation
from companion.training import TrainingResult, load_kind, train

QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
SEPARATOR = " so "


# ---------------------------------------------------------------------- rows of text


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Ana has {number % 20} pens and {number // 20}"}]


def pairs(n: int, *, long: int = 0) -> list[dict[str, Any]]:
    """Three rows a prompt; the first `long` of them too long for 60 tokens."""
    return [
        {
            "prompt": asked(i // 3),
            "chosen": said(f"the answer is {i % 3}"),
            "rejected": said(f"no {i % 3}" + (" more" * 60 if i < long else "")),
            "subset": "even" if i % 2 == 0 else "odd",
        }
        for i in range(n)
    ]


def rankings(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """The more often 'good', the better; two to four completions in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        size = 2 + i % 3
        order = torch.randperm(size, generator=generator).tolist()
        texts = ["the answer is " + "good " * k + "bad " * (size - k) for k in order]
        ranks = [float(size - k) for k in order]
        rows.append({"prompt": asked(i), "completions": list(map(said, texts)), "ranks": ranks})
    return rows


def rankings_with_gaps(n: int) -> list[dict[str, Any]]:
    """In some, one completion more: it is too long for 60 tokens, or has no rank."""
    rows = rankings(n)
    for i, row in enumerate(rows):
        if i % 5 == 1:
            row["completions"] = [*row["completions"], said("bad " * 70)]
            row["ranks"] = [*row["ranks"], 9.0]
        elif i % 5 == 2:
            row["completions"] = [said("so good"), *row["completions"]]
            row["ranks"] = [None, *row["ranks"]]
    return rows


def outcomes(n: int) -> list[dict[str, Any]]:
    """Text rows; 'good' is right, and the wrong ones are longer."""
    return [
        {
            "prompt": asked(i)[0]["content"],
            "completion": "the answer is " + ("good" if i % 3 else "bad bad bad"),
            "label": bool(i % 3),
        }
        for i in range(n)
    ]


def solutions(n: int) -> list[dict[str, Any]]:
    """Steps that say whether they are right; behind the first wrong one there is no label."""
    rows = []
    for i in range(n):
        kinds = [(1, 1, 1), (1, -1, None), (0, 1, -1), (-1, None, None), (1, 1, 0)][i % 5]
        word = {1: "right", 0: "hello", -1: "wrong", None: "right"}
        rows.append(
            {
                "prompt": asked(i)[0]["content"],
                "completions": [f"{word[kind]} {j}" for j, kind in enumerate(kinds)],
                "labels": list(kinds),
            }
        )
    return rows


# ---------------------------------------------------------------------- rows of token ids


def drawn(n: int, low: int, high: int, *, each: int = 1, seed: int = 3) -> list[list[list[int]]]:
    """`n` groups of `each` texts of token ids; those of a group begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(9, 60, (length,), generator=generator).tolist()

    starts = [[1, *ids(low, high)] for _ in range(n)]
    return [[[*start, *ids(2, 9), 2] for _ in range(each)] for start in starts]


def pair_ids(n: int) -> list[dict[str, Any]]:
    texts = drawn(n, 10, 16, each=2)
    return [{"chosen_ids": a, "rejected_ids": b} for a, b in texts]


def ranking_ids(n: int) -> list[dict[str, Any]]:
    texts = drawn(n, 10, 16, each=4)
    ranks = [1.0, 2.0, 2.0, 3.0]
    return [
        {"completion_ids": own[: 2 + i % 3], "ranks": ranks[: 2 + i % 3]}
        for i, own in enumerate(texts)
    ]


def outcome_ids(n: int) -> list[dict[str, Any]]:
    flat = [ids for group in drawn(-(-n // 3), 10, 16, each=3) for ids in group]
    return [
        {"input_ids": ids, "prompt_length": 8 + i % 2, "label": i % 2}
        for i, ids in enumerate(flat[:n])
    ]


def step_ids(n: int) -> list[dict[str, Any]]:
    flat = [ids for group in drawn(-(-n // 3), 10, 16, each=3) for ids in group]
    return [
        {
            "input_ids": ids,
            "ends": [5, len(ids) - 3, len(ids) - 1],  # one within what is shared
            "targets": [float(i % 3), -100.0, 2.0],
        }
        for i, ids in enumerate(flat[:n])
    ]


# ---------------------------------------------------------------------- kinds


@dataclass
class Example:
    """A kind, with rows of it; `settings` are those of a whole run on ``texts(n)``."""

    name: str
    texts: Callable[[int], list[dict[str, Any]]]
    ids: Callable[[int], list[dict[str, Any]]]
    n: int = 90
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def trainer(self, base: Path, folder: Path, *, rows: Any = None, **more: Any) -> Any:
        """On token ids, from a fresh base."""
        kind = load_kind(self.name)
        rows = self.ids(7) if rows is None else rows
        from datasets import Dataset

        config = kind.trainer.config_class(str(folder), **{**QUIET, "use_cpu": True, **more})
        return kind.trainer(self.base(base, config), config, train_dataset=Dataset.from_list(rows))

    def base(self, path: Path, config: Any) -> Any:
        labels = load_kind(self.name).trainer.labels(config)
        return load_base(path, labels=labels)

    def run(self, base: Path, folder: Path, **more: Any) -> TrainingResult[Any]:
        """On rows of text, to a saved folder."""
        kind = load_kind(self.name)
        source = folder / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, self.texts(self.n))))
        settings = {"per_device_train_batch_size": 8, "learning_rate": 5e-3, "max_length": 60}
        return train(
            kind,
            kind.trainer.config_class(
                str(folder / "model"), **{**QUIET, **settings, **self.settings, **more}
            ),
            ModelArguments(model_name_or_path=str(base), **self.model),
            kind.data(dataset_name=str(source), eval_fraction=0.3),
            say=lambda line: None,
        )

    def evaluate(self, result: TrainingResult[Any]) -> Evaluation:
        """The saved model on the rows of the figures, as ``companion evaluate`` does it."""
        scorer: Any = load_scorer(result.output_dir, device="cpu")
        if self.name == "pairwise":
            return evaluate_pairs(scorer, result.test.rows)
        if self.name == "kwise":
            rows = load_rows(list(result.test.rankings), kind="rankings")
            return evaluate_rankings(scorer, rows)
        return evaluate_tokens(scorer, result.test.rows)


PAIRWISE = Example("pairwise", pairs, pair_ids, settings={"learning_rate": 3e-3})
KWISE = Example("kwise", rankings_with_gaps, ranking_ids)
OUTCOME = Example("outcome", outcomes, outcome_ids)
PROCESS = Example(
    "process",
    solutions,
    step_ids,
    n=120,
    settings={"step_separator": SEPARATOR, "num_train_epochs": 2},
)
KINDS = {kind.name: kind for kind in (PAIRWISE, KWISE, OUTCOME, PROCESS)}


def variant(kind: Example, model: dict[str, Any] | None = None, **settings: Any) -> Example:
    """The same kind, trained in another way."""
    return Example(
        kind.name, kind.texts, kind.ids, kind.n, {**kind.settings, **settings}, model or {}
    )


#: whole runs (test_whole_runs.py)
RUNS = {
    "pairwise": PAIRWISE,
    "kwise": KWISE,
    "kwise, pairs": variant(KWISE, loss_type="pairs"),
    "outcome": OUTCOME,
    "outcome, LoRA": variant(OUTCOME, {"use_peft": True, "lora_r": 4}, learning_rate=2e-2),
    "process": PROCESS,
    "process, binary": variant(PROCESS, label_type="binary"),
    "process, neutral is bad": variant(PROCESS, label_type="binary", neutral="bad"),
}
