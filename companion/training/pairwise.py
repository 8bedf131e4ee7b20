"""Pairwise reward models: Bradley–Terry on chosen against rejected.

The order of things in :func:`train_pairwise`, as for every kind: load and check the rows; hold out
whole prompts; tokenise; train; on a part of the held-out pairs fit the temperature and take the
reference statistics; on the others, which nothing was chosen by, compute the figures; save all of
it as one checkpoint. Chapter 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Value
from torch import Tensor
from trl import RewardTrainer

from companion.data.pages import sparing
from companion.errors import DataError
from companion.evaluation.pairs import PairEvaluation, scored_pairs
from companion.formatting import RewardFormatter
from companion.functional.losses import bradley_terry_loss, centering_penalty
from companion.functional.reduction import SumCount
from companion.functional.selection import margin as pair_margin, pairwise_accuracy
from companion.models.manifest import RewardManifest
from companion.scoring.results import PairScores
from companion.training.batches import Collator, forward_inputs, text_lengths
from companion.training.config import DataArguments, ModelArguments, PairwiseRewardConfig
from companion.training.kind import Kind
from companion.training.rows import (
    IDENTICAL,
    OVERLONG,
    FormatReport,
    check_columns,
    format_all,
    ids_feature,
    remarks_of,
)
from companion.training.run import Options, TrainingResult, train
from companion.training.trainer import OWN, ExactTrainer, make_table

IDS = ("chosen_ids", "rejected_ids")


# ---------------------------------------------------------------------- rows


def format_pairs(
    dataset: Dataset,
    formatter: RewardFormatter,
    *,
    source: str = "pairs",
    num_proc: int | None = None,
) -> tuple[Dataset, FormatReport]:
    """Tokenise pairs by the one formatter.

    Parameters
    ----------
    dataset : datasets.Dataset
        Rows with ``chosen`` and ``rejected``, optionally ``prompt`` and ``margin``.
    formatter : RewardFormatter
        Its ``max_length`` and ``overlong`` say what happens to long texts.
    source : str
        How to call the set in messages.
    num_proc : int, optional
        Processes; default :func:`companion.training.tokenising.default_processes`.

    Returns
    -------
    rows : datasets.Dataset
        ``chosen_ids``, ``rejected_ids``, ``row`` (index in the source), ``length`` (of the longer
        side) and ``margin`` if the source has one.
    report : FormatReport

    Raises
    ------
    DataError
        For a bad row, which it names; a margin that is missing or not finite; and if no row is
        left.
    """
    check_columns(dataset, ("chosen", "rejected"), source, "pairs")
    columns: dict[str, Any] = dict.fromkeys(IDS, ids_feature())
    if "margin" in dataset.column_names:
        columns["margin"] = Value("float32")
    return format_all(
        dataset,
        formatter,
        _pairs_to_ids,
        columns,
        source=source,
        noun="pairs",
        num_proc=num_proc,
        has_margin="margin" in columns,
    )


def _pairs_to_ids(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    formatter: RewardFormatter,
    has_margin: bool,
) -> list[dict[str, Any]]:
    given = [{name: value for name, value in row.items() if value is not None} for row in rows]
    found: list[dict[str, Any]] = []
    encoded = formatter.encode_pairs(given, names=names)
    for row, name, pair in zip(given, names, encoded, strict=True):
        if has_margin:
            _check_margin(row.get("margin"), name)
        if pair is None:
            found.append({"fate": OVERLONG})
            continue
        chosen, rejected = pair
        found.append(
            {
                "chosen_ids": chosen.input_ids,
                "rejected_ids": rejected.input_ids,
                "margin": row.get("margin"),
                "length": max(len(chosen), len(rejected)),
                "cut": chosen.cut_tokens + rejected.cut_tokens,
                "remarks": remarks_of(chosen, rejected),
                "fate": IDENTICAL if chosen.input_ids == rejected.input_ids else "",
            }
        )
    return found


def _check_margin(value: Any, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(
            f"{where}, field 'margin': {value!r} is no finite number",
            "give every pair a number, or leave the column out (--margins none)",
        )


class PairCollator(Collator):
    """Pairs to a batch, N = 2B texts: the chosen first, then the rejected.

    Besides what :class:`companion.training.Collator` gives, ``weight`` ``[B]`` (1, and 0
    for padding) and, if the rows have one, ``margin`` ``[B]``.
    """

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """All chosen, then all rejected."""
        return [list(e[side]) for side in IDS for e in examples]

    def labels(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Weights and margins."""
        found = {"weight": torch.tensor([float(e.get("weight", 1.0)) for e in examples])}
        if any("margin" in e for e in examples):
            found["margin"] = torch.tensor([float(e.get("margin", 0.0)) for e in examples])
        return found


# ---------------------------------------------------------------------- trainer


class PairwiseRewardTrainer(ExactTrainer, RewardTrainer):
    """Train a Bradley–Terry reward model, exactly; TRL's ``RewardTrainer``. Chapters 4 and 8.

    Parameters
    ----------
    model, args, train_dataset, eval_dataset, formatter, processing_class, **kwargs
        As for :class:`companion.training.ExactTrainer`, with
        :class:`companion.training.PairwiseRewardConfig`, ``peft_config`` as for TRL's
        trainer, and pairs (``chosen``, ``rejected``, optionally ``prompt`` and ``margin``), or rows
        with ``chosen_ids`` and ``rejected_ids``. ``predict`` gives ``[n, 2]``: the scores of chosen
        and rejected.
    """

    config_class = PairwiseRewardConfig
    formats = staticmethod(format_pairs)
    collator_class = PairCollator
    ids = IDS
    extras = ("margin",)
    items = "pairs"
    total = "train_pairs"
    predicted = slice(OWN, OWN + 2)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        return dataset  # TRL would tokenise; that is done

    def check_rows(self, dataset: Dataset, source: str) -> tuple[np.ndarray, FormatReport]:
        """Drop what is longer than ``max_length``.

        Raises
        ------
        DataError
            For an empty sequence, a margin that is not finite, or if no row is left.
        """
        tables = dataset.select_columns(list(IDS)).with_format("arrow").iter(batch_size=10_000)
        sizes = np.concatenate(
            [
                np.empty((2, 0), np.int64),  # (there may be no rows)
                *(
                    [pc.list_value_length(table[name]).to_numpy() for name in IDS]
                    for table in sparing(tables, dataset, rows=10_000)
                ),
            ],
            axis=1,
        )
        empty = np.flatnonzero((sizes[0] == 0) | (sizes[1] == 0))
        if empty.size:
            raise DataError(f"{source}, row {empty[0]}: a side has no tokens", "drop empty texts")
        if "margin" in dataset.column_names:
            for index, value in enumerate(dataset["margin"][:]):
                _check_margin(value, f"{source}, row {index}")
        lengths, limit = np.maximum(*sizes), self.args.max_length
        keep = np.flatnonzero(lengths <= (math.inf if limit is None else limit))
        if not keep.size:
            raise DataError(
                f"{source}: all {len(dataset):,} pairs have a side of more than {limit} tokens, so "
                "none is left",
                "raise --max_length",
            )
        alike = keep[sizes[0][keep] == sizes[1][keep]]
        same = dataset.select_columns(list(IDS)).select(alike)  # (Arrow's `take` copies all rows)
        report = FormatReport(
            source,
            rows=len(dataset),
            kept=len(keep),
            dropped_overlong=len(dataset) - len(keep),
            identical=sum(row["chosen_ids"] == row["rejected_ids"] for row in sparing(same)),
            longest=int(lengths[keep].max()),
        )
        return keep, report

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One real token a side."""
        return {side: [int(row["chosen_ids"][-1])] for side in IDS}

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """The kind's own columns: chosen, rejected, ``-log sigmoid(margin)`` in nats."""
        lengths = text_lengths(inputs)
        scores = model(**forward_inputs(inputs)).logits.squeeze(-1)
        chosen, rejected = scores.float().chunk(2)
        nll = bradley_terry_loss(chosen, rejected)
        smoothing = self.args.label_smoothing_factor
        loss = nll
        if "margin" in inputs or smoothing:
            loss = bradley_terry_loss(
                chosen, rejected, margin=inputs.get("margin"), label_smoothing=smoothing
            )
        if self.args.center_rewards_coefficient:
            penalty = centering_penalty(chosen, rejected)
            loss = loss + self.args.center_rewards_coefficient * penalty
        first, second = lengths.to(loss.dtype).chunk(2)
        table = make_table(inputs, loss, first + second, chosen, rejected, nll)
        bad = ~torch.isfinite(table.detach()).all(dim=1) & (inputs["real"] > 0)
        self.refuse_not_finite(bad, inputs["row"])
        return table

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """A tie is no win."""
        chosen, rejected, nll = table[:, OWN:].T
        return {
            "nll": SumCount().add(nll),
            "accuracy": SumCount().add(pairwise_accuracy(chosen, rejected)),
            "ties": SumCount().add((chosen == rejected).double()),
            "margin": SumCount().add(pair_margin(chosen, rejected)),
            "mean_reward": SumCount().add(torch.cat([chosen, rejected])),
        }

    def summarise(self, table: Tensor, *, all_ranks: bool = False) -> dict[str, float]:
        """With the lowest and the highest score; infinite where there is none."""
        figures = super().summarise(table, all_ranks=all_ranks)
        scores = table[:, self.predicted].flatten()
        none = torch.tensor([math.inf], dtype=table.dtype)
        extremes = torch.stack([torch.cat([side, none]).min() for side in (scores, -scores)])[None]
        if all_ranks:
            extremes = self.accelerator.gather(extremes.to(self.args.device)).cpu()
        low, high = extremes.amin(dim=0).tolist()
        figures["min_reward"], figures["max_reward"] = low, -high
        return figures


def _scored(
    given: Sequence[Mapping[str, Any]],
    rows: Dataset,
    predictions: np.ndarray,
    about: RewardManifest,
) -> PairEvaluation:
    chosen, rejected = (np.array([len(ids) for ids in rows[side]]) for side in IDS)
    columns = predictions.T
    scores = PairScores(columns[0], columns[1], chosen, rejected, [None] * len(given))
    return scored_pairs(given, scores, temperature=about.temperature)


KIND = Kind(PairwiseRewardTrainer, "pairs", _scored, DataArguments)


def train_pairwise(
    config: PairwiseRewardConfig,
    model: ModelArguments,
    data: DataArguments,
    **options: Unpack[Options],
) -> TrainingResult[PairEvaluation]:
    """Train, calibrate, measure and save a Bradley–Terry reward model.

    See :func:`companion.training.train`.
    """
    return train(KIND, config, model, data, **options)
