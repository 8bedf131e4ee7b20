"""Templates are checked when they are made, and answers are read without guessing."""

from __future__ import annotations

import math

import pytest

from companion.errors import DataError
from companion.judge import JudgeTemplate, load_template
from companion.judge.probabilities import verdict_probabilities
from companion.judge.templates import BUILT_IN
from companion.tutor.text import JUDGE_PROMPT

PAIR = "{prompt} {a} {b}"
LETTERS = {"a": "[[A]]", "b": "[[B]]", "tie": "[[C]]"}


def test_built_in_templates_load_and_the_tutors_is_what_its_base_was_taught():
    assert set(BUILT_IN) == {"pairwise", "pointwise", "tutor"}
    assert all(load_template(name).name == name for name in BUILT_IN)
    assert load_template("tutor").prompt == JUDGE_PROMPT


@pytest.mark.parametrize("prompt", ["{prompt} {a}", "{a} {b}", "nothing"])
def test_a_missing_placeholder_is_named(prompt):
    missing = next(name for name in ("prompt", "a", "b") if f"{{{name}}}" not in prompt)
    with pytest.raises(DataError, match=rf"lacks.*\{{{missing}\}}"):
        JudgeTemplate("pairwise", prompt, LETTERS)


def test_an_unknown_placeholder_is_named_and_json_braces_are_left_alone():
    with pytest.raises(DataError, match=r"unknown placeholder \{question\}"):
        JudgeTemplate("pairwise", PAIR + " {question}", LETTERS)
    template = JudgeTemplate("pairwise", PAIR + ' {"x": 1} {}', LETTERS)
    (message,) = template.messages({"prompt": "{a}", "a": "{b}", "b": "B"})
    assert message["content"] == '{a} {b} B {"x": 1} {}'  # texts are not searched


@pytest.mark.parametrize(
    "verdicts",
    [{"a": "[[A]]"}, {"a": "yes", "b": "yes"}, {"a": "A", "b": "AB"}, {"a": "A", "c": "B"}, {}],
)
def test_verdicts_that_cannot_be_told_apart_are_refused(verdicts):
    with pytest.raises(DataError):
        JudgeTemplate("pairwise", PAIR, verdicts)


def test_templates_come_from_files_and_texts(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("{prompt}\n{a}\n{b}\n")
    assert load_template(text).mode == "pairwise"
    assert load_template("Grade {completion} for {prompt}").mode == "pointwise"
    yaml = tmp_path / "own.yaml"
    yaml.write_text(
        "mode: pairwise\nprompt: '{prompt} {a} {b}'\n"
        "verdicts: {a: ['[[A>>B]]', '[[A>B]]'], b: ['[[B>>A]]', '[[B>A]]'], tie: '[[A=B]]'}\n"
    )
    assert load_template(yaml).read("so [[A>>B]]").outcome == "a"
    yaml.write_text("mode: pairwise\nprompt: x\nverdicts: {}\ncolour: red\n")
    with pytest.raises(DataError, match="unknown colour"):
        load_template(yaml)
    with pytest.raises(DataError, match="no judge template 'pairwize'"):
        load_template("pairwize")


READ = [
    ("Reasons.\n[[A]]", "a", None),
    ("[[B]] and again [[B]]", "b", None),
    ("[[C]]", "tie", None),
    ("I like [[A]] but [[B]]", None, "conflicting verdicts"),
    ("A is better", None, "no verdict"),
    ("[[a]] [A] [[ A ]]", None, "no verdict"),
    ("", None, "no verdict"),
    ("<think>[[A]]? no</think>[[B]]", "b", None),
    ("[[A]] perhaps</think>\n[[B]]", "b", None),  # the opening tag stood in the prompt
    ("<think>[[A]] it is", None, "no verdict"),
]


@pytest.mark.parametrize(("answer", "outcome", "reason"), READ)
def test_reading_never_guesses(answer, outcome, reason):
    reading = load_template("pairwise").read(answer)
    assert reading[:2] == (outcome, reason)
    assert (reading.start >= 0) == (outcome is not None)


def test_what_others_do_would_guess():
    """The first verdict, and the last one, of an answer that contradicts itself: both are wrong."""
    answer = "If steps mattered, [[A]]; they do not, so [[B]]. On reflection neither."
    assert answer.find("[[A]]") < answer.rfind("[[B]]")
    assert load_template("pairwise").read(answer).reason == "conflicting verdicts"


def test_an_answer_that_was_cut_off_has_no_verdict():
    assert load_template("pairwise").read("[[A]] is", finished=False).reason == "cut off"


def test_a_whole_answer_is_the_verdict_and_nothing_else():
    tutor = load_template("tutor")
    assert tutor.read(" A\n").outcome == "a"
    assert [tutor.read(text).outcome for text in ("A.", "AB", "Answer", "A B")] == [None] * 4


def probabilities(template, pieces, chosen_alternatives):
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    return verdict_probabilities(
        template,
        "".join(pieces),
        len(pieces),
        starts.__getitem__,
        lambda i: [(t, math.log(p)) for t, p in chosen_alternatives[i]],
    )


def test_probabilities_are_those_of_the_token_that_decides():
    template = load_template("pairwise")
    first = [("So ", 1.0)]
    sure = [("[[", 0.9)]
    decides = [("A", 0.6), ("B", 0.3), ("D", 0.05)]
    found = probabilities(template, ["So ", "[[", "A", "]]"], [first, sure, decides, [("]]", 1)]])
    assert found == pytest.approx({"a": 0.6, "b": 0.3, "tie": 0.0})
    # one token from bracket to letter, with the blank before it
    found = probabilities(
        template, ["So", " [[A", "]]"], [first, [(" [[A", 0.7), ("[[B", 0.2)], []]
    )
    assert found == pytest.approx({"a": 0.7, "b": 0.2, "tie": 0.0})


def test_verdicts_of_many_digits_are_told_apart_where_they_differ():
    tens = JudgeTemplate("pointwise", "{prompt}{completion}", {1: "[[1]]", 10: "[[10]]"})
    steps = [[("[[", 1.0)], [("1", 1.0)], [("]", 0.8), ("0", 0.2)], [("]", 1.0)]]
    found = probabilities(tens, ["[[", "1", "]", "]"], steps)
    assert found == pytest.approx({1.0: 0.8, 10.0: 0.2})


def test_probabilities_that_cannot_be_told_are_none():
    template = load_template("pairwise")
    assert probabilities(template, ["none"], [[("none", 1.0)]]) is None
    # the token that was written is not among those that the server lists
    assert probabilities(template, ["[[", "A", "]]"], [[], [("B", 0.4)], []]) is None


def test_a_word_that_begins_like_a_verdict_is_none():
    found = probabilities(
        load_template("tutor"), ["A"], [[("A", 0.5), ("Apple", 0.3), (" B", 0.1)]]
    )
    assert found == pytest.approx({"a": 0.5, "b": 0.1})
