"""Batches of the sampler, of log-probabilities and of the judge where a GPU's memory ends.

The memory is a stand-in: a forward over more tokens than it holds raises what CUDA raises, for
`generate` in the middle of a batch too, where the cache has grown.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from companion import Policy
from companion.errors import DataError, ModelError
from companion.generation import policy as policy_module
from companion.generation.halving import halving_batches
from companion.judge import Judge
from companion.tutor import TUTOR_BASE, make_rows

TEXT = "Ana has 3 boxes and Ben gives 4 pens to Ana , how many is it now"
PROMPTS = [" ".join(TEXT.split()[:n]) for n in (3, 9, 5, 16, 7, 12)]


class Memory:
    """Holds so many tokens in one forward, those of the cache included."""

    def __init__(self, tokens: int, words: str = "CUDA out of memory") -> None:
        self.tokens = tokens
        self.words = words
        self.ended = 0
        self._held: list[weakref.ref[Any]] = []

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        assert all(ref() is None for ref in self._held), "the batch that failed is still alive"
        mask = kwargs.get("attention_mask")
        tensor = kwargs["input_ids"] if mask is None else mask
        if tensor.numel() > self.tokens:
            self.ended += 1
            tensors = torch.ones(1), tensor
            self._held = [weakref.ref(each) for each in tensors]
            if self.words.startswith("CUDA out"):
                raise torch.OutOfMemoryError(self.words)
            raise RuntimeError(self.words)


@contextmanager
def memory_of(policy: Policy, tokens: int, words: str = "CUDA out of memory") -> Iterator[Memory]:
    memory = Memory(tokens, words)
    hook = policy.model.register_forward_pre_hook(memory, with_kwargs=True)
    try:
        yield memory
    finally:
        hook.remove()


def fresh(folder: Any, **options: Any) -> Policy:
    return Policy.from_pretrained(folder, device="cpu", **options)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]


# ---------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_computed_once_and_the_lesson_is_kept(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    costs = [dice.randint(1, 60) for _ in range(dice.randint(1, 80))]
    holds = dice.randint(max(costs), 600)
    sizes: list[int] = []
    ended = 0

    def compute(rows: list[int]) -> list[int]:
        nonlocal ended
        sizes.append(len(rows) * max(costs[row] for row in rows))
        if sizes[-1] > holds:
            ended += 1
            raise torch.OutOfMemoryError
        return [row * 7 for row in rows]

    def run(use: str) -> list[int]:
        found = list(halving_batches(model, use, costs, 5000, compute))
        places = [place for rows, _ in found for place in rows]
        assert sorted(places) == list(range(len(costs)))
        assert [v for _, values in found for v in values] == [place * 7 for place in places]
        return places

    model = torch.nn.Linear(1, 1)
    run("a")
    first = ended
    assert first <= 10  # each halves what was too much
    assert len(warnings_of(caplog)) == first
    run("a")
    run("a")
    assert ended == first
    run("b")  # another use has a budget of its own
    assert ended == 2 * first
    model = torch.nn.Linear(1, 1)  # and so has another model
    run("a")
    assert ended == 3 * first


def test_a_budget_below_one_is_refused_and_no_rows_are_nothing() -> None:
    model = torch.nn.Linear(1, 1)
    assert list(halving_batches(model, "a", [], 10, lambda rows: rows)) == []
    with pytest.raises(DataError, match="budget"):
        list(halving_batches(model, "a", [3], 0, lambda rows: rows))


# ---------------------------------------------------------------------- sampling


def sampled(policy: Policy, **settings: Any) -> list[list[tuple[Any, ...]]]:
    drawn = policy.sample(
        [*PROMPTS, PROMPTS[0]], n=4, max_new_tokens=14, seed=5, **{"top_p": 0.9, **settings}
    )
    return [
        [(s.text, s.token_ids, s.terminated, s.n_tokens, s.stopped, s.logprob) for s in row]
        for row in drawn
    ]


def assert_same(got: Sequence[Any], wanted: Sequence[Any]) -> None:
    for row, expected in zip(got, wanted, strict=True):
        for one, other in zip(row, expected, strict=True):
            assert one[:-1] == other[:-1]
            assert one[-1] == pytest.approx(other[-1], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_batch": 500}])
@pytest.mark.parametrize("settings", [{}, {"stop": "pens"}])
def test_samples_do_not_depend_on_the_halving(
    tiny_base: Any, options: Any, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = sampled(fresh(tiny_base, **options), **settings)
    policy = fresh(tiny_base, **options)
    # the last tokens of the longest prompt's rows are those that do not fit: in mid-batch
    with memory_of(policy, 150) as memory:
        assert_same(sampled(policy, **settings), wanted)
        ended = memory.ended
        assert ended > 0
        assert len(warnings_of(caplog)) == ended  # a budget of the user's goes with a word too
        assert_same(sampled(policy, **settings), wanted)
        # each look of the monitor makes a new policy of the model
        again = Policy(policy.model, policy.tokenizer, **options)
        assert_same(sampled(again, **settings), wanted)
        assert memory.ended == ended
        # a budget that is named anew is tried anew
        other = Policy(policy.model, policy.tokenizer, max_tokens_per_batch=4000)
        assert_same(sampled(other, **settings), wanted)
        assert memory.ended > ended


def test_a_completion_that_never_fits_and_another_error(tiny_base: Any) -> None:
    policy = fresh(tiny_base)
    with memory_of(policy, 12), pytest.raises(ModelError, match="does not fit") as caught:
        policy.sample(PROMPTS, n=2, max_new_tokens=14)
    assert "max_new_tokens" in str(caught.value.cure)
    with memory_of(policy, 12, "device-side assert"), pytest.raises(RuntimeError, match="assert"):
        policy.sample(PROMPTS, n=2, max_new_tokens=14)
    policy = fresh(tiny_base)
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    wanted = policy.sample(PROMPTS, n=2, max_new_tokens=5)
    with memory_of(policy, 60, cublas) as memory:
        again = policy.sample(PROMPTS, n=2, max_new_tokens=5)
    assert memory.ended
    assert [[s.token_ids for s in row] for row in again] == [
        [s.token_ids for s in row] for row in wanted
    ]
    assert not policy.model.training


# ---------------------------------------------------------------------- log-probabilities


def test_logprobs_do_not_depend_on_the_halving(
    tiny_base: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy = fresh(tiny_base)
    drawn = policy.sample(PROMPTS, n=4, max_new_tokens=14, seed=2)
    prompts = [p for p, row in zip(PROMPTS, drawn, strict=True) for _ in row]
    samples = [s for row in drawn for s in row]
    wanted = policy.logprobs(prompts, samples)
    np.testing.assert_allclose(wanted.sums, [s.logprob for s in samples], atol=1e-4)
    with memory_of(policy, 80) as memory:
        got = policy.logprobs(prompts, samples)
        ended = memory.ended
        assert ended > 0
        assert len(warnings_of(caplog)) == ended
        policy.logprobs(prompts, samples)
        assert memory.ended == ended
    np.testing.assert_allclose(got.sums, wanted.sums, atol=1e-4)
    for one, other in zip(got.tokens, wanted.tokens, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with memory_of(policy, 10), pytest.raises(ModelError, match="does not fit"):
        policy.logprobs(prompts, samples)
    # what ends the logits says nothing of the cache
    again = policy.sample(PROMPTS, n=4, max_new_tokens=14, seed=2)
    assert [[s.token_ids for s in row] for row in again] == [
        [s.token_ids for s in row] for row in drawn
    ]


# ---------------------------------------------------------------------- the judge


def test_verdicts_do_not_depend_on_the_halving(caplog: pytest.LogCaptureFixture) -> None:
    rows = list(make_rows("pairs", 6, seed=3))

    def verdicts(judge: Judge) -> list[Any]:
        return judge.compare(rows)

    wanted = verdicts(Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu"))
    judge = Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu")
    policy = judge.backend.policy  # type: ignore[attr-defined]
    with memory_of(policy, 500) as memory:
        got = verdicts(judge)
    assert memory.ended > 0
    assert len(warnings_of(caplog)) == memory.ended
    for one, other in zip(got, wanted, strict=True):
        assert (one.preference, one.reason) == (other.preference, other.reason)
        assert one.logit_first == pytest.approx(other.logit_first, abs=1e-3)
    judge = Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu")
    policy = judge.backend.policy  # type: ignore[attr-defined]
    with memory_of(policy, 20), pytest.raises(ModelError, match="does not fit"):
        verdicts(judge)


# ---------------------------------------------------------------------- the budget


class OnCuda(Policy):
    """A policy that takes itself to be on a GPU when it asks for its budget."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0")


def test_on_cuda_the_free_memory_decides(tiny_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fresh(tiny_base)
    planned: list[tuple[Any, list[int], int]] = []

    def halving(model: Any, use: Any, costs: list[int], budget: int, compute: Any) -> Any:
        planned.append((use, costs, budget))
        return iter(())

    monkeypatch.setattr(policy_module, "halving_batches", halving)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 99))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4_000)
    asked: list[Any] = []
    monkeypatch.setattr(
        policy_module, "generation_budget", lambda *given: asked.append(given) or (4096, 3)
    )
    monkeypatch.setattr(policy_module, "logprob_budget", lambda *given: asked.append(given) or 2222)
    on_cuda = OnCuda(policy.model.bfloat16(), policy.tokenizer)
    on_cuda.in_batches([5, 9], lambda rows: rows)
    on_cuda.in_batches([5, 9], lambda rows: rows, use="logprobs")
    free, config = 10_003_000, policy.model.config
    assert asked == [(free, config, 2, 9), (free, config, 2)]
    given = OnCuda(policy.model, policy.tokenizer, max_tokens_per_batch=77)
    given.in_batches([5, 9], lambda rows: rows)
    policy.in_batches([5, 9], lambda rows: rows)
    assert planned == [
        (("generate", None), [8, 12], 4096),
        (("logprobs", None), [5, 9], 2222),
        (("generate", 77), [5, 9], 77),
        (("generate", None), [5, 9], 8192),
    ]
