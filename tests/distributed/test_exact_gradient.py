"""The gradient of a step is that of the mean over its pairs: ranks × accumulation × sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("exact_gradient")]
WORKER = Path(__file__).with_name("exact_worker.py")


@pytest.fixture(scope="module", params=[1, 2])
def ranks_and_results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    """All cases in one start of the processes."""
    output = tmp_path_factory.mktemp("exact") / "results.json"
    launch([str(WORKER), str(output)], ranks=request.param)
    return request.param, json.loads(output.read_text())


def test_every_step_has_the_gradient_of_the_mean_over_its_pairs(ranks_and_results: Any) -> None:
    _, results = ranks_and_results
    cases = [entry for entry in results if "case" in entry]
    assert {entry["case"][2] for entry in cases} == {1, 2, 4}
    for entry in cases:
        assert len(entry["errors"]) == entry["expected_steps"], entry
        assert max(entry["errors"]) < 1e-5, entry


def test_logged_loss_is_the_mean_over_all_pairs(ranks_and_results: Any) -> None:
    """The same for every cut into ranks, batches and accumulation, since nothing was learned."""
    _, results = ranks_and_results
    means: dict[Any, set[float]] = {}
    for entry in results:
        if "case" in entry:
            assert entry["pairs"] == entry["case"][0]
            means.setdefault((entry["case"][0], entry["margin"]), set()).add(entry["train_loss"])
    assert len(means) == 7
    for values in means.values():
        assert max(values) - min(values) < 1e-5


def test_stock_trl_is_wrong_where_batches_are_uneven(ranks_and_results: Any) -> None:
    ranks, results = ranks_and_results
    cosine = {tuple(entry["stock"]): entry["cosine"] for entry in results if "stock" in entry}
    wrong = {1: [(5, 4, 2)], 2: [(5, 4, 2), (9, 4, 1), (5, 2, 1)]}[ranks]
    for case in wrong:
        assert cosine[case] < 0.99, case
    assert cosine[(8, 2, 2)] > 0.99999  # even batches: right by luck


def test_resumed_in_the_second_epoch(ranks_and_results: Any) -> None:
    ranks, results = ranks_and_results
    gap = {entry["resumed"]: entry["gap"] for entry in results if "resumed" in entry}
    assert gap["PairwiseRewardTrainer"] == 0.0
    if ranks > 1:  # with one process accelerate's set_epoch does reach the sampler
        assert gap["ForgetsTheEpoch"] > 1e-5
