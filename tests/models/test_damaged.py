"""Folders that are damaged, or not there: what is wrong and the cure, never a traceback."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from companion import load_reward_model
from companion.errors import CompanionError, DataError, ModelError
from companion.formatting import RewardFormatter, formatter as module
from companion.models.memory import chosen_device


@pytest.fixture
def folder(tiny_reward, tmp_path):
    return shutil.copytree(tiny_reward, tmp_path / "model")


def _pickled(content: bytes):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def _changed(file: str, **fields):
    def damage(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def _written(file: str, content: bytes):
    return lambda folder: (folder / file).write_bytes(content)


DAMAGES = {
    "a pickle of nothing": _pickled(b""),
    "a pickle of noise": _pickled(b"\x80\x04noise"),
    "a manifest in Latin-1": _written("reward_manifest.json", "é".encode("latin-1")),
    "a deep manifest": _written("reward_manifest.json", b"[" * 100_000),
    "architectures of numbers": _changed("config.json", architectures=[1]),
    **{
        f"{what} for {file}": _written(file, content)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
        for what, content in {
            "nothing": b"",
            "noise": b"\xff\xfe\x00",
            "a list": b"[]",
            "depth": b'{"a":' * 5_000,
        }.items()
    },
    **{
        f"{key} {value!r}": _changed("reward_manifest.json", **{key: value})
        for key in ("formatter", "readout", "reference", "golden_texts")
        for value in (3, "x", [1])
    },
    **{
        f"{key} {value!r}": _changed("config.json", **{key: value})
        for key in ("hidden_size", "model_type", "id2label", "vocab_size")
        for value in (-1, "x", [1])
    },
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_named(what, folder):
    DAMAGES[what](folder)
    with pytest.raises(CompanionError):
        load_reward_model(folder)


def test_a_mistyped_folder_is_no_lost_connection(tiny_reward, tmp_path, monkeypatch):
    shutil.copytree(tiny_reward, tmp_path / "reward-model")
    monkeypatch.chdir(tmp_path)
    for name in ("reward-modle", "runs/reward", tmp_path / "reward-modle", "-", "modèle", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder") as stop:
            load_reward_model(name)
        assert ("did you mean" in stop.value.cure) == ("modle" in str(name))


TEMPLATES = {
    "divides by zero": "{{ 1 // 0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "counts too far": "{% for i in range(10 ** 9) %}{% endfor %}",
    "is none": "{% for %}",
    "takes an index that there is not": "{{ messages[7]['content'] + 'x' }}",
}
TALK = [{"role": "user", "content": "Ana"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_that_fails_is_an_error_of_the_row(what, make_tokenizer):
    formatter = RewardFormatter(make_tokenizer(), chat_template=TEMPLATES[what])
    with pytest.raises(DataError, match="the chat template refuses it"):
        formatter.encode(TALK)


def test_a_template_that_does_not_end(make_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_RENDERING", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    formatter = RewardFormatter(make_tokenizer(), chat_template=loop)
    with pytest.raises(ModelError, match=r"not come to its end after 0\.3 s"):
        formatter.encode(TALK)


@pytest.mark.parametrize("device", ["cuda:99", "nope", "", "meta", "mps:3", 7])
def test_a_device_that_is_not_there(device, tiny_reward):
    with pytest.raises(ModelError, match="cannot be used here") as stop:
        load_reward_model(tiny_reward, device=device)
    assert "cpu" in stop.value.cure


def test_the_devices_that_are_there():
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_adapters_base_beside_it(tiny_base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from companion import load_base
    from companion.models import apply_lora

    home = tmp_path / "home"
    shutil.copytree(tiny_base, home / "base")
    monkeypatch.chdir(home)
    model = apply_lora(load_base("base"), r=2)
    model.model.save_pretrained("adapter")
    model.tokenizer.save_pretrained("adapter")
    described = home / "adapter" / "adapter_config.json"
    assert json.loads(described.read_text())["base_model_name_or_path"] == "base"
    want = load_reward_model("adapter").model.score.weight
    monkeypatch.chdir(tmp_path)  # 'base' is no folder from here
    for relative in ("base", "../base"):
        fields = json.loads(described.read_text()) | {"base_model_name_or_path": relative}
        described.write_text(json.dumps(fields))
        assert torch.equal(load_reward_model(home / "adapter").model.score.weight, want)
