"""The audit with labelled pairs: figures against plain loops, sick sets, sound ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.audit import Outcome, Subject, run_checks
from companion.audit.auditing import open_subject
from companion.audit.checks.data import FEWEST, data_checks
from companion.audit.museum.data import SPECIMENS, sound_rows
from companion.audit.museum.healthy import save_stock, tutor_reward
from companion.audit.subject import Batch, BudgetSpent
from companion.data import load_rows
from companion.errors import DataError
from companion.formatting import Row
from companion.models.manifest import ReferenceStats, RewardManifest


class Scorer(Subject):
    """Whoever takes rows and says a number that is known."""

    name, what = "known", "endpoint"
    abilities = frozenset({"rows"})

    def __init__(self, score: Callable[[str], float], most: int | None = None) -> None:
        self.score, self.max_requests = score, most

    def call(self, batch: Batch) -> np.ndarray:
        raise NotImplementedError

    alone = tolerance = call  # type: ignore[assignment]

    def call_rows(self, rows: Sequence[Row]) -> np.ndarray:
        if self.max_requests is not None and self.requests + len(rows) > self.max_requests:
            raise BudgetSpent("no request is left")
        self.requests += len(rows)
        return np.array([self.score(row["completion"]) for row in rows])  # type: ignore[call-overload,index]


def asked(subject: Subject, rows: Any, **how: Any) -> dict[str, Outcome]:
    return {check.name: outcome for check, outcome in run_checks(subject, data_checks(rows, **how))}


def size(outcome: Outcome) -> float:
    assert outcome.size is not None
    return outcome.size


def span(outcome: Outcome) -> tuple[float, float]:
    """The interval, with the size inside."""
    assert outcome.interval is not None
    assert outcome.interval[0] <= size(outcome) <= outcome.interval[1]
    return outcome.interval


def pairs(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Three pairs a prompt; the text says its own score, and is longer or shorter at random."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        a, b = rng.normal(0.4, 1), rng.normal(0, 1)
        sides = (f"{x:.3f} {'x' * rng.integers(1, 40)}" for x in (a, b))
        own = dict(zip(("chosen", "rejected"), sides, strict=True))
        rows.append({"prompt": f"prompt {i // 3}", **own, "subset": "ab"[i % 5 == 0]})
    return rows


def said(text: str) -> float:
    return float(text.split()[0])


def test_figures_are_those_of_plain_loops() -> None:
    rows = pairs(300)
    margins = [said(row["chosen"]) - said(row["rejected"]) for row in rows]
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    unequal = [len(row["chosen"]) != len(row["rejected"]) for row in rows]
    found = asked(Scorer(said), rows)
    accuracy = found["accuracy"]
    assert accuracy.status == "measured"
    assert accuracy.size == sum(m > 0 for m in margins) / 300
    assert span(accuracy)[0] > 0.5
    assert accuracy.figures["n_prompts"] == 100
    sure = [1 / (1 + np.exp(-abs(m))) for m in margins]
    gap = np.mean([s - (m > 0) for s, m in zip(sure, margins, strict=True)])
    assert found["overconfidence"].size == pytest.approx(gap)
    scores = [said(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert found["centring"].size == pytest.approx(np.mean(scores) / np.std(scores, ddof=1))
    more = [
        ((m > 0) == is_longer) - is_longer
        for m, is_longer, counts in zip(margins, longer, unequal, strict=True)
        if counts
    ]
    assert found["length-bias"].size == pytest.approx(np.mean(more))
    # the length says nothing here: an interval that leaves zero out would be a false alarm
    low, high = span(found["length-bias"])
    assert low < 0 < high
    assert found["tied-pairs"].size == 0
    right = {
        name: np.mean([m > 0 for m, r in zip(margins, rows, strict=True) if r["subset"] == name])
        for name in "ab"
    }
    lag = abs(right["a"] - right["b"])
    assert found["weakest-subset"].size == pytest.approx(lag)
    assert found["worse-than-a-coin"].status == "sound"
    assert found["length-imbalance"].size == pytest.approx(
        np.mean([is_longer for is_longer, counts in zip(longer, unequal, strict=True) if counts])
    )
    assert not {"annotators-ceiling", "trained-on-these-rows", "leakage"} & found.keys()


def test_what_is_planted_in_scores_is_seen() -> None:
    rows = pairs(300)
    found = asked(Scorer(lambda text: -said(text)), rows)
    assert found["worse-than-a-coin"].status == "found"
    low, _ = span(asked(Scorer(lambda text: said(text) + len(text) / 5), rows)["length-bias"])
    assert low > 0.1
    found = asked(Scorer(lambda text: float(round(said(text)))), rows)
    assert 0.1 < size(found["tied-pairs"]) < 0.6
    assert found["tied-pairs"].figures["distinct_scores"] < 12
    low, _ = span(asked(Scorer(lambda text: 20 * said(text)), rows)["overconfidence"])
    assert low > 0.1
    manifest = RewardManifest(
        temperature=20.0, reference=ReferenceStats(3.0, 2.0, [], 2, "elsewhere")
    )
    subject = Scorer(lambda text: 20 * said(text))
    subject.manifest = manifest
    found = asked(subject, rows)
    want = asked(Scorer(said), rows)
    assert found["overconfidence"].size == pytest.approx(want["overconfidence"].size)
    scores = [20 * said(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert found["centring"].size == pytest.approx((np.mean(scores) - 3) / 2)
    # a subset that is turned round is the weakest
    turned = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        if row["subset"] == "b"
        else row
        for row in rows
    ]
    weakest = asked(Scorer(said), turned)["weakest-subset"]
    assert span(weakest)[0] > 0
    assert ": b " in weakest.seen


def test_the_budget_is_what_is_left() -> None:
    rows = pairs(300)
    subject = Scorer(said, most=100)
    found = asked(subject, rows)
    assert found["accuracy"].figures["n"] == 50
    assert found["accuracy"].figures["n_prompts"] == 50  # one pair of each prompt first
    assert subject.requests == 100
    few = asked(Scorer(said, most=2 * FEWEST - 1), rows)
    assert few["accuracy"].status == "not asked"
    assert few["length-imbalance"].status == "measured"  # what needs no model is asked
    again = asked(Scorer(said, most=100), rows, seed=1)
    assert again["accuracy"].figures["n"] == 50

    def refuses(text: str) -> float:
        if text.startswith("-"):
            raise DataError("no text below zero")
        return said(text)

    found = asked(Scorer(refuses), rows)
    assert found["accuracy"].figures["dropped"]["reasons"].keys() == {"no text below zero"}
    with pytest.raises(DataError):
        data_checks([{"prompt": "p"}])


def test_the_ceiling_stands_beside_the_accuracy() -> None:
    rows = [
        {**row, "annotator": person}
        for row, person in itertools.product(pairs(60), ("one", "other"))
    ]
    for row in rows[1:40:2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    found = asked(Scorer(said), rows)
    ceiling = found["annotators-ceiling"]
    assert ceiling.status == "measured"
    assert ceiling.size == pytest.approx((1 + np.sqrt(2 * 40 / 60 - 1)) / 2)
    assert "at most, if all pairs are equally hard" in found["accuracy"].seen
    assert found["contradicting-labels"].figures["rows"] == 40


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name)
def test_a_sick_set_is_caught_under_its_name(specimen: Any, tmp_path: Path) -> None:
    with specimen.plant(tmp_path) as planted:
        against = None if planted.against is None else load_rows(planted.against)
        subject = open_subject(planted.target)
        subject.max_tokens = 3_500
        found = asked(subject, load_rows(planted.data), against=against)
    hazards = {name for name, outcome in found.items() if outcome.status == "found"}
    assert hazards == found.keys() & {specimen.caught_by, *specimen.also}
    assert specimen.caught_by in hazards


def test_nothing_ails_the_sound_set(tmp_path: Path) -> None:
    subject = open_subject(save_stock(tutor_reward(), tmp_path))
    found = asked(subject, sound_rows(), against=[{"prompt": "another question"}])
    assert [name for name, outcome in found.items() if outcome.status == "found"] == []
    assert subject.tokens <= 30_000
    assert size(found["accuracy"]) > 0.6


def test_each_hazard_has_a_specimen() -> None:
    hazards = {
        check.name
        for check in data_checks(sound_rows()[:1], against=sound_rows())
        if check.kind == "hazard"
    }
    caught = {name for each in SPECIMENS for name in (each.caught_by, *each.also)}
    # (the tutor's vocabulary lacks nothing; see tests/data/test_checking.py)
    assert hazards - caught == {"unknown-tokens-in-rows"}
    assert len({each.name for each in SPECIMENS}) == len(SPECIMENS)
