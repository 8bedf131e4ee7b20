"""The benchmarks count right, take turns, and write what they say; how fast is not tested."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from benchmarks import (
    best_of_n,
    comparing,
    compile,
    curves,
    epochs,
    from_text,
    overoptimization,
    overoptimization_grpo,
    scoring,
    serving,
    tokenising,
)
from benchmarks.measuring import Outcome, Timed, ratio, table, take_turns
from benchmarks.shapes import (
    candidates,
    make_model,
    mixed_lengths,
    needed_tokens,
    pairs,
    useful_flops,
)
from companion.tutor import make_rows


def test_methods_take_turns_and_preparation_is_not_timed() -> None:
    calls: list[str] = []

    def method(name: str) -> Callable[[], Callable[[], Outcome]]:
        def prepare() -> Callable[[], Outcome]:
            calls.append(f"prepare {name}")
            return lambda: calls.append(name) or Outcome(7)  # type: ignore[func-returns-value]

        return prepare

    timed = take_turns({"a": method("a"), "b": method("b")}, 2, torch.device("cpu"), lambda _: None)
    assert [c for c in calls if " " not in c] == ["b", "a", "a", "b", "b", "a"]
    assert all(len(found.seconds) == 2 for found in timed.values())
    assert timed["a"].outcome.computed == 7


def test_a_ratio_is_the_median_over_rounds() -> None:
    found = ratio(Timed([4.0, 9.0, 10.0]), Timed([2.0, 3.0, 1.0]))
    assert found == {"median": 3.0, "least": 2.0, "most": 10.0}


def test_needed_work_is_counted_once() -> None:
    model = make_model("tiny", torch.device("cpu"))
    prompt, first, second = list(range(10, 30)), [40, 1], [41, 42, 1]
    both = [[*prompt, *first], [*prompt, *second]]
    assert needed_tokens(both) == 25
    alone = useful_flops(model, [both[0]]) + useful_flops(model, [both[1]])
    keys_and_values = 128 * (2 + 2) * 32
    rest = 128 * 4 * 32 + 4 * 32 * 128 + 3 * 128 * 384
    # what is read out of a prompt alone is not needed for its branches
    read_out = 2 * rest + 4 * 128 * len(prompt)
    twice = useful_flops(model, [prompt]) - read_out
    assert alone - useful_flops(model, both) == pytest.approx(twice)
    one_token = 4 * (2 * (keys_and_values + rest) + 4 * 128)
    assert useful_flops(model, [[10]]) == pytest.approx(one_token)
    assert useful_flops(model, [[10]], backward=True) == pytest.approx(3 * one_token)


def test_work_is_the_same_every_time() -> None:
    assert candidates(2, 3) == candidates(2, 3)
    texts = candidates(2, 16)
    assert len(texts) == 32
    assert needed_tokens(texts) < sum(map(len, texts)) / 2
    row = pairs(1)[0]
    assert row["chosen_ids"][:20] == row["rejected_ids"][:20]
    assert row["chosen_ids"] != row["rejected_ids"]


def test_the_deviation_of_a_rounded_model_is_that_of_its_scores() -> None:
    cpu, ids = torch.device("cpu"), pairs(3)
    texts = [row[side] for row in ids for side in ("chosen_ids", "rejected_ids")]
    exact, rounded = make_model("tiny", cpu), make_model("tiny", cpu, torch.bfloat16).eval()
    found = comparing.deviation(rounded, exact, texts)
    assert 0 < found["typical"] <= found["largest"] < found["spread"]
    assert comparing.deviation(exact, exact, texts)["largest"] == 0


def test_a_table_is_aligned() -> None:
    text = table([{"method": "a", "x": 1234.5}, {"method": "long name", "x": None}])
    assert text.splitlines() == ["method         x", "a          1,234", "long name      -"]
    assert table([]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("program", [scoring, best_of_n])
def test_a_quick_run_writes_its_file(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--device", "cpu", "--output", str(target)])
    program.main()
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["quick"] is True
    assert record["versions"]["torch"]
    assert record["machine"]["cores"] >= 1
    (case,) = record["cases"]
    names = [row["method"] for row in case["methods"]]
    assert names[0] == "loop of 16, arrival order"
    assert "companion" in names
    assert all(0 < row["needed/computed"] <= 1 for row in case["methods"])


@pytest.mark.slow
@pytest.mark.serving
def test_a_quick_run_serves_what_the_scorer_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--output", str(target)])
    serving.main()  # stops if the mean scores differ
    record = json.loads(target.read_text(encoding="utf-8"))
    names = [row["method"] for row in record["throughput"]]
    assert names == ["offline scorer", "server", "server --exact"]
    for own in record["latency_ms"].values():
        assert own["overhead"] == pytest.approx(own["ratio"] * own["echo"])


@pytest.mark.slow
def test_both_trainers_see_the_same_pairs_and_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--output", str(target)])
    curves.main()
    record = json.loads(target.read_text(encoding="utf-8"))
    runs = {run["method"]: run for run in record["runs"]}
    ours, trl = runs["companion"], runs["TRL as shipped"]
    assert ours["steps"] == trl["steps"]
    assert ours["train_loss"] == pytest.approx(trl["train_loss"], abs=0.05)
    assert ours["accuracy"] > 0.6


def test_scores_that_differ_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def methods(*_: Any) -> Any:
        return {"a": lambda: lambda: Outcome(1, 0.0), "b": lambda: lambda: Outcome(1, 1.0)}

    monkeypatch.setattr(comparing, "scoring_methods", methods)
    monkeypatch.setattr(sys, "argv", ["x", "--quick"])
    args = comparing.arguments(None)
    with pytest.raises(SystemExit, match="b: the mean score differs by 1"):
        comparing.one_case(None, [[1]], args, torch.device("cpu"), torch.float32)


# --- from text


def test_the_words_of_the_texts_are_their_token_ids() -> None:
    tokenizer = from_text.make_tokenizer()
    for ids in (mixed_lengths(3), candidates(1, 3), [[2, 20, 200, 999, 1]]):
        for (prompt, completion), want in zip(from_text.as_texts(ids), ids, strict=True):
            assert tokenizer(prompt + completion + "<eos>")["input_ids"] == want
            if len(want) > 2:
                assert tokenizer(prompt, completion + "<eos>")["input_ids"] == want


@pytest.mark.parametrize("installed", [True, False])
def test_from_text_all_methods_score_the_same(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("sentence_transformers")
    else:
        monkeypatch.setattr(from_text.importlib.util, "find_spec", lambda name: None)
    device, ids = torch.device("cpu"), mixed_lengths(6)
    model = make_model("tiny", device, vocabulary=1001).eval()
    model.save_pretrained(tmp_path)
    from_text.make_tokenizer().save_pretrained(tmp_path)
    methods = from_text.from_text_methods(model, tmp_path, from_text.as_texts(ids), device)
    args = comparing.argparse.Namespace(rounds=1, quick=True)
    case = comparing.timed_case(methods, model, ids, args, device, torch.float32)
    rows = {row["method"]: row for row in case["methods"]}
    assert ("CrossEncoder as shipped (not installed)" in rows) is not installed
    assert all(row["seconds"] or "not installed" in name for name, row in rows.items())
    assert rows["companion"]["needed/computed"] == 1
    assert rows["transformers' pipeline, 16 a batch"]["needed/computed"] < 1
    if not installed:
        assert set(rows["CrossEncoder as shipped (not installed)"]) == set(rows["companion"])
        assert table(case["methods"]).count("not installed") == 2


# --- compile, tokenising


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compiled.append(type(self).__name__)
    )
    model = make_model("tiny", torch.device("cpu"))
    for what, want in (
        ("nothing", {}),
        ("all", {"Qwen3Model": 1}),
        ("parts", {"Qwen3MLP": 4, "Qwen3RMSNorm": 17}),  # four in each layer, and the last
    ):
        compiled.clear()
        compile.compile_model(model, what)
        assert {name: compiled.count(name) for name in compiled} == want


def test_the_time_to_compile_is_that_of_the_first_call_beyond_a_later_one() -> None:
    calls: list[str] = []

    def run(name: str) -> Callable[[], Outcome]:
        def call() -> Outcome:
            time.sleep(0.2 if "compiled" in name and name not in calls else 0.0)
            calls.append(name)
            return Outcome(1, 0.5)

        return call

    rows = compile.compare({name: run(name) for name in ("packed", "packed, compiled")}, 2)
    assert rows[0]["seconds to compile"] is None
    assert rows[1]["seconds to compile"] > 0.15
    assert rows[1]["seconds"] < 0.15
    wrong = {"packed": run("packed"), "other": lambda: Outcome(1, 0.7)}
    with pytest.raises(SystemExit, match=r"other: differs by 0\.2 from packed"):
        compile.compare(wrong, 1)


def test_scoring_and_training_are_the_same_packed_and_padded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile, "compile_model", lambda model, what: None)
    monkeypatch.setattr(compile, "mixed_lengths", lambda _: mixed_lengths(6))
    monkeypatch.setattr(compile, "pairs", lambda _: pairs(8))  # one step
    for make in (compile.scoring, compile.training):
        outcomes = [run() for run in make("tiny", True).values()]
        assert max(o.check for o in outcomes) - min(o.check for o in outcomes) < 1e-4
        assert outcomes[0].computed < outcomes[2].computed


def test_tokenised_by_all_methods_the_ids_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tokenising.tokenising, "CACHE_FROM", 1)
    rows = Dataset.from_list(make_rows("pairs", 20, seed=0))
    methods = tokenising.tokenising_methods(rows, tmp_path)
    outcomes = {name: method()() for name, method in methods.items()}
    assert len(outcomes) == 4
    assert len({(found.computed, found.check) for found in outcomes.values()}) == 1
    fewer = tokenising.tokenising_methods(rows.select(range(19)), tmp_path)
    assert next(iter(fewer.values()))()().check != outcomes["companion, second run"].check


# --- over-optimisation ------------------------------------------------------------------------


def test_counts_have_the_distribution_of_single_draws() -> None:
    """Against a policy whose every completion has a known probability."""
    chances = torch.tensor([[0.2, 0.5, 0.3]])  # of EOS and two tokens, whatever came before

    class Model:
        def __call__(self, ids: torch.Tensor, **_: Any) -> Any:
            rows = chances.log().expand(len(ids), ids.shape[1], 3)
            return type("Output", (), {"logits": rows})

    class Tokenizer:
        eos_token_id = 0

        def apply_chat_template(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[1]])}

        def decode(self, tokens: tuple[int, ...]) -> str:
            return "".join(" ab"[t] for t in tokens)

    n = 20_000
    drawn = overoptimization.draw_counts(Model(), Tokenizer(), [], n, np.random.default_rng(0))
    assert sum(count for _, count, _ in drawn) == n
    assert len({text for text, _, ended in drawn if ended}) == sum(ended for *_, ended in drawn)
    counts = {text: count for text, count, _ in drawn}
    for text in ("", "a", "b", "ab", "ba", "aab"):
        p = 0.2 * 0.5 ** text.count("a") * 0.3 ** text.count("b")
        assert abs(counts.get(text, 0) - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_scores_on_the_scale_of_gold_and_without_length() -> None:
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(5, 30, generator=generator, dtype=torch.float64) * 2 + 1
    words = torch.randint(5, 40, (5, 30), generator=generator).double()
    scores = 0.3 * gold + 0.2 * words - 7
    moved = overoptimization.on_gold_scale(scores, gold)
    assert moved.mean().item() == pytest.approx(gold.mean().item())
    assert moved.std().item() == pytest.approx(gold.std().item())
    assert torch.equal(moved.argsort(1), scores.argsort(1))
    left = overoptimization.without_length(scores, words)
    for row, length in zip(left - left.mean(1, keepdim=True), words, strict=True):
        assert abs(torch.corrcoef(torch.stack([row, length]))[0, 1]) < 0.4
    centred = words - words.mean(1, keepdim=True)
    assert (left * centred).sum().item() == pytest.approx(0, abs=1e-6)
    # what has nothing to do with length stays
    assert torch.allclose(overoptimization.without_length(gold * 0 + 1, words), gold * 0 + 1)


def test_a_stage_is_not_done_twice(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        assert overoptimization.once(tmp_path / "a" / "x.json", lambda: calls.append(1) or [2]) == [
            2
        ]
    assert calls == [1]


def test_the_rewards_of_a_case_add_up_to_the_scale_of_gold() -> None:
    rng = np.random.default_rng(0)
    gold, *members = rng.normal(2, 3, 400), rng.normal(5, 0.1, 400), rng.normal(-1, 40, 400)
    weights, shift = overoptimization_grpo.weigh(members, gold)
    total = weights[0] * members[0] + weights[1] * members[1] + shift
    assert total.mean() == pytest.approx(gold.mean())
    assert total.std() == pytest.approx(gold.std())
    # neither drowns the other
    parts = [w * member.std() for w, member in zip(weights, members, strict=True)]
    assert parts[0] == pytest.approx(parts[1])
    assert overoptimization_grpo.filled([3.0, None, 1.0]).tolist() == [3.0, 1.0, 1.0]


def test_no_two_runs_share_a_reward_model_and_the_test_pairs_are_in_none() -> None:
    case = overoptimization_grpo.Case("four", 6, 250, members=4)
    seeds = [proxy.seed for seed in range(10) for proxy in case.proxies(seed)]
    assert len(set(seeds)) == 40
    assert overoptimization.PAIRS_SEED + max(seeds) < overoptimization.TEST_SEED


def test_the_interval_of_a_figure_is_over_runs_and_prompts() -> None:
    """Of runs that differ and prompts that do not, only an interval over the runs has a width."""
    values = np.tile(np.array([1.0, 2.0, 3.0, 4.0, 5.0])[:, None, None], (1, 8, 3))
    values[:, :, 1] += 1  # the best n
    row = overoptimization.figure_of(values, overoptimization.largest_gold)
    assert row["mean"] == 4
    assert row["each_seed"] == [2, 3, 4, 5, 6]
    assert row["low"] < 3
    assert row["high"] > 5
    lost = overoptimization.figure_of(values, overoptimization.gold_lost)
    assert lost["mean"] == lost["low"] == lost["high"] == 1
    turn = overoptimization.figure_of(values, overoptimization.doublings_to_turn)
    assert turn["mean"] == turn["low"] == 1
    # one run: over prompts, and these are alike
    alone = overoptimization.figure_of(values[:1], overoptimization.largest_gold)
    assert alone["mean"] == alone["low"] == alone["high"] == 2
    # paired: what all runs share is gone
    difference = overoptimization.compare(values + 0.5, values)["largest_gold"]
    assert difference["low"] == difference["high"] == 0.5


def grpo_run(golds: list[float], seed: int, end: float) -> dict[str, Any]:
    """A run whose gold at each look is that, in the mean over four prompts."""
    each = np.array([-1.0, 0.0, 0.0, 1.0])

    def look(step: int, gold: float, proxy: float) -> dict[str, Any]:
        figures = {"gold": gold + each, "proxy": proxy + each, "correct": each, "kl": each + step}
        plain = {name: values.tolist() for name, values in figures.items()}
        plain["proxy"][0] = None  # (a prompt without a score)
        return {"step": step, "figures": plain, "length": 10.0 + step}

    return {
        "seed": seed,
        "steps": 4 * (len(golds) - 1),
        "reason": "why",
        "best_step": 4,
        "looks": [look(4 * k, gold, float(k)) for k, gold in enumerate(golds)],
        "test": {"start": look(0, 1.0, 0), "kept": look(4, 3.0, 1), "end": look(8, end, 2)},
        "seconds": 1.0,
    }


def test_curves_of_several_runs_and_what_the_monitor_saved() -> None:
    free = [grpo_run([1.0, 3.0, 0.0], 0, 0.5), grpo_run([1.0, 2.0, 1.0], 1, -0.5)]
    found = overoptimization_grpo.curves(free, shift=7.0)
    assert found["steps"] == [0, 4, 8]
    assert found["gold"]["mean"] == [1.0, 2.5, 0.5]
    assert found["gold"]["each_seed"] == [[1.0, 3.0, 0.0], [1.0, 2.0, 1.0]]
    assert found["gold"]["low"][0] < 1.0 < found["gold"]["high"][0]
    assert found["proxy"]["mean"][1] == pytest.approx(7 + 1 + 1 / 3, abs=1e-4)
    assert (found["best_step"], found["gold_lost"]["mean"]) == (4, 2.0)
    assert found["tokens"] == [10.0, 14.0, 18.0]
    watched = [grpo_run([1.0, 3.0, 2.0], 0, 2.5), grpo_run([1.0, 2.0, 1.5], 1, 1.5)]
    saved = overoptimization_grpo.against_watched(free, watched)
    assert saved["gain_at_stop"]["mean"] == 1.0
    # prompt by prompt there is no spread, from run to run there is
    assert saved["gain_at_stop"]["low"] <= 0.5
    assert saved["gain_at_stop"]["high"] >= 1.5
    assert saved["gain_without"]["mean"] == -1.0
    assert saved["gain_of_kept"]["mean"] == 2.0
    # 2 on each seed: paired, no width
    assert saved["stop_minus_without"] == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert saved["kept_minus_without"]["mean"] == 3.0
    assert saved["gain_at_stop_each_seed"] == [1.5, 0.5]


def test_what_is_read_off_each_run_and_the_difference_of_two_cases() -> None:
    free = [grpo_run([1.0, 3.0, 0.0], 0, 0.5), grpo_run([1.0, 2.0, 4.0], 1, -0.5)]
    drawn = overoptimization_grpo.gold_and_kl(free)
    assert drawn.shape == (2, 4, 3, 2)
    row = overoptimization_grpo.each_run(drawn)
    assert row["largest_gold"]["each_seed"] == [3.0, 4.0]
    assert row["gold_at_end"]["each_seed"] == [0.0, 4.0]
    assert row["change_of_gold"]["each_seed"] == [-1.0, 3.0]
    assert row["gold_gained"]["each_seed"] == [2.0, 3.0]
    assert row["gold_lost"]["each_seed"] == [3.0, 0.0]
    assert row["kl_at_turn"]["each_seed"] == [4.0, 8.0]  # (the KL of a look is its step)
    other = [grpo_run([1.0, 2.0, 0.0], 0, 0.5), grpo_run([1.0, 1.0, 3.0], 1, -0.5)]
    found = overoptimization_grpo.compare(drawn, overoptimization_grpo.gold_and_kl(other))
    # the same on each seed: paired, no width
    assert found["largest_gold"]["low"] == found["largest_gold"]["high"] == 1.0
    assert found["gold_at_end"]["each_seed"] == [0.0, 1.0]


def test_the_study_of_grpo_gives_each_seed_its_reward_models_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the training: which models a run is given, and what is not done twice."""
    calls: list[tuple[str, list[str], bool]] = []
    rng = np.random.default_rng(0)

    def run(name: str, rewards: Any, weights: Any, seed: int, watched: bool, _: Any) -> Any:
        assert len(weights) == len(rewards)
        calls.append((name, [folder.name for folder in rewards], watched))
        return grpo_run([1.0, 3.0 + seed, rng.normal()], seed, 0.5)

    monkeypatch.setattr(overoptimization_grpo, "run", run)
    monkeypatch.setattr(
        overoptimization_grpo,
        "trained",
        lambda proxy, models: (models / overoptimization.stem(proxy), {"accuracy": 0.7}),
    )
    monkeypatch.setattr(overoptimization_grpo, "draw", lambda prompts: {})
    monkeypatch.setattr(
        overoptimization_grpo, "measure", lambda source, columns: rng.normal(size=9).tolist()
    )
    two = (overoptimization_grpo.CASES[0], overoptimization_grpo.CASES[-1])
    monkeypatch.setattr(overoptimization_grpo, "CASES", two)
    flags = ["--work", str(tmp_path), "--models", str(tmp_path)]
    target = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--output", str(target), "--unwatched"])
    overoptimization_grpo.main()
    record = json.loads(target.read_text(encoding="utf-8"))
    assert not any("monitor" in case for case in record["cases"])
    assert len(record["differences"]) == 1
    of = {name: models for name, models, _ in calls}
    assert of["6_layers-250_pairs-3"] == ["6_layers-250_pairs-3"]
    assert of["4_models-mean-1"] == [f"6_layers-250_pairs-{k}" for k in (1, 11, 21, 31)]
    # then with the monitor: only those runs are new
    calls.clear()
    monkeypatch.setattr(sys, "argv", ["x", *flags, "--output", str(target)])
    overoptimization_grpo.main()
    assert [watched for *_, watched in calls] == [True] * 5
    again = json.loads(target.read_text(encoding="utf-8"))
    assert again["differences"] == record["differences"]
    assert len(again["cases"][0]["monitor"]["gain_at_stop_each_seed"]) == 5


@pytest.mark.slow
def test_a_quick_study_of_grpo_writes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, work = tmp_path / "result.json", tmp_path / "work"
    flags = ["--quick", "--work", str(work), "--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    overoptimization_grpo.main()
    record = json.loads(target.read_text(encoding="utf-8"))
    case, two = record["cases"]
    assert len(two["rewards"][0]["weights"]) == 2
    # each seed its own reward model
    assert case["rewards"][0]["weights"] != case["rewards"][1]["weights"]
    (difference,) = record["differences"]
    assert difference["second"] == two["name"]
    assert len(difference["largest_gold"]["each_seed"]) == 2
    assert case["steps"] == [0, 1, 2]
    assert case["kl"]["mean"][0] == pytest.approx(0, abs=1e-4)
    assert case["kl"]["mean"][-1] > 0
    assert len(case["monitor"]["stopped_at"]) == 2


@pytest.mark.slow
def test_a_quick_study_of_best_of_n_writes_its_file_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, work = tmp_path / "result.json", str(tmp_path / "work")
    flags = ["--quick", "--work", work, "--models", work, "--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    overoptimization.main()
    record = json.loads(target.read_text(encoding="utf-8"))
    assert len(record["proxies"]) == 2
    for row in record["proxies"]:
        assert len(row["turns"]) == len(set(row["accuracies"])) == 2
        assert (np.diff(row["proxy"]["each_seed"]) > 0).all()
        assert row["gold"]["mean"][0] == pytest.approx(record["limit"]["gold"]["mean"][0])
    monkeypatch.setattr(overoptimization, "train", None)
    overoptimization.main()  # nothing is trained twice
    assert json.loads(target.read_text(encoding="utf-8"))["differences"] == record["differences"]


# --- epochs -----------------------------------------------------------------------------------


def test_accuracy_and_loss_of_a_pair_are_expectations_over_its_label() -> None:
    rng = np.random.default_rng(0)
    margins, probability = rng.normal(0, 2, (3, 50)), rng.uniform(0, 1, 50)
    found = epochs.figures_of(margins, probability)
    labels = rng.random((20_000, 50)) < probability
    signed = np.where(labels, margins[1], -margins[1])
    drawn = {"accuracy": signed > 0, "loss": np.log1p(np.exp(-signed))}
    for name, values in drawn.items():
        assert np.allclose(values.mean(0), found[name][1], atol=0.06)
    # nothing beats the truth
    truth = np.log(probability / (1 - probability))
    best = epochs.figures_of(truth[None], probability)
    for name, sign in (("accuracy", 1), ("loss", -1)):
        assert (sign * best[name] >= sign * found[name] - 1e-12).all()


def test_pairs_again_are_compared_with_new_ones_after_as_many_steps() -> None:
    few = epochs.Setting("few", 32, epochs=(1.0, 2.0, 4.0))
    many = epochs.Setting("many", 64, epochs=(0.5, 1.0, 2.0))
    settings = [few, many]
    found = {
        one.name: {
            name: np.broadcast_to(np.arange(3.0)[:, None] + shift, (2, 3, 6))
            for name in ("accuracy", "loss")
        }
        for one, shift in zip(settings, (0.0, 10.0), strict=True)
    }
    rows = epochs.same_steps(settings, found)
    assert [(row["epochs_of_few"], row["epochs_of_many"]) for row in rows] == [
        (1.0, 0.5),
        (2.0, 1.0),
        (4.0, 2.0),
    ]
    assert all(row["loss"]["mean"] == row["loss"]["low"] == -10 for row in rows)
    assert rows[0]["loss"]["each_seed"] == [-10, -10]
    assert epochs.same_steps([few, epochs.Setting("noisy", 64, noise=0.4)], found) == []


@pytest.mark.slow
def test_a_quick_study_of_epochs_is_that_of_shorter_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look after the first epoch is the model of a run of one epoch."""
    target = tmp_path / "result.json"
    flags = ["--quick", "--work", str(tmp_path), "--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    epochs.main()
    record = json.loads(target.read_text(encoding="utf-8"))
    setting, cosine = record["settings"]
    assert setting["epochs"] == [0.5, 1.0, 2.0]
    assert setting["against_epoch_1"]["loss"]["mean"][1] == 0
    assert setting["loss"]["each_seed"][0] != setting["loss"]["each_seed"][1]
    assert cosine["epochs"] == [1.0, 2.0]
    assert cosine["loss"]["mean"][0] != setting["loss"]["mean"][1]
    test = epochs.make_test(40)
    assert len({row["prompt"][0]["content"] for row in test}) == 40
    long, short = (
        epochs.run(epochs.Setting("32 pairs", 32, epochs=looks), 0, test)
        for looks in ((0.5, 1.0, 2.0), (0.5, 1.0))
    )
    np.testing.assert_allclose(long["margins"][:2], short["margins"], atol=1e-3)
    np.testing.assert_allclose(long["train_loss"][:1], short["train_loss"], atol=1e-3)
