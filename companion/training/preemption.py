"""A run that is asked to end saves a checkpoint first, on all ranks after the same step. Chapter 8.

A plain callback for any ``transformers.Trainer``, without anything of the companion in it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from transformers import TrainerCallback

#: a signal within so many seconds is the same one again: a scheduler that signals all processes of
#: a job reaches the ranks twice, once by their launcher
_SAME: Final = 3.0


def spare_workers(dataloader: Any) -> None:
    """Let a dataloader's workers live through SIGTERM.

    ``torchrun`` sends it to all processes of a rank, and a rank whose worker dies of it ends with
    "DataLoader worker is killed by signal: Terminated" before it can save. Workers end when they
    are told to, or when the rank is gone.
    """
    loader = getattr(dataloader, "base_dataloader", dataloader)  # accelerate's holds torch's
    init = getattr(loader, "worker_init_fn", None)
    if getattr(loader, "num_workers", 0) and getattr(init, "func", None) is not _ignore:
        loader.worker_init_fn = partial(_ignore, init)


def _ignore(init: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if init is not None:
        init(worker)


class PreemptionCallback(TrainerCallback):
    """SIGTERM to any rank, or to the launcher: all save after the same step, and training stops.

    ``TrainingArguments(enable_jit_checkpoint=True)`` (transformers 5.23, #41723) saves on SIGTERM
    too, but each rank decides for itself when, by a timer of its own: ranks that are a step apart
    wait for each other in different collectives until they are killed. Here each rank tells the
    others at every step whether it was asked, by one byte over gloo on the CPU, which is on its way
    during the optimiser's step; so all stop at the first step at which any of them was.

    A signal during an evaluation or a save is answered when that is done, without a further step;
    one before the first step, after it; one after the last step does what it would have done
    without this callback, and so does a second one. What had been set for SIGTERM before is set
    again when training ends; if it ends by an exception, by :meth:`close`.

    Attributes
    ----------
    agreed : bool
        Whether the run was ended so; the same on all ranks.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._asked: float | None = None  # when this rank was
        self._first = self._saved = -1  # steps
        self._pid = 0
        self._earlier: Any = None
        self._group: Any = None
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._work: Any = None

    # ------------------------------------------------------------------ the ranks

    def agree(self, said: bool) -> bool:
        """Whether any rank says so; every rank must call."""
        self._tell(said)
        return self._hear()

    def _tell(self, said: bool) -> None:
        self._flag.fill_(said)
        if self._group is not None:
            maximum = dist.ReduceOp.MAX
            self._work = dist.all_reduce(self._flag, maximum, group=self._group, async_op=True)

    def _hear(self) -> bool:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return bool(self._flag)

    # ------------------------------------------------------------------ the signal

    def _handle(self, signum: int, frame: Any) -> None:
        again = self._asked is not None and time.monotonic() - self._asked > _SAME
        if again or os.getpid() != self._pid:  # (a process that was forked has nothing to save)
            self._restore()
            signal.raise_signal(signum)
        elif self._asked is None:
            self._asked = time.monotonic()

    def _restore(self) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None

    def close(self) -> None:
        """Set what had been set for SIGTERM before, and leave the group of ranks."""
        self._restore()
        self._work = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    # ------------------------------------------------------------------ transformers' events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen from now on."""
        self.close()
        self.agreed, self._asked, self._saved = False, None, -1
        self._first = state.global_step
        spare_workers(kwargs.get("train_dataloader"))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            patience = timedelta(seconds=args.ddp_timeout)
            self._group = dist.new_group(backend="gloo", timeout=patience)
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self._pid = os.getpid()
            earlier = signal.signal(signal.SIGTERM, self._handle)
            self._earlier = signal.SIG_DFL if earlier is None else earlier

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the other ranks; they hear it at the end of the step."""
        self._tell(self._asked is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any rank was asked."""
        if self._hear():
            self._stop(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any rank was asked meanwhile."""
        self._look_up(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, if any rank was asked meanwhile."""
        self._saved = state.global_step
        self._look_up(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers takes the step at which training stops for the end of an epoch."""
        if self.agreed:
            self._stop(args, state, control, within=not float(state.epoch).is_integer())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no longer; a signal that came too late does what it would have done."""
        late = self._asked is not None and not self.agreed
        self.close()
        if late:
            signal.raise_signal(signal.SIGTERM)

    # ------------------------------------------------------------------ inside

    def _look_up(self, args: Any, state: Any, control: Any) -> None:
        listening = self._group is not None or self._earlier is not None
        if not listening or self.agreed or state.global_step == self._first:
            return
        if self.agree(self._asked is not None):
            self._stop(args, state, control)

    def _stop(self, args: Any, state: Any, control: Any, within: bool = False) -> None:
        self.agreed = True
        args.save_only_model = False  # nobody could go on without the optimiser
        control.should_training_stop = True
        # the time is short; but an evaluation that decides something is missed if it is left out
        decides = args.metric_for_best_model is not None and not within
        control.should_evaluate = control.should_evaluate and decides
        control.should_log = control.should_log and not within
        control.should_save = self._saved != state.global_step or control.should_evaluate
