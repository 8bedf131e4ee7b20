"""SIGTERM at any moment of a run: saved after a step, and gone on from without a difference."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import Start, gap, starter, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from companion.errors import RunEnded
from companion.training import PreemptionCallback, preemption
from companion.training.checkpoints import PART

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


class Ask(TrainerCallback):
    """Sends SIGTERM to this process at an event, once `step` steps are taken."""

    def __init__(self, event: str, step: int, times: int = 1) -> None:
        self.step, self.times = step, times
        setattr(self, event, self.ask)

    def ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[int]]:
    """What had been set for SIGTERM before; the signals that came to it."""
    heard: list[int] = []

    def note(signum: int, frame: Any) -> None:
        heard.append(signum)

    before = signal.signal(signal.SIGTERM, note)
    yield heard
    assert signal.getsignal(signal.SIGTERM) is note, "the earlier handler is set again"
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """The weights of a run of 8 steps that nothing disturbed."""
    return weights(starter(tmp_path_factory.mktemp("whole"), tiny_base)())


@pytest.fixture
def start(tmp_path: Path, tiny_base: Path) -> Start:
    return starter(tmp_path, tiny_base)


#: event, steps taken by then, the step after which the run ends
MOMENTS = {
    "before the first step": ("on_epoch_begin", 0, 1),
    "forward": ("on_step_begin", 4, 5),
    "backward": ("on_pre_optimizer_step", 4, 5),
    "optimiser": ("on_optimizer_step", 4, 6),
    "evaluation": ("on_prediction_step", 4, 4),
    "last step": ("on_step_begin", 7, 8),
    "last evaluation": ("on_prediction_step", 8, 8),
}
FAST = {"before the first step", "evaluation"}


@pytest.mark.parametrize(
    "moment",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MOMENTS],
)
def test_a_signal_saves_and_the_run_goes_on(
    moment: str, start: Start, whole: Any, tmp_path: Path, heard: list[int]
) -> None:
    event, step, ends = MOMENTS[moment]
    with pytest.raises(
        RunEnded, match=f"asked to end at step {ends} of 8, saved in .*-{ends}"
    ) as e:
        start(callbacks=[Ask(event, step)], save_total_limit=None, **EVALUATED)
    assert e.value.exit_code == 143
    assert not e.value.said
    assert not heard
    found = sorted(path.name for path in (tmp_path / "model").glob("checkpoint-*"))
    assert found == [f"checkpoint-{n}" for n in sorted({3, 6, ends}) if n <= ends]
    assert not (tmp_path / "model" / PART).exists()
    again = start(resume_from_checkpoint="auto", **EVALUATED)
    assert gap(weights(again), whole) == 0.0
    assert again.train_metrics["train_pairs"] == 63


def test_a_signal_during_a_save_ends_with_it(
    start: Start, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that is written is the one to go on from, and is written once."""
    save, saves = Trainer._save_rng_state, []

    def asked(self: Any, folder: str) -> None:
        saves.append(folder)
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_rng_state", asked)
    with pytest.raises(RunEnded, match="at step 3 of 8"):
        start(save_only_model=False)
    assert len(saves) == 1
    monkeypatch.undo()
    assert gap(weights(start(resume_from_checkpoint="last")), whole) == 0.0


@pytest.mark.slow
def test_what_only_the_model_is_saved_of_is_saved_in_full(start: Start, whole: Any) -> None:
    with pytest.raises(RunEnded):
        start(callbacks=[Ask("on_step_begin", 4)], save_only_model=True)
    assert gap(weights(start(resume_from_checkpoint="auto")), whole) == 0.0


class AskAll(TrainerCallback):
    """Lets another process, as a launcher is, send SIGTERM to this one and its workers."""

    def __init__(self) -> None:
        self.others = set(multiprocessing.active_children())  # of the tests, not of the run

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            children = set(multiprocessing.active_children()) - self.others
            own = [str(process.pid) for process in children]
            assert own, "a worker of the training, and mostly one of the evaluation"
            subprocess.run(["kill", "-TERM", *own, str(os.getpid())], check=True)
            time.sleep(0.2)  # a worker that dies is noticed


def test_the_workers_of_the_dataloaders_get_it_too(start: Start, whole: Any) -> None:
    ask = AskAll()
    with pytest.raises(RunEnded, match="at step 4 of 8"):
        start(callbacks=[ask], dataloader_num_workers=1, **EVALUATED)
    assert set(multiprocessing.active_children()) == ask.others
    assert gap(weights(start(resume_from_checkpoint="auto", **EVALUATED)), whole) == 0.0


class AtTheEnd(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "train_loss" in logs:
            os.kill(os.getpid(), signal.SIGTERM)


def test_after_the_last_step_it_does_what_it_did_before(
    start: Start, whole: Any, heard: list[int]
) -> None:
    result = start(callbacks=[AtTheEnd()])
    assert heard == [signal.SIGTERM]
    assert gap(weights(result), whole) == 0.0


def test_the_second_signal_is_for_the_earlier_handler(
    start: Start, heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is the same one again: a scheduler's, and the launcher's that got it too."""
    with pytest.raises(RunEnded):
        start(callbacks=[Ask("on_step_begin", 2, times=3)], max_steps=4)
    assert heard == []
    monkeypatch.setattr(preemption, "_SAME", 0.0)
    with pytest.raises(RunEnded):
        start(callbacks=[Ask("on_step_begin", 2, times=2)], max_steps=4)
    assert heard == [signal.SIGTERM]


def test_an_error_sets_the_earlier_handler_again(start: Start) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start(callbacks=[Fails()])


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x).squeeze(-1) - labels).square().mean()}


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no", "best"])
def test_a_stock_trainer(strategy: str, tmp_path: Path) -> None:
    """Nothing of the companion is needed; whatever else was due at the end of an epoch is not."""
    torch.manual_seed(0)
    rows = [{"x": torch.randn(3), "labels": torch.tensor(float(i % 2))} for i in range(40)]
    evaluated = strategy in ("epoch", "best")
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=30,
        save_strategy=strategy,
        eval_strategy="epoch" if evaluated else "no",
        metric_for_best_model="eval_loss" if strategy == "best" else None,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    asked = Ask("on_step_begin", 14)
    callback = PreemptionCallback()
    trainer = Trainer(
        Line(), args, train_dataset=rows, eval_dataset=rows, callbacks=[asked, callback]
    )
    trainer.train()
    assert callback.agreed
    assert trainer.state.global_step == 15
    assert (tmp_path / "checkpoint-15" / "optimizer.pt").exists()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == ([10] if evaluated else [])
