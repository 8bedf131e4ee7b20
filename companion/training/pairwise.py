"""``PairwiseRewardTrainer``: TRL's ``RewardTrainer`` with the exact gradient and exact metrics.

What it changes, each with its reason:

* the loss of a micro-batch is a weighted *sum* over its pairs, divided by the number of pairs of
  the whole step on all ranks. TRL's is the mean of local means, whose gradient is another one
  whenever micro-batches differ in size (Chapter 8);
* the ranks are kept in step by padding pairs of weight 0; accelerate's ``even_batches`` repeats
  rows;
* metrics are computed per pair and reduced by sum and count (trl #7010), and ``predict`` returns a
  row for each pair (TRL returned 9 rewards for 5 pairs);
* rows are tokenised by :class:`companion.formatting.RewardFormatter` only, and what it drops or
  cuts is counted and logged; TRL drops pairs above ``max_length`` without a word;
* the score is read by the attention mask, by a head in fp32 (Chapter 2);
* a batch is packed where that is exact for the model: no padding, and each prompt computed once for
  all its completions, with the same gradient. TRL computes it twice and pads to the longest text.

All the rest (optimisers, schedules, DDP, FSDP, DeepSpeed, checkpoints, trackers, callbacks) is that
of TRL and transformers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput
from trl import RewardTrainer

from companion.errors import ModelError
from companion.formatting import RewardFormatter
from companion.losses import bradley_terry_loss, centering_penalty
from companion.models.guards import check_head, check_tokenizer_and_config
from companion.models.head import find_head, install_head
from companion.models.loading import load_base
from companion.training.batches import ExactBatches
from companion.training.config import PairwiseRewardConfig
from companion.training.evaluation_loop import ExactEvaluation
from companion.training.exact import (
    PairCollator,
    PairMetrics,
    forward_inputs,
    summarise,
    text_lengths,
)
from companion.training.forward import install_forward
from companion.training.progress import TrainingProgress
from companion.training.rows import FormatReport, check_formatted, format_pairs, is_formatted
from companion.training.setup import (
    refuse_not_finite,
    refuse_shared_rows,
    require_rows,
    switch_evaluation_off,
    unpack_model,
    use_packing,
)

logger = logging.getLogger(__name__)


class PairwiseRewardTrainer(ExactBatches, ExactEvaluation, RewardTrainer):
    """Train a Bradley–Terry reward model, exactly. Chapters 4 and 8.

    Parameters
    ----------
    model : str, RewardModel, PreTrainedModel or PeftModel
        A base's name is loaded by :func:`companion.models.load_base`. A bare model needs
        `processing_class` or `formatter`.
    args : PairwiseRewardConfig, optional
    train_dataset : datasets.Dataset
        Pairs (``chosen``, ``rejected``, optionally ``prompt`` and ``margin``), or rows that hold
        ``chosen_ids`` and ``rejected_ids`` already.
    eval_dataset : Dataset or dict of Dataset, optional
        Without it, evaluation during training is switched off.
    formatter : RewardFormatter, optional
        Default: that of the reward model, or one made from `processing_class`.
    processing_class : PreTrainedTokenizerBase, optional
    compute_metrics : callable, optional
        Gets ``EvalPrediction(predictions=[n, 2], label_ids=zeros[n])``: the scores of chosen and
        rejected, and the index of the chosen.
    **kwargs
        ``callbacks``, ``optimizers``, ``peft_config``, … as for TRL's trainer.

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

    # `compute_loss` divides by the number of pairs of the whole step, so that `training_step` must
    # not divide by the accumulation once more.
    loss_is_scaled_for_ga = True
    args: PairwiseRewardConfig

    def __init__(
        self,
        model: Any,
        args: PairwiseRewardConfig | None = None,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        formatter: RewardFormatter | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else PairwiseRewardConfig()
        require_rows(train_dataset, "pairs")
        if isinstance(model, str):
            model = load_base(
                model,
                head_seed=args.seed,
                max_length=args.max_length,
                overlong=args.overlong,  # type: ignore[arg-type]
                trust_remote_code=args.trust_remote_code,
            )
        model, processing_class, self.formatter = unpack_model(
            model, args, processing_class, formatter
        )
        self.format_reports: dict[str, FormatReport] = {}
        if eval_dataset is None:
            switch_evaluation_off(args, "pairs")
        check_tokenizer_and_config(processing_class, model.config)
        head = find_head(model)
        if type(head) is nn.Linear and not hasattr(model, "peft_config"):
            install_head(model)
        check_head(model)
        self._keep_head_trained(model, kwargs.get("peft_config"))
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None)
            or PairCollator(
                processing_class.pad_token_id,
                args.pad_to_multiple_of,  # type: ignore[arg-type]
                model.config,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=processing_class,
            **kwargs,
        )
        install_forward(self.model)
        if isinstance(self.data_collator, PairCollator):
            self.data_collator.packing = use_packing(self.model, self.args)
        if type(self.pop_callback(ProgressCallback)) is ProgressCallback:
            self.add_callback(TrainingProgress())
        refuse_shared_rows(self, "pairs")
        self._window = PairMetrics()  # pairs since the last log
        self._all_pairs = np.zeros(2)  # sum of the loss, and number of pairs, of this call

    @staticmethod
    def _keep_head_trained(model: Any, peft_config: Any) -> None:
        """LoRA neither trains nor saves the head unless it is told to."""
        if peft_config is not None:
            kept = list(peft_config.modules_to_save or [])
            if "score" not in kept:
                peft_config.modules_to_save = [*kept, "score"]  # type: ignore[assignment]
                logger.warning("LoRA: 'score' added to modules_to_save, else the head stays random")
        elif not any(p.requires_grad for p in find_head(model).parameters()):
            raise ModelError(
                "the head is frozen, so the reward stays random",
                'wrap the model with modules_to_save=["score"], or by companion.models.apply_lora',
            )

    # ------------------------------------------------------------------ rows

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Tokenise by the formatter; count and log what was dropped or cut."""
        if is_formatted(dataset):
            rows, report = check_formatted(dataset, max_length=args.max_length, source=dataset_name)
        else:
            rows, report = format_pairs(
                dataset,
                self.formatter,
                source=dataset_name,
                num_proc=args.dataset_num_proc,
            )
        self.format_reports[dataset_name] = report
        lost = report.dropped_overlong or report.truncated or report.identical
        if args.process_index == 0:
            logger.log(logging.WARNING if lost else logging.INFO, str(report))
        return rows

    # ------------------------------------------------------------------ loss

    def per_pair(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Score a batch; the table ``[B, 6]`` of :data:`companion.training.exact.COLUMNS`.

        Raises
        ------
        ModelError
            If a score is not finite; the message names the rows.
        """
        output, lengths = model(**forward_inputs(inputs)), text_lengths(inputs)
        scores = output.logits.squeeze(-1)
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
        weight = inputs["weight"].to(loss.dtype)
        first, second = lengths.to(loss.dtype).chunk(2)
        table = torch.stack([weight, loss, nll, chosen, rejected, first + second], dim=1)
        bad = ~torch.isfinite(table.detach()).all(dim=1) & (weight > 0)
        refuse_not_finite(bad, inputs["row"], self.state.global_step)
        return table

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over the step's pairs, times the number of ranks.

        DDP, FSDP and DeepSpeed average the gradients of the ranks, hence the factor. Without
        `num_items_in_batch` it is the mean over this batch alone.
        """
        table = self.per_pair(model, inputs)
        weight, loss = table[:, 0].detach(), table[:, 1]
        total = torch.where(weight > 0, loss, 0.0).sum()
        if num_items_in_batch is None:
            loss = total / weight.sum().clamp(min=1)
        else:
            loss = total * (self.accelerator.num_processes / num_items_in_batch)
            self._window.add(table)
        return (loss, {"logits": table[:, 3:5]}) if return_outputs else loss

    # ------------------------------------------------------------------ figures

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers; ``training_loss`` is the mean over the pairs of this call."""
        self._window, self._all_pairs = PairMetrics(), np.zeros(2)
        output = super().train(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _drain(self) -> dict[str, float]:
        """Figures of the pairs since the last call, over all ranks."""
        gather = self.accelerator.gather if self.accelerator.num_processes > 1 else None
        figures = summarise(
            self._window.pop(),
            None if gather is None else lambda x: gather(x.to(self.args.device)).cpu(),
        )
        if figures["num_pairs"]:
            self._all_pairs += [figures["loss"] * figures["num_pairs"], figures["num_pairs"]]
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the exact figures of the pairs since the last log in place of averaged averages."""
        if "loss" in logs and "eval_loss" not in logs:
            figures = self._drain()
            self._total_train_tokens += round(figures.pop("tokens"))
            pairs = figures.pop("num_pairs")
            if pairs:
                logs |= figures
            logs["num_tokens"] = self._total_train_tokens
        elif "train_loss" in logs:
            self._drain()
            total, count = self._all_pairs
            if count:
                logs["train_loss"] = float(total / count)
            logs["train_pairs"] = float(count)
        super().log(logs, start_time)

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Score pairs: predictions ``[n, 2]`` (chosen, rejected) in the order of the rows.

        A pair that the formatter dropped for its length has NaN in its place; the metrics leave it
        out, and a log line says how many there are.
        """
        n_rows = len(test_dataset)
        rows = self._prepare_dataset(
            test_dataset, self.processing_class, self.args, metric_key_prefix
        )
        output = super().predict(rows, ignore_keys, metric_key_prefix)
        if len(rows) == n_rows:
            return output
        place = self._places(test_dataset, rows)
        predictions = np.full((n_rows, 2), math.nan, dtype=np.float32)
        predictions[place] = output.predictions
        return output._replace(predictions=predictions)

    def _places(self, given: Dataset, rows: Dataset) -> list[int]:
        if not is_formatted(given):
            return list(rows["row"])
        limit = self.args.max_length
        sizes = (max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in given)
        return [i for i, size in enumerate(sizes) if limit is None or size <= limit]

    # ------------------------------------------------------------------ saving

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # with the chat template in use and its recipe, a checkpoint is a whole reward model
        folder = output_dir if output_dir is not None else self.args.output_dir
        self.formatter.save_pretrained(str(folder))
