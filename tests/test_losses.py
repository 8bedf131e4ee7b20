"""Properties, oracles and wrong implementations of the losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from companion import pairwise_accuracy
from companion.errors import DataError, DtypeError, ShapeError
from companion.functional import losses

floats = st.floats(-50, 50, allow_nan=False)
pairs = st.lists(st.tuples(floats, floats), min_size=1, max_size=20)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Bradley–Terry ----------------------------------------------------------------------------


@settings(deadline=None)
@given(floats, floats)
def test_probability_is_the_ratio_of_strengths(a: float, b: float) -> None:
    got = losses.bradley_terry_probability(f64(a), f64(b)).item()
    assert got == pytest.approx(math.exp(a) / (math.exp(a) + math.exp(b)), abs=1e-12)


def exact_loss(z: float) -> float:
    """-log sigmoid(z) with the arithmetic of Python's log1p, for any z."""
    return max(-z, 0.0) + math.log1p(math.exp(-abs(z)))


@settings(deadline=None)
@given(pairs)
def test_loss_is_minus_log_sigmoid(values: list[tuple[float, float]]) -> None:
    chosen, rejected = (f64(*side) for side in zip(*values, strict=True))
    loss = losses.bradley_terry_loss(chosen, rejected)
    assert loss.shape == chosen.shape
    for got, (c, r) in zip(loss.tolist(), values, strict=True):
        assert got == pytest.approx(exact_loss(c - r), abs=1e-9)
    # in the range where the textbook form is exact, it is the same number
    moderate = (chosen - rejected).clamp(-15, 15)
    again = losses.bradley_terry_loss(moderate, torch.zeros_like(moderate))
    assert torch.allclose(again, -torch.log(torch.sigmoid(moderate)), rtol=0, atol=1e-9)
    assert torch.allclose(again, torch.log(1 + torch.exp(-moderate)), rtol=0, atol=1e-9)


@settings(deadline=None)
@given(pairs)
def test_shift_invariance(values: list[tuple[float, float]]) -> None:
    chosen, rejected = (f64(*side) for side in zip(*values, strict=True))
    base = losses.bradley_terry_loss(chosen, rejected)
    moved = losses.bradley_terry_loss(chosen + 7.3, rejected + 7.3)
    assert torch.allclose(base, moved, rtol=0, atol=1e-12)


def test_tie_is_a_coin() -> None:
    score = f64(-3.0, 0.0, 1e6)
    assert losses.bradley_terry_probability(score, score).tolist() == [0.5] * 3
    assert torch.allclose(
        losses.bradley_terry_loss(score, score), f64(*[math.log(2)] * 3), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_of_a_thousand_are_finite(dtype: torch.dtype) -> None:
    chosen = torch.tensor([-1000.0, 1000.0], dtype=dtype, requires_grad=True)
    loss = losses.bradley_terry_loss(chosen, torch.zeros(2, dtype=dtype))
    assert loss.tolist() == [1000.0, 0.0]
    loss.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("log of sigmoid underflows", lambda c, r: -torch.log(torch.sigmoid(c - r))),
        ("exp overflows", lambda c, r: torch.log(1 + torch.exp(r - c))),
        ("softplus is linear above 20", lambda c, r: F.softplus(r - c)),
        ("sign turned round", lambda c, r: -F.logsigmoid(r - c)),
        ("hinge", lambda c, r: torch.relu(1 - (c - r))),
    ],
)
def test_wrong_losses_are_caught(name: str, wrong: object) -> None:
    grid = torch.cat([torch.linspace(-40, 40, 3201, dtype=torch.float64), f64(-1000, 1000)])
    grid = torch.cat([grid, f64(-20.001)])
    want = f64(*[exact_loss(z) for z in grid.tolist()])
    zero = torch.zeros_like(grid)
    right = losses.bradley_terry_loss(grid, zero)
    assert torch.allclose(right, want, rtol=0, atol=1e-9)
    assert not torch.allclose(wrong(grid, zero), want, rtol=0, atol=1e-9), name  # type: ignore[operator]


def test_margin_moves_the_decision_point() -> None:
    chosen, rejected = random(6, seed=1), random(6, seed=2)
    margin = torch.tensor([3, 0, 1, 2, 0, 1])  # 5 against 2 stars is a margin of 3
    with_margin = losses.bradley_terry_loss(chosen, rejected, margin=margin)
    assert torch.allclose(with_margin, losses.bradley_terry_loss(chosen - margin, rejected))
    assert (with_margin >= losses.bradley_terry_loss(chosen, rejected)).all()
    assert torch.equal(
        losses.bradley_terry_loss(chosen, rejected, margin=0.5),
        losses.bradley_terry_loss(chosen, rejected, margin=torch.full((6,), 0.5).double()),
    )


def test_label_smoothing_is_the_expected_loss_under_flips() -> None:
    chosen, rejected = random(8, seed=3), random(8, seed=4)
    got = losses.bradley_terry_loss(chosen, rejected, label_smoothing=0.1)
    keep = losses.bradley_terry_loss(chosen, rejected)
    flip = losses.bradley_terry_loss(rejected, chosen)
    assert torch.allclose(got, 0.9 * keep + 0.1 * flip, rtol=0, atol=1e-12)
    for bad in (-0.1, 0.5, float("nan")):
        with pytest.raises(DataError):
            losses.bradley_terry_loss(chosen, rejected, label_smoothing=bad)


@pytest.mark.parametrize(
    "function",
    [
        losses.bradley_terry_probability,
        losses.bradley_terry_loss,
        losses.centering_penalty,
        losses.best_global_shift,
        pairwise_accuracy,
    ],
)
def test_pairs_of_scores_are_checked(function: object) -> None:
    call = function
    with pytest.raises(ShapeError, match=r"\[4, 1\]"):
        call(torch.zeros(4, 1), torch.zeros(4))  # type: ignore[operator]
    with pytest.raises(ShapeError):
        call(torch.zeros(4), torch.tensor(0.0))  # type: ignore[operator]
    with pytest.raises(DtypeError):
        call(torch.zeros(4, dtype=torch.int64), torch.zeros(4))  # type: ignore[operator]
    with pytest.raises(DtypeError):
        call([1.0], torch.zeros(1))  # type: ignore[operator]
    # a wrong implementation would have made a matrix of it
    assert (torch.zeros(4, 1) - torch.zeros(4)).shape == (4, 4)


def test_a_margin_of_the_wrong_shape_raises() -> None:
    with pytest.raises(ShapeError, match="margin"):
        losses.bradley_terry_loss(torch.zeros(4), torch.zeros(4), margin=torch.zeros(4, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    chosen, rejected = random(64, seed=5).to(dtype), random(64, seed=6).to(dtype)
    loss = losses.bradley_terry_loss(chosen, rejected)
    assert loss.dtype == torch.float32
    want = losses.bradley_terry_loss(chosen.double(), rejected.double())
    assert torch.allclose(loss.double(), want, rtol=0, atol=1e-6)
    # without the upcast the difference itself is rounded
    assert not torch.allclose(-F.logsigmoid(chosen - rejected).double(), want, rtol=0, atol=1e-6)


def test_non_finite_scores_stay_visible() -> None:
    nan = float("nan")
    assert losses.bradley_terry_loss(f64(nan, 1.0), f64(0.0, 0.0)).isnan().tolist() == [True, False]


# --- centring ---------------------------------------------------------------------------------


def test_centring_has_one_best_global_shift() -> None:
    chosen, rejected = random(256, seed=7) + 1.7, random(256, seed=8) + 0.4
    grid = torch.arange(-3.0, 3.0, 1e-3, dtype=torch.float64)

    def total(shift: Tensor) -> Tensor:
        a, b = chosen + shift, rejected + shift
        pull = losses.centering_penalty(a, b)
        return losses.bradley_terry_loss(a, b).mean() + 0.01 * pull.mean()

    values = torch.stack([total(shift) for shift in grid])
    best = losses.best_global_shift(chosen, rejected)
    assert abs(grid[values.argmin()] - best) < 5e-3
    assert abs(total(torch.tensor(3.0)) - total(torch.tensor(0.0))) > 1e-3
    # wrong: without the half, without the sign, or with the mean of the chosen alone
    for wrong in (2 * best, -best, -chosen.mean()):
        assert abs(grid[values.argmin()] - wrong) > 5e-3


def test_bradley_terry_alone_does_not_see_a_shift_of_five() -> None:
    chosen, rejected = random(256, seed=7), random(256, seed=8)
    a = losses.bradley_terry_loss(chosen, rejected).mean()
    b = losses.bradley_terry_loss(chosen + 5, rejected + 5).mean()
    assert abs(a - b) < 1e-12


def test_centring_does_not_make_the_whole_minimiser_unique() -> None:
    wide = f64(1.0, 10.0, 100.0)
    assert losses.centering_penalty(wide, -wide).tolist() == [0.0, 0.0, 0.0]
    loss = losses.bradley_terry_loss(wide, -wide)
    assert loss[0] > loss[1] > loss[2]


def test_nothing_to_centre() -> None:
    with pytest.raises(ShapeError):
        losses.best_global_shift(torch.zeros(0), torch.zeros(0))


# --- Plackett–Luce ----------------------------------------------------------------------------


def plackett_luce_by_hand(scores: list[float]) -> float:
    strengths = [math.exp(s) for s in scores]
    return -sum(math.log(s / sum(strengths[i:])) for i, s in enumerate(strengths))


def test_plackett_luce_is_bradley_terry_at_two() -> None:
    scores = random(50, 2, seed=9)
    assert torch.allclose(
        losses.plackett_luce_loss(scores),
        losses.bradley_terry_loss(scores[:, 0], scores[:, 1]),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_plackett_luce_is_a_distribution_over_rankings(size: int) -> None:
    scores = random(size, seed=10).tolist()
    orders = list(itertools.permutations(scores))
    got = losses.plackett_luce_loss(f64(*scores)[None].new_tensor(orders))
    for value, order in zip(got.tolist(), orders, strict=True):
        assert value == pytest.approx(plackett_luce_by_hand(list(order)), abs=1e-12)
    assert torch.exp(-got).sum().item() == pytest.approx(1.0, abs=1e-12)
    # wrong: one softmax for all places instead of one over those that remain
    table = f64(*scores).new_tensor(orders)
    wrong = (torch.logsumexp(table, -1, keepdim=True) - table).sum(-1)
    if size > 1:
        assert abs(torch.exp(-wrong).sum().item() - 1) > 1e-3


def test_plackett_luce_with_unequal_k() -> None:
    scores = random(4, 5, seed=11)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]])
    poisoned = scores.masked_fill(mask == 0, float("nan")).requires_grad_()
    got = losses.plackett_luce_loss(poisoned, mask)
    for row in range(4):
        want = plackett_luce_by_hand(scores[row][mask[row].bool()].tolist())
        assert got[row].item() == pytest.approx(want, abs=1e-12)
    assert got[3] == 0
    got.sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[mask == 0] == 0).all()
    # shift invariance, as of every softmax
    assert torch.allclose(losses.plackett_luce_loss(scores + 100, mask), got, rtol=0, atol=1e-10)


def test_plackett_luce_of_extreme_scores_is_finite() -> None:
    loss = losses.plackett_luce_loss(torch.tensor([[-1000.0, 0.0, 1000.0]]))
    assert loss.tolist() == [3000.0]


# --- grouped pairs ----------------------------------------------------------------------------


def grouped_by_hand(scores: Tensor, ranks: Tensor, mask: Tensor) -> list[float]:
    result = []
    for s, r, m in zip(scores.tolist(), ranks.tolist(), mask.tolist(), strict=True):
        terms = [
            exact_loss(s[i] - s[j])
            for i in range(len(s))
            for j in range(len(s))
            if m[i] and m[j] and r[i] < r[j]
        ]
        result.append(sum(terms) / len(terms) if terms else 0.0)
    return result


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_grouped_pairs_are_the_loop(rows: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    ranks = torch.randint(1, 4, (rows, size), generator=generator)
    mask = torch.rand(rows, size, generator=generator) < 0.8
    got = losses.grouped_pair_loss(scores, ranks, mask)
    assert got.tolist() == pytest.approx(grouped_by_hand(scores, ranks, mask), abs=1e-12)


def test_grouped_pairs_weigh_each_prompt_once() -> None:
    # the ranking of 5 has ten pairs, that of 2 one; by prompt they count alike
    scores = torch.zeros(2, 5, dtype=torch.float64)
    ranks = torch.arange(1, 6).expand(2, 5)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    got = losses.grouped_pair_loss(scores, ranks, mask)
    assert torch.allclose(got, f64(math.log(2), math.log(2)))
    full = random(3, 4, seed=12)
    order = torch.arange(4).expand(3, 4)
    all_pairs = sum(
        losses.bradley_terry_loss(full[:, i], full[:, j]) for i in range(4) for j in range(i + 1, 4)
    )
    assert isinstance(all_pairs, Tensor)
    assert torch.allclose(losses.grouped_pair_loss(full, order), all_pairs / math.comb(4, 2))
    # wrong: ranks read the other way round
    assert not torch.allclose(losses.grouped_pair_loss(full, -order), all_pairs / 6)


def test_grouped_pairs_of_ties_and_of_bad_ranks() -> None:
    scores = torch.tensor([[float("nan"), 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True]])
    loss = losses.grouped_pair_loss(scores, torch.tensor([[1.0, 2.0, 2.0]]), mask)
    assert loss.tolist() == [0.0]
    nan_rank = torch.tensor([[1.0, float("nan"), 2.0]])
    with pytest.raises(DataError, match="row 0"):
        losses.grouped_pair_loss(scores, nan_rank, mask)
    masked_nan = torch.tensor([[float("nan"), 1.0, 2.0]])
    loss = losses.grouped_pair_loss(scores, masked_nan, mask)
    loss.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    with pytest.raises(ShapeError):
        losses.grouped_pair_loss(scores, torch.tensor([1, 2, 3]))


# --- outcome and process ----------------------------------------------------------------------


def test_outcome_loss_is_the_log_of_the_probability() -> None:
    logits, labels = random(2, 4, seed=13), torch.tensor([[-100, 1, 1, -100], [0, 0, -100, 1]])
    got = losses.outcome_loss(logits, labels)
    for row, column in itertools.product(range(2), range(4)):
        label = labels[row, column].item()
        z = logits[row, column].item()
        want = {-100: 0.0, 1: exact_loss(z), 0: exact_loss(-z)}[int(label)]
        assert got[row, column].item() == pytest.approx(want, abs=1e-12)


def test_process_loss_is_cross_entropy_at_the_labels() -> None:
    logits, labels = random(2, 3, 3, seed=14), torch.tensor([[-100, 2, 0], [1, -100, -100]])
    got = losses.process_loss(logits, labels)
    want = -torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    want = want * (labels != -100)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    assert (got[labels == -100] == 0).all()


def test_a_batch_of_ignored_labels_is_zero_not_nan() -> None:
    ignored = torch.full((2, 3), -100)
    for loss, logits in [
        (losses.outcome_loss, torch.full((2, 3), float("nan"), requires_grad=True)),
        (losses.process_loss, torch.full((2, 3, 3), float("nan"), requires_grad=True)),
    ]:
        value = loss(logits, ignored)
        assert (value == 0).all()
        value.sum().backward()
        assert logits.grad is not None
        assert (logits.grad == 0).all()
    # wrong: what a mean over nothing gives
    assert F.cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100])).isnan()


def test_labels_of_the_wrong_kind_raise() -> None:
    with pytest.raises(DataError, match="step classes"):
        losses.process_loss(torch.zeros(1, 2, 3), torch.tensor([[-1, 2]]))
    with pytest.raises(ShapeError, match="num_labels=3"):  # one class: loss and gradient exactly 0
        losses.process_loss(torch.zeros(1, 2, 1), torch.tensor([[0, 0]]))
    with pytest.raises(ShapeError):
        losses.process_loss(torch.zeros(1, 2, 3), torch.tensor([[0]]))
    with pytest.raises(DtypeError):
        losses.process_loss(torch.zeros(1, 1, 3), torch.tensor([[0.0]]))
    with pytest.raises(DataError, match="outcome labels"):
        losses.outcome_loss(torch.zeros(1, 2), torch.tensor([[-1, 1]]))
    with pytest.raises(DataError):
        losses.outcome_loss(torch.zeros(1, 1), torch.tensor([[float("nan")]]))
    with pytest.raises(ShapeError):
        losses.outcome_loss(torch.zeros(2, 2), torch.tensor([1, 0]))


# --- gradients --------------------------------------------------------------------------------


def test_gradients() -> None:
    c, r = random(5, seed=15).requires_grad_(), random(5, seed=16).requires_grad_()
    s = random(3, 4, seed=17).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    ranks = torch.tensor([[1, 2, 2, 3], [2, 1, 9, 9], [1, 3, 2, 1]])
    out = torch.tensor([[1, 0, -100, 1], [-100, -100, 0, 0], [1, 1, 1, 1]])
    logits = random(3, 4, 3, seed=18).requires_grad_()
    classes = torch.tensor([[2, 0, -100, 1], [-100, -100, 0, 0], [1, 1, 1, 2]])
    check = torch.autograd.gradcheck
    assert check(
        lambda a, b: losses.bradley_terry_loss(a, b, margin=0.3, label_smoothing=0.1), (c, r)
    )
    assert check(losses.bradley_terry_probability, (c, r))
    assert check(losses.centering_penalty, (c, r))
    assert check(losses.best_global_shift, (c, r))
    assert check(lambda x: losses.plackett_luce_loss(x, mask), (s,))
    assert check(lambda x: losses.grouped_pair_loss(x, ranks, mask), (s,))
    assert check(lambda x: losses.outcome_loss(x, out), (s,))
    assert check(lambda x: losses.process_loss(x, classes), (logits,))


def test_masks_are_checked() -> None:
    scores = torch.zeros(1, 2)
    with pytest.raises(DtypeError, match="additive"):
        losses.plackett_luce_loss(scores, torch.tensor([[0.0, -1e9]]))
    with pytest.raises(ShapeError):
        losses.plackett_luce_loss(scores, torch.tensor([[2, 1]]))
    with pytest.raises(ShapeError):
        losses.plackett_luce_loss(scores, torch.tensor([1, 1]))
    with pytest.raises(ShapeError):
        losses.plackett_luce_loss(torch.zeros(2))
    with pytest.raises(DtypeError):
        losses.plackett_luce_loss(scores, [[1, 1]])  # type: ignore[arg-type]
