"""How the scorer makes batches: packed or padded, within its budget, halved where memory ends."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from companion import RewardScorer, TokenScorer, load_base
from companion.cli.main import main
from companion.engine import runner
from companion.errors import DataError, ModelError, ReadoutError
from companion.models import TokenReadout

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")


def rows(n: int = 6, k: int = 4) -> list[dict[str, str]]:
    """``n`` prompts with ``k`` completions each, shuffled."""
    generator = random.Random(0)
    words = [
        "Ana",
        "Ben",
        "has",
        "buys",
        "gives",
        "boxes",
        "pens",
        "each",
        "and",
        "with",
        "how",
        "many",
        "now",
    ]
    made = [
        {"prompt": prompt, "completion": " " + " ".join(generator.choices(words, k=1 + 3 * i))}
        for prompt in (" ".join(generator.choices(words, k=12)) for _ in range(n))
        for i in range(k)
    ]
    return generator.sample(made, len(made))


def different_tokens(scorer: Any, texts: list[dict[str, str]]) -> int:
    """Tokens of the texts without those that are equal to another as token ids."""
    encoded = scorer.formatter.encode_many(texts)
    return sum(map(len, {tuple(item.input_ids) for item in encoded}))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_are_those_of_single_texts(
    kind: str, tiny_rewards: Callable[[str], Path]
) -> None:
    single = RewardScorer.from_pretrained(tiny_rewards(kind), device="cpu", packing="off")
    want = np.array([single.score([row]).raw[0] for row in rows()])
    for tokens in (30, 100, 2048):
        scorer = RewardScorer(single.reward_model, max_tokens_per_batch=tokens)
        np.testing.assert_allclose(scorer.score(rows()).raw, want, atol=1e-5, rtol=0)
        needed, computed = scorer.tokens
        assert needed == single.score(rows()).n_tokens.sum()
        assert computed < needed
    padded = RewardScorer(single.reward_model, packing="off")
    np.testing.assert_allclose(padded.score(rows()).raw, want, atol=1e-5, rtol=0)
    assert padded.tokens[0] == needed
    assert padded.tokens[1] > different_tokens(padded, rows())


def test_equal_texts_have_one_score_to_the_last_bit(tiny_reward: Path) -> None:
    generator = random.Random(0)
    texts = [generator.choice(rows()) for _ in range(200)]
    for packing in ("auto", "off"):
        scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu", packing=packing)  # type: ignore[arg-type]
        done: list[int] = []
        raw = scorer.score(texts, progress=done.append).raw
        first = [texts.index(text) for text in texts]
        assert len(set(first)) < len(texts)
        np.testing.assert_array_equal(raw, raw[first])
        assert sum(done) == len(texts)


def test_a_pair_computes_its_prompt_once(tiny_reward: Path) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    prompt = "Ana has 3 boxes with 4 pens each and buys 5 . How many pens now"
    scores = scorer.score_pairs([{"prompt": prompt, "chosen": " yes", "rejected": " no no"}])
    assert scorer.tokens[0] == scores.chosen_tokens[0] + scores.rejected_tokens[0]
    assert scorer.tokens[1] == scorer.tokens[0] - (scores.chosen_tokens[0] - 2)


def test_a_model_that_cannot_be_packed_is_padded_with_a_word(
    tiny_reward: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    want = scorer.score(rows()).raw
    scorer.reward_model.model.config.attn_logit_softcapping = 30.0
    with caplog.at_level(logging.WARNING, "companion.engine.runner"):
        np.testing.assert_allclose(scorer.score(rows()).raw, want, atol=1e-5, rtol=0)
        scorer.score(rows())
    said = [r.getMessage() for r in caplog.records]
    assert said == ["texts are padded, not packed: its attention soft-caps the logits"]
    assert scorer.tokens[1] > scorer.tokens[0]


def test_unknown_packing_and_unsafe_texts_are_refused(tiny_reward: Path) -> None:
    with pytest.raises(DataError, match="packing is 'on'"):
        RewardScorer.from_pretrained(tiny_reward, device="cpu", packing="on")  # type: ignore[arg-type]
    for packing in ("auto", "off"):
        scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu", packing=packing)  # type: ignore[arg-type]
        pad = scorer.reward_model.pad_token_id
        with pytest.raises(ReadoutError, match="row 1: its last real token is the pad id"):
            scorer.score_encoded([[1, 9, 2], [1, 9, 10, pad]])
        with pytest.raises(ReadoutError, match="row 1 begins with two BOS"):
            scorer.score_encoded([[1, 9, 2], [1, 1, 9, 2]])
    assert scorer.score_encoded([]).shape == (0,)


SCALAR = ("packed_scores", "reward_scores")


class Memory:
    """Stands before the forward and fails for batches above its size, as a GPU does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, holds: int, names: Any = SCALAR) -> None:
        self.holds, self.sizes = holds, []  # type: tuple[int, list[int]]
        for name in names:
            monkeypatch.setattr(runner, name, self.guard(getattr(runner, name)))

    def guard(self, forward: Any) -> Any:
        def call(model: Any, batch: Any, *rest: Any) -> Any:
            size = batch.computed if not rest else batch.numel()
            self.sizes.append(size)
            if size > self.holds:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return forward(model, batch, *rest)

        return call


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_out_of_memory_halves_the_budget(
    packing: Any, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = RewardScorer.from_pretrained(tiny_reward, device="cpu").score(rows()).raw
    memory = Memory(monkeypatch, holds=100)
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu", packing=packing)
    done: list[int] = []
    scores = scorer.score(rows(), progress=done.append).raw
    np.testing.assert_allclose(scores, want, atol=1e-5, rtol=0)
    assert sum(done) == len(want)
    failed = [size for size in memory.sizes if size > 100]
    assert 1 <= len(failed) <= 4
    assert all(b <= a / 2 for a, b in itertools.pairwise(failed))
    assert scorer.tokens[1] == sum(size for size in memory.sizes if size <= 100)
    memory.sizes.clear()
    np.testing.assert_allclose(scorer.score(rows()).raw, want, atol=1e-5, rtol=0)
    assert max(memory.sizes) <= 100, "the next call began with what had failed"


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_text_that_the_memory_does_not_hold_is_an_error(
    packing: Any, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(monkeypatch, holds=20)
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu", packing=packing)
    with pytest.raises(ModelError, match=r"a text of \d+ tokens does not fit"):
        scorer.score(rows())


def test_the_budget_on_cuda_comes_from_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weight:
        device = torch.device("cuda")

        def element_size(self) -> int:
            return 2

    class Model:
        config = "config"

        def parameters(self) -> Any:
            return iter([Weight()])

    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 99))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    monkeypatch.setattr(runner, "cuda_token_budget", lambda *given: asked.append(given) or 4096)
    assert runner.default_token_budget(Model()) == 4096
    assert asked == [(13, "config", 2)]
    assert runner.default_token_budget(torch.nn.Linear(1, 1)) == runner.CPU_TOKENS


@pytest.mark.parametrize("command", ["score", "evaluate"])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_the_commands_hand_packing_on(
    command: str,
    packing: str,
    tmp_path: Path,
    tiny_reward: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    rows = {
        "score": ["--input", str(source), "--output", str(tmp_path / "out.jsonl")],
        "evaluate": ["--dataset_name", str(source)],
    }
    given: list[Any] = []

    def load(*_: Any, **settings: Any) -> Any:
        given.append(settings["packing"])
        raise ModelError("seen")

    monkeypatch.setattr(RewardScorer, "from_pretrained", load)
    flags = [] if packing == "auto" else ["--packing", packing]
    assert main([command, "--model", str(tiny_reward), *rows[command], *flags]) == 2
    assert given == [packing]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_scorer_packs_and_reads_the_same(
    kind: str, tiny_bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_base(tiny_bases(kind), labels=1)
    texts = rows()
    found = {}
    for packing in ("off", "auto"):
        scorer = TokenScorer(loaded, TokenReadout("outcome", 1, chat=False), packing=packing)  # type: ignore[arg-type]
        found[packing] = scorer.score(texts)
        assert (scorer.tokens[1] < different_tokens(scorer, texts)) == (packing == "auto")
    np.testing.assert_allclose(found["auto"].raw, found["off"].raw, atol=1e-5)
    for a, b in zip(found["auto"].values, found["off"].values, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # type: ignore[arg-type]
    assert np.std(found["off"].raw) > 1e-3
    memory = Memory(monkeypatch, holds=60, names=("packed_token_logits", "token_logits"))
    again = TokenScorer(loaded, TokenReadout("outcome", 1, chat=False)).score(texts)
    np.testing.assert_allclose(again.raw, found["off"].raw, atol=1e-5)
    assert any(size > 60 for size in memory.sizes)
