"""What a GRPO run leaves behind: the policy's figures at its start, its best and its end.

Chapter 5.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from companion.evaluation.tables import format_table
from companion.resampling import Interval, bootstrap_interval
from companion.rl.looks import Look

if TYPE_CHECKING:
    from companion.rl.monitor import OveroptimizationMonitor

RESULT_FILE = "grpo_result.json"


@dataclass
class GRPOResult:
    """What :func:`companion.rl.run.train_grpo` returns.

    Attributes
    ----------
    output_dir : Path
        Folder of the policy at its best.
    reason : str or None
        Why the monitor stopped the run; None if it took all its steps.
    steps, best_step : int
        Steps taken, and the step at which the held-out score was best on the monitored prompts.
    start, best, end : Look
        Figures on the test prompts, which nothing was chosen by, with one set of dice.
    monitor : OveroptimizationMonitor
        With its looks at the monitored prompts.
    log_history : list of dict
        All that was logged, as transformers keeps it.
    train_metrics : dict
        Run time and the like.
    counts : dict
        What the reward functions counted on rank 0.
    notes : list of str
        What was dropped or assumed.
    """

    output_dir: Path
    reason: str | None
    steps: int
    best_step: int
    start: Look
    best: Look
    end: Look
    monitor: OveroptimizationMonitor
    log_history: list[dict[str, Any]]
    train_metrics: dict[str, float]
    counts: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)

    def gain(self, name: str, of: str = "best") -> tuple[float, Interval]:
        """Mean change of a figure since the start, prompt by prompt, and its 95% interval.

        Parameters
        ----------
        name : str
            ``gold``, ``proxy``, or a further scorer's name.
        of : {"best", "end"}
        """
        change = getattr(self, of).figures[name] - self.start.figures[name]
        change = change[np.isfinite(change)]
        if not change.size:
            return math.nan, Interval(math.nan, math.nan)
        return float(change.mean()), bootstrap_interval(change)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON; None in place of NaN."""
        looks = {"start": self.start, "best": self.best, "end": self.end}
        figures = {
            where: {
                name: {"mean": _number(look.mean(name)), "interval": _pair(look.interval(name))}
                for name in look.figures
            }
            | {"length": look.length, "truncated": look.truncated, "without": look.without}
            for where, look in looks.items()
        }
        gains = {}
        for name in self.start.figures:
            if name != "kl":
                mean, interval = self.gain(name)
                gains[name] = {"mean": _number(mean), "interval": _pair(interval)}
        return {
            "reason": self.reason,
            "steps": self.steps,
            "best_step": self.best_step,
            "test_prompts": len(self.start.figures["kl"]),
            "figures": figures,
            "gains": gains,
            "train": {k: v for k, v in self.train_metrics.items() if isinstance(v, (int, float))},
            "counts": self.counts,
            "notes": self.notes,
        }

    def save(self) -> Path:
        """Write ``grpo_result.json``."""
        path = self.output_dir / RESULT_FILE
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path


def summary(result: GRPOResult) -> str:
    """The table that ends a run."""
    looks = (result.start, result.best, result.end)
    rows = [
        (name, *(_shown(look.mean(name), look.interval(name)) for look in looks))
        for name in result.start.figures
    ]
    rows.append(("tokens", *(f"{look.length:.1f}" for look in looks)))
    rows.append(("cut off", *(f"{look.truncated:.1%}" for look in looks)))
    head = ("held-out figure", "start", f"best, step {result.best_step}", f"end, {result.steps}")
    lines = [format_table(head, rows), ""]
    for name in result.start.figures:
        if name != "kl":
            mean, (low, high) = result.gain(name)
            lines.append(
                f"gain of {name}, best against start: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )
    lines.append(
        f"{len(result.start.figures['kl']):,} test prompts, 95% intervals; KL in nats a completion"
    )
    for where, look in zip(("start", "best", "end"), looks, strict=True):
        missing = [f"{n:,} without {name}" for name, n in look.without.items() if n]
        if missing:
            lines.append(f"{where}: completions {', '.join(missing)}")
    lines.append(
        f"stopped at step {result.steps}: {result.reason}"
        if result.reason
        else f"took all {result.steps:,} steps"
    )
    lines.append(f"saved in {result.output_dir}")
    return "\n".join(lines)


def _shown(mean: float, interval: Interval) -> str:
    return f"{mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _pair(interval: Interval) -> list[float | None]:
    return [_number(interval.low), _number(interval.high)]
