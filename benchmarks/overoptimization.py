"""Proxy and gold against KL under best-of-n: ``python -m benchmarks.overoptimization``.

The curves of Gao, Schulman and Hilton (2023, arXiv 2210.10760) on the tutor, whose gold reward is
known: reward models of several depths and numbers of pairs choose among completions of the tutor
base. Each size is five reward models, each trained on other pairs, and its intervals are over
reward models and prompts. The completions and their gold are drawn once, for all of them. What is
finished lies in ``--work`` and ``--models`` and is not done again, so a run that was stopped goes
on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from benchmarks.measuring import table
from benchmarks.results import add_arguments, save
from companion import (
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    RewardScorer,
    bootstrap_interval,
    load_base,
    save_reward_model,
)
from companion.functional import (
    best_of_n_curve,
    bootstrap_runs,
    ensemble_scores,
    pairwise_accuracy,
)
from companion.tutor import TUTOR_BASE, grade, make_rows

BIAS = 0.8
POLICY_SEED, PAIRS_SEED, TEST_SEED = 900, 700, 800
MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Proxy:
    """A reward model of the study."""

    name: str
    layers: int  #: of the tutor base's six
    pairs: int
    dials: dict[str, float] = field(default_factory=dict)
    seed: int = 0


BIASED = "6 layers, 1000 pairs, long preferred"
#: Each is trained from several seeds. Those of a seed share the first of their pairs.
SIZES = (
    Proxy("2 layers, 250 pairs", 2, 250),
    Proxy("2 layers, 1000 pairs", 2, 1000),
    Proxy("6 layers, 250 pairs", 6, 250),
    Proxy("6 layers, 1000 pairs", 6, 1000),
    Proxy("6 layers, 4000 pairs", 6, 4000),
    Proxy(BIASED, 6, 1000, {"length_bias": BIAS}),
)
ENSEMBLE = "6 layers, 250 pairs"

Array = npt.NDArray[np.float64]


# --- the pool ---------------------------------------------------------------------------------


@torch.inference_mode()
def draw_counts(
    model: Any, tokenizer: Any, prompt: Any, n: int, rng: np.random.Generator
) -> list[tuple[str, int, bool]]:
    """Draw `n` completions at temperature 1, as (text, how often, whether it ended by itself).

    All completions that begin alike are one row of the batch with a count, and the count is split
    by a multinomial draw at each token. The counts have exactly the distribution of n independent
    draws, for a fifth of the tokens.
    """
    from transformers import DynamicCache

    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    cache = DynamicCache()
    logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    rows: list[tuple[tuple[int, ...], int]] = [((), n)]
    done: list[tuple[tuple[int, ...], int, bool]] = []
    for _ in range(MAX_NEW_TOKENS):
        chances = logits.double().softmax(-1).numpy()
        parents, children = [], []
        for place, (tokens, count) in enumerate(rows):
            drawn = rng.multinomial(count, chances[place] / chances[place].sum())
            for token in np.flatnonzero(drawn).tolist():
                if token == tokenizer.eos_token_id:
                    done.append((tokens, int(drawn[token]), True))
                else:
                    parents.append(place)
                    children.append(((*tokens, token), int(drawn[token])))
        rows = children
        if not rows:
            break
        cache.batch_select_indices(torch.tensor(parents))
        last = torch.tensor([[tokens[-1]] for tokens, _ in rows])
        logits = model(last, past_key_values=cache, use_cache=True).logits[:, -1]
    done += [(tokens, count, False) for tokens, count in rows]
    return [(tokenizer.decode(tokens), count, ended) for tokens, count, ended in done]


def make_pool(prompts: int, n: int) -> list[dict[str, Any]]:
    """For each prompt its distinct completions, with their counts and what is true of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TUTOR_BASE)
    model = AutoModelForCausalLM.from_pretrained(TUTOR_BASE, dtype=torch.float32).eval()
    rng = np.random.default_rng(POLICY_SEED)
    pool = []
    for row in make_rows("prompts", prompts, seed=POLICY_SEED):
        drawn = draw_counts(model, tokenizer, row["prompt"], n, rng)
        grades = [grade(row["prompt"][0]["content"], text) for text, _, _ in drawn]
        pool.append(
            {
                "prompt": row["prompt"],
                "texts": [text for text, _, _ in drawn],
                "counts": [count for _, count, _ in drawn],
                "ended": [ended for _, _, ended in drawn],
                "gold": [g.reward for g in grades],
                "correct": [float(g.correct) for g in grades],
                "words": [float(g.n_words) for g in grades],
            }
        )
    return pool


def spread(pool: Sequence[dict[str, Any]], values: Sequence[Sequence[float]]) -> torch.Tensor:
    """``[P, M]`` from one value for each distinct completion; each as often as it was drawn."""
    rows = [np.repeat(v, item["counts"]) for v, item in zip(values, pool, strict=True)]
    return torch.tensor(np.stack(rows))


# --- the proxies ------------------------------------------------------------------------------


def train(proxy: Proxy, folder: Path) -> float:
    """Train a reward model on the lowest layers of the tutor base; return its held-out accuracy."""
    base = load_base(TUTOR_BASE, head_seed=proxy.seed)
    base.model.model.layers = base.model.model.layers[: proxy.layers]
    base.model.config.num_hidden_layers = proxy.layers
    base.model.config.layer_types = base.model.config.layer_types[: proxy.layers]
    rows = make_rows("pairs", proxy.pairs, seed=PAIRS_SEED + proxy.seed, **proxy.dials)
    with TemporaryDirectory() as scratch:
        trainer = PairwiseRewardTrainer(
            model=base,
            args=PairwiseRewardConfig(
                scratch,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                per_device_train_batch_size=32,
                train_sampling_strategy="group_by_length",
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                seed=proxy.seed,
            ),
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
    trained = trainer.reward_model()
    save_reward_model(trained, folder)
    test = RewardScorer(trained).score_pairs(make_rows("pairs", 1000, seed=TEST_SEED))
    right = pairwise_accuracy(torch.tensor(test.chosen), torch.tensor(test.rejected))
    return float(right.mean())


def stem(proxy: Proxy) -> str:
    """Its name and seed, as that of a file."""
    return f"{proxy.name}-{proxy.seed}".replace(", ", "-").replace(" ", "_")


def trained(proxy: Proxy, models: Path) -> tuple[Path, dict[str, Any]]:
    """Its folder, trained if it is not there yet, its held-out accuracy and the CPU seconds."""
    folder = models / stem(proxy)

    def make() -> dict[str, Any]:
        start = time.process_time()
        return {"accuracy": train(proxy, folder), "seconds": time.process_time() - start}

    return folder, once(models / f"{stem(proxy)}.json", make)


def score_pool(folder: Path, pool: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Scores of the distinct completions. An empty one, which has no score, gets the lowest."""
    rows = [
        {"prompt": item["prompt"], "completion": text, "terminated": ended}
        for item in pool
        for text, ended in zip(item["texts"], item["ended"], strict=True)
    ]
    raw = RewardScorer.from_pretrained(folder).score(rows, on_error="skip").raw
    raw = np.where(np.isnan(raw), np.nanmin(raw), raw)
    ends = np.cumsum([len(item["texts"]) for item in pool])[:-1]
    return [part.round(5).tolist() for part in np.split(raw, ends)]


# --- the curves -------------------------------------------------------------------------------


def on_gold_scale(scores: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """Scores with the mean and the spread that gold has over the policy's own samples."""
    return (scores - scores.mean()) / scores.std() * gold.std() + gold.mean()


def without_length(scores: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Scores minus their slope on the length within the prompts, by least squares."""
    x = words - words.mean(1, keepdim=True)
    y = scores - scores.mean(1, keepdim=True)
    return scores - (x * y).sum() / x.square().sum() * x


def rounded(mean: float, low: float, high: float) -> dict[str, float]:
    """A figure and its interval as JSON."""
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def figure_of(values: Array, figure: Callable[[Array], Array]) -> dict[str, Any]:
    """A figure of each run, from ``[runs, prompts, ...]`` to ``[runs]``: the mean and its interval.

    The interval is over runs and prompts, the same prompts for all runs; that of a single run is
    over prompts alone, and says nothing of other runs.
    """
    single = figure(values)
    if len(single) > 1:
        ends = bootstrap_runs(values, statistic=lambda drawn: float(figure(drawn).mean()))
    else:
        ends = bootstrap_interval(
            values[0] if values.ndim > 2 else values[0][:, None],
            statistic=lambda drawn: float(figure(drawn.reshape(1, *values.shape[1:])).mean()),
        )
    return {**rounded(float(single.mean()), *ends), "each_seed": single.round(4).tolist()}


def rows_of(values: Array) -> dict[str, Any]:
    """``[runs, prompts, n]``: for each n the mean, its interval, and the single runs."""
    found = [
        figure_of(values[:, :, k], lambda drawn: drawn.mean(1)) for k in range(values.shape[2])
    ]
    rows: dict[str, Any] = {key: [one[key] for one in found] for key in ("mean", "low", "high")}
    return {**rows, "each_seed": values.mean(1).round(4).tolist()}


def largest_gold(gold: Array) -> Array:
    """``[runs]``: the most gold that each run reached, from ``[runs, prompts, n]``."""
    return np.asarray(gold.mean(1).max(1))


def gold_at_end(gold: Array) -> Array:
    """``[runs]``: gold at the largest n."""
    return np.asarray(gold.mean(1)[:, -1])


def gold_lost(gold: Array) -> Array:
    """``[runs]``: what gold has lost at the largest n since its best."""
    return largest_gold(gold) - gold_at_end(gold)


def doublings_to_turn(gold: Array) -> Array:
    """``[runs]``: the binary logarithm of the n at which gold turns (each n is twice the last)."""
    return np.asarray(gold.mean(1).argmax(1).astype(np.float64))


FIGURES: dict[str, Callable[[Array], Array]] = {
    "largest_gold": largest_gold,
    "gold_at_end": gold_at_end,
    "gold_lost": gold_lost,
    "doublings_to_turn": doublings_to_turn,
}


def describe(
    name: str,
    scores: Sequence[torch.Tensor],
    truth: dict[str, torch.Tensor],
    ns: Sequence[int],
) -> tuple[dict[str, Any], Array]:
    """The curves of some reward models of one size, and the gold ``[models, prompts, n]``."""

    def curve(values: Sequence[torch.Tensor]) -> Array:
        found = [best_of_n_curve(s, ns, v).per_prompt for s, v in zip(scores, values, strict=True)]
        return np.stack([np.asarray(one, dtype=np.float64) for one in found])

    gold = curve([truth["gold"]] * len(scores))
    row = {
        "name": name,
        "best_n": int(ns[int(gold.mean((0, 1)).argmax())]),
        "turns": [int(ns[k]) for k in gold.mean(1).argmax(1)],
        **{key: figure_of(gold, figure) for key, figure in FIGURES.items()},
        "proxy": rows_of(curve([on_gold_scale(s, truth["gold"]) for s in scores])),
        "gold": rows_of(gold),
        **{
            key: curve([truth[key]] * len(scores)).mean((0, 1)).round(4).tolist()
            for key in ("correct", "words")
        },
    }
    return row, gold


def difference(figure: Callable[[Array], Array], both: Array) -> Array:
    """``[runs]``: a figure of the first of two minus that of the second."""
    return figure(both[..., 0]) - figure(both[..., 1])


def compare(first: Array, second: Array) -> dict[str, Any]:
    """The same figures of two sizes, first minus second, seed by seed on the same prompts."""
    both = np.stack([first, second], axis=-1)
    return {name: figure_of(both, partial(difference, figure)) for name, figure in FIGURES.items()}


def once(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, kept in a file of JSON."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        done = make()
        path.with_suffix(".part").write_text(json.dumps(done), encoding="utf-8")
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text(encoding="utf-8"))


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All stages, each kept when it is done."""
    work: Path = args.work
    begin = time.process_time()

    def say(what: str) -> None:
        print(f"{time.process_time() - begin:6.0f} s  {what}", flush=True)

    pool = once(work / "pool.json", lambda: make_pool(args.prompts, args.samples))
    say(f"pool: {args.samples} completions of {len(pool)} prompts")
    truth = {
        key: spread(pool, [item[key] for item in pool]) for key in ("gold", "correct", "words")
    }
    ns = [2**k for k in range(args.samples.bit_length())]
    scores: dict[str, list[torch.Tensor]] = {}
    golds: dict[str, Array] = {}
    rows = []
    for size in args.sizes:
        found, facts = [], []
        for seed in range(args.seeds):
            proxy = replace(size, seed=seed)
            folder, fact = trained(proxy, args.models)
            file = work / f"scores-{stem(proxy)}.json"
            found.append(spread(pool, once(file, partial(score_pool, folder, pool))))
            facts.append(fact)
            say(f"{stem(proxy)}: accuracy {fact['accuracy']:.3f}")
        row, golds[size.name] = describe(size.name, found, truth, ns)
        scores[size.name] = found
        accuracy, seconds = ([fact[key] for fact in facts] for key in ("accuracy", "seconds"))
        about = {**asdict(size), "accuracy": float(np.mean(accuracy))}
        about |= {"accuracies": accuracy, "seconds": float(np.sum(seconds))}
        rows.append({**about, **row})
    cures = []
    if len(members := scores.get(ENSEMBLE, [])) > 1:
        # one ensemble of all its seeds: its interval is over prompts, and it is not ranked
        scaled = torch.stack([on_gold_scale(member, truth["gold"]) for member in members])
        for how in ("mean", "worst"):
            together = ensemble_scores(scaled, how)  # type: ignore[arg-type]
            cures.append(describe(f"{len(members)} models, {how}", [together], truth, ns)[0])
    if BIASED in scores:
        plain = [without_length(each, truth["words"]) for each in scores[BIASED]]
        name = "long preferred, length taken out"
        row, golds[name] = describe(name, plain, truth, ns)
        cures.append(row)
    limit, _ = describe("gold itself", [truth["gold"]], truth, ns)
    return {
        "policy": "tutor base, temperature 1",
        "prompts": len(pool),
        "samples": args.samples,
        "seeds": args.seeds,
        "n": ns,
        "kl": best_of_n_curve(truth["gold"], ns).kl.round(4).tolist(),
        "proxies": rows,
        "cures": cures,
        "differences": [
            {"first": first, "second": second, **compare(golds[first], golds[second])}
            for first, second in combinations(golds, 2)
        ],
        "limit": limit,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimization"))
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("runs/reward_models"),
        help="the reward models, which benchmarks.overoptimization_grpo shares",
    )
    parser.add_argument("--prompts", type=int, help="default 16, quick 4")
    parser.add_argument("--samples", type=int, help="of each prompt; default 512, quick 32")
    parser.add_argument("--seeds", type=int, help="models of each size; default 5, quick 2")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="only the first so many")
    args = parser.parse_args()
    args.prompts = args.prompts or (4 if args.quick else 16)
    args.samples = args.samples or (32 if args.quick else 512)
    args.seeds = args.seeds or (2 if args.quick else 5)
    args.sizes = SIZES[: args.sizes]
    if args.quick:
        args.sizes = (Proxy("2 layers, 64 pairs", 2, 64), Proxy("2 layers, 96 pairs", 2, 96))
        args.work, args.models = args.work / "quick", args.models / "quick"
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    figures = study(args)
    rows = [
        {
            "proxy": case["name"],
            "accuracy": case.get("accuracy"),
            "turns at n": str(case["turns"]),
            "largest gold": case["largest_gold"]["mean"],
            "gold at the end": case["gold"]["mean"][-1],
            "proxy at the end": case["proxy"]["mean"][-1],
        }
        for case in (*figures["proxies"], *figures["cures"], figures["limit"])
    ]
    print(table(rows))
    print(f"written: {save('overoptimization', figures, args)}")


if __name__ == "__main__":
    main()
