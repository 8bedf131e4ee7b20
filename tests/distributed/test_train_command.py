"""``torchrun -m companion train pairwise`` on two processes gives the model of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch
from safetensors.torch import load_file

from companion.cli.main import main

pytestmark = pytest.mark.distributed


def test_two_processes_and_one_give_the_same_model(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same pairs a step; 43 rows, so that the last step is uneven."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Ana has {i % 20} pens {'and' * (i // 20)}"}],
            "chosen": [{"role": "assistant", "content": f"the answer is {i % 20}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(43)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    weights, manifests = [], []
    for ranks in (1, 2):
        output = tmp_path / f"on{ranks}"
        arguments = [
            *("train", "pairwise", "--model_name_or_path", str(tiny_base)),
            *("--dataset_name", str(tmp_path / "pairs.jsonl")),
            *("--output_dir", str(output)),
            *("--per_device_train_batch_size", str(8 // ranks)),
            *("--optim", "sgd", "--learning_rate", "0.02", "--save_strategy", "no"),
            *("--eval_fraction", "0.3", "--disable_tqdm", "true"),
        ]
        if ranks == 1:
            assert main(arguments) == 0
            text = capsys.readouterr().out
        else:
            text = launch(["-m", "companion", *arguments], torchrun=True)
        assert text.count("saved in") == 1
        weights.append(load_file(output / "model.safetensors"))
        manifests.append(json.loads((output / "reward_manifest.json").read_text()))
    for name, value in weights[0].items():
        assert weights[1][name] == pytest.approx(value, abs=1e-5), name
    one, two = manifests
    assert two["training"]["world_size"] == 2
    assert two["training"]["train_pairs"] == one["training"]["train_pairs"]
    for name in ("n", "accuracy", "loss", "margin_mean"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-4)
    assert two["reference"]["mean"] == pytest.approx(one["reference"]["mean"], abs=1e-4)
