"""A saved reward model in a real vLLM: its scores are the offline ones, through the gateway too."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from launched import Process
from safetensors.torch import load_file, save_file

from companion import RemoteScorer, RewardScorer
from companion.audit import audit
from companion.cli.main import main
from companion.tutor import make_rows

pytestmark = [pytest.mark.engines, pytest.mark.serving]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
ROWS = 300


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start_vllm(python: Path, model: Path, *flags: str) -> Process:
    """vLLM with the model, as its users start it; ``.url`` is set."""
    port = free_port()
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--runner", "pooling", "--dtype", "float32", "--max-model-len", "512"),
        *("--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *flags),
    ]
    process = Process(command, "Application startup complete", **ENVIRONMENT)
    process.url = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    return process


@pytest.fixture(scope="module")
def offline(reward_model: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(reward_model, device="cpu")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Completions of the tutor's, a quarter of them cut off."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "terminated": i % 4 > 0}
        for i, row in enumerate(make_rows("pairs", ROWS, seed=31))
    ]


@pytest.fixture(scope="module")
def vllm(vllm_python: Path, reward_model: Path) -> Iterator[Any]:
    process = start_vllm(vllm_python, reward_model)
    yield process
    process.stop()


def apart(found: Any, wanted: Any) -> float:
    """The largest difference."""
    return float(np.max(np.abs(np.asarray(found) - np.asarray(wanted))))


def test_offline_is_vllm_is_the_gateway_in_front_of_it(
    vllm: Any,
    serve: Callable[..., Any],
    offline: RewardScorer,
    reward_model: Path,
    rows: list[dict[str, Any]],
) -> None:
    want = offline.score(rows)
    assert np.ptp(want.raw) > 0.5
    direct = RemoteScorer.from_pretrained(vllm.url, reward_model, protocol="classify")
    there = direct.score(rows)
    gateway = serve("--engine", "vllm", "--engine_url", vllm.url)
    through = RemoteScorer.from_pretrained(gateway.url, reward_model, protocol="companion")
    behind = through.score(rows)
    far = {"vllm": apart(there.raw, want.raw), "gateway": apart(behind.raw, want.raw)}
    print(f"{ROWS} texts, largest difference to the offline scores: {far}")
    assert max(far.values()) < 1e-5
    np.testing.assert_array_equal(behind.n_tokens, want.n_tokens)
    assert apart(behind.z, want.z) < 1e-5
    assert apart(behind.percentile, want.percentile) < 1e-2
    # its other routes are there too, and speak raw scores
    text = [list(offline.formatter.encode_row(row).input_ids) for row in rows[:8]]
    answer = requests.post(f"{gateway.url}/classify", json={"input": text}, timeout=60).json()
    assert apart([item["probs"][0] for item in answer["data"]], want.raw[:8]) < 1e-5


def test_a_gateway_refuses_an_engine_that_runs_another_model(
    vllm: Any, serve: Callable[..., Any], reward_model: Path, tmp_path: Path
) -> None:
    """A folder whose golden texts have other scores than the engine gives them."""
    other = shutil.copytree(reward_model, tmp_path / "other")
    file = other / "reward_manifest.json"
    manifest = json.loads(file.read_text())
    golden = manifest["golden_texts"]
    golden["values"] = [value + 0.01 for value in golden["values"]]
    file.write_text(json.dumps(manifest))
    with pytest.raises(AssertionError, match=r"moved by 0\.01"):
        serve("--model", other, "--engine", "vllm", "--engine_url", vllm.url)


def test_with_the_exported_pooler_config_vllm_itself_answers_z(
    vllm_python: Path,
    offline: RewardScorer,
    reward_model: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "pooler.json"
    words = ["--model", str(reward_model), "--engine", "vllm", "--output", str(file)]
    assert main(["export", *words]) == 0
    exported = json.loads(file.read_text())
    process = start_vllm(vllm_python, reward_model, "--pooler-config", json.dumps(exported))
    try:
        want = offline.score(rows)
        ids = [list(offline.formatter.encode_row(row).input_ids) for row in rows]
        body = {"input": ids, "add_special_tokens": False}
        answer = requests.post(f"{process.url}/classify", json=body, timeout=300)  # type: ignore[attr-defined]
        assert answer.status_code == 200, answer.text
        found = [item["probs"][0] for item in answer.json()["data"]]
        print(f"{exported}: largest difference to the manifest's z: {apart(found, want.z):.1e}")
        assert apart(found, want.z) < 1e-5
        assert apart(found, want.raw) > 0.1
    finally:
        process.stop()


def test_the_audit_of_a_real_vllm(
    vllm: Any, vllm_python: Path, reward_model: Path, tmp_path: Path
) -> None:
    """Sound is called sound; another template, another head and the default sigmoid are named."""
    report = audit(vllm.url, model=reward_model)
    print(report.table())
    assert report.protocol == "vllm"
    assert report.sound
    for name in ("golden-texts-moved", "template-mismatch", "batch-changes-score", "errors-hidden"):
        assert report[name].verdict == "sound", report[name].outcome.seen
    sick = shutil.copytree(reward_model, tmp_path / "sick")
    config = json.loads((sick / "config.json").read_text())
    del config["problem_type"], config["sentence_transformers"]  # each asks for no activation
    (sick / "config.json").write_text(json.dumps(config))
    template = (sick / "chat_template.jinja").read_text()
    (sick / "chat_template.jinja").write_text("Answer well. " + template)
    weights = load_file(sick / "model.safetensors")
    weights["score.weight"] *= 1.5
    save_file(weights, sick / "model.safetensors", metadata={"format": "pt"})
    process = start_vllm(vllm_python, sick)
    try:
        told = audit(process.url, model=reward_model)  # type: ignore[attr-defined]
    finally:
        process.stop()
    print(told.table())
    assert set(told.faults) == {"golden-texts-moved", "template-mismatch"}
    assert {"activation-by-default", "fields-ignored"} <= {
        result.check.name for result in told.results if result.verdict == "hazard"
    }
