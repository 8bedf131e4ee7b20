"""Several threads on one model: packed and padded calls, mixed, give the scores of one thread."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from companion import RewardScorer, TokenScorer, apply_lora, load_base, load_reward_model
from companion.engine import packed_scores, runner
from companion.models import TokenReadout, merged
from companion.models.locking import lock_of

WORDS = (
    *("Ana", "Ben", "buys", "gives", "boxes", "pens", "each", "and", "how", "many", "now"),
    *("yes", "no", "good", "bad", "right", "wrong"),
)
SEED = 20


def calls(n: int) -> list[list[dict[str, str]]]:
    """Rows of ``n`` calls: a prompt and one to five completions each."""
    print(f"seed {SEED}")
    generator = random.Random(SEED)
    made = []
    for _ in range(n):
        prompt = " ".join(generator.choices(WORDS, k=12))
        texts = [generator.choices(WORDS, k=generator.randint(1, 20)) for _ in range(5)]
        rows = [{"prompt": prompt, "completion": " " + " ".join(text)} for text in texts]
        made.append(rows[: generator.randint(1, 5)])
    return made


def from_threads(n_threads: int, works: list[Callable[[], Any]]) -> list[Any]:
    """What each work gives, or the error that it raised, from threads that share them."""
    found: list[Any] = [None] * len(works)
    todo = iter(range(len(works)))
    taking = threading.Lock()

    def places() -> Iterator[int]:
        while True:
            with taking:
                place = next(todo, None)
            if place is None:
                return
            yield place

    def run() -> None:
        for place in places():
            try:
                found[place] = works[place]()
            except Exception as error:
                found[place] = error

    threads = [threading.Thread(target=run) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def settings(model: Any) -> tuple[Any, ...]:
    """What scoring switches: it must be as it was afterwards."""
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return model.config._attn_implementation, hooks, modes


def check(folder: Path, n: int) -> None:
    model = load_reward_model(folder)
    # three scorers of one model: packed, padded right, padded left
    packed, right = RewardScorer(model), RewardScorer(model, packing="off")
    left = RewardScorer(model, packing="off", padding_side="left")
    rows = calls(n)
    want = [packed.score(each).raw for each in rows]
    model.model.train()
    before = settings(model.model)
    works = [
        lambda s=scorer, r=each: s.score(r).raw
        for scorer, each in zip(itertools.cycle([packed, right, packed, left]), rows)
    ]
    found = from_threads(8, works)
    wrong = [
        place
        for place, (one, other) in enumerate(zip(found, want, strict=True))
        if isinstance(one, Exception) or np.abs(one - other).max() > 1e-5
    ]
    assert wrong == [], f"{len(wrong)} of {n} calls, the first: {found[wrong[0]]!r}"
    assert settings(model.model) == before


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_eight_threads_give_the_scores_of_one(kind: str, tiny_rewards: Any) -> None:
    check(tiny_rewards(kind), 150)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_two_thousand_calls(kind: str, tiny_rewards: Any) -> None:
    check(tiny_rewards(kind), 2000)


def test_the_functions_below_are_safe_too(tiny_reward: Path) -> None:
    """A token scorer, and packed_scores called as it is, with gradients."""
    from companion.engine import pack, plan_trees

    base = load_base(tiny_reward, keep_head=True)
    reward = RewardScorer(base)
    ids = [[1, *range(9, 30)], [1, *range(9, 25), 31, 2], [1, 40, 41, 2]]
    batch = pack(ids, plan_trees(ids))

    def functional() -> Any:
        return packed_scores(base.model, batch).detach().numpy()

    want = reward.score_encoded(ids)
    works = [functional, lambda: reward.score_encoded(ids)] * 40
    for found in from_threads(8, works):
        np.testing.assert_allclose(found, want, atol=1e-5)


def test_threads_of_a_token_scorer(tiny_base: Path) -> None:
    scorer = TokenScorer(load_base(tiny_base, labels=1), TokenReadout("outcome", chat=False))
    rows = calls(60)
    want = [scorer.score(each) for each in rows]
    found = from_threads(8, [lambda r=each: scorer.score(r) for each in rows])
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one.raw, other.raw, atol=1e-5)


def test_what_goes_wrong_in_one_thread_leaves_the_others_alone(
    tiny_reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    rows = calls(90)
    want = [scorer.score(each).raw for each in rows]
    before = settings(scorer.reward_model.model)
    forward, count = runner.packed_scores, itertools.count()

    def sick(model: Any, batch: Any) -> Any:
        number = next(count)
        if number % 9 == 4:  # a budget that is halved goes on
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if number % 9 == 7:
            raise RuntimeError("sick")
        return forward(model, batch)

    monkeypatch.setattr(runner, "packed_scores", sick)
    found = from_threads(4, [lambda r=each: scorer.score(r).raw for each in rows])
    for one, other in zip(found, want, strict=True):
        if isinstance(one, Exception):
            assert "sick" in str(one) or "does not fit" in str(one)
        else:
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert any(isinstance(one, Exception) for one in found)
    assert settings(scorer.reward_model.model) == before


def test_copies_have_a_lock_of_their_own(tiny_reward: Path) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    model = scorer.reward_model.model
    rows = [row for call in calls(20) for row in call]
    want = scorer.score(rows).raw
    with lock_of(model):  # held, as by a thread that scores
        twins = [pickle.loads(pickle.dumps(scorer)), copy.deepcopy(scorer)]
        for twin in twins:
            assert lock_of(twin.reward_model.model) is not lock_of(model)
        found = from_threads(2, [lambda t=twin: t.score(rows).raw for twin in twins])
    for one in found:
        np.testing.assert_allclose(one, want, atol=1e-5)
    other = RewardScorer(scorer.reward_model)
    assert lock_of(other.reward_model.model) is lock_of(model)


def test_a_merged_copy_while_others_score(tiny_base: Path) -> None:
    loaded = apply_lora(load_base(tiny_base), r=2)
    scorer = RewardScorer(loaded)
    assert lock_of(loaded.model) is lock_of(loaded.model.get_base_model())
    rows = calls(30)
    want = [scorer.score(each).raw for each in rows]
    plain: list[Any] = []

    def merge() -> Any:
        plain.append(merged(loaded.model))
        return want[0]

    works = [merge if i % 10 == 5 else lambda r=r: scorer.score(r).raw for i, r in enumerate(rows)]
    for i, (one, other) in enumerate(zip(from_threads(4, works), want, strict=True)):
        if i % 10 != 5:
            np.testing.assert_allclose(one, other, atol=1e-5)
    for model in plain:
        assert model.config._attn_implementation == "sdpa"
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_progress_that_scores_in_another_thread(tiny_reward: Path) -> None:
    """No lock is held while the caller is told: a callback may wait for others that score."""
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    rows = calls(1)[0]
    found: list[Any] = []

    def wait(_: int) -> None:
        found.extend(from_threads(1, [lambda: scorer.score(rows).raw]))

    raw = scorer.score(rows, progress=wait).raw
    np.testing.assert_allclose(found[0], raw, atol=1e-5)
