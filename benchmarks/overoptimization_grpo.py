"""Proxy and gold against KL under GRPO: ``python -m benchmarks.overoptimization_grpo``.

The other half of the curves of Gao, Schulman and Hilton (2023, arXiv 2210.10760): the tutor base is
trained against reward models of :mod:`benchmarks.overoptimization` by ``companion train grpo``,
without a KL penalty and without a budget, while gold is measured on held-out prompts. The proxies
that spoil it are run once more with gold as the held-out scorer, so that the monitor may stop them.
What is finished lies in ``--work`` and is not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets.utils.logging import disable_progress_bar

from benchmarks.measuring import table
from benchmarks.overoptimization import ENSEMBLE, PROXIES, Proxy, once, train
from benchmarks.results import add_arguments, save
from companion import Policy, bootstrap_interval, open_reward
from companion.rl import (
    GRPORunConfig,
    Look,
    PolicyArguments,
    PromptArguments,
    train_grpo,
)
from companion.tutor import TUTOR_BASE, make_rows

PROMPTS_SEED, SCALE_SEED = 903, 904
GOLD, RIGHT = "companion.tutor:gold_rewards", "companion.tutor:right_answers"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """What the policy is trained on: reward models whose scores are added."""

    name: str
    proxies: tuple[str, ...]
    watched: bool = False  #: run it once more with the monitor


CASES = (
    Case("6 layers, 250 pairs", ("6 layers, 250 pairs",), watched=True),
    Case("6 layers, 4000 pairs", ("6 layers, 4000 pairs",)),
    Case("2 layers, 1000 pairs", ("2 layers, 1000 pairs",)),
    Case("4 models, mean", ENSEMBLE),
)


# --- the rewards ------------------------------------------------------------------------------


def stem(name: str) -> str:
    """A name as that of a folder."""
    return name.replace(", ", "-").replace(" ", "_")


def measure_rewards(folders: dict[str, Path], prompts: int) -> dict[str, list[float | None]]:
    """Scores of the proxies, and gold, for eight completions of the policy to each prompt."""
    asked = [row["prompt"] for row in make_rows("prompts", prompts, seed=SCALE_SEED)]
    drawn = Policy.from_pretrained(TUTOR_BASE).sample(asked, 8, max_new_tokens=64, seed=1)
    columns: dict[str, list[Any]] = {
        "prompts": [prompt for prompt, group in zip(asked, drawn, strict=True) for _ in group],
        "completions": [[{"role": "assistant", "content": s.text}] for g in drawn for s in g],
        "completion_ids": [sample.token_ids for group in drawn for sample in group],
    }
    sources = {"gold": GOLD, **{name: str(folder) for name, folder in folders.items()}}
    return {name: list(open_reward(source)(**columns)) for name, source in sources.items()}


def weigh(case: Case, measured: dict[str, Array]) -> tuple[list[float], float]:
    """Weights that put the sum of a case's rewards on the scale of gold, and what to add to it.

    Each proxy counts alike, in its own standard deviations.
    """
    gold = measured["gold"]
    spread = {name: float(measured[name].std()) for name in case.proxies}
    total = np.sum([measured[name] / spread[name] for name in case.proxies], axis=0)
    scale = gold.std() / total.std()
    return [float(scale / s) for s in spread.values()], float(gold.mean() - scale * total.mean())


# --- one run ----------------------------------------------------------------------------------


def run(
    case: Case, weights: list[float], seed: int, watched: bool, args: argparse.Namespace
) -> dict[str, Any]:
    """One run of GRPO: all its looks, and the figures on prompts that nothing was chosen by."""
    begin = time.process_time()
    folder = args.work / "grpo" / f"{stem(case.name)}-{seed}{'-watched' if watched else ''}"
    result = train_grpo(
        GRPORunConfig(
            output_dir=str(folder),
            reward_model=[str(args.work / stem(name)) for name in case.proxies],
            reward_weights=weights,
            held_out_scorer=GOLD if watched else None,
            also_measure=[RIGHT] if watched else [RIGHT, GOLD],
            monitor_steps=max(1, args.every // 2) if watched else args.every,
            monitor_completions=args.completions,
            max_steps=args.steps,
            num_train_epochs=100,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=64,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            beta=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        PolicyArguments(model_name_or_path=str(TUTOR_BASE)),
        PromptArguments(
            dataset_name=str(args.work / "prompts.jsonl"),
            monitor_prompts=args.prompts,
            test_prompts=args.prompts,
        ),
        say=lambda line: None,
    )
    looks = {"start": result.start, "kept": result.best, "end": result.end}
    return {
        "seed": seed,
        "steps": result.steps,
        "reason": result.reason,
        "best_step": result.best_step,
        "looks": [as_plain(look) for look in result.monitor.looks],
        "test": {name: as_plain(look) for name, look in looks.items()},
        "seconds": time.process_time() - begin,
    }


def as_plain(look: Look) -> dict[str, Any]:
    """A look as JSON, whose scorers have the same names in all runs."""
    names = {"gold_rewards": "gold", "right_answers": "correct"}
    plain = look.to_dict()
    plain["figures"] = {names.get(name, name): v for name, v in plain["figures"].items()}
    return plain


# --- many runs --------------------------------------------------------------------------------


def table_of(looks: Sequence[dict[str, Any]], name: str) -> Array:
    """``[looks, prompts]``: one figure; NaN where it is missing."""
    return np.array([look["figures"][name] for look in looks], dtype=np.float64)


def summarise(values: Array) -> dict[str, float]:
    """``[seeds, prompts]``: the mean, and its 95% interval over prompts."""
    each = np.nanmean(values[:, np.isfinite(values).any(axis=0)], axis=0)
    interval = bootstrap_interval(each)
    return {
        "mean": round(float(each.mean()), 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
    }


def curves(runs: Sequence[dict[str, Any]], shift: float) -> dict[str, Any]:
    """Proxy (on gold's scale), gold and what else was measured, look by look."""
    out: dict[str, Any] = {"steps": [look["step"] for look in runs[0]["looks"]]}
    for name in ("kl", "proxy", "gold", "correct"):
        values = np.stack([table_of(one["looks"], name) for one in runs])
        values = values + (shift if name == "proxy" else 0.0)
        rows = [summarise(values[:, k]) for k in range(values.shape[1])]
        out[name] = {key: [row[key] for row in rows] for key in ("mean", "low", "high")}
        out[name]["each_seed"] = np.nanmean(values, axis=2).round(4).tolist()
    out["tokens"] = np.mean([[x["length"] for x in r["looks"]] for r in runs], 0).round(2).tolist()
    out["seconds"] = round(sum(one["seconds"] for one in runs), 1)
    gold = out["gold"]["mean"]
    best = int(np.argmax(gold))
    lost = np.stack([table_of(one["looks"], "gold") for one in runs])
    out["best_step"] = out["steps"][best]
    out["gold_lost"] = summarise(lost[:, best] - lost[:, -1])
    return out


def against_watched(
    free: Sequence[dict[str, Any]], watched: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Gold on the test prompts, against the start: where the monitor stopped, and without it."""

    def change(runs: Sequence[dict[str, Any]], where: str) -> Array:
        looks = [(one["test"][where], one["test"]["start"]) for one in runs]
        return np.stack([np.subtract(*table_of(pair, "gold")) for pair in looks])

    return {
        "stopped_at": [one["steps"] for one in watched],
        "reasons": [one["reason"] for one in watched],
        "kept_step": [one["best_step"] for one in watched],
        "kl_at_stop": [
            round(float(np.mean(one["test"]["end"]["figures"]["kl"])), 2) for one in watched
        ],
        "gain_at_stop": summarise(change(watched, "end")),
        "gain_at_stop_each_seed": change(watched, "end").mean(1).round(4).tolist(),
        "gain_of_kept": summarise(change(watched, "kept")),
        "gain_without": summarise(change(free, "end")),
        "gain_without_each_seed": change(free, "end").mean(1).round(4).tolist(),
    }


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All stages, each kept when it is done."""
    work: Path = args.work
    begin = time.process_time()

    def say(what: str) -> None:
        print(f"{time.process_time() - begin:6.0f} s  {what}", flush=True)

    wanted = [p for p in args.proxies if any(p.name in case.proxies for case in args.cases)]
    folders = {proxy.name: work / stem(proxy.name) for proxy in wanted}
    for proxy in wanted:
        if not (folders[proxy.name] / "model.safetensors").is_file():
            say(f"{proxy.name}: accuracy {train(proxy, folders[proxy.name]):.3f}")
    file = work / "prompts.jsonl"
    if not file.is_file():
        rows = make_rows("prompts", 3000, seed=PROMPTS_SEED)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = once(work / "scale.json", lambda: measure_rewards(folders, args.prompts))
    whole = {name: np.array(values, dtype=np.float64) for name, values in found.items()}
    # an empty completion has no score: it gets the lowest, as in the study of best-of-n
    measured = {name: np.where(np.isnan(v), np.nanmin(v), v) for name, v in whole.items()}

    def done(case: Case, weights: list[float], watched: bool) -> list[dict[str, Any]]:
        runs = []
        for seed in range(args.seeds):
            name = f"{stem(case.name)}-{seed}{'-watched' if watched else ''}.json"
            one = once(work / name, partial(run, case, weights, seed, watched, args))
            say(f"{name}: {one['steps']} steps, {one['reason'] or 'to the end'}")
            runs.append(one)
        return runs

    rows = []
    for case in args.cases:
        weights, shift = weigh(case, measured)
        free = done(case, weights, False)
        row = {**asdict(case), "weights": weights, **curves(free, shift)}
        if case.watched:
            row["monitor"] = against_watched(free, done(case, weights, True))
        rows.append(row)
    return {
        "policy": "tutor base, temperature 1",
        "seeds": args.seeds,
        "learning_rate": args.learning_rate,
        "prompts": args.prompts,
        "completions": args.completions,
        "cases": rows,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimization_grpo"))
    parser.add_argument("--seeds", type=int, help="runs of each case; default 2, quick 1")
    parser.add_argument("--steps", type=int, help="of a run; default 27, quick 2")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--every", type=int, help="steps between looks; default 3, quick 1")
    args = parser.parse_args()
    args.seeds = args.seeds or (1 if args.quick else 2)
    args.steps = args.steps or (2 if args.quick else 27)
    args.every = args.every or (1 if args.quick else 3)
    args.prompts, args.completions = (8, 2) if args.quick else (96, 2)
    args.cases, args.proxies = CASES, PROXIES
    if args.quick:
        args.proxies = (Proxy("2 layers, 32 pairs", 2, 32),)
        args.cases = (Case("2 layers, 32 pairs", ("2 layers, 32 pairs",), watched=True),)
        args.work = args.work / "quick"
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    figures = study(args)
    print(
        table(
            [
                {
                    "trained on": case["name"],
                    "KL at the end": case["kl"]["mean"][-1],
                    "gold at the start": case["gold"]["mean"][0],
                    "best": max(case["gold"]["mean"]),
                    "at step": case["best_step"],
                    "at the end": case["gold"]["mean"][-1],
                    "proxy at the end": case["proxy"]["mean"][-1],
                }
                for case in figures["cases"]
            ]
        )
    )
    print(f"written: {save('overoptimization_grpo', figures, args)}")


if __name__ == "__main__":
    main()
