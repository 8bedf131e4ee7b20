"""Clocks: interleaved rounds, ratios with their spread, the matrix peak, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Outcome:
    """What one run of a method reports: tokens that went through the model, and a check value."""

    computed: int
    check: float = 0.0


@dataclass
class Timed:
    """All rounds of one method."""

    seconds: list[float] = field(default_factory=list)
    outcome: Outcome = field(default_factory=lambda: Outcome(0))
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return statistics.median(self.seconds)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    methods: Mapping[str, Callable[[], Callable[[], Outcome]]],
    rounds: int,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> dict[str, Timed]:
    """Run all methods in turn, `rounds` times, after one round that is not counted.

    A method is a function that prepares (not timed) and returns what is timed. Every second round
    goes backwards, so that no method always follows the same one.
    """
    timed = {name: Timed() for name in methods}
    for turn in range(rounds + 1):
        names = list(methods)[:: 1 if turn % 2 else -1]
        for name in names:
            run = methods[name]()
            memory = PeakMemory(device) if turn == 0 else None
            wait(device)
            begin = time.perf_counter()
            outcome = run()
            wait(device)
            seconds = time.perf_counter() - begin
            if memory is not None:
                timed[name].peak_mib = memory.rise_mib()
                timed[name].outcome = outcome
            else:
                timed[name].seconds.append(seconds)
        say(f"round {turn} of {rounds} done" if turn else "warm-up done")
    return timed


def ratio(base: Timed, other: Timed) -> dict[str, float]:
    """How many times faster `other` is than `base`: median, least and most over the rounds."""
    each = [a / b for a, b in zip(base.seconds, other.seconds, strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


class PeakMemory:
    """Rise of the memory's peak since it was made; on a CPU by the kernel's high-water mark."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: float | None = torch.cuda.memory_allocated(device) / 2**20
            return
        gc.collect()
        _give_memory_back()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
            self.before = self._status("VmHWM")
        except OSError:
            self.before = None

    @staticmethod
    def _status(name: str) -> float:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in text.splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    def rise_mib(self) -> float | None:
        """MiB; None where the system does not tell."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        return self._status("VmHWM") - self.before


def _give_memory_back() -> None:
    """Let glibc return what is free, else a method would live on what the one before it freed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def matmul_peak(dtype: torch.dtype, device: torch.device, *, quick: bool = False) -> float:
    """FLOP/s of the fastest square matrix product, the best of several sizes and runs."""
    sizes: tuple[int, ...] = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    best = 0.0
    if quick:
        sizes = (256,) if device.type == "cpu" else sizes[:1]
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        a @ b
        for _ in range(3 if quick else 8):
            wait(device)
            begin = time.perf_counter()
            a @ b
            wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def load_average() -> float | None:
    """Of the last minute; a figure from a busy machine should say so."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of like keys as aligned text."""
    if not rows:
        return ""
    head = list(rows[0])
    cells = [head, *([_cell(row[name]) for name in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
