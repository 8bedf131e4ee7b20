"""Kernels that have their imports behind them: ``python kernels.py COMMAND …``.

A fresh kernel takes six seconds of torch, transformers, datasets and TRL, and each of the notebooks
takes them again. So this process imports them once, runs COMMAND (pytest with nbmake), and forks a
kernel whenever Jupyter starts the one named ``warm``, which Jupyter finds by ``JUPYTER_PATH``. No
notebook sees what another has done. What such a kernel lacks are imports from nothing; ``make
book`` starts ordinary ones.

The kernel's command is this file too: it hands its directory, environment and output to the process
that forks, passes signals on, and ends with the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAME = "warm"


class Kernel(Exception):
    """Unwinds the forked process: it is to be the kernel of this connection file."""


def import_all() -> None:
    """What the notebooks import; nothing that computes or starts a thread."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # read at import
    import datasets
    import ipykernel.kernelapp
    import matplotlib.pyplot
    import scipy.stats
    import torch
    import trl

    import companion

    for name in dir(companion):
        getattr(companion, name)
    trl.RewardTrainer, trl.GRPOTrainer  # noqa: B018 - imported when they are first asked for
    del datasets, ipykernel, matplotlib, scipy, torch


def serve(command: list[str]) -> int:
    """Run `command` and fork its kernels; its exit code."""
    folder = Path(tempfile.mkdtemp(prefix="kernels-"))
    address = str(folder / "socket")
    spec = folder / "kernels" / NAME / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "--at", address]
    said = {"argv": [*argv, "{connection_file}"], "display_name": NAME, "language": "python"}
    spec.write_text(json.dumps(said))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    process = subprocess.Popen(command, env={**os.environ, "JUPYTER_PATH": str(folder)})
    import_all()
    kernels: dict[socket.socket, int] = {}
    try:
        while process.poll() is None:
            for ready in select.select([listener, *kernels], [], [], 0.05)[0]:
                if ready is listener:
                    client, _ = listener.accept()
                    kernels[client] = fork(client, [listener, *kernels])
                else:  # who asked for the kernel is gone
                    os.kill(kernels[ready], signal.SIGKILL)
            for client, pid in list(kernels.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del kernels[client]
                    with client, contextlib.suppress(BrokenPipeError):
                        client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    except Kernel:
        raise
    except BaseException:
        process.kill()
        raise
    shutil.rmtree(folder)
    return process.returncode


def fork(client: socket.socket, others: list[socket.socket]) -> int:
    """The process of a kernel; in that process itself, `Kernel` is raised."""
    said, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not said.endswith(b"\n"):
        said += client.recv(1 << 20)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        client.sendall(f"{pid}\n".encode())
        return pid
    for one in (client, *others):
        one.close()
    asked: dict[str, Any] = json.loads(said)
    os.setsid()
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    raise Kernel(asked["file"])


def stand_in(address: str, file: str) -> int:
    """The process that Jupyter starts: ask for the kernel and end with it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        asked = {"file": file, "directory": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [b"{"], [0, 1, 2])
        server.sendall(json.dumps(asked)[1:].encode() + b"\n")
        answers = server.makefile("r")
        pid = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return int(answers.read() or 1)


def main(arguments: list[str]) -> int:
    """Run the command, or be the stand-in of a kernel, or in a forked process the kernel."""
    if arguments[0] == "--at":
        return stand_in(*arguments[1:])
    try:
        return serve(arguments)
    except Kernel as asked:
        from ipykernel.kernelapp import launch_new_instance

        sys.argv = ["ipykernel_launcher", "-f", str(asked)]
        launch_new_instance()
        return 0


if __name__ == "__main__":
    del sys.path[0]  # this folder is not on a kernel's path
    sys.exit(main(sys.argv[1:]))
