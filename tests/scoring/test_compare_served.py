"""``companion compare`` with a model on a server: the figures of the model here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from companion.cli.main import main
from companion.models import ReferenceStats, RewardManifest, load_base, save_reward_model
from companion.scoring import RewardScorer, add_golden_texts
from companion.tutor import TUTOR_BASE, make_rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two untrained models of the tutor base, with other heads."""
    made = []
    for seed in (1, 2):
        made.append(tmp_path_factory.mktemp(f"model{seed}"))
        base = load_base(TUTOR_BASE, head_seed=seed, head_std=0.3)
        reference = ReferenceStats.from_scores([-2.0, -0.5, 0.0, 0.3, 2.0], "five numbers")
        manifest = RewardManifest(temperature=1.0 + seed, reference=reference)
        save_reward_model(base, made[-1], manifest, describe=add_golden_texts)
    return made


def run(*argv: Any) -> int:
    return main(["compare", *map(str, argv)])


@pytest.mark.parametrize(("side", "protocol"), [("old", None), ("new", "companion")])
def test_a_side_on_a_server_has_the_figures_of_the_model_here(
    folders: list[Path],
    serve: Callable[[Any], Any],
    tmp_path: Path,
    side: str,
    protocol: str | None,
):
    old, new = folders
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_rows("pairs", 40, seed=4)))
    out = tmp_path / "figures.json"
    assert run(old, new, "--data", file, "--json", out, "--device", "cpu") == 0
    here = json.loads(out.read_text())
    service = serve(RewardScorer.from_pretrained(old if side == "old" else new, device="cpu"))
    more = ["--protocol", protocol] if protocol else []
    argv = (old, new, "--data", file, "--json", out, f"--{side}_url", service.url, *more)
    # --device is for the side that is loaded here
    assert run(*argv, "--device", "cpu") == 0
    assert service.bodies
    there = json.loads(out.read_text())
    for name in ("accuracy", "log_loss"):
        found, expected = (one["metrics"]["pairs"][name] for one in (there, here))
        assert found["difference"] == pytest.approx(expected["difference"], abs=1e-5)
    assert there["metrics"]["raw"]["old"] == pytest.approx(here["metrics"]["raw"]["old"], abs=1e-5)
    assert there["metrics"]["raw"]["new"] == pytest.approx(here["metrics"]["raw"]["new"], abs=1e-5)
    assert there["info"]["versions"][side] == (service.version if protocol else None)


def test_a_server_that_gives_z_is_found(
    folders: list[Path], serve: Callable[[Any], Any], tmp_path: Path, capsys: Any
):
    """What ``companion export`` is for would be z of z here: the golden texts say so."""
    old, new = folders
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_rows("pairs", 4, seed=4)))
    service = serve(RewardScorer.from_pretrained(new, device="cpu"))

    def as_z(answer: dict[str, Any]) -> dict[str, Any]:
        one = RewardManifest.load(new).reference
        assert one is not None
        for item in answer.get("data", ()):
            if "probs" in item:
                item["probs"] = [(value - one.mean) / one.std for value in item["probs"]]
        return answer

    service.change = as_z
    before = (new / "reward_manifest.json").read_bytes()
    argv = (old, new, "--data", file, "--new_url", service.url, "--write_reference")
    assert run(*argv) == 2
    assert "NEW is not as it was saved" in capsys.readouterr().err
    assert (new / "reward_manifest.json").read_bytes() == before
