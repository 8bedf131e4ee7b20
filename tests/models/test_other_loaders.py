"""Saved models in other hands: sentence-transformers, and older and newer releases of transformers.

The environments of the latter are made by hand, and without them their tests are skipped:

    pip install --target build/transformers-5.9.0 "huggingface_hub<2"
    pip install --no-deps --target build/transformers-5.9.0 transformers==5.9.0 "tokenizers<0.23"
    pip install --no-deps --target build/transformers-5.24.0 transformers==5.24.0
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from companion import RewardScorer, load_base, load_reward_model, save_reward_model
from companion.models.readout import TokenReadout

BUILD = Path(__file__).parents[2] / "build"
IDENTITY = "torch.nn.modules.linear.Identity"


def test_a_saved_config_asks_for_the_logit(tiny_reward: Path) -> None:
    config = json.loads((tiny_reward / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["sentence_transformers"] == {"activation_fn": IDENTITY}


def test_cross_encoder_gives_the_score_and_not_its_sigmoid(tiny_reward: Path) -> None:
    module = pytest.importorskip("sentence_transformers")
    encoder = module.CrossEncoder(str(tiny_reward), device="cpu")
    assert isinstance(encoder.activation_fn, torch.nn.Identity)
    pair = ("Ana has 3 boxes", "the answer is 5")
    # (which text it makes of a pair is its own affair: it has roles that templates do not know)
    ids = encoder.preprocess([pair])["input_ids"].tolist()
    want = RewardScorer.from_pretrained(tiny_reward, device="cpu").score_encoded(ids)
    np.testing.assert_allclose(encoder.predict([pair]), want, atol=1e-5)


SCRIPT = """
import json, sys, torch, transformers
from transformers import AutoTokenizer
folder, name, ids, text = json.loads(sys.argv[1])
model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = [model(input_ids=torch.tensor([row])).logits[0].tolist() for row in ids]
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps([transformers.__version__, logits, tokenizer(text)["input_ids"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("release", ["5.9.0", "5.24.0"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("labels", [None, 1])
def test_other_releases_load_what_is_saved(
    release: str, kind: str, labels: int | None, tiny_bases: Callable[[str], Path], tmp_path: Path
) -> None:
    other = BUILD / f"transformers-{release}"
    if not other.is_dir():
        pytest.skip(f"no {other}: the top of this file says how it is made")
    base = load_base(tiny_bases(kind), labels=labels)
    if labels is not None:
        base.readout = TokenReadout("outcome", labels)
    save_reward_model(base, tmp_path)
    model = load_reward_model(tmp_path).model
    ids, text = [[1, 9, 10, 11, 2], [1, 12, 13]], "Ana has 3 boxes"
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([row])).logits[0] for row in ids]
    name = "AutoModelFor" + ("SequenceClassification" if labels is None else "TokenClassification")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([str(tmp_path), name, ids, text])],
        env={**os.environ, "PYTHONPATH": str(other)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, logits, tokens = json.loads(done.stdout.splitlines()[-1])
    assert version == release
    assert tokens == load_reward_model(tmp_path).tokenizer(text)["input_ids"]
    for own, found in zip(want, logits, strict=True):
        np.testing.assert_allclose(found, own.numpy(), atol=1e-5)
