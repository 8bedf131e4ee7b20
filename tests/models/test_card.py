"""The model card: made from the manifest, nothing missing is 'None', and what it says runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from companion import RewardScorer, load_base, load_reward_model, save_reward_model
from companion.models import RewardManifest
from companion.models.card import MARK, is_hub_id, model_card, write_card

SAVED = Path(__file__).parents[1] / "assets" / "before_0_2"
ROW = {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "completion": "4."}


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.S)


def run(code: str, names: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["pairwise", "outcome", "process"])
def test_what_the_card_says_runs_and_gives_the_score(kind: str) -> None:
    """The code blocks, as typed; transformers' score is the companion's."""
    model = load_reward_model(SAVED / kind)
    assert model.manifest is not None
    card = model_card(model.manifest, model.formatter, model_id=str(SAVED / kind))
    blocks, names = code_of(card), dict[str, Any]()
    run(blocks[0], names)
    assert names["scores"].raw.shape == (1,)
    if kind == "pairwise":
        run(blocks[1].replace("your/policy", str(SAVED / kind)), names)
        stock = float(run(blocks[2], names))
        assert stock == pytest.approx(names["scorer"].score([ROW]).raw[0], abs=1e-5)
        wrong = names["tokenizer"](names["text"], return_tensors="pt")["input_ids"]
        assert wrong.shape[1] > names["batch"]["input_ids"].shape[1], "two BOS, of which it warns"
        assert "add_special_tokens=False" in card
    text = model.formatter.tokenizer.decode(model.formatter.encode_row(ROW).input_ids)
    assert f"~~~text\n{text}\n~~~" in card


def test_text_models_are_called_with_text(tiny_reward: Path) -> None:
    model = load_reward_model(tiny_reward)
    manifest = model.manifest
    assert manifest is not None
    manifest.formatter = {**manifest.formatter, "text": "plain"}
    card = model_card(manifest, model.formatter, model_id=str(tiny_reward))
    names: dict[str, Any] = {}
    blocks = code_of(card)
    run(blocks[0], names)
    stock = float(run(blocks[2], names))
    assert stock == pytest.approx(names["scores"].raw[0], abs=1e-5)
    assert "joined as they are" in card
    manifest.formatter = {**manifest.formatter, "text": "chat", "date": "26 Jul 2024"}
    manifest.formatter["split_special_tokens"] = True
    card = model_card(manifest, model.formatter, model_id="me/x")
    for said in ("as one question of the user", "26 Jul 2024", "Special tokens inside"):
        assert said in card


def test_what_is_not_known_is_left_out() -> None:
    """From nothing to everything, a field less each time: no None, no empty section."""
    full = RewardManifest.load(SAVED / "pairwise")
    cards = [model_card(RewardManifest(), model_id="x"), model_card(full, model_id="x")]
    empty: dict[str, Any] = {
        "reference": None, "temperature": None, "metrics": {}, "data": {}, "training": {},
        "versions": {}, "base_model": None, "created": None, "notes": [], "formatter": {},
    }  # fmt: skip
    for name, value in empty.items():
        part = RewardManifest.load(SAVED / "pairwise")
        setattr(part, name, value)
        cards.append(model_card(part, model_id="x"))
    part = RewardManifest.load(SAVED / "pairwise")
    part.metrics |= {"accuracy_interval": [float("nan"), None], "loss": None, "ece": float("nan")}
    part.data["train"] = {"source": None, "rows": 3}
    part.training |= {"seed": None, "lora": {"r": 8, "target_modules": None}}
    cards.append(model_card(part, model_id="x"))
    for card in cards:
        assert not re.search(r"\bNone\b|\bnan\b|\bnull\b", card)
        assert not re.search(r"^## .*\n+(## |\Z)", card, flags=re.M), "a section without a line"
        ModelCard(card)
    assert len(set(cards)) == len(cards)
    assert "lora | r 8 |" in cards[-1]


def test_hub_ids_stand_in_the_header_and_paths_nowhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/base").mkdir(parents=True)
    for name, expected in {
        "Qwen/Qwen3-0.6B": True, "trl-lib/ultrafeedback_binarized": True, "runs/base": False,
        "runs/pairs.jsonl": False, "/home/ann/base": False, "a/b/c": False, "gpt2": False,
    }.items():  # fmt: skip
        assert is_hub_id(name) is expected, name
    manifest = RewardManifest(base_model="Qwen/Qwen3-0.6B")
    manifest.data = {
        "train": {"source": "trl-lib/ultrafeedback_binarized", "sha256": "a" * 64, "kept": 1200},
        "held_out": {"source": "trl-lib/ultrafeedback_binarized [test[:100]]", "kept": 9},
        "more": {"source": "/home/ann/secret place/pairs.jsonl [x]", "rows": 4, "kept": 3},
    }
    card = ModelCard(model_card(manifest, model_id="me/x"))
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert "`pairs.jsonl [x]` | 3 of 4" in card.text
    assert "ultrafeedback_binarized [test[:100]]` | 9 |" in card.text
    assert "ann" not in card.content
    manifest.base_model = "/home/ann/base"
    assert ModelCard(model_card(manifest, model_id="me/x")).data.base_model is None


def test_a_card_by_hand_stays_and_drafts_do_not(
    tiny_reward: Path, tmp_path: Path, caplog: Any
) -> None:
    model = load_reward_model(tiny_reward)
    path = tmp_path / "README.md"
    by_hand = "---\nlicense: mit\n---\n# Mine\n"
    drafts = [
        "---\ntags:\n- generated_from_trainer\n---\n# Model Card for [None]\n",
        "---\nlibrary_name: peft\n---\n[More Information Needed]\n",
        f"# anything\n{MARK}\n",
    ]
    for draft in drafts:
        path.write_text(draft)
        assert write_card(tmp_path, RewardManifest()) == path
        assert path.read_text() == model_card(RewardManifest(), model_id=tmp_path.name)
    for text in (by_hand, "no header", "---\n: [\n---\n", path.read_text().replace(MARK, "")):
        path.write_text(text)
        save_reward_model(model, tmp_path)
        assert path.read_text() == text
    assert "stays as it is" in caplog.text


def test_the_counts_of_the_formatter_are_the_users(tiny_base: Path, tmp_path: Path) -> None:
    model = load_base(tiny_base)
    RewardScorer(model).score([ROW])
    before = model.formatter.counts.to_dict()
    save_reward_model(model, tmp_path)
    assert model.formatter.counts.to_dict() == before
