"""Token-level models: what is saved is what stock transformers loads; wrong folders are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from companion import RewardManifest, RewardScorer, TokenScorer
from companion.engine import pad_batch, token_logits
from companion.errors import DataError, ModelError
from companion.formatting import encode_steps
from companion.models import (
    TokenReadout,
    apply_lora,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.models.guards import prepare_token_head
from companion.models.manifest import MANIFEST_FILE

PROCESS = TokenReadout("process", 3, "min", separator="so", step_score="good")


@pytest.fixture
def saved(tiny_bases: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def make(kind: str = "qwen3", readout: TokenReadout = PROCESS) -> Path:
        base = load_base(tiny_bases(kind), labels=readout.labels)
        folder = tmp_path / f"{kind}-{readout.kind}"
        save_reward_model(base, folder, RewardManifest(readout=readout.to_dict()))
        return folder

    return make


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "gpt2"])
def test_stock_transformers_gives_the_same_numbers(saved: Any, kind: str) -> None:
    folder = saved(kind)
    loaded = load_reward_model(folder)
    assert loaded.readout == PROCESS
    stock = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32)
    assert stock.config.id2label == {0: "bad", 1: "neutral", 2: "good"}
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == loaded.pad_token_id
    stock.train()  # the head's dropout of 0.1 stays off, in training too
    ids = [[9, 10, 11, 12, 2], [9, 13, 2], [14, 2]]
    for side in ("right", "left"):
        batch = pad_batch(ids, loaded.pad_token_id, side)  # type: ignore[arg-type]
        with torch.no_grad():
            found = token_logits(loaded.model, **batch)
        for row, text in enumerate(ids):
            with torch.no_grad():
                expected = stock(input_ids=torch.tensor([text])).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(found[row, real], expected, atol=1e-5, rtol=1e-5)


def test_training_can_go_on_with_a_saved_head(saved: Any) -> None:
    folder = saved("gpt2")
    loaded = load_reward_model(folder)
    again = load_base(folder, labels=3, keep_head=True)
    fresh = load_base(folder, labels=3, head_seed=1)
    ids = torch.tensor([[9, 10, 2]])
    with torch.no_grad():
        expected, kept, drawn = (token_logits(m.model, ids) for m in (loaded, again, fresh))
    torch.testing.assert_close(kept, expected)
    assert not torch.allclose(drawn, expected)
    assert any("went on with the head" in note for note in again.notes)


def test_stock_token_heads_have_dropout(tiny_base: Path) -> None:
    stock = AutoModelForTokenClassification.from_pretrained(tiny_base, num_labels=1)
    assert stock.dropout.p == 0.1
    assert load_base(tiny_base, labels=1).model.dropout.p == 0.0


def test_each_kind_of_folder_names_the_class_to_take(saved: Any, tiny_reward: Path) -> None:
    for readout in (PROCESS, TokenReadout("outcome")):
        folder = saved(readout=readout)
        with pytest.raises(ModelError, match=r"companion\.scoring\.TokenScorer"):
            RewardScorer.from_pretrained(folder)
        with pytest.raises(ModelError, match=r"companion\.scoring\.TokenScorer"):
            RewardScorer(load_reward_model(folder))
        (folder / MANIFEST_FILE).unlink()
        for load in (load_reward_model, RewardScorer.from_pretrained):
            with pytest.raises(ModelError, match="nothing says what the values"):
                load(folder)
    with pytest.raises(ModelError, match=r"companion\.scoring\.RewardScorer"):
        TokenScorer.from_pretrained(tiny_reward)


def test_what_is_no_token_model_is_refused(saved: Any, tiny_base: Path, tiny_reward: Path) -> None:
    with pytest.raises(ModelError, match="nothing says what the values"):
        TokenScorer.from_pretrained(tiny_base)
    with pytest.raises(ModelError, match="labels is 2"):
        load_base(tiny_base, labels=2)
    with pytest.raises(ModelError, match="is a classifier of 1 labels"):
        load_base(tiny_reward, labels=3)
    base = load_base(tiny_base, labels=1)
    with pytest.raises(ModelError, match="has 1 labels, this training needs 3"):
        prepare_token_head(base.model, 3)
    with torch.no_grad():
        base.model.score.weight.zero_()
    with pytest.raises(ModelError, match="all zero"):
        prepare_token_head(base.model, 1)
    folder = saved()
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for field, value, message in (
        ("aggregation", "median", "the read-out's aggregation is 'median'"),
        ("labels", 4, "the read-out's labels is 4"),
        ("colour", "red", "the field 'readout' is malformed"),
        ("rule", "guess", "the read-out rule is 'guess'"),
    ):
        changed = {**manifest, "readout": {**manifest["readout"], field: value}}
        (folder / MANIFEST_FILE).write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=message):
            load_reward_model(folder)


def test_step_scores() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5]]))
    assert float(PROCESS.values(logits)) == pytest.approx(0.5)
    expected = TokenReadout("process", 3, "min", separator="so")
    # the expected label is 0.5 − 0.2 = 0.3; moved from [−1, 1] to [0, 1]
    assert float(expected.values(logits)) == pytest.approx((0.3 + 1) / 2)
    assert float(PROCESS.wrong(logits)) == pytest.approx(0.2)
    one = TokenReadout("outcome")
    assert float(one.values(torch.tensor([0.7])) + one.wrong(torch.tensor([0.7]))) == pytest.approx(
        1
    )


def test_a_model_is_not_saved_without_its_readout(tiny_base: Path, tmp_path: Path) -> None:
    base = load_base(tiny_base, labels=1)
    assert base.readout is None
    with pytest.raises(ModelError, match="nothing says how they are read"):
        save_reward_model(base, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    base.readout = TokenReadout("outcome", aggregation="mean")
    manifest = save_reward_model(base, tmp_path / "b")
    assert manifest.readout == base.readout.to_dict()
    again = load_reward_model(tmp_path / "b")
    assert again.readout == base.readout
    # a model takes its read-out along, whatever manifest it is given
    save_reward_model(again, tmp_path / "c", RewardManifest())
    assert load_reward_model(tmp_path / "c").readout == base.readout


def test_an_adapter_of_a_token_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = apply_lora(load_base(tiny_base, labels=1), r=2)
    base.readout = TokenReadout("outcome")
    save_reward_model(base, tmp_path, save_adapter=True)
    with pytest.raises(ModelError, match="adapter of an outcome or process model"):
        load_reward_model(tmp_path / "adapter")
    assert load_reward_model(tmp_path).readout == base.readout


def test_the_head_is_not_rounded_in_half_precision(saved: Any) -> None:
    folder = saved("gpt2")
    whole, half = (load_reward_model(folder, dtype=d) for d in ("float32", "bfloat16"))
    assert half.model.transformer.wte.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.classifier.weight, whole.model.classifier.weight)


def test_pairs_of_solutions(saved: Any) -> None:
    scorer = TokenScorer.from_pretrained(saved(), device="cpu")
    rows = [
        {"prompt": "Ana has 3", "chosen": "yes so no", "rejected": "no so no so yes"},
        {"prompt": "Ana has 3", "chosen": "yes", "rejected": "no ", "rejected_terminated": False},
        {"prompt": "Ana has 3", "chosen": "yes"},
    ]
    pairs = scorer.score_pairs(rows, on_error="skip")
    assert [reason is None for reason in pairs.reasons] == [True, True, False]
    for side in ("chosen", "rejected"):
        alone = scorer.score(rows[:2], field=side)
        np.testing.assert_allclose(getattr(pairs, side)[:2], alone.raw, atol=1e-6)
    encoded = scorer.score_encoded(
        encode_steps(
            scorer.formatter, [{"prompt": "Ana has 3", "completions": ["yes ", " no"]}], "so"
        )  # type: ignore[arg-type]
    )
    assert encoded[0] == pytest.approx(
        scorer.score([{**rows[0], "completion": "yes so no"}]).raw[0]
    )
    with pytest.raises(DataError, match="text 0: nothing says which of its tokens"):
        scorer.score_encoded([[9, 10, 2]])
