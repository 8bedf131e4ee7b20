"""The body of ``scoring`` and ``best_of_n``: all shapes, all methods, one table, one file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import matmul_peak, ratio, table, take_turns
from benchmarks.methods import Method, scoring_methods
from benchmarks.results import add_arguments, save
from benchmarks.shapes import PAD, SHAPES, USUAL, TokenIds, make_model, needed_tokens, useful_flops
from companion.engine import BatchRunner

#: largest difference of the mean score that rounding explains
_TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line, and set the threads."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), help="default: tiny and small, quick: tiny"
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(_TOLERANCE))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budgets", nargs="*", type=int, default=[], help="further budgets")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.shapes = args.shapes or (["tiny"] if args.quick else list(USUAL))
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def compare(name: str, args: argparse.Namespace, texts: Callable[[str], TokenIds]) -> None:
    """Measure, print, and write the file; `texts` makes the work for a shape."""
    device = torch.device(args.device)
    cases = []
    for shape in args.shapes:
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            model = make_model(shape, device, dtype).eval()
            case = one_case(model, texts(shape), args, device, dtype)
            if dtype != torch.float32:
                case["deviation"] = deviation(model, make_model(shape, device), texts(shape))
                print(case["deviation"])
            cases.append({"shape": shape, "dtype": dtype_name, **case})
            print(f"\n{name}, {shape}, {dtype_name}, {case['texts']} texts")
            print(table(case["methods"]), "\n")
    growth = grow(args, device, texts)
    print(table(growth))
    print(f"written: {save(name, {'cases': cases, 'growth': growth}, args)}")


def one_case(
    model: Any, ids: TokenIds, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All methods of :func:`scoring_methods` on one model."""
    methods = scoring_methods(model, ids, [*args.budgets, None])
    return timed_case(methods, model, ids, args, device, dtype)


def timed_case(
    methods: Mapping[str, Method | None],
    model: Any,
    ids: TokenIds,
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Methods in turn, each with the same mean score; None is one that is not installed."""
    there = {name: method for name, method in methods.items() if method is not None}
    timed = take_turns(there, args.rounds, device)
    base = next(iter(timed.values()))
    for method, found in timed.items():
        gap = abs(found.outcome.check - base.outcome.check)
        if gap > _TOLERANCE[str(dtype).removeprefix("torch.")]:
            raise SystemExit(f"{method}: the mean score differs by {gap:.3g}")
    peak = matmul_peak(dtype, device, quick=args.quick)
    flops, needed = useful_flops(model, ids), needed_tokens(ids)
    all_tokens = sum(map(len, ids))
    rows: list[dict[str, Any]] = []
    for method in methods:
        if method not in timed:
            rows.append({"method": f"{method} (not installed)", **dict.fromkeys(list(rows[0])[1:])})
            continue
        found = timed[method]
        times = ratio(base, found)
        rows.append(
            {
                "method": method,
                "seconds": found.median,
                "times faster": times["median"],
                "least": times["least"],
                "most": times["most"],
                "text tokens/s": all_tokens / found.median,
                "needed/computed": needed / found.outcome.computed,
                "share of peak": flops / found.median / peak,
                "peak MiB": found.peak_mib,
            }
        )
    return {
        "texts": len(ids),
        "text_tokens": all_tokens,
        "needed_tokens": needed,
        "matmul_peak_flops": peak,
        "methods": rows,
        "seconds": {method: found.seconds for method, found in timed.items()},
    }


def deviation(model: Any, exact: Any, ids: TokenIds) -> dict[str, float]:
    """How far the scores of a model lie from those of its float32 twin, beside their own spread."""
    found, want = (BatchRunner(m, PAD).run(ids).astype(np.float64) for m in (model, exact.eval()))
    gap = np.abs(found - want)
    return {
        "spread": float(want.std()),
        "typical": float(np.sqrt((gap**2).mean())),
        "largest": float(gap.max()),
    }


def grow(
    args: argparse.Namespace, device: torch.device, texts: Callable[[str], TokenIds]
) -> list[dict[str, Any]]:
    """How the companion's time grows from 1 to 100 times the work (tiny shape)."""
    model = make_model("tiny", device).eval()
    few = texts("tiny")[:4]
    rows = []
    for factor in (1, 10) if args.quick else (1, 10, 100):
        # each copy begins with a token of its own, so that copies share nothing
        ids = [[2 + k, *item] for k in range(factor) for item in few]
        methods = scoring_methods(model, ids, [None])
        timed = take_turns({"companion": methods["companion"]}, args.rounds, device, lambda _: None)
        seconds = timed["companion"].median
        rows.append({"work": factor, "seconds": seconds, "seconds/work": seconds / factor})
    return rows
