"""Every strategy on one, two and three ranks gives the weights of one plain process.

That the step of one process has the gradient of the mean over its rows is seen in
``test_gradient.py``, against stock code in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import strategy_worker
import torch
from launching import launch

pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def plain() -> Any:
    return strategy_worker.train_all("plain")


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_weights_are_those_of_one_process(
    strategy: str, ranks: int, plain: Any, tmp_path: Path
) -> None:
    """All kinds × accumulation × uneven last batches; of the steps' rows some have no label."""
    output = tmp_path / "found.pt"
    words = [strategy_worker.__file__, strategy, str(output)]
    said = launch(words, forked=True, ranks=ranks)
    assert ("no GPU: " in said) == (strategy != "ddp")
    found, worst = torch.load(output), 0.0
    assert found.keys() == plain.keys()
    for name, cases in plain.items():
        for case, one in cases.items():
            ours = found[name][case]
            moved = (flat(one["weights"]) - flat(one["start"])).norm()
            gap = float((flat(ours["weights"]) - flat(one["weights"])).norm() / moved)
            assert moved > 0
            assert gap < 1e-5, (name, case, gap)
            worst = max(worst, gap)
            assert ours["losses"] == pytest.approx(one["losses"], rel=1e-5), (name, case)
            assert ours["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4), (name, case)
            torch.testing.assert_close(
                ours["predictions"], one["predictions"], atol=1e-4, rtol=0, equal_nan=True
            )
    print(f"{strategy} on {ranks}: the furthest of {4 * len(plain)} runs is {worst:.1e} away")
