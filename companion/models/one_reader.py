"""A checkpoint that one process of a machine reads, for training whose weights are sharded.

Under ZeRO-3 and FSDP2 the weights of rank 0 are sent to all, a tensor at a time, and each keeps its
shard. What another process has read until then is thrown away: eight processes with a base of 70B
in float32 would hold 2.2 TB. Here they hold memory that is allocated and never touched, which takes
no room until a tensor arrives. transformers 5.23 has both halves of this and neither whole: under
ZeRO-3 (``zero.Init``) it no longer says which weights had no place in the model, and under FSDP
(``cpu_ram_efficient_loading``) all processes read all weights. Chapter 8.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

_MAY_BE_HOLLOW: ContextVar[Callable[[Any], bool] | None] = ContextVar("one_reader", default=None)


def is_reader() -> bool:
    """Whether this process reads: the first of its machine, or one that is alone."""
    return not torch.distributed.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def one_reader(may_be_hollow: Callable[[Any], bool]) -> Iterator[None]:
    """Within, one process of a machine reads weights; those of the others are empty.

    Parameters
    ----------
    may_be_hollow : callable
        Whether a model (on the meta device) may be without its weights until they are sent: not
        one whose forward is to be tried before. Such a model every process reads.
    """
    token = _MAY_BE_HOLLOW.set(may_be_hollow)
    try:
        yield
    finally:
        _MAY_BE_HOLLOW.reset(token)


def read_once(read: Callable[..., tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """What `read`, transformers' ``from_pretrained``, gives: model and loading info."""
    may_be_hollow = _MAY_BE_HOLLOW.get()
    if may_be_hollow is None or is_reader():
        return read()
    # by these transformers gives buffers that are no weights (of positions) their values here too
    from accelerate.utils import patch_environment  # clients of a server may have none

    with patch_environment(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
        model, info = read(device_map="meta")
    if any(buffer.is_meta for buffer in model.buffers()) or not may_be_hollow(model):
        return read()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="cpu")
            setattr(module, name, torch.nn.Parameter(empty, parameter.requires_grad))
    return model, info
