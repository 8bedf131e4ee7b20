"""Best-of-N, accuracy, margin, whitening."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from companion import bootstrap_interval
from companion.errors import DataError, ShapeError
from companion.functional import (
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    expected_best_of_n,
    margin,
    pairwise_accuracy,
    top_k,
    whiten,
)

NAN = float("nan")
INF = float("inf")
scores = st.lists(st.floats(-100, 100), min_size=1, max_size=12)


def test_five_pairs() -> None:
    chosen = torch.tensor([1.0, 0.5, -0.2, 2.0, 0.0], dtype=torch.float64)
    rejected = torch.tensor([0.0, 0.7, 0.3, 1.0, 0.0], dtype=torch.float64)
    right = pairwise_accuracy(chosen, rejected)
    assert right.tolist() == [1, 0, 0, 1, 0]
    assert right.mean().item() == pytest.approx(2 / 5)
    assert pairwise_accuracy(chosen, rejected, ties="half").tolist() == [1, 0, 0, 1, 0.5]
    difference = margin(chosen, rejected)
    assert difference.tolist() == pytest.approx([1, -0.2, -0.5, 1, 0])
    # wrong: a tie taken for a win
    assert (chosen >= rejected).double().mean() == pytest.approx(3 / 5)


def test_accuracy_does_not_count_what_has_no_score() -> None:
    got = pairwise_accuracy(torch.tensor([NAN, 1.0]), torch.tensor([0.0, NAN]))
    assert got.isnan().all()
    with pytest.raises(DataError):
        pairwise_accuracy(torch.zeros(1), torch.zeros(1), ties="right")  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        margin(torch.zeros(2, 1), torch.zeros(2))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1))
def test_with_half_ties_swapping_gives_the_complement(values: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor(side, dtype=torch.float32) for side in zip(*values, strict=True))
    both = pairwise_accuracy(a, b, ties="half") + pairwise_accuracy(b, a, ties="half")
    assert (both == 1).all()


# --- best-of-N --------------------------------------------------------------------------------


def test_best_of_n() -> None:
    assert best_of_n(torch.tensor([7.0])).item() == 0
    assert best_of_n(torch.tensor([0.1, -2, 3.5, 3.4999, 0])).item() == 2
    assert best_of_n(torch.tensor([1.0, 3.0, 3.0])).item() == 1  # the first of the best
    assert best_of_n(torch.zeros(2, 3, 4)).shape == (2, 3)


def test_nan_never_wins() -> None:
    assert best_of_n(torch.tensor([[NAN, -5.0], [-INF, NAN]])).tolist() == [1, 0]
    assert torch.tensor([NAN, -5.0]).argmax() == 0  # wrong: a NaN wins
    assert best_of_n(torch.tensor([NAN, -INF])).item() == 1
    with pytest.raises(DataError):
        best_of_n(torch.tensor([[1.0, 2.0], [NAN, NAN]]))
    assert top_k(torch.tensor([NAN, -INF, 2.0, NAN]), 4).tolist() == [2, 1, 0, 3]


@settings(deadline=None)
@given(scores)
def test_top_k_is_pythons_stable_sort(values: list[float]) -> None:
    row = torch.tensor(values, dtype=torch.float64)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    for k in range(1, len(values) + 1):
        assert top_k(row, k).tolist() == order[:k]
    assert best_of_n(row).item() == order[0]
    for k in (0, len(values) + 1):
        with pytest.raises(ShapeError):
            top_k(row, k)


def test_expected_best_grows_with_n() -> None:
    draws = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    best = [
        draws[:, :n].gather(1, best_of_n(draws[:, :n])[:, None]).mean().item() for n in range(1, 9)
    ]
    assert all(b < a for b, a in itertools.pairwise(best))
    assert best[7] - best[0] > 0.5
    assert best[7] == pytest.approx(1.4236, abs=0.02)  # mean of the maximum of 8 standard normals


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_expected_best_of_n_is_the_mean_over_subsets(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    proxy = torch.randn(size, generator=generator, dtype=torch.float64)
    gold = torch.randn(size, generator=generator, dtype=torch.float64)
    for n in range(1, size + 1):
        subsets = list(itertools.combinations(range(size), n))
        want = sum(max(proxy[i].item() for i in s) for s in subsets) / len(subsets)
        assert expected_best_of_n(proxy, n).item() == pytest.approx(want, abs=1e-12)
        want = sum(gold[max(s, key=lambda i: proxy[i])].item() for s in subsets) / len(subsets)
        assert expected_best_of_n(proxy, n, gold).item() == pytest.approx(want, abs=1e-12)
    with pytest.raises(ShapeError):
        expected_best_of_n(proxy, size + 1)


def test_expected_best_of_n_refuses_nan() -> None:
    with pytest.raises(DataError):
        expected_best_of_n(torch.tensor([NAN, 1.0]), 1)


def test_a_curve_is_best_of_n_drawn_many_times() -> None:
    """Against the plain way: draw n of the pool, take the best by the proxy, look at its gold."""
    generator = torch.Generator().manual_seed(3)
    gold = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    proxy = gold + torch.randn(6, 40, generator=generator, dtype=torch.float64)
    ns = [1, 2, 5, 17, 40]
    curve = best_of_n_curve(proxy, ns, gold)
    assert curve.n.tolist() == ns
    assert curve.per_prompt.shape == (6, 5)
    for place, n in enumerate(ns):
        drawn = torch.rand(4000, 6, 40, generator=generator).argsort(-1)[..., :n]
        chosen = best_of_n(proxy.expand(4000, -1, -1).gather(-1, drawn))
        worth = gold.expand(4000, -1, -1).gather(-1, drawn.gather(-1, chosen[..., None]))[..., 0]
        error = 4 * worth.mean(1).std().item() / 4000**0.5 + 1e-12
        assert curve.mean[place] == pytest.approx(worth.mean().item(), abs=error)
        assert curve.kl[place] == best_of_n_kl(n)
        interval = bootstrap_interval(curve.per_prompt[:, place])
        assert (curve.low[place], curve.high[place]) == interval
        assert curve.low[place] <= curve.mean[place] <= curve.high[place]
    # wrong: the first n of the pool and no others, which is one draw and not the mean of all
    first = gold.gather(1, best_of_n(proxy[:, :5])[:, None]).mean()
    assert abs(first.item() - curve.mean[2]) > 0.02
    # by its own scores a curve cannot fall
    assert (torch.tensor(best_of_n_curve(proxy, ns).mean).diff() > 0).all()


def test_a_curve_refuses_what_is_no_pool() -> None:
    with pytest.raises(ShapeError, match="prompts, samples"):
        best_of_n_curve(torch.zeros(4), [1])
    with pytest.raises(ShapeError):
        best_of_n_curve(torch.zeros(2, 4), [5])


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_kl_of_best_of_n(n: int) -> None:
    # the density of the best's quantile is n u^(n-1); its KL from uniform, integrated
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    log_density = math.log(n) + (n - 1) * u.log()
    want = (log_density.exp() * log_density).mean().item()
    assert best_of_n_kl(n) == pytest.approx(want, abs=1e-4)
    assert best_of_n_kl(n) <= math.log(n)


def test_kl_refuses_zero() -> None:
    with pytest.raises(DataError):
        best_of_n_kl(0)
    with pytest.raises(ShapeError):
        best_of_n(torch.zeros(3, 0))


# --- whitening --------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(2, 20), st.floats(-1000, 1000), st.floats(1e-2, 1e3), st.integers(0, 99))
def test_whitening(size: int, location: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, size, generator=generator, dtype=torch.float64) * spread + location
    white = whiten(values)
    # what rounding at the values' own size leaves of a mean, in standard deviations
    rounding = 4 * 2.0**-52 * float((values.abs().amax(1) / values.std(1, correction=0)).max())
    near = 1e-9 + rounding
    assert torch.allclose(white.mean(1), torch.zeros(3, dtype=torch.float64), atol=near)
    assert torch.allclose(white.std(1, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-9)
    sample = whiten(values, correction=1)
    assert torch.allclose(sample.std(1), torch.ones(3, dtype=torch.float64), atol=1e-9)
    kept = whiten(values, shift_mean=False)
    assert torch.allclose(kept.mean(1), values.mean(1), atol=near)
    # along another axis
    assert torch.allclose(whiten(values.T, dim=0).T, white, atol=near)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_equal_gives_zeros(value: float, dtype: torch.dtype) -> None:
    row = torch.full((7,), value, dtype=dtype, requires_grad=True)
    for correction in (0, 1):
        white = whiten(row, correction=correction)
        assert (white == 0).all()
    white.sum().backward()
    assert row.grad is not None
    assert row.grad.isfinite().all()
    assert (whiten(row[:1], correction=1) == 0).all()


def test_rounding_noise_is_not_blown_up() -> None:
    row = torch.full((4096,), 0.1)
    row[0] = torch.nextafter(row[0], torch.tensor(1.0))
    assert (whiten(row) == 0).all()
    naive = (row - row.mean()) / row.std()
    assert naive.abs().max() > 0.5  # wrong: a division by the noise makes it of size 1


def test_wrong_whitenings_are_caught() -> None:
    row = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    assert whiten(row).std(correction=0).item() == pytest.approx(1, abs=1e-9)
    eps_added = (row - row.mean()) / (row.std() + 1e-4)
    assert abs(eps_added.std(correction=0).item() - 1) > 1e-2
    assert (torch.zeros(3) / torch.zeros(3).std()).isnan().all()


def test_whitening_has_a_gradient() -> None:
    row = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(whiten, (row,))
    with pytest.raises(ShapeError):
        whiten(torch.zeros(0))
