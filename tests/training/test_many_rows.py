"""Ten times the rows take little more memory: they lie on the disk, and reports keep bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from companion.tutor import make_rows

ROOT = Path(__file__).parents[2]
#: what two million rows may take more than few, and what those that are not yet on the disk take
BOUND, AT_ONCE = 1.5, 0.08


def peak(arguments: list[str], cache: Path) -> float:
    """GiB that the kernel has seen resident at most, pages of files included."""
    process = subprocess.Popen(
        [sys.executable, "-m", "companion", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, arguments
    return usage.ru_maxrss / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("command", ["train", "score"])
def test_memory_hardly_grows_with_the_rows(
    command: str, tiny_base: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    drawn = make_rows("pairs", 2_000, seed=1)
    peaks, sizes = [], (20_000, 200_000)
    for n in sizes:
        rows = tmp_path / f"{n}.jsonl"
        with rows.open("w") as file:
            for i in range(n):
                row = drawn[i % len(drawn)]
                [turn] = row["prompt"]
                prompt = [{**turn, "content": f"{turn['content']} {i}"}]  # none repeats
                given = {"id": str(i), "prompt": prompt, "chosen": row["chosen"]}
                file.write(json.dumps({**given, "rejected": row["rejected"]}) + "\n")
        if command == "train":
            arguments = ["train", "pairwise", "--model_name_or_path", str(tiny_base)]
            arguments += ["--dataset_name", str(rows), "--output_dir", str(tmp_path / "model")]
            arguments += ["--max_steps", "20", "--eval_fraction", "0.001", "--save_strategy", "no"]
        else:
            arguments = ["score", "--model", str(tiny_reward), "--input", str(rows)]
            arguments += ["--output", str(tmp_path / f"{n}.scores"), "--completion_field", "chosen"]
        peaks.append(peak(arguments, tmp_path / "cache"))
    print(f"{command}: {peaks[0]:.3f} and {peaks[1]:.3f} GiB of {sizes} rows")
    assert peaks[1] - peaks[0] < BOUND * (sizes[1] - sizes[0]) / 2_000_000 + AT_ONCE
