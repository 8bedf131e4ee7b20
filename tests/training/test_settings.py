"""Settings that make no sense: refused before anything is loaded, with what would make sense."""

from __future__ import annotations

import math
import os

import pytest

from companion.cli.train import parse
from companion.errors import CompanionError
from companion.rl.config import GRPORunConfig
from companion.training.config import (
    ModelArguments,
    PairwiseRewardConfig,
    RowArguments,
    check_optimizer,
)

NONSENSE = [
    *(("learning_rate", value) for value in (-1.0, math.nan, math.inf)),
    *((name, 0) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")),
    *(("max_steps", value) for value in (0, -2, 1.5)),
    ("center_rewards_coefficient", -0.1),
    ("num_train_epochs", 0.0),
    ("weight_decay", math.inf),
    ("seed", -1),
    ("seed", 2**32),
    ("adam_beta1", 1.0),
    ("max_length", 0),
    ("dataset_num_proc", 0),
    ("eval_steps", 0.0),
    ("report_to", "nope"),
    ("report_to", ["none", "nope"]),
    ("torch_compile_backend", "nope"),
    ("lr_scheduler_kwargs", "nope"),
    ("optim_args", "nope"),
    ("output_dir", ""),
]


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_nonsense_is_refused(name, value, tmp_path):
    with pytest.raises(CompanionError, match=name) as stop:
        PairwiseRewardConfig(**{"output_dir": str(tmp_path), name: value})
    assert stop.value.cure


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", math.nan),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("multi_objective_aggregation", "x"),
        ("fall_alpha", 1.0),
    ],
)
def test_of_a_policy_too(name, value, tmp_path):
    with pytest.raises(CompanionError, match=name):
        GRPORunConfig(output_dir=str(tmp_path), **{name: value})


def test_of_the_rows_and_the_model_too():
    for cls, name, value in (
        (RowArguments, "limit", 0),
        (RowArguments, "eval_fraction", math.nan),
        (ModelArguments, "lora_r", 0),
        (ModelArguments, "lora_dropout", 1.0),
    ):
        with pytest.raises(CompanionError, match=name):
            cls(**{name: value})


def test_what_makes_sense_passes(tmp_path):
    config = PairwiseRewardConfig(
        output_dir=str(tmp_path), learning_rate=0.0, max_steps=-1, warmup_steps=0.1, seed=0,
        center_rewards_coefficient=0.0, logging_steps=10, report_to="none",
    )  # fmt: skip
    assert config.max_steps == -1


def test_a_reporter_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(CompanionError, match="wandb is not installed") as stop:
        PairwiseRewardConfig(output_dir=str(tmp_path), report_to=["wandb"])
    assert "pip install wandb" in stop.value.cure
    assert "--report_to none" in stop.value.cure


YAML = {
    "max_steps: 1.5": "give a whole number",
    "max_steps: true": "max_steps is True",
    "max_steps: [1]": "max_steps is",
    "max_steps: {a: 1}": "max_steps is",
    "learning_rate: 2026-01-01": "is a date",
    "learning_rate: .nan": "learning_rate is nan",
    "output_dir: null": "output_dir is null",
    "seed: null": "seed is null",
    "use_peft: 3": "use_peft is 3",
    "columns: abc": "columns is 'abc'",
    "packing: 7": "packing is 7",
    "env: 3": "env is 3",
    "env: {A: [1]}": "env is",
    'env: {"A=B": 1}': "env is",
    "max_steps: &a [*a]": "max_steps is",
    "a: " + "[" * 2000: "is nested too deeply",
    "? [a]\n: 1": "no valid YAML",
    "max_steps: !!python/object:os.system x": "no valid YAML",
}


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_yaml_is_read_as_the_flags_are(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text + "\n")
    with pytest.raises(CompanionError, match=YAML[text]):
        parse(["--config", str(path)])


def test_yaml_that_sets_the_environment_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMPANION_TEST_OF_ENV", "before")
    path = tmp_path / "c.yaml"
    path.write_text("max_steps: '3'\nlearning_rate: 1e-5\nenv:\n  COMPANION_TEST_OF_ENV: 7\n")
    _, _, config = parse(["--config", str(path), "--output_dir", str(tmp_path)])
    assert (config.max_steps, config.learning_rate) == (3, 1e-5)
    assert os.environ["COMPANION_TEST_OF_ENV"] == "7"
    assert "COMPANION_TEST_OF_ENV=7" in capsys.readouterr().err


def test_a_schedule_is_asked_for_its_arguments(tmp_path):
    settings = {"output_dir": str(tmp_path), "lr_scheduler_type": "cosine_with_min_lr"}
    check_optimizer(PairwiseRewardConfig(**settings, lr_scheduler_kwargs={"min_lr": 1e-6}), None)
    with pytest.raises(CompanionError, match="lr_scheduler_kwargs") as stop:
        check_optimizer(PairwiseRewardConfig(**settings, lr_scheduler_kwargs={"nope": 1}), None)
    assert stop.value.cure
