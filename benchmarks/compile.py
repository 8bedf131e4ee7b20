"""Where ``torch.compile`` pays: ``python -m benchmarks.compile``. It needs a C++ compiler.

Compiled once for all lengths (``dynamic=True``): the whole backbone, which takes padded batches
only, since a packed batch has another layout each time; or, packed, just the parts of a layer that
look at one token at a time (norms and MLP), whose shape does not know of texts. What the first call
costs beyond a later one is the time to compile; caches on the disk are off.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor.utils import clear_caches

from benchmarks.measuring import Outcome, ratio, table, take_turns
from benchmarks.results import add_arguments, save
from benchmarks.shapes import PAD, USUAL, make_model, mixed_lengths, pairs
from companion import bradley_terry_loss
from companion.engine import BatchRunner, compile_parts, packed_scores, reward_scores
from companion.training import PairCollator

#: Method -> whether batches are packed, and what of the model is compiled. The first is the base.
METHODS: dict[str, tuple[bool, str]] = {
    "packed": (True, "nothing"),
    "packed, norms and MLPs compiled": (True, "parts"),
    "padded": (False, "nothing"),
    "padded, all compiled": (False, "all"),
}
#: Largest difference of the mean score, or of the loss of a step, that rounding explains.
_TOLERANCE = 1e-3


def compile_model(model: Any, what: str) -> None:
    """Compile in place: ``nothing``, ``parts`` (norms and MLPs) or ``all`` (the backbone)."""
    if what == "all":
        model.model.compile(dynamic=True)
    if what == "parts":
        compile_parts(model)


def scoring(shape: str, quick: bool) -> dict[str, Callable[[], Outcome]]:
    """Texts of mixed lengths; ``check`` is the mean score."""
    ids = mixed_lengths(16 if quick else {"tiny": 128, "small": 32}[shape])

    def method(packed: bool, what: str) -> Callable[[], Outcome]:
        model = make_model(shape, torch.device("cpu")).eval()
        compile_model(model, what)
        runner = BatchRunner(model, PAD, packing="auto" if packed else "off")

        def run() -> Outcome:
            mean = float(runner.run(ids).mean())
            return Outcome(runner.tokens[1], mean)

        return run

    return {name: method(*how) for name, how in METHODS.items()}


def training(shape: str, quick: bool) -> dict[str, Callable[[], Outcome]]:
    """An epoch of steps of 8 pairs, each from the same weights; ``check`` is the mean loss."""
    rows = pairs(16 if quick else {"tiny": 40, "small": 16}[shape])

    def method(packed: bool, what: str) -> Callable[[], Outcome]:
        model = make_model(shape, torch.device("cpu")).train()
        collator = PairCollator(PAD, config=model.config, packing=packed)
        batches = [collator(rows[i : i + 8]) for i in range(0, len(rows), 8)]
        compile_model(model, what)
        before = copy.deepcopy(model.state_dict())

        def run() -> Outcome:
            model.load_state_dict(before)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            total = 0.0
            for batch in batches:
                if packed:
                    scores = packed_scores(model, batch["packed"])
                else:
                    ids, mask = batch["input_ids"], batch["attention_mask"]
                    scores = reward_scores(model, ids, mask, check=False)
                loss = bradley_terry_loss(*scores.chunk(2)).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item()
            return Outcome(sum(b["input_ids"].numel() for b in batches), total / len(batches))

        return run

    return {name: method(*how) for name, how in METHODS.items()}


def compare(runs: Mapping[str, Callable[[], Outcome]], rounds: int) -> list[dict[str, Any]]:
    """First calls, then rounds in turn; one row a method."""
    first = {}
    for name, run in runs.items():
        begin = time.perf_counter()
        run()
        first[name] = time.perf_counter() - begin
    timed = take_turns({n: lambda r=r: r for n, r in runs.items()}, rounds, torch.device("cpu"))  # type: ignore[misc]
    base = next(iter(timed.values()))
    rows = []
    for name, found in timed.items():
        gap = abs(found.outcome.check - base.outcome.check)
        if not gap <= _TOLERANCE:
            raise SystemExit(f"{name}: differs by {gap:.3g} from {next(iter(timed))}")
        times = ratio(base, found)
        compiling = first[name] - found.median if "compiled" in name else None
        rows.append(
            {
                "method": name,
                "seconds": found.median,
                "times faster": times["median"],
                "least": times["least"],
                "most": times["most"],
                "seconds to compile": compiling,
            }
        )
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--shapes", nargs="+", choices=list(USUAL), default=["tiny"])
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.compiler.config.force_disable_caches = True
    cases = []
    for shape in args.shapes:
        for work, make in (("scoring", scoring), ("training", training)):
            torch.compiler.reset()  # else a case would take over what the one before it compiled
            clear_caches()
            rows = compare(make(shape, args.quick), args.rounds)
            cases.append({"shape": shape, "work": work, "methods": rows})
            print(f"\ncompile, {work}, {shape}")
            print(table(rows), "\n")
    print(f"written: {save('compile', {'cases': cases}, args)}")


if __name__ == "__main__":
    main()
