"""Proxy and gold against KL under GRPO: ``python -m benchmarks.overoptimization_grpo``.

The other half of the curves of Gao, Schulman and Hilton (2023, arXiv 2210.10760): the tutor base is
trained against reward models of :mod:`benchmarks.overoptimization` by ``companion train grpo``,
without a KL penalty and without a budget, while gold is measured on held-out prompts. Each seed has
a reward model of its own, trained on other pairs: a case is a recipe for reward models, and its
intervals are over seeds and prompts. One case is run once more with gold as the held-out scorer, so
that the monitor may stop it. What is finished lies in ``--work`` and is not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets.utils.logging import disable_progress_bar

from benchmarks.measuring import table
from benchmarks.overoptimization import (
    Proxy,
    difference,
    figure_of,
    once,
    rounded,
    stem,
    trained,
)
from benchmarks.results import add_arguments, save
from companion import Policy, bootstrap_interval, open_reward
from companion.functional import bootstrap_runs
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
    """What the policy is trained on: reward models of one size, whose scores are added."""

    name: str
    layers: int  #: of the tutor base's six
    pairs: int
    members: int = 1  #: reward models of one run, each trained on other pairs
    watched: bool = False  #: run it once more with the monitor

    def proxies(self, seed: int) -> list[Proxy]:
        """The reward models of one run; no two runs share one."""
        one = Proxy(f"{self.layers} layers, {self.pairs} pairs", self.layers, self.pairs)
        return [replace(one, seed=seed + 10 * member) for member in range(self.members)]


CASES = (
    Case("6 layers, 250 pairs", 6, 250, watched=True),
    Case("2 layers, 1000 pairs", 2, 1000),
    Case("6 layers, 1000 pairs", 6, 1000),
    Case("6 layers, 4000 pairs", 6, 4000),
    Case("4 models, mean", 6, 250, members=4),
)


# --- the rewards ------------------------------------------------------------------------------


def draw(prompts: int) -> dict[str, list[Any]]:
    """Four completions of the policy to each prompt, as the columns that rewards are given."""
    asked = [row["prompt"] for row in make_rows("prompts", prompts, seed=SCALE_SEED)]
    drawn = Policy.from_pretrained(TUTOR_BASE).sample(asked, 4, max_new_tokens=64, seed=1)
    return {
        "prompts": [prompt for prompt, group in zip(asked, drawn, strict=True) for _ in group],
        "completions": [[{"role": "assistant", "content": s.text}] for g in drawn for s in g],
        "completion_ids": [sample.token_ids for group in drawn for sample in group],
    }


def measure(source: str | Path, columns: dict[str, list[Any]]) -> list[float | None]:
    """The rewards of what was drawn."""
    return list(open_reward(str(source))(**columns))


def filled(values: Sequence[float | None]) -> Array:
    """An empty completion has no score: it gets the lowest, as in the study of best-of-n."""
    found = np.array(values, dtype=np.float64)
    return np.where(np.isnan(found), np.nanmin(found), found)


def weigh(members: Sequence[Array], gold: Array) -> tuple[list[float], float]:
    """Weights that put the sum of a run's rewards on the scale of gold, and what to add to it.

    Each member counts alike, in its own standard deviations.
    """
    spread = [float(member.std()) for member in members]
    total = np.sum([member / s for member, s in zip(members, spread, strict=True)], axis=0)
    scale = gold.std() / total.std()
    return [float(scale / s) for s in spread], float(gold.mean() - scale * total.mean())


# --- one run ----------------------------------------------------------------------------------


def run(
    name: str,
    rewards: Sequence[Path],
    weights: list[float],
    seed: int,
    watched: bool,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One run of GRPO: all its looks, and the figures on prompts that nothing was chosen by."""
    begin = time.process_time()
    folder = args.work / "grpo" / name
    result = train_grpo(
        GRPORunConfig(
            output_dir=str(folder),
            reward_model=[str(folder) for folder in rewards],
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
    """``[seeds, prompts]``: the mean, and its 95% interval over seeds and prompts.

    The runs of all seeds are looked at on the same prompts.
    """
    values = values[:, np.isfinite(values).any(axis=0)]
    ends = bootstrap_runs(values) if len(values) > 1 else bootstrap_interval(values[0])
    return rounded(float(np.nanmean(values)), *ends)


def curves(runs: Sequence[dict[str, Any]], shift: float | Sequence[float]) -> dict[str, Any]:
    """Proxy (on gold's scale), gold and what else was measured, look by look."""
    out: dict[str, Any] = {"steps": [look["step"] for look in runs[0]["looks"]]}
    add = np.broadcast_to(shift, len(runs))[:, None, None]
    for name in ("kl", "proxy", "gold", "correct"):
        values = np.stack([table_of(one["looks"], name) for one in runs])
        values = values + (add if name == "proxy" else 0.0)
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


def largest_gold(drawn: Array) -> Array:
    """``[seeds]``: the most gold that each run reached, from ``[seeds, prompts, looks, 2]``."""
    return np.asarray(drawn[..., 0].mean(1).max(1))


def gold_at_end(drawn: Array) -> Array:
    """``[seeds]``: the gold of each run at its last look."""
    return np.asarray(drawn[:, :, -1, 0].mean(1))


def change_of_gold(drawn: Array) -> Array:
    """``[seeds]``: from the start to the end."""
    return gold_at_end(drawn) - np.asarray(drawn[:, :, 0, 0].mean(1))


def gold_gained(drawn: Array) -> Array:
    """``[seeds]``: from the start to the most; never negative."""
    return largest_gold(drawn) - np.asarray(drawn[:, :, 0, 0].mean(1))


def gold_lost(drawn: Array) -> Array:
    """``[seeds]``: from the most to the end; never negative."""
    return largest_gold(drawn) - gold_at_end(drawn)


def kl_at_turn(drawn: Array) -> Array:
    """``[seeds]``: the KL of each run at the look of its largest gold."""
    gold, kl = np.moveaxis(drawn.mean(1), -1, 0)
    return np.asarray(np.take_along_axis(kl, gold.argmax(1)[:, None], 1)[:, 0])


FIGURES: dict[str, Callable[[Array], Array]] = {
    "largest_gold": largest_gold,
    "gold_at_end": gold_at_end,
    "change_of_gold": change_of_gold,
    "gold_gained": gold_gained,
    "gold_lost": gold_lost,
    "kl_at_turn": kl_at_turn,
}


def gold_and_kl(runs: Sequence[dict[str, Any]]) -> Array:
    """``[seeds, prompts, looks, 2]``."""
    tables = [[table_of(one["looks"], name).T for name in ("gold", "kl")] for one in runs]
    return np.moveaxis(np.array(tables), 1, -1)


def each_run(drawn: Array) -> dict[str, Any]:
    """What can be read off each run alone: the mean, its interval, and the single seeds."""
    return {name: figure_of(drawn, figure) for name, figure in FIGURES.items()}


def compare(first: Array, second: Array) -> dict[str, Any]:
    """The same figures of two cases, first minus second, seed by seed on the same prompts."""
    both = np.stack([first, second], axis=-1)
    return {name: figure_of(both, partial(difference, figure)) for name, figure in FIGURES.items()}


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
        # on the same prompts, seed by seed
        "stop_minus_without": summarise(change(watched, "end") - change(free, "end")),
        "kept_minus_without": summarise(change(watched, "kept") - change(free, "end")),
    }


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All stages, each kept when it is done."""
    work: Path = args.work
    begin = time.process_time()

    def say(what: str) -> None:
        print(f"{time.process_time() - begin:6.0f} s  {what}", flush=True)

    work.mkdir(parents=True, exist_ok=True)
    file = work / "prompts.jsonl"
    if not file.is_file():
        rows = make_rows("prompts", 3000, seed=PROMPTS_SEED)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = once(work / "drawn.json", partial(draw, args.prompts))
    gold = filled(once(work / "scale-gold.json", partial(measure, GOLD, columns)))
    settings: dict[str, list[dict[str, Any]]] = {}

    def runs_of(case: Case, watched: bool) -> list[dict[str, Any]]:
        """A run for each seed."""
        runs = []
        settings[case.name] = []
        for seed in range(args.seeds):
            folders, accuracies, members = [], [], []
            for proxy in case.proxies(seed):
                folder, found = trained(proxy, args.models)
                scale = work / f"scale-{stem(proxy)}.json"
                members.append(filled(once(scale, partial(measure, folder, columns))))
                folders.append(folder)
                accuracies.append(found["accuracy"])
            weights, shift = weigh(members, gold)
            settings[case.name].append(
                {"weights": weights, "shift": shift, "accuracies": accuracies}
            )
            name = case.name.replace(", ", "-").replace(" ", "_")
            name = f"{name}-{seed}{'-watched' if watched else ''}"
            make = partial(run, name, folders, weights, seed, watched, args)
            runs.append(once(work / f"{name}.json", make))
            say(f"{name}: {runs[-1]['steps']} steps, {runs[-1]['reason'] or 'to the end'}")
        return runs

    free = {case.name: runs_of(case, False) for case in args.cases}
    drawn = {name: gold_and_kl(runs) for name, runs in free.items()}
    cases = []
    for case in args.cases:
        shifts = [one["shift"] for one in settings[case.name]]
        row = {
            **asdict(case),
            "rewards": settings[case.name],
            **curves(free[case.name], shifts),
            "each_run": each_run(drawn[case.name]),
        }
        if case.watched and not args.unwatched:
            row["monitor"] = against_watched(free[case.name], runs_of(case, True))
        cases.append(row)
    return {
        "policy": "tutor base, temperature 1",
        "seeds": args.seeds,
        "learning_rate": args.learning_rate,
        "prompts": args.prompts,
        "completions": args.completions,
        "cases": cases,
        "differences": [
            {"first": first, "second": second, **compare(drawn[first], drawn[second])}
            for first, second in combinations(drawn, 2)
        ],
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimization_grpo"))
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("runs/reward_models"),
        help="the reward models, which benchmarks.overoptimization shares",
    )
    parser.add_argument("--seeds", type=int, help="runs of each case; default 5, quick 2")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--unwatched", action="store_true", help="no runs with the monitor")
    parser.add_argument("--steps", type=int, help="of a run; default 18, quick 2")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--every", type=int, help="steps between looks; default 3, quick 1")
    args = parser.parse_args()
    args.seeds = args.seeds or (2 if args.quick else 5)
    args.steps = args.steps or (2 if args.quick else 18)
    args.every = args.every or (1 if args.quick else 3)
    args.prompts, args.completions = (8 if args.quick else 96), 1
    args.cases = CASES[: args.cases]
    if args.quick:
        args.cases = (
            Case("2 layers, 64 pairs", 2, 64, watched=True),
            Case("2 models, mean", 2, 64, members=2),
        )
        args.work = args.work / "quick"
        args.models = args.models / "quick"
    if args.threads:
        torch.set_num_threads(args.threads)
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
