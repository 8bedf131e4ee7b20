"""The benchmarks by their names."""

from __future__ import annotations

from typing import Final

from companion.errors import DataError
from companion.evaluation.benchmarks.benchmark import Benchmark
from companion.evaluation.benchmarks.judge_bench import JudgeBench
from companion.evaluation.benchmarks.ppe import PPEHumanPreference
from companion.evaluation.benchmarks.prm_bench import PRMBench
from companion.evaluation.benchmarks.process_bench import ProcessBench
from companion.evaluation.benchmarks.reward_bench import RewardBench
from companion.evaluation.benchmarks.reward_bench_2 import RewardBench2
from companion.evaluation.benchmarks.rm_bench import RMBench

#: name -> benchmark
BENCHMARKS: Final[dict[str, Benchmark]] = {
    one.name: one
    for one in (
        RewardBench(),
        RewardBench2(),
        RMBench(),
        JudgeBench(),
        PPEHumanPreference(),
        ProcessBench(),
        PRMBench(),
    )
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; a DataError that lists all if there is none."""
    if name not in BENCHMARKS:
        raise DataError(f"no benchmark {name!r}", f"take one of: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
