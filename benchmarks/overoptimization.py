"""Proxy and gold against KL under best-of-n: ``python -m benchmarks.overoptimization``.

The curves of Gao, Schulman and Hilton (2023, arXiv 2210.10760) on the tutor, whose gold reward is
known: reward models of several depths and numbers of pairs choose among up to 1,024 completions of
the tutor base. What is finished lies in ``--work`` and is not done again, so a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
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
    BestOfNCurve,
    best_of_n_curve,
    ensemble_scores,
    pairwise_accuracy,
)
from companion.tutor import TUTOR_BASE, grade, make_rows

POLICY_SEED, PAIRS_SEED, TEST_SEED = 900, 700, 800
MAX_NEW_TOKENS = 96
BIAS = 0.8


@dataclass(frozen=True)
class Proxy:
    """A reward model of the study."""

    name: str
    layers: int  #: of the tutor base's six
    pairs: int
    dials: dict[str, float] = field(default_factory=dict)
    seed: int = 0


PROXIES = (
    Proxy("2 layers, 250 pairs", 2, 250),
    Proxy("2 layers, 1000 pairs", 2, 1000),
    Proxy("6 layers, 250 pairs", 6, 250),
    Proxy("6 layers, 1000 pairs", 6, 1000),
    Proxy("6 layers, 4000 pairs", 6, 4000),
    Proxy("6 layers, 1000 pairs, long preferred", 6, 1000, {"length_bias": BIAS}),
    *(Proxy(f"6 layers, 250 pairs, again {k}", 6, 250, seed=k) for k in (1, 2, 3)),
)
ENSEMBLE = ("6 layers, 250 pairs", *(f"6 layers, 250 pairs, again {k}" for k in (1, 2, 3)))
BIASED = "6 layers, 1000 pairs, long preferred"


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
    base = load_base(TUTOR_BASE)
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


def describe(
    name: str, scores: torch.Tensor, truth: dict[str, torch.Tensor], ns: Sequence[int]
) -> dict[str, Any]:
    """The curves of one proxy, and what gold has lost at the largest n since its best."""

    def numbers(curve: BestOfNCurve) -> dict[str, list[float]]:
        parts = {"mean": curve.mean, "low": curve.low, "high": curve.high}
        return {key: value.round(4).tolist() for key, value in parts.items()}

    gold = best_of_n_curve(scores, ns, truth["gold"])
    best = int(gold.mean.argmax())
    lost = gold.per_prompt[:, best] - gold.per_prompt[:, -1]
    interval = bootstrap_interval(lost)
    return {
        "name": name,
        "best_n": int(gold.n[best]),
        "gold_lost": {"mean": float(lost.mean()), "low": interval.low, "high": interval.high},
        "proxy": numbers(best_of_n_curve(on_gold_scale(scores, truth["gold"]), ns)),
        "gold": numbers(gold),
        **{
            key: best_of_n_curve(scores, ns, truth[key]).mean.round(4).tolist()
            for key in ("correct", "words")
        },
    }


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
    scores: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for proxy in args.proxies:
        stem = proxy.name.replace(", ", "-").replace(" ", "_")

        def make(proxy: Proxy = proxy, folder: Path = work / stem) -> dict[str, Any]:
            start = time.process_time()
            accuracy = train(proxy, folder)
            seconds = time.process_time() - start
            return {"accuracy": accuracy, "seconds": seconds, "scores": score_pool(folder, pool)}

        found = once(work / f"{stem}.json", make)
        scores[proxy.name] = spread(pool, found.pop("scores"))
        facts[proxy.name] = {**asdict(proxy), **found}
        say(f"{proxy.name}: accuracy {found['accuracy']:.3f}")

    ns = [2**k for k in range(args.samples.bit_length())]
    cases = [{**facts[name], **describe(name, s, truth, ns)} for name, s in scores.items()]
    members = [on_gold_scale(scores[name], truth["gold"]) for name in ENSEMBLE if name in scores]
    cures = []
    if len(members) > 1:
        for how in ("mean", "worst"):
            together = ensemble_scores(torch.stack(members), how)  # type: ignore[arg-type]
            cures.append(describe(f"{len(members)} models, {how}", together, truth, ns))
    if BIASED in scores:
        plain = without_length(scores[BIASED], truth["words"])
        cures.append(describe("long preferred, length taken out", plain, truth, ns))
    limit = describe("gold itself", truth["gold"], truth, ns)
    return {
        "policy": "tutor base, temperature 1",
        "prompts": len(pool),
        "samples": args.samples,
        "n": ns,
        "kl": best_of_n_curve(truth["gold"], ns).kl.round(4).tolist(),
        "proxies": cases,
        "cures": cures,
        "limit": limit,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/overoptimization"))
    parser.add_argument("--prompts", type=int, help="default 48, quick 4")
    parser.add_argument("--samples", type=int, help="of each prompt; default 1024, quick 32")
    args = parser.parse_args()
    args.prompts = args.prompts or (4 if args.quick else 48)
    args.samples = args.samples or (32 if args.quick else 1024)
    args.proxies = PROXIES
    if args.quick:
        args.proxies = [Proxy("2 layers, 32 pairs", 2, 32)]
        args.work = args.work / "quick"
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    figures = study(args)
    rows = [
        {
            "proxy": case["name"],
            "accuracy": case.get("accuracy"),
            "best n": case["best_n"],
            "gold there": max(case["gold"]["mean"]),
            "gold at the end": case["gold"]["mean"][-1],
            "proxy at the end": case["proxy"]["mean"][-1],
        }
        for case in (*figures["proxies"], *figures["cures"], figures["limit"])
    ]
    print(table(rows))
    print(f"written: {save('overoptimization', figures, args)}")


if __name__ == "__main__":
    main()
