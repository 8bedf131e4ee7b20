"""A corpus of files through datatrove: killed anywhere, each row once, with the plain scores."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
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


def check(model: Path, corpus: Path) -> None:
    """What `companion score` gives of each file, byte for byte."""
    scores = corpus.parent / "scores"
    found = {str(file.relative_to(scores)) for file in scores.rglob("*.jsonl")}
    assert found == {"a.jsonl", "b.jsonl", "c.jsonl", "more/d.jsonl"}
    assert not list(scores.rglob("*.part"))
    seen: Counter[int] = Counter()
    for name in found:
        source = corpus / name
        source = source if source.exists() else source.with_suffix(".jsonl.gz")
        plain = corpus.parent / "plain.jsonl"
        arguments = ["--model", str(model), "--input", str(source), "--output", str(plain)]
        main(["score", *arguments, "--on_error", "skip", "--chunk_rows", "4", "--overwrite"])
        assert (scores / name).read_text() == plain.read_text(), name
        seen.update(json.loads(line)["id"] for line in plain.read_text().splitlines())
    assert seen == Counter(range(31))


def test_killed_and_gone_on_with(tiny_reward: Path, corpus: Path) -> None:
    """Killed while a file is written, and again between its last row and its name."""
    scores, complete = corpus.parent / "scores", corpus.parent / "logs" / "completions"
    assert run(tiny_reward, corpus, kill=3) == -signal.SIGKILL
    assert [file.name for file in scores.glob("*.jsonl*") if file.suffix == ".part"]
    assert not (scores / "a.jsonl").exists()  # what is not whole has no name
    assert run(tiny_reward, corpus, kill=3) == -signal.SIGKILL
    assert not complete.exists() or len(list(complete.iterdir())) < 3
    assert run(tiny_reward, corpus, workers=1) == 0
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
