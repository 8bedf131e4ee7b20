"""All that a first GPU has to answer, in ten minutes: ``python -m benchmarks.probe``.

    python -m benchmarks.probe                        # on the GPU; `make probe` is the same
    python -m benchmarks.probe --device cpu --quick   # does it run? a minute and a half, no GPU

Ten parts, in the order in which their answers matter:

=================  ============================================================================
``versions``       versions and driver; do the tests of ``tests/gpu`` pass?
``parity``         are packed scores and gradients those of padded batches in float32? By
                   architecture, heads, windows, dtype, activation checkpointing; by which kernel
``sdpa``           which of PyTorch's kernels take float32 with grouped heads, at what cost?
``step``           does the host wait for the GPU within a step, where? What takes the time?
``gathers``        what do copies of keys and values cost where branches share a long prefix?
``memory``         bytes a token, without gradient and in training; is the budget right?
``out_of_memory``  does the default budget fit? Does the halving lose nothing, when it is real?
``programs``       ``benchmarks.scoring`` and ``.training`` at Qwen3-0.6B's shape
``train``          ``companion train pairwise`` alone, and on two ranks by torchrun
``sampling``       completions at the default budget: tokens a second, memory
=================  ============================================================================

Each part writes its JSON into ``build/probe/HARDWARE/`` as its pieces end, and ``summary.md`` there
is the table. **Send back that folder**, whole, whatever came out. An exception is recorded with its
traceback and the next piece goes on; after an error that leaves CUDA unusable a new process goes on
with the next part. The exit code is 1 if anything in the folder failed.

Each part has a share of ``--minutes``, and what others leave of theirs; what does not fit says
``skipped: no time``. Needed: 16 GB of memory on a GPU that nobody else uses, and no network. With
``--device cpu`` the same code runs on small shapes, with a stand-in for CUDA's kernel
(:mod:`benchmarks.varlen_on_cpu`); no figure of such a run is worth anything.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import random
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.measuring import PeakMemory, matmul_peak, wait
from benchmarks.parity import counted_kernels, parity_pieces
from benchmarks.probing import ALL_GPUS, Found, Piece, Probe, header, part, process, session
from benchmarks.shapes import (
    EOS,
    PAD,
    TokenIds,
    candidates,
    draw,
    make_config,
    make_model,
    mixed_lengths,
    needed_tokens,
    pairs,
    useful_flops,
)
from companion.engine import (
    BatchRunner,
    PackedBatch,
    cuda_token_budget,
    pack,
    packed_attention,
    packed_scores,
    plan_trees,
)

Pieces = Iterator[tuple[str, Piece]]
OUT_OF_MEMORY = "out of memory"


# ---------------------------------------------------------------------- tools


def bytes_of(run: Callable[[], Any], device: torch.device) -> float:
    """Rise of the memory's peak while that runs."""
    watch = PeakMemory(device)
    run()
    wait(device)
    return (watch.rise_mib() or 0.0) * 2**20


def milliseconds(here: Probe, run: Callable[[], Any]) -> float:
    """Median of several runs."""
    seconds = []
    for _ in range(here.size(10, 1)):
        wait(here.device)
        begin = time.perf_counter()
        run()
        wait(here.device)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds)


def profiler(here: Probe, **options: Any) -> Any:
    """Of PyTorch, of what matters on the device."""
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if here.gpu else [])], **options
    )


def own_time(here: Probe, event: Any) -> float:
    """Microseconds of an event's own; on a GPU of the kernels that it started."""
    return float(event.self_device_time_total if here.gpu else event.self_cpu_time_total)


def largest(here: Probe, events: Any) -> tuple[list[Found], float]:
    """The ten events that took the longest on the device, and the microseconds of all."""
    kind = torch.autograd.DeviceType.CUDA if here.gpu else torch.autograd.DeviceType.CPU
    events = [e for e in events if e.device_type == kind and not e.is_user_annotation]
    events.sort(key=lambda e: -own_time(here, e))
    total = sum(own_time(here, e) for e in events) or 1.0
    rows = [
        {"name": e.key, "calls": e.count, "share": own_time(here, e) / total} for e in events[:10]
    ]
    return rows, total


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """The warnings that the companion logs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("companion")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def halvings(lines: Sequence[str]) -> int:
    """How many of those lines say that the memory ended."""
    return sum(OUT_OF_MEMORY in line for line in lines)


def packed(texts: TokenIds, device: torch.device) -> PackedBatch:
    """One batch of them all."""
    return pack(texts, plan_trees(texts)).to(device)


def texts_of(rows: Sequence[dict[str, list[int]]]) -> TokenIds:
    """All texts of pairs."""
    return [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]


def make_trainer(here: Probe, model: Any, rows: Sequence[Any], **settings: Any) -> Any:
    """The companion's trainer of pairs, on pairs of token ids."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from benchmarks.training import make_tokenizer
    from companion import PairwiseRewardConfig, PairwiseRewardTrainer

    usual = {"disable_tqdm": True, "report_to": "none", "save_strategy": "no", "max_length": 1024}
    usual |= {"logging_steps": 1_000_000, "learning_rate": 1e-5, "use_cpu": not here.gpu}
    data = Dataset.from_list(list(rows))
    trainer = PairwiseRewardTrainer(
        model=model,
        args=PairwiseRewardConfig(str(here.work / "run"), **{**usual, **settings}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=make_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---------------------------------------------------------------------- is it right?


@part(0.1)
def versions(here: Probe) -> Pieces:
    """More about the device than every JSON says; then the tests that need one."""

    def about() -> Found:
        found: Found = {"torch": torch.__config__.show()}
        if here.gpu:
            about = torch.cuda.get_device_properties(here.device)
            free = here.free_bytes() or 0
            found |= {"properties": str(about), "free_bytes": free}
            found["ok"] = free > 0.9 * about.total_memory  # else somebody else uses it
        said = header(here.device, here.quick)["versions"]
        return found | {"line": ", ".join(f"{name} {version}" for name, version in said.items())}

    def tests() -> Found:
        only = ["--collect-only"] if here.quick and not here.gpu else []
        found = process(here, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", *only)
        last = (found["output"].strip().splitlines() or [""])[-1]
        if here.gpu:  # tests that were skipped have shown nothing
            found["ok"] = found["ok"] and "passed" in last and "skipped" not in last
        return found | {"line": f"tests/gpu: {last}"}

    yield "versions", about
    yield "tests/gpu", tests


@part(0.15)
def parity(here: Probe) -> Pieces:
    """See :mod:`benchmarks.parity`."""
    yield from parity_pieces(here)


# ---------------------------------------------------------------------- how fast, and by what?


def sdpa_case(here: Probe, causal: bool, grouped: bool, kernel: str | None) -> Found:
    """Forward and backward in float32 by one kernel, or by that of PyTorch's choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    (heads, keys, width), length = ((16, 8, 128), 2048) if here.gpu else ((4, 2, 32), 96)
    torch.manual_seed(0)
    own = length if causal else length * 3 // 4  # behind a prefix
    mask = torch.ones(own, length, dtype=torch.bool, device=here.device).tril(length - own)
    query, key, value = (
        torch.randn(1, count, size, width, device=here.device, requires_grad=True)
        for count, size in ((heads, own), (keys, length), (keys, length))
    )

    def attend(grouped: bool = grouped) -> Tensor:
        k, v = (x if grouped else x.repeat_interleave(heads // keys, 1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            *(query, k, v, None if causal else mask), is_causal=causal, enable_gqa=grouped
        )
        output.sum().backward()
        return output.detach()

    with sdpa_kernel(SDPBackend.MATH):
        want = attend(grouped=False)
    with contextlib.ExitStack() as stack:
        why = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        if kernel is not None:
            stack.enter_context(sdpa_kernel(getattr(SDPBackend, kernel)))
        try:
            gap = float((attend() - want).abs().max())
        except RuntimeError as error:
            if kernel is None or isinstance(error, torch.OutOfMemoryError):
                raise
            return {"refused": str(error), "why": [str(w.message) for w in why]}
        found: Found = {"gap": gap, "ok": gap < 1e-4, "peak_bytes": bytes_of(attend, here.device)}
        found["milliseconds"] = milliseconds(here, attend)
        if kernel is None:
            with profiler(here) as seen:
                attend()
                wait(here.device)
            events = seen.key_averages()
            found["chosen"] = [e.key for e in events if "_scaled_dot_product_" in e.key]
            found["largest"] = largest(here, events)[0]
    return found


@part(0.05)
def sdpa(here: Probe) -> Pieces:
    """Each kernel by itself, then PyTorch's choice."""
    for causal in (True, False):
        for grouped in (True, False):
            case = f"{'causal' if causal else 'mask'}, {'grouped' if grouped else 'repeated'} heads"
            for kernel in ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
                run = functools.partial(sdpa_case, here, causal, grouped, kernel)
                yield f"{case}: {kernel}", run
            yield f"{case}: chosen", functools.partial(sdpa_case, here, causal, grouped, None)

    def chosen() -> Found:
        names = [name for name in here.found if name.endswith(": chosen")]
        times = [f"{n[:-8]} {here.found[n].get('milliseconds', 0):.3g} ms" for n in names]
        return {"line": "by PyTorch's choice: " + "; ".join(times)}

    yield "chosen", chosen


@contextlib.contextmanager
def waits(here: Probe) -> Iterator[Counter[str]]:
    """Where the host waits for the GPU, and how often."""
    found: Counter[str] = Counter()
    if not here.gpu:
        yield found
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(0)
            said = [w for w in seen if "called a synchronizing" in str(w.message)]
            found.update(f"{w.filename}:{w.lineno}" for w in said)


class _Watch(TrainerCallback):
    """Of a training: waits of the host in the second step, a profile of the last, seconds."""

    def __init__(self, here: Probe, steps: int) -> None:
        self.here, self.steps = here, steps
        self.seconds: list[float] = []
        self.waits: Counter[str] = Counter()
        self.profile: Any = profiler(here)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stack = contextlib.ExitStack()
        if state.global_step == 1:
            self.waits = self.stack.enter_context(waits(self.here))
        if state.global_step == self.steps - 1:
            self.stack.enter_context(self.profile)
        wait(self.here.device)
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait(self.here.device)
        self.seconds.append(time.perf_counter() - self.begin)
        self.stack.close()


def forward_without_wait(here: Probe, mode: str) -> Found:
    """A packed forward of a new layout; where the host waits, or that as an exception."""
    model = make_model(here.shape, here.device, here.half).train()
    packed_scores(model, packed(candidates(2, 4), here.device))  # what is made once
    batch = packed(candidates(2, 4, seed=1), here.device)
    if mode == "warn":
        with waits(here) as found:
            packed_scores(model, batch)
        line = (
            f"{found.total()} waits of the host" if here.gpu else "ran (waits show on CUDA alone)"
        )
        return {"waits": dict(found), "ok": not found, "line": f"packed forward: {line}"}
    if here.gpu:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        packed_scores(model, batch)
    finally:
        if here.gpu:
            torch.cuda.set_sync_debug_mode(0)
    return {}


def training_step(here: Probe) -> Found:
    """Whole steps of the trainer, the optimizer's included, on the same pairs each time."""
    rows = pairs(here.size(8, 2), seed=1)
    model = make_model(here.shape, here.device)
    watch = _Watch(here, steps=here.size(7, 3))
    settings = {"max_steps": watch.steps, "per_device_train_batch_size": len(rows)}
    trainer = make_trainer(here, model, rows, **settings)
    trainer.add_callback(watch)
    trainer.train()
    top, busy = largest(here, watch.profile.key_averages())
    seconds = statistics.median(watch.seconds[2:-1] or watch.seconds[1:])
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    tokens = needed_tokens(texts_of(rows))
    flops = {
        "6 N T": 6.0 * weights * tokens,
        "needed": useful_flops(model, texts_of(rows), backward=True),
    }
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    dtype = torch.float16 if trainer.args.fp16 else dtype
    peak = matmul_peak(dtype, here.device, quick=here.quick)
    share = {name: count / seconds / peak for name, count in flops.items()}
    line = (
        f"a step of {tokens} tokens in {dtype}: {seconds:.3g} s, {share['6 N T']:.0%} of the peak"
    )
    return {
        "dtype": dtype,
        "checkpointing": bool(model.is_activation_checkpointing),
        "waits": dict(watch.waits.most_common()) if here.gpu else "seen on CUDA alone",
        "seconds": watch.seconds,
        "tokens": tokens,
        "tokens_a_second": tokens / seconds,
        "flops": flops,
        "matmul_peak_flops": peak,
        "share_of_peak": share,
        "device_busy": busy / 1e6 / watch.seconds[-1],
        "largest": top,
        "line": line + (f", {watch.waits.total()} waits of the host" if here.gpu else ""),
    }


@part(0.12)
def step(here: Probe) -> Pieces:
    """Does the host wait; then where the time of a step goes."""
    for mode in ("warn", "error"):
        yield f"packed forward, {mode}", functools.partial(forward_without_wait, here, mode)
    yield "training step", functools.partial(training_step, here)


def gather_case(here: Probe, texts: TokenIds, backward: bool) -> Found:
    """Attention of one layer: the share of copies in its time, and their bytes."""
    batch = packed(texts, here.device)
    (heads, keys), width = ((16, 8), 128) if here.gpu else ((4, 2), 32)
    tensors = query, key, value = [
        torch.randn(1, count, batch.computed, width, dtype=here.half, device=here.device)
        for count in (heads, keys, keys)
    ]
    for x in tensors:
        x.requires_grad_(backward)

    def attend() -> None:
        output, _ = packed_attention(
            torch.nn.Identity(), query, key, value, None, packed_segments=batch.segments
        )
        if backward:
            output.sum().backward()

    with counted_kernels(here) as ran:
        attend()
        found: Found = {"milliseconds": milliseconds(here, attend), "kernels": dict(ran)}
        with profiler(here, profile_memory=True) as seen:
            attend()
            wait(here.device)
    events = seen.key_averages()
    copies = [e for e in events if re.match(r"aten::(index|gather|cat$|copy_|clone)", e.key)]
    name = "self_device_memory_usage" if here.gpu else "self_cpu_memory_usage"
    found["largest"], total = largest(here, events)
    found |= {"tokens": batch.computed, "keys": sum(map(len, texts))}
    found["share_of_time"] = sum(own_time(here, e) for e in copies) / total
    found["bytes_of_copies"] = sum(max(0, getattr(e, name)) for e in copies)
    found["bytes_of_heads"] = sum(x.nbytes for x in tensors)
    if not backward:
        times = found["bytes_of_copies"] / found["bytes_of_heads"]
        found["line"] = f"{batch.computed} tokens that see {found['keys']} keys: copies take "
        found["line"] += f"{found['share_of_time']:.0%} of the time, {times:.1f} times the bytes"
    return found


@part(0.04)
def gathers(here: Probe) -> Pieces:
    """Many branches on a long prefix; as many texts that share nothing."""
    rng, branches = random.Random(0), here.size(64, 8)
    prefix = draw(rng, here.size(2000, 100))
    shared = [[*prefix, *draw(rng, here.size(60, 6))] for _ in range(branches)]
    apart = [draw(rng, here.size(90, 18)) for _ in range(branches)]
    for name, texts in (("branches on a prefix", shared), ("nothing shared", apart)):
        for backward in (False, True):
            how = f"{name}, {'forward and backward' if backward else 'forward'}"
            yield how, functools.partial(gather_case, here, texts, backward)


# ---------------------------------------------------------------------- does it fit?


def line_through(tokens: Sequence[int], size: Sequence[float]) -> Found:
    """Bytes a token, and what does not grow."""
    slope, start = np.polyfit(tokens, size, 1)
    return {"tokens": list(tokens), "bytes": list(size), "a_token": slope, "fixed": start}


def saved_bytes(run: Callable[[], Any], model: Any) -> float:
    """What autograd keeps for the backward, weights left out.

    Of a checkpointed layer nothing shows: its input is kept elsewhere.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _output = run()
    return float(sum(x.untyped_storage().nbytes() for x in kept.values()))


def batch_of(here: Probe, tokens: int) -> PackedBatch:
    """So many tokens in texts of 256."""
    rng = random.Random(0)
    return packed([[*draw(rng, 255), EOS] for _ in range(tokens // 256)], here.device)


def scoring_memory(here: Probe, dtype: torch.dtype) -> Found:
    """Of a forward without gradient, beside what the budget plans with."""
    model = make_model(here.shape, here.device, dtype).eval()
    sizes, used = [here.size(4096, 256) * k for k in (1, 2, 4)], []
    with torch.inference_mode():
        for size in sizes:
            forward = functools.partial(packed_scores, model, batch_of(here, size))
            forward()
            used.append(bytes_of(forward, here.device))
    found = line_through(sizes, used)
    some = 4 * 2**30
    budget = cuda_token_budget(some, model.config, dtype.itemsize)
    found |= {"budget_of_4_gib": budget, "planned_a_token": some / budget}
    if here.gpu:
        found["ok"] = found["a_token"] <= found["planned_a_token"]
    found["line"] = f"forward in {dtype}: {found['a_token'] / 1024:.0f} KiB a token, "
    found["line"] += f"planned with {found['planned_a_token'] / 1024:.0f}"
    return found


def training_memory(here: Probe, checkpointing: bool) -> Found:
    """Of forward and backward; on a CPU of what is saved in between."""
    model = make_model(here.shape, here.device).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    least = 256
    if here.gpu:  # 4 MiB a token at most, beside gradients and half copies of the weights
        room = (here.free_bytes() or 0) - 4 * 2**30
        least = max(256, min(1024, room // (16 * 2**20) // 256 * 256))
    sizes, used = [least * k for k in (1, 2, 4)], []
    for size in sizes:
        batch = batch_of(here, size)

        def forward(batch: PackedBatch = batch) -> Tensor:
            with torch.autocast(here.device.type, here.half):
                return packed_scores(model, batch).sum()

        def both(forward: Callable[[], Tensor] = forward) -> None:
            forward().backward()

        if here.gpu:
            both()  # now the gradients are there
            used.append(bytes_of(both, here.device))
        else:
            with counted_kernels(here):
                used.append(saved_bytes(forward, model))
    by = "peak" if here.gpu else "tensors saved for the backward"
    found = line_through(sizes, used) | {"by": by}
    how = "with" if checkpointing else "without"
    mib = found["a_token"] / 2**20
    return found | {"line": f"training {how} checkpointing: {mib:.2f} MiB a token ({by})"}


@part(0.1)
def memory(here: Probe) -> Pieces:
    """Lines through three sizes."""
    for dtype in (torch.float32, here.half):
        yield f"forward in {dtype}", functools.partial(scoring_memory, here, dtype)
    for how in (False, True):
        name = f"training {'with' if how else 'without'} checkpointing"
        yield name, functools.partial(training_memory, here, how)


@contextlib.contextmanager
def narrow(here: Probe, model: Any, room: float, tokens: int) -> Iterator[None]:
    """Little memory: `room` bytes more than now; on a CPU the backbone acts it above `tokens`."""
    if not here.gpu:
        real = model.model.forward

        def forward(input_ids: Tensor, *given: Any, **options: Any) -> Any:
            if input_ids.numel() > tokens:
                raise torch.OutOfMemoryError(f"acted: {OUT_OF_MEMORY}")
            return real(input_ids, *given, **options)

        with mock.patch.object(model.model, "forward", forward):
            yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(here.device).total_memory
    limit = (torch.cuda.memory_reserved(here.device) + room) / total
    torch.cuda.set_per_process_memory_fraction(limit, here.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, here.device)


def default_budget(here: Probe) -> Found:
    """More tokens than one batch holds, without an end of memory."""
    model = make_model(here.shape, here.device, here.half).eval()
    texts, runner = mixed_lengths(here.size(768, 16)), BatchRunner(model, PAD)
    found: Found = {"free_bytes": here.free_bytes()}
    begin = time.perf_counter()
    with logged() as said:
        found["peak_bytes"] = bytes_of(lambda: runner.run(texts), here.device)
    speed = runner.tokens[0] / (time.perf_counter() - begin)
    found |= {"tokens": runner.tokens, "tokens_a_second": speed, "said": said}
    line = f"default budget: {speed:,.0f} tokens/s, {halvings(said)} halvings"
    return found | {"ok": halvings(said) == 0, "line": line}


def scoring_out_of_memory(here: Probe) -> Found:
    """One batch of all, with less than half the memory that it took; then once more."""
    model = make_model("tiny" if here.shape == "tiny" else "small", here.device).eval()
    texts = mixed_lengths(here.size(256, 16), seed=1)
    tokens = sum(map(len, texts))
    runner = BatchRunner(model, PAD, max_tokens=2 * tokens)
    want = runner.run(texts)
    room = 0.4 * bytes_of(lambda: runner.run(texts), here.device)
    said, gaps = [], []
    with narrow(here, model, room, tokens // 2):
        for _ in range(2):
            with logged() as lines:
                gaps.append(float(np.abs(runner.run(texts) - want).max()))
            said.append(lines)
    first, again = map(halvings, said)
    line = f"scoring: {first} halvings, then {again}; largest difference {max(gaps):.1g}"
    ok = first > again and max(gaps) < 1e-4
    return {"said": said, "gaps": gaps, "room_bytes": room, "ok": ok, "line": line}


def evaluation_out_of_memory(here: Probe) -> Found:
    """The same for the evaluation of a trainer."""
    model = make_model("tiny" if here.shape == "tiny" else "small", here.device)
    rows = pairs(here.size(64, 8), seed=2)
    settings = {"per_device_eval_batch_size": len(rows), "max_steps": 1, "bf16": False}
    trainer = make_trainer(here, model, rows, **settings)
    want = trainer.evaluate()
    room = 0.4 * bytes_of(trainer.evaluate, here.device)
    with logged() as said, narrow(here, model, room, needed_tokens(texts_of(rows)) // 2):
        found = trainer.evaluate()
    names = [n for n, x in want.items() if isinstance(x, float) and not re.search("time|second", n)]
    gap = max(abs(found[name] - want[name]) for name in names)
    line = f"evaluation: {halvings(said)} halvings; largest difference {gap:.1g}"
    ok = halvings(said) > 0 and gap < 1e-4
    return {"said": said, "gap": gap, "figures": names, "room_bytes": room, "ok": ok, "line": line}


@part(0.1)
def out_of_memory(here: Probe) -> Pieces:
    """The default budget on a full load; then two ends of memory, which lose nothing."""
    yield "default budget", functools.partial(default_budget, here)
    yield "scoring", functools.partial(scoring_out_of_memory, here)
    yield "evaluation", functools.partial(evaluation_out_of_memory, here)


# ---------------------------------------------------------------------- whole programs


@part(0.2)
def programs(here: Probe) -> Pieces:
    """The two benchmarks that matter, as they count."""
    large = here.gpu and torch.cuda.get_device_properties(here.device).total_memory > 60 * 2**30
    args = argparse.Namespace(quick=here.quick, rounds=here.size(2, 1), budgets=[])
    args.batch_size = 8 if large else 2

    def line(what: str, case: Found, name: str) -> Found:
        row = next(row for row in case["methods"] if row["method"] == name)
        speed = f"{row['text tokens/s']:,.0f} tokens/s, {row['times faster']:.2g} times that of"
        return case | {"line": f"{what}, {name}: {speed} {case['methods'][0]['method']}"}

    def scoring(dtype: torch.dtype) -> Found:
        from benchmarks.comparing import deviation, one_case

        model = make_model(here.shape, here.device, dtype).eval()
        texts = mixed_lengths(here.size(96, 3))
        case = one_case(model, texts, args, here.device, dtype)
        if dtype != torch.float32:
            case["deviation"] = deviation(model, make_model(here.shape, here.device), texts)
        return line(f"scoring in {dtype}", case, "companion")

    def training() -> Found:
        from datasets import disable_progress_bars

        from benchmarks.training import one_shape

        disable_progress_bars()
        case = one_shape(here.shape, pairs(here.size(24, 2)), args, here.device)
        return line("training", case, "companion bf16")

    for dtype in (here.half, torch.float32):
        yield f"scoring in {dtype}", functools.partial(scoring, dtype)
    yield "training", training


def train_command(here: Probe, ranks: int) -> Found:
    """``companion train pairwise`` on the tutor's pairs, cut to a few steps."""
    from companion import write_rows
    from companion.tutor import make_rows

    rows, output = here.work / "pairs.jsonl", here.work / f"on{ranks}"
    write_rows(make_rows("pairs", 48 if here.quick else 400, seed=1), rows)
    ranked = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    arguments = [
        *(*(ranked if ranks > 1 else []), "-m", "companion", "train", "pairwise"),
        *("--config", "recipes/pairwise/tutor.yaml", "--dataset_name", str(rows)),
        *("--output_dir", str(output), "--disable_tqdm", "true"),
        *("--max_steps", "2" if here.quick else "20"),
        *("--per_device_train_batch_size", str(8 // ranks)),
        *(() if here.gpu else ("--use_cpu", "true")),
    ]
    begin = time.perf_counter()
    found = process(here, *arguments, every_gpu=ranks > 1)
    seconds = time.perf_counter() - begin
    if found["ok"]:
        manifest = json.loads((output / "reward_manifest.json").read_text(encoding="utf-8"))
        found |= {"metrics": manifest["metrics"], "training": manifest["training"]}
        found["ok"] = found["output"].count("saved in") == 1
    how = f"{ranks} process{'es' * (ranks > 1)}"
    return found | {"line": f"{how}: {'ok' if found['ok'] else 'failed'}, {seconds:.0f} s"}


@part(0.12)
def train(here: Probe) -> Pieces:
    """Alone, and on two ranks."""

    def torchrun() -> Found:
        if here.gpu:
            code = "import torch; print(torch.cuda.device_count())"
            count = process(here, "-c", code, every_gpu=True)["output"].strip()
            if count in ("0", "1"):
                return {"skipped": "one GPU, and NCCL takes one rank a GPU"}
        return train_command(here, 2)

    yield "alone", functools.partial(train_command, here, 1)
    yield "torchrun", torchrun


def sample_full(here: Probe, policy: Any) -> Found:
    """At the default budget, as many completions as the memory would hold at once, and more."""
    from companion.tutor import make_rows

    new, each = here.size(192, 8), here.size(16, 2)
    config, free = policy.model.config, here.free_bytes()
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    of_a_token *= next(policy.model.parameters()).element_size()  # keys and values
    fitting = (free or 0) // (of_a_token * (60 + new))
    rows = max(each, min(2048, fitting * 11 // 10)) if here.gpu else 10
    prompts = [row["prompt"] for row in make_rows("prompts", rows // each, seed=2)]
    found: Found = {"free_bytes": free, "rows_that_fit": fitting if here.gpu else None}
    widths: list[int] = []
    hook = policy.model.register_forward_pre_hook(
        lambda _, given, named: widths.append(len(named["input_ids"])), with_kwargs=True
    )
    drawn: list[Any] = []
    begin = time.perf_counter()
    with logged() as said:
        found["peak_bytes"] = bytes_of(
            lambda: drawn.extend(policy.sample(prompts, each, max_new_tokens=new)), here.device
        )
    seconds = time.perf_counter() - begin
    hook.remove()
    found["rows_of_a_batch"] = max(widths)
    samples = [sample for several in drawn for sample in several]
    found["new_tokens"] = sum(sample.n_tokens for sample in samples)
    found |= {"tokens_a_second": found["new_tokens"] / seconds, "said": said}
    found["ok"] = all(np.isfinite(sample.logprob) for sample in samples)
    found["line"] = f"{len(samples)} completions, {max(widths)} at a time: "
    found["line"] += f"{found['tokens_a_second']:,.0f} tokens/s"
    if here.gpu:
        share = found["peak_bytes"] / found["free_bytes"]
        found["line"] += f", {share:.0%} of the free memory, {halvings(said)} halvings"
    return found


@part(0.1)
def sampling(here: Probe) -> Pieces:
    """The tutor base; then the large shape, whose random weights never end a text."""
    from companion import Policy
    from companion.tutor import TUTOR_BASE

    def tutor() -> Found:
        return sample_full(here, Policy.from_pretrained(TUTOR_BASE, device=here.device))

    def large() -> Found:
        from transformers import Qwen3ForCausalLM

        torch.manual_seed(0)
        with here.device:
            model: Any = Qwen3ForCausalLM(make_config(here.shape))
        tokenizer = Policy.from_pretrained(TUTOR_BASE, device="cpu").tokenizer
        return sample_full(here, Policy(model.to(here.half).eval(), tokenizer))

    yield "tutor base", tutor
    yield f"{here.shape}, random weights", large


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    return session((__doc__ or "").splitlines()[0], arguments)


if __name__ == "__main__":
    os.environ.setdefault(ALL_GPUS, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    os.environ["CUDA_VISIBLE_DEVICES"] = (os.environ[ALL_GPUS] or "0").split(",")[0]
    sys.exit(main())
