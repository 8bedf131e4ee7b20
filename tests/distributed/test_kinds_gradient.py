"""K-wise, outcome and process: the gradient of a step is that of the mean over all it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import launch

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("kinds_gradient")]
WORKER = Path(__file__).with_name("kinds_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """All kinds and cases, in one start of the processes for each number of ranks."""
    found = {}
    for ranks in (1, 2):
        output = tmp_path_factory.mktemp("kinds") / f"{ranks}.json"
        launch([str(WORKER), str(output)], ranks=ranks)
        found[ranks] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_step_has_the_gradient_of_the_mean(results: Any, ranks: int) -> None:
    cases = [entry for entry in results[ranks] if "case" in entry]
    assert {entry["case"][2] for entry in cases} == {1, 2, 4}
    for entry in cases:
        assert len(entry["errors"]) == entry["expected_steps"], entry
        assert max(entry["errors"]) < 1e-5, entry


def test_the_logged_loss_is_the_same_for_every_cut(results: Any) -> None:
    """9 rows in batches of 4 or of 2, on one rank or on two: nothing was learned in between."""
    means: dict[Any, list[float]] = {}
    for entries in results.values():
        for entry in (entry for entry in entries if "case" in entry):
            means.setdefault((entry["kind"], entry["case"][0]), []).append(entry["train_loss"])
    for values in means.values():
        assert len(values) >= 2
        assert max(values) - min(values) < 1e-5


def test_a_stock_trainer_scales_the_gradient_of_a_token_classifier(results: Any) -> None:
    """Its model does not forward ``num_items_in_batch``: times accumulation, times ranks."""
    for ranks, entries in results.items():
        scale = {entry["stock"]: entry["scale"] for entry in entries if "stock" in entry}
        assert scale[1] == pytest.approx(ranks, rel=0.02)
        assert scale[4] == pytest.approx(4 * ranks, rel=0.02)
