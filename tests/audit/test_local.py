"""A model here as the audit's subject: how it is asked, what rounding explains, what shrinks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from companion import load_base, save_reward_model
from companion.audit import Batch, LocalSubject, all_checks, assert_sound, audit
from companion.audit.checks import head, readout
from companion.audit.museum.healthy import random_classifier
from companion.audit.shrinking import shrink
from companion.audit.subject import BudgetSpent
from companion.errors import ModelError
from companion.models import TokenReadout

OURS = (*readout.CHECKS, *head.CHECKS)
LENGTHS = (3, 40, 7, 17, 60, 9)


def texts(vocabulary: int, seed: int) -> list[list[int]]:
    print(f"seed {seed}")
    rng = random.Random(seed)
    return [[*(rng.randrange(9, vocabulary) for _ in range(n)), 2] for n in LENGTHS]


# ---------------------------------------------------------------------- how it is asked


def test_a_text_is_asked_once_and_a_batch_as_transformers_pads_it(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    model = random_classifier("llama", tokenizer)
    ids = texts(len(tokenizer), 1)
    subject = LocalSubject(model, tokenizer)
    scores = subject.alone([*ids, *ids])
    assert subject.tokens == sum(map(len, ids))
    np.testing.assert_array_equal(scores[: len(ids)], scores[len(ids) :])
    for side in ("right", "left"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.no_grad():
            want = model(**padded).logits[:, 0].double().numpy()
        np.testing.assert_array_equal(subject.call(Batch(ids)), want)
        np.testing.assert_array_equal(subject.call(Batch(ids, side=side)), want)
    hidden = subject.padded(Batch([[5, 6, 7], [8]], side="right", masked=[1, 0], pad_id=4))
    assert hidden[0].tolist() == [[5, 6, 7], [8, 4, 4]]
    assert hidden[1].tolist() == [[1, 1, 0], [1, 0, 0]]


def test_beyond_the_budget_nothing_is_asked(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    subject = LocalSubject(random_classifier("llama", tokenizer), tokenizer, max_tokens=20)
    subject.alone([[5] * 12])
    with pytest.raises(BudgetSpent, match="20 tokens is spent"):
        subject.call(Batch([[5] * 9]))
    assert subject.tokens == 12
    report = audit(subject, checks=OURS)  # type: ignore[arg-type]
    assert {r.outcome.status for r in report.results} <= {"not asked", "sound", "found"}
    assert report["batch-changes-score"].outcome.status == "not asked"


def test_ids_are_those_of_the_manifest_or_of_the_chat_template(
    tiny_reward: Path, make_tokenizer: Callable[..., Any]
) -> None:
    row = {"prompt": "Ana buys 3 pens", "completion": "so 3"}
    own = LocalSubject(tiny_reward)
    assert own.formatter is not None
    encoded = own.formatter.encode_row(row)
    assert encoded is not None
    assert own.encode(row) == encoded.input_ids
    tokenizer = make_tokenizer()
    stock = LocalSubject(random_classifier("llama", tokenizer), tokenizer)
    messages = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    want = tokenizer.apply_chat_template(messages, return_dict=False)
    assert (
        stock.encode(row) == stock.encode(messages) == stock.encode({"messages": messages}) == want
    )
    cut = stock.encode({**row, "terminated": False})
    assert want[: len(cut)] == cut
    assert len(cut) < len(want)
    tokenizer.chat_template = None
    assert (
        stock.encode({"prompt": "Ana", "completion": " buys"}) == tokenizer("Ana buys")["input_ids"]
    )


def test_what_is_no_reward_model_is_refused(
    tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    model = random_classifier("llama", tokenizer, num_labels=3)
    with pytest.raises(ModelError, match="num_labels is 3"):
        LocalSubject(model, tokenizer)
    with pytest.raises(ModelError, match="without its tokenizer"):
        LocalSubject(model)
    with pytest.raises(ModelError, match="no such folder"):
        LocalSubject(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_models_with_a_value_for_each_token_are_asked_what_fits(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    loaded = load_base(tiny_base, labels=3 if kind == "process" else 1)
    loaded.readout = TokenReadout(kind, 3 if kind == "process" else 1, separator="\n")
    save_reward_model(loaded, tmp_path)
    subject = LocalSubject(tmp_path)
    assert subject.kind == kind
    text = texts(70, 2)[1]
    with torch.no_grad():
        logits = subject.model(torch.tensor([text])).logits[0, -1].double().numpy()
    want = logits[2] - logits[0] if kind == "process" else logits[0]
    np.testing.assert_allclose(subject.alone([text])[0], want)
    report = audit(subject, checks=OURS)  # type: ignore[arg-type]
    assert report.sound, report.table()
    assert report["batch-changes-score"].outcome.status == "sound"
    assert report["masked-tail"].outcome.status == "not asked"
    assert "value for each token" in report["masked-tail"].outcome.seen


def test_a_model_in_memory_is_left_as_it_was_given(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    model = random_classifier("gpt2", tokenizer)
    model.train()
    model.transformer.h[0].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    report = audit(model, tokenizer, checks=OURS)
    assert "given in training mode" in report["dropout"].outcome.seen
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert report.sound, report.table()


# ---------------------------------------------------------------------- what rounding explains


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tolerance_covers_rounding_and_little_more(
    kind: str, dtype: str, make_tokenizer: Callable[..., Any]
) -> None:
    """Against the same model in a dtype that rounds far less."""
    tokenizer = make_tokenizer()
    model = random_classifier(kind, tokenizer, seed=3, initializer_range=0.1)
    model = model.to(getattr(torch, dtype))
    ids = texts(len(tokenizer), 3)
    subject = LocalSubject(model, tokenizer)
    exact = subject.cast("float64" if dtype == "float32" else "float32")
    error = np.abs(subject.alone(ids) - exact.alone(ids))
    tolerance = subject.tolerance(ids)
    assert (error <= tolerance).all()
    assert np.median(tolerance) <= 300 * max(np.median(error), 1e-9)
    # a hundredth of what makes scores differ is seen, in float32
    if dtype == "float32":
        assert tolerance.max() < subject.alone(ids).std() / 100


def test_tolerance_follows_depth_dtype_and_the_size_of_what_is_summed(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    ids = texts(len(tokenizer), 4)

    def most(dtype: str = "float32", scale: float = 1.0, **changes: Any) -> float:
        model = random_classifier("llama", tokenizer, seed=4, **changes)
        with torch.no_grad():
            model.score.weight.mul_(scale)
        return float(LocalSubject(model, tokenizer, dtype=dtype).tolerance(ids).mean())

    plain = most()
    assert most(num_hidden_layers=12) > plain
    assert most("bfloat16") > 100 * plain
    np.testing.assert_allclose(most(scale=10.0), 10 * plain, rtol=0.1)


def test_a_difference_is_seen_from_one_that_rounding_makes(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    subject = LocalSubject(random_classifier("llama", tokenizer), tokenizer)
    ids = texts(len(tokenizer), 5)
    one = subject.alone(ids)
    assert not subject.differ(ids, one, subject.call(Batch(ids))).any()
    for size in (1e-3, -1e-3, np.nan, np.inf):
        other = one.copy()
        other[2] += size
        assert subject.differ(ids, one, other).tolist() == [i == 2 for i in range(len(ids))]
    gone = np.full(len(ids), np.nan)
    assert not subject.differ(ids, gone, gone).any()


# ---------------------------------------------------------------------- shrinking


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.sets(st.integers(0, 39), min_size=1, max_size=3),
)
def test_shrinking_leaves_what_shows_the_fault_and_no_more(
    rest: list[int], places: set[int]
) -> None:
    items = list(enumerate(rest))
    needed = {items[place % len(items)] for place in places}
    assert set(shrink(items, needed.issubset, most=10_000)) == needed


def test_shrinking_stops_where_the_budget_does() -> None:
    asked: list[int] = []

    def wrong(fewer: list[int]) -> bool:
        asked.append(len(fewer))
        if len(asked) == 3:
            raise BudgetSpent("spent")
        return 7 in fewer

    left = shrink(range(64), wrong)
    assert (left, len(asked)) == (list(range(32)), 3)
    asked.clear()
    shrink(range(64), lambda fewer: bool(asked.append(0)), most=5)  # type: ignore[func-returns-value]
    assert len(asked) == 5


# ---------------------------------------------------------------------- as an assertion


def test_assert_sound(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    model = random_classifier("llama", tokenizer)
    assert assert_sound(model, tokenizer, checks=OURS).sound
    tokenizer.pad_token = "<unk>"
    with pytest.raises(AssertionError, match=r"(?s)NOT SOUND.*pad-ids-differ"):
        assert_sound(model, tokenizer, checks=OURS)
    waivers = {"pad-ids-differ": "known", "batch-changes-score": "follows from it"}
    assert assert_sound(model, tokenizer, checks=OURS, waivers=waivers).sound


def test_names_of_checks_are_one_and_each_says_what_it_is_for() -> None:
    names = [check.name for check in OURS]
    assert len(set(names)) == len(names)
    assert {check.name for check in all_checks()} >= set(names)
    for check in OURS:
        assert check.asks.endswith("?")
        assert min(map(len, (check.why, check.cure))) > 20
        assert all(thread.startswith("https://") for thread in check.threads)


def test_a_text_without_a_finite_score_spoils_no_others_tolerance(
    make_tokenizer: Callable[..., Any],
) -> None:
    """One embedding is not a number: the texts without it are compared as before."""
    tokenizer = make_tokenizer()
    model = random_classifier("llama", tokenizer)
    ids = texts(len(tokenizer), 6)
    sick = min(set(ids[1]) - {i for text in (ids[0], *ids[2:]) for i in text})
    with torch.no_grad():
        model.model.embed_tokens.weight[sick] = float("nan")
    subject = LocalSubject(model, tokenizer)
    scores = subject.alone(ids)
    assert np.isnan(scores).tolist() == [i == 1 for i in range(len(ids))]
    assert not subject.differ(ids, scores, subject.call(Batch(ids))).any()
    other = scores.copy()
    other[0] += 1e-2
    assert subject.differ(ids, scores, other).tolist() == [i == 0 for i in range(len(ids))]
