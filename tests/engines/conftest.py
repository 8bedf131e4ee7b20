"""Clients and engines of others, in environments of their own, and a server to meet them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import Process

ROOT = Path(__file__).resolve().parents[2]


def _environment(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"make test-engines builds that environment and sets {variable}")
    return Path(folder) / "bin" / "python"


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """The interpreter of OpenRLHF and verl."""
    return _environment("COMPANION_ENV_CLIENTS")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM."""
    return _environment("COMPANION_ENV_VLLM")


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """``start(command, ready)``: a server, stopped when the test has ended."""
    made: list[Process] = []

    def begin(command: list[str], ready: str, **environment: str) -> Process:
        made.append(Process(command, ready, **environment))
        return made[-1]

    yield begin
    for process in reversed(made):
        process.stop()


@pytest.fixture
def serve(start: Callable[..., Process], reward_model: Path) -> Callable[..., Process]:
    """``serve(*flags)``: ``companion serve`` with the model on a free port; ``.url`` is set."""

    def begin(*flags: Any) -> Process:
        words = ["--model", reward_model, "--port", "0", *flags]
        command = [sys.executable, "-m", "companion", "serve", *map(str, words)]
        process = start(command, "ready: ", PYTHONPATH=str(ROOT))
        process.url = process.ready.split("ready: ")[1].split()[0]  # type: ignore[attr-defined]
        return process

    return begin


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the tutor's, trained for some steps as a user trains one, then saved."""
    from companion import DataArguments, ModelArguments, PairwiseRewardConfig, train_pairwise
    from companion.data import write_rows
    from companion.tutor import TUTOR_BASE, make_rows

    folder = tmp_path_factory.mktemp("tutor")
    write_rows(make_rows("pairs", 400, seed=11), folder / "pairs.jsonl")
    config = PairwiseRewardConfig(
        output_dir=str(folder / "reward"), max_steps=20, per_device_train_batch_size=8,
        learning_rate=3e-4, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, seed=11,
        logging_strategy="no", eval_strategy="no", save_strategy="no",
    )  # fmt: skip
    data = DataArguments(dataset_name=str(folder / "pairs.jsonl"))
    base = ModelArguments(model_name_or_path=str(TUTOR_BASE))
    train_pairwise(config, base, data, say=lambda line: None)
    return folder / "reward"
