"""``ExactTrainer``: transformers' ``Trainer`` with the exact gradient and exact figures, any rows.

What K-wise, outcome and process models share. A subclass says how rows become token ids, how a
batch is made of them, and gives a table with one row of figures an item; here the table becomes the
loss and the figures. Each item has a weight (a prompt: 1; a text: its labelled tokens) and a mean
loss; the loss of a step is the weighted mean over all items of all micro-batches on all ranks
(contract 4; Chapter 8). A stock ``Trainer`` on a token classifier takes the mean of local means
and does not divide by the accumulation: its gradient was 8.8 times too large on two ranks with an
accumulation of 4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput

from companion.errors import DataError
from companion.formatting import RewardFormatter
from companion.models.guards import check_tokenizer_and_config
from companion.models.reward_model import RewardModel
from companion.reduction import SumCount, all_reduce_metrics
from companion.training.batches import ExactBatches, PairRows
from companion.training.config import PairwiseRewardConfig
from companion.training.evaluation_loop import ExactEvaluation
from companion.training.exact import PairMetrics
from companion.training.progress import TrainingProgress
from companion.training.rows import FormatReport
from companion.training.setup import (
    refuse_shared_rows,
    require_rows,
    switch_evaluation_off,
    unpack_model,
    use_packing,
)

logger = logging.getLogger(__name__)


class PaddedRows(PairRows):
    """Tokenised rows of any kind; the index ``PADDING`` gives a row of weight 0."""

    def __init__(self, rows: Any, padding: Mapping[str, Any]) -> None:
        self._rows = rows
        self._padding = {**padding, "weight": 0.0}


class Table(NamedTuple):
    """First columns of the tables of all kinds; what follows is the kind's own.

    ``real`` is 0 for padding; ``weight`` is how much the item counts in the loss (0: nothing to
    learn from it); ``loss`` is its mean loss; ``tokens`` its tokens.
    """

    real: Tensor
    weight: Tensor
    loss: Tensor
    tokens: Tensor


class ExactTrainer(ExactBatches, ExactEvaluation, Trainer):
    """Base of the trainers of whole rankings and of tokens. Chapter 3.

    Parameters
    ----------
    model : str, RewardModel, PreTrainedModel or PeftModel
        A base's name is loaded with a fresh head of the kind. A bare model needs
        `processing_class` or `formatter`.
    args : PairwiseRewardConfig
        Of the subclass's own class.
    train_dataset : datasets.Dataset
        Rows of the kind, or rows that hold token ids already.
    eval_dataset : Dataset or dict of Dataset, optional
        Without it, evaluation during training is switched off.
    formatter : RewardFormatter, optional
        Default: that of the reward model, or one made from `processing_class`.
    processing_class : PreTrainedTokenizerBase, optional
    **kwargs
        ``callbacks``, ``optimizers``, … as for ``Trainer``.

    Attributes
    ----------
    format_reports : dict of str to FormatReport
        What became of the rows of each set.

    Raises
    ------
    ReadoutError, ModelError
        From the guards, before anything is trained.
    DataError
        For bad rows, or if no row is left.
    """

    # `compute_loss` divides by the weight of the whole step
    loss_is_scaled_for_ga = True
    args: PairwiseRewardConfig
    #: columns by which rows are known to hold token ids already
    ids: ClassVar[tuple[str, ...]]
    #: what an item is called in logs ("prompts")
    items: ClassVar[str]

    def __init__(
        self,
        model: Any,
        args: PairwiseRewardConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        formatter: RewardFormatter | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        require_rows(train_dataset, self.items)
        self.args = args
        if isinstance(model, str):
            model = self.load_base(model)
        model, processing_class, self.formatter = unpack_model(
            model, args, processing_class, formatter
        )
        self.format_reports: dict[str, FormatReport] = {}
        if eval_dataset is None:
            switch_evaluation_off(args, self.items)
        check_tokenizer_and_config(processing_class, model.config)
        self.prepare_model(model)
        train_dataset = self.prepare_rows(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {n: self.prepare_rows(rows, n) for n, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self.prepare_rows(eval_dataset, "eval")
        super().__init__(
            model=model,
            args=args,
            data_collator=self.make_collator(processing_class.pad_token_id, model.config),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=processing_class,
            **kwargs,
        )
        self.data_collator.packing = use_packing(self.model, self.args)  # type: ignore[union-attr]
        if type(self.pop_callback(ProgressCallback)) is ProgressCallback:
            self.add_callback(TrainingProgress())
        refuse_shared_rows(self, self.items)
        self._window = PairMetrics()  # items since the last log
        self._all_items = np.zeros(2)  # sum of the weighted loss, and weight, of this call
        self._all_tokens = 0.0

    # ------------------------------------------------------------------ what a kind has to say

    def load_base(self, name: str) -> RewardModel:
        """Load a base with a fresh head of the kind."""
        raise NotImplementedError

    def prepare_model(self, model: Any) -> None:
        """Check the head, put it in fp32, and give the model the forward of the kind."""
        raise NotImplementedError

    def format_rows(self, dataset: Dataset, source: str) -> tuple[Dataset, FormatReport]:
        """Rows of the kind to rows of token ids."""
        raise NotImplementedError

    def make_collator(self, pad_token_id: int, config: Any) -> Callable[[Sequence[Any]], Any]:
        """From rows of token ids to a batch with ``weight`` and ``row`` ``[B]``.

        Its attribute ``packing`` is set by the trainer.
        """
        raise NotImplementedError

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row that counts nowhere, made in the likeness of a real one."""
        raise NotImplementedError

    def item_table(self, model: Any, inputs: Any) -> Tensor:
        """Score a batch; ``[B, columns]``, the first of which are those of :class:`Table`."""
        raise NotImplementedError

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """The kind's own means, as sums and counts, of a table on the CPU."""
        raise NotImplementedError

    # ------------------------------------------------------------------ rows

    def is_formatted(self, dataset: Any) -> bool:
        """Whether the rows hold token ids already."""
        return all(name in dataset.column_names for name in self.ids)

    def prepare_rows(self, dataset: Dataset, name: str) -> Dataset:
        """Tokenise by the formatter; count and log what was dropped or cut."""
        if self.is_formatted(dataset):
            if not len(dataset):
                raise DataError(f"{name}: there are no rows")
            return dataset
        rows, report = self.format_rows(dataset, name)
        self.format_reports[name] = report
        if self.args.process_index == 0:
            lost = report.kept < report.rows or report.truncated
            logger.log(logging.WARNING if lost else logging.INFO, str(report))
        return rows

    def _with_padding(self, rows: Any) -> PairRows:
        return PaddedRows(rows, self.padding_row(rows[0]))

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the weighted mean over the step, times the number of ranks.

        DDP, FSDP and DeepSpeed average the gradients of the ranks, hence the factor. A step in
        which nothing has a label has loss and gradient 0, not NaN.
        """
        table = self.item_table(model, inputs)
        weight, loss = table[:, 1].detach(), table[:, 2]
        # `where`, not a product alone: 0 times a NaN is NaN
        total = torch.where(weight > 0, weight * loss, 0.0).sum()
        if num_items_in_batch is None:
            loss = total / weight.sum().clamp(min=1)
        else:
            whole = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            loss = total * (self.accelerator.num_processes / whole)
            self._window.add(table)
        return (loss, {"logits": table[:, 4:]}) if return_outputs else loss

    # ------------------------------------------------------------------ figures

    def summarise(
        self, table: Tensor, gather: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """Exact figures of a table; over all ranks if `gather` is given (every rank must call)."""
        head = Table(*table.T[:4])
        sums = {
            "loss": SumCount(
                float((head.weight * head.loss).sum()), round(float(head.weight.sum()))
            ),
            f"num_{self.items}": SumCount().add(head.real),
            "tokens": SumCount().add(head.tokens),
            **self.sums(table),
        }
        figures = (
            {name: value.mean for name, value in sums.items()}
            if gather is None
            else all_reduce_metrics(sums)
        )
        figures[f"num_{self.items}"] = sums[f"num_{self.items}"].sum
        figures["tokens"] = sums["tokens"].sum
        figures["weight"] = float(sums["loss"].count)
        return figures

    def evaluated(self, table: Tensor) -> tuple[dict[str, Any], Any]:
        """Figures, and the kind's own columns as predictions ``[n, columns]`` float32."""
        figures: dict[str, Any] = self.summarise(table)
        for name in ("tokens", "weight"):
            del figures[name]
        return figures, table[:, 4:].to(torch.float32).numpy()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers; ``training_loss`` is the weighted mean over this call."""
        self._window, self._all_items, self._all_tokens = PairMetrics(), np.zeros(2), 0.0
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _drain(self) -> dict[str, float]:
        """Figures of the items since the last call, over all ranks; empty if there are none."""
        if not self._window.used:  # on all ranks alike: each holds as many micro-batches
            return {}
        table = self._window.pop()
        many = self.accelerator.num_processes > 1
        figures = self.summarise(table, self.accelerator.gather if many else None)
        weight = figures.pop("weight")
        if weight:
            self._all_items += [figures["loss"] * weight, weight]
        self._all_tokens += figures.pop("tokens")
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the exact figures of the items since the last log in place of averaged averages."""
        if "loss" in logs and "eval_loss" not in logs:
            figures = self._drain()
            figures.pop(f"num_{self.items}", None)
            logs |= {name: value for name, value in figures.items() if value == value}
            logs["num_tokens"] = self._all_tokens
        elif "train_loss" in logs:
            self._drain()
            total, weight = self._all_items
            if weight:
                logs["train_loss"] = float(total / weight)
            logs["train_weight"] = float(weight)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in transformers; other rows than those of the trainer are tokenised first."""
        if isinstance(eval_dataset, Dataset):
            eval_dataset = self.prepare_rows(eval_dataset, metric_key_prefix)
        elif isinstance(eval_dataset, Mapping):
            eval_dataset = {n: self.prepare_rows(rows, n) for n, rows in eval_dataset.items()}
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Score rows: predictions ``[n, columns]`` in the order of the rows.

        A row that was dropped has NaN in its place; the metrics leave it out.
        """
        n_rows, given = len(test_dataset), self.is_formatted(test_dataset)
        rows = self.prepare_rows(test_dataset, metric_key_prefix)
        output = super().predict(rows, ignore_keys, metric_key_prefix)
        if given or len(rows) == n_rows:
            return output
        found: Any = output.predictions
        predictions = np.full((n_rows, found.shape[1]), np.nan, dtype=np.float32)
        predictions[list(rows["row"])] = found
        return output._replace(predictions=predictions)

    # ------------------------------------------------------------------ saving

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir if output_dir is not None else self.args.output_dir
        self.formatter.save_pretrained(str(folder))


def is_real(examples: Sequence[Mapping[str, Any]]) -> Tensor:
    """``[B]``, 0 for the rows that :class:`PaddedRows` fills batches up with."""
    return torch.tensor([float(e.get("weight", 1.0) > 0) for e in examples])
