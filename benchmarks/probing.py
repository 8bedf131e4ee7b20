"""The session around the parts of :mod:`benchmarks.probe`: time, files, failures, the summary."""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import machine, versions

ROOT = Path(__file__).parents[1]
#: The GPUs that were visible at first. The probe sees one of them: several would make one process
#: of a training data-parallel.
ALL_GPUS = "PROBE_ALL_GPUS"
Found = dict[str, Any]
Piece = Callable[[], Found]


@dataclass
class Probe:
    """The session: where it runs, how large, where it writes, and how long it may go on."""

    device: torch.device
    quick: bool = False
    folder: Path = Path()
    work: Path = Path()
    end: float = float("inf")
    deadline: float = float("inf")
    #: the pieces of the part that runs, as they come
    found: dict[str, Found] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        """Whether it is the real thing."""
        return self.device.type == "cuda"

    @property
    def shape(self) -> str:
        """Of :data:`benchmarks.shapes.SHAPES`."""
        return "0.6b" if self.gpu else "tiny"

    @property
    def half(self) -> torch.dtype:
        """The half precision of the device."""
        if self.gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return torch.bfloat16

    def size(self, gpu: int, cpu: int) -> int:
        """A size for the device that matters, and one for the CPU."""
        return gpu if self.gpu else cpu

    def free_bytes(self) -> int | None:
        """Of the GPU's memory."""
        return torch.cuda.mem_get_info(self.device)[0] if self.gpu else None


#: name -> share of the time, and the part, which yields names and pieces. What a piece returns goes
#: into the JSON; ``ok`` False is a failure, ``skipped`` a reason, ``line`` is printed.
PARTS: dict[str, tuple[float, Callable[[Probe], Iterator[tuple[str, Piece]]]]] = {}


def part(share: float) -> Callable[[Any], Any]:
    """Register a part by its name."""

    def keep(function: Any) -> Any:
        PARTS[function.__name__] = share, function
        return function

    return keep


def process(here: Probe, *arguments: str, every_gpu: bool = False) -> Found:
    """A program of Python, with what is left of the part's time; it and its children end then."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if not here.gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    elif every_gpu:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        if os.environ.get(ALL_GPUS):
            environment["CUDA_VISIBLE_DEVICES"] = os.environ[ALL_GPUS]
    limit = max(1.0, here.deadline - time.monotonic())
    started = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = started.communicate(timeout=limit)
        ended: Found = {"code": started.returncode, "ok": started.returncode == 0}
    except subprocess.TimeoutExpired:
        ended = {"code": None, "ok": False, "error": f"cut after {limit:.0f} s"}
        os.killpg(started.pid, signal.SIGTERM)  # torchrun hands it on to its ranks
        try:
            output, _ = started.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            output, _ = started.communicate()
    if len(output) > 9000:
        output = f"{output[:3000]}\n…\n{output[-6000:]}"
    return {**ended, "command": " ".join(arguments), "output": output}


def _said(*command: str) -> str | None:
    """The first line of what a command says; None where it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0]


@functools.cache
def header(device: torch.device, quick: bool) -> Found:
    """What every JSON begins with; the kind of device in front, so that nobody mistakes it."""
    found, gpu = machine(), device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else found["cpu"]
    return {
        "hardware": f"{device.type.upper()}: {name}",
        "device": device.type,
        "quick": quick,
        "commit": _said("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "versions": versions(),
        "machine": {
            **found,
            "gpu": name if gpu else None,
            "capability": torch.cuda.get_device_capability(device) if gpu else None,
            "cuda": torch.version.cuda if gpu else None,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            if gpu
            else None,
        },
    }


def alive(here: Probe) -> bool:
    """Whether the device still answers: after some errors CUDA never does in this process."""
    try:
        return torch.ones(1, device=here.device).item() == 1
    except RuntimeError:
        return False


def run_part(name: str, here: Probe) -> bool:
    """All pieces of a part, each written as it ends; False if the device is lost."""
    gc.collect()
    gc.freeze()  # what is imported stays: a collection need not walk it
    torch.set_float32_matmul_precision("highest")  # whatever a part before has set
    here.found = {}
    record: Found = {"part": name, **header(here.device, here.quick), "pieces": here.found}
    record["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    target = here.folder / f"{list(PARTS).index(name) + 1:02}_{name}.json"
    begin, used = time.monotonic(), sum(os.times()[:4])
    print(f"\n{name}, on {record['hardware']}", flush=True)

    def write() -> None:
        failed = [piece for piece, found in here.found.items() if found.get("ok") is False]
        skipped = [f"{p}: {x['skipped']}" for p, x in here.found.items() if "skipped" in x]
        record["result"] = f"failed: {'; '.join(failed)}" if failed else "ok"
        if skipped:
            record["result"] += f" (skipped: {'; '.join(skipped)})"
        if not here.found:
            record["result"] = "skipped: no time"
        record["seconds"] = round(time.monotonic() - begin, 1)
        record["cpu_seconds"] = round(sum(os.times()[:4]) - used, 1)
        text = json.dumps(record, indent=1, default=str).replace(str(ROOT), ".")
        target.write_text(text + "\n", encoding="utf-8")

    def attempt(piece: str, run: Piece) -> None:
        at = time.monotonic()
        try:
            found = run()
        except (Exception, SystemExit) as error:  # a benchmark stops itself by the latter
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            found |= {"traceback": traceback.format_exc()}
            found |= {"line": f"{piece}: {found['error']}"[:200]}
        if "ok" in found:
            found["ok"] = bool(found["ok"])  # NumPy's False is not False
        here.found[piece] = {**found, "took_seconds": round(time.monotonic() - at, 2)}
        if found.get("line"):
            print(f"   {found['line']}", flush=True)
        write()

    write()
    pieces = PARTS[name][1](here)
    try:
        for piece, run in pieces:
            if time.monotonic() > here.deadline:
                if here.found:
                    here.found[f"{piece} and what comes after it"] = {"skipped": "no time"}
                break
            attempt(piece, run)
            if not alive(here):
                return False
            if here.gpu:
                gc.collect()  # what failed may hold tensors in a circle
                torch.cuda.empty_cache()
    except Exception as error:  # between two pieces

        def again(error: Exception = error) -> Found:
            raise error

        attempt(f"{name} itself", again)
    write()
    print(f"   {record['result']}, {record['seconds']} s", flush=True)
    return True


def summarise(folder: Path) -> list[str]:
    """Write ``summary.md`` of what lies in the folder; the parts that failed."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("??_*.json"))]
    first = records[0]
    about = {"commit": first["commit"], **first["versions"]}
    about |= {k: first["machine"][k] for k in ("capability", "cuda", "driver")}
    quick = " (quick: no figure is worth anything)" * first["quick"]
    lines = [f"# Probe on {first['hardware']}{quick}", ""]
    lines += [f"{first['date']}; " + ", ".join(f"{name} {v}" for name, v in about.items() if v)]
    lines += ["", "| part | seconds | result |", "|---|---|---|"]
    lines += [f"| {r['part']} | {r['seconds']:.0f} | {r['result']} |" for r in records]
    for record in records:
        lines += ["", f"**{record['part']}**", ""]
        lines += [f"- {x['line']}" for x in record["pieces"].values() if x.get("line")]
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [f"{r['part']}: {r['result']}" for r in records if r["result"].startswith("failed")]


def session(description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; 1 if anything in the folder failed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="default: the GPU if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="small work, to see that it runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all, in this order")
    parser.add_argument("--out", type=Path, help="folder; default: build/probe/HARDWARE")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts (10)")
    args = parser.parse_args(arguments)
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device here; `--device cpu --quick` shows that the program runs")
    device = torch.device(args.device or "cuda")
    hardware = header(device, args.quick)["hardware"]
    own_name = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-") + "-quick" * args.quick
    folder = args.out or ROOT / "build" / "probe" / own_name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("??_*.json"):
        other = json.loads(path.read_text(encoding="utf-8"))
        if (other["hardware"], other["quick"]) != (hardware, args.quick):
            parser.error(f"{path} is of {other['hardware']}, quick {other['quick']}: other --out")
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for a busy core burn more than they bring
    planned = time.monotonic()
    shares = sum(PARTS[name][0] for name in names)
    rest: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        here = Probe(device, args.quick, folder, Path(work), planned + 60 * args.minutes)
        for place, name in enumerate(names):
            own = 60 * args.minutes * PARTS[name][0] / shares
            planned += own  # what a part leaves is for those that follow
            here.deadline = min(here.end, max(planned, time.monotonic() + own))
            if not run_part(name, here):
                rest = names[place + 1 :]
                break
    if rest:
        print("CUDA answers no more: a new process goes on", flush=True)
        again = ["--device", device.type, "--out", str(folder), "--parts", ",".join(rest)]
        again += ["--minutes", f"{(here.end - time.monotonic()) / 60:.2f}"]
        again += ["--quick"] if args.quick else []
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.probe", *again])
    failed = summarise(folder)
    print(f"\n{(folder / 'summary.md').read_text(encoding='utf-8')}\nwritten: {folder}")
    print("\n".join(["failed:", *failed]) if failed else "nothing failed")
    return int(bool(failed))
