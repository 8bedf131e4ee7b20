"""The tutor's world: what it says of itself is true."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from companion.errors import DataError
from companion.tutor import (
    GOLD,
    KINDS,
    Dials,
    Style,
    draw_problem,
    draw_solution,
    gold_reward,
    grade,
    limits,
    make_rows,
    parse_problem,
    preference_probability,
)
from companion.tutor.labelling import (
    annotator_factors,
    label_probability,
    tie_probability,
)


def _problems(n: int, seed: int = 0):
    rng = random.Random(seed)
    return [draw_problem(rng) for _ in range(n)]


def test_prompts_read_back_to_the_problem_they_came_from():
    for problem in _problems(500):
        assert parse_problem(problem.prompt) == problem
    assert parse_problem("What is the capital of France?") is None


def test_answers_are_those_of_the_story():
    for problem in _problems(300):
        count = problem.a * problem.b
        for verb, number in problem.changes:
            count += number if verb in ("buys", "finds", "gets") else -number
        assert problem.answer == count
        assert all(1 <= step.result <= 99 for step in problem.steps)


def test_a_solution_without_errors_is_right_on_every_line():
    rng = random.Random(1)
    for problem in _problems(300):
        result = grade(problem, draw_solution(rng, problem, error_rate=0.0).text)
        if result.correct:  # three in a hundred miscopy the answer
            assert -1 not in result.labels
            assert result.first_error is None
            assert result.validity == 1.0
        else:
            assert result.labels.count(-1) == 1
            assert result.validity == 1.0


def test_grading_by_hand():
    prompt = "Ana has 3 boxes with 4 pens each and buys 5. How many pens now?"
    right = grade(
        prompt,
        "Hello!\nFirst 3 x 4 = 12 pens.\nThen 12 + 5 = 17 pens.\nAnswer: 17\nHope this helps!",
    )
    assert right.correct
    assert right.labels == (0, 1, 1, 1, 0)
    assert (right.greeting, right.tone, right.validity) == (True, 1, 1.0)
    swapped = grade(prompt, "Step 4 x 3 = 12\nStep 5 + 12 = 17\nAnswer: 17")
    assert swapped.labels == (1, 1, 1)
    assert swapped.extra_words == 0
    carried_on = grade(prompt, "Step 3 x 4 = 13\nStep 13 + 5 = 18\nAnswer: 18")
    assert carried_on.labels == (-1, -1, -1)
    assert carried_on.first_error == 0
    lucky = grade(prompt, "Step 3 + 4 = 7\nStep 7 + 10 = 17\nAnswer: 17")
    assert lucky.correct
    assert lucky.validity == 0.0
    padded = grade(prompt, "Step 3 x 4 = 12\nStep 12 + 5 = 17\nStep 1 + 1 = 2\nAnswer: 17")
    assert padded.validity == pytest.approx(2 / 3), "needless equations must not pay"
    assert not grade(prompt, "").correct
    with pytest.raises(DataError, match="not a problem"):
        grade("Tell me a joke.", "No.")


def test_gold_reward_is_the_documented_formula():
    prompt = "Ana has 3 boxes with 4 pens each and buys 5. How many pens now?"
    terse = "Step 3 x 4 = 12\nStep 12 + 5 = 17\nAnswer: 17"
    assert gold_reward(prompt, terse) == pytest.approx(GOLD.correct + GOLD.steps)
    assert gold_reward(prompt, terse + "\nTry harder next time.") == pytest.approx(
        GOLD.correct + GOLD.steps - GOLD.tone - GOLD.words * 4 / 10
    )
    half = "Step 3 x 4 = 12\nStep 12 - 5 = 7\nAnswer: 7"
    assert gold_reward(prompt, half) == pytest.approx(GOLD.steps / 2)


def test_being_right_weighs_more_than_any_style():
    style_range = GOLD.greeting + 2 * GOLD.tone + GOLD.words * 3
    assert GOLD.correct + GOLD.steps > style_range


def test_a_quarter_to_a_third_of_the_steps_err_and_half_of_the_answers_are_right():
    rows = make_rows("steps", 4000, seed=3)
    new_errors = sum(row["first_error"] is not None for row in rows)
    tries = sum(
        sum(label != 0 for label in row["labels"][: row["first_error"] + 1])
        if row["first_error"] is not None
        else sum(label != 0 for label in row["labels"])
        for row in rows
    )
    # Errors per step up to the first one; the answer line, which rarely errs, dilutes it.
    assert 0.15 < new_errors / tries < 0.35
    assert 0.45 < np.mean([row["correct"] for row in rows]) < 0.65


def test_correctness_and_style_are_independent_unless_shifted():
    def correlation(**dials):
        rows = make_rows("outcomes", 6000, seed=5, **dials)
        grades = [grade(r["prompt"][0]["content"], r["completion"][0]["content"]) for r in rows]
        return np.corrcoef([g.correct for g in grades], [g.tone for g in grades])[0, 1]

    assert abs(correlation()) < 0.04
    assert correlation(shift=0.5) < -0.05


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_prefix_of_more_rows_and_differ_by_seed(kind):
    assert make_rows(kind, 20, 7) == make_rows(kind, 50, 7)[:20]
    assert make_rows(kind, 20, 7) != make_rows(kind, 20, 8)


def test_labels_come_from_the_stated_probability():
    rows = make_rows("pairs", 20_000, seed=2)
    p = np.array([row["probability"] for row in rows])
    # The chosen side is the label: among pairs whose better side has probability q, the label
    # agrees with it in a share q. Compared bin by bin within four standard errors.
    confidence, agrees = np.maximum(p, 1 - p), p > 0.5
    for low, high in itertools.pairwise(np.linspace(0.5, 1, 6)):
        inside = (confidence >= low) & (confidence < high)
        expected, seen = confidence[inside].mean(), agrees[inside].mean()
        assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / inside.sum()) + 1e-3
    gap = np.array([row["reward_chosen"] - row["reward_rejected"] for row in rows])
    assert np.allclose(p, 1 / (1 + np.exp(-gap)))


@pytest.mark.parametrize(
    "dials",
    [
        {"noise": 0.4},
        {"ties": 1.0},
        {"length_bias": 0.7},
        {"annotators": 4, "disagreement": 2.0},
        {"shift": 1.0},
        {"noise": 0.2, "ties": 0.5, "length_bias": 0.3, "annotators": 3},
    ],
)
def test_the_limits_hold_under_every_dial(dials):
    rows = make_rows("pairs", 6000, seed=4, **dials)
    known = limits(rows)
    assert abs(known.accuracy - known.label_accuracy) < 4 * math.sqrt(0.25 / known.n)
    assert abs(known.loss - known.label_loss) < 0.04
    # No function of the pair beats the true probability: here, the gold gap alone.
    gap = np.array([row["reward_chosen"] - row["reward_rejected"] for row in rows])
    assert known.label_accuracy >= (gap > 0).mean() - 0.01
    assert known.label_loss <= np.logaddexp(0, -gap).mean() + 0.01


def test_limits_against_a_computation_by_hand():
    known = limits([{"probability": 0.9}, {"probability": 0.2}])
    assert known.accuracy == pytest.approx(0.85)
    assert known.label_accuracy == 0.5
    entropy = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p))  # noqa: E731
    assert known.loss == pytest.approx((entropy(0.9) + entropy(0.2)) / 2)
    assert known.label_loss == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2)
    with pytest.raises(DataError, match="row 1"):
        limits([{"probability": 0.9}, {"chosen": "x"}])


def test_davidson_ties():
    dials = Dials(ties=1.5)
    for gap in (-3.0, 0.0, 0.7):
        p, q = math.exp(gap), 1.0
        by_hand = 1.5 * math.sqrt(p * q) / (p + q + 1.5 * math.sqrt(p * q))
        assert tie_probability(gap, dials) == pytest.approx(by_hand)
        win = p / (p + q + 1.5 * math.sqrt(p * q))
        assert label_probability(gap, dials) == pytest.approx(win + by_hand / 2)


def test_swapping_the_completions_turns_the_probability_round():
    dials = Dials(noise=0.1, ties=0.3, length_bias=0.5, annotators=3)
    rng = random.Random(6)
    for problem in _problems(50):
        a, b = (grade(problem, draw_solution(rng, problem).text) for _ in range(2))
        there, back = preference_probability(a, b, dials), preference_probability(b, a, dials)
        assert there + back == pytest.approx(1.0)


def test_annotators_differ_and_are_the_same_every_time():
    dials = Dials(annotators=5)
    assert annotator_factors(dials) == annotator_factors(dials)
    assert len(set(annotator_factors(dials))) == 5
    assert annotator_factors(Dials()) == [1.0]


def test_rankings_follow_plackett_luce():
    rows = make_rows("rankings", 6000, seed=1)
    hits, expected = 0, 0.0
    for row in rows:
        assert sorted(row["ranks"]) == list(range(1, len(row["completions"]) + 1))
        weights = np.exp(row["rewards"])
        best = int(np.argmax(weights))
        hits += row["ranks"][best] == 1
        expected += weights[best] / weights.sum()
    assert abs(hits - expected) < 4 * math.sqrt(len(rows) * 0.25)


def test_canaries_differ_in_what_they_say():
    rows = make_rows("canaries", 60)
    for row in rows:
        assert row["reward_chosen"] > row["reward_rejected"]
        wanted = {"right": (True, False), "right_but_rude": (True, False), "step": (False, False)}
        assert (row["correct_chosen"], row["correct_rejected"]) == wanted.get(
            row["subset"], (True, True)
        )
    assert {row["subset"] for row in rows} == {
        "right",
        "right_but_rude",
        "step",
        "greeting",
        "tone",
        "brevity",
    }


def test_style_shows_in_the_grade():
    rng = random.Random(0)
    problem = _problems(1)[0]
    for greeting, tone in itertools.product((False, True), (-1, 0, 1)):
        result = grade(
            problem, draw_solution(rng, problem, style=Style(greeting, tone, "plain")).text
        )
        assert (result.greeting, result.tone) == (greeting, tone)


def test_bad_arguments_say_what_exists():
    with pytest.raises(DataError, match="pairs, rankings"):
        make_rows("pear", 1)
    with pytest.raises(DataError, match="noise, ties"):
        make_rows("pairs", 1, noize=0.1)
    with pytest.raises(DataError, match="outside"):
        make_rows("pairs", 1, noise=2.0)
    with pytest.raises(DataError, match="negative"):
        make_rows("pairs", -1)
