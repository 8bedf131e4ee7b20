"""``companion data`` from the outside: output, files, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from companion import load_rows, write_rows
from companion.cli.main import main
from companion.data import overlap_report

GOOD = [
    {"prompt": f"p{i % 20}", "chosen": f"long answer {i}", "rejected": f"no {i}", "subset": "s"}
    for i in range(60)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.jsonl"
    write_rows(GOOD, path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_tutor_writes_what_make_rows_makes(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from companion.tutor import limits, make_rows

    path = tmp_path / f"x.{suffix}"
    args = ["--n", "40", "--seed", "3", "--noise", "0.2", "--output", str(path)]
    assert main(["data", "tutor", "--kind", "pairs", *args]) == 0
    rows = make_rows("pairs", 40, 3, noise=0.2)
    loaded = load_rows(path)
    assert loaded["probability"][:] == [row["probability"] for row in rows]
    assert loaded["chosen"][:] == [row["chosen"] for row in rows]
    out = capsys.readouterr().out
    assert "40 pairs written" in out
    assert f"{limits(rows).accuracy:.4f}" in out


def test_every_kind_of_the_tutor_passes_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from companion.tutor import KINDS

    for kind in KINDS:
        path = str(tmp_path / f"{kind}.jsonl")
        assert main(["data", "tutor", "--kind", kind, "--n", "30", "--output", path]) == 0
        assert main(["data", "check", path]) == 0, kind
        assert "all rows are good" in capsys.readouterr().out


def test_tutor_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "x.jsonl")
    assert main(["data", "tutor", "--n", "0", "--output", path]) == 2
    assert main(["data", "tutor", "--n", "5", "--output", str(tmp_path / "x.txt")]) == 2
    assert main(["data", "tutor", "--n", "5", "--noise", "7", "--output", path]) == 2
    assert "noise" in capsys.readouterr().err


def test_tutor_help_explains_the_dials(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "tutor", "--help"])
    assert caught.value.code == 0
    assert "share of labels" in capsys.readouterr().out


def test_check(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(file), "--kind", "pairs"]) == 0
    out = capsys.readouterr().out
    assert "60 rows, 20 different prompts" in out
    bad = tmp_path / "bad.jsonl"
    bad.write_text(file.read_text() + '{"prompt": "p", "chosen": "a"}\n{"prompt"\n')
    assert main(["data", "check", str(bad)]) == 2
    captured = capsys.readouterr()
    assert "bad.jsonl, line 61, field 'rejected': missing field" in captured.out
    assert "bad.jsonl, line 62: malformed JSON" in captured.out
    assert "2 bad rows" in captured.err
    assert "Cure" in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "missing.jsonl"],
        ["describe", "missing.jsonl"],
        ["split", "missing.jsonl", "--output_dir", "parts"],
        ["convert", "missing.jsonl", "--output", "y.jsonl"],
    ],
)
def test_a_missing_file_is_exit_2(
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *argv]) == 2
    assert "missing file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_describe(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "describe", str(file)]) == 0
    out = capsys.readouterr().out
    assert "the longer completion is chosen in 100.0%" in out
    assert main(["data", "describe", str(file), "--json"]) == 0
    d: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (d["rows"], d["prompts"], d["kind"]) == (60, 20, "pairs")
    assert d["longer_wins"] == 1.0
    assert d["subsets"] == {"s": 60}
    assert d["lengths"]["chosen"]["max"] == len("long answer 10")


def test_describe_by_hand(tmp_path: Path) -> None:
    from companion.data import describe_rows

    rows = [
        {"prompt": "p", "chosen": "aaaa", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "bbb"},
        {"prompt": "q", "chosen": "aa", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "c"},
    ]
    d = describe_rows(rows)
    assert d["longer_wins"] == pytest.approx(2 / 3)
    assert (d["equal_length"], d["prompts"]) == (1, 2)
    assert d["lengths"]["chosen"] == {"n": 4, "median": 1.5, "p90": 2, "max": 4}
    steps = [{"prompt": "p", "completions": ["a", "bb"], "labels": [1, None]}]
    d = describe_rows(steps)
    assert d["labels"] == {"1": 1, "None": 1}
    assert d["lengths"]["completions"]["n"] == 2


def test_split(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts"
    command = ["data", "split", str(file), "--test_fraction", "0.3", "--output_dir", str(out)]
    assert main(command) == 0
    train, test = load_rows(out), load_rows(out, split="test")
    assert len(train) + len(test) == 60
    report = overlap_report(train, test)
    assert report.clean
    record = json.loads((out / "split.json").read_text())
    assert record["overlap"] == report.as_dict()
    assert "0 prompts stand in both" in capsys.readouterr().out
    before = (out / "train.jsonl").read_bytes()
    assert main(command) == 2  # nothing is overwritten unasked
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert (out / "train.jsonl").read_bytes() == before


def test_split_by_a_column_warns_when_prompts_leak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    write_rows([row | {"id": str(i)} for i, row in enumerate(GOOD)], path)
    command = ["data", "split", str(path), "--by", "id", "--output_dir", str(tmp_path / "parts")]
    assert main([*command, "--test_fraction", "0.5"]) == 0
    assert "prompts stand in both parts" in capsys.readouterr().err


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = "\n\nHuman: 2 + 2?\n\nAssistant:"
    path, target = tmp_path / "hh.jsonl", tmp_path / "out.parquet"
    write_rows([{"good": start + " 4", "bad": start + " 5"}], path)
    names = ["--columns", "good=chosen", "bad=rejected"]
    assert (
        main(["data", "convert", str(path), *names, "--kind", "pairs", "--output", str(target)])
        == 0
    )
    row = load_rows(target)[0]
    assert row["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "4"}]
    assert main(["data", "convert", str(path), "--columns", "good", "--output", str(target)]) == 2
    assert "OLD=NEW" in capsys.readouterr().err


def test_importing_the_command_is_cheap() -> None:
    import subprocess
    import sys

    code = (
        "import sys, argparse, companion.cli.data as d, companion.data;"
        "d.add_arguments(argparse.ArgumentParser());"
        "print([m for m in ('torch', 'datasets', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
