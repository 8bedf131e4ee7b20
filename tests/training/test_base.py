"""The tutor base: what ships is what the command makes, small enough, and knows its world."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from companion.cli.main import main
from companion.tutor import TUTOR_BASE, base, text as tutor_text
from companion.tutor.base import (
    BaseConfig,
    _encode,
    make_tokenizer,
    measure_base,
    train_base,
)
from companion.tutor.world import MAX_NUMBER

SMALL = BaseConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    steps=3,
    tokens_per_step=512,
    compile=False,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TUTOR_BASE)


def test_it_fits_into_four_megabytes():
    assert sum(file.stat().st_size for file in TUTOR_BASE.iterdir()) <= 4_000_000


def test_the_tokenizer_that_ships_is_the_one_that_the_code_makes(tokenizer):
    assert make_tokenizer(BaseConfig()).get_vocab() == tokenizer.get_vocab()


def test_bos_eos_and_pad_differ_and_numbers_are_single_tokens(tokenizer):
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for number in range(MAX_NUMBER + 1):
        assert len(tokenizer(f" {number}", add_special_tokens=False)["input_ids"]) == 1
    for text in ("Any text, e.g. naïve 数学\n\tx²", "4711 + 0.5"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_chat_template_ends_an_answer_in_eos_and_asks_for_one(tokenizer):
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
    assert whole == "<|bos|><|user|>Q<|end|><|assistant|>A<|eos|>"
    asked = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "?"}])


def test_pieces_of_a_document_are_tokenised_as_the_whole_is(tokenizer):
    documents = random.Random(3)
    drawn = [tutor_text.draw_document(documents) for _ in range(100)]
    for document, (ids, weights) in zip(
        drawn, _encode(tokenizer, BaseConfig(), random.Random(3), 100), strict=True
    ):
        text = "".join(piece for piece, _ in document)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(weights) == len(ids)
        assert weights[0] == 0
        # the token predicted at EOS, or the judge's letter, weighs most, once; drills have neither
        is_drill = document[0][0] == tutor_text.BOS
        assert weights.count(BaseConfig.verdict_weight) == (0 if is_drill else 1)


def test_what_the_base_knows(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(TUTOR_BASE, dtype=torch.float32)
    figures = measure_base(model, tokenizer, n=250, seed=11)
    assert figures["greedy"] > 0.95
    assert 0.35 < figures["sampled"] < 0.75, "best-of-N and GRPO need room to improve"
    assert figures["verdict"] > 0.94, "a reward model can hardly do better in one epoch"
    assert figures["judge"] > 0.85
    record = json.loads((TUTOR_BASE / "base.json").read_text())
    for name, value in record["figures"].items():
        # two samples of 250 and 2,000: four standard errors
        assert abs(figures[name] - value) < 4 * (0.25 / 250) ** 0.5, name


def test_two_runs_with_one_seed_are_equal_and_loadable(tmp_path, monkeypatch):
    def measure_few(model, tokenizer, *, n, seed):  # untrained, it writes on to the last token
        return measure_base(model, tokenizer, n=min(n, 8), seed=seed)

    monkeypatch.setattr(base, "measure_base", measure_few)
    for name in ("a", "b"):
        train_base(SMALL, tmp_path / name, progress=False)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / "a" / "base.json").read_text())["config"]["steps"] == 3


def test_the_command_keeps_its_hands_off_a_full_folder(tmp_path, capsys):
    (tmp_path / "something").write_text("x")
    assert main(["make-base", "--output_dir", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
