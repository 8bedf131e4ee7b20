"""Golden texts: written at training, and a model that says something else of them is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from companion.errors import ModelError
from companion.models import (
    RewardManifest,
    TokenReadout,
    identity_of,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.scoring import (
    RewardScorer,
    TokenScorer,
    add_golden_texts,
    check_golden,
    load_scorer,
)


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(kind)``: a folder of a tiny random model of that kind, with golden texts."""
    made: dict[str, Path] = {}

    def get(kind: str = "scalar") -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            labels = {"scalar": None, "outcome": 1, "process": 3}[kind]
            manifest = RewardManifest()
            if labels is not None:
                separator = "\n" if kind == "process" else None
                readout = TokenReadout(kind, labels, separator=separator)
                manifest = RewardManifest(readout=readout.to_dict())
            base = load_base(tiny_base) if labels is None else load_base(tiny_base, labels=labels)
            torch.nn.init.normal_(next(p for n, p in base.model.named_parameters() if "score" in n))
            save_reward_model(base, made[kind], manifest, describe=add_golden_texts)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["scalar", "outcome", "process"])
def test_a_saved_model_says_what_it_said(saved: Callable[[str], Path], kind: str) -> None:
    golden = RewardManifest.load(saved(kind)).golden_texts
    assert golden is not None
    assert len({len(ids) for ids in golden.input_ids}) >= 4
    if kind != "process":  # the tiny tokenizer cannot close a step that was cut off there
        assert any(row.get("terminated") is False for row in golden.rows)
    assert any(not row["completion"].isascii() for row in golden.rows)
    report = check_golden(load_scorer(saved(kind)))
    assert report is not None
    assert report.ok, report.lines()
    assert report.differs == []
    assert report.most < 1e-5


def _scaled(model: Any, formatter: Any) -> Any:
    model.score.weight.data *= 1.01
    return model, formatter


def _one_weight(model: Any, formatter: Any) -> Any:
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 3.0
    return model, formatter


def _rope(model: Any, formatter: Any) -> Any:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 20.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model, formatter


@pytest.mark.parametrize(
    ("change", "named"),
    [(_scaled, "weights"), (_one_weight, "weights"), (_rope, "config")],
)
def test_a_changed_model_is_found_and_the_hash_named(
    saved: Callable[[str], Path], change: Any, named: str
) -> None:
    loaded = load_reward_model(saved("scalar"))
    before = identity_of(loaded)
    model, formatter = change(loaded.model, loaded.formatter)
    changed = replace(loaded, model=model, formatter=formatter, source=None)
    report = check_golden(RewardScorer(changed))
    assert report is not None
    assert not report.ok
    assert report.differs == [named] == before.differs(identity_of(changed))
    assert named in report.lines()[-1]


def test_a_sigmoid_that_nobody_asked_for_is_found(saved: Callable[[str], Path]) -> None:
    class Sigmoid(RewardScorer):
        def _values(self, *arguments: Any) -> Any:
            return torch.tensor(super()._values(*arguments)).sigmoid().tolist()

    report = check_golden(Sigmoid(load_reward_model(saved("scalar"))))
    assert report is not None
    assert not report.ok
    assert report.differs == []
    assert "nothing that has a hash" in report.lines()[-1]


def test_scores_that_depend_on_the_batch_are_found(saved: Callable[[str], Path]) -> None:
    class Whitened(RewardScorer):
        def _values(self, ids: Any, *arguments: Any) -> Any:
            found = super()._values(ids, *arguments)
            return [x - sum(found) / len(found) for x in found] if len(found) > 1 else found

    report = check_golden(Whitened(load_reward_model(saved("scalar"))))
    assert report is not None
    assert {way for _, way, _ in report.moved} == {"batch"}


def test_other_ids_are_found(saved: Callable[[str], Path]) -> None:
    loaded = load_reward_model(saved("scalar"))
    loaded.tokenizer.add_tokens(["5", "The", "sea"])
    report = check_golden(RewardScorer(loaded))
    assert report is not None
    assert report.other_ids
    assert "tokenizer" in report.differs


def test_half_precision_has_a_tolerance_of_its_own(saved: Callable[[str], Path]) -> None:
    report = check_golden(load_scorer(saved("scalar"), dtype="bfloat16"))
    assert report is not None
    assert report.differs == ["dtype"]  # the weights are those that were stored
    assert report.tolerance == 0.1
    strict = check_golden(load_scorer(saved("scalar"), dtype="bfloat16"), tolerance=1e-5)
    assert strict is not None
    assert not strict.ok


def test_golden_texts_do_not_stay_with_other_weights(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = load_reward_model(saved("scalar"))
    save_reward_model(loaded, tmp_path / "same")
    assert RewardManifest.load(tmp_path / "same").golden_texts is not None
    loaded.model.score.weight.data *= 2
    loaded.source = None
    manifest = save_reward_model(loaded, tmp_path / "other")
    assert manifest.golden_texts is None
    assert any("golden" in note for note in manifest.notes)
    assert check_golden(load_scorer(tmp_path / "other")) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda golden: golden.pop("values"),
        lambda golden: golden["values"].pop(),
        lambda golden: golden.update(values=[None] * 8),
        lambda golden: golden.update(tolerance=-1),
        lambda golden: golden.update(surplus=1),
    ],
)
def test_damaged_golden_texts_are_refused(saved: Callable[[str], Path], damage: Any) -> None:
    manifest = json.loads((saved("scalar") / "reward_manifest.json").read_text("utf-8"))
    damage(manifest["golden_texts"])
    with pytest.raises(ModelError, match="golden"):
        RewardManifest.from_json(json.dumps(manifest))


def test_a_process_model_with_moved_steps_is_found(saved: Callable[[str], Path]) -> None:
    loaded = load_reward_model(saved("process"))
    assert isinstance(loaded.readout, TokenReadout)
    loaded.readout = replace(loaded.readout, separator=" ")
    report = check_golden(TokenScorer(loaded))
    assert report is not None
    assert report.other_ids
    assert report.differs == ["readout"]
