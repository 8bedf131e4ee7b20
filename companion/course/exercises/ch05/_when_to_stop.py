"""Find four bugs in the rule that ends a run before the reward model is over-optimised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats
from scipy.stats import ttest_rel

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect, show

Array = np.ndarray[Any, np.dtype[np.float64]]

PROXY = (
    "The run is judged by the reward that it is trained on. That one rises to the end: it is what "
    "is being optimised. What falls, and what must be watched, is the gold score on held-out "
    "prompts."
)
UNCORRECTED = (
    "Each evaluation is tested at the full alpha, as if it were the only one. The best of many "
    "noisy looks is too high, and every later look is one more chance to fall below it: most runs "
    "are stopped in which nothing has changed. Divide alpha by the pairs of looks, K(K − 1)/2."
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
SEED, RUNS, LOOKS, PROMPTS = 2026, 60, 12, 24


def _noise(rng: np.random.Generator, prompts: int) -> Array:
    """Mean 0 and standard deviation 1, exactly."""
    values = rng.normal(size=prompts)
    values -= values.mean()
    made: Array = values / values.std(ddof=1)
    return made


def _fall(p: float, prompts: int = PROMPTS) -> float:
    """Mean change, in standard deviations of the changes, that has this p-value."""
    return float(stats.t.ppf(p, prompts - 1) / math.sqrt(prompts))


def _run(seed: int, steps: list[float | None], spread: float = 1.0) -> Array:
    """A run whose evaluation t is the best before it, changed so that its p-value is steps[t].

    None: it is clearly better than all before.
    """
    rng = np.random.default_rng(seed)
    base = spread * rng.normal(size=PROMPTS)  # some prompts are easier
    rows, best = [base], base
    for p in steps:
        if p is None:
            best = best + 0.5 + 0.3 * _noise(rng, PROMPTS)
            rows.append(best)
        else:
            rows.append(best + 0.3 * (_noise(rng, PROMPTS) + _fall(p)))
    return np.array(rows)


def _noisy(seed: int, fall: float, looks: int = LOOKS) -> Array:
    """Looks at the same prompts; the true score falls by `fall` a look."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=PROMPTS)
    rows = base - fall * np.arange(looks)[:, None] + rng.normal(size=(looks, PROMPTS))
    made: Array = rows
    return made


def _rising(looks: int) -> Array:
    rng = np.random.default_rng(3)
    rows: Array = np.arange(looks)[:, None] + 0.1 * rng.normal(size=(looks, PROMPTS))
    return rows


def _rule(
    proxy: Array,
    gold: Array,
    kl: list[float],
    budget: float,
    alpha: float,
    *,
    test: str = "paired",
    pairs: str = "pairs",
    keep: str = "best",
    spent: bool = True,
    against: str = "best",
    over: bool = False,
) -> tuple[int, int]:
    """The right rule, with switches for what can go wrong."""
    looks, means = len(gold), gold.mean(1)
    level = alpha / {"pairs": looks * (looks - 1) / 2, "looks": looks, "none": 1}[pairs]
    best, peak = 0, int(means.argmax())
    for step in range(looks):
        if spent and kl[step] > budget:
            if over and means[step] > means[best]:
                best = step
            return step, step if keep == "last" else best
        rival = {"best": best, "peak": peak, "start": 0, "previous": max(step - 1, 0)}[against]
        if step != rival and _fell(gold[step], gold[rival], test, level):
            return step, step if keep == "last" else best
        if means[step] > means[best]:
            best = step
    return looks - 1, looks - 1 if keep == "last" else best


def _fell(now: Array, then: Array, test: str, level: float) -> bool:
    change, size = now - then, len(now)
    if change.mean() >= 0:
        return False
    if test == "any":
        return True
    errors = [values.std(ddof=1) / math.sqrt(size) for values in (now, then)]
    if test == "two errors":
        return bool(change.mean() < -2 * math.hypot(*errors))
    if test == "unpaired":
        t, freedom = change.mean() / math.hypot(*errors), 2 * size - 2
    else:
        t, freedom = change.mean() / (change.std(ddof=1) / math.sqrt(size)), size - 1
    p = stats.norm.cdf(t) if test == "normal" else stats.t.cdf(t, freedom)
    return bool(p * (2 if test == "two-sided" else 1) < level)


def _ask(
    attempt: Attempt,
    gold: Array,
    kl: list[float] | None = None,
    budget: float = HUGE,
    alpha: float = 0.05,
    proxy: Array | None = None,
) -> tuple[int, int]:
    kl = [0.1 * i for i in range(len(gold))] if kl is None else kl
    proxy = _rising(len(gold)) if proxy is None else proxy
    got = attempt(proxy, gold, kl, budget, alpha)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Unusable(f"the result: expected two numbers, stop and keep, got {a_kind(got)}")
    try:
        stop, keep = (int(value) for value in got)
    except (TypeError, ValueError, RuntimeError):
        raise Unusable(f"the result: expected two whole numbers, got {show(got)}") from None
    return stop, keep


def _means(gold: Array) -> list[float]:
    return [round(float(mean), 2) for mean in gold.mean(1)]


def _pair(attempt: Attempt) -> None:
    stop, keep = _ask(attempt, _run(0, [None, None, None]))
    expect(0 <= keep <= 3 and 0 <= stop <= 3, f"stop {stop} and keep {keep} of four evaluations")


def _gold(attempt: Attempt) -> None:
    gold = _run(1, [None] * 4)
    rng = np.random.default_rng(1)
    proxy = 3.0 * np.array([0, 1, 0, 1, 0])[:, None] + 0.1 * rng.normal(size=(5, PROMPTS))
    stop, _ = _ask(attempt, gold, proxy=proxy)
    expect(
        stop == 4,
        f"mean gold scores {_means(gold)}, proxy {_means(proxy)}: it stops at {stop}, not at 4",
    )


def _falls(attempt: Attempt) -> None:
    gold = _run(2, [None, None, 0.2, 1e-5, 0.1])  # the level is 0.05 / 15
    stop, _ = _ask(attempt, gold)
    expect(
        stop == 4,
        f"mean gold scores {_means(gold)}, and a proxy that rises: it stops at {stop}; at 4 the "
        "paired test against the best look has a p-value of 1e-5",
    )
    slow = _noisy(5, 0.4, 8) / 3
    stop, _ = _ask(attempt, slow)
    want = _rule(slow, slow, [0.0] * 8, HUGE, 0.05)[0]
    expect(stop == want, f"mean gold scores {_means(slow)}: it stops at {stop}, not at {want}")


def _corrected(attempt: Attempt) -> None:
    looks = 6
    level = 0.05 / (looks * (looks - 1) / 2)
    for p, at in ((0.04, 5), (0.05 / looks * 0.9, 5), (1.2 * level, 5), (0.8 * level, 2)):
        gold = _run(4, [None, p, None, None, None], spread=3.0)
        stop, _ = _ask(attempt, gold)
        expect(
            stop == at,
            f"six evaluations, alpha 0.05; at the third the one-sided paired p-value against the "
            f"best is {p:.4f}: it stops at {stop}, not at {at}. There are 15 pairs of looks, so "
            f"the level is {level:.4f}",
        )


def _healthy(attempt: Attempt) -> None:
    stopped = 0
    for run in range(RUNS):
        gold = _noisy(SEED + run, 0.0)
        stopped += _ask(attempt, gold)[0] < LOOKS - 1
    expect(
        stopped <= 0.12 * RUNS,
        f"{RUNS} simulated runs of {LOOKS} looks whose true score never changes (NumPy seeds "
        f"{SEED} to {SEED + RUNS - 1}), alpha 0.05: it stops {stopped} of them before the last",
    )


def _caught(attempt: Attempt) -> None:
    caught = sum(_ask(attempt, _noisy(SEED + run, 0.4))[0] < LOOKS - 1 for run in range(20))
    expect(
        caught >= 18,
        f"20 simulated runs whose true score falls by 0.4 a look (NumPy seeds {SEED} to "
        f"{SEED + 19}): it stops {caught} of them before the last",
    )


def _budget(attempt: Attempt) -> None:
    gold, kl = _run(6, [None] * 4), [0.0, 2.0, 4.0, 6.0, 8.0]
    for budget, at in ((5.0, 3), (8.0, 4), (6.0, 4)):
        stop, _ = _ask(attempt, gold, kl, budget)
        expect(stop == at, f"a rising gold score, KL {kl}, a budget of {budget:g}: it stops at "
                           f"{stop}, not at {at}")  # fmt: skip


def _keep(attempt: Attempt) -> None:
    gold = _run(7, [None, None, 0.3, 1e-6])
    stop, keep = _ask(attempt, gold)
    expect(
        keep == 2,
        f"mean gold scores {_means(gold)}: it stops at {stop} and keeps {keep}; the best is 2",
    )


def _within(attempt: Attempt) -> None:
    gold, kl = _run(8, [None] * 4), [0.0, 2.0, 4.0, 6.0, 8.0]
    _, keep = _ask(attempt, gold, kl, 5.0)
    expect(keep == 2, f"a rising gold score, KL {kl}, a budget of 5: it keeps {keep}; 2 is within")


def _future(attempt: Attempt) -> None:
    gold = _run(9, [None, None, 1e-6, None, None])
    short = _ask(attempt, gold)
    for later in (9.0, -9.0):
        changed = gold.copy()
        changed[4:] += later
        got = _ask(attempt, changed)
        expect(
            got == short,
            f"mean gold scores {_means(gold)} give stop and keep {short}; with {later:+g} on the "
            f"last two, {got}. What comes after the stop has not been seen",
        )


def _random(attempt: Attempt) -> None:
    for seed in range(8):
        gold = _noisy(seed, 0.15) + 0.1 * min(seed, 3)
        budget, kl = (6.0 if seed % 3 == 0 else HUGE), [0.8 * i for i in range(LOOKS)]
        got = _ask(attempt, gold, kl, budget)
        want = _rule(gold, gold, kl, budget, 0.05)
        expect(
            got == want,
            f"a run with noise (NumPy seed {seed}), mean gold scores {_means(gold)}: stop and keep "
            f"are {got}; they should be {want}",
        )


def broken(
    proxy: Array, gold: Array, kl: list[float], budget: float, alpha: float
) -> tuple[int, int]:
    best = 0
    for step in range(1, len(gold)):
        fall = ttest_rel(proxy[step], proxy[best], alternative="less")
        if fall.pvalue < alpha:
            return step, step
        if proxy[step].mean() > proxy[best].mean():
            best = step
    return len(gold) - 1, len(gold) - 1


def watches_proxy(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, proxy, kl, budget, alpha)


def uncorrected(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, pairs="none")


def two_errors(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, test="two errors")


def by_looks(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, pairs="looks")


def unpaired(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, test="unpaired")


def two_sided(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, test="two-sided")


def normal_test(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, test="normal")


def any_dip(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, test="any")


def keeps_last(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, keep="last")


def no_budget(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, spent=False)


def peeks(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    stop, _ = _rule(proxy, gold, kl, budget, alpha)
    within = [step for step in range(len(gold)) if kl[step] <= budget]
    return stop, max(within, key=lambda step: gold[step].mean())


def previous(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, against="previous")


def all_lost(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, against="start")


def over_budget(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha, over=True)


def only_stop(proxy: Array, gold: Array, kl: Any, budget: float, alpha: float) -> Any:
    return _rule(proxy, gold, kl, budget, alpha)[0]


def _probes() -> list[tuple[Any, ...]]:
    kl = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    falls = _run(9, [None, None, 1e-6, None, None])
    return [
        (_rising(6), falls, kl, HUGE, 0.05),
        (_rising(6), _run(4, [None, 0.04, None, None, None], spread=3.0), kl, HUGE, 0.05),
        (_rising(6), _run(4, [None, 0.006, None, None, None], spread=3.0), kl, HUGE, 0.05),
        (_rising(6), _run(4, [None, 0.0028, None, None, None], spread=3.0), kl, HUGE, 0.05),
        (_rising(6), _run(10, [None] * 5), kl, 5.0, 0.05),
        *((_rising(LOOKS), _noisy(seed, 0.15), [0.0] * LOOKS, HUGE, 0.05) for seed in range(3)),
    ]


EXERCISE = Exercise(
    id="ch05.when_to_stop",
    parameters=("proxy", "gold", "kl", "budget", "alpha"),
    broken=broken,
    properties=(
        Property(
            "two numbers: where it stops and what it keeps",
            "Return the evaluation at which the run stops and the one whose policy is kept.",
            _pair,
        ),
        Property(
            "a proxy that wobbles stops nothing",
            "The gold score rises, so the run should go on, whatever the proxy does.",
            _gold,
        ),
        Property(
            "a gold score that falls stops the run, whatever the proxy does",
            "The gold score has fallen from its best so far, at the corrected level: the run "
            "should stop there.",
            _falls,
        ),
        Property(
            "a p-value is held against alpha over the pairs of looks",
            "It is a fall if the one-sided paired t test has a p-value below alpha / (K(K − 1)/2).",
            _corrected,
        ),
        Property(
            "healthy runs are seldom stopped",
            "Of runs whose true score never changes, at most a share of about alpha may be "
            "stopped.",
            _healthy,
        ),
        Property(
            "falling runs are stopped",
            "A true score that falls from look to look should stop the run before its end.",
            _caught,
        ),
        Property(
            "a KL budget that is spent stops the run",
            "The run should stop at the first evaluation whose KL lies above the budget.",
            _budget,
        ),
        Property(
            "the best evaluation is kept",
            "The evaluation with the best mean gold score before the stop should be kept.",
            _keep,
        ),
        Property(
            "what is kept lies within the budget",
            "The evaluation that is kept should lie within the budget.",
            _within,
        ),
        Property(
            "what comes after the stop changes nothing",
            "Stop and keep may depend on what a run has seen by then, and on nothing later.",
            _future,
        ),
        Property(
            "noisy runs end where the rule says",
            "On noisy runs the rule gives another stop, or keeps another evaluation.",
            _random,
        ),
    ),
    mutants=(
        Mutant("All four bugs are still there. The first: " + PROXY, broken),
        Mutant(PROXY, watches_proxy),
        Mutant(UNCORRECTED, uncorrected),
        Mutant(
            "Two standard errors of the difference are about a test at 2.5%, at *every* look, and "
            "without the pairing: the chapter's simulation shows how many healthy runs such a rule "
            "ends. Use the paired test, at alpha over the pairs of looks.",
            two_errors,
        ),
        Mutant(
            "alpha is divided by the number of looks. The best look is chosen as well, by luck "
            "too, so every *pair* of looks is a chance to be fooled: K(K − 1)/2 of them.",
            by_looks,
        ),
        Mutant(
            "The two looks are compared as if they were about different prompts. Some prompts are "
            "easier, and that spread hides the fall: test the differences prompt by prompt.",
            unpaired,
        ),
        Mutant(
            "The test is two-sided. A rise is no reason to stop, so all of the level belongs to "
            "the side of the fall: `alternative='less'`.",
            two_sided,
        ),
        Mutant(
            "The normal distribution is used in place of Student's t. With few prompts and a level "
            "this small its tails are too thin: it stops too easily.",
            normal_test,
        ),
        Mutant(
            "Any dip ends the run. The gold score is a mean over few prompts, and two such means "
            "differ by chance.",
            any_dip,
        ),
        Mutant(LAST, keeps_last, "transformers #40221"),
        Mutant(BUDGET, no_budget),
        Mutant(
            "What is kept is the best of the *whole* run. When the decision is due, only what has "
            "happened is known.",
            peeks,
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
        "Go through the arguments: which of the five does the script use, and which should it? And "
        "how often does it test at the level alpha?",
        "Keep the index of the best mean *gold* score so far. Before it may move on, ask the two "
        "questions: is the budget spent, and is the p-value of the paired test below alpha divided "
        "by the number of pairs of looks?",
        "`level = alpha / (K * (K - 1) / 2)` with `K = len(gold)`. In each step: `if kl[step] > "
        "budget: return step, best`; then the test of `gold[step]` against `gold[best]` at "
        "`level`; then move `best`.",
    ),
    right="The companion's `FallTest` is this rule, look by look. The proxy is an argument that it "
    "does not need: it is there to be drawn beside the gold score.",
)
