"""Generated rows: what was given stands in the ids once, in order, or the row says otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import companion
from companion import RewardFormatter
from companion.audit.museum.texts import trl_template
from companion.errors import CompanionError
from companion.formatting import template
from companion.models import RewardModel, ScalarReadout
from companion.scoring import RewardFunction, Scorer
from companion.search import rank_file
from companion.training.pairwise import _pairs_to_ids

BASE = Path(companion.__file__).parent / "assets" / "tutor-base"
FAMILIES = (
    *("cohere", "deepseek_r1_distill", "gemma3", "glm4moe", "gptoss", "idefics3", "llama3_2"),
    *("phi3", "qwen2_5", "qwen3", "qwen3_5_think", "lfm2"),
)
SEED = 20
#: remarks that say that content is not in the ids
LOST = {"earlier_left_out", "tools_left_out"}


class Recorder(Scorer[Any]):
    """A scorer that keeps the ids it is asked about; a text's score is its length."""

    def fingerprint(self) -> str:
        return "recorder"

    def _values(self, ids: Sequence[Sequence[int]], places: Any, progress: Any) -> list[float]:
        self.seen = [list(own) for own in ids]
        return [float(len(own)) for own in ids]


class Maker:
    """Rows of all forms; every text in them holds a word that stands nowhere else."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.words = 0

    def text(self) -> str:
        self.words += 1
        fill = self.rng.choices(["so", "then 3", "it\n is", "a  b", "x + y", "é", "{2}"], k=3)
        return f"{fill[0]} word{self.words}z {fill[1]} {fill[2]}."

    def content(self) -> Any:
        if self.rng.random() < 0.2:
            return [{"type": "text", "text": self.text()} for _ in range(self.rng.choice([1, 2]))]
        return self.text()

    def answer(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content()}
        kind = self.rng.random()
        if kind < 0.15:
            message["content"] = f"<think>\n{self.text()}\n</think>\n\n{self.text()}"
        elif kind < 0.25:
            message["reasoning_content"] = self.text()
        elif kind < 0.35:
            function = {"name": f"f{self.words}q", "arguments": {"key": self.text()}}
            message["tool_calls"] = [{"type": "function", "function": function}]
        return message

    def row(self) -> dict[str, Any]:
        kind = self.rng.random()
        if kind < 0.25:
            return {"prompt": self.text(), "chosen": self.text(), "rejected": self.text()}
        if kind < 0.3:
            return {"chosen": self.text(), "rejected": self.text()}
        prompt: list[dict[str, Any]] = []
        if self.rng.random() < 0.3:
            prompt.append({"role": "system", "content": self.text()})
        for _ in range(self.rng.choice([0, 0, 1])):
            prompt += [{"role": "user", "content": self.content()}, self.answer()]
        prompt.append({"role": "user", "content": self.content()})
        row = {"prompt": prompt, "chosen": [self.answer()], "rejected": [self.answer()]}
        if self.rng.random() < 0.15:
            parameters = {"type": "object", "properties": {"key": {"type": "string"}}}
            function = {"name": "look_up", "description": "Looks up.", "parameters": parameters}
            row["tools"] = [{"type": "function", "function": function}]
        return row


def words_of(value: Any) -> list[str]:
    """The words that stand nowhere else, in order; a system message first, reasoning before text.

    Independent of the formatter: it knows nothing of how a row is rendered.
    """
    if isinstance(value, str):
        return [word.strip("{}.,") for word in value.split() if word.startswith("word")]
    if isinstance(value, dict):
        order = ("reasoning_content", "content", "text", "tool_calls", "function", "arguments")
        known = [value[name] for name in (*order, "key") if name in value]
        return [word for item in known for word in words_of(item)]
    return [word for item in value for word in words_of(item)]


def wrong_with(text: str, words: Sequence[str]) -> str | None:
    places = [text.find(word) for word in words]
    if -1 in places:
        return f"{words[places.index(-1)]} is lost"
    twice = [word for word in words if text.count(word) != 1]
    return f"{twice[0]} stands twice" if twice else None


def sweep(n: int, tmp_path: Path) -> dict[str, int]:
    print(f"seed {SEED}")
    maker, found = Maker(SEED), {"kept": 0, "refused": 0, "counted": 0}
    for family in FAMILIES:
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        formatter = RewardFormatter(tokenizer, chat_template=trl_template(family), text="chat")
        scorer = Recorder(RewardModel(None, tokenizer, formatter), ScalarReadout(), None)
        reward = RewardFunction(scorer)
        for _ in range(n // len(FAMILIES) + 1):
            row = maker.row()
            alone = {key: value for key, value in row.items() if key != "rejected"}
            [pair] = formatter.try_encode_pairs([row])
            [one] = formatter.try_encode_many([alone], "chosen")
            if isinstance(one, CompanionError):
                assert isinstance(pair, CompanionError)
                found["refused"] += 1
                assert scorer.score([alone], field="chosen", on_error="skip").reasons[0]
                continue
            assert one is not None
            if isinstance(pair, CompanionError):
                found["refused"] += 1
            else:
                assert pair is not None
                assert pair[0].input_ids == one.input_ids
                [trained] = _pairs_to_ids([row], ["row"], formatter, has_margin=False)
                assert trained["chosen_ids"] == one.input_ids
                scorer.score_pairs([row])
                assert scorer.seen == [side.input_ids for side in pair]
            scorer.score([alone], field="chosen")
            assert scorer.seen == [one.input_ids]
            if "prompt" in row:
                tools = {"tools": row["tools"]} if "tools" in row else {}
                reward([row["prompt"]], [row["chosen"]], **{key: [v] for key, v in tools.items()})
                assert scorer.seen == [one.input_ids]
                line = {"prompt": row["prompt"], "completions": [row["chosen"]], **tools}
                source = tmp_path / "prompts.jsonl"
                source.write_text(json.dumps(line) + "\n", encoding="utf-8")
                rank_file(scorer, source, tmp_path / "best.jsonl", overwrite=True)
                assert scorer.seen == [one.input_ids]
            text = tokenizer.decode(one.input_ids)
            # what is lost of the completion is an error, of earlier turns a count
            fault = wrong_with(text, words_of(row["chosen"]))
            assert fault is None, (family, fault, row, text)
            if "prompt" in row:
                fault = wrong_with(text, words_of(row["prompt"]))
                assert fault is None or LOST & set(one.remarks), (family, fault, row, text)
            if "tools" in row and "look_up" not in text:
                assert "tools_left_out" in one.remarks
            found["counted" if set(one.remarks) & LOST else "kept"] += 1
    return found


def test_a_hundred_rows(tmp_path: Path) -> None:
    found = sweep(100, tmp_path)
    assert min(found.values()) > 2, found


@pytest.mark.slow
def test_two_thousand_rows(tmp_path: Path) -> None:
    found = sweep(2000, tmp_path)
    assert min(found.values()) > 50, found


def test_without_the_check_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("companion.formatting.formatter.left_out", lambda messages, text: iter(()))
    with pytest.raises(AssertionError):
        sweep(100, tmp_path)


def test_without_the_forms_of_content_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("companion.formatting.formatter.in_form", lambda messages, forms: messages)
    monkeypatch.setattr("companion.formatting.formatter.left_out", lambda messages, text: iter(()))
    with pytest.raises(AssertionError):
        sweep(100, tmp_path)


def test_what_is_left_out_is_found_whatever_the_white_space() -> None:
    messages = [
        {"role": "user", "content": "a\n b  c"},
        {"role": "assistant", "content": "<think>why not</think>so  be it"},
    ]
    kept = "U: a b c\nA: <think>\nwhy not\n</think>\n\nso be it"
    assert list(template.left_out(messages, kept)) == []
    assert list(template.left_out(messages, kept.replace("why not", ""))) == [(1, "reasoning")]
    assert list(template.left_out(messages, "so be it, why not: a b c")) != []
