"""What holds for every kind: resume, packing, refusals, a whole run and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from example_kinds import KINDS, QUIET, Example
from transformers import TrainerCallback

from companion import RewardScorer
from companion.cli.train import parse
from companion.errors import CompanionError, DataError, ModelError
from companion.training import load_kind

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)


@kinds
def test_resumed_run_gives_the_same_weights(kind: Example, tiny_base: Path, tmp_path: Path) -> None:
    """Resumed in the middle of the second epoch, whose order differs from the first's."""
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 5,
        "save_total_limit": None,
    }

    def train(resume: str | None) -> dict[str, torch.Tensor]:
        trainer = kind.trainer(tiny_base, tmp_path, **settings)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 8
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    whole, resumed = train(None), train(f"{tmp_path}/checkpoint-5")
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) == 0.0


@kinds
def test_scores_that_are_not_finite_stop_the_run(
    kind: Example, tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{**row, "row": 10 + i} for i, row in enumerate(kind.ids(4))]
    bad = rows[2]
    text = bad.get("input_ids") or bad.get("chosen_ids") or bad["completion_ids"][0]
    text[4] = 61  # no other row has it
    trainer = kind.trainer(tiny_base, tmp_path, rows=rows)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[61] = float("nan")
    with pytest.raises(ModelError, match="not finite in rows 12"):
        trainer.train()


@kinds
def test_rows_without_anything_and_streams_are_refused(
    kind: Example, tiny_base: Path, tmp_path: Path
) -> None:
    trainer, config = load_kind(kind.name).trainer, load_kind(kind.name).trainer.config_class
    base = kind.base(tiny_base, config(str(tmp_path), **QUIET))
    stream = Dataset.from_list(kind.ids(4)).to_iterable_dataset()
    with pytest.raises(DataError, match="cannot be counted in a stream"):
        trainer(base, config(str(tmp_path), **QUIET), train_dataset=stream)
    empty = Dataset.from_list(kind.ids(4)).select([])
    with pytest.raises(DataError):
        trainer(base, config(str(tmp_path), **QUIET), train_dataset=empty)


@kinds
def test_a_frozen_head_is_refused(kind: Example, tiny_base: Path, tmp_path: Path) -> None:
    trainer, config = load_kind(kind.name).trainer, load_kind(kind.name).trainer.config_class
    base = kind.base(tiny_base, config(str(tmp_path), **QUIET))
    base.model.requires_grad_(False)
    with pytest.raises(ModelError, match="the head is frozen"):
        trainer(base, config(str(tmp_path), **QUIET), train_dataset=Dataset.from_list(kind.ids(4)))


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


#: each forward (of scores, of tokens) on every architecture; the rest on two, with learned
#: absolute positions and with rotary ones
PACKED = [
    *((KINDS[name], "random", each) for name in ("pairwise", "outcome") for each in ARCHITECTURES),
    *((KINDS[name], "random", each) for name in ("kwise", "process") for each in ("qwen3", "gpt2")),
    *((KINDS["pairwise"], "group_by_length", each) for each in ("qwen3", "gpt2")),
]


@pytest.mark.parametrize(
    ("kind", "strategy", "architecture"), PACKED, ids=lambda value: getattr(value, "name", value)
)
def test_packed_steps_are_those_of_padded_batches(
    kind: Example, strategy: str, architecture: str, tmp_path: Path, tiny_bases: Any
) -> None:
    rows = Dataset.from_list(kind.ids(7))
    found = {}
    for packing in ("auto", "off"):
        recorder = Recorder()
        trainer = kind.trainer(
            tiny_bases(architecture),
            tmp_path / packing,
            packing=packing,
            train_sampling_strategy=strategy,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            max_grad_norm=0.0,
            logging_steps=1,
        )
        trainer.add_callback(recorder)
        trainer.train()
        found[packing] = trainer, recorder.steps, trainer.predict(rows).predictions
    packed, padded = found["auto"], found["off"]
    assert packed[0].data_collator.packing
    assert not padded[0].data_collator.packing
    computed = [f[0].data_collator(rows.to_list()[:3])["input_ids"].numel() for f in found.values()]
    assert computed[0] < 0.75 * computed[1]
    assert len(packed[1]) == len(padded[1]) == 2
    for a, b in zip(packed[1], padded[1], strict=True):
        assert a.keys() == b.keys()
        for name in b:
            scale = b[name].abs().max().clamp(min=1.0)
            torch.testing.assert_close(a[name] / scale, b[name] / scale, atol=5e-5, rtol=0)
    np.testing.assert_allclose(packed[2], padded[2], atol=2e-4)
    for a, b in zip(packed[0].state.log_history, padded[0].state.log_history, strict=True):
        for name in ("loss", "accuracy", "num_tokens"):
            if name in b:
                assert a[name] == pytest.approx(b[name], abs=2e-4)
    figures = [trainer.evaluate(rows) for trainer, *_ in found.values()]
    for name in ("eval_loss", "eval_accuracy"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=2e-4)


# ---------------------------------------------------------------------- settings

NOT_OFFERED = {
    "pairwise": {"eos_token", "pad_token", "model_init_kwargs", "average_tokens_across_devices"},
    "kwise": {"label_smoothing_factor", "activation_offloading", "pad_token"},
    "outcome": {"center_rewards_coefficient", "label_smoothing_factor", "activation_offloading"},
    "process": {"center_rewards_coefficient", "label_smoothing_factor", "activation_offloading"},
}


@kinds
def test_a_setting_that_cannot_be_honoured_is_not_offered(kind: Example, tmp_path: Path) -> None:
    for name in NOT_OFFERED[kind.name]:
        with pytest.raises(TypeError, match=name):
            load_kind(kind.name).trainer.config_class(str(tmp_path), **{name: 1})
        (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
        for arguments in ([f"--{name}", "1"], ["--config", str(tmp_path / "run.yaml")]):
            with pytest.raises(CompanionError, match=f"there is no setting .*{name}") as caught:
                parse(arguments, kind.name)
            assert "did you mean" not in str(caught.value)
            assert len(str(caught.value.cure)) > 40  # it says why


# ---------------------------------------------------------------------- the trained model


@kinds
def test_the_model_of_a_trainer_scores_as_it_predicted(
    kind: Example, tiny_base: Path, tmp_path: Path
) -> None:
    trainer = kind.trainer(tiny_base, tmp_path, max_steps=2, learning_rate=1e-2)
    trainer.train()
    rows = kind.ids(7)
    predictions = trainer.predict(Dataset.from_list(rows)).predictions
    made = trainer.reward_model()
    assert not made.model.training
    assert "forward" not in vars(made.model)
    assert made.tokenizer is trainer.processing_class
    assert made.formatter is trainer.formatter
    assert made.readout == load_kind(kind.name).trainer.readout(trainer.args)
    for row, found in zip(rows, predictions, strict=True):
        if kind.name in ("pairwise", "kwise"):
            texts = row.get("completion_ids") or [row["chosen_ids"], row["rejected_ids"]]
            scores = RewardScorer(made).score_encoded(texts)
            np.testing.assert_allclose(scores, found[: len(texts)], atol=1e-5)
            ids = torch.tensor([texts[0]])
            stock = made.model(input_ids=ids).logits.detach()
            assert float(stock) == pytest.approx(found[0], abs=1e-5)
        else:
            logits = made.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].detach()
            if kind.name == "process":
                found = found.reshape(-1, logits.shape[-1])
                np.testing.assert_allclose(logits[row["ends"]], found, atol=1e-5)
            else:
                assert float(torch.sigmoid(logits[-1])) == pytest.approx(found[-1], abs=1e-5)
