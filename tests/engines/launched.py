"""Servers of the tests, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path


class Process:
    """A server in a process of its own, whose lines are kept."""

    def __init__(self, command: list[str], ready: str, **environment: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = self.wait_for(ready, 300)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def wait_for(self, words: str, seconds: float, times: int = 1) -> str:
        """The line that says so, once it was said so often."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = [line for line in self.lines if words in line]
            if len(found) >= times:
                return found[-1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        told = [line for line in self.lines if ".access: " not in line]
        raise AssertionError(f"nobody said {words!r}:\n" + "\n".join(told[-40:]))

    def workers(self) -> list[int]:
        """Its children."""
        pid = self.process.pid
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(word) for word in words]

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise
        self._reader.join(10)
        return self.process.returncode
