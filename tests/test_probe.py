"""The probe of a GPU runs, tells what failed and goes on, and takes no CPU for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import parity, probe, probing, varlen_on_cpu
from benchmarks.probing import PARTS, Probe

CPU = ["--device", "cpu", "--quick"]


def records(folder: Path) -> dict[str, Any]:
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return {record["part"]: record for record in found}


def test_some_parts_run_and_say_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["sdpa", "gathers", "out_of_memory"]
    assert probe.main([*CPU, "--parts", ",".join(names), "--out", str(tmp_path)]) == 0
    found = records(tmp_path)
    assert list(found) == names
    for record in found.values():
        assert record["result"] == "ok"
        assert record["device"] == "cpu"
        assert record["quick"] is True
        assert record["hardware"].startswith("CPU: ")
        assert record["machine"]["gpu"] is record["machine"]["driver"] is None
        assert record["versions"]["torch"] == torch.__version__
    title, *lines = (tmp_path / "summary.md").read_text(encoding="utf-8").splitlines()
    assert title == f"# Probe on {record['hardware']} (quick: no figure is worth anything)"
    assert sum(line.startswith("| ") for line in lines) == 1 + len(names)
    assert title in capsys.readouterr().out
    ends = found["out_of_memory"]["pieces"]
    for name in ("scoring", "evaluation"):
        assert "1 halvings" in ends[name]["line"] or "2 halvings" in ends[name]["line"]
    shared, apart = (
        found["gathers"]["pieces"][f"{name}, forward"]
        for name in ("branches on a prefix", "nothing shared")
    )
    assert shared["keys"] > 5 * shared["tokens"]
    assert apart["keys"] == apart["tokens"]
    assert shared["bytes_of_copies"] > 2 * apart["bytes_of_copies"]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``made_up(a=pieces, b=pieces)``: these parts and no others."""

    def install(**parts: dict[str, Callable[[], Any]]) -> None:
        monkeypatch.setattr(probing, "PARTS", dict(PARTS))
        probing.PARTS.clear()
        for name, pieces in parts.items():
            probing.PARTS[name] = 1.0, lambda here, pieces=pieces: iter(pieces.items())

    return install


def good() -> dict[str, Any]:
    return {"line": "fine"}


def bad() -> dict[str, Any]:
    raise SystemExit("a benchmark stops")


def test_what_fails_is_recorded_and_the_rest_goes_on(
    made_up: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(
        first={"divides": lambda: {"x": 1 / 0}, "stops": bad, "good": good},
        second={"far off": lambda: {"ok": np.False_}, "left out": lambda: {"skipped": "one GPU"}},
        third={"good": good},
    )

    def breaks(here: Probe) -> Iterator[Any]:
        yield "good", good
        raise KeyError("between")

    probing.PARTS["fourth"] = 1.0, breaks
    assert probe.main([*CPU, "--out", str(tmp_path)]) == 1
    found = records(tmp_path)
    assert [record["result"] for record in found.values()] == [
        "failed: divides; stops",
        "failed: far off (skipped: left out: one GPU)",
        "ok",
        "failed: fourth itself",
    ]
    pieces = found["first"]["pieces"]
    assert "1 / 0" in pieces["divides"]["traceback"]
    assert pieces["stops"]["error"] == "SystemExit: a benchmark stops"
    assert pieces["good"]["line"] == "fine"
    assert str(probing.ROOT) not in (tmp_path / "01_first.json").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-4:] == [
        "failed:",
        "first: failed: divides; stops",
        "second: failed: far off (skipped: left out: one GPU)",
        "fourth: failed: fourth itself",
    ]


def test_what_does_not_fit_the_time_says_so(made_up: Callable[..., None], tmp_path: Path) -> None:
    def long() -> dict[str, Any]:
        time.sleep(0.3)
        return {}

    made_up(first={"long": long, "next": good}, second={"good": good})
    assert probe.main([*CPU, "--out", str(tmp_path), "--minutes", str(0.2 / 60)]) == 0
    found = records(tmp_path)
    assert found["first"]["result"] == "ok (skipped: next and what comes after it: no time)"
    assert found["second"]["result"] == "skipped: no time"
    assert found["second"]["pieces"] == {}


def test_a_lost_device_takes_a_new_process(
    made_up: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(first={"bad": bad, "never": good}, second={"good": good}, third={"good": good})
    monkeypatch.setattr(probing, "alive", lambda here: "bad" not in here.found)
    started: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise KeyboardInterrupt  # (it would not come back)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(KeyboardInterrupt):
        probe.main([*CPU, "--out", str(tmp_path)])
    (again,) = started
    assert again[1:3] == ["-m", "benchmarks.probe"]
    assert again[again.index("--parts") + 1] == "second,third"
    assert "cpu" in again
    assert records(tmp_path)["first"]["result"] == "failed: bad"
    monkeypatch.setattr(probing, "alive", lambda here: True)
    assert probe.main(again[3:]) == 1  # of the first part, whose file lies there
    assert list(records(tmp_path)) == ["first", "second", "third"]


def test_two_devices_do_not_share_a_folder(made_up: Callable[..., None], tmp_path: Path) -> None:
    made_up(first={"good": good})
    assert probe.main([*CPU, "--out", str(tmp_path)]) == 0
    path = tmp_path / "01_first.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"CPU: ', '"CUDA: '))
    with pytest.raises(SystemExit):
        probe.main([*CPU, "--out", str(tmp_path)])


def test_a_program_that_takes_too_long_is_ended() -> None:
    here = Probe(torch.device("cpu"), deadline=time.monotonic() + 1)
    found = probing.process(here, "-c", "print('begun', flush=True); import time; time.sleep(99)")
    assert found["ok"] is False
    assert "cut after" in found["error"]
    assert "begun" in found["output"]


# --- parity


def off_by_one(query: Any, key: Any, *rest: Any, window_size: Any, **options: Any) -> Any:
    left = window_size[0] - (window_size[0] > 0)
    return RIGHT(query, key, *rest, window_size=(left, 0), **options)


def without_window(query: Any, key: Any, *rest: Any, window_size: Any, **options: Any) -> Any:
    return RIGHT(query, key, *rest, window_size=(-1, 0), **options)


def one_key_early(query: Any, key: Any, *rest: Any, **options: Any) -> Any:
    return RIGHT(query, key.roll(1, 0), *rest, **options)


def aligned_at_the_first(
    query: Any, key: Any, value: Any, q_offsets: Any, k_offsets: Any, *rest: Any, **options: Any
) -> Any:
    """What a mask by rows and columns alone would do: each sees the first keys, not the last."""
    parts = []
    for s in range(len(q_offsets) - 1):
        q, k, v = (
            x[o[s] : o[s + 1]].transpose(0, 1)
            for x, o in ((query, q_offsets), (key, k_offsets), (value, k_offsets))
        )
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k[:, : q.shape[1]], v[:, : q.shape[1]], is_causal=True, scale=options["scale"]
            ).transpose(0, 1)
        )
    return torch.cat(parts)


RIGHT = varlen_on_cpu.varlen_on_cpu


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (aligned_at_the_first, "llama"),
        (one_key_early, "qwen3"),
        (off_by_one, "mistral, window"),
        (without_window, "qwen2, mixed windows"),
    ],
)
def test_parity_fails_with_a_wrong_kernel(
    wrong: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Probe(torch.device("cpu"), quick=True)
    pieces = {
        precision: run
        for name, run in parity.parity_pieces(here)
        for precision in parity.PRECISIONS
        if name == f"{kind}; {precision}; no checkpointing"
    }
    for precision, run in pieces.items():
        found = run()
        assert found["ok"], (precision, found)
        assert bool(found["kernels"]["varlen"]) is (precision != "fp32")
    monkeypatch.setattr(varlen_on_cpu, "varlen_on_cpu", wrong)
    assert pieces["fp32"]()["ok"]  # another path
    for precision in ("bf16", "fp16", "fp32 + bf16 autocast"):
        found = pieces[precision]()
        assert not found["ok"], (precision, found["packed"], found["bounds"])


# --- the whole


class ActedGpu(Probe):
    """Takes the branches of a GPU, on small shapes."""

    gpu = True  # type: ignore[assignment]
    shape = "tiny"  # type: ignore[assignment]

    def size(self, gpu: int, cpu: int) -> int:
        return cpu


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_branches_of_a_gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's functions acted; what a GPU would answer is another question."""
    modes, limits = [], []
    total = 80 * 2**30
    about = SimpleNamespace(total_memory=total)
    acted: dict[str, Any] = {
        "mem_get_info": lambda *_: (total * 19 // 20, total),
        "get_device_properties": lambda *_: about,
        "set_sync_debug_mode": modes.append,
        "empty_cache": lambda: None,
        "memory_reserved": lambda *_: 0,
        "set_per_process_memory_fraction": lambda share, _: limits.append(share),
        "is_bf16_supported": lambda **_: True,
    }
    for name, function in acted.items():
        monkeypatch.setattr(torch.cuda, name, function)
    here = ActedGpu(torch.device("cpu"), quick=True, folder=tmp_path, work=tmp_path)
    here.deadline = time.monotonic() + 500
    for name in ("versions", "step", "gathers", "memory", "out_of_memory", "sampling"):
        assert probing.run_part(name, here)
    found = records(tmp_path)
    errors = [x for record in found.values() for x in record["pieces"].values() if "error" in x]
    assert errors == []
    results = {name: record["result"] for name, record in found.items()}
    assert results.pop("versions") == "failed: tests/gpu"  # they were skipped, which shows nothing
    assert results.pop("out_of_memory") == "failed: scoring; evaluation"  # nothing was halved
    assert set(results.values()) == {"ok"}
    assert modes == ["warn", 0, "error", 0, "warn", 0]
    assert limits[1::2] == [1.0, 1.0]
    assert all(0 < limit < 0.1 for limit in limits[::2])


@pytest.mark.slow
def test_the_whole_probe_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.probe", *CPU, "--minutes", "30", "--out", str(tmp_path)],
        cwd=probing.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found = records(tmp_path)
    assert list(found) == list(PARTS)
    assert {record["result"] for record in found.values()} == {"ok"}
    assert sum(map(len, (record["pieces"] for record in found.values()))) > 150
    ranks = found["train"]["pieces"]
    assert ranks["torchrun"]["training"]["world_size"] == 2
    for name, value in ranks["alone"]["metrics"].items():
        if isinstance(value, float):
            assert ranks["torchrun"]["metrics"][name] == pytest.approx(value, abs=1e-3), name
