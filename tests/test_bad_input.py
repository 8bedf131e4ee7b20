"""What a user can get wrong, through the front door: a message that names the place, and exit 2."""

from __future__ import annotations

import json
import shutil

import pytest

from companion.cli.main import main

GOOD = {"prompt": "Ana has 3 boxes", "chosen": "right answer is 3", "rejected": "no idea"}


def _pairs(n: int = 30) -> list[dict]:
    return [GOOD | {"prompt": f"Ana has {i} boxes"} for i in range(n)]


def _write(path, rows, raw_line: str | None = None):
    lines = [json.dumps(row) for row in rows]
    if raw_line is not None:
        lines[6] = raw_line
    path.write_text("\n".join(lines) + "\n")
    return path


def _with(row_7: dict) -> list[dict]:
    rows = _pairs()
    rows[6] = row_7
    return rows


def _without(field: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != field}


#: what is wrong -> (rows, the seventh line as it stands, words of the message)
FILES = {
    "malformed JSON": (_pairs(), '{"prompt": "a", "chosen": ', ("line 7", "JSON")),
    "missing field": (_with(_without("rejected")), None, ("line 7", "rejected")),
    "chosen equal to rejected": (
        _with(GOOD | {"rejected": GOOD["chosen"]}),
        None,
        ("line 7", "chosen", "rejected"),
    ),
    "empty completion": (_with(GOOD | {"chosen": "  "}), None, ("line 7", "chosen", "empty")),
    "NaN margin": (
        [row | {"margin": 1.0} for row in _with(GOOD)],
        json.dumps(GOOD | {"margin": float("nan")}),
        ("line 7", "margin"),
    ),
}


def _train(base, data, output, *more) -> int:
    flags = {"--model_name_or_path": base, "--dataset_name": data, "--output_dir": output}
    given = [str(word) for flag in flags.items() for word in flag]
    return main(["train", "pairwise", *given, "--eval_fraction", "0.3", *more])


def _error(capsys) -> str:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "error: " in captured.err
    assert "Cure: " in captured.err
    return captured.err


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("command", ["train", "evaluate", "check"])
def test_bad_rows(what, command, tmp_path, tiny_base, tiny_reward, capsys):
    rows, raw, words = FILES[what]
    data = _write(tmp_path / "pairs.jsonl", rows, raw)
    if command == "train":
        code = _train(tiny_base, data, tmp_path / "out")
    elif command == "evaluate":
        code = main(["evaluate", "--model", str(tiny_reward), "--dataset_name", str(data)])
    else:
        code = main(["data", "check", str(data), "--kind", "pairs"])
    captured = capsys.readouterr()
    assert code == 2
    message = captured.err + captured.out
    assert "Traceback" not in message
    for word in ("pairs.jsonl", *words):
        assert word in message


def test_missing_file(tmp_path, tiny_base, tiny_reward, capsys):
    gone = tmp_path / "gone.jsonl"
    assert _train(tiny_base, gone, tmp_path / "out") == 2
    assert "gone.jsonl" in _error(capsys)
    assert main(["evaluate", "--model", str(tiny_reward), "--dataset_name", str(gone)]) == 2
    assert "gone.jsonl" in _error(capsys)
    score = ["score", "--model", str(tiny_reward), "--output", str(tmp_path / "scores.jsonl")]
    assert main([*score, "--input", str(gone)]) == 2
    assert "gone.jsonl" in _error(capsys)


def test_all_rows_too_long(tmp_path, tiny_base, capsys):
    data = _write(tmp_path / "pairs.jsonl", _pairs())
    assert _train(tiny_base, data, tmp_path / "out", "--max_length", "4") == 2
    assert "max_length" in _error(capsys)


@pytest.mark.parametrize("command", ["train", "evaluate", "score"])
def test_wrong_model_folder(command, tmp_path, capsys):
    data = _write(tmp_path / "pairs.jsonl", _pairs())
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = {
        "evaluate": ["--dataset_name", str(data)],
        "score": ["--input", str(data), "--output", str(tmp_path / "out.jsonl")],
    }
    if command == "train":
        assert _train(empty, data, tmp_path / "out") == 2
    else:
        assert main([command, "--model", str(empty), *arguments[command]]) == 2
    assert "empty" in _error(capsys)


@pytest.mark.parametrize("command", ["evaluate", "score"])
def test_a_checkpoint_without_a_head(command, tmp_path, tiny_base, capsys):
    data = _write(tmp_path / "rows.jsonl", [{"text": "right answer"}] * 3)
    arguments = {
        "evaluate": ["--dataset_name", str(_write(tmp_path / "pairs.jsonl", _pairs()))],
        "score": ["--input", str(data), "--output", str(tmp_path / "out.jsonl")],
    }
    headless = tmp_path / "headless"
    shutil.copytree(tiny_base, headless)
    assert main([command, "--model", str(headless), *arguments[command]]) == 2
    assert "head" in _error(capsys)


def test_an_unknown_setting_in_the_yaml_is_named(tmp_path, tiny_base, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rat: 1.0e-4\n")
    data = _write(tmp_path / "pairs.jsonl", _pairs())
    assert _train(tiny_base, data, tmp_path / "out", "--config", str(config)) == 2
    assert "learning_rat" in capsys.readouterr().err
