"""Start a program on two ranks of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forking import Program, run_forked

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    arguments: list[str], *, torchrun: bool = False, forked: bool = False, **environment: str
) -> str:
    """Run a program on two ranks; its output, and its failure as an assertion.

    ``torchrun`` says whether it starts them: it imports torch for itself, which takes its time.
    ``forked`` spares the ranks their imports (see ``forking``).
    """
    codes, said = run_ranks(arguments, torchrun=torchrun, forked=forked, **environment)
    text = "\n".join(said)
    assert codes == [0] * len(codes), text[-9000:]
    return text


def run_ranks(
    arguments: list[str],
    *,
    torchrun: bool = False,
    forked: bool = False,
    patience: float = 0.0,
    **environment: str,
) -> tuple[list[int | None], list[str]]:
    """Exit code and output of each rank, or of torchrun.

    When one fails the others are killed, after `patience` seconds.
    """
    command, path = [sys.executable], [str(ROOT), os.environ.get("PYTHONPATH")]
    shared = {**os.environ, "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    ranks: list[dict[str, str]] = [{}]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_port", str(free_port())]
    else:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        shared |= {"LOCAL_WORLD_SIZE": "2"}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    environments = [{**shared, **own, **environment} for own in ranks]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(len(ranks))]
        if forked:
            programs = [
                Program(arguments, variables, str(file))
                for variables, file in zip(environments, said, strict=True)
            ]
            codes = run_forked(programs, seconds=540, patience=patience)
        else:
            codes = _run([*command, *arguments], environments, said, patience)
        return codes, [file.read_text(errors="replace") for file in said]


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
