"""What a CUDA device can do, and how the end of its memory shows. Chapter 2."""

from __future__ import annotations

import torch
from torch import Tensor


def has_bf16() -> bool:
    """Whether there is a CUDA device that computes in bf16.

    ``torch.cuda.is_bf16_supported()`` counts emulation: it is true on a T4, which then crashes or
    crawls.
    """
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def fits_varlen(query: Tensor) -> bool:
    """Whether ``varlen_attn`` has a kernel for these heads on the device that they are on.

    It is FlashAttention 2: from Ampere on (capability 8.0; a T4 has 7.5, a V100 7.0), with a width
    of heads that is a multiple of 8 and at most 256.
    """
    width = query.shape[-1]
    return (
        query.is_cuda
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is at its end; cuBLAS has its own words for it."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, those that the allocator holds unused included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
