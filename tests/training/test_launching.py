"""What a run without a GPU is given, setting by setting; ``tests/distributed`` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from companion.cli.main import main
from companion.errors import CompanionError
from companion.training import launching

RECIPES = Path(__file__).parents[2] / "recipes"


def given(**settings: Any) -> Any:
    nothing = {"deepspeed": None, "fsdp": None, "accelerator_config": None, "use_cpu": False}
    return SimpleNamespace(**{**nothing, **settings})


def test_with_a_gpu_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    settings = given(deepspeed="recipes/deepspeed/zero2.json")
    launching.settle_on_cpu(settings)
    assert settings == given(deepspeed="recipes/deepspeed/zero2.json")


def test_one_process_runs_on_the_cpu() -> None:
    settings = given()
    launching.settle_on_cpu(settings)
    assert settings == given(use_cpu=True)


def test_nothing_else_of_the_file_is_changed() -> None:
    for stage, off in ((2, {"overlap_comm": False, "reduce_scatter": False}), (3, {})):
        path = RECIPES / "deepspeed" / f"zero{stage}.json"
        before = json.loads(path.read_text())
        after = launching._for_gloo(str(path))
        assert after["zero_optimization"] == {**before["zero_optimization"], **off}
        del before["zero_optimization"], after["zero_optimization"]
        assert after == before
        assert launching._for_gloo(path.read_text()) == launching._for_gloo(str(path))


@pytest.mark.parametrize("value", ["nowhere.json", "{", "[1]"])
def test_a_file_that_cannot_be_read(value: str) -> None:
    with pytest.raises(CompanionError, match=r"--deepspeed .* cannot be read"):
        launching._for_gloo(value)


@pytest.mark.parametrize("flags", [["--deepspeed", "recipes/deepspeed/zero3.json"], ["--fsdp"]])
def test_sharding_without_a_launcher_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "pairwise", "--config", str(RECIPES / "pairwise/tutor.yaml"), *flags]
    assert main([*arguments, "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nothing started any" in said
    assert "torchrun" in said
    assert not is_deepspeed_zero3_enabled()  # or the next model that is made would be cut
