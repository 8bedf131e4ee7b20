"""``recipes/slurm/train.sbatch``, with stand-ins for SLURM's commands on the path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from companion.cli.main import main
from companion.tutor import make_rows

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"

#: one node after the other gets the command; a signal is passed on, as by SLURM's own
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 64
shift
for ((node = 0; node < SLURM_NNODES; node++)); do "$@" & all+=($!); done
trap 'kill -TERM "${all[@]}"' TERM
code=0
for one in "${all[@]}"; do
    wait "$one" || code=$?
    while kill -0 "$one" 2>/dev/null; do wait "$one" || code=$?; done
done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
show) printf '127.0.0.1\\nelsewhere\\n' ;;
requeue) echo "$2" >>"$HERE/requeued" ;;
esac
"""
#: in place of a training: what it was asked, and then it ends as it is told
TORCHRUN = """#!/bin/bash
echo "$@" >>"$HERE/asked"
[[ -n $LASTS ]] || exit "$ENDS"
trap 'exit 1' TERM
sleep 60 & wait $!
"""
REAL = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'


class Slurm:
    """A job: the script, its environment, and what it did."""

    def __init__(self, folder: Path, torchrun: str, **variables: str) -> None:
        self.folder = folder
        programs = {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun}
        for name, text in {**programs, "activate": ""}.items():
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            **os.environ,
            **{"VENV": str(folder), "HERE": str(folder), "GPUS_PER_NODE": "1"},
            **{"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"},
            **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ENDS": "0", "LASTS": ""},
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            **variables,
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=(self.folder / "log").open("a"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def wait_until(true: Any, job: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert job.poll() is None, "it ended before"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("config", "variables", "expected"),
    [
        ("pairwise/qwen3-0.6b-ultrafeedback.yaml", {}, ""),
        (
            "pairwise/qwen3-8b-zero3-ultrafeedback.yaml",
            {},
            " --deepspeed recipes/deepspeed/zero3.json",
        ),
        (
            "process/tutor.yaml",
            {"STRATEGY": "fsdp2"},
            " --fsdp --fsdp_config recipes/fsdp/fsdp2.json",
        ),
        ("grpo/tutor.yaml", {"STRATEGY": "zero2"}, " --deepspeed recipes/deepspeed/zero2.json"),
    ],
)
def test_each_kind_is_started_on_each_node(
    config: str, variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    slurm = Slurm(tmp_path, TORCHRUN, **variables)
    assert slurm.start(f"recipes/{config}", "--max_steps", "3").wait(60) == 0, slurm.read("log")
    asked = slurm.read("asked")
    assert len(asked) == 2
    assert set(asked) == {
        "--nnodes 2 --nproc_per_node 1 --rdzv_id 123456 --rdzv_backend c10d "
        f"--rdzv_endpoint 127.0.0.1:23456 -m companion train {config.split('/')[0]} "
        f"--config recipes/{config}{expected} --resume_from_checkpoint auto --max_steps 3"
    }
    for word in expected.split():
        assert word.startswith("--") or (ROOT / word).is_file()
    assert not slurm.read("requeued")


@pytest.mark.parametrize(("restarts", "queued"), [("0", ["123456"]), ("20", [])])
def test_the_end_of_the_time_queues_it_again(
    restarts: str, queued: list[str], tmp_path: Path
) -> None:
    slurm = Slurm(tmp_path, TORCHRUN, LASTS="yes", SLURM_RESTART_COUNT=restarts)
    job = slurm.start("recipes/pairwise/tutor.yaml")
    wait_until(lambda: len(slurm.read("asked")) == 2, job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 1  # as torchrun ends
    assert slurm.read("requeued") == queued


def test_a_fault_does_not_queue_it_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, TORCHRUN, ENDS="2")
    assert slurm.start("recipes/pairwise/tutor.yaml").wait(60) == 2
    assert not slurm.read("requeued")


def test_what_slurm_is_asked_for() -> None:
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line[:7] == "#SBATCH"]
    assert {"--signal=B:TERM@660", "--open-mode=append", "--requeue"} <= set(asked)
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in SCRIPT.read_text()  # within the 660


@pytest.mark.slow
def test_a_run_on_two_nodes_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """Two launchers; SIGTERM to the script; the second start gives the weights of one process."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, make_rows("pairs", 200, 1))))

    def arguments(ranks: int, output: str) -> list[str]:
        return [
            *("--dataset_name", str(tmp_path / "pairs.jsonl")),
            *("--output_dir", str(tmp_path / output), "--num_train_epochs", "6"),
            *("--per_device_train_batch_size", str(8 // ranks), "--eval_strategy", "no"),
            *("--save_strategy", "steps", "--save_steps", "500", "--dataset_num_proc", "1"),
        ]

    config = "recipes/pairwise/tutor.yaml"
    whole = ["train", "pairwise", "--config", str(ROOT / config), *arguments(1, "one")]
    assert main([*whole, "--disable_tqdm", "true"]) == 0
    slurm = Slurm(tmp_path, REAL)
    job = slurm.start(config, *arguments(2, "two"), "--logging_steps", "1")
    log = tmp_path / "log"
    wait_until(lambda: "loss=" in log.read_text(errors="replace"), job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(240) != 0
    assert slurm.read("requeued") == ["123456"], log.read_text(errors="replace")[-4000:]
    saved = [path.name for path in (tmp_path / "two").glob("checkpoint-*")]
    assert len(saved) == 1
    assert saved != ["checkpoint-120"]  # it was not at its end
    slurm.environment["SLURM_RESTART_COUNT"] = "1"
    assert slurm.start(config, *arguments(2, "two"), "--logging_steps", "1").wait(400) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
