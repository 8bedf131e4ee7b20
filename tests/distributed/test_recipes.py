"""Every file that puts a run on many devices is run, on two processes: the model is that of one.

``accelerate launch --config_file FILE --num_processes 2`` starts two without a GPU too, for each of
the files; so does torchrun with the same file of DeepSpeed or FSDP.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from companion.cli.main import main
from companion.tutor import TUTOR_BASE, make_rows

RECIPES = Path(__file__).parents[2] / "recipes"
#: what starts a run, and the flags by which torchrun has the same
STRATEGIES = {
    "ddp": [],
    "fsdp2": ["--fsdp", "--fsdp_config", str(RECIPES / "fsdp/fsdp2.json")],
    "zero2": ["--deepspeed", str(RECIPES / "deepspeed/zero2.json")],
    "zero3": ["--deepspeed", str(RECIPES / "deepspeed/zero3.json")],
}
# before the processes are forked: what DeepSpeed compiles on import takes each five seconds
pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
pytestmark = pytest.mark.distributed
#: the kinds, and the rows of the tutor that they learn from
KINDS = {"pairwise": "pairs", "kwise": "rankings", "outcome": "outcomes", "process": "steps"}


def arguments(kind: str, folder: Path, ranks: int, rows: int = 33) -> list[str]:
    """A run of the kind's own file, on few rows; an uneven last step, whatever the ranks."""
    path = folder / f"{KINDS[kind]}.jsonl"
    if not path.exists():
        path.write_text("\n".join(map(json.dumps, make_rows(KINDS[kind], rows, seed=1))))
    return [
        *("train", kind, "--config", str(RECIPES / kind / "tutor.yaml")),
        *("--dataset_name", str(path), "--output_dir", str(folder / f"{kind}-on-{ranks}")),
        *("--per_device_train_batch_size", str(12 // ranks)),
        *("--dataset_num_proc", "1", "--disable_tqdm", "true", "--eval_strategy", "no"),
    ]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where the model of one process lies, of a kind."""
    folder = tmp_path_factory.mktemp("recipes")

    @functools.cache
    def run(kind: str) -> Path:
        assert main(arguments(kind, folder, 1)) == 0
        return folder / f"{kind}-on-1"

    return run


def assert_same_model(output: Path, one: Path, said: str) -> None:
    """Weights and manifest of two processes are those of one; stock code gives its scores."""
    assert said.count("saved in") == 1
    own, expected = (load_file(folder / "model.safetensors") for folder in (output, one))
    assert own.keys() == expected.keys()
    gap = max(float((own[name] - expected[name]).abs().max()) for name in own)
    assert gap < 1e-5, gap
    two, alone = (json.loads((f / "reward_manifest.json").read_text()) for f in (output, one))
    assert two["training"]["world_size"] == 2
    assert two["training"]["train_loss"] == pytest.approx(alone["training"]["train_loss"], rel=1e-5)
    assert two["training"].get("train_pairs") == alone["training"].get("train_pairs")
    figures = {name: x for name, x in alone["metrics"].items() if isinstance(x, (int, float))}
    assert {"n", "accuracy"} & set(figures)
    assert {name: two["metrics"][name] for name in figures} == pytest.approx(figures, abs=1e-4)
    if alone["reference"] is not None:  # a pairwise or K-wise model's
        assert two["reference"]["mean"] == pytest.approx(alone["reference"]["mean"], abs=1e-4)


def assert_stock_scores(output: Path) -> None:
    """Stock transformers loads the folder, and gives the scores that its manifest claims."""
    golden = json.loads((output / "reward_manifest.json").read_text())["golden_texts"]
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    with torch.no_grad():
        scores = [float(model(torch.tensor([ids])).logits) for ids in golden["input_ids"]]
    assert scores == pytest.approx(golden["values"], abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_the_model_of_one(
    strategy: str, one_process: Any, tmp_path: Path
) -> None:
    """DDP by a real start; the others in processes with what the launcher would tell them."""
    file = str(RECIPES / "accelerate" / f"{strategy}.yaml")
    words = ["-m", "companion", *arguments("pairwise", tmp_path, 2)]
    said = launch(words, accelerate=file, forked=strategy != "ddp")
    output = tmp_path / "pairwise-on-2"
    assert_same_model(output, one_process("pairwise"), said)
    assert said.count("no GPU: ") == (strategy != "ddp")
    if strategy == "fsdp2":
        assert_stock_scores(output)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ddp"])
def test_accelerate_starts_two_processes(strategy: str, one_process: Any, tmp_path: Path) -> None:
    file = str(RECIPES / "accelerate" / f"{strategy}.yaml")
    said = launch(["-m", "companion", *arguments("pairwise", tmp_path, 2)], accelerate=file)
    assert_same_model(tmp_path / "pairwise-on-2", one_process("pairwise"), said)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_torchrun_with_the_same_files(
    strategy: str, kind: str, one_process: Any, tmp_path: Path
) -> None:
    words = ["-m", "companion", *arguments(kind, tmp_path, 2), *STRATEGIES[strategy]]
    said = launch(words, torchrun=True)
    assert_same_model(tmp_path / f"{kind}-on-2", one_process(kind), said)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_launchers_give_the_model_of_one(
    strategy: str, one_process: Any, tmp_path: Path
) -> None:
    """Two nodes of one process each, which meet on this machine, and one node of two."""
    weights = []
    for nodes in (1, 2):
        folder = tmp_path / str(nodes)
        folder.mkdir()
        words = ["-m", "companion", *arguments("pairwise", folder, 2), *STRATEGIES[strategy]]
        said = launch(words, torchrun=nodes == 2, nodes=nodes, forked=nodes == 1)
        assert_same_model(folder / "pairwise-on-2", one_process("pairwise"), said)
        weights.append(load_file(folder / "pairwise-on-2" / "model.safetensors"))
    one, two = weights
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.slow
def test_a_policy_is_the_same_under_each_strategy(one_process: Any, tmp_path: Path) -> None:
    """Two ranks each time: each draws with dice of its own, so one rank draws other completions.

    FSDP is refused: the monitor could not draw.
    """
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, make_rows("prompts", 60, seed=3))))
    weights = {}
    for strategy in ("ddp", "zero2", "zero3"):
        output = tmp_path / strategy
        words = [
            *("-m", "companion", "train", "grpo", "--config", str(RECIPES / "grpo/tutor.yaml")),
            *("--dataset_name", str(prompts), "--reward_model", str(one_process("pairwise"))),
            *("--output_dir", str(output), "--per_device_train_batch_size", "16"),
            *("--max_steps", "2", "--max_completion_length", "24", "--monitor_steps", "2"),
            *("--monitor_prompts", "8", "--test_prompts", "8", "--disable_tqdm", "true"),
        ]
        launch(words, accelerate=str(RECIPES / "accelerate" / f"{strategy}.yaml"), forked=True)
        last = output / "last"
        weights[strategy] = load_file((last if last.exists() else output) / "model.safetensors")
    start = load_file(TUTOR_BASE / "model.safetensors")
    ddp = weights.pop("ddp")
    assert max(float((ddp[name] - start[name]).abs().max()) for name in ddp) > 1e-4  # it learns
    for strategy, own in weights.items():
        gap = max(float((own[name] - ddp[name]).abs().max()) for name in ddp)
        assert gap < 1e-5, (strategy, gap)
