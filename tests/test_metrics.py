"""Figures of a reward model on pairs, against loops, a known truth, and wrong ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from companion.errors import DataError, ShapeError
from companion.evaluation import pairwise_metrics

NAN = float("nan")


def truth(n: int, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of a model that is the truth, and the true probabilities of its labels."""
    random = np.random.default_rng(seed)
    first, second = random.normal(0, spread, (2, n))
    wins = random.random(n) < 1 / (1 + np.exp(second - first))
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    return chosen, rejected, 1 / (1 + np.exp(rejected - chosen))


def test_the_five_pairs() -> None:
    chosen, rejected = [1.0, 0.5, -0.2, 2.0, 0.0], [0.0, 0.7, 0.3, 1.0, 0.0]
    got = pairwise_metrics(
        chosen, rejected, chosen_lengths=[5, 4, 3, 9, 2], rejected_lengths=[4, 6, 3, 3, 3]
    )
    gaps = [1, -0.2, -0.5, 1, 0]
    assert (got["n_rows"], got["n"], got["ties"]) == (5, 5, 1)
    assert got["accuracy"] == pytest.approx(2 / 5)
    assert got["accuracy_ties_half"] == pytest.approx(0.5)
    assert got["margin_mean"] == pytest.approx(np.mean(gaps))
    assert got["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-g)) for g in gaps]))
    assert got["brier"] == pytest.approx(np.mean([(1 - 1 / (1 + math.exp(-g))) ** 2 for g in gaps]))
    assert got["longer_wins"] == {"accuracy": pytest.approx(2.5 / 5), "ties": 1}
    low, high = got["accuracy_interval"]
    assert 0 <= low < 0.4 < high <= 1
    assert got["limit"] is None
    assert got["subsets"] == {}


def test_a_model_that_is_the_truth_stands_at_its_limit() -> None:
    chosen, rejected, p = truth(4000)
    got = pairwise_metrics(chosen, rejected, probability=p, temperature=1.0)
    limit = got["limit"]
    for name in ("accuracy", "loss", "brier", "ece"):
        assert got[name] == pytest.approx(limit["rows"][name], abs=1e-9), name
    assert all(got["at_temperature"][name] == got[name] for name in ("loss", "brier", "ece"))
    for name in ("accuracy", "loss"):
        assert limit["model_expected"][name] == pytest.approx(limit["expected"][name], abs=1e-9)
        assert limit["rows"][name] == pytest.approx(limit["expected"][name], abs=0.03)
    assert got["ece_band"][0] <= got["ece"] <= got["ece_band"][1]
    assert got["ece"] < got["ece_plain"] + 0.01
    assert limit["expected"]["ece"] == 0.0


def test_no_model_beats_the_limit_on_average_over_labels() -> None:
    chosen, rejected, p = truth(2000)
    noise = np.random.default_rng(1).normal(0, 1, (2, 2000))
    got = pairwise_metrics(1.7 * chosen + noise[0], 1.7 * rejected + noise[1], probability=p)
    ours, best = got["limit"]["model_expected"], got["limit"]["expected"]
    assert ours["accuracy"] < best["accuracy"] - 0.01
    assert ours["loss"] > best["loss"] + 0.01


def test_the_temperature_cures_overconfidence() -> None:
    chosen, rejected, _ = truth(3000)
    got = pairwise_metrics(2 * chosen, 2 * rejected, temperature=2.0)
    warm = got["at_temperature"]
    assert warm["loss"] < got["loss"]
    assert warm["ece"] < got["ece"] - 0.05
    assert got["ece"] > got["ece_band"][1]
    assert warm["ece"] <= warm["ece_band"][1]
    # and is a matter of probabilities only
    assert got["accuracy"] == pairwise_metrics(chosen, rejected)["accuracy"]
    # wrong: the outcome always 1
    p = 1 / (1 + np.exp(rejected - chosen))
    assert 1 - p.mean() > 10 * max(warm["ece"], 0.005)


def test_dropped_rows_are_counted_and_change_nothing() -> None:
    chosen, rejected, p = truth(50)
    whole = pairwise_metrics(chosen, rejected, probability=p, subsets=["a"] * 50)
    more = pairwise_metrics(
        np.append(chosen, [NAN, 1.0, np.inf]),
        np.append(rejected, [NAN, NAN, 0.0]),
        probability=np.append(p, [NAN, NAN, NAN]),
        subsets=["a"] * 50 + ["b"] * 3,
        reasons=[None] * 50 + ["too long", None, None],
    )
    assert more.pop("dropped") == {
        "total": 3,
        "reasons": {"too long": 1, "no score": 1, "score is not finite": 1},
    }
    assert more.pop("n_rows") == 53
    assert whole.pop("dropped")["total"] == 0
    assert whole.pop("n_rows") == 50
    assert more == whole
    with pytest.raises(DataError, match="2 × too long"):
        pairwise_metrics([NAN, NAN], [1.0, 1.0], reasons=["too long"] * 2)


def test_subsets_add_up() -> None:
    chosen, rejected, p = truth(300)
    names = [("x", "y", 7)[i % 3] for i in range(300)]
    lengths = np.random.default_rng(0).integers(1, 9, (2, 300))
    got = pairwise_metrics(
        chosen,
        rejected,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        subsets=names,
        probability=p,
        groups=[i // 2 for i in range(300)],
    )
    rows = got["subsets"]
    assert set(rows) == {"x", "y", "7"}
    for name in ("accuracy", "loss", "margin_mean"):
        mean = sum(row["n"] * row[name] for row in rows.values()) / 300
        assert mean == pytest.approx(got[name])
    assert sum(row["n"] * row["longer_wins"]["accuracy"] for row in rows.values()) == (
        pytest.approx(300 * got["longer_wins"]["accuracy"])
    )
    assert sum(row["n"] * row["limit_loss"] for row in rows.values()) == (
        pytest.approx(300 * got["limit"]["rows"]["loss"])
    )
    for name, row in rows.items():
        mine = np.array([str(n) == name for n in names])
        assert row["accuracy"] == pytest.approx((chosen > rejected)[mine].mean())


def test_the_interval_draws_prompts() -> None:
    chosen, rejected, _ = truth(100)
    twenty = [np.repeat(side, 20) for side in (chosen, rejected)]
    prompts = list(np.repeat(np.arange(100), 20))
    got = pairwise_metrics(*twenty, groups=prompts)
    assert got["n_prompts"] == 100
    naive = pairwise_metrics(*twenty)
    assert naive["n_prompts"] is None
    width, wrong = (np.ptp(m["accuracy_interval"]) for m in (got, naive))
    assert width > 3 * wrong


def test_all_right_is_not_certain() -> None:
    ones, zeros = np.ones(10), np.zeros(10)
    low, high = pairwise_metrics(ones, zeros)["accuracy_interval"]
    assert 0.6 < low < 0.8
    assert high == 1.0
    # of one prompt, ten pairs say no more than one
    few = pairwise_metrics(ones, zeros, groups=["p"] * 10)["accuracy_interval"]
    assert few[0] < 0.3
    low, high = pairwise_metrics(zeros, ones)["accuracy_interval"]
    assert (low, high) == (0.0, pytest.approx(0.2775, abs=1e-3))


def test_length_correlation() -> None:
    lengths = np.arange(1.0, 41.0)
    got = pairwise_metrics(
        lengths, -lengths, chosen_lengths=lengths, rejected_lengths=np.full(40, 1)
    )
    assert got["margin_length"]["pearson"] == pytest.approx(1.0)
    assert got["margin_length"]["spearman"] == pytest.approx(1.0)
    assert got["score_length"]["spearman"] > 0.5
    flat = pairwise_metrics(lengths, -lengths, chosen_lengths=[3] * 40, rejected_lengths=[3] * 40)
    assert flat["score_length"] == {"pearson": None, "spearman": None}
    assert flat["longer_wins"] == {"accuracy": 0.5, "ties": 40}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=30),
    st.sampled_from([None, 0.5, 1.0, 3.0]),
)
def test_any_scores_give_plain_json(
    values: list[tuple[int, int]], temperature: float | None
) -> None:
    chosen, rejected = (np.array(side, dtype=float) for side in zip(*values, strict=True))
    got = pairwise_metrics(
        torch.tensor(chosen),
        torch.tensor(rejected),
        chosen_lengths=chosen + 9,
        rejected_lengths=rejected + 9,
        probability=np.full(len(values), 0.5),
        subsets=[v[0] for v in values],
        groups=[v[1] for v in values],
        temperature=temperature,
    )
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    low, high = got["accuracy_interval"]
    assert -1e-12 <= low <= got["accuracy"] + 1e-12 <= high + 2e-12 <= 1 + 3e-12
    # turned round: right and wrong change places
    turned = pairwise_metrics(rejected, chosen)
    assert turned["accuracy_ties_half"] == pytest.approx(1 - got["accuracy_ties_half"])
    assert turned["margin_mean"] == pytest.approx(-got["margin_mean"])
    assert got["limit"]["rows"]["accuracy"] == 0.0  # a coin's gold is never strictly above 0.5
    assert got["limit"]["expected"]["accuracy"] == 0.5


def test_the_result_is_the_same_each_time() -> None:
    chosen, rejected, p = truth(80)
    assert pairwise_metrics(chosen, rejected, probability=p) == pairwise_metrics(
        chosen, rejected, probability=p
    )


def test_bad_input() -> None:
    one = [1.0]
    with pytest.raises(ShapeError):
        pairwise_metrics(one, [1.0, 2.0])
    with pytest.raises(ShapeError):
        pairwise_metrics(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ShapeError, match="subsets has 2"):
        pairwise_metrics(one, one, subsets=["a", "b"])
    with pytest.raises(ShapeError, match="both sides"):
        pairwise_metrics(one, one, chosen_lengths=one)
    with pytest.raises(DataError, match="temperature"):
        pairwise_metrics(one, one, temperature=0.0)
    with pytest.raises(DataError, match="probability"):
        pairwise_metrics(one, one, probability=[1.2])
    with pytest.raises(DataError, match="length"):
        pairwise_metrics(one, one, chosen_lengths=[NAN], rejected_lengths=one)
    with pytest.raises(DataError):
        pairwise_metrics([], [])
