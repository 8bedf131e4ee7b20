"""FSDP shards the layers; packed batches and the pruned last layer do not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

pytestmark = pytest.mark.distributed


def test_packed_scores_and_gradients_of_a_sharded_model(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    launch([str(Path(__file__).with_name("fsdp_worker.py")), str(output)], forked=True)
    plain, checkpointed = json.loads(output.read_text(encoding="utf-8"))
    for found in (plain, checkpointed):
        assert found["sharded"] == "DTensor"
        assert found["gradients"] > 40
        assert found["score"] < 1e-5
        assert found["gradient"] < 1e-5
