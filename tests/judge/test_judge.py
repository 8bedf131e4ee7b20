"""Both orders, the cache, files, and the tutor base as a judge; what it writes trains a model."""

from __future__ import annotations

import json
import math

import pytest
from datasets import Dataset

from companion import load_rows_with_report
from companion.cli.main import main
from companion.data.writing import to_json
from companion.errors import DataError, JudgeError
from companion.judge import (
    Answer,
    AnswerCache,
    Judge,
    combine_orders,
    judge_file,
    read_item,
)
from companion.tutor import TUTOR_BASE, make_rows

TEMPLATE = "{prompt}\n{a}\n---\n{b}"


class Scripted:
    """A backend whose answers a function of the two texts gives."""

    name, retries = "scripted", 0

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def identity(self):
        return {"model": "scripted"}

    def answers(self, questions):
        for place, question in enumerate(questions):
            text = question.messages[-1]["content"]
            self.asked.append(text)
            first, second = text.split("\n", 1)[1].split("\n---\n")
            said = self.answer(first, second)
            yield place, said if isinstance(said, Answer) else Answer(said, True)


def first_place(first, second):
    return "[[A]]"


def longer(first, second):
    return "[[A]]" if len(first) > len(second) else "[[B]]"


ROWS = [{"prompt": "p", "a": "long one", "b": "short"}, {"prompt": "p", "a": "x", "b": "xyz"}]


@pytest.mark.parametrize("first", ["a", "b", "tie", None])
@pytest.mark.parametrize("swapped", ["a", "b", "tie", None])
def test_orders_are_combined_without_preferring_a_place(first, swapped):
    mirror = {"a": "b", "b": "a", "tie": "tie", None: None}
    combined = combine_orders(first, swapped)
    assert combined == combine_orders(swapped, first)
    assert mirror[combined] == combine_orders(mirror[first], mirror[swapped])
    if None in (first, swapped):
        assert combined is None


def test_a_judge_of_places_says_tie_and_a_judge_of_texts_says_which():
    verdicts = Judge(Scripted(first_place), TEMPLATE).compare(ROWS)
    assert [(v.preference, v.reason) for v in verdicts] == [("tie", "disagreement")] * 2
    verdicts = Judge(Scripted(longer), TEMPLATE).compare(ROWS)
    assert [v.preference for v in verdicts] == ["a", "b"]
    assert [(v.first, v.swapped) for v in verdicts] == [("a", "a"), ("b", "b")]


def test_unparsed_answers_are_no_ties():
    judge = Judge(Scripted(lambda a, b: "[[A]]" if a < b else "hm"), TEMPLATE)
    verdict = judge.compare(ROWS[:1])[0]
    assert (verdict.preference, verdict.reason) == (None, "no verdict")
    assert judge.counts == {"asked": 2, "no verdict": 1}


def test_swapping_takes_an_additive_bias_out_of_the_logit():
    def answer(first, second):
        logit = (len(first) - len(second)) / 4 + 0.9
        p = 1 / (1 + math.exp(-logit))
        return Answer("[[A]]", True, {"a": p, "b": 1 - p})

    verdict = Judge(Scripted(answer), TEMPLATE).compare(ROWS[:1])[0]
    assert verdict.logit == pytest.approx(3 / 4)
    assert verdict.position_logit == pytest.approx(0.9)
    assert verdict.probability == pytest.approx(1 / (1 + math.exp(-3 / 4)))


def test_chosen_does_not_always_stand_first():
    rows = [{"prompt": "p", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    items = [read_item(row, "pairwise", "row").row for row in rows]
    share = sum(item["given_preference"] == "a" for item in items) / 200
    assert 0.35 < share < 0.65
    assert all(("good" in item[item["given_preference"]]) for item in items)


@pytest.mark.parametrize(
    ("row", "field"),
    [({"prompt": "p", "a": "x"}, "b"), ({"a": "x", "b": "y"}, "prompt"),
     ({"prompt": "p", "a": "x", "b": "y", "preference": "c"}, "preference"), ("x", "")],
)  # fmt: skip
def test_a_bad_row_is_named(row, field):
    with pytest.raises(DataError, match=rf"row 1.*{field}"):
        Judge(Scripted(longer), TEMPLATE).compare([ROWS[0], row])


# ---------------------------------------------------------------------- the cache


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path):
    source, cache = tmp_path / "in.jsonl", tmp_path / "cache.jsonl"
    rows = [{"prompt": f"p{i}", "a": "x" * i, "b": "y"} for i in range(2, 12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def dies(first, second):
        if len(backend.asked) > 7:
            raise JudgeError("the server is away")
        return longer(first, second)

    backend = Scripted(dies)
    with (
        Judge(backend, TEMPLATE, cache=cache) as judge,
        pytest.raises(JudgeError),
    ):
        judge_file(judge, source, tmp_path / "out.jsonl", chunk_rows=3)
    assert not (tmp_path / "out.jsonl").exists()
    again = Scripted(longer)
    with Judge(again, TEMPLATE, cache=cache) as judge:
        report = judge_file(judge, source, tmp_path / "out.jsonl", chunk_rows=3)
        assert judge.counts == {"from cache": 7, "asked": 13}
    assert report.outcomes == {"a": 10}
    assert not set(again.asked) & set(backend.asked[:7])
    other = Scripted(longer)
    with Judge(other, TEMPLATE + "!", cache=cache) as judge:  # another template, other answers
        judge.compare(rows)
        assert judge.counts["from cache"] == 0


def test_answers_of_an_earlier_version_that_are_none_are_asked_again(tmp_path):
    """It kept null content as an empty text, and took each end but 'length' for an ordinary one."""
    path = tmp_path / "cache.jsonl"
    kept = {
        "empty": ("", False),
        "torn": ("[[A]] is tempting, but on refl", False),
        "torn at a comma": ("I prefer [[A]],", False),
        "whole": ("I prefer [[A]].", True),
        "verdict": ("[[B]]", True),
        "word": ("A", True),
        "grade": ("Rating: 7", True),
        "thought": ("<think>so</think>", True),
    }
    lines = [
        json.dumps({"key": key, "text": text, "finished": True}) for key, (text, _) in kept.items()
    ]
    lines.append(json.dumps({"key": "cut", "text": "and then", "finished": False}))
    path.write_text("\n".join(lines) + "\n")
    with AnswerCache(path) as cache:
        assert (cache.n_doubted, cache.n_damaged) == (3, 0)
        assert {key: cache.get(key) is not None for key in kept} == {
            key: good for key, (_, good) in kept.items()
        }
        assert cache.get("cut") == Answer("and then", False)
        cache.put("torn", Answer("[[B]] after all", True))
    with AnswerCache(path) as cache:  # (what this version keeps says how it ended)
        assert cache.get("torn") == Answer("[[B]] after all", True)


def test_a_judge_sees_calls_of_tools_and_the_tools():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    row = {
        "prompt": [{"role": "user", "content": "Weather in Oslo?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "a": [{"role": "assistant", "tool_calls": [call]}],
        "b": [
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ],
    }
    texts = read_item(row, "pairwise", "row 0").texts
    assert texts["prompt"].startswith('Tools: [{"type": "function"')
    assert texts["prompt"].endswith("\n\nWeather in Oslo?")
    line = 'Tool call: {"name": "weather", "arguments": {"city": "Oslo"}}'
    assert texts["a"] == line
    assert texts["b"] == f"Assistant: I look.\n{line}\n\nTool: rain\n\nAssistant: It rains."


def test_a_row_with_several_answers_is_refused_by_its_place():
    row = {"prompt": "p", "chosen": ["x"], "rejected": ["y", "z"]}
    with pytest.raises(DataError, match=r"row 3, field 'chosen': several answers.*2 pairs") as stop:
        read_item(row, "pairwise", "row 3")
    assert "companion data convert" in stop.value.cure


def test_half_of_a_surrogate_pair_and_nan(tmp_path):
    with pytest.raises(DataError, match=r"row 3, field 'prompt': no valid text") as stop:
        read_item({"prompt": "p\ud800", "a": "x", "b": "y"}, "pairwise", "row 3")
    assert "whole characters" in stop.value.cure
    source, target = tmp_path / "in.parquet", tmp_path / "out.jsonl"  # (JSON has no NaN)
    rows = [{"prompt": "p", "a": "x", "b": "y", "weight": float("nan")}]
    Dataset.from_list(rows).to_parquet(str(source))
    judge_file(Judge(Scripted(first_place), TEMPLATE), source, target)
    assert json.loads(target.read_text(), parse_constant=pytest.fail)["weight"] is None
    assert json.loads(to_json({"id": "\udc00", "é": 1})) == {"id": "\udc00", "é": 1}


def test_a_torn_and_a_damaged_line_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "cache.jsonl"
    with AnswerCache(path) as cache:
        for key in "xyz":
            cache.put(key, Answer(key, True, {"a": 0.25}))
        with pytest.raises(JudgeError, match="another process"):
            AnswerCache(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2][:-5])
    with AnswerCache(path) as cache:
        assert (len(cache), cache.n_damaged) == (1, 2)
        assert cache.get("x") == Answer("x", True, {"a": 0.25})
        cache.put("w", Answer("w", False))
    with AnswerCache(path) as cache:
        assert len(cache) == 2
        assert cache.get("w") == Answer("w", False)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "mine"}\n')
    with pytest.raises(JudgeError, match="no cache"):
        AnswerCache(data)
    assert data.read_text() == '{"prompt": "mine"}\n'


# ---------------------------------------------------------------------- grades


def test_grades_and_their_expectation():
    def answer(first, second):
        return Answer("good: [[8]]", True, {8.0: 0.5, 6.0: 0.25})

    template = "{prompt}\n{completion}\n---\n"
    rows = [{"prompt": "p", "completion": "c"}]
    grading = Judge(Scripted(answer), template).grade(rows)[0]
    assert grading.rating == 8.0
    assert grading.expected_rating == pytest.approx((8 * 0.5 + 6 * 0.25) / 0.75)
    assert Judge(Scripted(lambda a, b: "[[8]] [[7]]"), template).grade(rows)[0].rating is None
    with pytest.raises(DataError, match="is pointwise"):
        Judge(Scripted(answer), template).compare(ROWS)


# ---------------------------------------------------------------------- the tutor


def test_the_tutor_base_judges_and_its_verdicts_train_a_model(tmp_path, tiny_base, capsys):
    rows = make_rows("pairs", 60, seed=11)
    source, output = tmp_path / "pairs.jsonl", tmp_path / "verdicts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(TUTOR_BASE), "--template", "tutor", "--input", str(source)]
    flags += ["--output", str(output), "--device", "cpu"]
    report = tmp_path / "report.json"
    assert main(["judge", *flags, "--report", str(report)]) == 0
    verdicts = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in verdicts] == [row["id"] for row in rows]
    right = []
    for row in verdicts:
        assert row["logit_first"] is not None
        if row["preference"] in ("a", "b"):
            chosen_better = row["reward_chosen"] > row["reward_rejected"]
            better = row["given_preference"] if chosen_better else {"a": "b", "b": "a"}[
                row["given_preference"]]  # fmt: skip
            right.append(row["preference"] == better)
    assert len(right) > 45
    assert sum(right) / len(right) > 0.85
    figures = json.loads(report.read_text())
    assert figures["position"]["n_rows"] == 60
    assert figures["position"]["first_share"] == pytest.approx(0.5, abs=0.1)
    assert figures["position"]["n_answers"] == 120
    # the batch makes no difference
    small = Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu", max_tokens_per_batch=600)
    single = small.compare(rows[:6])
    for row, verdict in zip(verdicts, single, strict=False):
        assert verdict.logit_first == pytest.approx(row["logit_first"], abs=1e-3)
    # a second run asks nothing
    assert main(["judge", *flags, "--overwrite"]) == 0
    assert "0 asked, 120 from the cache" in capsys.readouterr().err
    assert main(["judge", *flags]) == 2
    assert main(["judge-report", "--input", str(output)]) == 0
    # and the output trains as it is; ties are left out with their count
    _, loaded = load_rows_with_report(output)
    ties = sum(row["preference"] == "tie" for row in verdicts)
    assert loaded.left_out["ties"] == ties
    words = ["--model_name_or_path", str(tiny_base), "--dataset_name", str(output)]
    words += ["--output_dir", str(tmp_path / "model"), "--max_steps", "2", "--use_cpu", "true"]
    words += ["--bf16", "false", "--report_to", "none", "--disable_tqdm", "true"]
    words += ["--per_device_train_batch_size", "4"]
    assert main(["train", "pairwise", *words]) == 0
    assert (tmp_path / "model" / "reward_manifest.json").is_file()


def test_rows_without_a_verdict_train_nothing_and_are_counted(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    said = {"long one": "[[A]]", "short": "[[B]]"}
    judge = Judge(Scripted(lambda first, second: said.get(first, "hm")), TEMPLATE)
    report = judge_file(judge, source, output, keep_answers=True)
    assert report.outcomes == {"a": 1, "none": 1}
    kept, loaded = load_rows_with_report(output)
    assert len(kept) == 1
    assert loaded.left_out == {"pairs without a verdict": 1}


def test_a_refused_row_stops_the_run_or_is_counted(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"prompt": "p"}\n')

    def refuses(first, second):
        return longer(first, second) if "long one" in first + second else Answer(
            "", False, refused="too long")  # fmt: skip

    with pytest.raises(DataError, match=r"in.jsonl, line 3"):
        judge_file(Judge(Scripted(refuses), TEMPLATE), source, tmp_path / "out.jsonl")
    report = judge_file(
        Judge(Scripted(refuses), TEMPLATE), source, tmp_path / "out.jsonl", on_error="skip"
    )
    assert report.outcomes == {"a": 1, "none": 1}
    assert report.reasons == {"refused": 1}
    assert len(report.bad_rows) == 1


def test_a_prompt_that_is_too_long_is_refused_not_cut():
    rows = [{"prompt": "Ana has 3 boxes. " * 2000, "a": "x", "b": "y"}]
    judge = Judge.from_pretrained(TUTOR_BASE, "tutor", device="cpu")
    verdict = judge.compare(rows)[0]
    assert verdict.preference is None
    assert "more than the model takes" in verdict.reason
