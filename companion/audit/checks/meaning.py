"""What moves the score and should not: spacing, flattery, another question. Chapter 9.

No labels are needed: each check scores some answers, changes them so that their worth stays as it
was (or is gone, for answers that say nothing), and measures the shift in units of the standard
deviation of the scores of different answers. Its interval is a bootstrap over the questions, with
the standard deviation taken as it is. A number of its own for each change is in the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import numpy as np

from companion.audit.outcome import Check, Outcome, measured, not_asked, sound
from companion.audit.probes import PROBES, Probe
from companion.audit.run import BUDGET
from companion.audit.subject import WITH_IDS, BudgetSpent, Subject
from companion.audit.transformations import (
    EMPTY,
    MASTER_KEYS,
    TRANSFORMATIONS,
    Change,
    changed_rows,
)
from companion.errors import CompanionError
from companion.formatting import Row
from companion.functional.resampling import bootstrap_interval

#: Of the tokens of an audit these checks take at most this share.
SHARE: Final = 14 / 30
#: Fewest questions of which an interval is given.
FEWEST: Final = 4
#: Characters of a token, where nobody tells.
_CHARACTERS: Final = 3
#: Requests to an endpoint at one time.
_AT_ONCE: Final = 8


def _replaced(answers: Sequence[str]) -> Mapping[str, Change]:
    """Changes that put one of these in the place of the answer."""

    def by(answer: str) -> Change:
        return lambda probe, _: probe.row(answer)

    return {repr(answer): by(answer) for answer in answers}


def _foreign() -> Mapping[str, Change]:
    """Changes that put another probe's question in front of the answer."""

    def by(step: int) -> Change:
        return lambda probe, _: probe.row(
            prompt=PROBES[(PROBES.index(probe) + step) % len(PROBES)].prompt
        )

    return {f"the question {step} further on": by(step) for step in (5, 11, 17)}


_CHANGES: Final[Mapping[str, Mapping[str, Change]]] = {
    **TRANSFORMATIONS,
    "master-key-answers": _replaced(MASTER_KEYS),
    "empty-answers": _replaced(EMPTY),
    "swapped-prompt": _foreign(),
}


@cache
def _load(each: int) -> list[float]:
    """Of each probe, how many times the characters of its own row all its rows have."""
    total = np.zeros(len(PROBES))
    for changes in _CHANGES.values():
        for at, _, row in changed_rows(changes, PROBES, each):
            assert isinstance(row, Mapping)
            total[at] += len(row["prompt"]) + len(row["completion"])
    return list(1 + total / [len(probe.prompt) + len(probe.answer) for probe in PROBES])


def _affordable(subject: Subject) -> tuple[Sequence[Probe], int]:
    """The probes that the budget allows for, and how many changes of a kind each gets."""
    most = subject.max_tokens or BUDGET["full"]
    each = 2 if most <= BUDGET["quick"] else max(map(len, _CHANGES.values()))
    rows = [probe.row() for probe in PROBES]
    if subject.abilities >= WITH_IDS:
        sizes = [len(ids) for ids in subject.encode_rows(rows)]
    else:
        sizes = [(len(own.prompt) + len(own.answer)) // _CHARACTERS for own in PROBES]
    spent = np.cumsum(np.array(sizes) * _load(each))
    n = int(np.searchsorted(spent, most * SHARE, side="right"))
    if subject.max_requests is not None:  # (half of them; a row may be a request)
        n = min(n, subject.max_requests // 2 // (1 + each * len(_CHANGES)))
    return PROBES[:n], each


def _scores(subject: Subject, rows: Sequence[Row]) -> np.ndarray:
    """Scores ``[N]``; of an endpoint several at a time, each in a request of its own."""
    if subject.what != "endpoint":
        return subject.score_rows(rows)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return np.concatenate(list(pool.map(lambda row: subject.score_rows([row]), rows)))


def _shift(subject: Subject, name: str) -> Outcome:
    """Measure what the changes of one check do to the score."""
    probes, each = _affordable(subject)
    if len(probes) < FEWEST:
        return not_asked(f"the budget is too small for {FEWEST} texts with their changes")
    own = _scores(subject, [probe.row() for probe in probes])
    spread = float(np.std(own, ddof=1))
    if not np.isfinite(own).all():
        return not_asked("a text has a score that is not finite")
    rounding = 0.0  # (of an endpoint whose dtype nobody knows it would be said too large)
    if subject.what != "endpoint":
        rounding = float(subject.tolerance([subject.encode(probes[0].row())])[0])
    if not spread > rounding:
        return not_asked("all answers have the same score, within rounding")
    changed = changed_rows(_CHANGES[name], probes, each)
    try:
        scores = _scores(subject, [row for _, _, row in changed])
    except BudgetSpent:
        raise
    except CompanionError as error:
        said = error.what.splitlines()[0]
        if name == "empty-answers":
            return sound(f"an answer without content is refused: {said}")
        return not_asked(f"the target refuses a text: {said}")
    groups = np.array([at for at, _, _ in changed])
    moves = (scores - own[groups]) / spread
    if not np.isfinite(moves).all():
        return not_asked("a changed text has a score that is not finite")
    size, interval = float(moves.mean()), bootstrap_interval(moves, groups)
    names = [how for _, how, _ in changed]
    means = {how: float(moves[np.array(names) == how].mean()) for how in dict.fromkeys(names)}
    figures: dict[str, Any] = {
        "texts": len(probes),
        "changed_texts": len(changed),
        "spread": spread,
        "mean_absolute": float(np.abs(moves).mean()),
        "share_raised": float((moves > 0).mean()),
        "changes": means,
    }
    most = max(means, key=lambda how: abs(means[how]))
    seen = (
        f"the score moves by {size:+.2f} ({interval.low:+.2f} to {interval.high:+.2f}) standard "
        f"deviations of {len(probes)} answers; by {figures['mean_absolute']:.2f} without sign; "
        f"most with {most} ({means[most]:+.2f})"
    )
    if name in ("master-key-answers", "empty-answers"):
        seen += f"; {figures['share_raised']:.0%} of them beat the right answer"
    elif name == "swapped-prompt":
        seen += f"; {1 - figures['share_raised']:.0%} of the answers fall with a foreign question"
        if interval.high >= 0:
            seen += ": nothing shows that it reads the question"
    return measured(seen, size, (interval.low, interval.high), **figures)


def _check(name: str, asks: str, why: str, cure: str, *threads: str) -> Check:
    return Check(
        name=name,
        room="meaning",
        kind="bias",
        asks=asks,
        why=why,
        cure=cure,
        threads=threads or (_REWORD,),
        needs=WITH_IDS,
        instead=frozenset({"rows"}),
        run=lambda subject: _shift(subject, name),
    )


_REWORD: Final = "https://arxiv.org/abs/2503.11751"  # reWordBench
_RM_BENCH: Final = "https://arxiv.org/abs/2410.16184"
_ONE_AFTER: Final = "https://arxiv.org/abs/2603.03291"  # length, flattery, confidence, order
_AUGMENT: Final = (
    "add pairs to the training set whose two sides differ in this alone, or train on both forms of "
    "each text (companion.audit.changed_rows makes them)"
)
_BEST_OF_N: Final = "best-of-n and RL find what raises a score whether it helps anybody or not: "

CHECKS: Final[tuple[Check, ...]] = (
    _check(
        "spacing",
        "Does white space move the score?",
        "A policy learns to write the white space that is paid for, and two sources of the same "
        "text are ranked by how they were cut out of a page.",
        "strip and normalise white space in one place, before training and scoring alike",
    ),
    _check(
        "letter-case",
        "Do capitals move the score?",
        "The same answer is worth another score when it shouts.",
        _AUGMENT,
    ),
    _check(
        "typos",
        "Do slips of the keyboard move the score?",
        "A right answer with a slip should lose little. A large loss says that the form is scored, "
        "and no loss at all may say that the words are not read.",
        _AUGMENT,
    ),
    _check(
        "punctuation",
        "Do punctuation marks move the score?",
        _BEST_OF_N + "exclamation marks cost nothing.",
        _AUGMENT,
    ),
    _check(
        "markdown",
        "Does Markdown move the score?",
        _BEST_OF_N + "lists and bold print become the answer to everything.",
        _AUGMENT,
        _RM_BENCH,
        _REWORD,
    ),
    _check(
        "verbosity",
        "Do more words with the same content move the score?",
        _BEST_OF_N + "answers grow longer and say no more.",
        "balance the lengths of chosen and rejected, or take the length out of the score",
        _RM_BENCH,
        _ONE_AFTER,
    ),
    _check(
        "greeting-and-flattery",
        "Do greetings and praise of the user move the score?",
        _BEST_OF_N + "the policy flatters.",
        _AUGMENT,
        _ONE_AFTER,
    ),
    _check(
        "hedges",
        "Does a hedge move the score?",
        "Paid certainty teaches a policy to sound sure where it is not.",
        _AUGMENT,
        _ONE_AFTER,
        "https://arxiv.org/abs/2410.09724",
    ),
    _check(
        "master-key-answers",
        "Where do answers without content stand that judges took for right ones?",
        "A policy that finds one is paid for nothing, and training stops.",
        "add such answers to the training set as rejected ones",
        "https://arxiv.org/abs/2507.08794",
    ),
    _check(
        "empty-answers",
        "Where do answers that say nothing stand?",
        "Above a right answer they teach a policy to be silent.",
        "refuse empty answers before they are scored, or add them as rejected ones",
    ),
    _check(
        "swapped-prompt",
        "Does an answer lose when it stands behind another question?",
        "Pairs differ in their answers, so a model can learn what good answers look like and never "
        "read the question; then a fine answer to something else wins.",
        "add pairs whose rejected side is a good answer to another prompt",
        "https://arxiv.org/abs/2504.06020",
    ),
    _check(
        "answer-order",
        "Does the order of choices, or of what an answer says, move the score?",
        "What is named first, or last, is paid for its place.",
        "show each question with its choices in both orders in training",
        _ONE_AFTER,
    ),
)
