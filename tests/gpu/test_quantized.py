"""Large models: spread by a device map, in 4 bits, and trained by QLoRA.

The tests in 4 bits need bitsandbytes, and run on a CPU too where it is installed; no run on a GPU
is recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from companion import RewardScorer, apply_lora, load_base, save_reward_model
from companion.errors import ModelError
from companion.models import merged


@pytest.fixture
def wide(make_tokenizer: Any, make_causal: Any, tmp_path: Path) -> Path:
    """A base whose rows have whole blocks of 64 weights, and a reward model of it."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    base: Path = make_causal("qwen3", make_tokenizer(), tmp_path / "base", **sizes)
    save_reward_model(load_base(base), tmp_path / "reward")
    return tmp_path


def test_a_device_map_changes_no_score(tiny_reward: Path, tiny_texts: list[str]) -> None:
    want = RewardScorer.from_pretrained(tiny_reward, device="cpu").score(tiny_texts).raw
    where: Any = "auto" if torch.cuda.is_available() else {"": "cpu"}
    scorer = RewardScorer.from_pretrained(tiny_reward, device_map=where, dtype="float32")
    np.testing.assert_allclose(scorer.score(tiny_texts).raw, want, atol=1e-4)


def test_without_the_package_the_error_names_it(tiny_reward: Path) -> None:
    from transformers.utils import is_bitsandbytes_available

    if is_bitsandbytes_available():
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ModelError, match="bitsandbytes"):
        RewardScorer.from_pretrained(tiny_reward, load_in_4bit=True)


def test_in_4_bits_the_scores_are_near(wide: Path, tiny_texts: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    folder = wide / "reward"
    whole = RewardScorer.from_pretrained(folder, dtype="float32").score(tiny_texts).raw
    scorer = RewardScorer.from_pretrained(folder, load_in_4bit=True, dtype="float32")
    assert any("4 bits" in note for note in scorer.notes)
    assert scorer.reward_model.model.score.weight.dtype == torch.float32
    found = scorer.score(tiny_texts).raw
    assert np.abs(found - whole).max() > 0
    assert np.corrcoef(found, whole)[0, 1] > 0.8


def test_qlora_is_merged_in_full_precision(wide: Path, tiny_texts: list[str]) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = apply_lora(load_base(wide / "base", load_in_4bit=True), r=4)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data.copy_(values)
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    want = RewardScorer(loaded).score(tiny_texts).raw
    plain = merged(loaded.model)
    assert not any("4bit" in type(module).__name__ for module in plain.modules())
    save_reward_model(loaded, wide / "saved")
    again = RewardScorer.from_pretrained(wide / "saved", dtype="float32")
    # (on a CPU bitsandbytes multiplies in bfloat16, whatever it was told)
    near = 1e-3 if torch.cuda.is_available() else 0.15
    assert want.std() > 0.3
    np.testing.assert_allclose(again.score(tiny_texts).raw, want, atol=near)
