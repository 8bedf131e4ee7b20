"""Write the regression test that catches scorers whose score depends on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property, Unmet
from companion.course.exercises._tools import Attempt, expect, kind
from companion.course.exercises.ch02 import _toys as toys

Rows = list[list[int]]
SIDE = (
    "Only right padding is tried. A scorer that counts the padding as positions, or reads at "
    "length − 1, fails on the left side alone."
)


def _rows(seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    lengths = [5, 2, 9, 1, 6]
    return [torch.randint(1, 60, (n,), generator=generator).tolist() for n in lengths]


def _verdict(test: Attempt, scorer: toys.Scorer, seed: int) -> bool:
    got = test(scorer, _rows(seed), 0)
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    if type(got).__module__ == "numpy":
        got = got.item()
    kind(got, bool, "True or False")
    return bool(got)


def _passes_good(test: Attempt) -> None:
    for seed in range(3):
        expect(
            _verdict(test, toys.good, seed),
            "a right scorer, whose scores move by 4e-6 with the width of the batch, was refused",
        )


def _catches(*scorers: toys.Scorer) -> Callable[[Attempt], None]:
    def test(attempt: Attempt) -> None:
        for scorer in scorers:
            for seed in range(2):
                if _verdict(attempt, scorer, seed):
                    what = " ".join((scorer.__doc__ or "").split()).rstrip(".")
                    raise Unmet(f"a broken scorer passed ({what})")

    return test


def _pad(rows: Rows, pad_id: int, side: str, width: int = 0) -> tuple[Tensor, Tensor]:
    width = max(width, max(map(len, rows)))
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        left, right = (0, gap) if side == "right" else (gap, 0)
        ids.append([pad_id] * left + row + [pad_id] * right)
        mask.append([0] * left + [1] * len(row) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask)


def _alone(score: toys.Scorer, rows: Rows, pad_id: int) -> Tensor:
    return torch.cat([score(*_pad([row], pad_id, "right")) for row in rows])


def _agree(
    score: toys.Scorer, rows: Rows, pad_id: int, sides: tuple[str, ...], atol: float
) -> bool:
    alone = _alone(score, rows, pad_id)
    return all(
        torch.allclose(score(*_pad(rows, pad_id, side)), alone, rtol=0, atol=atol) for side in sides
    )


BOTH = ("right", "left")


def right_only(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return _agree(score, rows, pad_id, ("right",), 1e-4)


def left_only(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return _agree(score, rows, pad_id, ("left",), 1e-4)


def to_the_bit(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return _agree(score, rows, pad_id, BOTH, 0.0)


def generous(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return _agree(score, rows, pad_id, BOTH, 0.2)


def twice_the_same(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    ids, mask = _pad(rows, pad_id, "right")
    return torch.allclose(score(ids, mask), score(ids, mask))


def longest_only(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    alone = _alone(score, rows, pad_id)
    return all(
        torch.allclose(score(*_pad(rows, pad_id, side))[longest], alone[longest], rtol=0, atol=1e-4)
        for side in BOTH
    )


def first_only(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    alone = _alone(score, rows, pad_id)
    return all(
        torch.allclose(score(*_pad(rows, pad_id, side))[0], alone[0], rtol=0, atol=1e-4)
        for side in BOTH
    )


def one_at_a_time(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    alone = _alone(score, rows, pad_id)
    wide = max(map(len, rows)) + 3
    padded = [torch.cat([score(*_pad([row], pad_id, side, wide)) for row in rows]) for side in BOTH]
    return all(torch.allclose(p, alone, rtol=0, atol=1e-4) for p in padded)


def sides_compared(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    right, left = (score(*_pad(rows, pad_id, side)) for side in BOTH)
    return torch.allclose(right, left, rtol=0, atol=1e-4)


def upside_down(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return not _agree(score, rows, pad_id, BOTH, 1e-4)


def always_true(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return True


def always_false(score: toys.Scorer, rows: Rows, pad_id: int) -> bool:
    return False


_ALL: tuple[toys.Scorer, ...] = (
    toys.good,
    toys.last_column,
    toys.length_minus_one,
    toys.absolute_positions,
    toys.half_precision,
    toys.neighbours,
    toys.longest_right,
)


def _probes() -> list[tuple[Any, ...]]:
    return [(scorer, _rows(seed), 0) for scorer in _ALL for seed in range(2)]


def _look(test: Attempt, arguments: tuple[Any, ...]) -> Any:
    """The verdict, and whether the scorer was asked at all."""
    score, *rest = arguments
    asked = []

    def watched(ids: Tensor, mask: Tensor) -> Tensor:
        asked.append(1)
        return score(ids, mask)

    return test(watched, *rest), bool(asked)


EXERCISE = Exercise(
    id="ch02.is_padding_invariant",
    parameters=("score", "rows", "pad_id"),
    properties=(
        Property(
            "a right scorer passes, rounding and all",
            "A right scorer should pass. Sums of another width round differently: leave about "
            "1e-4 for that.",
            _passes_good,
        ),
        Property(
            "reading the padding is caught",
            "A scorer that reads padding should not pass.",
            _catches(toys.last_column, toys.longest_right),
        ),
        Property(
            "what fails on the left side alone is caught",
            "A scorer that is wrong with left padding alone should not pass.",
            _catches(toys.length_minus_one, toys.absolute_positions),
        ),
        Property(
            "half precision is caught",
            "A scorer whose scores move by a few hundredths with the width of the batch should "
            "not pass.",
            _catches(toys.half_precision),
        ),
        Property(
            "a score that depends on its neighbours is caught",
            "A scorer that looks at the other texts of the batch should not pass.",
            _catches(toys.neighbours),
        ),
    ),
    mutants=(
        Mutant(SIDE, right_only, "transformers #46782"),
        Mutant(
            "Only left padding is tried. There the last column is the right one, so the naive "
            "read-out passes.",
            left_only,
        ),
        Mutant(
            "Equality to the last bit is asked for. Matrix products of another width round "
            "differently (6e-6 in float32), so every real model would be refused.",
            to_the_bit,
        ),
        Mutant(
            "The tolerance is so wide that half precision slips through: it moves scores by a few "
            "hundredths, which is enough to turn close pairs round.",
            generous,
            "reward-bench #137",
        ),
        Mutant(
            "The same batch is scored twice. That shows that the scorer is deterministic; it says "
            "nothing of the padding.",
            twice_the_same,
        ),
        Mutant(
            "Only the longest text is compared, the one text of the batch that is not padded.",
            longest_only,
        ),
        Mutant(
            "Only the first text is compared. A scorer may be right for one row of the batch and "
            "wrong for the others.",
            first_only,
        ),
        Mutant(
            "Each text is padded by itself, so no text ever meets another one. A scorer that looks "
            "at its neighbours passes.",
            one_at_a_time,
        ),
        Mutant(
            "Left padding is compared with right padding, but neither with the text alone: a "
            "scorer that is wrong in the same way on both sides passes.",
            sides_compared,
        ),
        Mutant(
            "The scorer is never called: the answer is the same for all of them.",
            always_true,
            also=(always_false,),
        ),
        Mutant("The answer is upside down: True says that the scorer is invariant.", upside_down),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "The truth is the score of a text alone, without padding. What has to be equal to it?",
        "Two batches of all texts: one padded right, one padded left. Each must give the scores "
        "that the texts have alone, within 1e-4.",
        "Collect `alone = torch.cat([score(ids, ones) for each row])`; then `torch.allclose(score(*"
        "padded), alone, rtol=0, atol=1e-4)` for both sides, joined by `and`.",
    ),
    right="This is the test that batched serving rests on. Keep it in your suite, with texts of "
    "very different lengths in one batch.",
)
