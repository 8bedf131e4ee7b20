"""``companion train pairwise``: flags, YAML files, and what it says of mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from companion import (
    CompanionError,
    DataArguments,
    ModelArguments,
    PairwiseRewardConfig,
)
from companion.cli.main import main
from companion.cli.train import parse, purposes

RECIPES = Path(__file__).parents[2] / "recipes"


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_reach_all_three_groups() -> None:
    data, model, config = parse(
        [
            "--model_name_or_path",
            "base",
            "--dataset-name",
            "pairs.jsonl",
            "--learning_rate=3e-4",
            "--use_peft",
            "--lora_r",
            "4",
            "--overlong",
            "truncate_prompt",
            "--eval_fraction",
            "0.3",
            "--bf16",
            "false",
        ]
    )
    assert (model.model_name_or_path, model.use_peft, model.lora_r) == ("base", True, 4)
    assert (data.dataset_name, data.eval_fraction) == ("pairs.jsonl", 0.3)
    assert (config.learning_rate, config.overlong, config.bf16) == (3e-4, "truncate_prompt", False)


def test_yaml_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4 as a string; it must arrive as a number
    file = write(tmp_path, "learning_rate: 1e-4\nmax_length: 77\ndataset_name: x.jsonl\n")
    data, _, config = parse(["--config", file, "--max_length", "99"])
    assert (config.learning_rate, config.max_length, data.dataset_name) == (1e-4, 99, "x.jsonl")
    assert parse([f"--config={file}"])[2].max_length == 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], "--learning_rate"),
        (["--max_step", "1"], "--max_steps"),  # abbreviations are not guessed
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--overlong", "shrug"], "invalid choice: 'shrug'"),
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--label_smoothing_factor", "0.7"], "label_smoothing_factor is 0.7"),
        (["--load_best_model_at_end", "true", "--eval_strategy", "no"], "do not fit"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_in_flags(arguments: list[str], message: str) -> None:
    with pytest.raises(CompanionError) as caught:
        parse(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1\n", "no setting 'learning_rte'"),
        ("- a\n- b\n", "holds no settings"),
        ("a: [1\n", "is no valid YAML"),
        ("learning_rate: fast\n", "invalid float value: 'fast'"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompanionError) as caught:
        parse(["--config", write(tmp_path, text)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairwise"], "--model_name_or_path is missing"),
        (["pairwise", "--model_name_or_path", "x"], "--dataset_name is missing"),
        (["outcomes"], "there are: pairwise"),
        (
            ["pairwise", "--model_name_or_path", "x", "--dataset_name", "nowhere.jsonl"],
            "nowhere.jsonl",
        ),
    ],
)
def test_the_command_ends_with_2_and_no_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_every_field_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "--dataset_name" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    for settings in (DataArguments, ModelArguments, PairwiseRewardConfig):
        for field in dataclasses.fields(settings):
            assert not field.init or f"--{field.name} " in out, field.name


@pytest.mark.parametrize(
    "file",
    sorted(file for kind in purposes() for file in (RECIPES / kind).glob("*.yaml")),
    ids=lambda file: f"{file.parent.name}-{file.stem}",
)
def test_recipes_parse(file: Path) -> None:
    kind = file.parent.name
    data, model, config = parse(["--config", str(file)], kind)
    assert data.dataset_name
    assert model.model_name_or_path
    assert config.output_dir == f"runs/{'' if kind == 'pairwise' else kind + '-'}{file.stem}"
    assert config.num_train_epochs == 1
    assert f"{kind}/{file.name}" in (RECIPES / "README.md").read_text()


def test_every_kind_has_a_recipe_and_says_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for kind in purposes():
        assert (RECIPES / kind / "tutor.yaml").is_file()
        assert f"  {kind} " in out
        with pytest.raises(CompanionError, match=f"'companion train {kind} --help'"):
            parse(["--zzz", "1"], kind)
    with pytest.raises(CompanionError, match="no setting --margins"):
        parse(["--margins", "none"], "kwise")


def test_files_for_launchers_parse() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for file in (RECIPES / "accelerate").glob("*.yaml"):
        settings: Any = load_config_from_file(str(file))
        assert settings.num_processes == 8
        inner = yaml.safe_load(file.read_text()).get("deepspeed_config")
        if inner:
            assert (RECIPES.parent / inner["deepspeed_config_file"]).is_file()
    for stage in (2, 3):
        zero = json.loads((RECIPES / "deepspeed" / f"zero{stage}.json").read_text())
        assert zero["zero_optimization"]["stage"] == stage
