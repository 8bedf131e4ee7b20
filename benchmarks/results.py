"""What a benchmark leaves behind: JSON with figures, machine and versions."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import load_average

FOLDER = Path(__file__).with_name("results")
_PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all benchmarks have."""
    parser.add_argument("--quick", action="store_true", help="small work, to see that it runs")
    parser.add_argument("--rounds", type=int, help="counted rounds; default 5, quick 1")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/NAME.json")


def machine() -> dict[str, Any]:
    """Processor, memory, device."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    found: dict[str, Any] = {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "load_average": load_average(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def save(name: str, figures: dict[str, Any], args: argparse.Namespace) -> Path:
    """Write the file; returns its path."""
    target = args.output or FOLDER / f"{name}{'-quick' if args.quick else ''}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": args.quick,
        "machine": machine(),
        "versions": versions(),
        **figures,
    }
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Path(target)
