"""``companion`` in a rank of which the first is killed while it writes its second chunk of rows."""

from __future__ import annotations

import os
import signal
import sys

from companion.cli.main import main

CHUNKS = iter(range(10))
durable = os.fsync


def fsync(file: int) -> None:
    if os.environ["RANK"] == "0" and next(CHUNKS) == 1:
        os.truncate(file, os.fstat(file).st_size - 9)  # the end of a line was not written
        os.kill(os.getpid(), signal.SIGKILL)
    durable(file)


os.fsync = fsync
sys.exit(main(sys.argv[1:]))
