"""A training checkpoint knows whose it is, and can be seen only when it is whole.

transformers writes it under its own name and goes on from the highest number, be it torn by a kill
(#35525) or of other rows, another base or other settings, and what is then saved claims to be this
run's. Here all ranks write into a folder apart, which is renamed when all of them have; its last
file names the run, and the sizes of the others, for who copies it. transformers tried the same:
#27820 renamed while other ranks were writing (#28015), #35580 was taken back (#36112). Chapter 4.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from companion.errors import CompanionError, RunEnded, first_line, is_writing_fault
from companion.formatting import RECIPE_FILE, RewardFormatter
from companion.models.checkpoint import model_fingerprint
from companion.training.preemption import PreemptionCallback, spare_workers

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput

    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

RUN_FILE: Final = "companion_run.json"
_STATE: Final = "trainer_state.json"
#: stood in a folder that version 0.1 was writing to, and does in one that transformers'
#: `enable_jit_checkpoint` is, which never looks at it
_SENTINEL: Final = "checkpoint-is-incomplete.txt"
#: in ``output_dir``: where checkpoints are written
PART: Final = ".part"


# ---------------------------------------------------------------------- is it whole


def mark_whole(folder: Path, run: Mapping[str, Any] | None, totals: Mapping[str, Any]) -> None:
    """Write the last file of a checkpoint: the run, its totals so far, and the files' sizes."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"version": 1, "run": run, "totals": dict(totals), "files": files}
    (folder / RUN_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def show(part: Path, checkpoint: Path) -> None:
    """Let a whole checkpoint be seen, in place of one that an earlier run has left."""
    if checkpoint.exists():
        checkpoint.rename(part.with_name("replaced"))
    part.rename(checkpoint)
    shutil.rmtree(part.parent)


def fault_of(folder: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is.

    One that the companion did not mark (of an earlier version, or torn before its last file) is
    looked into: each file must be readable to its end.
    """
    if (folder / _SENTINEL).exists():
        return "its save was broken off"
    record = _record(folder)
    if record is None:
        return next(_faults(folder), None)
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    return None


def _faults(folder: Path) -> Iterator[str]:
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield f"{_STATE} is missing or broken"
    weights = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    if not any(any(folder.glob(name)) for name in weights) and not any(
        path.is_dir() for path in folder.iterdir()
    ):
        yield "it has no weights"
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(shards - {path.name for path in folder.iterdir()}):
            yield f"{name} is missing"
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError):
                yield f"{path.name} is cut short"
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            yield f"{path.name} is cut short"
    if (folder / "optimizer.pt").exists():
        if not (folder / "scheduler.pt").exists():
            yield "scheduler.pt is missing"
        if not any(folder.glob("rng_state*.pth")):
            yield "rng_state.pth is missing"


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return record if isinstance(record["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_optimizer(folder: Path) -> bool:
    """Whether the optimiser's state is there, in one file or in shards."""
    return any(
        path.name.startswith(("optimizer", "global_step", "zero_pp_rank"))
        for path in folder.iterdir()
    )


def newest_whole(output_dir: Path, required: bool = True, main: bool = True) -> Path | None:
    """The newest whole checkpoint of a folder; a torn one is skipped, with a warning on rank 0.

    Raises
    ------
    CompanionError
        If there are checkpoints, none is whole, and one is `required`.
    """
    numbered = sorted(
        (path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()),
        key=lambda path: -int(path.name[11:]),
    )
    torn = []
    for path in numbered:
        fault = fault_of(path)
        if fault is None:
            return path
        torn.append(f"{path.name}: {fault}")
        if main:
            logger.warning(f"{path}: is not whole ({fault}), and is left aside")
    if torn and required:
        raise CompanionError(
            f"{output_dir}: no checkpoint is whole ({'; '.join(torn)})",
            "begin anew, without --resume_from_checkpoint, or with 'auto'",
        )
    return None


def checkpoint_of(config: TrainingArguments) -> str | None:
    """The checkpoint to go on from: a path as given, or the newest whole one for 'last'.

    'auto' is 'last' where there is one, and otherwise begins anew: for a job that may be requeued.
    All ranks take what rank 0 sees; every rank must call.

    Raises
    ------
    CompanionError
        If there is none, it is not whole, or it has no state of the optimiser.
    """
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("false", "none", "no"):
        return None
    found: list[Any] = [None, None]  # the folder, or what to raise
    if config.process_index == 0:
        try:
            found[0] = _checkpoint_of(config, str(asked))
        except CompanionError as error:
            found[1] = error.what, error.cure
    place, problem = broadcast_object_list(found)
    if problem is not None:
        raise CompanionError(*problem)
    return None if place is None else str(place)


def _checkpoint_of(config: TrainingArguments, asked: str) -> str | None:
    folder = Path(str(config.output_dir))
    if asked.lower() == "auto":
        found = newest_whole(folder, required=False)
        if found is None:
            return None
    elif asked.lower() in ("true", "last", "yes"):
        found = newest_whole(folder)
        if found is None:
            raise CompanionError(
                f"{config.output_dir}: there is no checkpoint to go on from",
                "leave out --resume_from_checkpoint, or check --output_dir",
            )
    else:
        found = Path(asked)
        if not found.is_dir() or not ((found / _STATE).is_file() or (found / RUN_FILE).is_file()):
            raise CompanionError(
                f"{asked}: is no training checkpoint (it has no {_STATE})",
                "give a folder checkpoint-N, or 'last'",
            )
        if fault := fault_of(found):
            raise CompanionError(
                f"{asked}: is not whole ({fault})", "take another one, or 'last' for the newest"
            )
    if not has_optimizer(found):
        raise CompanionError(
            f"{found}: has no state of the optimiser, without which the run would not go on as it "
            "was (save_only_model)",
            "give it as --model_name_or_path with --keep_head to begin a new run from its weights",
        )
    return str(found)


# ---------------------------------------------------------------------- whose is it


def fingerprint_of(model: Any, main: bool) -> str:
    """:func:`companion.models.model_fingerprint` as rank 0 has it; every rank must call.

    Where FSDP loads on rank 0 alone (``cpu_ram_efficient_loading``), the others have no weights.
    """
    found = [model_fingerprint(model) if main else ""]
    return str(broadcast_object_list(found)[0])


def check_run(
    checkpoint: str | None, run: Mapping[str, Any], allow_other: bool = False
) -> str | None:
    """Refuse the checkpoint of another run; a note, if there is something to say.

    Parameters
    ----------
    checkpoint : str, optional
        None: nothing is resumed.
    run : mapping
        What decides the result of this run, a value each, nested or not.
    allow_other : bool
        Go on all the same, and say so in the note.

    Raises
    ------
    CompanionError
        With each difference.
    """
    if checkpoint is None:
        return None
    record = _record(Path(checkpoint))
    before = None if record is None else record["run"]
    if before is None:
        return (
            f"{checkpoint} does not say of which run it is: nothing could be compared, and figures "
            "of training are of what followed alone"
        )
    old, new = dict(_flat(before)), dict(_flat(json.loads(json.dumps(run))))
    differ = [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name) != new.get(name)
    ]
    if not differ:
        return None
    if allow_other:
        return f"went on from {checkpoint}, of another run ({'; '.join(differ)})"
    raise CompanionError(
        f"{checkpoint}: is of another run ({'; '.join(differ)})",
        "take another --output_dir or leave out --resume_from_checkpoint; --resume_other_run true "
        "goes on all the same, and the manifest says so",
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def take_date(formatter: RewardFormatter, checkpoint: str | None) -> None:
    """Let a run that goes on write the date in its texts that it began with."""
    if checkpoint is None or formatter.day is None:
        return
    try:
        recipe = json.loads((Path(checkpoint) / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    formatter.day = recipe.get("date", formatter.day)


# ---------------------------------------------------------------------- in the trainer


class WholeCheckpoints(_Base):
    """The part of a trainer that writes checkpoints whole or not at all, and goes on from them."""

    #: what the checkpoints are to say of their run
    run: Mapping[str, Any] | None = None
    _before: Mapping[str, Any] = {}
    _began = 0.0
    _writing = False
    _preemption = PreemptionCallback()

    def totals(self) -> dict[str, Any]:
        """What a run that goes on from here adds to; every rank calls."""
        return {
            "seconds": self._before.get("seconds", 0.0) + time.time() - self._began,
            "loss": self._before.get("loss", 0.0) + self._total_loss_scalar + float(self._tr_loss),
        }

    def restore(self, totals: Mapping[str, Any]) -> None:
        """Begin with the totals of a checkpoint, or with none."""
        self._before, self._began = totals, time.time()

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As in transformers; a resumed run ends with the totals of the whole.

        Raises
        ------
        RunEnded
            After a checkpoint, if the run was asked to end (SIGTERM); if one cannot be written; or
            if another rank is gone.
        """
        if resume_from_checkpoint is True:
            found = newest_whole(Path(str(self.args.output_dir)), main=self.args.process_index == 0)
            resume_from_checkpoint = None if found is None else str(found)
        record = _record(Path(resume_from_checkpoint)) if resume_from_checkpoint else None
        self.restore({} if record is None else record["totals"])
        folder = Path(self._get_output_dir(None))
        if self.args.should_save:  # of a run that was killed meanwhile
            shutil.rmtree(folder / PART, ignore_errors=True)
        self._preemption = PreemptionCallback()
        self.add_callback(self._preemption)
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "by peer" in str(error)  # (gloo's)
            if isinstance(error, RunEnded) or not lost:
                raise
            raise RunEnded(
                f"another rank is gone since step {self.state.global_step} "
                f"({str(error).splitlines()[0]})",
                "it may have said why; --resume_from_checkpoint auto goes on from the newest "
                "checkpoint",
                exit_code=1,
            ) from error
        finally:
            self._preemption.close()
            self.remove_callback(self._preemption)
        if self._preemption.agreed:
            step = self.state.global_step
            raise RunEnded(
                f"asked to end at step {step} of {self.state.max_steps}, saved in "
                f"{folder / f'checkpoint-{step}'}",
                "the same command with --resume_from_checkpoint auto goes on from there",
                exit_code=128 + signal.SIGTERM,
                said=self.args.process_index != 0,
            )
        return output

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self._before:  # transformers counts what this call did
            start_time -= self._before["seconds"]
            self._total_loss_scalar += self._before["loss"]
            self._initial_global_step = 0
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # transformers looks after a step only
            return None
        return super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        dataloader = super()._get_dataloader(*args, **kwargs)
        spare_workers(dataloader)
        return dataloader

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PART) if self._writing else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writing:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        checkpoint, part = (place / f"checkpoint-{step}" for place in (folder, folder / PART))
        totals = self.totals()
        # transformers would note the best one by the path of now, and wait for all ranks to do so
        best, self.state.best_global_step = self.state.best_global_step, None
        with self._all_writing(checkpoint):
            self._writing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = False
                self.state.best_global_step = best
            if best:
                if best == step or (folder / f"checkpoint-{best}").exists():
                    self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
                if self.args.should_save:
                    self.state.save_to_json(str(part / _STATE))
        with self._all_writing(checkpoint):
            if self.args.should_save:
                mark_whole(part, self.run, totals)
                show(part, checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if (
            self.args.should_save
        ):  # old ones go now; transformers deletes before the new one is whole
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextmanager
    def _all_writing(self, checkpoint: Path) -> Iterator[None]:
        """All ranks write, and wait for each other; where one cannot, all end.

        Under FSDP and DeepSpeed the others wait within transformers' save: it ends alone, and they
        by the loss of it.
        """
        fault = None
        try:
            with all_written(checkpoint.parent, checkpoint.name):
                yield
        except RunEnded as error:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise
            fault = error
        if self._preemption.agree(fault is not None):
            if self.args.should_save:
                shutil.rmtree(checkpoint.parent / PART, ignore_errors=True)
            raise fault or RunEnded(
                f"{checkpoint}: another rank could not write it", "see there", said=True
            )


@contextmanager
def all_written(folder: Path, name: str) -> Iterator[None]:
    """Say so in one line if something of a run's `folder` cannot be written.

    Raises
    ------
    RunEnded
        With the room that is left, and the checkpoint to go on from.
    """
    try:
        yield
    except Exception as error:
        if not is_writing_fault(error):
            raise
        text = first_line(error)
        there = next(place for place in (folder, *folder.parents) if place.exists())
        room, go_on = f"{shutil.disk_usage(there).free:,} bytes are free", ""
        if (before := newest_whole(folder, required=False, main=False)) is not None:
            size = sum(path.stat().st_size for path in before.rglob("*") if path.is_file())
            room += f", {before.name} takes {size:,}"
            go_on = f"; --resume_from_checkpoint last goes on from {before.name}"
        raise RunEnded(
            f"{folder / name}: could not be written ({text}): {room}",
            f"make room (--save_total_limit keeps fewer checkpoints){go_on}",
        ) from error
