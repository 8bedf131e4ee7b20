"""The warm kernel: like any other, but forked from a process that has its imports behind it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from book_pages import BOOK

# The process that forks imports nothing here: that takes seconds and is not what is asked.
START = """
import sys
sys.path.insert(0, {tools!r})
import kernels
kernels.import_all = lambda: None
sys.exit(kernels.main([sys.executable, "-c", {client!r}]))
"""
CLIENT = """
import os, sys
from jupyter_client.manager import start_new_kernel

def ask(client, code):
    shown = []
    reply = client.execute_interactive(
        code, timeout=60, output_hook=lambda m: shown.append(m["content"].get("text", ""))
    )
    return reply["content"]["status"], "".join(shown).strip()

manager, client = start_new_kernel(kernel_name="warm", cwd={cwd!r})
"""


def run(tmp_path, body):
    """What a client of the kernel prints, the exit code, and what stands on standard error."""
    client = CLIENT.format(cwd=str(tmp_path)) + textwrap.dedent(body)
    start = START.format(tools=str(BOOK / "_tools"), client=client)
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout.split("\n")[:-1], done.returncode, done.stderr


def test_it_is_a_kernel_of_its_own(tmp_path):
    lines, code, error = run(
        tmp_path,
        """
        os.environ["ONE"] = "2"  # of the second kernel alone
        _, other = start_new_kernel(kernel_name="warm")
        print(ask(client, "import os, sys; x = 1; print(os.getcwd(), os.environ.get('ONE'))"))
        print(ask(other, "print('x' in globals(), os.environ['ONE'] if 'os' in globals() else 2)"))
        print(ask(client, "print(sys.argv[0], [p for p in sys.path if '_tools' in p])"))
        print(ask(client, "1 / 0")[0])
        sys.exit(3)
        """,
    )
    assert lines == [
        str(("ok", f"{tmp_path} None")),
        str(("ok", "False 2")),
        str(("ok", f"ipykernel_launcher [{str(BOOK / '_tools')!r}]")),  # START's own
        "error",
    ], error
    assert code == 3  # the command's


@pytest.mark.parametrize("end", ["manager.interrupt_kernel()", "manager.shutdown_kernel(now=True)"])
def test_it_is_interrupted_and_ended_like_any_other(tmp_path, end):
    lines, code, error = run(
        tmp_path,
        f"""
        import threading, time
        pid = int(ask(client, "import os, time; print(os.getpid())")[1])
        threading.Timer(0.5, lambda: {end}).start()
        if "interrupt" in {end!r}:
            print(ask(client, "time.sleep(60)")[0])
            manager.shutdown_kernel()
        for _ in range(100):
            if not os.path.exists(f"/proc/{{pid}}"):
                break
            time.sleep(0.1)
        print(pid)
        """,
    )
    *status, pid = lines
    assert status == (["error"] if "interrupt" in end else []), error
    assert not os.path.exists(f"/proc/{pid}")
    assert code == 0
