"""What CUDA devices can do, by a stand-in for each: no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from companion.engine.devices import fits_varlen, has_bf16, is_out_of_memory
from companion.errors import CompanionError
from companion.rl import GRPORunConfig
from companion.training import PairwiseRewardConfig, config


def on_cuda(width: int) -> Any:
    return SimpleNamespace(is_cuda=True, shape=(1, 4, 9, width), device=torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("capability", "width", "fits"),
    [
        ((9, 0), 64, True),
        ((8, 0), 128, True),
        ((8, 9), 256, True),
        ((7, 5), 64, False),  # T4
        ((7, 0), 64, False),  # V100
        ((8, 0), 60, False),
        ((8, 0), 264, False),
    ],
)
def test_the_kernel_is_asked_only_where_there_is_one(
    capability: tuple[int, int], width: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fits_varlen(on_cuda(width)) is fits
    assert not fits_varlen(torch.zeros(1, 4, 9, width))


def test_bf16_that_is_emulated_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a T4, where the plain question is answered with yes."""
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert torch.cuda.is_bf16_supported()
    assert not has_bf16()
    assert asked[-1] is False


@pytest.mark.parametrize("config_class", [PairwiseRewardConfig, GRPORunConfig])
def test_one_process_with_several_gpus_is_refused(
    config_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"reward_model": ["x"]} if config_class is GRPORunConfig else {}
    assert config_class(str(tmp_path), **more).n_gpu <= 1
    monkeypatch.setattr(config_class, "n_gpu", property(lambda self: 2))
    with pytest.raises(CompanionError, match="one process sees 2 GPUs") as caught:
        config_class(str(tmp_path), **more)
    assert "CUDA_VISIBLE_DEVICES=0" in str(caught.value.cure)
    config.refuse_several_devices(1)


def test_the_ways_in_which_memory_ends() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    cublas = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(cublas))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
