"""No weight is left out or made up without a word, and a fingerprint knows them all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from companion import RewardScorer, apply_lora, load_base, load_reward_model, save_reward_model
from companion.errors import DataError, ModelError
from companion.models.checkpoint import model_fingerprint
from companion.scoring import score_file

Weights = dict[str, torch.Tensor]


def changed(
    folder: Path,
    to: Path,
    weights: Callable[[Weights], Weights] = lambda w: w,
    file: str = "model.safetensors",
    **config: Any,
) -> Path:
    """A copy of a checkpoint with other weights or entries of its configuration."""
    shutil.copytree(folder, to)
    save_file(weights(load_file(to / file)), to / file, metadata={"format": "pt"})
    if config:
        before = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps({**before, **config}))
    return to


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {k: v for k, v in weights.items() if part not in k}


# ---------------------------------------------------------------------- checkpoints


def test_weights_without_a_place_are_refused(tiny_reward: Path, tmp_path: Path) -> None:
    biased = changed(
        tiny_reward, tmp_path / "biased", lambda w: w | {"score.bias": torch.tensor([0.7])}
    )
    with pytest.raises(ModelError, match=r"no place for 1 weight \(score.bias\)"):
        load_reward_model(biased)
    with pytest.raises(ModelError, match=r"score.bias"):
        load_base(biased, keep_head=True)
    load_base(biased)  # a fresh head takes its place
    short = changed(tiny_reward, tmp_path / "short", num_hidden_layers=1, layer_types=None)
    for load in (load_reward_model, load_base):
        with pytest.raises(ModelError, match=r"(?s)place for 11 weights \(model.layers.1.*too few"):
            load(short)
    long = changed(tiny_reward, tmp_path / "long", num_hidden_layers=3, layer_types=None)
    for load in (load_reward_model, load_base):
        with pytest.raises(ModelError, match=r"lacks 11 weights.*model.layers.2"):
            load(long)
    wide = changed(tiny_reward, tmp_path / "wide", intermediate_size=48)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_reward_model(wide)
    odd = changed(tiny_reward, tmp_path / "odd", lambda w: w | {"model.extra": torch.ones(2)})
    with pytest.raises(ModelError, match=r"model.extra"):
        load_reward_model(odd)


def test_what_has_no_part_in_a_score_may_be_there(tiny_reward: Path, tmp_path: Path) -> None:
    def add(weights: Weights) -> Weights:
        embeddings = weights["model.embed_tokens.weight"]
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        return weights | old | {"lm_head.weight": embeddings.clone()}

    folder = changed(tiny_reward, tmp_path / "more", add)
    loaded, plain = load_reward_model(folder), load_reward_model(tiny_reward)
    assert any("lm_head.weight" in note for note in loaded.notes)
    assert model_fingerprint(loaded.model) == model_fingerprint(plain.model)


def test_a_language_model_is_not_loaded_with_weights_left_out(
    tiny_base: Path, tmp_path: Path
) -> None:
    from companion.generation import load_causal

    folder = changed(tiny_base, tmp_path / "m", lambda w: w | {"model.extra": torch.ones(2)})
    with pytest.raises(ModelError, match=r"model.extra"):
        load_causal(folder)


# ---------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    """Folder of an adapter whose B is not zero; its base is a copy beside it, in ``base``."""
    pytest.importorskip("peft")
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    loaded = apply_lora(load_base(base), r=2)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_reward_model(loaded, tmp_path / "model", save_adapter=True)
    return tmp_path / "model" / "adapter"


def test_an_adapter_is_whole_and_so_is_its_base(adapter: Path, tmp_path: Path) -> None:
    file = "adapter_model.safetensors"
    once, twice = (RewardScorer(load_reward_model(adapter)) for _ in range(2))
    ids = [[1, 9, 10, 11, 2], [1, 12, 2]]
    plain = RewardScorer(load_reward_model(adapter.parent))
    np.testing.assert_allclose(once.score_encoded(ids), plain.score_encoded(ids), atol=1e-5)
    assert once.fingerprint() == twice.fingerprint()

    lacking = changed(adapter, tmp_path / "lacking", without("layers.1.mlp"), file)
    with pytest.raises(ModelError, match=r"the adapter lacks 6 weights .*layers.1.mlp"):
        load_reward_model(lacking)

    def misnamed(weights: Weights) -> Weights:
        return weights | {
            key.replace("layers.1", "layers.7"): value.clone()
            for key, value in weights.items()
            if "layers.1.mlp.up_proj" in key
        }

    surplus = changed(adapter, tmp_path / "surplus", misnamed, file)
    with pytest.raises(ModelError, match=r"has, for layers .* 2 weights .*layers.7"):
        load_reward_model(surplus)

    def wider(weights: Weights) -> Weights:
        return {
            k: v.repeat(2, 1) if k.endswith("q_proj.lora_A.weight") else v
            for k, v in weights.items()
        }

    wide = changed(adapter, tmp_path / "wider", wider, file)
    with pytest.raises(ModelError, match="does not fit its base"):
        load_reward_model(wide)

    base = tmp_path / "base" / "model.safetensors"
    save_file(without("layers.0.mlp")(load_file(base)), base, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 3 weights.*layers.0.mlp"):
        load_reward_model(adapter)


def test_an_adapter_of_a_base_that_was_given_a_pad_token(
    make_causal: Callable[..., Path], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    """peft then keeps the grown embeddings beside the adapter's own weights."""
    pytest.importorskip("peft")
    base = make_causal("qwen3", make_tokenizer(pad=False), tmp_path / "base")
    loaded = apply_lora(load_base(base), r=2)
    save_reward_model(loaded, tmp_path / "model", save_adapter=True)
    stored = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in stored)
    ids = [[1, 9, 10, 11, 2], [1, 12, 2]]
    one, two = (
        RewardScorer(load_reward_model(tmp_path / name)).score_encoded(ids)
        for name in ("model", "model/adapter")
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


# ---------------------------------------------------------------------- fingerprints


def test_a_fingerprint_covers_configuration_and_every_weight(
    tiny_reward: Path, tmp_path: Path
) -> None:
    known = model_fingerprint(load_reward_model(tiny_reward).model)
    moved = changed(tiny_reward, tmp_path / "moved", transformers_version="4.0.0")
    assert model_fingerprint(load_reward_model(moved).model) == known
    rope = {"rope_type": "default", "rope_theta": 77_777.0}
    others: dict[str, dict[str, Any]] = {
        "theta": {"rope_parameters": rope},
        "eps": {"rms_norm_eps": 1e-3},
    }
    found = {known}
    for name, config in others.items():
        folder = changed(tiny_reward, tmp_path / name, **config)
        found.add(model_fingerprint(load_reward_model(folder).model))
    model = load_reward_model(tiny_reward).model
    generator = np.random.default_rng(5)
    for name, parameter in list(model.named_parameters())[:6]:  # one value of one weight
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[int(generator.integers(parameter.numel()))] += 1e-3
        found.add(model_fingerprint(model))
        with torch.no_grad():
            parameter.copy_(before)
        assert model_fingerprint(model) == known, name
    assert len(found) == 9
    assert model_fingerprint(load_reward_model(tiny_reward, dtype="bfloat16").model) not in found


def test_a_file_is_not_gone_on_with_by_another_model(tiny_reward: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    rows.write_text('{"completion": "Ana buys 3 pens"}\n' * 3, encoding="utf-8")
    score_file(RewardScorer.from_pretrained(tiny_reward), rows, out)
    assert score_file(RewardScorer.from_pretrained(tiny_reward), rows, out).resumed_at == 3
    rope = {"rope_type": "default", "rope_theta": 77_777.0}
    other = changed(tiny_reward, tmp_path / "other", rope_parameters=rope)
    with pytest.raises(DataError, match=r"(?s)another model;.*--overwrite"):
        score_file(RewardScorer.from_pretrained(other), rows, out)


def test_the_judges_cache_knows_the_model(tiny_base: Path, tmp_path: Path) -> None:
    from companion.judge import LocalBackend

    rope = {"rope_type": "default", "rope_theta": 77_777.0}
    other = changed(tiny_base, tmp_path / "other", rope_parameters=rope)
    one, same, two = (LocalBackend.from_pretrained(f) for f in (tiny_base, tiny_base, other))
    assert one.identity() == same.identity() != two.identity()
    two.policy.model.generation_config.eos_token_id = [2, 3]
    assert two.identity()["end_tokens"] != one.identity()["end_tokens"]
