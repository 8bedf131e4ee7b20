"""Process reward models (PRM): at the end of each step, whether the step is good.

Three classes at the step boundaries, bad, neutral and good, all else at -100 (Lightman et al. 2023,
arXiv 2305.20050); or one logit of 'good', with labels that are right or wrong, or soft ones, such
as the share of continuations that came out right (Wang et al. 2024, Math-Shepherd, arXiv
2312.08935). A step without a label (null), as behind the first error, counts nowhere. The gradient
is that of the mean over all labelled steps of the whole step of the optimiser. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import Tensor

from companion.errors import CompanionError, DataError
from companion.evaluation.tokens import StepEvaluation, step_targets
from companion.formatting import RewardFormatter
from companion.formatting.steps import encode_steps
from companion.functional.labels import LABEL_TYPES, NEUTRALS, step_target
from companion.functional.losses import IGNORE_INDEX, outcome_loss, process_loss
from companion.functional.reduction import SumCount
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.readout import AGGREGATIONS, STEP_SCORES, TokenReadout
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
from companion.training.trainer import OWN, WEIGHT, make_table


@dataclass
class ProcessRewardConfig(TokenRewardConfig):
    """Settings of a process run. Chapter 3.

    The defaults of ``step_score`` and ``aggregation`` were measured on the tutor (500 solutions,
    AUC of 'the answer is right'): the expected label gives 0.976 with the minimum over steps and
    0.970 to 0.980 with the others; P(+1) gives 0.52 with the minimum, since a greeting, which is
    neutral, is taken for a bad step.
    """

    label_type: str = setting(
        "three",
        "'three': classes for −1, 0, +1; 'binary': good or bad; 'soft': labels are "
        "probabilities in [0, 1] that the step is good.",
        choices=list(LABEL_TYPES),
    )
    neutral: str = setting(
        "good", "What a label of 0 is with label_type 'binary'.", choices=list(NEUTRALS)
    )
    step_separator: str = setting(
        r"\n",  # as a shell hands it over, for --help; the line break itself below
        r"Text between two steps; it must stay tokens of its own. \n is a line break.",
    )
    step_score: str = setting(
        "expected",
        "A step's score with three classes: 'good', P(+1), or 'expected', the expected label, "
        "moved from [−1, 1] to [0, 1]. With one logit both are P(good).",
        choices=list(STEP_SCORES),
    )
    aggregation: str = setting(
        "min",
        "From the scores of the steps to that of the text; in the manifest.",
        choices=list(AGGREGATIONS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # a shell and a YAML scalar without quotes hand the two characters over
        self.step_separator = self.step_separator.replace(r"\n", "\n").replace(r"\t", "\t")
        if not self.step_separator:
            raise CompanionError("step_separator is empty", r"give one, such as '\n'")

    @property
    def num_labels(self) -> int:
        """Outputs of the head."""
        return 3 if self.label_type == "three" else 1


def format_steps(
    dataset: Dataset,
    formatter: RewardFormatter,
    *,
    separator: str = "\n",
    label_type: str = "three",
    neutral: str = "good",
    chat: bool = True,
    source: str = "steps",
    num_proc: int | None = None,
) -> tuple[Dataset, FormatReport]:
    """Tokenise solutions in steps by the one formatter; find where each step ends.

    A solution that goes on (:func:`companion.formatting.encode_steps`) has its last step
    closed by the separator. What follows a step cannot change what a causal model says of it, so
    the rest itself need not be read.

    Parameters
    ----------
    dataset : Dataset
        Rows of the kind ``steps`` (:mod:`companion.data.formats`).
    separator, label_type, neutral
        As in :class:`ProcessRewardConfig`.
    chat : bool
        Where the formatter's ``text`` is not decided: write rows of text as a conversation.

    Returns
    -------
    rows : Dataset
        ``input_ids``; ``ends``, the token that ends each step; ``targets``, what the loss takes
        there (a class, a probability, or -100); ``row``, ``length``.
    report : FormatReport

    Raises
    ------
    DataError
        For a bad row or label, or a separator that does not survive tokenisation, with the row;
        or if no row is left.
    """
    check_columns(dataset, ("prompt", "completions", "labels"), source, "steps")
    return format_all(
        dataset,
        formatter,
        _steps_to_ids,
        {
            "input_ids": ids_feature(),
            "ends": ids_feature(),
            "targets": List(Value("float32")),
        },
        source=source,
        noun="solutions",
        num_proc=num_proc,
        separator=separator,
        label_type=label_type,
        neutral=neutral,
        chat=chat,
    )


def _steps_to_ids(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    formatter: RewardFormatter,
    separator: str,
    label_type: str,
    neutral: str,
    chat: bool,
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    encoded = encode_steps(formatter, rows, separator, chat=chat, names=names)
    for row, name, item in zip(rows, names, encoded, strict=True):
        if isinstance(item, CompanionError):
            raise item
        if len(row["labels"]) != len(row["completions"]):
            raise DataError(
                f"{name}: {len(row['completions'])} steps but {len(row['labels'])} labels"
            )
        targets = [
            step_target(label, label_type, neutral, f"{name}, labels[{i}]")
            for i, label in enumerate(row["labels"])
        ]
        if item is None:
            found.append({"fate": OVERLONG})
        elif all(target == IGNORE_INDEX for target in targets):
            found.append({"fate": "without a label"})
        else:
            found.append(
                {
                    "input_ids": item.encoded.input_ids,
                    "ends": item.ends,
                    "targets": targets,
                    "length": len(item.encoded),
                    "cut": item.encoded.cut_tokens,
                    "remarks": remarks_of(item.encoded),
                }
            )
    return found


@dataclass
class StepCollator(TextCollator):
    """Solutions to a batch with a label at the token that ends each labelled step.

    Besides what :class:`companion.training.Collator` gives: ``labels`` ``[B, T]``: classes
    (int64, three labels) or probabilities (float32), and -100 elsewhere; ``ends`` ``[B, S]``, -1
    beyond a row's own steps; ``weight`` ``[B]``: the number of labelled steps.
    """

    num_labels: int = 3

    def labels(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Labels, ends and weights.

        Raises
        ------
        DataError
            If a step ends outside of its text.
        """
        lengths = text_lengths(batch).tolist()
        labels = torch.full((len(examples), self.width(batch)), float(IGNORE_INDEX))
        most = max((len(e["ends"]) for e in examples if "ends" in e), default=0)
        ends = torch.full((len(examples), max(most, 1)), -1)
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            places = list(example.get("ends", []))
            if places and not 0 <= min(places) <= max(places) < length:
                raise DataError(f"row {row} of a batch: a step ends outside of its text")
            ends[row, : len(places)] = torch.tensor(places, dtype=torch.int64)
            labels[row, places] = torch.tensor(list(example.get("targets", [])))
        count = (labels != IGNORE_INDEX).sum(dim=1)
        return {
            "labels": labels.long() if self.num_labels == 3 else labels,
            "ends": ends,
            "weight": batch["real"] * count,
        }


class ProcessRewardTrainer(TokenTrainer):
    """Train a process reward model, exactly. Chapter 3.

    Parameters
    ----------
    model, args, train_dataset, eval_dataset, formatter, processing_class, **kwargs
        As for :class:`companion.training.ExactTrainer`, with :class:`ProcessRewardConfig`
        and rows of the kind ``steps``, or with ``input_ids``, ``ends`` and ``targets``. ``predict``
        gives logits ``[n, S × labels]`` at the ends of the steps, NaN beyond a row's own.
    """

    args: ProcessRewardConfig
    config_class = ProcessRewardConfig
    formats = staticmethod(format_steps)
    format_settings: ClassVar = {
        "separator": "step_separator",
        "label_type": "label_type",
        "neutral": "neutral",
    }
    collator_class = StepCollator
    collator_settings = ("num_labels",)
    ids = ("input_ids", "ends", "targets")
    predicted = slice(OWN + 1, None)
    wide = "ends"

    @classmethod
    def readout(cls, args: Any) -> TokenReadout:
        """Three classes or one logit at the end of each step."""
        return TokenReadout(
            "process",
            args.num_labels,
            args.aggregation,
            separator=args.step_separator,
            step_score=args.step_score,
            chat=args.text != "plain",
        )

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """The kind's own columns: labelled steps that are right, and the steps' logits."""
        labels, ends = inputs["labels"], inputs["ends"]
        logits = text_logits(model, inputs).float()
        counted = labels != IGNORE_INDEX
        detached = logits.detach()
        finite = torch.isfinite(detached).all(dim=-1) | ~counted
        bad = ~finite.all(dim=1) & (inputs["real"] > 0)
        self.refuse_not_finite(bad, inputs["row"])
        if logits.shape[-1] == 3:
            losses = process_loss(logits, labels)
            right = detached.argmax(dim=-1) == labels
        else:
            losses = outcome_loss(logits.squeeze(-1), labels)
            right = (detached.squeeze(-1) > 0) == (labels > 0.5)
        count = counted.sum(dim=1)
        # a row without any label has loss 0 and weight 0, not 0/0
        loss = losses.sum(dim=1) / count.clamp(min=1)
        head = make_table(inputs, loss, text_lengths(inputs), (right & counted).sum(dim=1))
        at_ends = detached.gather(1, ends.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1]))
        own = at_ends.masked_fill((ends < 0)[..., None], float("nan"))
        return torch.cat([head, self.wide_columns(own)], dim=1)

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """``accuracy`` over all labelled steps."""
        right, labelled = table[:, OWN].sum(), table[:, WEIGHT].sum()
        return {"accuracy": SumCount(float(right), round(float(labelled)))}

    def further(self, table: Tensor) -> dict[str, float]:
        """The number of labelled steps."""
        return {"num_steps": float(table[:, WEIGHT].sum())}


def _scored(
    given: Sequence[Mapping[str, Any]],
    rows: Dataset,
    predictions: np.ndarray,
    about: RewardManifest,
) -> StepEvaluation:
    readout = TokenReadout.from_dict(about.readout, MANIFEST_FILE)
    targets = step_targets(given, readout, about.training)
    logits = [
        values.reshape(-1, readout.labels)[: len(own)]
        for values, own in zip(predictions, targets, strict=True)
    ]
    return StepEvaluation(list(given), [None] * len(given), readout, logits=logits, targets=targets)


KIND = Kind(ProcessRewardTrainer, "steps", _scored, RowArguments)


def train_process(
    config: ProcessRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    **options: Unpack[Options],
) -> TrainingResult[StepEvaluation]:
    """Train, measure and save a process reward model, a plain token-classification checkpoint.

    The threshold of the first error is fitted on held-out rows that are not those of the figures.
    See :func:`companion.training.train`.
    """
    return train(KIND, config, model, data, **options)
