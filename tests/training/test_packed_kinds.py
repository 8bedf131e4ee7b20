"""K-wise, outcome and process steps, packed: the gradient of padded ones, each prompt once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from companion.models import load_base
from companion.training.kwise import KwiseRewardConfig, KwiseRewardTrainer
from companion.training.outcome import OutcomeRewardConfig, OutcomeRewardTrainer
from companion.training.process import ProcessRewardConfig, ProcessRewardTrainer

disable_progress_bars()
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")


def texts(n: int = 6, each: int = 3) -> list[list[list[int]]]:
    """`each` completions of `n` prompts, as token ids."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(9, 60, (length,), generator=generator).tolist()

    prompts = [[1, *draw(10, 16)] for _ in range(n)]
    return [[[*prompt, *draw(3, 10), 2] for _ in range(each)] for prompt in prompts]


def rankings() -> list[dict[str, Any]]:
    return [
        {"completion_ids": ids, "ranks": [1.0, 2.0, 2.0 + i % 2]} for i, ids in enumerate(texts())
    ]


def outcomes() -> list[dict[str, Any]]:
    flat = [ids for group in texts() for ids in group]
    return [
        {"input_ids": ids, "prompt_length": 8 + i % 2, "label": i % 2} for i, ids in enumerate(flat)
    ]


def steps() -> list[dict[str, Any]]:
    flat = [ids for group in texts() for ids in group]
    return [
        {
            "input_ids": ids,
            "ends": [5, len(ids) - 3, len(ids) - 1],  # one within what is shared
            "targets": [float(i % 3), -100.0, 2.0],
        }
        for i, ids in enumerate(flat)
    ]


MAKERS: dict[str, tuple[Any, Any, Callable[[], Any], Callable[[Path], Any]]] = {
    "kwise": (KwiseRewardTrainer, KwiseRewardConfig, rankings, load_base),
    "outcome": (
        OutcomeRewardTrainer,
        OutcomeRewardConfig,
        outcomes,
        lambda path: load_base(path, labels=1),
    ),
    "process": (
        ProcessRewardTrainer,
        ProcessRewardConfig,
        steps,
        lambda path: load_base(path, labels=3),
    ),
}


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", list(MAKERS))
def test_steps_are_those_of_padded_batches(
    what: str, kind: str, tmp_path: Path, tiny_bases: Callable[[str], Path]
) -> None:
    trainer_class, config_class, make, load = MAKERS[what]
    rows = Dataset.from_list(make())
    found = {}
    for packing in ("auto", "off"):
        recorder = Recorder()
        trainer = trainer_class(
            load(tiny_bases(kind)),
            config_class(
                str(tmp_path / packing),
                packing=packing,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                max_grad_norm=0.0,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[recorder],
        )
        trainer.train()
        found[packing] = trainer, recorder.steps, trainer.predict(rows).predictions
    packed, padded = found["auto"], found["off"]
    assert packed[0].data_collator.packing
    assert not padded[0].data_collator.packing
    computed = [
        f[0].data_collator(rows.to_list()[:3])["input_ids"].numel() for f in (packed, padded)
    ]
    assert computed[0] < 0.75 * computed[1]
    assert len(packed[1]) == len(padded[1]) >= 1
    for a, b in zip(packed[1], padded[1], strict=True):
        assert a.keys() == b.keys()
        for name in b:
            scale = b[name].abs().max().clamp(min=1.0)
            torch.testing.assert_close(a[name] / scale, b[name] / scale, atol=5e-5, rtol=0)
    np.testing.assert_allclose(packed[2], padded[2], atol=2e-4)
    for a, b in zip(packed[0].state.log_history, padded[0].state.log_history, strict=True):
        for name in ("loss", "accuracy", "num_tokens", "eval_loss", "eval_accuracy"):
            if name in b:
                assert a[name] == pytest.approx(b[name], abs=2e-4)
