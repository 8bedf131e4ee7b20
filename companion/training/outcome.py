"""Outcome reward models (ORM): at every token of a solution, the probability that it is right.

The outcome stands at every completion token, prompt and padding at -100, the loss is the binary
cross-entropy (Cobbe et al. 2021, arXiv 2110.14168; Uesato et al. 2022, arXiv 2211.14275). The
gradient is that of the mean over all labelled tokens of the whole step (``reduction="token"``), or
over its texts, each the mean of its tokens (``"sequence"``). Stock transformers would take a
cross-entropy over the one class, which is 0 whatever the model says. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from datasets import Dataset, Value
from torch import Tensor

from companion.errors import DataError
from companion.evaluation.token_metrics import roc_auc
from companion.evaluation.tokens import AGGREGATES, OutcomeEvaluation
from companion.formatting import RewardFormatter
from companion.formatting.steps import as_conversation
from companion.functional.labels import outcome_labels
from companion.functional.losses import IGNORE_INDEX, outcome_loss
from companion.functional.reduction import SumCount, aggregate
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.readout import AGGREGATIONS, TokenReadout
from companion.training.batches import text_lengths
from companion.training.config import ModelArguments, RowArguments, setting
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
from companion.training.token_level import (
    TextCollator,
    TokenRewardConfig,
    TokenTrainer,
    text_logits,
)
from companion.training.trainer import OWN, make_table

REDUCTIONS = ("token", "sequence")
#: column of the table with the value at the last token
_LAST = OWN + 1 + AGGREGATES.index("last")


@dataclass
class OutcomeRewardConfig(TokenRewardConfig):
    """Settings of an outcome run. Chapter 3.

    The default of ``aggregation`` was measured on the tutor (400 held-out texts): AUC 0.979 for the
    last value, 0.967 for the minimum, 0.957 for the product, 0.955 for the mean. Every run reports
    all of them.
    """

    reduction: str = setting(
        "token",
        "Mean over all labelled tokens (long texts weigh more), or over texts.",
        choices=list(REDUCTIONS),
    )
    aggregation: str = setting(
        "last",
        "From a text's probabilities to its score; written into the manifest.",
        choices=list(AGGREGATIONS),
    )


def format_outcomes(
    dataset: Dataset,
    formatter: RewardFormatter,
    *,
    chat: bool = True,
    source: str = "outcomes",
    num_proc: int | None = None,
) -> tuple[Dataset, FormatReport]:
    """Tokenise outcomes by the one formatter.

    Parameters
    ----------
    dataset : Dataset
        Rows of the kind ``outcomes`` (:mod:`companion.data.formats`).
    chat : bool
        Where the formatter's ``text`` is not decided: write rows of text as a conversation.

    Returns
    -------
    rows : Dataset
        ``input_ids``, ``prompt_length``, ``label`` (0 or 1), ``row``, ``length``.
    report : FormatReport

    Raises
    ------
    DataError
        For a bad row, which it names, or if no row is left.
    """
    check_columns(dataset, ("prompt", "completion", "label"), source, "outcomes")
    return format_all(
        dataset,
        formatter,
        _outcomes_to_ids,
        {"input_ids": ids_feature(), "prompt_length": Value("int32"), "label": Value("int8")},
        source=source,
        noun="outcomes",
        num_proc=num_proc,
        chat=chat,
    )


def written(row: Mapping[str, Any], chat: bool) -> Mapping[str, Any]:
    """A row of text as a conversation, if it is to be one."""
    if chat and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return {**row, **as_conversation(row["prompt"], row["completion"])}
    return row


def _outcomes_to_ids(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    formatter: RewardFormatter,
    chat: bool,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    chat = chat and formatter.text is None
    encoded = formatter.encode_many([written(row, chat) for row in rows], names=names)
    for row, name, item in zip(rows, names, encoded, strict=True):
        if row["label"] not in (0, 1):  # bools are
            raise DataError(f"{name}, field 'label': {row['label']!r}", "give true or false")
        if item is None:
            found.append({"fate": OVERLONG})
            continue
        found.append(
            {
                "input_ids": item.input_ids,
                "prompt_length": item.prompt_length,
                "label": int(row["label"]),
                "length": len(item),
                "cut": item.cut_tokens,
                "remarks": remarks_of(item),
            }
        )
    return found


@dataclass
class OutcomeCollator(TextCollator):
    """Outcomes to a batch with the label on every completion token.

    Besides what :class:`companion.training.Collator` gives: ``labels`` ``[B, T]`` (0, 1, or
    -100 on the prompt and beyond the text); ``weight`` ``[B]``: the number of labelled tokens
    (`reduction` ``"token"``) or 1; ``outcome`` ``[B]``.
    """

    reduction: str = "token"

    def labels(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Labels and weights.

        Raises
        ------
        DataError
            If a row has no completion token.
        """
        prompts = torch.tensor([int(e.get("prompt_length", 0)) for e in examples])
        outcome = torch.tensor([int(e.get("label", 0)) for e in examples])
        lengths = text_lengths(batch)
        seen = torch.arange(self.width(batch)) < lengths[:, None]
        labels = outcome_labels(seen, prompts, outcome)
        count = (labels != IGNORE_INDEX).sum(dim=1) if self.reduction == "token" else 1
        return {"labels": labels, "outcome": outcome, "weight": batch["real"] * count}


class OutcomeRewardTrainer(TokenTrainer):
    """Train an outcome reward model, exactly. Chapter 3.

    Parameters
    ----------
    model, args, train_dataset, eval_dataset, formatter, processing_class, **kwargs
        As for :class:`companion.training.ExactTrainer`, with :class:`OutcomeRewardConfig`
        and rows of the kind ``outcomes``, or with ``input_ids``, ``prompt_length`` and ``label``.
        ``predict`` gives ``[n, 4]``: the aggregates of
        :data:`companion.evaluation.tokens.AGGREGATES` (the product as its logarithm).
    """

    args: OutcomeRewardConfig
    config_class = OutcomeRewardConfig
    formats = staticmethod(format_outcomes)
    collator_class = OutcomeCollator
    collator_settings = ("reduction",)
    ids = ("input_ids", "prompt_length", "label")
    predicted = slice(OWN + 1, None)

    @classmethod
    def readout(cls, args: Any) -> TokenReadout:
        """One logit, aggregated over the completion."""
        return TokenReadout("outcome", 1, args.aggregation, chat=args.text != "plain")

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """The kind's own columns: the outcome, and the four aggregates."""
        labels = inputs["labels"]
        logits = text_logits(model, inputs).squeeze(-1).float()
        counted = labels != IGNORE_INDEX
        finite = torch.isfinite(logits.detach()) | ~counted
        bad = ~finite.all(dim=1) & (inputs["real"] > 0)
        self.refuse_not_finite(bad, inputs["row"])
        loss = outcome_loss(logits, labels).sum(dim=1) / counted.sum(dim=1)
        # what is not finite ends the run, but perhaps after the backward
        probabilities = torch.sigmoid(logits.detach()).masked_fill(~(counted & finite), 0.0)
        values = (aggregate(probabilities, counted, how) for how in AGGREGATES)
        return make_table(inputs, loss, text_lengths(inputs), inputs["outcome"], *values)

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """``accuracy``: the value at the last token against the outcome, a text."""
        outcome, last = table[:, OWN], table[:, _LAST]
        return {"accuracy": SumCount().add(((last > 0.5) == (outcome > 0.5)).double())}

    def further(self, table: Tensor) -> dict[str, float]:
        """The AUC of the value at the last token, if texts of both outcomes are there."""
        outcome, last = table[:, OWN], table[:, _LAST]
        both = 0 < outcome.sum() < len(outcome)
        return {"auc": roc_auc(last.numpy(), outcome.numpy())} if both else {}


def _scored(
    given: Sequence[Mapping[str, Any]],
    rows: Dataset,
    predictions: np.ndarray,
    about: RewardManifest,
) -> OutcomeEvaluation:
    columns = predictions.astype(np.float64).T
    return OutcomeEvaluation(
        list(given),
        [None] * len(given),
        TokenReadout.from_dict(about.readout, MANIFEST_FILE),
        aggregates=dict(zip(AGGREGATES, columns, strict=True)),
        lengths=np.asarray(rows["length"][:]),
    )


KIND = Kind(OutcomeRewardTrainer, "outcomes", _scored, RowArguments)


def train_outcome(
    config: OutcomeRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    **options: Unpack[Options],
) -> TrainingResult[OutcomeEvaluation]:
    """Train, measure and save an outcome reward model, a plain token-classification checkpoint.

    See :func:`companion.training.train`.
    """
    return train(KIND, config, model, data, **options)
