"""A run records how it read text, and its model reads rows of text so. Chapter 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from companion import load_scorer, train_pairwise
from companion.cli.train import parse
from companion.errors import CompanionError
from companion.training import DataArguments, ModelArguments, PairwiseRewardConfig


def rows(as_messages: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(16):
        row: dict[str, Any] = {"prompt": f"Ana has {i} pens .", "chosen": "yes", "rejected": "no"}
        if as_messages:
            row = {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{s: [{"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")},
            }
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("as_messages", "asked", "found"),
    [(True, "auto", "chat"), (False, "auto", "chat"), (False, "plain", "plain")],
)
def test_a_model_reads_text_as_it_was_trained(
    as_messages: bool, asked: str, found: str, tiny_base: Path, tmp_path: Path
) -> None:
    source, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    source.write_text("\n".join(map(json.dumps, rows(as_messages))), encoding="utf-8")
    config = PairwiseRewardConfig(
        output_dir=str(folder), max_steps=1, report_to="none", text=asked, max_length=64
    )
    said: list[str] = []
    base = ModelArguments(model_name_or_path=str(tiny_base))
    data = DataArguments(dataset_name=str(source), eval_fraction=0.3)
    train_pairwise(config, base, data, say=said.append)
    told = any("rows of text are read" in line for line in said)
    assert told is (asked == "auto" and not as_messages)
    scorer = load_scorer(folder)
    assert scorer.manifest is not None
    assert scorer.manifest.formatter["text"] == found
    text = {"prompt": "Ana has 2 pens .", "completion": "yes"}
    messages = {
        "prompt": [{"role": "user", "content": text["prompt"]}],
        "completion": [{"role": "assistant", "content": text["completion"]}],
    }
    scores = scorer.score([text, messages]).raw
    assert bool(scores[0] == scores[1]) is (found == "chat")
    other = load_scorer(folder, text="plain" if found == "chat" else "chat")
    assert other.score([messages]).raw[0] == pytest.approx(scores[1], abs=1e-5)
    assert abs(other.score([text]).raw[0] - scores[0]) > 1e-4
    [reward] = scorer.as_reward_func()([text["prompt"]], [text["completion"]])
    assert reward == pytest.approx(scores[0], abs=1e-5)


def test_the_former_switch_of_token_level_kinds() -> None:
    needed = ["--model_name_or_path", "b", "--dataset_name", "d", "--output_dir", "o"]
    for value, text in (("false", "plain"), ("true", "chat")):
        assert parse([*needed, "--as_chat", value], "outcome")[2].text == text
    assert parse(needed, "process")[2].text == "auto"
    with pytest.raises(CompanionError, match="give text alone"):
        parse([*needed, "--as_chat", "true", "--text", "plain"], "process")
