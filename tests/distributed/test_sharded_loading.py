"""Of a sharded model one process of a machine reads the weights, and all get their part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loading_worker
import pytest
import torch
from launching import launch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from companion import ModelArguments, PairwiseRewardConfig
from companion.training.trainer import load_start
from companion.tutor import TUTOR_BASE

pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 million weights in bf16, which are read as float32: 110 MB that no file backs."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(TUTOR_BASE)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(strategy: str, base: Path, output: Path, *whole: str) -> list[dict[str, Any]]:
    """What each rank took, and the sums of the weights that they hold together."""
    words = [loading_worker.__file__, strategy, str(base), str(output), *whole]
    launch(words, forked=not whole)
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_one_process_reads_and_both_have_their_part(
    strategy: str, base: Path, tmp_path: Path
) -> None:
    model = load_start(
        None, PairwiseRewardConfig(tmp_path), ModelArguments(model_name_or_path=str(base))
    ).model
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    reader, other = measure(strategy, base, tmp_path / "found")
    assert reader["loaded"] > 0.9 * held  # it is measured what is meant
    assert other["loaded"] < 0.4 * held, (other, held)
    # what the other one has was sent: weights of the base, and the head of the seed
    sums = {name: float(value.double().sum()) for name, value in model.state_dict().items()}
    assert reader["sums"].keys() == sums.keys()
    for name, value in sums.items():
        assert reader["sums"][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_read_in_each_process_would_be_seen(strategy: str, base: Path, tmp_path: Path) -> None:
    """As transformers does it, under FSDP even with ``cpu_ram_efficient_loading``."""
    reader, other = measure(strategy, base, tmp_path / "found", "whole")
    assert other["loaded"] > 0.9 * reader["loaded"]
