"""Pad tokens of published models: what is missing is repaired, what is ambiguous is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from companion import RewardScorer, load_reward_model, save_reward_model
from companion.cli.main import main
from companion.errors import ModelError, ReadoutError
from companion.models.readout import ReadAs
from companion.scoring import load_scorer

ROWS = [
    {"prompt": "Ana has 3", "completion": "the answer is 3"},
    {"prompt": "Ana has 3 boxes", "completion": "the answer is 5 . the answer is 3"},
    {"prompt": "How many", "completion": "3"},
    {"prompt": "Ana has", "completion": "boxes", "terminated": False},
]


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "gone"}))


@pytest.fixture
def publish(make_tokenizer: Callable[..., Any], make_config: Any, tmp_path: Path) -> Any:
    """A sequence classifier as transformers saves it, with the pads that a test wants."""
    from transformers import AutoModelForSequenceClassification

    def make(kind: str, in_tokenizer: str | None, in_config: str | None, **more: Any) -> Path:
        folder = tmp_path / f"{kind}-{in_tokenizer}-{in_config}"
        tokenizer = make_tokenizer(pad=in_tokenizer == "<pad>" or in_config == "<pad>")
        tokenizer.chat_template = None
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "</s>")}
        torch.manual_seed(3)
        config = make_config(kind, tokenizer, num_labels=1, problem_type="regression", **more)
        config.pad_token_id = ids[in_config] if in_config else None
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(folder)
        tokenizer.pad_token = in_tokenizer
        tokenizer.save_pretrained(folder)
        return folder

    return make


def by_hand(folder: Path, rows: list[dict[str, Any]], read: str) -> np.ndarray:
    """Each text alone, without padding: backbone, the token that is read, the stored head."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    weight = load_file(folder / "model.safetensors")["score.weight"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        ids += [tokenizer.eos_token_id] * row.get("terminated", True)
        at = len(ids) - 1
        while read == "transformers" and ids[at] == tokenizer.eos_token_id:
            at -= 1
        with torch.no_grad():
            scores.append(float(backbone(torch.tensor([ids])).last_hidden_state[0, at] @ weight[0]))
    assert np.std(scores) > 0.05
    return np.array(scores)


@pytest.mark.parametrize("kind", ["mistral", "llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(
    ("in_tokenizer", "in_config", "said"),
    [
        (None, None, "the tokenizer has no pad token"),
        (None, "<pad>", "that of the configuration, '<pad>'"),
        ("<pad>", None, "config.pad_token_id was None"),
    ],
)
def test_a_missing_pad_is_repaired_and_said(
    kind: str, in_tokenizer: str | None, in_config: str | None, said: str, publish: Any
) -> None:
    folder = publish(kind, in_tokenizer, in_config)
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    assert any(said in note for note in scorer.notes), scorer.notes
    want = by_hand(folder, ROWS, "mask")
    np.testing.assert_allclose(scorer.score(ROWS).raw, want, atol=1e-5)
    packing_off = RewardScorer(scorer.reward_model, packing="off")
    np.testing.assert_allclose(packing_off.score(ROWS).raw, want, atol=1e-5)


def test_pad_is_eos_asks_and_each_answer_is_right(publish: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = publish("llama", "</s>", "</s>")
    with pytest.raises(ReadoutError, match="the pad token is the EOS") as caught:
        load_reward_model(folder)
    assert "--readout transformers" in str(caught.value)
    found = {}
    for read in ("mask", "transformers"):
        as_read = ReadAs(readout=read)  # type: ignore[arg-type]
        scorer = RewardScorer.from_pretrained(folder, device="cpu", read_as=as_read)
        found[read] = scorer.score(ROWS).raw
        np.testing.assert_allclose(found[read], by_hand(folder, ROWS, read), atol=1e-5)
        (said,) = [note for note in scorer.notes if "differ by up to" in note]
        assert f"read as {read!r}" in said
    assert np.abs(found["mask"] - found["transformers"])[:3].min() > 1e-3
    # the name is kept: stock transformers, in a padded batch of finished texts
    stock = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [row["prompt"] + row["completion"] + "</s>" for row in ROWS[:3]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = stock(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, 0]
    np.testing.assert_allclose(found["transformers"][:3], logits.numpy(), atol=1e-5)
    # saved by the companion it keeps its read-out, and needs no flag
    loaded = load_reward_model(folder, read_as=ReadAs(readout="transformers"))
    save_reward_model(loaded, tmp_path / "saved")
    again = RewardScorer.from_pretrained(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.score(ROWS).raw, found["transformers"], atol=1e-5)
    with pytest.raises(ModelError, match="says how it is read"):
        load_scorer(tmp_path / "saved", read_as=ReadAs(readout="mask"))


def test_a_token_of_a_text_that_is_skipped_is_never_the_whole(publish: Any) -> None:
    folder = publish("llama", "</s>", "</s>")
    scorer = RewardScorer.from_pretrained(
        folder, device="cpu", read_as=ReadAs(readout="transformers")
    )
    eos = 2
    one, two = scorer.score_encoded([[5, eos, 6, eos, eos], [5, eos, 6]])
    assert one == two  # an EOS within the text stays
    (all_eos,) = scorer.score_encoded([[eos, eos]])
    assert all_eos == scorer.score_encoded([[eos]])[0]


def test_the_flag_is_one_of_every_command(
    publish: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish("qwen2", "</s>", "</s>")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "out.jsonl"
    score = ["score", "--model", str(folder), "--input", str(rows), "--output", str(out)]
    assert main([*score, "--device", "cpu"]) == 2
    assert "--readout mask" in capsys.readouterr().err
    assert main([*score, "--device", "cpu", "--readout", "transformers"]) == 0
    assert "differ by up to" in capsys.readouterr().err
    found = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(found, by_hand(folder, ROWS, "transformers"), atol=1e-5)
    for command in ("evaluate", "rank", "serve"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--readout {mask,transformers}" in capsys.readouterr().out


def test_the_formatter_for_a_server_makes_the_same_ids(publish: Any) -> None:
    from companion.models import load_formatter
    from companion.scoring import RemoteScorer

    folder = publish("llama", "</s>", "</s>")
    how = ReadAs(readout="transformers")
    local = RewardScorer.from_pretrained(folder, device="cpu", read_as=how)
    remote = RemoteScorer.from_pretrained("http://127.0.0.1:9", folder, read_as=how)
    ids = [[t.input_ids for t in s.prepare(ROWS).texts] for s in (local, remote)]
    assert ids[0] == ids[1]
    with pytest.raises(ReadoutError, match="nothing says at which"):
        load_formatter(folder)
