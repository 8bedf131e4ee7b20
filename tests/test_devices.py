"""What CUDA devices can do, by a stand-in for each: no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from companion.engine.devices import device_notes, fits_varlen, has_bf16, resolve_dtype
from companion.errors import CompanionError, ModelError
from companion.models.memory import does_not_fit, is_out_of_memory, place
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


GIB = 2**30


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A T4; the function that is returned makes it another card."""

    def card(name: str, capability: tuple[int, int], free: int, total: int) -> None:
        bf16 = capability >= (8, 0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * GIB, total * GIB))

    card("Tesla T4", (7, 5), 14, 15)
    return card


def a_model(dtype: torch.dtype, width: int = 128) -> Any:
    """Stands for a model on a GPU."""
    text = SimpleNamespace(head_dim=width, num_attention_heads=16, hidden_size=1024)
    weight = SimpleNamespace(dtype=dtype, device=torch.device("cuda:0"), dim=lambda: 2)
    config = SimpleNamespace(_attn_implementation="sdpa", get_text_config=lambda: text)
    return SimpleNamespace(parameters=lambda: iter([weight]), config=config)


def test_auto_is_bf16_where_the_gpu_has_it(t4: Any) -> None:
    assert resolve_dtype("auto", "cuda") is torch.float32
    t4("NVIDIA A10", (8, 6), 20, 22)
    assert resolve_dtype("auto", "cuda") is resolve_dtype(None, "cuda:1") is torch.bfloat16
    assert resolve_dtype("auto", "cpu") is torch.float32
    assert resolve_dtype("float16", "cuda") == "float16"


def test_the_first_lines_of_a_run_on_a_gpu(t4: Any) -> None:
    card, slow, kernel, budget = device_notes(a_model(torch.float16), packed=True, budget=8192)
    assert "cuda:0: Tesla T4 (capability 7.5, CUDA" in card
    assert "14.0 of 15.0 GiB free; weights in float16" in card
    assert "no bf16" in slow
    assert "sdpa over packed texts" in kernel
    assert "capability 8.0" in kernel
    assert "8,192 tokens" in budget
    t4("NVIDIA A10", (8, 6), 20, 22)

    def said(*given: Any, packed: bool = True, **options: Any) -> str:
        return " | ".join(device_notes(a_model(*given), packed=packed, **options))

    assert "one FlashAttention kernel" in said(torch.bfloat16)
    mixed = said(torch.float32, autocast=torch.bfloat16)
    assert "float32, computed with in bfloat16" in mixed
    assert "one FlashAttention kernel" in mixed
    assert "float32 has no kernel" in said(torch.float32)
    assert "not of 20" in said(torch.bfloat16, 20)
    assert "sdpa, over padded batches" in said(torch.bfloat16, packed=False)
    without_heads = a_model(torch.bfloat16)
    without_heads.config.get_text_config = lambda: SimpleNamespace(hidden_size=64)
    assert "padded" in device_notes(without_heads, packed=False)[1]


def test_a_cpu_has_nothing_to_say(tiny_reward: Path) -> None:
    from companion import RewardScorer

    scorer = RewardScorer.from_pretrained(tiny_reward)
    assert device_notes(scorer.reward_model.model, packed=True) == []
    assert next(scorer.reward_model.model.parameters()).dtype is torch.float32


def test_a_model_that_does_not_fit_says_its_size_and_the_cure(t4: Any) -> None:
    class Large(torch.nn.Linear):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = Large(2**12, 2**13, bias=False)
    with pytest.raises(ModelError) as caught:
        place(model, "cuda")
    assert "Large of 0.034B parameters in float32 needs 0.1 GiB" in caught.value.what
    assert "the Tesla T4 has 15.0 GiB, 14.0 GiB of them free" in caught.value.what
    assert "bfloat16" in str(caught.value.cure)
    training = does_not_fit(model, "cuda", "step 3")
    # 4 bytes of gradient and 8 of Adam for each of 2^25 parameters
    assert "step 3" in training.what
    assert "0.4 GiB for the gradients and Adam's moments" in training.what
    for cure in ("micro_batch_tokens", "activation_checkpointing", "LoRA", "ZeRO-3"):
        assert cure in str(training.cure)

    class Broken(Large):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            raise RuntimeError("no NVIDIA driver")

    said = r"'cuda' cannot be used here|no NVIDIA driver"  # (the latter where there is a card)
    with pytest.raises((ModelError, RuntimeError), match=said):
        place(Broken(2, 2), "cuda")
