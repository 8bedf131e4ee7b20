"""Start a program on several ranks of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from forking import Program, run_forked

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(arguments: list[str], **how: Any) -> str:
    """Run a program on two ranks; its output, and its failure as an assertion.

    How is what :func:`run_ranks` takes.
    """
    codes, said = run_ranks(arguments, **how)
    text = "\n".join(said)
    assert codes == [0] * len(codes), text[-9000:]
    return text


def run_ranks(
    arguments: list[str],
    *,
    torchrun: bool = False,
    accelerate: str | None = None,
    forked: bool = False,
    ranks: int = 2,
    nodes: int = 1,
    patience: float = 0.0,
    **environment: str,
) -> tuple[list[int | None], list[str]]:
    """Exit code and output of each rank, or of each launcher.

    ``torchrun`` says whether it starts them, on one node or as a launcher for each of several;
    ``accelerate`` gives the file with which ``accelerate launch`` does. Both import torch for
    themselves, which takes its time. ``forked`` spares the ranks their imports (see ``forking``);
    with ``accelerate`` they have the environment that it would have made of the file. When one
    fails the others are killed, after `patience` seconds.
    """
    command, path = [sys.executable], [str(ROOT), os.environ.get("PYTHONPATH")]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    started: list[dict[str, str]] = [{} for _ in range(nodes)]
    port = str(free_port())
    if torchrun:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks // nodes)]
        if nodes == 1:
            command += ["--master_port", port]
        else:
            command += ["--nnodes", str(nodes), "--rdzv_backend", "c10d", "--rdzv_id", port]
            command += ["--rdzv_endpoint", f"127.0.0.1:{port}"]
    elif accelerate is not None and not forked:
        command += ["-m", "accelerate.commands.launch", "--config_file", accelerate]
        command += ["--num_processes", str(ranks), "--main_process_port", port]
    else:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks)}
        started = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        if accelerate is not None:
            shared |= environment_of(accelerate, ranks)
    environments = [{**shared, **own, **environment} for own in started]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(place) for place in range(len(started))]
        if forked:
            programs = [
                Program(arguments, variables, str(file))
                for variables, file in zip(environments, said, strict=True)
            ]
            codes = run_forked(programs, seconds=540, patience=patience)
        else:
            codes = _run([*command, *arguments], environments, said, patience)
        return codes, [file.read_text(errors="replace") for file in said]


def environment_of(config_file: str, ranks: int) -> dict[str, str]:
    """What ``accelerate launch --config_file … --num_processes …`` tells its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", config_file, "--num_processes", str(ranks), "-m", "companion"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert not arguments.use_cpu, "it would start one process"
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        made = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        assert arguments.multi_gpu or arguments.use_fsdp
        made = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


def _run(
    command: list[str], environments: list[dict[str, str]], said: list[Path], patience: float
) -> list[int | None]:
    """Start the command once in each environment; the exit codes."""
    started = []
    for variables, file in zip(environments, said, strict=True):
        with file.open("w") as out:
            started.append(
                subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT)
            )
    try:
        end = time.monotonic() + 540
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):  # the other one may wait for it
                end, patience = min(end, time.monotonic() + patience), float("inf")
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
    return [process.wait() for process in started]
