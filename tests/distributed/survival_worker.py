"""``companion train …`` on a rank that meets with a misfortune.

Usage: ``survival_worker.py FOLDER pairwise …``; a misfortune of this rank is in the environment as
``MISFORTUNE_RANK``: ``kill EVENT STEP``, ``term EVENT STEP``, ``launcher EVENT STEP`` (the signal
goes to its parent), ``fail BYTE STEP`` (no file of that checkpoint can be longer, as on a full
disk) or ``die BYTE STEP`` (one that would be longer kills the writer). Each rank writes its last
step to ``FOLDER/steps_RANK``.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

import companion.training.pairwise  # noqa: F401  (ranks that are forked have it then)
from companion.cli.main import main
from companion.training.checkpoints import WholeCheckpoints


class Misfortune(TrainerCallback):
    def __init__(self, folder: Path, rank: str) -> None:
        self.log = folder / f"steps_{rank}"
        what, where, step = os.environ.get(f"MISFORTUNE_{rank}", "none on_never 0").split()
        self.what, self.where, self.step = what, where, int(step)
        if what in ("kill", "term", "launcher"):
            setattr(self, where, self.meet)

    def meet(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            number = signal.SIGKILL if self.what == "kill" else signal.SIGTERM
            os.kill(os.getppid() if self.what == "launcher" else os.getpid(), number)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.write_text(str(state.global_step))

    def arm(self, step: int) -> None:
        """From here on no file can be longer, if this is the checkpoint of the step."""
        if self.what in ("fail", "die") and step == self.step:
            if self.what == "die":
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.where), resource.RLIM_INFINITY))


def run(folder: Path, arguments: list[str]) -> int:
    misfortune = Misfortune(folder, os.environ["RANK"])
    train: Any = WholeCheckpoints.train
    save: Any = Trainer._save_checkpoint

    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(misfortune)
        return train(self, *args, **kwargs)

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        misfortune.arm(self.state.global_step)
        try:
            save(self, *args, **kwargs)
        finally:  # what it says of it goes to a file too
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    WholeCheckpoints.train = trained  # type: ignore[method-assign]
    Trainer._save_checkpoint = saved  # type: ignore[method-assign]
    if "--deepspeed" in arguments:
        import deepspeed.comm.torch

        # It compiles an optimiser that is not used (the imports take 4 s a rank), and an operator
        # under a lock that a rank which is killed leaves behind, for all runs after it to wait at.
        torch.compile = lambda function, **settings: function  # type: ignore[assignment]
        deepspeed.comm.torch.build_shm_op = lambda: None
    return main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
