"""Whatever is given to a command: a score that an independent rendering has too, or a refusal."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzed_commands import Fuzzer, faults


def _found(seed: int, tries: int, folder: Path, base: Path, reward: Path) -> Iterator[str]:
    print(f"seed {seed}")
    fuzzer = Fuzzer(seed, folder, base, reward)
    for number in range(tries):
        call = fuzzer.draw()
        for fault in faults(call, fuzzer.oracle):
            yield f"--- seed {seed}, try {number}: {' '.join(call.argv)}\n{call.what}\n{fault}"


def test_forty_calls(tmp_path: Path, tiny_base: Path, tiny_reward: Path) -> None:
    seed = int(os.environ.get("FUZZ_SEED", 7))  # the same each time: the slow test draws another
    found = list(_found(seed, 40, tmp_path, tiny_base, tiny_reward))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_three_thousand_calls(tmp_path: Path, tiny_base: Path, tiny_reward: Path) -> None:
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(10**6)))
    found = list(_found(seed, 3_000, tmp_path, tiny_base, tiny_reward))
    assert not found, f"{len(found)} faults\n" + "\n".join(found[:20])
