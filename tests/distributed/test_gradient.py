"""The gradient of a step is that of the mean over all it holds: kinds × ranks × accumulation."""

from __future__ import annotations

import json
from typing import Any

import gradient_worker
import pytest
from launching import launch

pytestmark = pytest.mark.distributed
ranks_of = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """All kinds and cases, on one rank in this process, on two in one start of the processes."""
    folder = tmp_path_factory.mktemp("gradient")
    gradient_worker.main(f"{folder}/1.json")
    launch([gradient_worker.__file__, f"{folder}/2.json"], forked=True)
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2)}


@ranks_of
def test_every_step_has_the_gradient_of_the_mean(results: Any, ranks: int) -> None:
    cases = [entry for entry in results[ranks] if "case" in entry]
    assert len({entry["kind"] for entry in cases}) == 8
    assert {entry["case"][2] for entry in cases} == {1, 2, 4}
    for entry in cases:
        assert len(entry["errors"]) == entry["expected_steps"], entry
        assert max(entry["errors"]) < 1e-5, entry


@ranks_of
def test_a_cut_micro_batch_has_the_same_gradient(results: Any, ranks: int) -> None:
    """That it has one is seen above; here that it was cut, on all ranks alike."""
    entries = [entry for entry in results[ranks] if entry.get("cut")]
    assert len({entry["kind"] for entry in entries}) == 8
    for entry in entries:
        rows, batch, _ = entry["case"]
        assert entry["forwards"] > -(-rows // (batch * ranks)), entry


def test_the_logged_loss_is_the_same_for_every_cut(results: Any) -> None:
    """9 rows in batches of 4 or of 2, on one rank or on two: nothing was learned in between."""
    means: dict[Any, list[float]] = {}
    for entries in results.values():
        for entry in (entry for entry in entries if "case" in entry):
            assert entry["pairs"] in (None, entry["case"][0])
            means.setdefault((entry["kind"], entry["case"][0]), []).append(entry["train_loss"])
    assert len(means) == 19
    for values in means.values():
        assert len(values) >= 2
        assert max(values) - min(values) < 1e-5


@ranks_of
def test_stock_trl_is_wrong_where_batches_are_uneven(results: Any, ranks: int) -> None:
    entries = results[ranks]
    cosine = {tuple(entry["stock"]): entry["cosine"] for entry in entries if "stock" in entry}
    wrong = {1: [(5, 4, 2)], 2: [(5, 4, 2), (9, 4, 1), (5, 2, 1)]}[ranks]
    for case in wrong:
        assert cosine[case] < 0.99, case
    assert cosine[(8, 2, 2)] > 0.99999  # even batches: right by luck


@ranks_of
def test_a_stock_trainer_scales_the_gradient_of_a_token_classifier(
    results: Any, ranks: int
) -> None:
    """Its model does not forward ``num_items_in_batch``: times accumulation, times ranks."""
    entries = (entry for entry in results[ranks] if "scale" in entry)
    scale = {entry["stock scale"]: entry["scale"] for entry in entries}
    assert scale[1] == pytest.approx(ranks, rel=0.02)
    assert scale[4] == pytest.approx(4 * ranks, rel=0.02)


@ranks_of
def test_resumed_in_the_second_epoch(results: Any, ranks: int) -> None:
    gap = {entry["resumed"]: entry["gap"] for entry in results[ranks] if "resumed" in entry}
    assert gap["PairwiseRewardTrainer"] == 0.0
    if ranks > 1:  # with one process accelerate's set_epoch does reach the sampler
        assert gap["ForgetsTheEpoch"] > 1e-5
