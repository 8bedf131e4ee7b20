"""Do the monitor's alarms cry wolf, and how late do they come? A study by simulation.

``python -m benchmarks.monitoring``. Each run is a monitor from its reference on: pairs are drawn,
the temperature is fitted to them, the accuracy estimated, limits made of both; then labels come,
week by week, for two years. It is compared with what one writes first: an alarm in the week whose
ECE is more than 0.02 above the reference's.

- Nulls: nothing changes. At most 17 of 1,000 runs may have any alarm at alpha = 0.01 (more than
  that has a chance of 0.015 if each has one of 0.01); else the program ends with 1.
- Delays: labels from the change to the alarm. A miss within the two years is longer than all
  delays; a run that had a false alarm before the change has none, and is counted.
- Independent pairs are of 64 different margins and are counted, which is much faster; the naive
  alarm gets labels of its own there. Dependent ones are drawn, and both see the same.
- The planner: how many labels a week it promises to be enough, over how many a simulation needs
  that draws every pair in place of counting few margins, with other seeds, populations and sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from benchmarks.measuring import PeakMemory, table
from benchmarks.results import add_arguments, save
from companion.monitoring import Change, Plan, Population, draw_plan, promise, simulate

Array = npt.NDArray[Any]

ALPHA: Final = 0.01
#: of 1,000 runs; the binomial's 98.5% quantile at alpha
MOST_ALARMS: Final = 17
A_WEEK, WEEKS = 200, 104
#: what the naive alarm allows above the reference's ECE, and its bins
RISE, NAIVE_BINS = 0.02, 10
#: runs at a time: bounds the memory
CHUNK: Final = 50
#: (pairs of the reference, pairs of a prompt)
NULLS: Final = ((500, 1), (2000, 1), (500, 5), (2000, 5))
CHANGES: Final = (("temperature", 1.5), ("temperature", 2.0), ("accuracy", 0.05))
REFERENCES, BEGINNINGS = (500, 2000, 5000), (0, 25, 50)
SLICES: Final = 4


def population(pairs: int = 1, *, slices: int = SLICES, seed: int = 0) -> Population:
    """Normal margins of the difference of two scores, true temperature 1.67, accuracy 0.76."""
    margins = 3 * np.abs(np.random.default_rng(seed).standard_normal(20_000))
    return Population(margins, 0.6, pairs, slices)


def weekly_ece(confidence: Array, right: Array, n_bins: int = NAIVE_BINS) -> Array:
    """The expected calibration error, equal widths, of many sets at once; ``[runs, n]``."""
    runs, n = confidence.shape
    index = np.clip((confidence * n_bins).astype(np.int64), 0, n_bins - 1)
    index += n_bins * np.arange(runs)[:, None]
    gap = np.bincount(index.ravel(), (confidence - right).ravel(), minlength=runs * n_bins)
    return np.asarray(np.abs(gap.reshape(runs, n_bins)).sum(axis=1) / n)


@dataclass
class Chunk:
    """Monitors with the draws that made them."""

    plans: list[Plan]
    reference_ece: Array
    seed: int


def monitors(pop: Population, reference: int, runs: int, seed: int) -> Iterator[Chunk]:
    """Plans from references that are drawn, a part at a time."""
    for begin in range(0, runs, CHUNK):
        plans, errors = [], []
        for run in range(begin, min(begin + CHUNK, runs)):
            # the same draw twice: for the plan, and for what the naive alarm knows of it
            rng, again = (np.random.default_rng([seed, run]) for _ in range(2))
            plan = draw_plan(pop, reference // pop.pairs, rng, alpha=ALPHA)
            margins, right = pop.draw(again, (reference // pop.pairs,))
            plans.append(plan)
            errors.append(_ece([plan], margins.reshape(1, -1), right.reshape(1, -1)))
        yield Chunk(plans, np.concatenate(errors), seed * 1_000_003 + begin)


def _ece(plans: Sequence[Plan], margins: Array, right: Array) -> Array:
    temperature = np.array([p.calibration.temperature for p in plans if p.calibration])[:, None]
    return weekly_ece(1 / (1 + np.exp(-margins / temperature)), right)


def naive_alarms(
    pop: Population, chunk: Chunk, *, a_week: int, weeks: int, change: Change | None
) -> Array:
    """Whether the naive alarm rings, ``[runs, weeks]``.

    On the labels that :func:`simulate` draws with this seed, if it draws every pair.
    """
    (rng,) = np.random.default_rng(chunk.seed).spawn(1)
    runs = len(chunk.plans)
    over = np.empty((runs, weeks), dtype=bool)
    for week in range(weeks):
        now = change if change is not None and week >= change.week else None
        margins, right = pop.draw(rng, (runs, max(a_week // pop.pairs, 1)), now)
        error = _ece(chunk.plans, margins.reshape(runs, -1), right.reshape(runs, -1))
        over[:, week] = error > chunk.reference_ece + RISE
    return over


def first(over: Array) -> Array:
    """The week, counted from 1; 0 for none."""
    return np.where(over.any(axis=1), over.argmax(axis=1) + 1, 0)


def earliest(alarms: dict[str, Array]) -> Array:
    """Of all tests."""
    all_of = np.stack(list(alarms.values()))
    found = np.where(all_of == 0, np.iinfo(np.int64).max, all_of).min(axis=0)
    return np.where((all_of == 0).all(axis=0), 0, found)


def watch(
    pop: Population, chunk: Chunk, change: Change | None, *, a_week: int, weeks: int
) -> dict[str, Array]:
    """The week of the alarm, ``[runs]``, of each test, of ``any`` of them, and of the ``naive``."""
    alarms = simulate(
        pop,
        reference=0,
        a_week=a_week,
        weeks=weeks,
        runs=len(chunk.plans),
        seed=chunk.seed,
        change=change,
        plans=chunk.plans,
    )
    alarms["any"] = earliest(alarms)
    over = naive_alarms(pop, chunk, a_week=a_week, weeks=weeks, change=change)
    alarms["naive"] = first(over)
    return alarms


# ---------------------------------------------------------------------- the parts


def false_alarms(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs with an alarm where nothing changes."""
    rows = []
    runs = 60 if args.quick else 1000
    for number, (reference, pairs) in enumerate(NULLS):
        pop, began = population(pairs), time.process_time()
        pop = pop.coarse() if pairs == 1 else pop
        counts: dict[str, int] = {}
        chunks = list(monitors(pop, reference, runs, 1 + number))
        for chunk in chunks:
            for name, weeks in watch(pop, chunk, None, a_week=A_WEEK, weeks=args.weeks).items():
                counts[name] = counts.get(name, 0) + int((weeks > 0).sum())
        right = float(pop.right(pop.margins).mean())
        all_plans = [plan for chunk in chunks for plan in chunk.plans]
        rows.append(
            {
                "reference": reference,
                "pairs_a_prompt": pairs,
                "slices_bet_on": len(all_plans[0].slices),
                "runs": runs,
                **{name: counts.get(name, 0) for name in ("accuracy", "calibration", "slices")},
                "any": counts["any"],
                "naive": counts["naive"],
                "limits_wrong": sum(p.accuracy.limit > right for p in all_plans if p.accuracy),
                "temperature_sd": float(
                    np.std([p.calibration.temperature for p in all_plans if p.calibration])
                ),
                "seconds": round(time.process_time() - began, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def quantiles(weeks: Array, change: Change, a_week: int) -> dict[str, Any]:
    """Median and 90% quantile of the delay in labels; None where it is longer than the run."""
    early = (weeks > 0) & (weeks <= change.week)
    left = weeks[~early]
    delay = np.where(left == 0, np.inf, (left - change.week) * float(a_week))
    found: dict[str, Any] = {"early": int(early.sum()), "missed": int((left == 0).sum())}
    for name, share in (("median", 0.5), ("q90", 0.9)):
        value = np.quantile(delay, share, method="inverted_cdf") if delay.size else np.inf
        found[name] = int(value) if np.isfinite(value) else None
    return found


def delays(args: argparse.Namespace) -> list[dict[str, Any]]:
    """How many labels after the change the alarm comes."""
    rows: list[dict[str, Any]] = []
    runs = 40 if args.quick else 200
    pop = population().coarse()
    references = REFERENCES[1:2] if args.quick else REFERENCES
    for number, reference in enumerate(references):
        chunks = list(monitors(pop, reference, runs, 11 + number))
        for kind, size in CHANGES:
            for week in BEGINNINGS[:2] if args.quick else BEGINNINGS:
                if week >= args.weeks:
                    continue
                change = Change(kind, size, week)
                all_weeks: dict[str, list[Array]] = {}
                for chunk in chunks:
                    found = watch(pop, chunk, change, a_week=A_WEEK, weeks=args.weeks)
                    for name, alarms in found.items():
                        all_weeks.setdefault(name, []).append(alarms)
                rows.append({"reference": reference, **asdict(change), "runs": runs})
                for name in (kind.replace("temperature", "calibration"), "any", "naive"):
                    weeks = np.concatenate(all_weeks[name])
                    key = "own" if name in ("accuracy", "calibration") else name
                    rows[-1][key] = quantiles(weeks, change, A_WEEK)
                print(_flat(rows[-1]), flush=True)
    return rows


#: (change, size, weeks within, prompts of the reference, seed of the margins, true 1/T)
PROMISES: Final = (
    ("temperature", 2.0, 4, 1000, 101, 0.4),
    ("temperature", 1.5, 8, 3000, 102, 0.6),
    ("temperature", 1.6, 13, 2500, 103, 0.9),
    ("accuracy", 0.05, 8, 4000, 104, 0.6),
    ("accuracy", 0.1, 6, 1200, 105, 0.4),
    ("accuracy", 0.08, 13, 1500, 106, 0.9),
)


def promises(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the planner promises over what a simulation that draws finds."""
    rows = []
    runs = 200 if args.quick else 1500
    for kind, size, within, reference, seed, inverse in PROMISES[3:4] if args.quick else PROMISES:
        began = time.process_time()
        pop = Population(population(slices=0, seed=seed).margins, inverse)
        change = Change(kind, size)
        asked: dict[str, Any] = {"reference": reference, "within": within, "alpha": ALPHA}
        usual = promise(pop, change, **asked)["labels_a_week"]  # of as many runs as a user has
        said = promise(pop, change, runs=runs, **asked)
        labels = said["labels_a_week"]
        chunks = list(_drawn(pop, reference, runs, seed))
        # (few runs show a slope over a wide range only)
        factors = (0.4, 1.0, 2.5) if args.quick else (0.85, 1.0, 1.18)
        grid = [round(labels * factor) for factor in factors]
        test = kind.replace("temperature", "calibration")
        shares = []
        for a_week in grid:
            caught = sum(
                int((_alarms(pop, chunk, change, a_week, within, test) > 0).sum())
                for chunk in chunks
            )
            shares.append(caught / runs)
        needed, noise = needed_labels(grid, shares, runs, said["power"])
        rows.append(
            {
                "change": kind,
                "size": size,
                "within": within,
                "reference": reference,
                "promised": labels,
                "promised_by_default": usual,
                "promised_caught": said["caught"],
                "grid": grid,
                "caught": shares,
                "found": round(needed, 1),
                "ratio": round(labels / needed, 3),
                "ratio_by_default": round(usual / needed, 3),
                "noise": round(noise * np.sqrt(2), 3),
                "seconds": round(time.process_time() - began, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def _drawn(pop: Population, reference: int, runs: int, seed: int) -> Iterator[Chunk]:
    for begin in range(0, runs, CHUNK):
        rng = np.random.default_rng([seed, begin])
        count = min(CHUNK, runs - begin)
        plans = [draw_plan(pop, reference, rng, alpha=ALPHA) for _ in range(count)]
        yield Chunk(plans, np.empty(0), seed * 1_000_003 + begin)


def _alarms(
    pop: Population, chunk: Chunk, change: Change, a_week: int, weeks: int, test: str
) -> Array:
    found = simulate(
        pop,
        reference=0,
        a_week=a_week,
        weeks=weeks,
        runs=len(chunk.plans),
        seed=chunk.seed + a_week,
        change=change,
        plans=chunk.plans,
        tests=(test,),
    )
    return found[test]


def needed_labels(
    grid: Sequence[int], shares: Sequence[float], runs: int, power: float
) -> tuple[float, float]:
    """Labels at which this power is reached, and the relative standard error of that.

    The probit of the share is taken as linear in the log of the labels, over a range of less than a
    factor of two, where it is. The references are shared by the grid, so that its points are not
    independent: the error is as if there were one.
    """
    share = np.clip(shares, 0.5 / runs, 1 - 0.5 / runs)
    slope, level = np.polyfit(np.log(grid), stats.norm.ppf(share), 1)
    wanted = stats.norm.ppf(power)
    error = np.sqrt(power * (1 - power) / runs) / stats.norm.pdf(wanted)
    return float(np.exp((wanted - level) / slope)), float(error / slope)


# ---------------------------------------------------------------------- the whole


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
    for name, own in row.items():
        if isinstance(own, dict):
            flat[name] = f"{own['median']}/{own['q90']}"
            flat[f"{name} -"] = f"{own['early']}, {own['missed']}"
    return flat


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    args.weeks = 52 if args.quick else WEEKS
    torch.set_num_threads(1)
    memory, began = PeakMemory(torch.device("cpu")), time.perf_counter()
    nulls, late, planned = false_alarms(args), delays(args), promises(args)
    print(table(nulls))
    print("labels to the alarm, median/90%; early alarms, misses")
    print(table([_flat(row) for row in late]))
    shown = (
        "change",
        "size",
        "within",
        "reference",
        "promised",
        "found",
        "ratio",
        "ratio_by_default",
        "noise",
    )
    print(table([{key: row[key] for key in shown} for row in planned]))
    figures = {
        "alpha": ALPHA,
        "labels_a_week": A_WEEK,
        "weeks": args.weeks,
        "naive_rise": RISE,
        "most_alarms_of_1000": MOST_ALARMS,
        "false_alarms": nulls,
        "delays": late,
        "promises": planned,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": memory.rise_mib(),
    }
    print(f"written: {save('monitoring', figures, args)}")
    wolf = [row for row in nulls if row["any"] > MOST_ALARMS * row["runs"] / 1000]
    if wolf:
        sys.exit(f"more than {MOST_ALARMS} of 1,000 runs have a false alarm: {wolf}")
    off = [row for row in planned if abs(row["ratio"] - 1) > 0.15 * (4 if args.quick else 1)]
    if off:
        sys.exit(f"the planner promises what a simulation does not find: {off}")


if __name__ == "__main__":
    main()
