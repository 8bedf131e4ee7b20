"""Two processes go on from the newest checkpoint that is whole, of all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import launch
from safetensors.torch import load_file

from companion.training.checkpoints import RUN_FILE, newest_whole

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes_resume(tmp_path: Path, tiny_base: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Ana has {i % 20} pens {'and' * (i // 20)}"}],
            "chosen": [{"role": "assistant", "content": f"the answer is {i % 20}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(43)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "model"
    arguments = [
        *("-m", "companion", "train", "pairwise", "--model_name_or_path", str(tiny_base)),
        *("--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(output)),
        *("--per_device_train_batch_size", "4", "--learning_rate", "0.003"),
        *("--save_steps", "2", "--save_strategy", "steps", "--save_total_limit", "3"),
        *("--eval_fraction", "0.3", "--disable_tqdm", "true", "--dataset_num_proc", "1"),
    ]
    launch(arguments)
    weights = load_file(output / "model.safetensors")
    whole = json.loads((output / "reward_manifest.json").read_text())
    assert (output / "checkpoint-4" / "rng_state_1.pth").exists()
    assert newest_whole(output) == output / "checkpoint-4"
    files = json.loads((output / "checkpoint-4" / RUN_FILE).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(files)

    (output / "checkpoint-4" / "rng_state_1.pth").unlink()
    (output / "model.safetensors").unlink()
    said = launch([*arguments, "--resume_from_checkpoint", "last"])
    assert said.count("rng_state_1.pth is missing") == 1
    again = load_file(output / "model.safetensors")
    assert max(float((again[name] - weights[name]).abs().max()) for name in weights) == 0.0
    resumed = json.loads((output / "reward_manifest.json").read_text())
    for name in ("train_pairs", "train_loss"):
        assert resumed["training"][name] == pytest.approx(whole["training"][name], rel=1e-6)

    shutil.rmtree(output / "checkpoint-4")
    with pytest.raises(AssertionError, match=r"of another run \(.*seed: 42 -> 1\)"):
        launch([*arguments, "--resume_from_checkpoint", "last", "--seed", "1"])
