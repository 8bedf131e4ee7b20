"""``companion plan``: its bytes against the profiler's, against PyTorch's tracker, and by hand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen3Config

from benchmarks.memory import CASES, Case, compare
from companion import plan_training
from companion.cli.main import main
from companion.errors import CompanionError, ModelError
from companion.training import memory, plan_scoring

ROOT = Path(__file__).parents[2]
WITHIN = 0.15
MIB = 2**20


def config(**own: Any) -> Qwen3Config:
    return Qwen3Config(
        **{
            **{"vocab_size": 500, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16},
            **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
            **own,
        }
    )


def check(case: Case) -> None:
    found = compare(case)
    assert abs(found["ratio"] - 1) < WITHIN, found


def test_bytes_are_those_of_the_profiler() -> None:
    check(Case(layers=4, pairs=2, length=96))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=Case.says)
def test_bytes_of_all_cases_are_those_of_the_profiler(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("checkpointing", "packing"), [(True, True), (False, False)])
def test_two_and_three_layers_tell_of_six(checkpointing: bool, packing: bool) -> None:
    """Extrapolated is traced, to the byte."""
    how: dict[str, Any] = {"packing": packing, "checkpointing": checkpointing, "autocast": True}
    said, _ = memory._trace(config(), 512, 64, **how)
    model = memory._fake_model(config(), 6, "float32", None, None)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = memory._batch(512, 64, packing=packing)
    with memory.cudas_path():
        assert memory._peak_of_step(model, batch, autocast=True) == said.activations
    assert said.n_parameters == sum(p.numel() for p in model.parameters())


def test_the_count_is_that_of_pytorchs_tracker() -> None:
    model = memory._fake_model(config(), 3, "float32", None, None)
    batch = memory._batch(512, 64, packing=False)
    tracker = MemTracker()
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    tracker.track_external(model)
    before = sum(s["Total"] for s in tracker.get_tracker_snapshot().values())
    with tracker:
        model(**batch).logits.square().mean().backward()
    peak = sum(s["Total"] for s in tracker.get_tracker_snapshot("peak").values())
    assert memory._peak_of_step(model, batch, autocast=False) == pytest.approx(
        peak - before, rel=1e-4
    )


@pytest.mark.slow
def test_what_is_known_of_the_recipe_for_0_6b() -> None:
    """Counted before by saved tensors: 74 KiB a token and layer, 2.0 MiB a token in all."""

    def slope(**how: Any) -> float:
        two, one = (
            plan_training("Qwen/Qwen3-0.6B", tokens=n, **how).activations for n in (16384, 8192)
        )
        return (two - one) / 8192 / MIB

    assert slope() == pytest.approx(74 * 28 / 1024, rel=0.1)
    # the input of each layer in float32, and one layer that is computed again, with its gradients
    assert 4 * 1024 * 28 / MIB < slope(checkpointing=True) < (4 * 28 + 2 * 74) * 1024 / MIB
    # eight pairs of the greatest length, as they were once run at once
    assert plan_training("Qwen/Qwen3-0.6B").activations / 2**30 == pytest.approx(68, rel=0.1)


def test_what_the_ranks_share() -> None:
    plans = {
        (strategy, gpus): plan_training(config(), gpus=gpus, strategy=strategy, tokens=512)  # type: ignore[arg-type]
        for strategy in ("ddp", "zero2", "zero3", "fsdp2")
        for gpus in (2, 8)
        if (strategy, gpus) in {("ddp", 2), ("zero2", 8), ("zero3", 8), ("fsdp2", 8)}
    }
    n = plans["ddp", 2].n_parameters
    for (strategy, gpus), plan in plans.items():
        assert (
            plan.total
            == (plan.parameters + plan.gradients + plan.optimizer + plan.activations + plan.other)
            - plan.overlap
        )
        assert plan.optimizer == {"ddp": 8 * n, "fsdp2": 8 * n // gpus}.get(
            strategy, 12 * n // gpus
        )
        shards = gpus if strategy in ("zero3", "fsdp2") else 1
        size = 2 if "zero" in strategy else 4
        assert plan.parameters == pytest.approx(size * n / shards, rel=0.01)
        assert plan.gradients <= 4 * n
    assert plans["zero3", 8].parameters < plans["zero2", 8].parameters / 7
    lora = plan_training(config(), gpus=2, strategy="zero2", tokens=512, lora={"r": 4})
    assert lora.n_trained < lora.n_parameters / 5
    assert lora.optimizer == 12 * lora.n_trained // 2


def test_steps_time_and_cost() -> None:
    plan = plan_training(
        config(), gpus=4, strategy="ddp", tokens=512, batch=8, accumulation=2, rows=1001,
        mean_tokens=100, epochs=2, peak=100.0, mfu=0.5, price=3.0,
    )  # fmt: skip
    assert plan.steps == 32
    assert plan.run_tokens == 200_200
    weights = plan.n_parameters - 500 * 64
    products = 6 * (2 * weights / 2) + 3 * (2 * 6 * 64 * 100)
    assert plan.seconds == pytest.approx(plan.run_tokens * products / (4 * 1e14 * 0.5))
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 4 * 3.0)
    scored = plan_scoring(config(), rows=1001, mean_tokens=100, peak=100.0, mfu=0.5, gpus=4)
    assert scored.seconds == pytest.approx(plan.seconds / 6)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"mfu": -1.0}, "mfu is -1"),
        ({"strategy": "zero4"}, "strategy is 'zero4'"),
    ],
)
def test_what_makes_no_sense_is_refused(own: dict[str, Any], said: str) -> None:
    with pytest.raises(CompanionError, match=said):
        plan_training(config(), **own)


def test_a_model_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ModelError, match="Qwen3-8B") as caught:
        plan_training("nobody/no-model")
    assert "config.json" in str(caught.value.cure)


def test_the_command(capsys: pytest.CaptureFixture[str], tiny_base: Path) -> None:
    assert main(["plan", "--model", str(tiny_base), "--json", "--max_length", "64"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["tokens"] == 8 * 2 * 64
    small = ["--gpu_memory", "0.002", "--max_length", "64"]
    assert main(["plan", "--model", str(tiny_base), *small]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["plan", "--model", str(tiny_base), "--score"]) == 2
    assert "--rows" in capsys.readouterr().err


# ---------------------------------------------------------------------- the recipes

SAID = re.compile(r"^# companion plan (.*): ([0-9.]+) GiB a rank", re.MULTILINE)
RECIPES = sorted(
    (path, flags, float(said))
    for path in (ROOT / "recipes").rglob("*.yaml")
    for flags, said in SAID.findall(path.read_text("utf-8"))
)


def test_recipes_say_what_they_take() -> None:
    assert RECIPES


@pytest.mark.parametrize(("path", "flags", "said"), RECIPES, ids=lambda x: getattr(x, "stem", None))
def test_what_a_recipe_says_is_what_is_planned(
    path: Path, flags: str, said: float, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--config", str(path), "--json", *shlex.split(flags)])
    assert json.loads(capsys.readouterr().out)["total"] / 2**30 == pytest.approx(said, abs=0.051)
