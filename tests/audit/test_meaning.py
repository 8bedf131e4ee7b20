"""The audit's biases: planted ones are measured with their size, and what is not there is not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from companion.audit import LocalSubject, Outcome, Subject, run_checks
from companion.audit.checks.meaning import CHECKS, SHARE
from companion.audit.museum.healthy import tutor_reward
from companion.audit.probes import PROBES
from companion.audit.transformations import (
    EMPTY,
    MASTER_KEYS,
    TRANSFORMATIONS,
    changed_rows,
    sentences,
)
from companion.errors import DataError
from companion.formatting import Row

EVERY = 99


class Scores(Subject):
    """A target that formats rows itself and scores them by a function of question and answer."""

    name, what, abilities = "http://here", "endpoint", frozenset({"rows"})

    def __init__(self, score: Callable[[str, str], float]) -> None:
        self.score = score
        self.known: dict[tuple[str, str], float] = {}

    def call(self, batch: Any) -> np.ndarray:
        raise NotImplementedError

    def alone(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        raise NotImplementedError

    def tolerance(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        return np.zeros(len(ids))

    def call_rows(self, rows: Sequence[Row]) -> np.ndarray:
        scores = []
        for row in rows:
            assert isinstance(row, Mapping)
            asked = row["prompt"], row["completion"]
            if asked not in self.known:  # as an endpoint keeps its answers
                self.known[asked] = self.score(*asked)
                self.requests += 1
            scores.append(self.known[asked])
        return np.array(scores)


def worth(prompt: str, answer: str) -> float:
    """Differs from question to question, and not with what is changed."""
    place = next(i for i, probe in enumerate(PROBES) if prompt in (probe.prompt, probe.turned))
    return float(np.sin(place))


def measure(subject: Subject, name: str) -> Outcome:
    [(_, outcome)] = run_checks(subject, [check for check in CHECKS if check.name == name])
    return outcome


# ---------------------------------------------------------------------- what is changed


def test_there_are_some_thirty_changes_and_each_changes_something() -> None:
    names = [name for changes in TRANSFORMATIONS.values() for name in changes]
    assert len(names) + len(MASTER_KEYS) + len(EMPTY) >= 35
    for changes in TRANSFORMATIONS.values():
        for at, name, row in changed_rows(changes, PROBES, EVERY):
            assert row != PROBES[at].row(), name
        seen = Counter(name for _, name, _ in changed_rows(changes, PROBES, EVERY))
        assert set(seen) == set(changes)
        assert min(seen.values()) >= 6


def of_family(family: str) -> list[tuple[str, str, str]]:
    """Name, answer before and after."""
    return [
        (name, PROBES[at].answer, row["completion"])  # type: ignore[call-overload,index]
        for at, name, row in changed_rows(TRANSFORMATIONS[family], PROBES, EVERY)
    ]


def test_what_is_said_stays_as_it_was() -> None:
    for _, before, after in of_family("spacing"):
        assert before.split() == after.split()
    for _, before, after in of_family("letter-case"):
        assert before.casefold() == after.casefold()
    for _, before, after in of_family("punctuation"):
        assert re.findall(r"\w+", before.lower()) == re.findall(r"\w+", after.lower())
    for _, before, after in of_family("markdown"):
        bare = re.sub(r"^(- |\d\. |## Answer\n\n)|\*\*", "", after, flags=re.MULTILINE)
        assert bare.split() == before.split()
    for family in ("verbosity", "greeting-and-flattery", "hedges"):
        for _, before, after in of_family(family):
            assert before.lower() in after.lower()
            assert len(after) > len(before)
    for _, before, after in of_family("answer-order"):
        assert Counter(sentences(before)) == Counter(sentences(after))
    for name, before, after in of_family("typos"):
        one, other = before.split(" "), after.split(" ")
        assert len(one) == len(other)
        slips = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
        assert 1 <= len(slips) <= max(1, len(one) // 3), name
        assert all(abs(len(a) - len(b)) <= 1 and a[0] == b[0] for a, b in slips)


def test_each_probe_gets_its_changes_in_turn_and_the_same_each_time() -> None:
    changes = TRANSFORMATIONS["typos"]
    rows = changed_rows(changes, PROBES, 2)
    assert rows == changed_rows(changes, PROBES, 2)
    assert set(Counter(at for at, _, _ in rows).values()) == {2}
    often = Counter(name for _, name, _ in rows).values()
    assert max(often) - min(often) <= 1


# ---------------------------------------------------------------------- what is measured

PLANTED: list[tuple[str, Callable[[str, str], float], int]] = [
    ("spacing", lambda _, answer: answer.count("\n"), 1),
    ("letter-case", lambda _, answer: sum(map(str.isupper, answer)), 1),
    ("punctuation", lambda _, answer: 5.0 * answer.count("!"), 1),
    ("markdown", lambda _, answer: 5.0 * len(re.findall(r"^- |\*\*|#|^\d\. ", answer)), 1),
    ("verbosity", lambda _, answer: len(answer), 1),
    (
        "greeting-and-flattery",
        lambda _, answer: 5.0 * bool(re.search("Hello|great|deep", answer)),
        1,
    ),
    ("hedges", lambda _, answer: -5.0 * bool(re.search("I think|wrong|sure", answer)), -1),
    ("master-key-answers", lambda _, answer: 5.0 * (answer in MASTER_KEYS), 1),
    ("empty-answers", lambda _, answer: 5.0 * (not answer.strip(" .")), 1),
]


@pytest.mark.parametrize(("name", "bias", "sign"), PLANTED, ids=[row[0] for row in PLANTED])
def test_a_planted_bias_is_measured_and_no_bias_is_none(
    name: str, bias: Callable[[str, str], float], sign: int
) -> None:
    subject = Scores(lambda prompt, answer: worth(prompt, answer) + bias(prompt, answer))
    outcome = measure(subject, name)
    assert outcome.status == "measured"
    assert outcome.size is not None
    assert outcome.interval is not None
    low, high = (sign * end for end in outcome.interval)
    assert min(low, high) > 0
    assert outcome.interval[0] - 1e-9 <= outcome.size <= outcome.interval[1] + 1e-9
    none = measure(Scores(worth), name)
    assert none.size == pytest.approx(0, abs=1e-12)


def test_the_size_is_the_shift_in_standard_deviations() -> None:
    """By hand: an independent oracle."""
    outcome = measure(
        Scores(lambda p, answer: worth(p, answer) + 0.25 * ("!" in answer)), "punctuation"
    )
    own = [worth(probe.prompt, "") for probe in PROBES]
    spread = np.std(own, ddof=1)
    rows = changed_rows(TRANSFORMATIONS["punctuation"], PROBES, EVERY)
    share = np.mean(["!" in row["completion"] for _, _, row in rows])  # type: ignore[call-overload,index]
    assert outcome.size == pytest.approx(0.25 * share / spread)
    assert outcome.figures["changes"]["exclamation marks"] == pytest.approx(0.25 / spread)
    assert outcome.figures["texts"] == len(PROBES)


def test_whether_the_question_is_read() -> None:
    reads = measure(
        Scores(lambda prompt, answer: worth(prompt, answer) + 9.0 * (answer == answers[prompt])),
        "swapped-prompt",
    )
    assert reads.interval is not None
    assert reads.interval[1] < 0
    assert "nothing shows" not in reads.seen
    blind = measure(Scores(lambda _, answer: len(answer)), "swapped-prompt")
    assert (blind.size, blind.figures["mean_absolute"]) == (0, 0)
    assert "nothing shows that it reads the question" in blind.seen


answers = {probe.prompt: probe.answer for probe in PROBES}


def test_a_preference_for_what_is_named_first() -> None:
    turned = {probe.turned for probe in PROBES if probe.turned}

    def score(prompt: str, answer: str) -> float:
        place = len(prompt) if prompt in turned else worth(prompt, answer)
        return place + (20.0 if prompt in turned else 0.0)

    outcome = measure(Scores(score), "answer-order")
    assert outcome.figures["changes"]["the choices of the question the other way round"] > 0
    assert outcome.figures["changes"]["the sentences of the answer the other way round"] == 0


# ---------------------------------------------------------------------- what is not


def test_an_empty_answer_that_is_refused_is_well() -> None:
    def score(prompt: str, answer: str) -> float:
        if not answer.strip():
            raise DataError("an empty answer")
        return worth(prompt, answer)

    assert measure(Scores(score), "empty-answers").status == "sound"
    assert measure(Scores(score), "spacing").status == "measured"


@pytest.mark.parametrize("score", [0.0, float("nan")])
def test_scores_that_say_nothing_are_not_measured(score: float) -> None:
    for check in CHECKS:
        assert measure(Scores(lambda *_: score), check.name).status == "not asked"


def test_the_budget_is_kept() -> None:
    few = Scores(worth)
    few.max_requests = 40
    assert measure(few, "spacing").status == "not asked"
    assert few.requests == 0
    some = Scores(worth)
    some.max_tokens, some.max_requests = 30_000, 300
    outcomes = [measure(some, check.name) for check in CHECKS]
    assert {outcome.status for outcome in outcomes} == {"measured"}
    assert some.requests <= 300


def test_a_model_here_is_measured_within_its_share() -> None:
    loaded = tutor_reward()
    subject = LocalSubject(loaded.model, loaded.tokenizer, max_tokens=30_000)
    outcomes = run_checks(subject, CHECKS)
    assert {outcome.status for _, outcome in outcomes} == {"measured"}
    assert subject.tokens <= SHARE * 30_000
    assert all(outcome.figures["texts"] >= 8 for _, outcome in outcomes)
