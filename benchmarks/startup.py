"""How long a command takes to say its first word: ``python -m benchmarks.startup``."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks.measuring import table
from benchmarks.results import add_arguments, save

COMMANDS = {
    "python, nothing": ["-c", "pass"],
    "import companion": ["-c", "import companion"],
    "companion --help": ["-m", "companion", "--help"],
    "companion score --help": ["-m", "companion", "score", "--help"],
    "import torch": ["-c", "import torch"],
    "import trl's RewardTrainer": ["-c", "from trl import RewardTrainer"],
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 7)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, command in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if turn:  # the first fills the disk's cache
                seconds[name].append(time.perf_counter() - begin)
    rows = [
        {
            "command": name,
            "seconds": statistics.median(found),
            "least": min(found),
            "most": max(found),
        }
        for name, found in seconds.items()
    ]
    print(table(rows))
    print(f"written: {save('startup', {'commands': rows, 'seconds': seconds}, args)}")


if __name__ == "__main__":
    main()
