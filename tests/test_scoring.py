"""The scorer and ``companion score``: one score for a text, no row lost or doubled."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from companion import RewardScorer, score_file, write_rows as save
from companion.cli.main import main
from companion.errors import DataError, ModelError, ReadoutError
from companion.models import (
    ReferenceStats,
    RewardManifest,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.models.checkpoint import model_fingerprint

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")
USER = {"role": "user", "content": "Ana has 3 boxes . How many ?"}


@pytest.fixture
def scorer(tiny_reward: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(tiny_reward, device="cpu")


@pytest.fixture(scope="module")
def referenced(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a reference set."""
    folder = tmp_path_factory.mktemp("referenced")
    manifest = RewardManifest(reference=ReferenceStats.from_scores(np.linspace(-2, 2, 401), "grid"))
    save_reward_model(load_base(tiny_base), folder, manifest)
    return folder


# ---------------------------------------------------------------------- one score for a text


@pytest.mark.parametrize("kind", KINDS)
def test_score_depends_on_the_text_alone(
    kind: str, tiny_rewards: Callable[[str], Path], tiny_texts: list[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = RewardScorer.from_pretrained(tiny_rewards(kind), device="cpu")
    single = np.array([scorer.score([text]).raw[0] for text in tiny_texts])
    assert single.std() > 0.05
    order = random.Random(1).sample(range(len(tiny_texts)), len(tiny_texts))
    for tokens in (1, 64, 100_000):
        for side in ("right", "left"):
            other = RewardScorer(
                scorer.reward_model, max_tokens_per_batch=tokens, padding_side=side
            )
            shuffled = other.score([tiny_texts[i] for i in order]).raw
            np.testing.assert_allclose(shuffled, single[order], atol=1e-5, rtol=0)
    # and stock transformers, from text to number
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_rewards(kind), dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_rewards(kind))
    ended = [text + tokenizer.eos_token for text in tiny_texts]
    batch = tokenizer(ended, padding=True, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        stock = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, 0
        ]
    np.testing.assert_allclose(stock.numpy(), single, atol=1e-5, rtol=0)


def test_kinds_of_rows_agree(scorer: RewardScorer) -> None:
    answer = {"role": "assistant", "content": "the answer is 3"}
    scores = scorer.score(
        [
            [USER, answer],
            {"messages": [USER, answer]},
            {"prompt": [USER], "completion": [answer]},
            {"prompt": [USER], "completion": answer["content"]},
            "Ana has 3",
            {"text": "Ana has 3"},
            {"prompt": "Ana has", "completion": " 3"},
        ]
    )
    np.testing.assert_allclose(scores.raw[1:4], scores.raw[0], atol=1e-6)
    np.testing.assert_allclose(scores.raw[5:], scores.raw[4], atol=1e-6)
    assert abs(scores.raw[0] - scores.raw[4]) > 1e-2
    assert scores.n_tokens.tolist()[4:] == [5, 5, 5]
    assert scores.reasons == [None] * 7
    assert len(scores) == 7
    assert scores.n_dropped == 0
    assert (scores.centered, scores.z, scores.percentile) == (None, None, None)


def test_cut_off_text_has_another_score(scorer: RewardScorer) -> None:
    row = {"prompt": [USER], "completion": "the answer is 3"}
    finished, cut = scorer.score([row, {**row, "terminated": False}]).raw
    assert abs(finished - cut) > 1e-2
    np.testing.assert_allclose(scorer.score([row], terminated=False).raw[0], cut, atol=1e-5)


def test_pairs_are_their_two_sides(scorer: RewardScorer) -> None:
    rows = [
        {"prompt": [USER], "chosen": "the answer is 3", "rejected": "no 4"},
        {"chosen": "Ana has 3", "rejected": "Ana"},
    ]
    pairs = scorer.score_pairs(rows)
    for side in ("chosen", "rejected"):
        alone = scorer.score(rows, field=side)
        np.testing.assert_allclose(getattr(pairs, side), alone.raw, atol=1e-5)
        assert getattr(pairs, f"{side}_tokens").tolist() == alone.n_tokens.tolist()
    assert pairs.kept.tolist() == [True, True]


def test_reference_forms(referenced: Path) -> None:
    scorer = RewardScorer.from_pretrained(referenced, device="cpu")
    scores = scorer.score(["Ana has 3", "Ben", "yes no"])
    reference = scorer.reference
    assert reference is not None
    assert scores.z is not None
    assert scores.percentile is not None
    np.testing.assert_allclose(scores.centered, scores.raw - reference.mean)
    np.testing.assert_allclose(scores.z, scores.centered / reference.std)
    inside = np.clip((scores.raw + 2) / 4 * 100, 0, 100)  # the grid is uniform on [-2, 2]
    np.testing.assert_allclose(scores.percentile, inside, atol=0.1)


def test_training_mode_gradient_and_autocast_are_left_alone(scorer: RewardScorer) -> None:
    model = scorer.reward_model.model
    before = scorer.score(["Ana has 3"]).raw
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = scorer.score(["Ana has 3"]).raw
    assert model.training
    assert np.array_equal(before, inside)
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------- nothing lost in silence


def test_rows_that_are_dropped_have_a_reason(tiny_reward: Path) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu", max_length=8)
    rows = ["Ana", "Ana has 3 boxes and 4 pens each", "Ben"]
    scores = scorer.score(rows)
    assert np.isnan(scores.raw).tolist() == [False, True, False]
    assert scores.reasons[1] == "longer than max_length=8 tokens"
    assert scores.n_tokens.tolist() == [3, 0, 3]
    assert scorer.formatter.counts.dropped_overlong == 1
    pairs = scorer.score_pairs([{"chosen": "Ana", "rejected": rows[1]}])
    assert np.isnan([pairs.chosen[0], pairs.rejected[0]]).all()
    assert pairs.n_dropped == 1
    strict = RewardScorer.from_pretrained(tiny_reward, device="cpu", max_length=8, overlong="error")
    with pytest.raises(DataError, match="row 1"):
        strict.score(rows)
    assert "more than max_length=8" in str(strict.score(rows, on_error="skip").reasons[1])


def test_text_longer_than_the_positions(tiny_rewards: Callable[[str], Path]) -> None:
    scorer = RewardScorer.from_pretrained(tiny_rewards("gpt2"), device="cpu")
    long = " ".join(["Ana"] * 200)
    scores = scorer.score([long, "Ana"])
    assert scores.reasons == ["202 tokens, the model has positions for 128", None]
    with pytest.raises(ModelError, match="positions for 128"):
        scorer.score_encoded([[1] * 200])


def test_bad_rows(scorer: RewardScorer) -> None:
    rows = ["Ana", {"prompt": "Ana", "completion": ""}, {"x": 1}]
    with pytest.raises(DataError, match="row 1"):
        scorer.score(rows)
    scores = scorer.score(rows, on_error="skip")
    assert np.isfinite(scores.raw).tolist() == [True, False, False]
    assert "completion is empty" in str(scores.reasons[1])
    with pytest.raises(DataError, match=r"score\(\[row\]\)"):
        scorer.score("Ana")
    with pytest.raises(DataError, match=r"score\(\[messages\]\)"):
        scorer.score([USER, {"role": "assistant", "content": "no"}])
    with pytest.raises(DataError, match="on_error"):
        scorer.score(["Ana"], on_error="ignore")  # type: ignore[arg-type]
    assert len(scorer.score([])) == 0


def test_scores_that_are_not_finite(scorer: RewardScorer) -> None:
    model = scorer.reward_model.model
    word = scorer.reward_model.tokenizer.convert_tokens_to_ids("Ben")
    with torch.no_grad():
        model.get_input_embeddings().weight[word] = float("nan")
    rows = ["Ana", "Ben has", "yes", "Ben"]
    with pytest.raises(ReadoutError, match=r"row 1: the score is not finite .*2 such"):
        scorer.score(rows)
    scores = scorer.score(rows, on_error="skip")
    assert np.isfinite(scores.raw).tolist() == [True, False, True, False]
    assert "not finite" in str(scores.reasons[3])
    with pytest.raises(ReadoutError, match="text 1"):
        scorer.score_encoded([[1, 9, 2], [1, word, 2]])


def test_score_encoded_is_in_order(scorer: RewardScorer, tiny_texts: list[str]) -> None:
    encoded = [e for e in scorer.formatter.encode_many(tiny_texts) if e is not None]
    done: list[int] = []
    scores = scorer.score_encoded(encoded, progress=done.append)
    np.testing.assert_allclose(scores, scorer.score(tiny_texts).raw, atol=1e-5)
    assert sum(done) == len(tiny_texts)


def test_fingerprint_tells_versions_apart(tiny_reward: Path, tiny_base: Path) -> None:
    one = load_reward_model(tiny_reward).model
    assert model_fingerprint(one) == model_fingerprint(load_reward_model(tiny_reward).model)
    assert model_fingerprint(one) != model_fingerprint(load_base(tiny_base, head_seed=1).model)


# ---------------------------------------------------------------------- companion score


def write_rows(path: Path, n: int) -> list[dict[str, Any]]:
    generator = random.Random(3)
    rows = [
        {
            "id": f"r{i}",
            "prompt": [USER],
            "completion": " ".join(generator.choices(["Ana", "3", "boxes", "no"], k=1 + i % 9)),
            "score": "mine",
        }
        for i in range(n)
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(model: Path, source: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model", str(model), "--input", str(source), "--output", str(output)]
    return ["score", *paths, "--device", "cpu", *more]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_command_writes_each_row_in_order(
    referenced: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / f"in.{suffix}", tmp_path / "deep" / "out.jsonl"
    rows = write_rows(source, 25)
    more = ("--fields", "completion", "score", "--chunk_rows", "7")
    assert main(command(referenced, source, output, *more)) == 0
    written = read_rows(output)
    assert [r["index"] for r in written] == list(range(25))
    assert [r["id"] for r in written] == [r["id"] for r in rows]
    assert written[3]["input_score"] == "mine"
    scores = RewardScorer.from_pretrained(referenced, device="cpu").score(rows)
    for name, values in (("score", scores.raw), ("z", scores.z), ("percentile", scores.percentile)):
        np.testing.assert_allclose([r[name] for r in written], values, atol=1e-4)
    assert "25 rows, 25 scored now" in capsys.readouterr().err
    # a second run has nothing to do and changes nothing
    before = output.read_bytes()
    assert main(command(referenced, source, output, *more)) == 0
    assert output.read_bytes() == before
    assert "25 done before, 0 scored now" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_torn_output_goes_on(scorer: RewardScorer, tmp_path: Path, torn: int) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 20)
    score_file(scorer, source, output, chunk_rows=6)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:9]) + lines[9][:torn])
    counted: list[int] = []
    report = score_file(scorer, source, output, chunk_rows=6, progress=counted.append)
    assert (report.resumed_at, report.scored, sum(counted)) == (9, 11, 20)
    again = read_rows(output)
    first = [json.loads(line) for line in lines]
    assert [r["id"] for r in again] == [r["id"] for r in first]
    np.testing.assert_allclose([r["score"] for r in again], [r["score"] for r in first], atol=1e-5)


def test_killed_run_goes_on(tiny_reward: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = write_rows(source, 3000)
    arguments = command(tiny_reward, source, output, "--chunk_rows", "1")
    # forked: a fresh interpreter takes five seconds of imports to get there
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    try:
        while process.is_alive() and not (output.exists() and output.stat().st_size > 2000):
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    done = output.read_bytes().count(b"\n")
    assert 0 < done < len(rows)  # it was killed in the middle
    with output.open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"index": 99')
    assert main(command(tiny_reward, source, output)) == 0
    written = read_rows(output)
    assert [r["index"] for r in written] == list(range(len(rows)))
    assert [r["id"] for r in written] == [r["id"] for r in rows]
    fresh = RewardScorer.from_pretrained(tiny_reward, device="cpu").score(rows)
    np.testing.assert_allclose([r["score"] for r in written], fresh.raw, atol=1e-5)


def test_output_of_another_run_is_not_mixed(
    tiny_rewards: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 5)
    first = command(tiny_rewards("qwen3"), source, output)
    assert main(first) == 0
    before = output.read_bytes()

    other_model = command(tiny_rewards("qwen2"), source, output)
    assert main(other_model) == 2
    assert "begun with another model" in capsys.readouterr().err
    assert main([*first, "--on_error", "skip"]) == 2
    assert "another options" in capsys.readouterr().err
    write_rows(source, 6)
    assert main(first) == 2
    error = capsys.readouterr().err
    assert "another input" in error
    assert "--overwrite" in error
    assert output.read_bytes() == before

    assert main([*first, "--overwrite"]) == 0
    assert len(read_rows(output)) == 6
    output.with_name("out.jsonl.state.json").unlink()
    assert main(first) == 2
    assert "was not begun by this command" in capsys.readouterr().err


def test_changed_output_is_noticed(scorer: RewardScorer, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 6)
    score_file(scorer, source, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join([lines[0], lines[2]]))
    with pytest.raises(DataError, match="line 2: should hold row 1"):
        score_file(scorer, source, output)
    output.write_bytes(b"".join(lines * 2))
    with pytest.raises(DataError, match="should hold row 11"):
        score_file(scorer, source, output)


def test_two_writers_are_refused(scorer: RewardScorer, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 3)
    held = FileLock(output.with_name("out.jsonl.lock"))
    with held, pytest.raises(DataError, match="another process is writing"):
        score_file(scorer, source, output)
    assert score_file(scorer, source, output).scored == 3


def test_bad_lines_are_named_or_written(
    tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('\n"Ana"\n{"prompt": "Ana"\n{"text": ""}\n7\n{"text": "Ben", "error": "x"}\n')
    arguments = command(tiny_reward, source, output)
    assert main(arguments) == 2
    assert "in.jsonl line 3: malformed JSON" in capsys.readouterr().err
    assert main([*arguments, "--on_error", "skip", "--fields", "*", "--overwrite"]) == 0
    written = read_rows(output)
    assert ["error" in r for r in written] == [False, True, True, True, False]
    assert [r["score"] is None for r in written] == [False, True, True, True, False]
    assert "line 4" in written[2]["error"]
    assert written[4]["input_error"] == "x"
    assert "3 without a score" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".csv", ".tsv", ".parquet"])
def test_tables_are_scored_as_lines_are(scorer: RewardScorer, tmp_path: Path, suffix: str) -> None:
    rows = write_rows(tmp_path / "in.jsonl", 12)
    rows[3] |= {"terminated": False, "note": float("nan") if suffix == ".parquet" else "x"}
    save(rows, tmp_path / f"in{suffix}")
    settings: Any = {"fields": ["*"], "chunk_rows": 5}
    score_file(scorer, tmp_path / f"in{suffix}", tmp_path / "a.jsonl", **settings)
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows).replace("NaN", "null")
    )
    score_file(scorer, tmp_path / "in.jsonl", tmp_path / "b.jsonl", **settings)
    found, want = read_rows(tmp_path / "a.jsonl"), read_rows(tmp_path / "b.jsonl")
    for one, other in zip(found, want, strict=True):
        filled = {k: v for k, v in one.items() if v not in (None, "")}
        assert filled == {k: v for k, v in other.items() if v is not None}
    # and goes on where it was stopped
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[:7]))
    report = score_file(scorer, tmp_path / f"in{suffix}", tmp_path / "a.jsonl", **settings)
    assert (report.resumed_at, report.scored) == (7, 5)


def test_a_bad_row_of_a_table_is_named(scorer: RewardScorer, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt,completion\nAna,no\nAna\nAna,boxes\n")
    with pytest.raises(DataError, match=r"in.csv, row 1 \(line 3\): malformed CSV \(fewer cells"):
        score_file(scorer, tmp_path / "in.csv", tmp_path / "out.jsonl")
    report = score_file(
        scorer, tmp_path / "in.csv", tmp_path / "out.jsonl", on_error="skip", overwrite=True
    )
    assert (report.scored, report.without_score) == (2, 1)
    assert "row 1 (line 3)" in read_rows(tmp_path / "out.jsonl")[1]["error"]


def test_pipes_and_empty_inputs_are_refused(
    scorer: RewardScorer, tiny_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, words in (("pipe.jsonl", "pipe or a device"), ("empty.jsonl", "no rows")):
        assert main(command(tiny_reward, tmp_path / name, tmp_path / "out.jsonl")) == 2
        assert words in capsys.readouterr().err
        ranked = ["rank", "--model", str(tiny_reward), "--device", "cpu"]
        assert (
            main([*ranked, "--input", str(tmp_path / name), "--output", str(tmp_path / "b")]) == 2
        )
        assert words in capsys.readouterr().err
        assert main(["data", "check", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    report = score_file(scorer, tmp_path / "empty.jsonl", tmp_path / "out.jsonl", allow_empty=True)
    assert report.rows == 0


@pytest.mark.parametrize("after", ["", '"Ana"\n' * 9])
def test_an_input_that_changes_under_way_is_noticed(
    scorer: RewardScorer, tmp_path: Path, after: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('"Ana has 3"\n' * 6)
    with pytest.raises(DataError, match=f"6 rows were counted and {after.count('A')} read"):
        score_file(
            scorer, source, tmp_path / "out.jsonl", on_total=lambda _: source.write_text(after)
        )


def test_command_refuses_bad_paths(
    tiny_reward: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert main(command(tiny_reward, source, output)) == 2
    assert "no such file" in capsys.readouterr().err
    write_rows(source, 2)
    assert main(command(tiny_base, source, output)) == 2
    assert "has no head" in capsys.readouterr().err
    assert main(command(tiny_reward, source, source)) == 2
    assert "the same file" in capsys.readouterr().err
    assert main(command(tiny_reward, source, tmp_path / "out.jsonl.gz")) == 2
    damaged = tmp_path / "damaged.jsonl.gz"
    write_rows(damaged, 50)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert main(command(tiny_reward, damaged, output)) == 2
    assert "gzip file is damaged" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_bytes(b'"ok"\n"\xff"\n')
    assert main(command(tiny_reward, tmp_path / "bad.jsonl", output)) == 2
    assert "bad.jsonl line 2" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
