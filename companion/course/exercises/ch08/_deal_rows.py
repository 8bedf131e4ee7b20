"""Write how the rows of an epoch are dealt out to ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect, show

PADDING = -1
Dealt = list[list[list[int]]]
CASES = ((9, 4, 2), (13, 2, 3), (16, 4, 2), (1, 4, 3), (15, 4, 3), (23, 3, 4), (5, 4, 1))


def _deal(
    n_rows: int,
    batch: int,
    ranks: int,
    *,
    fill: str = "padding",
    even: bool = True,
    drop: bool = False,
    extra: bool = False,
) -> Dealt:
    step = batch * ranks
    dealt: Dealt = [[] for _ in range(ranks)]
    for begin in range(0, n_rows + (step if extra and n_rows % step == 0 else 0), step):
        rows = list(range(begin, min(begin + step, n_rows)))
        if drop and len(rows) < step:
            break
        places = iter(rows)
        again = itertools.cycle(range(n_rows))
        for rank in range(ranks):
            share = len(rows) // ranks + (rank < len(rows) % ranks) if even else batch
            own = list(itertools.islice(places, share))
            if fill == "nothing":
                if own:
                    dealt[rank].append(own)
                continue
            while len(own) < batch:
                own.append(PADDING if fill == "padding" else next(again))
            dealt[rank].append(own)
    return dealt


def _ask(attempt: Attempt, n_rows: int, batch: int, ranks: int) -> Dealt:
    got = attempt(n_rows, batch, ranks)
    try:
        return [[[int(row) for row in own] for own in rank] for rank in got]
    except (TypeError, ValueError):
        raise Unusable(
            f"the result: expected, of each rank, a list of micro-batches, got {a_kind(got)}"
        ) from None


def _words(n_rows: int, batch: int, ranks: int) -> str:
    return f"{n_rows} rows, micro-batches of {batch}, {ranks} rank{'s' * (ranks > 1)}"


def _once(attempt: Attempt) -> None:
    for case in CASES:
        dealt = _ask(attempt, *case)
        rows = sorted(r for rank in dealt for own in rank for r in own if r != PADDING)
        expect(rows == list(range(case[0])), f"{_words(*case)}: the rows are {show(rows)}")


def _in_step(attempt: Attempt) -> None:
    for case in CASES:
        dealt = _ask(attempt, *case)
        sizes = [[len(own) for own in rank] for rank in dealt]
        n_steps = -(-case[0] // (case[1] * case[2]))
        expect(len(dealt) == case[2], f"{_words(*case)}: {len(dealt)} ranks")
        expect(sizes == [[case[1]] * n_steps] * case[2],
               f"{_words(*case)}: micro-batches of {show(sizes)}; it should be {n_steps} of "
               f"{case[1]} on each rank")  # fmt: skip


def _steps(attempt: Attempt) -> None:
    for case in CASES:
        n_rows, batch, ranks = case
        for number, step in enumerate(zip(*_ask(attempt, *case), strict=False)):
            rows = sorted(r for own in step for r in own if r != PADDING)
            begin = number * batch * ranks
            want = list(range(begin, min(begin + batch * ranks, n_rows)))
            expect(rows == want, f"{_words(*case)}: step {number} has {show(rows)}; "
                   f"it should have {show(want)}")  # fmt: skip


def _spread(attempt: Attempt) -> None:
    for case in CASES:
        last = [rank[-1] if rank else [] for rank in _ask(attempt, *case)]
        real = [sum(r != PADDING for r in own) for own in last]
        expect(
            max(real) - min(real) <= 1,
            f"{_words(*case)}: in the last step the ranks have {real} rows of their own",
        )


def repeated(n_rows: int, batch: int, ranks: int) -> Any:
    return _deal(n_rows, batch, ranks, fill="again", even=False)


def dropped(n_rows: int, batch: int, ranks: int) -> Any:
    return _deal(n_rows, batch, ranks, drop=True)


def uneven(n_rows: int, batch: int, ranks: int) -> Any:
    return _deal(n_rows, batch, ranks, fill="nothing", even=False)


def short(n_rows: int, batch: int, ranks: int) -> Any:
    return _deal(n_rows, batch, ranks, fill="nothing")


def at_the_end(n_rows: int, batch: int, ranks: int) -> Any:
    return _deal(n_rows, batch, ranks, even=False)


def blocks(n_rows: int, batch: int, ranks: int) -> Any:
    """Each rank a stretch of the epoch."""
    steps = -(-n_rows // (batch * ranks))
    dealt: Dealt = []
    for own in np.array_split(np.arange(n_rows), ranks):
        rows = [*own.tolist(), *[PADDING] * (steps * batch - len(own))]
        dealt.append([rows[i : i + batch] for i in range(0, steps * batch, batch)])
    return dealt


def one_more(n_rows: int, batch: int, ranks: int) -> Any:
    return _deal(n_rows, batch, ranks, extra=True)


def _probes() -> list[tuple[Any, ...]]:
    return [(11, 3, 2), (12, 3, 2), (7, 2, 3), (9, 2, 3)]


EXERCISE = Exercise(
    id="ch08.deal_rows",
    parameters=("n_rows", "batch", "ranks"),
    properties=(
        Property(
            "each row once",
            "Every row of the epoch is in exactly one micro-batch; all other places are −1.",
            _once,
        ),
        Property(
            "the ranks stay in step",
            "Every rank has the same number of micro-batches, each of `batch` places, and no more "
            "than are needed.",
            _in_step,
        ),
        Property(
            "a step holds the rows that come next",
            "Step k holds the rows from k · batch · ranks on, whatever their number, so that the "
            "run takes the same steps on one rank.",
            _steps,
        ),
        Property(
            "the last rows are spread",
            "In the last step the ranks' real rows differ by at most one.",
            _spread,
        ),
    ),
    mutants=(
        Mutant(
            "The last micro-batches are filled with rows from the beginning. They count twice, "
            "and which rows these are depends on the number of ranks.",
            repeated,
            "accelerate #2316",
        ),
        Mutant(
            "The rows that do not fill a step are left out. In each epoch they are others, and "
            "nobody is told.",
            dropped,
        ),
        Mutant(
            "Ranks have unlike numbers of micro-batches. The rank that is done first leaves the "
            "others waiting in an all-reduce, until they are killed.",
            uneven,
            "pytorch #42577",
        ),
        Mutant(
            "Micro-batches are as short as their rows, and a rank without rows has none. Where "
            "rows are fewer than ranks, somebody waits for ever.",
            short,
        ),
        Mutant(
            "All padding is at the end, on the last ranks. The gradient is right, but the first "
            "ranks do the work and the others wait.",
            at_the_end,
        ),
        Mutant(
            "Each rank has a stretch of the epoch to itself. A step on two ranks then holds other "
            "rows than the same step on one, and a run cannot be moved to other hardware.",
            blocks,
        ),
        Mutant(
            "There is a step with nothing but padding: the optimiser moves by its momentum, "
            "without a gradient.",
            one_more,
        ),
    ),
    probes=_probes,
    hints=(
        "Go through the epoch step by step. What is different about the last one?",
        "The last `rest` rows: rank r gets `rest // ranks`, and one more if r < rest % ranks.",
        "Take `rows[begin:begin + step]`, cut it by `np.array_split(rows, ranks)`, and fill each "
        "part up with −1 to `batch`.",
    ),
    right="A place of −1 is a real row for the model, with the weight 0: the forward and all "
    "exchanges take place, and it adds nothing. The companion's sampler does this.",
)
