"""``score``, ``evaluate`` and ``rank`` under a launcher: each row once, in order, and only once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import launch

# with all that they import, before the ranks are forked
from companion import evaluate_pairs, rank_file, score_file  # noqa: F401
from companion.cli.main import COMMANDS, main

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
#: rows, of which two are bad: one for each of two ranks
N, BAD = 61, (5, 58)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of many lengths; some prompts too long, so that both ranks have some to cut."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"id": f"row {i}", "prompt": "Ana has pens " * (1 + i % 13), "completion": f"so it is {i}"}
        for i in range(N)
    ]
    for place in BAD:
        del lines[place]["completion"]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same lines in the same order; scores of other batches to 1e-5."""
    for own, other in zip(found, expected, strict=True):
        assert own.pop("score") == pytest.approx(other["score"], abs=1e-5)
        assert own == {key: value for key, value in other.items() if key != "score"}


def test_score_is_shared_and_goes_on(
    tiny_reward: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in a line on two ranks, it goes on on two, and on one; all give what one gives."""

    def score(output: Path, *more: str) -> list[str]:
        given = ["--model", str(tiny_reward), "--input", str(rows), "--output", str(output)]
        given += ["--on_error", "skip", "--max_length", "24", "--overlong", "truncate_prompt"]
        return ["score", *given, *more]

    assert main(score(tmp_path / "alone.jsonl")) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{len(BAD)} without a score" in said
    expected = read(tmp_path / "alone.jsonl")
    assert [row["index"] for row in expected] == list(range(N))

    shared = tmp_path / "shared.jsonl"
    with pytest.raises(AssertionError):
        launch([str(HERE / "killed_worker.py"), *score(shared, "--chunk_rows", "9")], forked=True)
    assert 2 * 9 < shared.read_bytes().count(b"\n") < 4 * 9  # and the last line is torn
    assert not shared.read_bytes().endswith(b"\n")
    other = tmp_path / "other.jsonl"
    for suffix in ("", ".state.json"):
        shutil.copy(f"{shared}{suffix}", f"{other}{suffix}")
    launch(["-m", "companion", *score(shared, "--chunk_rows", "9")], torchrun=True)
    equal(read(shared), expected)
    assert main(score(other)) == 0
    equal(read(other), expected)

    whole = tmp_path / "whole.jsonl"
    text = launch(["-m", "companion", *score(whole, "--chunk_rows", "4")], forked=True)
    equal(read(whole), expected)
    # the counts are those of all ranks, and one rank says them
    assert text.count(said.removeprefix(str(tmp_path / "alone.jsonl"))) == 1
    assert "cut by" in said


def test_an_error_of_one_rank_ends_all(tiny_reward: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.jsonl"
    with pytest.raises(AssertionError, match=f"line {BAD[0] + 1}") as failed:
        launch(
            [
                *("-m", "companion", "score", "--model", str(tiny_reward), "--input", str(rows)),
                *("--output", str(output)),
            ],
            forked=True,
        )
    assert "Traceback" not in str(failed.value)
    assert output.read_bytes() == b""


def test_evaluate_has_the_figures_of_one(
    tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        {"prompt": f"Ana has {i} pens", "chosen": "so it is " * (1 + i % 5), "rejected": f"no {i}"}
        for i in range(37)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arguments = ["evaluate", "--model", str(tiny_reward)]
    arguments += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--json"]
    assert main([*arguments, str(tmp_path / "alone.json")]) == 0
    table = capsys.readouterr().out.split("figures:")[0]
    text = launch(["-m", "companion", *arguments, str(tmp_path / "shared.json")], forked=True)
    assert text.count(table.strip()) == 1
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("alone", "shared"))
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], abs=1e-5)
    assert two["metrics"]["n"] == one["metrics"]["n"] == 37


def test_rank_writes_the_files_of_one(tiny_reward: Path, tmp_path: Path) -> None:
    prompts = [
        {"prompt": f"Ana has {i} pens", "completions": [f"so it is {k}" for k in range(2 + i % 3)]}
        for i in range(11)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))

    def rank(output: Path) -> list[str]:
        given = ["--model", str(tiny_reward), "--input", str(tmp_path / "prompts.jsonl")]
        return ["rank", *given, "--output", str(output), "--chunk_rows", "2"]

    assert main(rank(tmp_path / "alone.jsonl")) == 0
    launch(["-m", "companion", *rank(tmp_path / "shared.jsonl")], forked=True)
    assert read(tmp_path / "shared.jsonl") == read(tmp_path / "alone.jsonl")
    assert len(read(tmp_path / "shared.jsonl.ranks.jsonl")) == 11


def test_what_works_in_one_process_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = {"train", "retrain", "score", "evaluate", "rank"}
    assert shared < set(COMMANDS)
    for command in set(COMMANDS) - shared:
        assert main([command]) == 2
        said = capsys.readouterr().err
        assert "without torchrun" in said
        assert len(said.splitlines()) == 2, said
