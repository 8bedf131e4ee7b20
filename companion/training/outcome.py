"""Outcome reward models (ORM): at every token of a solution, the probability that it is right.

The outcome stands at every completion token, prompt and padding at -100, the loss is the binary
cross-entropy (Cobbe et al. 2021, arXiv 2110.14168; Uesato et al. 2022, arXiv 2211.14275). The
gradient is that of the mean over all labelled tokens of the whole step (``reduction="token"``), or
over its texts, each the mean of its tokens (``"sequence"``). Stock transformers would take a
cross-entropy over the one class, which is 0 whatever the model says. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Value
from torch import Tensor

from companion.errors import CompanionError, DataError
from companion.formatting import RewardFormatter
from companion.formatting.steps import as_conversation
from companion.labels import outcome_labels
from companion.losses import IGNORE_INDEX, outcome_loss
from companion.models.readout import AGGREGATIONS
from companion.reduction import How, SumCount, aggregate
from companion.token_metrics import roc_auc
from companion.training.exact import make_batch, text_lengths
from companion.training.exact_trainer import is_real
from companion.training.kind_rows import OVERLONG, check_columns, format_all, ids_feature
from companion.training.rows import FormatReport
from companion.training.setup import refuse_not_finite
from companion.training.token_level import TokenRewardConfig, TokenTrainer, text_logits

REDUCTIONS = ("token", "sequence")
#: aggregates that are computed of every text, in the order of the trainer's predictions
MEASURED: tuple[How, ...] = ("mean", "min", "log_product", "last")


@dataclass
class OutcomeRewardConfig(TokenRewardConfig):
    """Settings of an outcome run. Chapter 3.

    The default of ``aggregation`` was measured on the tutor (400 held-out texts): AUC 0.979 for the
    last value, 0.967 for the minimum, 0.957 for the product, 0.955 for the mean. Every run reports
    all of them.
    """

    reduction: str = field(
        default="token",
        metadata={
            "help": "Mean over all labelled tokens (long texts weigh more), or over texts.",
            "choices": list(REDUCTIONS),
        },
    )
    aggregation: str = field(
        default="last",
        metadata={
            "help": "From a text's probabilities to its score; written into the manifest.",
            "choices": list(AGGREGATIONS),
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("reduction", REDUCTIONS), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in known:
                raise CompanionError(
                    f"{name} is {getattr(self, name)!r}", f"take one of: {', '.join(known)}"
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
        Write rows of text as a conversation.

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
            }
        )
    return found


@dataclass
class OutcomeCollator:
    """Outcomes to a batch with the label on every completion token.

    Gives the texts as :func:`companion.training.exact.make_batch` has them, padded or packed;
    ``labels`` ``[B, T]`` (0, 1, or -100 on the prompt and beyond the text); ``weight`` ``[B]``: the
    number of labelled tokens (``reduction="token"``) or 1;
    ``outcome``, ``real`` and ``row`` ``[B]``.
    """

    pad_token_id: int
    reduction: str = "token"
    pad_to_multiple_of: int | None = None
    config: Any = None
    packing: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch.

        Raises
        ------
        DataError
            If a row has no completion token.
        """
        ids = [list(e["input_ids"]) for e in examples]
        batch = make_batch(
            ids,
            self.pad_token_id,
            packing=self.packing,
            pad_to_multiple_of=self.pad_to_multiple_of,
            config=self.config,
        )
        prompts = torch.tensor([int(e.get("prompt_length", 0)) for e in examples])
        outcome = torch.tensor([int(e.get("label", 0)) for e in examples])
        lengths = text_lengths(batch)
        seen = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        width = seen.shape[1] if self.packing else batch["input_ids"].shape[1]
        seen = torch.nn.functional.pad(seen, (0, width - seen.shape[1]))
        labels = outcome_labels(seen, prompts, outcome)
        real = is_real(examples)
        count = (labels != IGNORE_INDEX).sum(dim=1)
        return {
            **batch,
            "labels": labels,
            "outcome": outcome,
            "real": real,
            "weight": real * (count if self.reduction == "token" else 1),
            "row": torch.tensor([int(e.get("row", -1)) for e in examples]),
        }


class OutcomeRewardTrainer(TokenTrainer):
    """Train an outcome reward model, exactly. Chapter 3.

    Parameters
    ----------
    model, args, train_dataset, eval_dataset, formatter, processing_class, **kwargs
        As for :class:`companion.training.exact_trainer.ExactTrainer`, with
        :class:`OutcomeRewardConfig` and rows of the kind ``outcomes``, or with ``input_ids``,
        ``prompt_length`` and ``label``. ``predict`` gives ``[n, 4]``: the aggregates of
        :data:`MEASURED` (the product as its logarithm).
    """

    args: OutcomeRewardConfig
    ids = ("input_ids", "prompt_length", "label")
    _columns = ("input_ids", "prompt_length", "label", "row", "weight")

    def __init__(self, model: Any, args: OutcomeRewardConfig | None = None, **kwargs: Any) -> None:
        super().__init__(model, args or OutcomeRewardConfig(), **kwargs)

    def format_rows(self, dataset: Dataset, source: str) -> tuple[Dataset, FormatReport]:
        """See :func:`format_outcomes`."""
        return format_outcomes(
            dataset,
            self.formatter,
            chat=self.args.as_chat,
            source=source,
            num_proc=self.args.dataset_num_proc,
        )

    def make_collator(self, pad_token_id: int, config: Any) -> Callable[[Sequence[Any]], Any]:
        """See :class:`OutcomeCollator`."""
        multiple: Any = self.args.pad_to_multiple_of
        return OutcomeCollator(pad_token_id, self.args.reduction, multiple, config)

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """Columns: those of ``Table``, the outcome, and the four aggregates."""
        labels = inputs["labels"]
        logits = text_logits(model, inputs).squeeze(-1).float()
        counted = labels != IGNORE_INDEX
        finite = torch.isfinite(logits.detach()) | ~counted
        bad = ~finite.all(dim=1) & (inputs["real"] > 0)
        refuse_not_finite(bad, inputs["row"], self.state.global_step)
        loss = outcome_loss(logits, labels).sum(dim=1) / counted.sum(dim=1)
        probabilities = torch.sigmoid(logits.detach()).masked_fill(~counted, 0.0)
        columns = [inputs["real"], inputs["weight"], loss, text_lengths(inputs), inputs["outcome"]]
        columns += [aggregate(probabilities, counted, how) for how in MEASURED]
        return torch.stack([column.to(loss.dtype) for column in columns], dim=1)

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """``accuracy``: the value at the last token against the outcome, a text."""
        right = (table[:, 4 + 1 + MEASURED.index("last")] > 0.5) == (table[:, 4] > 0.5)
        return {"accuracy": SumCount().add(right.double())}

    def evaluated(self, table: Tensor) -> tuple[dict[str, Any], Any]:
        """Figures with the AUC of the value at the last token, and the aggregates ``[n, 4]``."""
        figures, columns = super().evaluated(table)
        outcome, last = columns[:, 0], columns[:, 1 + MEASURED.index("last")]
        if 0 < outcome.sum() < len(outcome):
            figures["auc"] = roc_auc(last, outcome)
        return figures, columns[:, 1:]
