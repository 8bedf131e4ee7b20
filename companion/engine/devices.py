"""What a CUDA device can do, and how the end of its memory shows. Chapter 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_CUDAS_PATH: ContextVar[bool] = ContextVar("cudas_path", default=False)


@contextlib.contextmanager
def cudas_path() -> Iterator[None]:
    """Let tensors of the CPU take the path of CUDA inside the block.

    For tensors without data, which have no other place: a PyTorch without CUDA differentiates no
    fake tensor of CUDA.
    """
    token = _CUDAS_PATH.set(True)
    try:
        yield
    finally:
        _CUDAS_PATH.reset(token)


def acts_as_cuda() -> bool:
    """Whether :func:`cudas_path` is on."""
    return _CUDAS_PATH.get()


def has_bf16() -> bool:
    """Whether there is a CUDA device that computes in bf16.

    ``torch.cuda.is_bf16_supported()`` counts emulation: it is true on a T4, which then crashes or
    crawls.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def has_flash(device: torch.device | str) -> bool:
    """Whether PyTorch's FlashAttention runs there: from Ampere on (a T4 has 7.5, a V100 7.0)."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits_varlen(query: Tensor) -> bool:
    """Whether ``varlen_attn`` has a kernel for these heads on the device that they are on.

    It is FlashAttention 2, with a width of heads that is a multiple of 8 and at most 256.
    """
    if acts_as_cuda():
        return _fits(query.shape[-1])
    return query.is_cuda and _fits(query.shape[-1]) and has_flash(query.device)


def _fits(width: int) -> bool:
    return width % 8 == 0 and width <= 256


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device | str) -> torch.dtype | str:
    """The dtype of weights that are only computed with; 'auto' (or None) is bf16 on CUDA.

    Where CUDA has it: elsewhere 'auto' is float32, and so it is on a CPU.
    """
    if dtype not in (None, "auto"):
        return dtype
    return torch.bfloat16 if torch.device(device).type == "cuda" and has_bf16() else torch.float32


def device_notes(
    model: Any, *, packed: bool, autocast: torch.dtype | None = None, budget: int | None = None
) -> list[str]:
    """What was chosen for a run on CUDA, and why; nothing to say on a CPU.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        On its device.
    packed : bool
        Whether its texts are packed.
    autocast : torch.dtype, optional
        What float32 weights are computed with, if that is not float32.
    budget : int, optional
        Tokens of a batch, if they were set by the free memory.
    """

    def dimensions(p: Any) -> int:  # a shard of ZeRO-3 has no shape of its own
        return len(p.ds_shape) if hasattr(p, "ds_shape") else int(p.dim())

    weights = next(p for p in model.parameters() if dimensions(p) > 1)
    device = weights.device
    if device.type != "cuda":
        return []
    own, computed = (
        str(d).removeprefix("torch.") for d in (weights.dtype, autocast or weights.dtype)
    )
    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    how = own if own == computed else f"{own}, computed with in {computed}"
    lines = [
        f"{device}: {torch.cuda.get_device_name(device)} (capability {major}.{minor}, CUDA "
        f"{torch.version.cuda}), {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; weights in "
        f"{how}"
    ]
    if not has_bf16():
        lines.append("this GPU computes no bf16 (Ampere and later do)")
    lines.append(f"attention: {_kernel(model, device, computed, packed)}")
    if budget is not None:
        lines.append(f"batches of up to {budget:,} tokens, by the free memory; halved if it ends")
    return lines


def _kernel(model: Any, device: torch.device, computed: str, packed: bool) -> str:
    if not packed:  # it may have no heads at all, as Mamba
        return f"{model.config._attn_implementation}, over padded batches"
    text = model.config.get_text_config()
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    if computed == "float32":
        why = "float32 has no kernel for texts of unequal lengths"
    elif not has_flash(device):
        why = "FlashAttention needs capability 8.0"
    elif not _fits(width):
        why = f"FlashAttention takes heads of a multiple of 8 up to 256, not of {width}"
    else:
        return "one FlashAttention kernel over packed texts (varlen_attn)"
    return f"sdpa over packed texts, segments of like size at a time, since {why}"


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device, without waiting for what is queued there."""
    return values.to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, those that the allocator holds unused included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
