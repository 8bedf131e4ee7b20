"""Checkpoints that a kill tore, or that are of another run: skipped or refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpointed import Start, gap, starter, weights
from example_kinds import pairs
from transformers import Trainer, TrainerState

from companion import PairwiseRewardConfig
from companion.errors import CompanionError, RunEnded
from companion.training import checkpoints, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """A run that nothing disturbed, and its folder with all checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return starter(folder, tiny_base)(save_total_limit=None), folder / "model"


@pytest.fixture
def start(tmp_path: Path, tiny_base: Path) -> Start:
    return starter(tmp_path, tiny_base)


@pytest.fixture
def used(whole: Any, tmp_path: Path) -> Path:
    """An ``output_dir`` with the checkpoints of the whole run."""
    for step in (3, 6):
        name = f"checkpoint-{step}"
        shutil.copytree(whole[1] / name, tmp_path / "model" / name)
    return tmp_path / "model"


# ---------------------------------------------------------------------- torn


def tears(folder: Path, names: list[str]) -> Iterator[tuple[str, Path]]:
    """Copies of a checkpoint with a file removed, cut short or empty."""
    for name in names:
        for how in ("removed", "half", "empty"):
            torn = folder.parent / "torn" / "checkpoint-6"
            shutil.copytree(folder, torn)
            size = (torn / name).stat().st_size
            if how == "removed":
                (torn / name).unlink()
            else:
                os.truncate(torn / name, size // 2 if how == "half" else 0)
            yield f"{name}, {how}", torn
            shutil.rmtree(torn.parent)


def test_each_torn_file_is_seen(used: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = used / "checkpoint-6"
    assert checkpoints.fault_of(checkpoint) is None
    names = [p.name for p in checkpoint.iterdir() if p.name != checkpoints.RUN_FILE]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(names)
    for what, torn in tears(checkpoint, names):
        assert what.split(",")[0] in str(checkpoints.fault_of(torn)), what
    (checkpoint / "checkpoint-is-incomplete.txt").touch()
    assert checkpoints.fault_of(checkpoint) == "its save was broken off"
    (checkpoint / "checkpoint-is-incomplete.txt").unlink()
    # the same of checkpoints of before, which have no mark: whatever makes a run go on wrongly
    (checkpoint / checkpoints.RUN_FILE).unlink()
    assert checkpoints.fault_of(checkpoint) is None
    needed = ["model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for what, torn in tears(checkpoint, needed):
        assert checkpoints.fault_of(torn) is not None, what
    os.truncate(checkpoint / "optimizer.pt", 1_000)
    assert checkpoints.newest_whole(used) == used / "checkpoint-3"
    assert "optimizer.pt is cut short" in caplog.text
    os.truncate(used / "checkpoint-3" / "optimizer.pt", 1_000)
    with pytest.raises(CompanionError, match="no checkpoint is whole"):
        checkpoints.newest_whole(used)
    # a job that is requeued begins anew then, as it does where there is none
    for folder in (used, used / "nothing"):
        config = PairwiseRewardConfig(str(folder), resume_from_checkpoint="auto", report_to="none")
        assert checkpoints.checkpoint_of(config) is None


def test_auto_goes_on_where_there_is_a_checkpoint(used: Path) -> None:
    config = PairwiseRewardConfig(str(used), resume_from_checkpoint="auto", report_to="none")
    assert checkpoints.checkpoint_of(config) == str(used / "checkpoint-6")


def test_a_torn_checkpoint_is_skipped_or_refused(whole: Any, used: Path, start: Start) -> None:
    os.truncate(used / "checkpoint-6" / "optimizer.pt", 5_000)
    with pytest.raises(CompanionError, match=r"not whole \(optimizer.pt has 5,000 of "):
        start(resume_from_checkpoint=str(used / "checkpoint-6"))
    again = start(resume_from_checkpoint="last")
    assert gap(weights(again), weights(whole[0])) == 0.0
    for name in ("train_pairs", "train_loss"):  # of the whole run
        assert again.train_metrics[name] == pytest.approx(whole[0].train_metrics[name], rel=1e-6)
        assert again.manifest.training[name] == again.train_metrics[name]


def test_no_state_of_the_optimiser_is_an_error(used: Path, start: Start) -> None:
    for checkpoint in used.iterdir():
        (checkpoint / checkpoints.RUN_FILE).unlink()
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(CompanionError, match="no state of the optimiser"):
        start(resume_from_checkpoint="last")
    start(output="only", save_only_model=True)
    with pytest.raises(CompanionError, match="no state of the optimiser"):
        start(output="only", resume_from_checkpoint="last")


def in_the_middle(obj: Any, name: str, step: int) -> Callable[[], None]:
    """Die by SIGKILL in `obj.name` while checkpoint `step` is saved: its last file half written."""

    def arm() -> None:
        original = getattr(obj, name)

        def dies(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            folders = [
                Path(str(a)) for a in (*args, *kwargs.values()) if f"checkpoint-{step}" in str(a)
            ]
            if folders:
                folder = folders[0] if folders[0].is_dir() else folders[0].parent
                files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
                last = max(files, key=lambda path: path.stat().st_mtime_ns)
                os.truncate(last, last.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(obj, name, dies)

    return arm


def before(obj: Any, name: str, step: int, argument: int = 0) -> Callable[[], None]:
    """Die by SIGKILL before `obj.name`, once checkpoint `step` is there."""

    def arm() -> None:
        original = getattr(obj, name)

        def dies(*args: Any, **kwargs: Any) -> Any:
            where = kwargs.get("output_dir") or args[argument]
            if f"checkpoint-{step}" in str(where) or (Path(where) / f"checkpoint-{step}").is_dir():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(obj, name, dies)

    return arm


def killed(arm: Callable[[], None], run: Callable[[], Any]) -> None:
    """Run in a child that is killed on the way."""
    child = os.fork()
    if child == 0:
        arm()
        try:
            run()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


POINTS = {
    "model": in_the_middle(Trainer, "save_model", 6),
    "optimizer": in_the_middle(Trainer, "_save_optimizer_and_scheduler", 6),
    "rng": in_the_middle(Trainer, "_save_rng_state", 6),
    "state": in_the_middle(TrainerState, "save_to_json", 6),
    "mark": before(checkpoints, "mark_whole", 6),
    "show": before(checkpoints, "show", 6),
    "rotation": before(checkpoints, "rotate_checkpoints", 6),
}


def some(names: Iterable[str], fast: set[str]) -> list[Any]:
    """All, the others than `fast` among the slow tests."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(name, marks=marks[name in fast]) for name in names]


@pytest.mark.parametrize("point", some(POINTS, {"optimizer"}))
def test_killed_during_a_save(point: str, whole: Any, start: Start, tmp_path: Path) -> None:
    """At each point a whole checkpoint lies there, though one alone is kept."""
    killed(POINTS[point], start)
    folder = tmp_path / "model"
    seen = ["checkpoint-3", "checkpoint-6"] if point == "rotation" else ["checkpoint-3"]
    assert sorted(path.name for path in folder.glob("checkpoint*")) == seen
    assert checkpoints.newest_whole(folder) == folder / seen[-1]
    again = start(resume_from_checkpoint="last")
    assert gap(weights(again), weights(whole[0])) == 0.0
    assert again.train_metrics["train_pairs"] == whole[0].train_metrics["train_pairs"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    assert not (folder / checkpoints.PART).exists()


@pytest.mark.parametrize("point", some(("optimizer", "show"), {"show"}))
def test_killed_while_it_writes_over_an_earlier_checkpoint(
    point: str, start: Start, tmp_path: Path
) -> None:
    """Which stays as it is until the new one is whole."""
    used = start(save_total_limit=None, max_steps=6).output_dir
    files = {path: path.read_bytes() for path in (used / "checkpoint-6").iterdir()}
    killed(POINTS[point], lambda: start(save_total_limit=None, max_steps=6))
    assert (used / checkpoints.PART / "checkpoint-6").exists()
    assert checkpoints.newest_whole(used) == used / "checkpoint-6"
    assert files == {path: path.read_bytes() for path in (used / "checkpoint-6").iterdir()}
    start(save_total_limit=None, max_steps=6)
    mark = used / "checkpoint-6" / checkpoints.RUN_FILE
    assert mark.read_bytes() != files[mark]  # another run's seconds


def test_the_best_checkpoint_is_noted_under_its_own_name(start: Start) -> None:
    """transformers looks for it beside the one that it writes."""
    more = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    result = start(**more, save_steps=2, metric_for_best_model="eval_loss")
    best = []
    for path in sorted(result.output_dir.glob("checkpoint-*")):
        state = json.loads((path / "trainer_state.json").read_text())
        best.append(state["best_model_checkpoint"])
        assert best[-1] == str(result.output_dir / f"checkpoint-{state['best_global_step']}")
    assert best[-1] == str(result.output_dir / "checkpoint-8")


# ---------------------------------------------------------------------- no room


def on_a_full_disk(save: Callable[..., Any], length: int, time: int) -> Callable[..., Any]:
    """`save`, but that no file can be longer than `length` when it is called for the n-th time."""
    calls = []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        most = length if len(calls) == time else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            return save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    return full


@pytest.mark.parametrize(
    ("where", "time", "length", "what"),
    [
        # the first file; the model, by safetensors; the optimiser's state, by torch
        pytest.param((Trainer, "_save_checkpoint"), 1, 100, "checkpoint-3", marks=pytest.mark.slow),
        ((Trainer, "_save_checkpoint"), 2, 30_000, "checkpoint-6"),
        ((Trainer, "_save_checkpoint"), 2, 100_000, "checkpoint-6"),
        pytest.param((checkpoints, "mark_whole"), 2, 100, "checkpoint-6", marks=pytest.mark.slow),
        ((run, "save_reward_model"), 1, 20_000, "reward model"),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_good(
    where: tuple[Any, str],
    time: int,
    length: int,
    what: str,
    start: Start,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(*where, on_a_full_disk(getattr(*where), length, time))
    with pytest.raises(RunEnded, match=rf"{what}: could not be written \(.*bytes are free") as e:
        start()
    monkeypatch.undo()
    assert e.value.exit_code == 2
    assert not (tmp_path / "model" / checkpoints.PART).exists()
    newest = checkpoints.newest_whole(tmp_path / "model")
    last = {"checkpoint-3": None, "checkpoint-6": "checkpoint-3", "reward model": "checkpoint-8"}
    assert (newest and newest.name) == last[what]
    assert ("resume_from_checkpoint last goes on" in str(e.value)) == (newest is not None)
    again = start(resume_from_checkpoint="auto")
    assert gap(weights(again), weights(whole[0])) == 0.0


# ---------------------------------------------------------------------- of another run


def other_rows() -> list[dict[str, Any]]:
    rows = pairs(90)
    rows[40]["chosen"][0]["content"] += "!"
    return rows


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"rows": other_rows()}, "rows."),
    "order of the rows": ({"rows": pairs(90)[::-1]}, "rows.train: "),
    "split": ({"data": {"split_seed": 3}}, "rows.train: "),
    "rate": ({"learning_rate": 1e-3}, "learning_rate: 0.003 -> 0.001"),
    "seed": ({"seed": 1}, "seed: 42 -> 1"),
    "batch": ({"per_device_train_batch_size": 4}, "rows a step: 8 -> 4"),
    "length": ({"max_steps": 12}, "max_steps: -1 -> 12"),
    "epochs": ({"num_train_epochs": 2}, "num_train_epochs: 1.0 -> 2"),
    "LoRA": ({"model": {"use_peft": True, "lora_r": 4}}, "lora.r: nothing -> 4"),
    "formatter": ({"max_length": 50}, "max_length: 60 -> 50"),
    "beta": ({"adam_beta2": 0.95}, "adam_beta2: 0.999 -> 0.95"),
    "shape of the rate": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        "lr_scheduler_kwargs.power: nothing -> 2.0",
    ),
}


@pytest.mark.parametrize("other", some(OTHERS, {"rows", "rate", "beta"}))
def test_another_run_is_refused(other: str, used: Path, start: Start) -> None:
    more, named = OTHERS[other]
    with pytest.raises(CompanionError, match="is of another run") as caught:
        start(**more, resume_from_checkpoint="last")
    assert named in str(caught.value)
    assert "--resume_other_run" in str(caught.value)


@pytest.mark.slow
def test_another_base_is_refused(used: Path, start: Start, tiny_base: Path, tmp_path: Path) -> None:
    """Under the same name, or one weight of it changed."""
    from safetensors.torch import load_file, save_file

    copied = shutil.copytree(tiny_base, tmp_path / "copied")
    model = {"model_name_or_path": str(copied)}
    start(model=model, resume_from_checkpoint="last")  # the same base in another place
    state = load_file(copied / "model.safetensors")
    state["model.embed_tokens.weight"][5, 0] += 1e-3
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompanionError, match="base and head: "):
        start(model=model, resume_from_checkpoint="last")


def test_a_flag_allows_another_run_and_the_manifest_says_so(used: Path, start: Start) -> None:
    lines: list[str] = []
    result = start(
        max_grad_norm=0.5, resume_from_checkpoint="last", resume_other_run=True, lines=lines
    )
    told = [note for note in result.manifest.notes if "of another run" in note]
    assert len(told) == 1
    assert "max_grad_norm: 1.0 -> 0.5" in told[0]
    assert f"note: {told[0]}" in lines


@pytest.mark.slow
def test_what_does_not_change_the_result_may_change(used: Path, start: Start, whole: Any) -> None:
    again = start(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_total_limit=3,
        dataloader_num_workers=0,
        resume_from_checkpoint="last",
    )
    assert gap(weights(again), weights(whole[0])) < 1e-6


@pytest.mark.slow
def test_a_checkpoint_of_before_is_gone_on_from_with_a_note(
    used: Path, start: Start, whole: Any
) -> None:
    for path in used.iterdir():
        (path / checkpoints.RUN_FILE).unlink()
    result = start(resume_from_checkpoint="last")
    assert gap(weights(result), weights(whole[0])) == 0.0
    assert any("nothing could be compared" in note for note in result.manifest.notes)


# ---------------------------------------------------------------------- finished


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 4}, pytest.param({"num_train_epochs": 1.0}, marks=pytest.mark.slow)],
)
def test_a_finished_run_does_no_more(length: dict[str, Any], start: Start) -> None:
    first = start(**length)
    again = start(**length, resume_from_checkpoint="last")
    assert gap(weights(first), weights(again)) == 0.0
    assert len(again.log_history) - len(first.log_history) <= 1  # the closing line of the run
    for name in ("train_pairs", "train_loss"):
        assert again.train_metrics[name] == pytest.approx(first.train_metrics[name], rel=1e-6)
    assert again.metrics == first.metrics
    for name in ("train_steps_per_second", "train_samples_per_second"):  # not of no time at all
        assert 0 < again.train_metrics[name] <= 1.1 * first.train_metrics[name]
    assert again.train_metrics["train_runtime"] >= 0.9 * first.train_metrics["train_runtime"]
