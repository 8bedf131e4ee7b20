"""Find four bugs in the rule that ends a run before the reward model is over-optimised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, show

Curve = Sequence[float]

PROXY = (
    "The run is judged by the reward that it is trained on. That one rises to the end: it is what "
    "is being optimised. What falls, and what must be watched, is the gold score on held-out "
    "prompts."
)
NOISE = (
    "Any dip ends the run. The gold score is a mean over few prompts, and two such means differ by "
    "chance: only a fall of more than two standard errors of the *difference* says something."
)
LAST = (
    "The last evaluation is kept. By the time that a fall is noticed the policy has fallen: keep "
    "the best evaluation up to there."
)
BUDGET = (
    "The KL budget is not looked at. Beyond it the reward model was never tried, and the gold "
    "score of a few held-out prompts may be late to say so."
)
HUGE = 1e9


def _curves(seed: int, size: int = 20) -> dict[str, Any]:
    """A run in which the proxy rises and the gold score rises, then falls, with noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(size) / size
    error = 0.03 + 0.07 * rng.random(size)
    gold = 2.0 * t - 2.6 * t**2 + error * rng.normal(size=size)
    proxy = 2.0 * np.sqrt(t) + 0.05 * rng.normal(size=size)
    kl = np.cumsum(0.5 + rng.random(size))
    return {
        "proxy": proxy.tolist(),
        "gold": gold.tolist(),
        "error": error.tolist(),
        "kl": (kl - kl[0]).tolist(),
    }


def _rule(
    proxy: Curve,
    gold: Curve,
    error: Curve,
    kl: Curve,
    budget: float,
    *,
    noise: str = "both",
    keep: str = "best",
    spent: bool = True,
    against: str = "best",
    over: bool = False,
) -> tuple[int, int]:
    """The right rule, with switches for what can go wrong."""
    best, peak = 0, max(range(len(gold)), key=lambda t: gold[t])
    for step in range(len(gold)):
        if spent and kl[step] > budget:
            if over and gold[step] > gold[best]:
                best = step
            return step, step if keep == "last" else best
        rival = {"best": best, "peak": peak, "start": 0, "previous": max(step - 1, 0)}[against]
        band = {
            "both": 2 * math.hypot(error[step], error[rival]),
            "one": 2 * error[step],
            "none": 0.0,
        }[noise]
        if gold[step] < gold[rival] - band:
            return step, step if keep == "last" else best
        if gold[step] > gold[best]:
            best = step
    return len(gold) - 1, len(gold) - 1 if keep == "last" else best


def _run(attempt: Attempt, budget: float = HUGE, **curves: Any) -> tuple[int, int]:
    size = len(curves["gold"])
    filled = {
        "proxy": curves.get("proxy", [0.1 * i for i in range(size)]),
        "gold": curves["gold"],
        "error": curves.get("error", [0.05] * size),
        "kl": curves.get("kl", [float(i) for i in range(size)]),
    }
    got = attempt(filled["proxy"], filled["gold"], filled["error"], filled["kl"], budget)
    expect(
        isinstance(got, (tuple, list)) and len(got) == 2,
        f"the result is {show(got)}; it should be two numbers: stop and keep",
    )
    try:
        stop, keep = (int(value) for value in got)
    except (TypeError, ValueError, RuntimeError):
        expect(False, f"the result is {show(got)}; it should be two whole numbers")
    return stop, keep


def _pair(attempt: Attempt) -> None:
    stop, keep = _run(attempt, gold=[0.0, 0.5, 1.0, 1.5])
    expect(0 <= keep <= 3 and 0 <= stop <= 3, f"stop {stop} and keep {keep} of four evaluations")


def _gold(attempt: Attempt) -> None:
    gold = [0.0, 0.4, 0.8, 1.2, 1.6]
    stop, _ = _run(attempt, gold=gold, proxy=[0.0, 1.0, 0.2, 0.9, 0.1])
    expect(stop == 4, f"gold {gold}, and a proxy that goes up and down: it stops at {stop}, not 4")


def _falls(attempt: Attempt) -> None:
    gold = [0.0, 0.5, 1.0, 0.9, 0.4, 0.1, -0.3]
    stop, _ = _run(attempt, gold=gold)
    expect(
        stop == 4,
        f"gold {gold}, each with a standard error of 0.05, and a proxy that rises: it stops at "
        f"{stop}; the first fall beyond the noise is at 4",
    )
    slow = [1.0 - 0.1 * i for i in range(8)]
    stop, _ = _run(attempt, gold=slow)
    expect(stop == 2, f"gold {[round(x, 1) for x in slow]}, a slow fall: it stops at {stop}, not 2")


def _noise(attempt: Attempt) -> None:
    gold = [0.0, 0.5, 0.45, 0.9, 0.85, 1.2]
    stop, _ = _run(attempt, gold=gold)
    expect(stop == 5, f"gold {gold}, each with a standard error of 0.05: it stops at {stop}, not 5")
    gold, error = [0.0, 0.5, 0.2, 0.6], [0.05, 0.2, 0.05, 0.05]
    stop, _ = _run(attempt, gold=gold, error=error)
    expect(
        stop == 3,
        f"gold {gold} with the standard errors {error}: it stops at {stop}. The best one is "
        "uncertain as well: the standard error of the difference is √(0.2² + 0.05²)",
    )


def _budget(attempt: Attempt) -> None:
    gold, kl = [0.0, 0.4, 0.8, 1.2, 1.6], [0.0, 2.0, 4.0, 6.0, 8.0]
    stop, _ = _run(attempt, 5.0, gold=gold, kl=kl)
    expect(stop == 3, f"gold {gold}, KL {kl}, a budget of 5: it stops at {stop}, not 3")
    stop, _ = _run(attempt, 8.0, gold=gold, kl=kl)
    expect(stop == 4, f"gold {gold}, KL {kl}, a budget of 8: it stops at {stop}, not 4")


def _keep(attempt: Attempt) -> None:
    gold = [0.0, 0.5, 1.0, 0.95, 0.4, 0.1]
    stop, keep = _run(attempt, gold=gold)
    expect(keep == 2, f"gold {gold}: it stops at {stop} and keeps {keep}; the best is 2")


def _within(attempt: Attempt) -> None:
    gold, kl = [0.0, 0.4, 0.8, 1.2, 1.6], [0.0, 2.0, 4.0, 6.0, 8.0]
    _, keep = _run(attempt, 5.0, gold=gold, kl=kl)
    expect(keep == 2, f"gold {gold}, KL {kl}, a budget of 5: it keeps {keep}; 2 is within")


def _future(attempt: Attempt) -> None:
    gold = [0.0, 0.5, 1.0, 0.6, 0.1]
    short = _run(attempt, gold=gold)
    for later in ([5.0, 6.0], [-5.0, 3.0]):
        got = _run(attempt, gold=[*gold, *later])
        expect(
            got == short,
            f"gold {gold} gives stop and keep {short}; with {later} behind it, {got}. What comes "
            "after the stop has not been seen",
        )


def _random(attempt: Attempt) -> None:
    for seed in range(12):
        curves = _curves(seed)
        budget = 12.0 if seed % 3 == 0 else HUGE
        got, want = _run(attempt, budget, **curves), _rule(**curves, budget=budget)
        gold = [round(value, 2) for value in curves["gold"][: want[0] + 1]]
        expect(
            got == want,
            f"a run with noise (seed {seed}), gold {gold} up to the stop: stop and keep are {got}; "
            f"they should be {want}",
        )


def broken(
    proxy: list[float], gold: list[float], error: list[float], kl: list[float], budget: float
) -> tuple[int, int]:
    best = 0
    for step in range(len(proxy)):
        if proxy[step] < proxy[best]:
            return step, step
        best = step
    return len(proxy) - 1, len(proxy) - 1


def watches_proxy(
    proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float
) -> tuple[int, int]:
    return _rule(proxy, proxy, error, kl, budget)


def any_dip(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, noise="none")


def keeps_last(
    proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float
) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, keep="last")


def no_budget(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, spent=False)


def peeks(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> tuple[int, int]:
    peak = max(range(len(gold)), key=lambda t: gold[t])
    for step in range(len(gold)):
        fell = gold[step] < gold[peak] - 2 * math.hypot(error[step], error[peak])
        if kl[step] > budget or (step > peak and fell):
            best = max(range(step + 1), key=lambda t: (kl[t] <= budget, gold[t]))
            return step, best
    return len(gold) - 1, peak


def one_error(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, noise="one")


def previous(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, against="previous")


def all_lost(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, against="start")


def over_budget(
    proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float
) -> tuple[int, int]:
    return _rule(proxy, gold, error, kl, budget, over=True)


def only_stop(proxy: Curve, gold: Curve, error: Curve, kl: Curve, budget: float) -> int:
    return _rule(proxy, gold, error, kl, budget)[0]


def _probes() -> list[tuple[Any, ...]]:
    runs = [tuple(_curves(seed).values()) for seed in range(6)]
    steady, kl = [0.0, 0.4, 0.8, 1.2, 1.6], [0.0, 2.0, 4.0, 6.0, 8.0]
    later = [0.0, 0.5, 1.0, 0.6, 0.1, 5.0, 6.0]
    return [
        (later, later, [0.05] * 7, [0.0] * 7, HUGE),
        *((*run, 12.0 if i % 3 == 0 else HUGE) for i, run in enumerate(runs)),
        (steady, steady, [0.05] * 5, kl, 5.0),
    ]


EXERCISE = Exercise(
    id="ch05.when_to_stop",
    parameters=("proxy", "gold", "error", "kl", "budget"),
    broken=broken,
    properties=(
        Property(
            "two numbers: where it stops and what it keeps",
            "Return the evaluation at which the run stops and the one whose policy is kept.",
            _pair,
        ),
        Property("a proxy that wobbles stops nothing", PROXY, _gold),
        Property(
            "a gold score that falls stops the run, whatever the proxy does",
            "The gold score has fallen below the best so far by more than two standard errors of "
            "the difference: the run should stop there.",
            _falls,
        ),
        Property("a dip within the noise stops nothing", NOISE, _noise),
        Property("a KL budget that is spent stops the run", BUDGET, _budget),
        Property("the best evaluation is kept", LAST, _keep),
        Property(
            "what is kept lies within the budget",
            "The evaluation that broke the budget is kept. It is not within it.",
            _within,
        ),
        Property(
            "what comes after the stop changes nothing",
            "The rule uses evaluations that a run could not have seen when it had to decide.",
            _future,
        ),
        Property(
            "noisy runs end where the rule says",
            "On noisy curves the rule gives another stop, or keeps another evaluation.",
            _random,
        ),
    ),
    mutants=(
        Mutant("All four bugs are still there. The first: " + PROXY, broken),
        Mutant(PROXY, watches_proxy),
        Mutant(NOISE, any_dip),
        Mutant(LAST, keeps_last, "transformers #40221"),
        Mutant(BUDGET, no_budget),
        Mutant(
            "The best evaluation of the *whole* run is the measure. When the decision is due, only "
            "what has happened is known.",
            peeks,
        ),
        Mutant(
            "The noise of the present evaluation is allowed for, that of the best one is not. The "
            "best of many noisy means is partly luck: both errors count, √(a² + b²).",
            one_error,
        ),
        Mutant(
            "Each evaluation is compared with the one before. A slow fall never falls far in one "
            "step: compare with the best so far.",
            previous,
        ),
        Mutant(
            "The run is compared with its beginning, so it stops when all that was gained is lost "
            "again. Compare with the best so far.",
            all_lost,
        ),
        Mutant(
            "The evaluation at which the budget broke may be kept. Its gold score is high, and its "
            "divergence is what you had ruled out.",
            over_budget,
        ),
        Mutant(
            "Only the stop is returned. Stopping is half of it: which policy do you keep?",
            only_stop,
        ),
    ),
    probes=_probes,
    hints=(
        "Go through the arguments: which of the five does the script use, and which should it?",
        "Keep the index of the best *gold* score so far. Before it may move on, ask the two "
        "questions: is the budget spent, is this one below the best beyond the noise?",
        "In this order: `if kl[step] > budget: return step, best`; `if gold[step] < gold[best] - 2 "
        "* math.hypot(error[step], error[best]): return step, best`; then move `best`.",
    ),
    right="The proxy is an argument that the rule does not need: it is there to be drawn beside "
    "the gold score, and to show how long it goes on rising.",
)
