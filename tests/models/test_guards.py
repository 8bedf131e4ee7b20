"""Each case in which stock transformers gives a silently wrong score: shown, and guarded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from companion.engine import pad_batch, reward_scores, stock_scores
from companion.engine.forward import apply_head
from companion.errors import ModelError, ReadoutError, ShapeError
from companion.functional import position_ids_from_mask
from companion.models import (
    ScoreHead,
    check_batch,
    check_head,
    check_positions,
    check_tokenizer_and_config,
    load_base,
    load_reward_model,
    precision_notes,
)

IDS = [[1, 10, 11, 12, 13, 2], [1, 20, 21, 2], [1, 30, 31, 32, 2]]


@pytest.fixture
def loaded(tiny_base: Path) -> Any:
    reward_model = load_base(tiny_base)
    reward_model.model.eval()
    return reward_model


@pytest.fixture
def model(loaded: Any) -> Any:
    return loaded.model


def stock(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own forward, without a guard."""
    with torch.no_grad():
        return model(**batch).logits[:, 0].float()


def alone(model: Any, ids: list[int]) -> float:
    """The true score: a text in a row of its own, read at its last token."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        return float(model.score(hidden))


def true_scores(model: Any, rows: list[list[int]] = IDS) -> torch.Tensor:
    return torch.tensor([alone(model, ids) for ids in rows])


def test_a_good_batch_passes_and_is_right(model: Any) -> None:
    for side in ("right", "left"):
        batch = pad_batch(IDS, model.config.pad_token_id, side)
        torch.testing.assert_close(stock(model, batch), true_scores(model), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            stock_scores(model, **batch), true_scores(model), atol=1e-5, rtol=0
        )


def test_pad_id_none(model: Any) -> None:
    batch = pad_batch(IDS, model.config.pad_token_id)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        stock(model, batch)  # several rows: transformers raises
    one = pad_batch([IDS[1]], 8, pad_to_multiple_of=8)
    assert abs(float(stock(model, one)) - alone(model, IDS[1])) > 1e-2  # one row: silent
    for guarded in (batch, one):
        with pytest.raises(ReadoutError, match="pad_token_id is None"):
            check_batch(guarded["input_ids"], guarded["attention_mask"], model.config)


def test_pad_is_eos(loaded: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    eos = tokenizer.eos_token_id
    model.config.pad_token_id = eos
    finished = pad_batch([IDS[0]], eos)
    cut = pad_batch([IDS[0][:-1]], eos)
    # a finished and a cut-off text get the same score: stock reads the token before the EOS
    torch.testing.assert_close(stock(model, finished), stock(model, cut), atol=1e-5, rtol=0)
    assert abs(alone(model, IDS[0]) - alone(model, IDS[0][:-1])) > 1e-2
    with pytest.raises(ReadoutError, match="the pad id is the EOS id"):
        check_batch(finished["input_ids"], finished["attention_mask"], model.config)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ReadoutError, match="the pad token is the EOS"):
        check_tokenizer_and_config(tokenizer, model.config)


def test_config_pad_differs_from_the_tokenizers(loaded: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    batch = pad_batch(IDS, tokenizer.pad_token_id)
    model.config.pad_token_id = 0
    wrong = (stock(model, batch) - true_scores(model)).abs()
    assert float(wrong[1]) > 1e-2  # silently wrong
    with pytest.raises(ReadoutError, match="row 1: the masked tokens after its end"):
        check_batch(batch["input_ids"], batch["attention_mask"], model.config)
    with pytest.raises(ReadoutError, match=r"config.pad_token_id is 0, the tokenizer pads with 8"):
        check_tokenizer_and_config(tokenizer, model.config)


def test_masked_trailing_tokens_that_are_no_pad_ids(model: Any) -> None:
    batch = pad_batch(IDS, model.config.pad_token_id)
    batch["input_ids"][1, 4:] = 25
    assert abs(float(stock(model, batch)[1]) - alone(model, IDS[1])) > 1e-2
    with pytest.raises(ReadoutError, match="row 1: the masked tokens"):
        stock_scores(model, **batch)
    # the companion's own read-out goes by the mask and is right even so
    with torch.no_grad():
        scores = reward_scores(model, **batch, check=False)
    torch.testing.assert_close(scores, true_scores(model), atol=1e-5, rtol=0)


def test_row_of_nothing_but_padding(model: Any) -> None:
    pad = model.config.pad_token_id
    batch = pad_batch(IDS, pad)
    batch["input_ids"][2], batch["attention_mask"][2] = pad, 0
    assert torch.isfinite(stock(model, batch)[2])  # a score of position 0, and no error
    for call in (stock_scores, reward_scores):
        with pytest.raises(ReadoutError, match="row 2 of the attention mask is all padding"):
            call(model, **batch)


def test_text_that_ends_with_the_pad_id(model: Any) -> None:
    ids = [*IDS[0], model.config.pad_token_id]
    batch = pad_batch([ids], model.config.pad_token_id)
    assert abs(float(stock(model, batch)) - alone(model, ids)) > 1e-2
    with pytest.raises(ReadoutError, match="last real token is the pad id"):
        stock_scores(model, **batch)


def test_left_padding_of_absolute_positions(tiny_bases: Callable[[str], Path], model: Any) -> None:
    gpt2 = load_base(tiny_bases("gpt2")).model.eval()
    batch = pad_batch(IDS, gpt2.config.pad_token_id, "left")
    with torch.no_grad():
        true = torch.stack([reward_scores(gpt2, torch.tensor([ids]))[0] for ids in IDS])
    assert float((stock(gpt2, batch) - true).abs()[1]) > 1e-2  # silently wrong
    with pytest.raises(ReadoutError, match="absolute positions"):
        stock_scores(gpt2, **batch)
    positions = position_ids_from_mask(batch["attention_mask"])
    cured = stock_scores(gpt2, **batch, position_ids=positions)
    torch.testing.assert_close(cured, true, atol=1e-5, rtol=0)
    check_positions(model, batch["attention_mask"], None)  # RoPE: nothing to refuse


def test_packed_row(model: Any) -> None:
    packed = torch.tensor([IDS[0] + IDS[1]])
    ones = torch.ones_like(packed)
    positions = torch.tensor([[*range(len(IDS[0])), *range(len(IDS[1]))]])
    assert stock(model, {"input_ids": packed}).shape == (1,)  # one score for two texts
    with pytest.raises(ReadoutError, match="start again within the row"):
        check_batch(packed, ones, model.config, position_ids=positions)
    numbered = torch.tensor([[1] * len(IDS[0]) + [2] * len(IDS[1])])
    with pytest.raises(ReadoutError, match="packed row"):
        check_batch(packed, numbered, model.config)
    # padded rows with the positions that belong to them are no packed rows
    for side in ("left", "right"):
        batch = pad_batch(IDS, model.config.pad_token_id, side)
        own = position_ids_from_mask(batch["attention_mask"])
        check_batch(**batch, config=model.config, position_ids=own)


def test_mask_with_a_hole_and_wrong_shapes(model: Any) -> None:
    batch = pad_batch(IDS, model.config.pad_token_id)
    batch["attention_mask"][0, 2] = 0
    with pytest.raises(ReadoutError, match="row 0: the attention mask has a hole"):
        check_batch(**batch, config=model.config)
    with pytest.raises(ShapeError, match="both be"):
        check_batch(batch["input_ids"], batch["attention_mask"][:, 1:], model.config)


@pytest.mark.parametrize("side", ["right", "left"])
def test_two_bos(model: Any, side: Any) -> None:
    ids = [[1, *IDS[0]], IDS[1]]
    batch = pad_batch(ids, model.config.pad_token_id, side)
    assert abs(alone(model, ids[0]) - alone(model, IDS[0])) > 1e-3
    with pytest.raises(ReadoutError, match="row 0 begins with two BOS"):
        stock_scores(model, **batch)


def test_bf16_depends_on_the_batch(tiny_base: Path, tiny_texts: list[str]) -> None:
    loaded = load_base(tiny_base, dtype="bfloat16")
    model = loaded.model.eval()
    ids = [e.input_ids for e in loaded.formatter.encode_many(tiny_texts) if e is not None]
    single = torch.cat([reward_scores(model, torch.tensor([row])) for row in ids])
    batch = reward_scores(model, **pad_batch(ids, loaded.pad_token_id))
    assert float((single - batch).abs().max()) > 1e-4
    assert any("moves with its batch" in note for note in loaded.notes)
    assert precision_notes(load_base(tiny_base).model) == []


def test_head_under_autocast_keeps_scores_apart(tiny_base: Path) -> None:
    head = load_base(tiny_base).model.score
    plain = torch.nn.Linear(head.in_features, 1, bias=False)
    plain.weight = head.weight
    hidden = torch.randn(4000, head.in_features)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        distinct = {type(h): h(hidden).unique().numel() for h in (plain, head)}
    assert distinct[torch.nn.Linear] < 2500  # 4,000 rewards collapse
    assert distinct[ScoreHead] > 3950
    assert isinstance(head, ScoreHead)


def test_plain_head_is_named(tiny_base: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    assert any("plain nn.Linear" in note for note in precision_notes(model))
    # and yet the companion's forward keeps it in fp32
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, -1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert apply_head(model.score, hidden).dtype == torch.float32
            assert model.score(hidden).dtype == torch.bfloat16


def test_checkpoint_without_a_head(tiny_base: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    # transformers draws a head at random: two loads, two scores
    ids = torch.tensor([IDS[0]])
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        stock_model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
        scores.append(float(stock_model(ids).logits))
    assert abs(scores[0] - scores[1]) > 1e-2
    with pytest.raises(ModelError, match="has no head"):
        load_reward_model(tiny_base)


def test_heads_that_are_none(model: Any) -> None:
    with torch.no_grad():
        kept = model.score.weight.clone()
        model.score.weight.zero_()
        with pytest.raises(ModelError, match="all zero"):
            check_head(model)
        model.score.weight.fill_(float("nan"))
        with pytest.raises(ModelError, match="not all finite"):
            check_head(model)
        model.score.weight.copy_(kept)
    check_head(model)
    model.config.num_labels = 3
    with pytest.raises(ModelError, match="num_labels=3"):
        check_head(model)
    with pytest.raises(ModelError, match="no module 'score'"):
        check_head(_Headless())


class _Headless(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_labels": 1})()


def test_tokenizer_that_is_too_large_or_lacks_tokens(loaded: Any, make_tokenizer: Any) -> None:
    config = loaded.model.config
    larger = make_tokenizer()
    larger.add_tokens(["zebra"])
    with pytest.raises(ModelError, match="the model has embeddings for"):
        check_tokenizer_and_config(larger, config)
    with pytest.raises(ReadoutError, match="no pad token"):
        check_tokenizer_and_config(make_tokenizer(pad=False), config)
    endless = make_tokenizer()
    endless.eos_token = None
    with pytest.raises(ReadoutError, match="no EOS"):
        check_tokenizer_and_config(endless, config)


def test_load_refuses_what_the_guards_refuse(tiny_reward: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_reward, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    with pytest.raises(ReadoutError, match=r"config\.pad_token_id is 0"):
        load_reward_model(folder)
