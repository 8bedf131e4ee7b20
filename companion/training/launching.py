"""Several processes without a GPU: what accelerate and DeepSpeed need there, set by itself.

So the files in ``recipes/`` run on a laptop as they are, and a test on two processes is one of the
run on eight GPUs. Chapter 8.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from companion.errors import CompanionError

#: which DeepSpeed 0.19 lacks over gloo: both abort the process
_NOT_OVER_GLOO = {"overlap_comm": False, "reduce_scatter": False}


def settle_on_cpu(settings: Any) -> None:
    """Set what a run without a GPU needs; to be called before transformers reads the settings.

    Nothing happens where there is a GPU. One process, and several under DDP, need ``use_cpu``.
    DeepSpeed and FSDP2 need more: transformers knows them with a GPU's backend only, and accelerate
    1.15 makes DDP of FSDP on a CPU without a word. Rank 0 then prints what was set.

    Parameters
    ----------
    settings : TrainingArguments
        Changed in place.

    Raises
    ------
    CompanionError
        For a JSON file that cannot be read.
    """
    if torch.accelerator.is_available():
        return
    deepspeed, fsdp = _asked_for(settings)
    if not (deepspeed or fsdp) or "LOCAL_RANK" not in os.environ:
        settings.use_cpu = True  # several processes then talk over gloo
        return
    settings.use_cpu = False  # which would be DDP
    own = _as_dict(settings.accelerator_config or {}, "accelerator_config")
    settings.accelerator_config = own | {"use_configured_state": True}
    done = "processes over gloo"
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        settings.deepspeed = _for_gloo(deepspeed)
        from deepspeed import ops

        # else it is compiled at the first use, under a lock of torch's (FileBaton) that a killed
        # process leaves behind, and every later run waits for it for ever
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if settings.deepspeed["zero_optimization"].get("stage") == 2:
            done += "".join(f", {name} off" for name in _NOT_OVER_GLOO)
    AcceleratorState._reset_state(reset_partial_state=True)  # as transformers does
    state = PartialState(backend="gloo")
    if not deepspeed:
        # accelerate asks for FSDP among the kinds of GPUs only (AcceleratorState.__init__); what it
        # does then, fully_shard, torch has for gloo too
        state.distributed_type = DistributedType.MULTI_GPU
    if state.is_main_process:
        engine = "DeepSpeed" if deepspeed else "FSDP"
        print(f"no GPU: {engine} on the CPU, {done}")


def require_launcher(settings: Any) -> None:
    """Refuse to shard over one process without a GPU, which neither engine can.

    Raises
    ------
    CompanionError
    """
    alone = "LOCAL_RANK" not in os.environ and not torch.accelerator.is_available()
    if alone and any(_asked_for(settings)):
        raise CompanionError(
            "DeepSpeed and FSDP shard over processes, and nothing started any",
            "torchrun --nproc_per_node 2 -m companion train …",
        )


def _asked_for(settings: Any) -> tuple[Any, bool]:
    """The settings of DeepSpeed, if it is to shard, and whether FSDP is: by flags or launcher."""
    deepspeed = settings.deepspeed
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        deepspeed = deepspeed or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return deepspeed, bool(settings.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _for_gloo(deepspeed: dict[str, Any] | str) -> dict[str, Any]:
    """The settings of DeepSpeed as they can run over gloo."""
    given = _as_dict(deepspeed, "deepspeed")
    zero = given.get("zero_optimization", {})
    own = _NOT_OVER_GLOO if zero.get("stage") == 2 else {}
    return given | {"zero_optimization": zero | own}


def _as_dict(value: dict[str, Any] | str, flag: str) -> dict[str, Any]:
    """A setting that may be a dictionary, JSON or the name of a JSON file."""
    if not isinstance(value, str):
        return value
    try:
        text = value if value.startswith("{") else Path(value).read_text("utf-8")
        return dict(json.loads(text))
    except (OSError, ValueError) as error:
        raise CompanionError(
            f"--{flag} {value}: cannot be read: {error}", "give JSON or a JSON file"
        ) from error
