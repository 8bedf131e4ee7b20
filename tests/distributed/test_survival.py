"""Ranks that are killed, cannot write or are asked to end, on two processes: the run goes on.

A chain of misfortunes at random moments, each on one rank and each gone on from, ends with the
weights of the run that nothing disturbed.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import survival_worker
import torch
from launching import run_ranks
from safetensors.torch import load_file

from companion.training.checkpoints import PART, newest_whole

pytestmark = pytest.mark.distributed

#: events of a step, and how many steps are taken when they are met in the step after `n` of them
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
STEPS, EVERY = 8, 2
RECIPES = Path(__file__).parents[2] / "recipes"
STRATEGIES = {
    "DDP": [],
    "FSDP2": ["--fsdp", "--fsdp_config", str(RECIPES / "fsdp/fsdp2.json")],
    "ZeRO-3": ["--deepspeed", str(RECIPES / "deepspeed/zero3.json")],
}


@dataclass
class Run:
    """A folder with rows, and the command on two ranks."""

    folder: Path
    base: Path
    strategy: str = "DDP"
    said: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def __call__(self, *flags: str, torchrun: bool = False, **misfortunes: str) -> list[int | None]:
        """The exit codes; a rank that goes on waiting for another is killed (-9)."""
        for log in self.folder.glob("steps_*"):
            log.unlink()
        arguments = [
            *(survival_worker.__file__, str(self.folder), "pairwise"),
            *("--model_name_or_path", str(self.base), "--dataset_name", str(self.rows())),
            *("--output_dir", str(self.model), "--per_device_train_batch_size", "2"),
            *("--learning_rate", "0.003", "--max_steps", str(STEPS), "--eval_fraction", "0.3"),
            *("--save_strategy", "steps", "--save_steps", str(EVERY), "--eval_strategy", "steps"),
            *("--eval_steps", "3", "--disable_tqdm", "true", "--dataset_num_proc", "1"),
            *("--max_length", "60", "--report_to", "none", *flags),
            *STRATEGIES[self.strategy],
        ]
        environment = {f"MISFORTUNE_{name[-1]}": value for name, value in misfortunes.items()}
        codes, self.said = run_ranks(
            arguments, forked=not torchrun, torchrun=torchrun, patience=150, **environment
        )
        return codes

    def rows(self) -> Path:
        path = self.folder / "pairs.jsonl"
        rows = [
            {
                "prompt": [
                    {"role": "user", "content": f"Ana has {i % 20} pens {'and' * (i // 20)}"}
                ],
                "chosen": [{"role": "assistant", "content": f"the answer is {i % 20}"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
            for i in range(43)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    def last_steps(self) -> list[int]:
        """The last step of each rank."""
        return [int(path.read_text()) for path in sorted(self.folder.glob("steps_*"))]

    def seen(self) -> list[str]:
        return sorted(path.name for path in self.model.glob("checkpoint*"))

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.model / "model.safetensors")


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """A run of a strategy that nothing disturbed."""

    @functools.cache
    def whole(strategy: str) -> Run:
        if strategy == "ZeRO-3":
            pytest.importorskip("deepspeed")
        run = Run(tmp_path_factory.mktemp("whole"), tiny_base, strategy)
        codes = run("--save_total_limit", "2")
        assert codes == [0, 0], run.said
        assert run.seen() == ["checkpoint-6", "checkpoint-8"]
        return run

    return whole


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Misfortunes:
    """One of each, on the way from the newest checkpoint on; what must be true after it."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.dice = run, random.Random(seed)
        self.at = 0  # the step to go on from

    def moment(self) -> tuple[str, int]:
        """An event, and the steps that are taken when it is met."""
        event, steps = self.dice.choice(EVENTS), self.dice.randrange(self.at, STEPS)
        return f"{event} {steps + (event == 'on_step_end')}", steps

    def saving(self) -> tuple[str, int, str]:
        """A length that not all files of a rank's part of a checkpoint have, a step, the rank."""
        rank = self.dice.choice("01")
        step = self.dice.randrange((self.at // EVERY + 1) * EVERY, STEPS + 1, EVERY)
        return f"{self.dice.randrange(1, 13_000)} {step}", step, rank

    def kill(self) -> None:
        """One rank is gone; the other one ends."""
        moment, steps = self.moment()
        rank = self.dice.choice("01")
        self.gone(rank, f"kill {moment}", -signal.SIGKILL)
        self.at = max(self.at, steps // EVERY * EVERY)

    def die(self) -> None:
        """One rank is gone in the middle of a file."""
        limit, step, rank = self.saving()
        self.gone(rank, f"die {limit}", -signal.SIGXFSZ)
        self.at = max(self.at, step - EVERY)

    def gone(self, rank: str, misfortune: str, code: int) -> None:
        codes, other = self.go(**{f"rank{rank}": misfortune}), 1 - int(rank)
        assert codes[int(rank)] == code, self.run.said
        assert codes[other] == 1, ("it hung, or did not notice", codes, self.run.said[other])
        assert "another rank is gone since step" in self.run.said[other]
        assert "Traceback" not in self.run.said[other]

    def fail(self) -> None:
        """One rank cannot write; both end, with one line."""
        limit, step, rank = self.saving()
        codes = self.go(**{f"rank{rank}": f"fail {limit}"})
        assert codes[int(rank)] == 2, self.run.said
        assert codes[1 - int(rank)] not in (0, -signal.SIGKILL), "the other one hung"
        told = [line for text in self.run.said for line in text.splitlines() if "written (" in line]
        assert len(told) == 1, told
        assert f"checkpoint-{step}: could not be written" in told[0]
        assert "bytes are free" in told[0]
        before = max(self.at, step - EVERY)
        assert (f"last goes on from checkpoint-{before}" in told[0]) == (before > 0)
        if self.run.strategy == "DDP":
            assert codes == [2, 2]
            assert "Traceback" not in "".join(self.run.said)
            assert not (self.run.model / PART).exists()
        self.at = max(self.at, step - EVERY)

    def ask(self) -> None:
        """One rank is asked to end, or both at moments of their own: all save the same step."""
        asked = {f"rank{rank}": self.moment() for rank in self.dice.choice(["0", "1", "01"])}
        first = min(steps for _, steps in asked.values())
        codes = self.go(**{rank: f"term {moment}" for rank, (moment, _) in asked.items()})
        assert codes == [143, 143], self.run.said
        one, two = self.run.last_steps()
        assert one == two
        assert first < one <= first + 2
        told = "".join(self.run.said)
        assert told.count(f"asked to end at step {one} of {STEPS}") == 1
        assert "--resume_from_checkpoint auto goes on from there" in told
        assert not (self.run.model / PART).exists()
        self.at = one

    def go(self, **misfortunes: str) -> list[int | None]:
        began = time.monotonic()
        codes = self.run("--resume_from_checkpoint", "auto", **misfortunes)
        print(f"from step {self.at}, {misfortunes}: {codes}, {time.monotonic() - began:.1f} s")
        return codes


MISFORTUNES = ("kill", "die", "fail", "ask")


def survive(whole: Run, folder: Path, count: int = len(MISFORTUNES)) -> None:
    """Meet with all misfortunes, in any order, or with so many."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    run = Run(folder, whole.base, whole.strategy)
    misfortunes = Misfortunes(run, seed)
    for name in misfortunes.dice.sample(MISFORTUNES, count):
        if misfortunes.at == STEPS:
            break
        getattr(misfortunes, name)()
        newest = newest_whole(run.model)
        assert newest == (run.model / f"checkpoint-{misfortunes.at}" if misfortunes.at else None)
    codes = run("--resume_from_checkpoint", "last" if misfortunes.at else "auto")
    assert codes == [0, 0], run.said
    assert gap(run.weights(), whole.weights()) <= (1e-6 if run.strategy == "ZeRO-3" else 0.0)
    assert not (run.model / PART).exists()


@pytest.mark.parametrize("strategy", ["DDP", "ZeRO-3"])
def test_two_ranks_survive(strategy: str, strategies: Any, tmp_path: Path) -> None:
    survive(strategies(strategy), tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_survive_all(strategy: str, number: int, strategies: Any, tmp_path: Path) -> None:
    survive(strategies(strategy), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "ZeRO-3"])
def test_under_torchrun(strategy: str, strategies: Any, tmp_path: Path) -> None:
    """It passes a SIGTERM on to all ranks, and ends those that a lost one has left."""
    whole = strategies(strategy)
    run = Run(tmp_path, whole.base, strategy)
    (code,) = run(torchrun=True, rank0="launcher on_step_begin 3")
    assert code == 1, "torchrun ends with 1, whatever its ranks return (torch 2.13)"
    one, two = run.last_steps()
    assert one == two
    assert newest_whole(run.model) == run.model / f"checkpoint-{one}"
    assert run.said[0].count(f"asked to end at step {one} of {STEPS}") == 1
    for rank in "01":
        kill = {f"rank{rank}": f"kill on_pre_optimizer_step {6 + int(rank)}"}
        (code,) = run("--resume_from_checkpoint", "auto", torchrun=True, **kill)
        assert code == 1
    assert run("--resume_from_checkpoint", "last", torchrun=True) == [0]
    assert gap(run.weights(), whole.weights()) <= (1e-6 if strategy == "ZeRO-3" else 0.0)
