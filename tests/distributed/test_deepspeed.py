"""DeepSpeed ZeRO-2 and ZeRO-3 on two CPU processes give the weights of one plain process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed_worker
import numpy as np
import pytest
import torch
from launching import launch

WORKER = deepspeed_worker.__file__
CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,  # the first run compiles an operator
    pytest.mark.distributed,
]


KINDS = ("pairwise, margins", "kwise, Plackett–Luce", "outcome, token", "process, three classes")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = {}
    for kind in KINDS:
        output = tmp_path_factory.mktemp("plain") / "weights.pt"
        deepspeed_worker.main(0, str(output), kind)
        found[kind] = torch.load(output)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_weights_of_one_process(
    stage: int, kind: str, plain: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """9 rows on 2 ranks, accumulation 2: the last step holds one row on one of the ranks.

    Of the steps' rows some have no label at all.
    """
    output, whole = tmp_path / "weights.pt", plain[kind]
    launch([WORKER, str(stage), str(output), kind], **CPU)
    sharded = torch.load(output)
    moved, gap = 0.0, 0.0
    for name, value in whole["weights"].items():
        moved += float((value - whole["start"][name]).square().sum())
        gap += float((value - sharded["weights"][name]).square().sum())
    assert moved > 0
    assert gap**0.5 < 1e-5 * moved**0.5
    ours, theirs = json.loads(whole["figures"]), json.loads(sharded["figures"])
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert theirs["eval"]["eval_loss"] == pytest.approx(ours["eval"]["eval_loss"], rel=1e-4)
    assert len(theirs["predictions"]) == 5
    if kind.startswith("pairwise"):
        assert theirs["eval"]["eval_num_pairs"] == 5
    np.testing.assert_allclose(
        np.array(theirs["predictions"], dtype=float),
        np.array(ours["predictions"], dtype=float),
        atol=1e-4,  # NaN stands in the same places
    )


def test_a_whole_run_under_zero_3_saves_a_plain_checkpoint(tmp_path: Path) -> None:
    """The shards are gathered, the manifest is written, and the model loads without DeepSpeed."""
    from companion import load_reward_model

    output = tmp_path / "model"
    launch([WORKER, "run", str(output)], **CPU)
    loaded = load_reward_model(output)
    manifest = loaded.manifest
    assert manifest is not None
    assert manifest.metrics["n"] == manifest.data["held_out"]["test"]
    pair = json.loads((tmp_path / "model.scores.json").read_text())
    encoded = loaded.formatter.encode_pair(pair["row"])
    assert encoded is not None
    with torch.no_grad():
        scores = [
            float(loaded.model(input_ids=torch.tensor([side.input_ids])).logits) for side in encoded
        ]
    assert scores == pytest.approx(pair["scores"], abs=1e-4)
