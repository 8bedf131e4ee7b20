"""Loading bases and reward models, saving them, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from companion import RewardFormatter
from companion.engine import pad_batch, reward_scores
from companion.errors import ModelError, ReadoutError
from companion.models import (
    ReferenceStats,
    RewardManifest,
    apply_lora,
    load_base,
    load_reward_model,
    merged,
    save_reward_model,
)

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")
MESSAGES = [
    {"role": "user", "content": "Ana has 3 boxes . How many ?"},
    {"role": "assistant", "content": "the answer is 3"},
]


def ids_of(loaded: Any, texts: list[str]) -> list[list[int]]:
    return [e.input_ids for e in loaded.formatter.encode_many(texts) if e is not None]


# ---------------------------------------------------------------------- one score everywhere


@pytest.mark.parametrize("kind", KINDS)
def test_scores_agree_alone_batched_shuffled_padded_and_with_stock(
    kind: str,
    tiny_bases: Callable[[str], Path],
    tiny_rewards: Callable[[str], Path],
    tiny_texts: list[str],
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded = load_reward_model(tiny_rewards(kind))
    ids = ids_of(loaded, tiny_texts)
    pad = loaded.pad_token_id
    stock = AutoModelForSequenceClassification.from_pretrained(
        tiny_rewards(kind), dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_rewards(kind))
    with torch.no_grad():
        single = torch.cat([reward_scores(loaded.model, torch.tensor([row])) for row in ids])
        assert float(single.std()) > 0.05  # else agreement would say nothing
        for side in ("right", "left"):
            batched = reward_scores(loaded.model, **pad_batch(ids, pad, side))
            torch.testing.assert_close(batched, single, atol=1e-5, rtol=0)
        order = torch.randperm(len(ids))
        shuffled = reward_scores(loaded.model, **pad_batch([ids[i] for i in order], pad))
        torch.testing.assert_close(shuffled, single[order], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            stock(**pad_batch(ids, pad)).logits[:, 0], single, atol=1e-5, rtol=0
        )
        # stock from raw text to score: its tokenizer gives the formatter's ids
        stock_ids = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
        encoded = loaded.formatter.encode(MESSAGES)
        assert encoded is not None
        assert stock_ids == encoded.input_ids
        # and the weights did not change on their way through the disk
        before = load_base(tiny_bases(kind))
        again = reward_scores(before.model.eval(), **pad_batch(ids, pad))
        torch.testing.assert_close(again, single, atol=1e-5, rtol=0)


def test_gradient_reaches_head_and_backbone(tiny_base: Path) -> None:
    model = load_base(tiny_base).model
    reward_scores(model, **pad_batch([[1, 9, 10, 2], [1, 11, 2]], 8)).sum().backward()
    assert float(model.score.weight.grad.abs().sum()) > 0
    assert float(model.get_input_embeddings().weight.grad[9].abs().sum()) > 0


# ---------------------------------------------------------------------- bases


def test_base_is_reproducible_without_dropout_and_one_label(tiny_bases: Any) -> None:
    folder = tiny_bases("gpt2")  # GPT-2's default dropout is 0.1
    one, two = load_base(folder, head_seed=3), load_base(folder, head_seed=3)
    other = load_base(folder, head_seed=4)
    assert torch.equal(one.model.score.weight, two.model.score.weight)
    assert not torch.equal(one.model.score.weight, other.model.score.weight)
    assert any("dropout switched off" in note for note in one.notes)
    one.model.train()
    ids = torch.tensor([[1, 9, 10, 2]])
    assert float(reward_scores(one.model, ids)) == float(reward_scores(one.model, ids))
    assert (one.model.config.num_labels, one.model.config.problem_type) == (1, "regression")
    std = load_base(folder, head_std=0.5).model.score.weight.std()
    assert 0.3 < float(std) < 0.7


def test_pad_token_is_added_and_embeddings_grow(
    make_tokenizer: Any, make_causal: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(pad=False, chat_template=None)
    folder = make_causal("llama", tokenizer, tmp_path / "base", pad_token_id=None)
    loaded = load_base(folder)
    rows = len(tokenizer)
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == rows
    assert loaded.model.get_input_embeddings().weight.shape[0] == rows + 1
    text = "\n".join(loaded.notes)
    for words in ("no pad token", "embeddings grown", "fresh head", "no chat template"):
        assert words in text
    save_reward_model(loaded, tmp_path / "saved")
    again = load_reward_model(tmp_path / "saved")
    encoded = again.formatter.encode(MESSAGES)
    assert encoded is not None
    ids = torch.tensor([encoded.input_ids])
    assert float(reward_scores(again.model, ids)) == float(reward_scores(loaded.model, ids))


def test_spare_rows_and_reserved_tokens_are_used(
    make_tokenizer: Any, make_causal: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(pad=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|fim_pad|>"]})
    reserved = tokenizer.convert_tokens_to_ids("<|fim_pad|>")
    tokenizer.pad_token = tokenizer.eos_token  # as TRL falls back
    folder = make_causal("qwen3", tokenizer, tmp_path / "reserved", vocab_size=128)
    loaded = load_base(folder)
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == reserved
    assert any("pad token is its EOS" in note for note in loaded.notes)

    bare = make_tokenizer(pad=False)
    spare = load_base(make_causal("qwen3", bare, tmp_path / "spare", vocab_size=128))
    assert spare.tokenizer.pad_token == "<|pad|>"
    assert spare.model.get_input_embeddings().weight.shape[0] == 128  # no need to grow


def test_config_pad_id_is_repaired(make_tokenizer: Any, make_causal: Any, tmp_path: Path) -> None:
    loaded = load_base(make_causal("llama", make_tokenizer(), tmp_path, pad_token_id=0))
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    assert any("config.pad_token_id was 0" in note for note in loaded.notes)


def test_base_without_eos_is_refused(make_tokenizer: Any, make_causal: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    with pytest.raises(ReadoutError, match="no EOS") as caught:
        load_base(make_causal("llama", tokenizer, tmp_path))
    assert "tokenizer.eos_token = " in str(caught.value)


def test_head_of_an_earlier_reward_model(tiny_reward: Path, tiny_base: Path) -> None:
    trained = load_reward_model(tiny_reward)
    kept = load_base(tiny_reward, keep_head=True, head_seed=9)
    fresh = load_base(tiny_reward, head_seed=9)
    assert torch.equal(kept.model.score.weight, trained.model.score.weight)
    assert not torch.equal(fresh.model.score.weight, trained.model.score.weight)
    assert any("in place of the checkpoint's own" in note for note in fresh.notes)
    with pytest.raises(ModelError, match="has no head"):
        load_base(tiny_base, keep_head=True)


def test_half_precision_keeps_the_head(tiny_reward: Path) -> None:
    half = load_reward_model(tiny_reward, dtype="bfloat16")
    full = load_reward_model(tiny_reward)
    assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(half.model.score.weight, full.model.score.weight)
    scores = reward_scores(half.model, torch.tensor([[1, 9, 10, 2]]))
    assert scores.dtype == torch.float32
    logits = half.model(input_ids=torch.tensor([[1, 9, 10, 2]])).logits  # stock forward runs too
    assert logits.dtype == torch.float32
    with pytest.raises(ModelError, match="dtype"):
        load_reward_model(tiny_reward, dtype="int8")


# ---------------------------------------------------------------------- what is refused


def test_wrong_folders(tmp_path: Path, tiny_reward: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_reward_model(tmp_path / "nothing" / "there")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_reward_model(tmp_path)
    shutil.copytree(tiny_reward, tmp_path / "checkpoint-1")
    with pytest.raises(ModelError, match=r"did you mean .*checkpoint-1"):
        load_base(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        load_base(tiny_reward / "config.json")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base("nobody/no-such-model")


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_damaged_and_foreign_checkpoints(tiny_reward: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_reward, tmp_path / name))

    labels = copy("labels")
    _edit(labels, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    with pytest.raises(ModelError, match="num_labels is 2"):
        load_reward_model(labels)
    with pytest.raises(ModelError, match="classifier of 2 labels"):
        load_base(labels)

    weights = load_file(tiny_reward / "model.safetensors")
    headless = copy("headless")
    save_file(
        {k: v for k, v in weights.items() if k != "score.weight"},
        headless / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match="has no head"):
        load_reward_model(headless)

    gap = copy("gap")
    save_file(
        {k: v for k, v in weights.items() if "layers.1.mlp" not in k},
        gap / "model.safetensors",
        metadata={"format": "pt"},
    )
    for load in (load_reward_model, load_base):
        with pytest.raises(ModelError, match="lacks 3 weights"):
            load(gap)

    torn = copy("torn")
    whole = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="damaged"):
        load_reward_model(torn)

    zero = copy("zero")
    save_file(
        {k: torch.zeros_like(v) if k == "score.weight" else v for k, v in weights.items()},
        zero / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelError, match="all zero"):
        load_reward_model(zero)

    speechless = copy("speechless")
    for file in speechless.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_reward_model(speechless)


def test_encoders_are_refused(make_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig

    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"decoder|backbone"):
        load_base(tmp_path)


# ---------------------------------------------------------------------- manifest on disk


def test_manifest_is_optional_but_binding(
    tiny_reward: Path, tmp_path: Path, make_tokenizer: Any
) -> None:
    bare = Path(shutil.copytree(tiny_reward, tmp_path / "bare"))
    (bare / "reward_manifest.json").unlink()
    loaded = load_reward_model(bare)
    assert loaded.manifest is None
    assert any("the formatter's recipe was found" in note for note in loaded.notes)
    (bare / "reward_formatter.json").unlink()
    loaded = load_reward_model(bare)
    assert any("not saved by the companion" in note for note in loaded.notes)
    whole = load_reward_model(tiny_reward)
    assert loaded.formatter.encode(MESSAGES) == whole.formatter.encode(MESSAGES)

    other = Path(shutil.copytree(tiny_reward, tmp_path / "other"))
    changed = make_tokenizer()
    changed.chat_template = changed.chat_template.replace("<|end|>", "")
    changed.eos_token = "<|end|>"
    changed.save_pretrained(other)
    with pytest.raises(ModelError, match="the tokenizer is not the one"):
        load_reward_model(other)

    edited = Path(shutil.copytree(tiny_reward, tmp_path / "edited"))
    text = (edited / "reward_manifest.json").read_text()
    (edited / "reward_manifest.json").write_text(
        text.replace('"overlong": "drop"', '"overlong": "error"')
    )
    with pytest.raises(ModelError, match="the file was edited"):
        load_reward_model(edited)


def test_template_that_was_swapped_is_overridden_by_the_recipe(
    tiny_reward: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_reward, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    loaded, whole = load_reward_model(folder), load_reward_model(tiny_reward)
    assert loaded.formatter.encode(MESSAGES) == whole.formatter.encode(MESSAGES)


def test_save_keeps_what_it_is_given(tiny_base: Path, tmp_path: Path) -> None:
    loaded = load_base(tiny_base, max_length=64, overlong="truncate_prompt")
    manifest = RewardManifest(
        reference=ReferenceStats.from_scores([0.0, 1.0, 2.0], "three"),
        temperature=1.5,
        metrics={"accuracy": 0.7, "broken": float("nan")},
        base_model="tiny",
    )
    save_reward_model(loaded, tmp_path, manifest)
    again = load_reward_model(tmp_path)
    assert again.manifest is not None
    assert again.manifest.reference == manifest.reference
    assert (again.manifest.temperature, again.manifest.base_model) == (1.5, "tiny")
    assert again.manifest.metrics == {"accuracy": 0.7, "broken": None}
    assert (again.formatter.max_length, again.formatter.overlong) == (64, "truncate_prompt")
    assert set(again.manifest.versions) >= {"companion", "torch", "transformers"}
    assert any("fresh head" in note for note in again.manifest.notes)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["problem_type"] == "regression"  # vLLM then returns the raw score
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]


def test_save_refuses_a_model_whose_scores_would_be_wrong(tiny_base: Path, tmp_path: Path) -> None:
    loaded = load_base(tiny_base)
    loaded.model.config.pad_token_id = 0
    with pytest.raises(ReadoutError, match="pad_token_id"):
        save_reward_model(loaded, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_problem_type_is_repaired_with_a_note(tiny_reward: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_reward, tmp_path / "model"))
    _edit(folder, problem_type=None)
    loaded = load_reward_model(folder)
    assert loaded.model.config.problem_type == "regression"
    assert any("problem_type" in note for note in loaded.notes)


# ---------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_lora_trains_saves_and_merges_the_head(
    kind: str, tiny_bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    loaded = apply_lora(load_base(tiny_bases(kind)), r=4)
    batch = pad_batch([[1, 9, 10, 2], [1, 11, 2]], loaded.pad_token_id)
    start = reward_scores(loaded.model, **batch).detach()
    optimizer = torch.optim.SGD([p for p in loaded.model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        loss = -reward_scores(loaded.model, **batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loaded.model.eval()
    with torch.no_grad():
        trained = reward_scores(loaded.model, **batch)
    base = load_base(tiny_bases(kind))
    assert float((trained - start).abs().max()) > 1e-2
    save_reward_model(loaded, tmp_path / "out", save_adapter=True)
    plain, adapter = (
        load_reward_model(tmp_path / "out"),
        load_reward_model(tmp_path / "out/adapter"),
    )
    assert not torch.equal(plain.model.score.weight, base.model.score.weight)
    with torch.no_grad():
        for other in (plain.model, adapter.model, merged(loaded.model)):
            torch.testing.assert_close(reward_scores(other, **batch), trained, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(reward_scores(base.model, **batch), trained, atol=1e-2)


def test_adapter_without_the_head_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    loaded = load_base(tiny_base)
    wrong = peft.get_peft_model(
        loaded.model, peft.LoraConfig(target_modules=["q_proj"], r=2)
    )  # what a plain LoRA run does: no task type, no modules_to_save
    wrong.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not hold the head"):
        load_reward_model(tmp_path)
    with pytest.raises(ModelError, match="holds a LoRA adapter"):
        load_base(tmp_path)


def test_formatter_of_a_loaded_model_is_the_one_that_was_saved(tiny_reward: Path) -> None:
    loaded = load_reward_model(tiny_reward)
    assert loaded.manifest is not None
    assert loaded.formatter.fingerprint() == loaded.manifest.formatter_fingerprint
    assert loaded.formatter.fingerprint() == RewardFormatter(loaded.tokenizer).fingerprint()
