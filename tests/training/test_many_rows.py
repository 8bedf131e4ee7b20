"""Ten times the rows take little more memory: they lie on the disk, and reports keep bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.rows import BOUND, COMMANDS, peak, write_pairs

#: GiB that rows may take which are not yet on the disk
AT_ONCE = 0.08


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("command", COMMANDS)
def test_memory_hardly_grows_with_the_rows(
    command: str, tiny_base: Path, tiny_reward: Path, tmp_path: Path
) -> None:
    peaks, sizes = [], (20_000, 200_000)
    for n in sizes:
        folder = tmp_path / str(n)
        folder.mkdir()
        write_pairs(folder / "rows.jsonl", n)
        model = tiny_base if command == "train" else tiny_reward
        peaks.append(peak(command, model, folder / "rows.jsonl", folder))
    print(f"{command}: {peaks[0]:.3f} and {peaks[1]:.3f} GiB of {sizes} rows")
    assert peaks[1] - peaks[0] < BOUND * (sizes[1] - sizes[0]) / 2_000_000 + AT_ONCE
