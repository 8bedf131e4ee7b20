"""Find four bugs in the simulation of a queue whose clients have a patience."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect, show

Numbers = list[float]
Case = tuple[Numbers, list[int], Numbers, float]

STAYS_BUSY = (
    "Work of clients that have left is done all the same: the device computes scores that nobody "
    "takes, and those who still wait are served later for it, or not at all."
)
FROM_START = (
    "Patience is counted from the moment when the device begins. The client's clock runs from the "
    "moment when it asked."
)
LATE_COUNTS = (
    "A score that is ready after the client has left counts as served. Its connection is closed: "
    "the reward is lost, though the device was busy with it."
)
AS_LISTED = (
    "Requests are served in the order of the list. The first to arrive comes first, wherever it "
    "stands in the list."
)


def _case(seed: int, count: int = 30) -> Case:
    """Requests that come faster than the device works, in any order."""
    rng = np.random.default_rng(seed)
    arrivals = [float(t) for t in rng.permutation(np.cumsum(rng.exponential(0.6, count)))]
    tokens = [int(n) for n in rng.integers(5, 40, count)]
    patience = [float(p) for p in rng.choice([1.0, 3.0, 8.0], count)]
    return arrivals, tokens, patience, 20.0


def _simulate(
    arrivals: Numbers,
    tokens: list[int],
    patience: Numbers,
    rate: float,
    *,
    order: str = "arrival",
    busy: bool = False,
    clock: str = "arrival",
    late: bool = False,
    interrupts: bool = False,
    strict: bool = False,
    idle: bool = True,
    restart: bool = False,
    refuses: bool = False,
) -> list[bool]:
    """The right simulation, with switches for what can go wrong."""
    served = [False] * len(arrivals)
    keys: dict[str, Any] = {
        "arrival": lambda i: arrivals[i],
        "listed": lambda i: 0,
        "shortest": lambda i: (tokens[i], arrivals[i]),
        "patience": lambda i: arrivals[i] + patience[i],
        "last": lambda i: -arrivals[i],
    }
    free = 0.0
    for i in sorted(range(len(arrivals)), key=keys[order]):
        start = max(free, arrivals[i]) if idle else free
        end = start + tokens[i] / rate
        deadline = (start if clock == "start" else arrivals[i]) + patience[i]
        gone = start > deadline or (refuses and start > arrivals[i])
        in_time = end < deadline if strict else end <= deadline
        if gone and not busy:
            continue
        served[i] = not gone and (in_time or late)
        if interrupts and not in_time:
            free = max(start, deadline)
        elif restart and not in_time:
            free = start
        else:
            free = end
    return served


def _ask(attempt: Attempt, case: Case) -> list[bool]:
    got = attempt(*case)
    if not isinstance(got, list) or not all(isinstance(one, (bool, np.bool_)) for one in got):
        raise Unusable(f"the result: expected a list of True and False, got {a_kind(got)}")
    return [bool(one) for one in got]


def _is(attempt: Attempt, case: Case, want: list[bool], setting: str) -> None:
    got = _ask(attempt, case)
    expect(got == want, f"{setting}: {show(got)}; it should be {show(want)}")


def _one(attempt: Attempt) -> None:
    _is(attempt, ([2.0, 9.0], [10, 10], [5.0, 5.0], 10.0), [True, True],
        "two requests of 1 second of work each, far apart, patience 5 s")  # fmt: skip
    _is(attempt, ([2.0, 9.0], [10, 10], [0.5, 5.0], 10.0), [False, True],
        "1 second of work each; the first client waits for half a second only")  # fmt: skip


def _wait(attempt: Attempt) -> None:
    _is(attempt, ([0.0, 0.0, 0.0, 0.0], [10] * 4, [3.0] * 4, 10.0), [True, True, True, False],
        "four requests at once, 1 second of work each, patience 3 s")  # fmt: skip


def _edge(attempt: Attempt) -> None:
    _is(attempt, ([0.0, 0.0], [16, 16], [1.0, 2.0], 16.0), [True, True],
        "1 second of work each, patience 1 s and 2 s: both are ready just in time")  # fmt: skip


def _arrival(attempt: Attempt) -> None:
    _is(attempt, ([4.0, 0.0, 2.0], [20, 20, 20], [2.5, 2.5, 2.5], 10.0), [True, True, True],
        "2 seconds of work each, arriving at 4, 0 and 2 s, patience 2.5 s")  # fmt: skip


def _fifo(attempt: Attempt) -> None:
    _is(attempt, ([0.0, 0.1, 0.2], [20, 30, 10], [2.0, 9.0, 3.0], 10.0), [True, True, False],
        "work of 2, 3 and 1 s, arriving one after the other, patience 2, 9 and 3 s")  # fmt: skip
    _is(attempt, ([0.0, 0.1, 0.2], [20, 20, 20], [3.0, 4.5, 3.0], 10.0), [True, True, False],
        "work of 2 s each, arriving one after the other, patience 3, 4.5 and 3 s")  # fmt: skip


def _gone(attempt: Attempt) -> None:
    _is(attempt, ([0.0, 0.1, 0.2], [30, 50, 10], [4.0, 1.0, 5.0], 10.0), [True, False, True],
        "work of 3, 5 and 1 s, patience 4, 1 and 5 s: the second client has left before it is "
        "its turn")  # fmt: skip


def _in_work(attempt: Attempt) -> None:
    _is(attempt, ([0.0, 0.1], [30, 10], [1.0, 3.0], 10.0), [False, False],
        "work of 3 and 1 s, patience 1 and 3 s: the first client leaves while the device works "
        "for it")  # fmt: skip


def _many(attempt: Attempt) -> None:
    for seed in range(6):
        case = _case(seed)
        got, want = _ask(attempt, case), _simulate(*case)
        wrong = [i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b]
        expect(got == want, f"30 requests (NumPy seed {seed}): {sum(got)} served, "
               f"{sum(want)} should be; the first that differs is request {wrong[:1]}")  # fmt: skip


def broken(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    served, free = [], 0.0
    for arrival, count, wait in zip(arrivals, tokens, patience, strict=True):
        start = max(free, arrival)
        free = start + count / rate
        served.append(start <= start + wait)
    return served


def stays_busy(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, busy=True)


def from_start(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, clock="start")


def late_counts(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, late=True)


def as_listed(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, order="listed")


def in_order_of_arrival(
    arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float
) -> Any:
    served = _simulate(arrivals, tokens, patience, rate)
    return [served[i] for i in sorted(range(len(arrivals)), key=lambda i: arrivals[i])]


def interrupts(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, interrupts=True)


def foresees(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, restart=True)


def refuses(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, refuses=True)


def shortest(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, order="shortest")


def most_urgent(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, order="patience")


def just_too_late(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, strict=True)


def never_idle(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return _simulate(arrivals, tokens, patience, rate, idle=False)


def everybody(arrivals: Numbers, tokens: list[int], patience: Numbers, rate: float) -> Any:
    return [True] * len(arrivals)


def _probes() -> list[tuple[Any, ...]]:
    return [
        *(_case(seed) for seed in range(20, 26)),
        ([0.0, 0.0], [16, 16], [1.0, 2.0], 16.0),
        ([0.0, 0.1], [30, 10], [1.0, 3.0], 10.0),
    ]


EXERCISE = Exercise(
    id="ch06.who_is_served",
    parameters=("arrivals", "tokens", "patience", "rate"),
    broken=broken,
    properties=(
        Property(
            "without company only the own work counts",
            "A request that meets an idle device begins when it arrives, and is served if its own "
            "work is done within its patience.",
            _one,
        ),
        Property(
            "who waits is served, as long as the patience lasts",
            "A request that finds the device busy waits. It is served if its score is ready "
            "within the patience, counted from its arrival.",
            _wait,
        ),
        Property(
            "ready at the last moment is in time",
            "A score that is ready exactly when the patience ends is in time.",
            _edge,
        ),
        Property(
            "the answers are in the order of the list, the work in that of arrival",
            "Serve by arrival, and answer in the order in which the requests were given.",
            _arrival,
        ),
        Property(
            "first come, first served",
            "The next to be served is the one that has waited longest.",
            _fifo,
        ),
        Property(
            "work of clients that have left is dropped",
            "A client that has left before its turn costs the device nothing.",
            _gone,
        ),
        Property(
            "work that was begun is finished",
            "A forward pass cannot be stopped: the device stays busy until its end, also when the "
            "client leaves meanwhile, and that client gets no reward.",
            _in_work,
        ),
        Property(
            "a busy hour ends as the rules say",
            "With many requests the rules give other rewards.",
            _many,
        ),
    ),
    mutants=(
        Mutant(
            "Nothing is mended yet: as it stands nobody ever loses patience, since each is "
            "measured from the moment when its own turn comes.",
            broken,
            also=(everybody,),
        ),
        Mutant(STAYS_BUSY, stays_busy),
        Mutant(FROM_START, from_start),
        Mutant(LATE_COUNTS, late_counts),
        Mutant(AS_LISTED, as_listed),
        Mutant(
            "The answers come in the order of arrival. Each client has another one's.",
            in_order_of_arrival,
        ),
        Mutant(
            "A forward pass ends when its client leaves. It cannot be stopped on a device: it runs "
            "to its end, and the next one waits.",
            interrupts,
        ),
        Mutant(
            "Work that will be late is never begun. How long a client will wait is known to the "
            "client alone, until it has left.",
            foresees,
        ),
        Mutant(
            "Whoever finds the device busy is refused at once. That is what loses the rewards: "
            "let them wait.",
            refuses,
            "slime #1582",
        ),
        Mutant(
            "The shortest work goes first. It serves more clients, and those with long texts lose "
            "their rewards every time: a bias against length.",
            shortest,
        ),
        Mutant(
            "Whoever leaves next goes first. The server does not know the patience of a client; "
            "the rule asked for is: first come, first served.",
            most_urgent,
        ),
        Mutant(
            "A score that is ready exactly when the patience ends counts as late.",
            just_too_late,
        ),
        Mutant(
            "The device works before a request has arrived: after an idle time it begins at the "
            "arrival, not at the end of the last work.",
            never_idle,
        ),
    ),
    probes=_probes,
    hints=(
        "Draw a line of time for three requests: arrival, start, end, and when the client leaves. "
        "Which of the four does the script compare?",
        "Go through the requests by arrival. A client has left at arrival + patience: before its "
        "start the work is dropped, after it the device is busy and the reward is lost all the "
        "same.",
        "`for i in sorted(range(len(arrivals)), key=arrivals.__getitem__)`; `start = max(free, "
        "arrivals[i])`; if `start > deadline` go on without touching `free`; else `free = start + "
        "tokens[i] / rate` and `served[i] = free <= deadline`.",
    ),
    right="Twice the patience loses fewer rewards than twice the refusals ever could. The server "
    "cannot wait longer than its client: so its table of patience has a line a protocol.",
)
