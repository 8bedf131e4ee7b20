"""The listening socket outlives the process that serves: a restart refuses no connection.

A parent holds the socket and starts a worker on it. While one worker leaves and the next loads its
model, connections wait in the kernel's queue. On SIGHUP the next is ready before the old one goes.
(On SIGTERM uvicorn closes the connections that it has accepted and not yet read: Kludex/uvicorn
#2757.) Chapter 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from companion.errors import DataError, ServiceError

logger = logging.getLogger(__name__)

#: connections that wait in the kernel for the server to take them: a whole step of an RL job
BACKLOG: Final = 4096
#: seconds that a connection which was accepted may take to send its request, while draining
GRACE: Final = 3.0
#: where a worker says that it is ready: the number of an open pipe
READY: Final = "COMPANION_READY_FD"
#: a worker that dies so often, each time before it was ready or within a minute, is given up
_DEATHS: Final = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises
    ------
    DataError
        If the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with its protocol, without which asyncio leaves Nagle's algorithm on: 40 ms for each answer
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise DataError(
            f"cannot listen on {host}:{port}: {error}", "choose another --port, or --host"
        ) from error
    sock.listen(BACKLOG)
    with contextlib.suppress(OSError, ValueError):
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
        if most < BACKLOG:
            logger.warning(
                f"the kernel lets only {most} of {BACKLOG} connections wait (net.core.somaxconn)"
            )
    return sock


def address_of(sock: socket.socket) -> str:
    """``http://host:port``."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server, which drains what it has accepted before it ends."""

    def __init__(self, app: FastAPI, said: Any = None, grace: float = GRACE) -> None:
        self.app = app
        self.said = said
        self.grace = grace
        super().__init__(
            uvicorn.Config(
                app,
                backlog=BACKLOG,
                access_log=False,
                log_config=None,
                timeout_keep_alive=30,
                server_header=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; says when it is done."""
        await super().startup(sockets)
        if self.said is not None and not self.should_exit:
            self.said()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, read what was accepted, then as uvicorn's."""
        self.app.state.draining = True  # each answer from now on ends its connection
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        end = time.monotonic() + self.grace
        while time.monotonic() < end and any(map(_idle, self.server_state.connections)):
            await asyncio.sleep(0.02)
        await super().shutdown()


def _idle(connection: Any) -> bool:
    """Whether a connection has no request in work: one may be on its way."""
    cycle = getattr(connection, "cycle", None)
    return cycle is None or bool(cycle.response_complete)


def serve(app: FastAPI, sock: socket.socket, said: Any = None) -> None:
    """Serve until SIGTERM or SIGINT; returns when all requests have their answers.

    Parameters
    ----------
    app : FastAPI
    sock : socket.socket
        Listens already.
    said : callable, optional
        Called when requests are served.
    """
    with contextlib.suppress(ValueError, OSError):  # a step of an RL job opens thousands at once
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = Server(app, said)
    with contextlib.suppress(KeyboardInterrupt):
        server.run([sock])


def tell_ready() -> None:
    """In a worker: say to the parent that requests are served."""
    number = os.environ.pop(READY, None)
    if number is not None:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        with contextlib.suppress(OSError):
            os.write(int(number), b"ready")
            os.close(int(number))


def _end_with(parent: int) -> None:
    """Drain and end when the parent is gone: a worker that is left over would hold the port."""
    while os.getppid() == parent:
        time.sleep(1.0)
    logger.warning("the parent is gone: draining")
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------- the parent


class Worker:
    """A process that serves on the parent's socket."""

    def __init__(self, command: Sequence[str], sock: socket.socket) -> None:
        self._read, write = os.pipe()
        self.began = time.monotonic()
        self.ready = False
        self.process = subprocess.Popen(
            [*command, "--fd", str(sock.fileno())],
            pass_fds=[sock.fileno(), write],
            env={**os.environ, READY: str(write)},
        )
        os.close(write)

    def look(self, timeout: float) -> bool:
        """Whether it has said that it is ready, within so many seconds; False also if it died."""
        if not self.ready and select.select([self._read], [], [], timeout)[0]:
            self.ready = bool(os.read(self._read, 16))
        return self.ready

    def end(self) -> None:
        """Ask it to drain and go."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()

    def close(self) -> None:
        """Forget the pipe of a process that is gone."""
        os.close(self._read)


def keep_serving(command: Sequence[str], sock: socket.socket) -> int:
    """Keep a worker serving on a socket until SIGTERM or SIGINT.

    SIGHUP starts another, and ends the old one when that is ready. One that dies is replaced.

    Parameters
    ----------
    command : sequence of str
        Starts a worker; ``--fd N`` is added.
    sock : socket.socket
        Listens already.

    Returns
    -------
    int
        The exit code: 0 after a signal, else that of a worker that could not be started.
    """
    wanted: set[int] = set()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)

    def note(number: int, _: Any) -> None:
        wanted.add(number)
        with contextlib.suppress(OSError):
            os.write(wake_write, b".")

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    }
    worker = Worker(command, sock)
    coming: Worker | None = None
    leaving: list[Worker] = []
    deaths = 0
    try:
        while True:
            select.select([wake_read], [], [], 0.05 if coming or not worker.ready else 1.0)
            if select.select([wake_read], [], [], 0)[0]:
                os.read(wake_read, 4096)
            for old in [old for old in leaving if old.process.poll() is not None]:
                leaving.remove(old)
                old.close()
            if wanted & {signal.SIGTERM, signal.SIGINT}:
                going = [worker, *leaving, *([coming] if coming else [])]
                for each in going:
                    each.end()
                for each in going:
                    each.process.wait()
                return 0
            worker.look(0)
            if worker.process.poll() is not None and coming is None:
                code = worker.process.returncode
                quick = not worker.ready or time.monotonic() - worker.began < 60
                told = code in (0, -signal.SIGTERM)  # (uvicorn raises it again when it has drained)
                deaths = deaths + 1 if quick and not told else 0
                if code == 2 or deaths >= _DEATHS:
                    logger.error(f"the worker ended with {code}: not started again")
                    return code or 1
                logger.warning(f"the worker ended with {code}: starting another")
                worker.close()
                if deaths:
                    time.sleep(min(2.0**deaths / 4, 8.0))
                worker = Worker(command, sock)
            if signal.SIGHUP in wanted and coming is None:
                wanted.discard(signal.SIGHUP)
                logger.info("SIGHUP: starting another worker")
                coming = Worker(command, sock)
            if coming is not None and coming.look(0):
                leaving.append(worker)
                worker.end()
                worker, coming = coming, None
            elif coming is not None and coming.process.poll() is not None:
                logger.error(
                    f"the new worker ended with {coming.process.returncode}; the old one goes on"
                )
                coming.close()
                coming = None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake_read)
        os.close(wake_write)


# ---------------------------------------------------------------------- in this process


@contextlib.contextmanager
def in_thread(app: FastAPI, host: str, port: int) -> Iterator[str]:
    """Serve from a thread of this process; gives the URL. For notebooks and tests."""
    sock = listen(host, port)
    url = address_of(sock)
    ready = threading.Event()
    # a client of this process has sent what it wanted to, and may keep its connection for ever
    server = Server(app, ready.set, grace=0.1)
    thread = threading.Thread(target=server.run, args=([sock],), name="serving", daemon=True)
    thread.start()
    try:
        while not ready.wait(0.05):
            if not thread.is_alive():
                raise ServiceError(f"{url}: the server did not start", "see the log")
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def command_again(argv: Sequence[str]) -> list[str]:
    """The command line of this command, for a worker."""
    return [sys.executable, "-m", "companion", "serve", *argv]
