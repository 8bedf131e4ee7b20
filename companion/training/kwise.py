"""K-wise reward models: whole rankings of K completions of a prompt, K free from row to row.

Two losses. *Plackett–Luce* (Zhu et al. 2023, arXiv 2301.11270; Starling) is the likelihood of the
ranking, ties and gaps included. *Pairs* (InstructGPT, Ouyang et al. 2022, arXiv 2203.02155, eq. 1)
is the mean Bradley–Terry loss over the pairs of a prompt, so that a prompt counts once however many
completions it has; shuffled apart, its pairs would be seen in K - 1 steps each and overfit. Either
way all completions of a prompt stand in one micro-batch, and the gradient is that of the mean over
the prompts of the whole step. What is saved is the same plain checkpoint as a pairwise one.
Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor
from transformers import Trainer

from companion.errors import DataError
from companion.evaluation.rankings import RankingEvaluation, scored_rankings
from companion.formatting import RewardFormatter
from companion.functional.losses import grouped_pair_loss
from companion.functional.rankings import best_is_best, ordered_pairs, ranking_loss
from companion.functional.reduction import SumCount
from companion.models.manifest import RewardManifest
from companion.training.batches import Collator, forward_inputs, text_lengths
from companion.training.config import (
    NO_OFFLOADING,
    ModelArguments,
    PairwiseRewardConfig,
    RowArguments,
    not_offered,
    setting,
)
from companion.training.kind import Kind
from companion.training.rows import (
    OVERLONG,
    FormatReport,
    check_columns,
    format_all,
    ids_feature,
    remarks_of,
)
from companion.training.run import Options, TrainingResult, train
from companion.training.trainer import OWN, WEIGHT, ExactTrainer, make_table

LOSSES = ("plackett_luce", "pairs")


@dataclass
class KwiseRewardConfig(PairwiseRewardConfig):
    """Settings of a K-wise run: those of a pairwise run, and which loss.

    A batch of ``per_device_train_batch_size`` prompts holds K times as many texts.
    ``center_rewards_coefficient`` weighs (2 × mean score of the prompt's completions)², which is
    the pairwise penalty at K = 2. Chapter 3.
    """

    loss_type: str = setting(
        "plackett_luce",
        "Likelihood of the whole ranking, or the mean over its pairs (InstructGPT).",
        choices=list(LOSSES),
    )

    label_smoothing_factor: float = not_offered(
        "it is not defined for whole rankings; train on pairs (companion train pairwise)",
        default=0.0,
    )
    activation_offloading: bool = not_offered(NO_OFFLOADING, default=False)


# ---------------------------------------------------------------------- rows


def format_rankings(
    dataset: Dataset,
    formatter: RewardFormatter,
    *,
    source: str = "rankings",
    num_proc: int | None = None,
) -> tuple[Dataset, FormatReport]:
    """Tokenise rankings by the one formatter.

    A completion that is too long, or has no rank (null), is left out of its ranking; a ranking in
    which then no completion beats another is dropped. Both are counted.

    Parameters
    ----------
    dataset : Dataset
        Rows of the kind ``rankings`` (:mod:`companion.data.formats`).

    Returns
    -------
    rows : Dataset
        ``completion_ids`` (lists of token ids), ``ranks``, ``place`` (of each among the row's
        completions), ``row``, ``length`` (of the longest text).
    report : FormatReport

    Raises
    ------
    DataError
        For a bad row, which it names, or if no row is left.
    """
    check_columns(dataset, ("prompt", "completions", "ranks"), source, "rankings")
    columns = {
        "completion_ids": List(ids_feature()),
        "ranks": List(Value("float32")),
        "place": List(Value("int32")),
    }
    return format_all(
        dataset,
        formatter,
        _rankings_to_ids,
        columns,
        source=source,
        noun="rankings",
        num_proc=num_proc,
    )


def _rankings_to_ids(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], formatter: RewardFormatter
) -> list[dict[str, Any]]:
    texts, labels = [], []
    for row, name in zip(rows, names, strict=True):
        if len(row["completions"]) != len(row["ranks"]):
            raise DataError(
                f"{name}: {len(row['completions'])} completions and {len(row['ranks'])} ranks"
            )
        shared = {k: v for k, v in row.items() if k not in ("completions", "ranks")}
        texts += [{**shared, "completion": completion} for completion in row["completions"]]
        labels += [f"{name}, completion {i}" for i in range(len(row["completions"]))]
    encoded = iter(formatter.encode_many(texts, names=labels))
    found: list[dict[str, Any]] = []
    for row in rows:
        given = [(next(encoded), rank, i) for i, rank in enumerate(row["ranks"])]
        kept = [(e, r, i) for e, r, i in given if e is not None and r is not None and r == r]
        overlong = any(e is None and r is not None for e, r, _ in given)
        if len({rank for _, rank, _ in kept}) < 2:
            found.append({"fate": OVERLONG if overlong else "in which none beats another"})
            continue
        found.append(
            {
                "completion_ids": [e.input_ids for e, _, _ in kept],
                "ranks": [float(rank) for _, rank, _ in kept],
                "place": [i for _, _, i in kept],
                "length": max(len(e) for e, _, _ in kept),
                "cut": sum(e.cut_tokens for e, _, _ in kept),
                "remarks": remarks_of(*(e for e, _, _ in kept)),
                "fate": "+with a completion left out for its length" if overlong else "",
            }
        )
    return found


class RankingCollator(Collator):
    """Rankings to a batch: N texts, all of all prompts; packed, a prompt once for all its texts.

    Besides what :class:`companion.training.Collator` gives: ``index`` ``[B, K]``, where
    each prompt's completions stand among the N, and -1 beyond its own; ``ranks`` ``[B, K]``;
    ``weight`` ``[B]``, 0 where no completion beats another.
    """

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """One ranking's completions behind the other's."""
        return [list(ids) for e in examples for ids in e["completion_ids"]]

    def labels(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Places, ranks and weights."""
        sizes = [len(e["completion_ids"]) for e in examples]
        index = torch.full((len(examples), max(sizes)), -1)
        ranks = torch.zeros(index.shape)
        begin = 0
        for row, (example, size) in enumerate(zip(examples, sizes, strict=True)):
            index[row, :size] = torch.arange(begin, begin + size)
            ranks[row, :size] = torch.tensor([float(rank) for rank in example["ranks"]])
            begin += size
        ordered = ordered_pairs(torch.zeros(index.shape), ranks, index >= 0)[1] > 0
        return {"index": index, "ranks": ranks, "weight": batch["real"] * ordered}


# ---------------------------------------------------------------------- trainer


class KwiseRewardTrainer(ExactTrainer, Trainer):
    """Train a reward model on whole rankings, exactly. Chapter 3.

    Parameters
    ----------
    model, args, train_dataset, eval_dataset, formatter, processing_class, **kwargs
        As for :class:`companion.training.ExactTrainer`, with :class:`KwiseRewardConfig` and
        rows of the kind ``rankings``, or with ``completion_ids`` and ``ranks``. ``predict`` gives
        ``[n, K]`` scores, NaN beyond a row's own completions.
    """

    args: KwiseRewardConfig
    config_class = KwiseRewardConfig
    formats = staticmethod(format_rankings)
    collator_class = RankingCollator
    ids = ("completion_ids", "ranks")
    items = "prompts"
    predicted = slice(OWN + 4, None)
    wide = "ranks"

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One completion of one real token."""
        return {"completion_ids": [[int(row["completion_ids"][0][-1])]], "ranks": [1.0]}

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """The kind's own columns: ``nll``, pairs right, pairs, best is best, and K scores."""
        flat = model(**forward_inputs(inputs))
        index, ranks = inputs["index"], inputs["ranks"]
        mask = index >= 0
        scores = flat.logits.squeeze(-1).float()[index.clamp(min=0)].masked_fill(~mask, 0.0)
        bad = ~torch.isfinite(scores.detach()).all(dim=1) & (inputs["real"] > 0)
        self.refuse_not_finite(bad, inputs["row"])
        loss = ranking_loss if self.args.loss_type == "plackett_luce" else grouped_pair_loss
        nll = loss(scores, ranks, mask)
        total = nll
        if self.args.center_rewards_coefficient:
            mean = scores.sum(dim=1) / mask.sum(dim=1)
            total = nll + self.args.center_rewards_coefficient * (2 * mean).square()
        right, pairs = ordered_pairs(scores.detach(), ranks, mask)
        top = best_is_best(scores.detach(), ranks, mask)
        lengths = text_lengths(inputs)[index.clamp(min=0)].masked_fill(~mask, 0)
        head = make_table(inputs, total, lengths.sum(dim=1), nll, right, pairs, top)
        own = scores.detach().masked_fill(~mask, float("nan"))
        return torch.cat([head, self.wide_columns(own)], dim=1)

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """``nll`` and ``top1`` a prompt, ``accuracy`` over all ordered pairs."""
        nll, right, pairs, top = table[:, OWN : OWN + 4].T
        counts = table[:, WEIGHT] > 0
        return {
            "nll": SumCount().add(nll, counts),
            "accuracy": SumCount(float(right.sum()), round(float(pairs.sum()))),
            "top1": SumCount().add(top, counts),
        }


def _scored(
    given: Sequence[Mapping[str, Any]],
    rows: Dataset,
    predictions: np.ndarray,
    about: RewardManifest,
) -> RankingEvaluation:
    """Completions that were left out for their length have no score, as those of a scorer."""
    scores = [np.full(len(row["completions"]), np.nan) for row in given]
    lengths = [np.zeros(len(row["completions"])) for row in given]
    for i, row in enumerate(rows):
        scores[i][row["place"]] = predictions[i, : len(row["place"])]
        lengths[i][row["place"]] = [len(ids) for ids in row["completion_ids"]]
    overlong = f"longer than max_length={about.training['max_length']} tokens"
    reasons = [
        overlong if np.isnan(score) and rank is not None else None
        for row, own in zip(given, scores, strict=True)
        for rank, score in zip(row["ranks"], own, strict=True)
    ]
    return scored_rankings(given, scores, lengths, reasons, temperature=about.temperature)


KIND = Kind(KwiseRewardTrainer, "rankings", _scored, RowArguments)


def train_kwise(
    config: KwiseRewardConfig, model: ModelArguments, data: RowArguments, **options: Unpack[Options]
) -> TrainingResult[RankingEvaluation]:
    """Train, calibrate, measure and save a reward model on whole rankings.

    What is saved is the same plain checkpoint that a pairwise run gives, and what is held out is
    measured as the pairs that its rankings hold, so that both stand side by side. See
    :func:`companion.training.train`.
    """
    return train(KIND, config, model, data, **options)
