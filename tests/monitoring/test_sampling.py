"""Pairs to label next: chances that are what rows say, and scores that the random ones ignore."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from companion.cli.main import main
from companion.data import load_rows, write_rows
from companion.errors import DataError, ModelError
from companion.monitoring import Labelling, read_completions, read_pairs, sample_pairs
from companion.scoring import load_scorer

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "before_0_2"


def file_of(tmp_path, rows):
    write_rows(rows, tmp_path / "completions.jsonl")
    return tmp_path / "completions.jsonl"


def prompts_of(tmp_path, sizes):
    """Prompts with so many completions, all different."""
    rows = [
        {"prompt": f"question {p}", "completion": f"answer {p} {i}", "slice": f"s{p % 2}", "id": i}
        for p, size in enumerate(sizes)
        for i in range(size)
    ]
    return read_completions(file_of(tmp_path, rows))[0]


class Oracle:
    """A scorer whose scores are a function of the text, and which knows what it was asked."""

    readout = SimpleNamespace(kind="scalar")
    model_version = "v1"

    def __init__(self, score):
        self.of, self.asked = score, []

    def score(self, rows, *, on_error, names, progress):
        self.asked += [row["completion"] for row in rows]
        raw = np.array([self.of(row["completion"]) for row in rows])
        reasons = [None if math.isfinite(value) else "too long" for value in raw]
        return SimpleNamespace(raw=raw, reasons=reasons)


def keys(rows):
    return {(row["prompt"], row["a"], row["b"]) for row in rows}


# ---------------------------------------------------------------------- at random


def test_a_row_has_what_label_and_monitor_read(tmp_path):
    sample = sample_pairs(prompts_of(tmp_path, [4] * 10), 15, seed=1)
    assert sample.counts["pairs"] == len(sample.rows) == 15
    assert max(Counter(row["prompt_id"] for row in sample.rows).values()) == 2
    assert len({row["prompt_id"] for row in sample.rows}) == 10  # one of each before a second
    for row in sample.rows:
        assert row["sampling"] == "random"
        assert row["sampling_share"] == pytest.approx((1 + 5 / 10) / 6)
        assert row["slice"] == f"s{int(row['prompt'].split()[1]) % 2}"
        assert row["a"].split()[1] == row["b"].split()[1] == row["prompt"].split()[1]
        assert row["a"] < row["b"]
        assert not {"completion", "label", "scores"} & row.keys()
    used = Counter(text for row in sample.rows for text in (row["a"], row["b"]))
    assert set(used.values()) == {1}  # each completion once


def weights(tmp_path, share_of, runs=300):
    """Of each run, what the sample stands for: the sum of a figure of the pair, over its share."""
    prompts = prompts_of(tmp_path, [2, 3, 4, 5, 7, 2, 1])
    possible = sum((p + 1) * pairs for p, pairs in enumerate([1, 3, 6, 10, 21, 1, 0]))
    sums = []
    for seed in range(runs):
        rows = sample_pairs(prompts, 6, seed=seed).rows
        sums.append(sum((int(row["prompt"].split()[1]) + 1) / share_of(row) for row in rows))
    return np.array(sums), possible


def check_weights(sums, possible):
    error = sums.std(ddof=1) / math.sqrt(len(sums))
    assert abs(sums.mean() - possible) < 4 * error + 1e-9, (sums.mean(), error)


def test_the_chance_that_a_row_states_is_its_own(tmp_path):
    """Horvitz and Thompson: with the right chances, the sample stands for all pairs of draws."""
    check_weights(*weights(tmp_path, lambda row: row["sampling_share"]))


@pytest.mark.parametrize(
    "wrong",
    [lambda row: 6 / 42, lambda row: 6 / 7, lambda row: min(1.0, 2 * row["sampling_share"])],
    ids=["all pairs alike", "prompts alone", "both orders"],
)
def test_chances_that_are_wrong_are_seen(tmp_path, wrong):
    with pytest.raises(AssertionError):
        check_weights(*weights(tmp_path, wrong))


def test_each_pair_of_a_prompt_is_as_likely_as_any(tmp_path):
    prompts = prompts_of(tmp_path, [4])
    seen = Counter(sample_pairs(prompts, 1, seed=seed).rows[0]["id"] for seed in range(600))
    assert len(seen) == 6
    assert min(seen.values()) > 60
    assert sample_pairs(prompts, 1, seed=3).rows == sample_pairs(prompts, 1, seed=3).rows


def test_the_same_texts_are_left_out_and_one_digit_is_not(tmp_path):
    rows = [
        {"prompt": "p", "completions": ["It is 14.", "it is  14!", " It is 14"]},
        {"prompt": "q", "completions": ["It is 14.", "It is 15.", "It is -14."]},
        {"prompt": "r", "completions": ["It is 1.4.", "It is 14."]},
        {"prompt": "s", "completions": ["yes", "yes", "no", "no"]},
        {"prompt": "t", "completion": "alone"},
    ]
    prompts, left_out = read_completions(file_of(tmp_path, rows))
    assert not left_out
    for seed in range(20):
        sample = sample_pairs(prompts, 10, seed=seed)
        assert {row["prompt"] for row in sample.rows} <= {"q", "r", "s"}
        assert {"q", "r"} <= {row["prompt"] for row in sample.rows}
        counts = sample.counts["left_out"]
        assert counts["prompts with one completion"] == 1
        same = [text for text in counts if "same or nearly the same" in text]
        again = [text for text in counts if "another pair of their prompt" in text]
        s_rows = sum(row["prompt"] == "s" for row in sample.rows)
        # p is left out once; s gives yes|no twice (one left out), or yes|yes and no|no (both)
        assert counts[same[0]] == (1 if s_rows else 3)
        assert bool(again) == bool(s_rows)
        assert any("only" in note and "not 10" in note for note in sample.notes)


def test_what_is_said_of_each_completion_goes_with_it(tmp_path):
    flat = [
        {"prompt": f"p{i // 3}", "completion": f"c{i}", "reward": float(i % 2), "slice": "sums"}
        for i in range(60)
    ]
    listed = [
        {
            "prompt": f"p{p}",
            "completions": [row["completion"] for row in flat[3 * p : 3 * p + 3]],
            "rewards": [row["reward"] for row in flat[3 * p : 3 * p + 3]],
            "slice": "sums",
        }
        for p in range(20)
    ]
    of = {row["completion"]: row["reward"] for row in flat}
    found = [
        sample_pairs(read_completions(file_of(tmp_path, rows))[0], 20).rows
        for rows in (flat, listed)
    ]
    assert found[0] == found[1]
    for row in found[0]:
        assert (row["reward_a"], row["reward_b"]) == (of[row["a"]], of[row["b"]])
        assert row["slice"] == "sums"


def test_prompts_are_told_apart_to_the_letter(tmp_path):
    rows = [
        {"prompt": "Name it", "completion": "x"},
        {"prompt": "name  it", "completion": "y"},
        {"prompt": "Name it", "completion": "z"},
    ]
    sample = sample_pairs(read_completions(file_of(tmp_path, rows))[0], 5)
    assert [(row["prompt"], row["a"], row["b"]) for row in sample.rows] == [("Name it", "x", "z")]


# ---------------------------------------------------------------------- by uncertainty


def test_the_least_sure_pairs_are_taken_and_the_random_ones_ignore_the_scores(tmp_path):
    prompts = prompts_of(tmp_path, [4] * 30)

    def far(text):
        p, i = map(int, text.split()[1:])
        return (0.1 + p) * i**2

    one, other = Oracle(far), Oracle(lambda text: -(far(text) ** 2))
    samples = [
        sample_pairs(prompts, 20, rule="uncertainty", random_share=0.4, scorer=s, seed=2)
        for s in (one, other)
    ]
    at_random = [[row for row in s.rows if row["sampling"] == "random"] for s in samples]
    assert keys(at_random[0]) == keys(at_random[1]) == keys(sample_pairs(prompts, 8, seed=2).rows)
    assert len(at_random[0]) == 8
    unsure = [row for row in samples[0].rows if row["sampling"] == "uncertainty"]
    assert len(unsure) == 12
    assert len({row["prompt"] for row in unsure}) == 12  # one of each prompt before a second
    assert {row["sampling_share"] for row in unsure} == {1.0}
    gaps = [abs(far(row["a"]) - far(row["b"])) for row in unsure]
    rest = [
        min(abs(far(a) - far(b)) for a, b in zip(own.completions, own.completions[1:]))  # noqa: B905
        for own in prompts
        if own.prompt not in {row["prompt"] for row in unsure}
    ]
    assert max(gaps) < min(rest)
    assert not keys(unsure) & keys(at_random[0])
    for row in samples[0].rows:
        assert row["scores"] == {"a": far(row["a"]), "b": far(row["b"])}
        assert row["model_version"] == "v1"
    order = [row["sampling"] for row in samples[0].rows]
    assert order != sorted(order)  # annotators tire: the rules are mixed
    assert order != sorted(order, reverse=True)


def test_only_random_rows_estimate_the_accuracy(tmp_path):
    """A model that is right on 80% of what the policy writes: what each rule says of it."""
    rng = np.random.default_rng(0)
    rows, truth = [], {}
    for p in range(1500):
        for i in range(2):
            rows.append({"prompt": f"q{p}", "completion": f"answer {p} {i}"})
            truth[f"answer {p} {i}"] = rng.normal()
    noise = {text: value + 0.55 * rng.normal() for text, value in truth.items()}
    prompts = read_completions(file_of(tmp_path, rows))[0]

    def right(rows):
        return np.mean(
            [(truth[r["a"]] > truth[r["b"]]) == (noise[r["a"]] > noise[r["b"]]) for r in rows]
        )

    everything = right(sample_pairs(prompts, 1500).rows)
    sample = sample_pairs(prompts, 600, rule="uncertainty", scorer=Oracle(noise.get), seed=1)
    by_rule = {
        name: right([row for row in sample.rows if row["sampling"] == name])
        for name in ("random", "uncertainty")
    }
    assert 0.78 < everything < 0.88
    assert by_rule["random"] == pytest.approx(everything, abs=0.07)
    assert by_rule["uncertainty"] < 0.68


def test_completions_without_a_score_are_counted_and_never_called_unsure(tmp_path):
    prompts = prompts_of(tmp_path, [3] * 6)
    scorer = Oracle(lambda text: float("nan") if text.endswith("0") else float(text[-1]))
    sample = sample_pairs(prompts, 8, rule="uncertainty", random_share=0.5, scorer=scorer)
    assert sample.counts["left_out"]["completions without a score: too long"] == 6
    for row in sample.rows:
        unscored = row["a"].endswith("0") or row["b"].endswith("0")
        assert ("scores" in row) == (not unscored)
        assert row["sampling"] == "random" or not unscored


def test_random_with_a_model_scores_what_was_chosen_only(tmp_path):
    prompts = prompts_of(tmp_path, [4] * 10)
    scorer = Oracle(lambda text: float(text[-1]))
    sample = sample_pairs(prompts, 5, scorer=scorer, seed=1)
    assert len(scorer.asked) == 10
    assert all("scores" in row for row in sample.rows)
    assert keys(sample.rows) == keys(sample_pairs(prompts, 5, seed=1).rows)
    scorer.model_version = None
    sample = sample_pairs(prompts, 5, scorer=scorer)
    assert not any("scores" in row for row in sample.rows)
    assert any("--protocol companion" in note for note in sample.notes)


def test_what_makes_no_sense_is_refused(tmp_path):
    prompts = prompts_of(tmp_path, [2, 2])
    for settings, said in [
        ({"n": 0}, "n is 0"),
        ({"n": 1, "rule": "best"}, "no rule 'best'"),
        ({"n": 1, "rule": "uncertainty"}, "asks a model"),
        ({"n": 1, "random_share": 1.5}, "random_share is 1.5"),
    ]:
        with pytest.raises(DataError, match=said):
            sample_pairs(prompts, **settings)
    steps = Oracle(len)
    steps.readout = SimpleNamespace(kind="process")
    with pytest.raises(ModelError, match="'process'"):
        sample_pairs(prompts, 1, scorer=steps)
    with pytest.raises(DataError, match="none has two completions that differ"):
        sample_pairs(prompts_of(tmp_path, [1, 1]), 1)
    note = sample_pairs(prompts, 1, rule="uncertainty", random_share=0, scorer=Oracle(len)).notes
    assert any("may feed an alarm" in line for line in note)


# ---------------------------------------------------------------------- files


def test_bad_rows_are_named_and_cut_completions_counted(tmp_path):
    path = tmp_path / "completions.jsonl"
    good = [
        {"prompt": "p", "completions": ["x", "y", "z"], "terminated": [True, False, True]},
        {"prompt": "p", "completion": "w", "terminated": False},
    ]
    bad = {
        '{"prompt": "p", "completions": "x"}': "'completions'.*wrong type",
        '{"prompt": "p", "completions": ["x", null]}': r"'completions\[1\]'.*null",
        '{"prompt": "p", "completions": ["x"], "terminated": [true, true]}': "lengths differ",
        '{"prompt": "p", "completion": "x", "terminated": "no"}': "'terminated'.*wrong type",
        '{"completion": "x"}': "'prompt'.*missing field",
        '{"prompt": "p"}': "'completion'.*missing field",
        '{"prompt": "p", "completion": ""}': "empty completion",
        "{": "malformed JSON",
    }
    for line, said in bad.items():
        path.write_text("\n".join([*map(json.dumps, good), line]) + "\n")
        with pytest.raises(DataError, match=f"line 3.*{said}|line 3: {said}") as caught:
            read_completions(path)
        assert caught.value.cure
        prompts, left_out = read_completions(path, on_error="skip")
        assert prompts[0].completions == ["x", "z"]
        assert left_out.pop("completions that were cut off") == 2
        ((reason, count),) = left_out.items()
        assert (count, "line 3" in reason) == (1, True)
    path.write_text(json.dumps(good[1]) + "\n")
    with pytest.raises(DataError, match=r"no completions.*cut off"):
        read_completions(path)


def completions_of_the_saved_model(tmp_path):
    rows = json.loads((ASSETS / "pairwise" / "expected.json").read_text())["rows"]
    rows = [row for row in rows if "completion" in row and row.get("prompt")]
    return rows, file_of(tmp_path, rows)


def test_the_command_from_completions_to_rows_that_train(tmp_path, capsys):
    """A saved model: its scores are those that the scorer gives; label and load_rows read on."""
    rows, source = completions_of_the_saved_model(tmp_path)
    out = tmp_path / "pairs.jsonl"
    words = ["sample", str(source), "--output", str(out), "--n", "4", "--rule", "uncertainty"]
    words += ["--model", str(ASSETS / "pairwise"), "--json", str(tmp_path / "counts.json")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "4 pairs (2 at random, 2 by uncertainty)" in said.out
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["completions"] == sum(row.get("terminated", True) for row in rows)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    scorer = load_scorer(ASSETS / "pairwise")
    for row in written:
        both = [{"prompt": row["prompt"], "completion": row[side]} for side in "ab"]
        assert list(row["scores"].values()) == pytest.approx(scorer.score(both).raw, abs=1e-4)
    pairs, _ = read_pairs(out)
    assert [pair.row for pair in pairs] == written
    with Labelling(pairs, tmp_path / "labels.jsonl", annotator="ana") as labelling:
        for pair, choice in zip(pairs, ["first", "second", "tie", "first"], strict=True):
            labelling.judge(None, pair.id, choice)
    assert len(load_rows(tmp_path / "labels.jsonl", kind="pairs")) == 3

    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--n", "4000"]) == 0
    assert "there are no more" in capsys.readouterr().err
    assert main([*words[:6], "--overwrite", "--rule", "uncertainty"]) == 2
    assert "no --model is given" in capsys.readouterr().err


@pytest.mark.serving
def test_a_server_is_asked_and_its_version_written(tmp_path):
    from companion.serving import running

    _, source = completions_of_the_saved_model(tmp_path)
    scorer = load_scorer(ASSETS / "pairwise", overlong="error")
    found = []
    with running(scorer, allow_unchecked=True) as server:
        for protocol in ("companion", "classify"):
            out = tmp_path / f"{protocol}.jsonl"
            words = ["sample", str(source), "--output", str(out), "--n", "3"]
            words += ["--model", str(ASSETS / "pairwise"), "--url", server.url]
            assert main([*words, "--protocol", protocol]) == 0
            found.append([json.loads(line) for line in out.read_text().splitlines()])
        version = server.service.identity.version
    assert {row["model_version"] for row in found[0]} == {version}
    assert not any("scores" in row for row in found[1])


def test_the_help_says_which_rows_may_feed_alarms(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert 'Only rows with "sampling": "random" may feed the alarms' in said
