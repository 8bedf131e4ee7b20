"""Searches: what they choose, what they cost, and that a prompt's search is its own."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from companion import TokenScorer, bootstrap_interval
from companion.errors import DataError, ModelError
from companion.functional import majority_vote
from companion.generation import Policy, Sample
from companion.models import TokenReadout
from companion.scoring import TokenScores
from companion.search import (
    Candidate,
    SearchResult,
    best_of_n_search,
    score_samples,
    step_beam_search,
    within_tokens,
)
from companion.tutor import grade, make_rows

TUTOR = "companion/assets/tutor-base"


class Oracle(TokenScorer):
    """A process model that knows the truth: the share of steps that are not wrong."""

    def __init__(self, sign: float = 1.0):
        self.readout = TokenReadout("process", 3, "min", separator="\n")
        self.sign = sign
        self.rows: list[dict] = []

    def score(self, rows, *, on_error="raise", names=None):
        self.rows += rows
        values = []
        for row in rows:
            steps = row["completions"]
            if isinstance(steps, str):
                steps = steps.split("\n")
            labels = grade(row["prompt"][0]["content"], "\n".join(steps)).labels
            bad = sum(label < 0 for label in labels) / len(labels)
            values.append(0.5 + self.sign * (0.5 - bad))
        nothing = [None] * len(rows)
        return TokenScores(
            raw=np.array(values),
            values=nothing,
            wrong=nothing,
            logits=nothing,
            places=nothing,
            n_tokens=np.full(len(rows), 10),
            reasons=nothing,
            readout=self.readout,
        )


@pytest.fixture(scope="module")
def tutor():
    return Policy.from_pretrained(TUTOR, device="cpu")


@pytest.fixture(scope="module")
def prompts():
    return [row["prompt"] for row in make_rows("prompts", 24, seed=9)]


def _right(prompts, texts):
    return [
        grade(prompt[0]["content"], text).correct
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def test_a_true_process_model_finds_right_solutions_and_a_reversed_one_wrong_ones(tutor, prompts):
    found = step_beam_search(tutor, Oracle(), prompts, beams=2, expand=4)
    assert np.mean(_right(prompts, [r.best.text for r in found])) > 0.9
    assert all(result.best.terminated for result in found)
    lost = step_beam_search(tutor, Oracle(-1.0), prompts, beams=2, expand=4)
    assert np.mean(_right(prompts, [r.best.text for r in lost])) < 0.2


def test_each_round_is_scored_step_by_step_and_every_token_is_counted(tutor, prompts, monkeypatch):
    drawn = []
    sample = tutor.sample
    monkeypatch.setattr(
        tutor, "sample", lambda *args, **kwargs: drawn.append(sample(*args, **kwargs)) or drawn[-1]
    )
    oracle = Oracle()
    (result,) = step_beam_search(tutor, oracle, prompts[:1], beams=2, expand=3)
    tokens = [s.n_tokens for rounds in drawn for group in rounds for s in group]
    assert result.n_generated == sum(tokens)
    assert [len(group) for group in drawn[0]] == [6]
    assert all(len(group) == 3 for rounds in drawn[1:] for group in rounds)
    assert all(len(rounds) <= 2 for rounds in drawn)
    assert result.n_scored == 10 * len(oracle.rows)
    texts = [("\n".join(row["completions"]), row["terminated"]) for row in oracle.rows]
    assert len(set(texts)) == len(texts)  # equal beams are scored once
    for candidate in result.candidates:
        assert candidate.token_ids[-1:] == [tutor.tokenizer.eos_token_id]
        assert tutor.tokenizer.decode(candidate.token_ids[:-1]) == candidate.text


def test_a_search_does_not_depend_on_the_other_prompts(tutor, prompts):
    together = step_beam_search(tutor, Oracle(), prompts[:4], beams=2, expand=2, seed=5)
    for prompt, result in zip(prompts[:4], together, strict=True):
        (alone,) = step_beam_search(tutor, Oracle(), [prompt], beams=2, expand=2, seed=5)
        assert alone == result


def test_what_is_cut_off_is_kept_and_comes_last(tutor, prompts):
    (result,) = step_beam_search(tutor, Oracle(), prompts[:1], beams=2, expand=2, max_steps=1)
    assert result.candidates
    assert not result.best.terminated
    a, b, c = (
        Candidate("a", [1], False, 0.9),
        Candidate("b", [2], True, 0.1),
        Candidate("c", [3], True, math.nan, "too long"),
    )
    groups = [[Sample(x.text, x.token_ids, x.terminated, 1, 0.0) for x in (a, c, b)]]
    (ordered,) = score_samples(lambda rows: [0.9, math.nan, 0.1], ["p"], groups)
    assert [x.text for x in ordered.candidates] == ["b", "a", "c"]
    assert ordered.candidates[2].reason == "the score is not finite"
    assert ordered.n_generated == 3
    assert ordered.n_tied == 1
    with pytest.raises(DataError, match="too long"):
        _ = SearchResult([c], 1, 0).best


def test_best_of_n_takes_the_best_score_and_says_how_many_tie(tutor, prompts):
    def shortness(rows):
        return [-len(row["completion"]) for row in rows]

    found = best_of_n_search(tutor, shortness, prompts[:3], 5, max_new_tokens=96, seed=2)
    drawn = tutor.sample(prompts[:3], 5, max_new_tokens=96, seed=2)
    for result, group in zip(found, drawn, strict=True):
        finished = [s.text for s in group if s.terminated]
        assert result.best.text == min(finished, key=len)
        assert result.n_tied == sum(len(t) == len(result.best.text) for t in finished)
        assert result.n_generated == sum(s.n_tokens for s in group)


def test_reward_models_and_process_models_score_as_they_do_alone(tiny_base, tiny_reward):
    from companion import RewardScorer, load_reward_model

    policy = Policy.from_pretrained(tiny_base, device="cpu")
    scorer = RewardScorer(load_reward_model(tiny_reward))
    prompt = [{"role": "user", "content": "how many pens"}]
    (result,) = best_of_n_search(policy, scorer, [prompt], 6, max_new_tokens=8)
    for candidate in result.candidates:
        row = {
            "prompt": prompt,
            "completion": candidate.text,
            "terminated": candidate.terminated,
        }
        assert candidate.score == pytest.approx(scorer.score([row]).raw[0], abs=1e-5)
    assert result.n_scored > 0
    finished = [c.score for c in result.candidates if c.terminated]
    assert finished == sorted(finished, reverse=True)


def test_as_many_tokens_at_least():
    samples = [Sample("", [], True, n, 0.0) for n in (5, 3, 4)]
    assert len(within_tokens(samples, 5)) == 1
    assert len(within_tokens(samples, 6)) == 2
    assert len(within_tokens(samples, 12)) == 3
    with pytest.raises(DataError, match="fewer than 13"):
        within_tokens(samples, 13)


def test_only_a_process_model_guides(tutor, prompts):
    oracle = Oracle()
    oracle.readout = TokenReadout("outcome", 1, "last")
    with pytest.raises(ModelError, match="not of a process model"):
        step_beam_search(tutor, oracle, prompts[:1])
    with pytest.raises(DataError, match="beams=0"):
        step_beam_search(tutor, Oracle(), prompts[:1], beams=0)
    with pytest.raises(DataError, match="2\\] scores for"):
        best_of_n_search(tutor, lambda rows: [1.0, 2.0], prompts[:1], 3, max_new_tokens=4)


@pytest.mark.slow
def test_a_trained_process_model_beats_sampling_and_a_vote_at_equal_tokens(tutor, tmp_path):
    """Held-out prompts, the recipe, 1,500 labelled solutions; the intervals exclude 0."""
    from companion.cli.main import main

    rows, folder = tmp_path / "steps.jsonl", tmp_path / "prm"
    make = ["data", "tutor", "--kind", "steps", "--n", "1500", "--seed", "1"]
    assert main([*make, "--output", str(rows)]) == 0
    train = ["train", "process", "--config", "recipes/process/tutor.yaml"]
    assert main([*train, "--dataset_name", str(rows), "--output_dir", str(folder)]) == 0
    scorer = TokenScorer.from_pretrained(folder, device="cpu")
    prompts = [row["prompt"] for row in make_rows("prompts", 150, seed=77)]
    found = step_beam_search(tutor, scorer, prompts, beams=2, expand=2)
    drawn = tutor.sample(prompts, 16, max_new_tokens=96, seed=1)
    same = [within_tokens(s, r.n_generated) for s, r in zip(drawn, found, strict=True)]
    guided = np.array(_right(prompts, [r.best.text for r in found]), dtype=float)
    plain = [
        np.mean(_right([p] * len(k), [s.text for s in k]))
        for p, k in zip(prompts, same, strict=True)
    ]
    votes = []
    for kept in same:
        answers = [re.findall(r"Answer: (\d+)", s.text)[-1:] for s in kept]
        votes.append(majority_vote([a[0] if a else None for a in answers]) or 0)
    voted = np.array(
        _right(prompts, [k[v].text for k, v in zip(same, votes, strict=True)]), dtype=float
    )
    assert bootstrap_interval(guided - np.array(plain)).low > 0
    assert bootstrap_interval(guided - voted).low > 0
