"""``companion rank``: what is chosen, its KL, what is written, and a run that was stopped."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from companion import Policy, RewardScorer, load_reward_model, load_rows, rank_file
from companion.cli.main import main
from companion.errors import DataError
from companion.functional import best_of_n_kl, measured_best_of_n_kl

USER = [{"role": "user", "content": "how many pens"}]
ANSWERS = ["Ana has 3 pens", "no", "the answer is 7 so yes", "Ben buys 4 boxes and more"]


@pytest.fixture(scope="module")
def scorer(tiny_reward):
    return RewardScorer(load_reward_model(tiny_reward))


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------- the KL


def _exact_kl(p, scores, n):
    """By listing all n-tuples of a small policy; ties go to the first drawn."""
    chosen = np.zeros(len(p))
    for drawn in itertools.product(range(len(p)), repeat=n):
        best = max(drawn, key=lambda y: scores[y])  # max takes the first of equals
        chosen[best] += np.prod([p[y] for y in drawn])
    return float(np.sum(chosen * np.log(chosen / p)))


@pytest.mark.parametrize("scores", [[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 1.0], [2.0] * 4])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_measured_kl_is_that_of_a_policy_listed_in_full(scores, n):
    p = np.array([5, 3, 1, 1]) / 10
    # ten samples in the policy's own shares: the empirical distribution is the policy
    samples = torch.tensor(np.repeat(scores, [5, 3, 1, 1]))
    exact = _exact_kl(p, scores, n)
    assert float(measured_best_of_n_kl(samples, n)) == pytest.approx(exact, abs=1e-12)
    assert exact <= best_of_n_kl(n) + 1e-12


def test_it_converges_and_stays_below_the_closed_form():
    random = np.random.default_rng(0)
    p, scores = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 1.0, 2.0])
    exact = _exact_kl(p, scores, 4)
    many = torch.tensor(scores[random.choice(4, size=(200, 400), p=p)])
    assert float(measured_best_of_n_kl(many, 4).mean()) == pytest.approx(exact, abs=0.01)
    continuous = torch.tensor(random.normal(size=(20, 4000)))
    assert float(measured_best_of_n_kl(continuous, 8).mean()) == pytest.approx(
        best_of_n_kl(8), abs=0.01
    )
    for n in (2, 4, 16, 64, 256):
        short = best_of_n_kl(n) - float(measured_best_of_n_kl(torch.arange(float(n)), n))
        assert 0 <= short <= 0.08
    assert measured_best_of_n_kl(torch.rand(3, 5), 1).tolist() == pytest.approx([0.0] * 3)
    with pytest.raises(DataError, match="NaN"):
        measured_best_of_n_kl(torch.tensor([1.0, math.nan]), 2)
    with pytest.raises(DataError, match="N = 0"):
        measured_best_of_n_kl(torch.rand(3), 0)


# ---------------------------------------------------------------------- ranking


def test_the_best_is_the_argmax_of_the_scores(scorer, tmp_path):
    rows = [
        {"id": "chat", "prompt": USER, "completions": ANSWERS},
        {"id": "text", "prompt": "how many pens ", "completions": ANSWERS[::-1]},
        {
            "prompt": USER,
            "completions": [[{"role": "assistant", "content": text}] for text in ANSWERS],
        },
    ]
    source, output = _write(tmp_path / "in.jsonl", rows), tmp_path / "best.jsonl"
    pairs = tmp_path / "pairs.jsonl"
    report = rank_file(scorer, source, output, pairs_path=pairs, top_k=2)
    written, ranks = _read(output), _read(tmp_path / "best.jsonl.ranks.jsonl")
    assert (report.rows, report.best, report.pairs, report.candidates) == (3, 6, 3, 12)
    for place, row in enumerate(rows):
        flat = [{"prompt": row["prompt"], "completion": c} for c in row["completions"]]
        scores = scorer.score(flat).raw
        best = np.argsort(-scores)
        assert [item["place"] for item in ranks[place]["completions"]] == best.tolist()
        got = [item["score"] for item in ranks[place]["completions"]]
        np.testing.assert_allclose(got, scores[best], atol=1e-5)
        for rank in range(2):
            expected = row["completions"][best[rank]]
            if isinstance(row["prompt"], list) and isinstance(expected, str):
                expected = [{"role": "assistant", "content": expected}]
            assert written[2 * place + rank] == {"prompt": row["prompt"], "completion": expected}
    assert [record.get("id") for record in ranks] == ["chat", "text", None]
    assert ranks[0]["n_tied"] == 1
    assert ranks[0]["kl_bound"] == pytest.approx(best_of_n_kl(4))
    assert len(load_rows(pairs, kind="pairs", on_error="skip")) == 2  # (one of text among them)


def test_ties_go_to_the_first_and_are_counted(scorer, tmp_path):
    rows = [{"prompt": USER, "completions": ["no", "no", "no"]}]
    source, output = _write(tmp_path / "in.jsonl", rows), tmp_path / "best.jsonl"
    report = rank_file(scorer, source, output, pairs_path=tmp_path / "pairs.jsonl")
    (record,) = _read(tmp_path / "best.jsonl.ranks.jsonl")
    assert [item["place"] for item in record["completions"]] == [0, 1, 2]
    assert (record["n_tied"], report.tied, report.pairs) == (3, 1, 0)
    assert report.kl_measured == 0.0


def test_what_was_cut_off_is_ranked_last_and_never_written(scorer, tmp_path):
    rows = [
        {"prompt": USER, "completions": ANSWERS, "terminated": [False, True, False, True]},
        {"prompt": USER, "completions": ANSWERS[:1], "terminated": [False]},
    ]
    source, output = _write(tmp_path / "in.jsonl", rows), tmp_path / "best.jsonl"
    report = rank_file(scorer, source, output, top_k=4)
    ranks = _read(tmp_path / "best.jsonl.ranks.jsonl")
    assert [i["terminated"] for i in ranks[0]["completions"]] == [True, True, False, False]
    assert {row["completion"][0]["content"] for row in _read(output)} == {ANSWERS[1], ANSWERS[3]}
    assert (report.cut_off, report.not_written, report.best) == (3, 1, 2)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completions": ["a"]}, "'prompt' is missing"),
        ({"prompt": USER}, "no list of completions"),
        ({"prompt": USER, "completions": []}, "no list of completions"),
        ({"prompt": USER, "completions": ["a", USER]}, "mixed"),
        ({"prompt": USER, "completions": ["a", 3]}, "texts and messages|neither"),
        ({"prompt": USER, "completions": ["a"], "terminated": [1]}, "list of 1 true or false"),
        ({"prompt": [{"role": "pirate", "content": "a"}], "completions": ["a"]}, "role"),
        ({"prompt": USER, "completions": [" "]}, "no completion has a score"),
    ],
)
def test_a_bad_row_stops_the_run_or_says_its_error(scorer, tmp_path, row, words):
    good = {"prompt": USER, "completions": ANSWERS}
    source = _write(tmp_path / "in.jsonl", [good, row, good])
    with pytest.raises(DataError, match=words) as caught:
        rank_file(scorer, source, tmp_path / "a.jsonl")
    assert "in.jsonl line 2" in str(caught.value)
    report = rank_file(scorer, source, tmp_path / "b.jsonl", on_error="skip")
    assert (report.failed, report.best) == (1, 2)
    assert "error" in _read(tmp_path / "b.jsonl.ranks.jsonl")[1]


def test_a_stopped_run_goes_on_and_chunks_make_no_difference(scorer, tiny_base, tmp_path):
    policy = Policy.from_pretrained(tiny_base, device="cpu")
    rows = [{"prompt": USER}, {"prompt": "Ana has 3"}, {"prompt": USER}, {"prompt": "Ben buys"}]
    source = _write(tmp_path / "in.jsonl", rows)
    settings = {"policy": policy, "n": 4, "max_new_tokens": 24, "seed": 3}
    rank_file(scorer, source, tmp_path / "a.jsonl", **settings)
    whole = _read(tmp_path / "a.jsonl.ranks.jsonl")
    texts = [{item["completion"] for item in record["completions"]} for record in whole]
    assert texts[0] != texts[2]  # the same prompt again: other samples
    rank_file(scorer, source, tmp_path / "b.jsonl", chunk_rows=3, **settings)
    ranks = tmp_path / "b.jsonl.ranks.jsonl"
    by_chunks = _read(ranks)
    for one, other in zip(whole, by_chunks, strict=True):
        assert [i["completion"] for i in one["completions"]] == [
            i["completion"] for i in other["completions"]
        ]
    lines = ranks.read_bytes().splitlines(keepends=True)
    ranks.write_bytes(b"".join(lines[:2]) + lines[2][:10])
    report = rank_file(scorer, source, tmp_path / "b.jsonl", **settings)
    assert report.resumed_at == 2
    again = _read(ranks)
    assert [[i["completion"] for i in r["completions"]] for r in again] == [
        [i["completion"] for i in r["completions"]] for r in whole
    ]
    assert len(_read(tmp_path / "b.jsonl")) == report.best
    with pytest.raises(DataError, match="another policy"):
        rank_file(scorer, source, tmp_path / "b.jsonl", **{**settings, "seed": 4})


def test_a_prompt_that_the_policy_cannot_complete_fails_alone(scorer, tiny_base, tmp_path):
    policy = Policy.from_pretrained(tiny_base, device="cpu")
    rows = [{"prompt": "Ana has"}, {"prompt": "Ana " * 200}, {"prompt": "Ben", "completions": []}]
    source = _write(tmp_path / "in.jsonl", rows)
    report = rank_file(
        scorer,
        source,
        tmp_path / "a.jsonl",
        policy=policy,
        n=3,
        max_new_tokens=20,
        on_error="skip",
    )
    ranks = _read(tmp_path / "a.jsonl.ranks.jsonl")
    assert report.failed == 2
    assert "positions" in ranks[1]["error"]
    assert "a policy is to draw them" in ranks[2]["error"]
    _write(source, rows[:2])
    with pytest.raises(DataError, match=r"in.jsonl line 2: .* positions"):
        rank_file(scorer, source, tmp_path / "b.jsonl", policy=policy, max_new_tokens=20)


def test_the_command_and_a_trainer_that_takes_its_output(tiny_reward, tiny_base, tmp_path, capsys):
    """TRL's own ``SFTTrainer``, unmodified, trains on the file."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": USER, "completions": ANSWERS}] * 4
    source, output = _write(tmp_path / "in.jsonl", rows), tmp_path / "best.jsonl"
    arguments = ["--model", str(tiny_reward), "--input", str(source), "--output", str(output)]
    assert main(["rank", *arguments, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "4 rows" in said
    assert "closed form" in said
    assert "ties for the best" in said
    dataset = load_dataset("json", data_files=str(output), split="train", cache_dir=tmp_path)
    trainer = SFTTrainer(
        str(tiny_base),
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=str(tmp_path / "sft"),
            max_steps=1,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
    )
    assert math.isfinite(trainer.train().training_loss)


def test_a_budget_of_tokens_reaches_both_models_and_changes_no_rank(
    tiny_reward, tiny_base, tmp_path, capsys, monkeypatch
):
    budgets = {}

    def spy(kind):
        real = kind.from_pretrained.__func__

        def from_pretrained(cls, *arguments, **settings):
            budgets.setdefault(kind, []).append(settings["max_tokens_per_batch"])
            return real(cls, *arguments, **settings)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))

    spy(RewardScorer)
    spy(Policy)
    source = _write(tmp_path / "in.jsonl", [{"prompt": USER}] * 3)
    arguments = ["--model", str(tiny_reward), "--input", str(source), "--policy", str(tiny_base)]
    arguments += ["--n", "4", "--max_new_tokens", "12", "--device", "cpu"]
    ranks = []
    for name, budget in (("a", []), ("b", ["--max_tokens_per_batch", "40"])):
        output = tmp_path / f"{name}.jsonl"
        assert main(["rank", *arguments, *budget, "--output", str(output)]) == 0
        ranks.append(_read(output.with_name(f"{name}.jsonl.ranks.jsonl")))
    assert budgets == {RewardScorer: [None, 40], Policy: [None, 40]}
    for one, other in zip(*ranks, strict=True):
        for a, b in zip(one["completions"], other["completions"], strict=True):
            assert (a["place"], a["completion"]) == (b["place"], b["completion"])
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_files_must_differ(scorer, tmp_path):
    source = _write(tmp_path / "in.jsonl", [{"prompt": USER, "completions": ANSWERS}])
    with pytest.raises(DataError, match="the same file"):
        rank_file(scorer, source, source)
    with pytest.raises(DataError, match="top_k"):
        rank_file(scorer, source, tmp_path / "a.jsonl", top_k=0)


def test_tools_of_a_row_reach_the_template_and_the_files(tiny_reward, tiny_base, tmp_path):
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    tools = [{"type": "function", "function": {"name": "pens", "parameters": {}}}]
    row = {"prompt": [{"role": "user", "content": "how many"}], "tools": tools}
    answers = ["the answer is 3", "no"]
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({**row, "completions": answers}) + "\n")
    rank_file(scorer, source, tmp_path / "best.jsonl", pairs_path=tmp_path / "pairs.jsonl")
    want = scorer.score([{**row, "completion": text} for text in answers]).raw
    without = scorer.score([{"prompt": row["prompt"], "completion": text} for text in answers]).raw
    assert abs(want - without).min() > 1e-3
    ranked = json.loads((tmp_path / "best.jsonl.ranks.jsonl").read_text())
    found = {item["place"]: item["score"] for item in ranked["completions"]}
    assert [found[0], found[1]] == pytest.approx(want, abs=1e-6)
    for name in ("best", "pairs"):
        assert json.loads((tmp_path / f"{name}.jsonl").read_text())["tools"] == tools
    source.write_text(json.dumps(row) + "\n")
    policy = Policy.from_pretrained(tiny_base, device="cpu")
    with pytest.raises(DataError, match="has tools, which a policy's prompt is written without"):
        rank_file(scorer, source, tmp_path / "more.jsonl", policy=policy)
