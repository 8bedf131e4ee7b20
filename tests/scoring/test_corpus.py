"""A corpus of files through datatrove: killed anywhere, each row once, with the plain scores."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from forking import Program, run_forked

# with all that they import, before the programs are forked
from companion import RewardScorer, score_file  # noqa: F401
from companion.cli.main import main
from companion.errors import DataError

pytest.importorskip("datatrove")
pytestmark = pytest.mark.distributed

RECIPE = Path(__file__).parents[2] / "recipes/corpus/score.py"
#: a program, since a task that is killed takes its executor with it
PROGRAM = """
import os, signal, sys
from datatrove.executor import LocalPipelineExecutor
from companion.scoring import ScoreRewards, files

model, given, out, logs, kill, workers = sys.argv[1:]
places = iter(range(1000))
for name in ("fsync", "replace"):
    def killed(*args, own=getattr(os, name)):
        if next(places) == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args)
    setattr(os, name, killed)
if __name__ == "__main__":
    os.setsid()
    with open(os.path.join(os.path.dirname(out), "group"), "w") as file:
        file.write(str(os.getpid()))
    step = ScoreRewards(model, given, out, fields=["id"], on_error="skip", chunk_rows=4)
    LocalPipelineExecutor([step], tasks=3, workers=int(workers), logging_dir=logs).run()
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four files in two folders, one of them packed, one empty, with 31 rows; one row is bad."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    rows = [{"id": i, "prompt": f"Ana has {i} pens", "completion": "so " * i} for i in range(31)]
    del rows[17]["completion"]
    for name, part in (("a", rows[:9]), ("b", []), ("c", rows[9:20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with gzip.open(folder / "more" / "d.jsonl.gz", "wt") as packed:
        packed.writelines(json.dumps(row) + "\n" for row in rows[20:])
    return folder


def run(model: Path, corpus: Path, *, kill: int = -1, workers: int = 1) -> int:
    """Score the corpus with three tasks; the exit code."""
    folder = corpus.parent
    (folder / "program.py").write_text(PROGRAM)
    places = [str(folder / name) for name in ("scores", "logs")]
    arguments = [str(folder / "program.py"), str(model), str(corpus), *places]
    program = Program([*arguments, str(kill), str(workers)], {}, str(folder / "said"))
    [code] = run_forked([program], seconds=300)
    # datatrove's manager of processes outlives an executor that is killed
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((folder / "group").read_text()), signal.SIGKILL)
    assert code in (0, -signal.SIGKILL), (folder / "said").read_text()
    return code


def recipe(executor: str, model: Path, corpus: Path, *more: str) -> list[str]:
    places = {"input": corpus, "output": corpus.parent / "scores", "logs": corpus.parent / "logs"}
    flags = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    return [str(RECIPE), executor, "--model", str(model), *flags, "--tasks", "3", *more]


def check(model: Path, corpus: Path) -> None:
    """The lines that `companion score` gives of each file; scores of other batches to 1e-5."""
    scores = corpus.parent / "scores"
    names = {str(file.relative_to(scores)) for file in scores.rglob("*.jsonl")}
    assert names == {"a.jsonl", "b.jsonl", "c.jsonl", "more/d.jsonl"}
    assert not list(scores.rglob("*.part"))
    seen: Counter[int] = Counter()
    for name in names:
        source = corpus / name
        source = source if source.exists() else source.with_suffix(".jsonl.gz")
        plain = corpus.parent / "plain.jsonl"
        arguments = ["--model", str(model), "--input", str(source), "--output", str(plain)]
        code = main(["score", *arguments, "--on_error", "skip", "--overwrite"])
        if name == "b.jsonl":  # alone, an empty file is an error
            assert code == 2
            plain.write_text("")
        found, expected = (
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in (scores / name, plain)
        )
        for one, other in zip(found, expected, strict=True):
            assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-5)
            assert one == other
        seen.update(row["id"] for row in found)
    assert seen == Counter(range(31))


def test_killed_and_gone_on_with(tiny_reward: Path, corpus: Path) -> None:
    """Killed while a file is written, and again between its last row and its name."""
    scores, complete = corpus.parent / "scores", corpus.parent / "logs" / "completions"
    assert run(tiny_reward, corpus, kill=3) == -signal.SIGKILL
    assert [file.name for file in scores.glob("*.jsonl*") if file.suffix == ".part"]
    assert not (scores / "a.jsonl").exists()  # what is not whole has no name
    assert run(tiny_reward, corpus, kill=3) == -signal.SIGKILL
    assert not complete.exists() or len(list(complete.iterdir())) < 3
    program = Program(recipe("local", tiny_reward, corpus), {}, str(corpus.parent / "said"))
    assert run_forked([program], seconds=300) == [0], (corpus.parent / "said").read_text()
    assert len(list(complete.iterdir())) == 3
    check(tiny_reward, corpus)
    before = {file: file.stat().st_ino for file in scores.rglob("*.jsonl")}
    # markers that were lost: all is looked through, and nothing is written anew
    (complete / "00000").unlink()
    assert run(tiny_reward, corpus) == 0
    assert {file: file.stat().st_ino for file in scores.rglob("*.jsonl")} == before


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(12))
def test_killed_anywhere(kill: int, tiny_reward: Path, corpus: Path) -> None:
    """At each place where a file is made durable or gets its name."""
    run(tiny_reward, corpus, kill=kill)
    assert run(tiny_reward, corpus, workers=2) == 0
    check(tiny_reward, corpus)


@pytest.mark.slow
def test_the_recipe_on_a_stand_in_for_slurm(
    tiny_reward: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sbatch would be given, and the tasks of its array, one after the other."""
    for name, said in (("sbatch", "Submitted batch job 7"), ("scontrol", "localhost")):
        (tmp_path / name).write_text(
            f'#!/bin/sh\nfor last; do :; done\ncp "$last" {tmp_path}/given'
            f" 2>/dev/null\necho {said}\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root, prepend=os.pathsep)
    more = ("--partition", "gpus", "--workers", "2")
    subprocess.run([sys.executable, *recipe("slurm", tiny_reward, corpus, *more)], check=True)
    script = (corpus.parent / "logs" / "launch_script.slurm").read_text()
    for line in ("array=0-2%2", "gpus=1", "partition=gpus", "signal=USR1@60", "requeue"):
        assert f"#SBATCH --{line}" in script
    assert f"launch_pickled_pipeline {corpus.parent}/logs/executor.pik" in script
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    start = "from datatrove.tools.launch_pickled_pipeline import main; main()"
    for task in "012":
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        command = [sys.executable, "-c", start, str(corpus.parent / "logs" / "executor.pik")]
        subprocess.run(command, check=True)
    check(tiny_reward, corpus)


def test_another_model_is_not_mixed_in(
    tiny_reward: Path, corpus: Path, tiny_rewards, tmp_path: Path
) -> None:
    from companion.scoring import ScoreRewards

    list(ScoreRewards(tiny_reward, corpus, tmp_path / "scores", on_error="skip").run())
    other = ScoreRewards(tiny_rewards("llama"), corpus, tmp_path / "scores", on_error="skip")
    with pytest.raises(DataError, match="begun with another model"):
        list(other.run())


def test_folders_that_hold_no_corpus(tiny_reward: Path, tmp_path: Path) -> None:
    from companion.scoring import ScoreRewards

    with pytest.raises(DataError, match=r"no \.jsonl"):
        list(ScoreRewards(tiny_reward, tmp_path, tmp_path / "scores").run())
    (tmp_path / "a.jsonl").touch()
    gzip.open(tmp_path / "a.jsonl.gz", "wt").close()
    with pytest.raises(DataError, match="packed and plain"):
        list(ScoreRewards(tiny_reward, tmp_path, tmp_path / "scores").run())
