"""Find five bugs in how ranks agree on the step to save at."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect, show

Arrivals = list[float | None]
Saved = list[int | None]


def _agree(
    arrivals: Arrivals,
    n_steps: int,
    every: int,
    *,
    all_of_them: bool = False,
    last: bool = False,
    late: float = 0.0,
) -> Saved:
    came = [arrival for arrival in arrivals if arrival is not None]
    if came and (not all_of_them or len(came) == len(arrivals)):
        first = max(came) if all_of_them else min(came)
        for step in range(every, n_steps + last, every):
            if first <= step - late:
                return [step] * len(arrivals)
    return [None] * len(arrivals)


def _ask(attempt: Attempt, arrivals: Arrivals, n_steps: int, every: int) -> Saved:
    got = attempt(list(arrivals), n_steps, every)
    if not isinstance(got, (list, tuple)) or not all(
        one is None or (isinstance(one, (int, np.integer)) and not isinstance(one, bool))
        for one in got
    ):
        raise Unusable(f"the result: expected a list of steps and None, got {a_kind(got)}")
    return [None if one is None else int(one) for one in got]


def _is(attempt: Attempt, arrivals: Arrivals, n_steps: int, every: int) -> None:
    got, want = _ask(attempt, arrivals, n_steps, every), _agree(arrivals, n_steps, every)
    times = "every step" if every == 1 else f"every {every} steps"
    expect(got == want,
           f"signals after {show(arrivals)} steps, an exchange after {times}, {n_steps} in all: "
           f"{show(got)}; it should be {show(want)}")  # fmt: skip


def _one(attempt: Attempt) -> None:
    _is(attempt, [3.4], 10, 1)
    _is(attempt, [2.5], 12, 4)


def _moments(attempt: Attempt) -> None:
    _is(attempt, [2.9, 3.1], 10, 1)
    rng = np.random.default_rng(0)
    for _ in range(4):
        arrivals: Arrivals = [round(float(x), 2) for x in rng.uniform(2, 7, 4)]
        _is(attempt, arrivals, 10, 1)


def _only_one(attempt: Attempt) -> None:
    _is(attempt, [None, 3.4, None], 10, 1)
    _is(attempt, [3.4, None], 10, 1)


def _every(attempt: Attempt) -> None:
    _is(attempt, [3.4, 9.1], 20, 5)
    _is(attempt, [5.1, 9.9, None], 20, 5)


def _edge(attempt: Attempt) -> None:
    _is(attempt, [0.0, None], 6, 2)
    _is(attempt, [4.0, 4.5], 9, 4)


def _nobody(attempt: Attempt) -> None:
    _is(attempt, [None, None], 6, 1)


def _end(attempt: Attempt) -> None:
    _is(attempt, [9.3, 9.6], 10, 1)
    _is(attempt, [6.5, None], 8, 4)


def broken(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    saved: list[int | None] = [None] * len(arrivals)
    for step in range(every, n_steps + 1, every):
        for rank, arrival in enumerate(arrivals):
            if arrival and arrival < step - 1:
                saved[rank] = step
    return saved


def own_flag(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return [_agree([arrival], n_steps, every)[0] for arrival in arrivals]


def every_flag(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree(arrivals, n_steps, every, all_of_them=True)


def rank_zero(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree(arrivals[:1], n_steps, every) * len(arrivals)


def without_exchange(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree(arrivals, n_steps, 1)


def goes_on(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    first = _agree(arrivals, n_steps, every)
    final = list(itertools.islice(range(every, n_steps, every), n_steps))
    return [None if step is None else final[-1] for step in first]


def a_step_late(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree(arrivals, n_steps, every, late=1.0)


def falsy(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree([arrival or None for arrival in arrivals], n_steps, every)


def none_is_zero(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree([arrival or 0.0 for arrival in arrivals], n_steps, every)


def last_too(arrivals: Arrivals, n_steps: int, every: int) -> Any:
    return _agree(arrivals, n_steps, every, last=True)


def _probes() -> list[tuple[Any, ...]]:
    return [
        ([2.2, 4.7, None], 12, 1),
        ([None, 5.3, 3.6], 14, 3),
        ([0.0, 3.5], 9, 3),
        ([3.1, 3.3], 6, 3),
        ([2.5, 2.2], 9, 3),
        ([None], 4, 1),
    ]


EXERCISE = Exercise(
    id="ch08.agreed_step",
    parameters=("arrivals", "n_steps", "every"),
    properties=(
        Property(
            "one rank saves at the next exchange",
            "The first exchange after the signal, and then the run stops.",
            _one,
        ),
        Property(
            "signals at different moments, one step",
            "All ranks save at the same step, the first exchange after the first signal.",
            _moments,
        ),
        Property(
            "one signal is enough",
            "A signal that reaches one rank stops all.",
            _only_one,
        ),
        Property(
            "only at an exchange",
            "Between two exchanges nobody knows of the others.",
            _every,
        ),
        Property(
            "on the edge",
            "A signal before the first step counts, and so does one at the end of the step.",
            _edge,
        ),
        Property("no signal, no stop", "Without a signal nothing is saved.", _nobody),
        Property(
            "a run that has done its last step is done",
            "After the last step the run ends as always: None.",
            _end,
        ),
    ),
    mutants=(
        Mutant("The script is as it was: each rank still looks at its own flag.", broken),
        Mutant(
            "Each rank looks at its own flag. They stop at different steps: the first waits in a "
            "save for others that wait in an all-reduce of the gradient.",
            own_flag,
            "transformers #41723",
        ),
        Mutant(
            "The ranks wait until all have a signal. A machine that is taken away tells its own "
            "ranks, and nobody else's.",
            every_flag,
        ),
        Mutant(
            "Rank 0 decides, and its signal may never come.",
            rank_zero,
            "pytorch-lightning #20825",
        ),
        Mutant(
            "They save after the next step, though flags are exchanged less often: nobody could "
            "have known.",
            without_exchange,
        ),
        Mutant(
            "They go on after the save, and save again at each exchange. The time that was left "
            "is gone before the last save is whole.",
            goes_on,
        ),
        Mutant(
            "A signal that came within the last step before the exchange is missed.",
            a_step_late,
        ),
        Mutant(
            "0.0 is taken for no signal: `if arrival` asks for more than that it came.",
            falsy,
        ),
        Mutant(
            "No signal is taken for one at the start: `arrival or 0.0`.",
            none_is_zero,
        ),
        Mutant(
            "A run that has done its last step is saved as an interrupted one, and begins again "
            "with nothing left to do.",
            last_too,
        ),
    ),
    probes=_probes,
    hints=(
        "There are five bugs. Run it on [2.9, 3.1]: which steps do the two ranks save at?",
        "At an exchange the flags of all ranks are reduced by their maximum: is there one that "
        "has come? Then all ranks save, and the loop ends.",
        "`for step in range(every, n_steps, every)`: `if any(a is not None and a <= step for a in "
        "arrivals)`: `return [step] * len(arrivals)`.",
    ),
    right="The exchange is an all-reduce of one number, so it costs little; and it must be done "
    "on every rank at the same steps, or it is itself what hangs.",
    broken=broken,
)
