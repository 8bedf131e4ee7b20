"""What another engine is told so that it speaks in z: the same z as the manifest's."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from companion.cli.main import main
from companion.errors import DataError, ModelError
from companion.models import (
    ReferenceStats,
    RewardManifest,
    TokenReadout,
    export_for_engine,
    load_base,
    save_reward_model,
)
from companion.scoring import RewardScorer, add_golden_texts

ROWS = [
    {"prompt": "hello Ana", "completion": "hello Ben"},
    {"prompt": "how many boxes", "completion": "3 boxes and 4 pens"},
    {"prompt": "is it so", "completion": "no"},
]


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a reference and a limit of length, in a folder with a space."""
    folder = tmp_path_factory.mktemp("export") / "my model"
    base = load_base(tiny_base, max_length=96)
    torch.nn.init.normal_(base.model.score.weight)
    scores = np.random.default_rng(0).normal(1.3, 0.7, 200)
    manifest = RewardManifest(reference=ReferenceStats.from_scores(scores, "200 draws"))
    save_reward_model(base, folder, manifest, describe=add_golden_texts)
    return folder


def run(*argv: Any) -> int:
    return main(["export", *map(str, argv)])


def test_vllm_s_words_give_the_manifest_s_z(saved: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--model", saved, "--engine", "vllm", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    words = found["command"]
    assert words[:5] == ["vllm", "serve", str(saved), "--runner", "pooling"]
    assert words[words.index("--max-model-len") + 1] == "96"
    assert words[words.index("--dtype") + 1] == "float32"
    config = json.loads(words[words.index("--pooler-config") + 1])
    assert config == found["settings"]
    assert set(config) == {"logit_mean", "logit_sigma"}
    scores = RewardScorer.from_pretrained(saved).score(ROWS)
    by_hand = (scores.raw - config["logit_mean"]) / config["logit_sigma"]
    np.testing.assert_allclose(by_hand, scores.z, atol=1e-12)
    assert run("--model", saved, "--engine", "vllm") == 0
    said = capsys.readouterr()
    assert shlex.split(said.out.splitlines()[-1]) == words  # as a shell would read the line
    assert "200 draws" in said.err


def test_openrlhf_s_reward_model_gives_the_manifest_s_z(saved: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    output = tmp_path / "config.json"
    assert run("--model", saved, "--engine", "openrlhf", "--output", output) == 0
    before = json.loads((saved / "config.json").read_text())
    after = json.loads(output.read_text())
    assert {k: v for k, v in after.items() if k not in ("mean", "std")} == before
    shutil.copy(output, copy / "config.json")
    config = AutoConfig.from_pretrained(copy)
    assert hasattr(config, "mean")  # OpenRLHF's own test
    model = AutoModelForSequenceClassification.from_pretrained(copy)
    scorer = RewardScorer.from_pretrained(saved)
    for text, z in zip(scorer.prepare(ROWS).texts, scorer.score(ROWS).z, strict=True):
        with torch.no_grad():
            reward = model(torch.tensor([text.input_ids])).logits[0, 0].item()
        assert (reward - config.mean) / config.std == pytest.approx(z, abs=1e-4)
    # and the companion reads the copy as before
    np.testing.assert_array_equal(
        RewardScorer.from_pretrained(copy).score(ROWS).raw, scorer.score(ROWS).raw
    )


def test_the_model_s_own_file_is_not_written_over(saved: Path, tmp_path: Path):
    before = (saved / "config.json").read_bytes()
    link = tmp_path / "link.json"
    link.symlink_to(saved / "config.json")
    for output in (saved / "config.json", saved / "reward_manifest.json", link):
        with pytest.raises(DataError, match="model's own"):
            export_for_engine(saved, "openrlhf").check_target(output)
    assert run("--model", saved, "--engine", "openrlhf", "--output", saved / "config.json") == 2
    assert (saved / "config.json").read_bytes() == before


def test_what_has_no_z_is_refused(saved: Path, tiny_base: Path, tmp_path: Path):
    manifest = RewardManifest.load(saved)
    for name, reference, words in (
        ("none", None, "no reference set"),
        ("flat", ReferenceStats.from_scores([2.0, 2.0, 2.0], "the same"), "divide by zero"),
    ):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        manifest.reference = reference
        manifest.save(folder)
        for engine in ("vllm", "openrlhf"):
            with pytest.raises(ModelError, match=words) as caught:
                export_for_engine(folder, engine)
            assert caught.value.cure
    outcome = RewardManifest(readout=TokenReadout("outcome", 1).to_dict())
    save_reward_model(load_base(tiny_base, labels=1), tmp_path / "outcome", outcome)
    with pytest.raises(ModelError, match="kind outcome"):
        export_for_engine(tmp_path / "outcome", "vllm")
    with pytest.raises(ModelError, match="reward_manifest"):
        export_for_engine(tiny_base, "vllm")
    with pytest.raises(DataError, match="sglang"):
        export_for_engine(saved, "sglang")  # type: ignore[arg-type]
    assert run("--model", tmp_path / "none", "--engine", "vllm") == 2
