"""Whole runs of every kind, each made once: what they save, report and have learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_kinds import RUNS, SEPARATOR, outcomes, rankings, solutions
from huggingface_hub import ModelCard

from companion import (
    RewardManifest,
    RewardScorer,
    TokenScorer,
    load_reward_model,
    load_scorer,
)
from companion.training import TrainingResult


@pytest.fixture(scope="module")
def whole_runs(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainingResult[Any]]:
    """``whole_runs("kwise")``: the result of one of :data:`example_kinds.RUNS`."""
    made: dict[str, TrainingResult[Any]] = {}

    def get(name: str) -> TrainingResult[Any]:
        if name not in made:
            made[name] = RUNS[name].run(tiny_base, tmp_path_factory.mktemp("run"))
        return made[name]

    return get


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("name", list(RUNS))
def test_training_reports_what_evaluate_prints(name: str, whole_runs: Callable[[str], Any]) -> None:
    """The same rows, the saved model: scores differ by rounding, since batches differ."""
    result = whole_runs(name)
    found = RUNS[name].evaluate(result)
    assert type(found) is type(result.test)
    assert len(found) == len(result.test) > 10
    ours, theirs = dict(flat(result.metrics)), dict(flat(found.metrics))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-6), key
    assert found.table() == result.test.table()


@pytest.mark.parametrize("name", list(RUNS))
def test_a_whole_run_saves_what_it_reports(name: str, whole_runs: Callable[[str], Any]) -> None:
    result = whole_runs(name)
    manifest = RewardManifest.load(result.output_dir)
    assert dict(flat(manifest.metrics)) == pytest.approx(dict(flat(result.metrics)), nan_ok=True)
    assert manifest.temperature == result.temperature
    assert manifest.data["held_out"]["test"] == len(result.test)
    assert manifest.data["held_out"]["calibration"] == len(result.calibration)
    assert manifest.data["train"]["kept"] == result.reports["train"].kept
    assert manifest.training["learning_rate"] == result.manifest.training["learning_rate"]
    assert not result.reward_model.model.training
    assert "forward" not in vars(result.reward_model.model)
    assert result.summary().endswith(f"saved in {result.output_dir}")
    files = {path.name for path in result.output_dir.iterdir()}
    assert "model.safetensors" in files
    assert "adapter_config.json" not in files
    scorer = load_scorer(result.output_dir, device="cpu")
    assert scorer.formatter.fingerprint() == manifest.formatter_fingerprint


@pytest.mark.parametrize("name", ["kwise", "kwise, pairs"])
def test_rankings(whole_runs: Callable[[str], Any], name: str) -> None:
    result = whole_runs(name)
    assert result.metrics["accuracy"] > 0.9
    assert result.metrics["rankings"]["best_is_best"] > 0.9
    # completions too long, of which the pairs are counted as a scorer counts them
    assert list(result.metrics["dropped"]["reasons"]) == ["longer than max_length=60 tokens"]
    assert result.metrics["rankings"]["dropped"] > 0
    assert "longer text is right in" in result.summary()
    loaded = load_reward_model(result.output_dir)
    assert loaded.manifest is not None
    assert loaded.manifest.training["loss_type"] == (
        "pairs" if name == "kwise, pairs" else "plackett_luce"
    )
    # the folder is a reward model as any other: pairs of the held-out rankings get the same scores
    scorer = RewardScorer.from_pretrained(result.output_dir)
    row = rankings(90)[4]
    scores = scorer.score([{"prompt": row["prompt"], "completion": c} for c in row["completions"]])
    assert np.argsort(-scores.raw).tolist() == np.argsort(row["ranks"]).tolist()


@pytest.mark.parametrize("name", ["outcome", "outcome, LoRA"])
def test_outcomes(whole_runs: Callable[[str], Any], name: str) -> None:
    result = whole_runs(name)
    assert result.metrics["auc"] > 0.95
    assert result.metrics["length_auc"] == 1.0
    assert "AUC by aggregation" in result.summary()
    assert any("eval_auc" in entry for entry in result.log_history)

    scorer = TokenScorer.from_pretrained(result.output_dir)
    rows = [{**row, "label": None} for row in outcomes(6)]
    scores = scorer.score(rows)
    assert scores.raw[1] > scores.raw[0]
    for values, raw, places in zip(scores.values, scores.raw, scores.places, strict=True):
        assert values is not None
        assert places is not None
        assert values[-1] == raw
        assert len(values) == len(places)
    alone = [float(scorer.score([row]).raw[0]) for row in rows]
    np.testing.assert_allclose(scores.raw, alone, atol=1e-6)
    product = TokenScorer.from_pretrained(result.output_dir, aggregation="product").score(rows)
    assert product.raw[1] == pytest.approx(np.prod(scores.values[1]))
    readout = result.manifest.readout
    assert (readout["kind"], readout["aggregation"]) == ("outcome", "last")


@pytest.mark.parametrize("name", ["process", "process, binary"])
def test_steps(whole_runs: Callable[[str], Any], name: str) -> None:
    result = whole_runs(name)
    assert result.metrics["first_error"]["first_error_f1"] > 0.9
    assert result.metrics["step_accuracy"] > result.metrics["majority"]
    assert "first-error F1" in result.summary()

    scorer = TokenScorer.from_pretrained(result.output_dir)
    assert scorer.readout.threshold == result.metrics["threshold"]
    rows = solutions(5)
    scores = scorer.score(rows)
    assert scores.first_errors(scorer.readout.threshold) == [None, 1, 2, 0, None]
    for values, raw in zip(scores.values, scores.raw, strict=True):
        assert values is not None
        assert len(values) == 3
        assert raw == values.min()
    # the same by its text, and a prefix says of its steps what the whole says of them
    text = {"prompt": rows[2]["prompt"], "completion": SEPARATOR.join(rows[2]["completions"])}
    np.testing.assert_allclose(scorer.score([text]).values[0], scores.values[2], atol=1e-6)
    prefix = {**rows[2], "completions": rows[2]["completions"][:2], "terminated": False}
    np.testing.assert_allclose(scorer.score([prefix]).values[0], scores.values[2][:2], atol=1e-6)


@pytest.mark.parametrize("kind", ["pairwise", "kwise", "outcome, LoRA", "process"])
def test_each_kind_has_a_card_made_from_its_manifest(kind: str, whole_runs: Any) -> None:
    result = whole_runs(kind)
    card = ModelCard.load(result.output_dir / "README.md")
    assert "None" not in card.content
    manifest = result.manifest
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == (
        "text-classification" if manifest.kind == "scalar" else "token-classification"
    )
    for part in ("train", "held_out"):
        assert str(manifest.data[part]["sha256"])[:16] in card.text
    name = "step_accuracy" if kind == "process" else "accuracy"
    if isinstance(manifest.metrics.get(name), float):
        low, high = manifest.metrics[f"{name}_interval"]
        assert f"| {manifest.metrics[name]:.3f} | [{low:.3f}, {high:.3f}] |" in card.text
    if kind == "kwise":
        assert "| favourite is the best | " in card.text
    assert f"transformers {manifest.versions['transformers']}" in card.text
    assert Path(str(manifest.base_model)).name in card.text
    assert str(Path(str(manifest.base_model)).parent) not in card.content, "paths stay private"
