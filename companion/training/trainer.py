"""``ExactTrainer``: a ``Trainer`` with the exact gradient and exact figures, for rows of any kind.

A kind says how its rows become token ids, how a batch is made of them, and gives a table with one
row of figures an item; here the table becomes the loss and the figures. Each item has a weight (a
pair or a prompt: 1; a text: its labelled tokens) and a mean loss. What differs from the stock
trainers, each with its reason:

* the loss of a step is the weighted mean over all items of all micro-batches on all ranks
  (contract 4; Chapter 8). TRL's is the mean of local means, whose gradient is another one whenever
  micro-batches differ in size; a stock ``Trainer`` on a token classifier does not divide by the
  accumulation either: its gradient was 8.8 times too large on two ranks with an accumulation of 4;
* the ranks are kept in step by padding rows of weight 0; accelerate's ``even_batches`` repeats
  rows;
* metrics are computed per item and reduced by sum and count (trl #7010), and ``predict`` returns a
  row for each item (TRL returned 9 rewards for 5 pairs);
* rows are tokenised by :class:`companion.formatting.RewardFormatter` only, and what it drops or
  cuts is counted and logged; TRL drops pairs above ``max_length`` without a word;
* the score is read by the attention mask, by a head in fp32 (Chapter 2);
* a batch is packed where that is exact for the model: no padding, and each prompt computed once for
  all its completions, with the same gradient. TRL computes it twice and pads to the longest text.

All the rest (optimisers, schedules, DDP, FSDP, DeepSpeed, checkpoints, trackers, callbacks) is that
of TRL and transformers: a kind's trainer names the class that it stands on, ``class
PairwiseRewardTrainer(ExactTrainer, trl.RewardTrainer)``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from datasets import Dataset
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput

from companion.engine.agreement import check_trainable, packing_fault
from companion.engine.attention import is_proved
from companion.errors import CompanionError, DataError, ModelError
from companion.formatting import RewardFormatter
from companion.functional.reduction import SumCount, all_reduce_metrics
from companion.models.card import write_card
from companion.models.guards import check_head, check_tokenizer_and_config, prepare_token_head
from companion.models.head import find_head, install_head
from companion.models.loading import load_base
from companion.models.lora import apply_lora
from companion.models.manifest import RewardManifest
from companion.models.memory import does_not_fit, is_out_of_memory
from companion.models.one_reader import is_reader, one_reader
from companion.models.readout import Readout, ScalarReadout
from companion.models.reward_model import RewardModel
from companion.models.saving import package_versions
from companion.training.batches import Collator, ItemTables
from companion.training.checkpoints import WholeCheckpoints
from companion.training.config import (
    ModelArguments,
    PairwiseRewardConfig,
    default_learning_rate,
)
from companion.training.evaluation_loop import ExactEvaluation
from companion.training.forward import (
    forward_scores,
    forward_tokens,
    install_forward,
    remove_forward,
)
from companion.training.rows import FormatReport

logger = logging.getLogger(__name__)

#: first columns of the tables of all kinds; what follows is the kind's own. ``real`` is 0 for
#: padding; ``weight`` is how much the item counts in the loss (0: nothing to learn from it);
#: ``loss`` is its mean loss; ``tokens`` its tokens.
REAL, WEIGHT, LOSS, TOKENS, OWN = range(5)


def make_table(inputs: Mapping[str, Any], loss: Tensor, tokens: Tensor, *own: Tensor) -> Tensor:
    """Columns ``[B]`` to the table of a batch, ``[B, 4 + len(own)]`` in the dtype of the loss."""
    columns = (inputs["real"], inputs["weight"], loss, tokens, *own)
    return torch.stack([column.to(loss.dtype) for column in columns], dim=1)


class ExactTrainer(WholeCheckpoints, ExactEvaluation):
    """Base of the trainers of all kinds. Chapters 3, 4 and 8.

    Parameters
    ----------
    model : str, RewardModel, PreTrainedModel or PeftModel
        A base's name is loaded with a fresh head of the kind. A bare model needs
        `processing_class` or `formatter`.
    args : PairwiseRewardConfig, optional
        Of the kind's own class.
    train_dataset : datasets.Dataset
        Rows of the kind, or rows that hold token ids already.
    eval_dataset : Dataset or dict of Dataset, optional
        Without it, evaluation during training is switched off.
    formatter : RewardFormatter, optional
        Default: that of the reward model, or one made from `processing_class`.
    processing_class : PreTrainedTokenizerBase, optional
    compute_metrics : callable, optional
        Gets ``EvalPrediction(predictions=…, label_ids=zeros[n])``, the predictions as ``predict``
        has them.
    **kwargs
        ``callbacks``, ``optimizers``, … as for the trainer that this one stands on.

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

    # `compute_loss` divides by the weight of the whole step, so that `training_step` must not
    # divide by the accumulation once more.
    loss_is_scaled_for_ga: Any = True
    args: PairwiseRewardConfig
    #: class of the settings
    config_class: ClassVar[type[PairwiseRewardConfig]]
    #: tokenises rows of the kind: ``formats(rows, formatter, source=…, num_proc=…, …)``
    formats: ClassVar[Callable[..., tuple[Dataset, FormatReport]]]
    #: what else it takes, and the name of that setting
    format_settings: ClassVar[Mapping[str, str]] = {}
    #: class of what makes a batch, and the settings that it takes
    collator_class: ClassVar[type[Collator]]
    collator_settings: ClassVar[tuple[str, ...]] = ()
    #: the columns of the table that ``predict`` gives
    predicted: ClassVar[slice]
    #: a column whose longest list makes tables wide, so that all are equally wide
    wide: ClassVar[str | None] = None
    #: what the weight of all items of a run is called in its last log
    total: ClassVar[str] = "train_weight"

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
        if not isinstance(train_dataset, Dataset):
            raise DataError(
                f"train_dataset is a {type(train_dataset).__name__}",
                f"give a datasets.Dataset: the {self.items} of a step cannot be counted in a "
                "stream",
            )
        args = self.args = self.config_class() if args is None else args
        if isinstance(model, str):
            start = ModelArguments(model_name_or_path=model)
            model = load_start(self.labels(args), args, start)
        self._widest = 1
        self._notes = list(getattr(model, "notes", ()))
        model, processing_class, self.formatter = _unpack(model, args, processing_class, formatter)
        self.format_reports: dict[str, FormatReport] = {}
        if args.learning_rate is None:
            lora = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
            args.learning_rate = default_learning_rate(lora)
            self._notes.append(
                f"learning rate {args.learning_rate:g}, the default "
                + ("with LoRA" if lora else "for all weights")
            )
        if eval_dataset is None and args.eval_strategy != "no":
            logger.info(f"no held-out {self.items} were given: no evaluation during training")
            args.eval_strategy = type(args.eval_strategy)("no")  # type: ignore[operator]
            args.do_eval = False
        check_tokenizer_and_config(processing_class, model.config)
        _prepare_head(model, self.labels(args), kwargs.get("peft_config"))
        train_dataset = self.prepare_rows(train_dataset, "train")
        named = ("pad_to_multiple_of", *self.collator_settings)
        settings = {name: getattr(args, name) for name in named}
        own = self.collator_class(processing_class.pad_token_id, config=model.config, **settings)
        self.own_collator = own
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or own,
            train_dataset=train_dataset,
            eval_dataset=self._prepare_many(eval_dataset, "eval"),
            processing_class=processing_class,
            **kwargs,
        )
        check_trainable(self.model, processing_class.pad_token_id)
        own.packing = _use_packing(self.model, args, processing_class.pad_token_id)
        if type(self.pop_callback(ProgressCallback)) is ProgressCallback:
            self.add_callback(TrainingProgress())
        _refuse_shared_rows(self)
        self._window = ItemTables()  # items since the last log
        self._sums = np.zeros(2)  # weighted loss, and weight, of this call of `train`
        self._tokens = 0.0
        #: what :meth:`refuse_not_finite` has to look at when the backward is queued
        self._doubts: list[tuple[Tensor, Tensor]] | None = None
        if zero_stage(self) == 3:
            partition(self.model, self.accelerator)

    # ------------------------------------------------------------------ what a kind has to say

    @classmethod
    def readout(cls, args: Any) -> Readout:
        """How the model's values are read."""
        return ScalarReadout()

    @classmethod
    def labels(cls, args: Any) -> int | None:
        """Outputs of the head for every token; None for one score a text."""
        readout = cls.readout(args)
        return None if readout.kind == "scalar" else readout.labels

    @classmethod
    def format_rows(
        cls, dataset: Dataset, formatter: RewardFormatter, args: Any, source: str
    ) -> tuple[Dataset, FormatReport]:
        """Rows of the kind to rows of token ids, with their ``row`` and ``length``."""
        own = {name: getattr(args, of) for name, of in cls.format_settings.items()}
        decide_text(formatter, dataset, args)
        return cls.formats(dataset, formatter, source=source, num_proc=args.dataset_num_proc, **own)

    def check_rows(
        self, dataset: Dataset, source: str
    ) -> tuple[Sequence[int] | np.ndarray, FormatReport | None]:
        """Check rows that hold token ids already; which are kept, and a report."""
        if not len(dataset):
            raise DataError(f"{source}: there are no rows")
        return range(len(dataset)), None

    def sums(self, table: Tensor) -> dict[str, SumCount]:
        """The kind's own means, as sums and counts, of a table on the CPU."""
        raise NotImplementedError

    def further(self, table: Tensor) -> dict[str, float]:
        """What an evaluation has beside the figures of training, from the table of all items."""
        return {}

    # ------------------------------------------------------------------ rows

    def is_formatted(self, dataset: Any) -> bool:
        """Whether the rows hold token ids already."""
        return all(name in dataset.column_names for name in self.ids)

    def prepare_rows(self, dataset: Dataset, name: str) -> Dataset:
        """Tokenise by the formatter; count and log what was dropped or cut."""
        report: FormatReport | None
        if self.is_formatted(dataset):
            kept, report = self.check_rows(dataset, name)
            rows = dataset if len(kept) == len(dataset) else dataset.select(kept)
        else:
            rows, report = self.format_rows(dataset, self.formatter, self.args, name)
        if report is not None:
            self.format_reports[name] = report
            if self.args.process_index == 0:
                lost = report.kept < report.rows or bool(
                    report.truncated or report.identical or report.remarks
                )
                logger.log(logging.WARNING if lost else logging.INFO, str(report))
        if self.wide is not None:
            self._widest = max(self._widest, *map(len, rows[self.wide]))
        return rows

    def _prepare_many(self, dataset: Any, name: str) -> Any:
        if isinstance(dataset, Mapping):
            return {own: self.prepare_rows(rows, own) for own, rows in dataset.items()}
        return self.prepare_rows(dataset, name) if isinstance(dataset, Dataset) else dataset

    # ------------------------------------------------------------------ loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of a micro-batch, all of its parts; returns the loss."""
        doubts: list[tuple[Tensor, Tensor]] = []
        self._doubts = doubts
        try:
            if "parts" in inputs:
                loss = self._run_parts(model, inputs["parts"], num_items_in_batch)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._doubts = None  # what is scored outside of a step is looked at at once
        # read when the backward is queued, so that the GPU does not wait for the host
        for bad, rows in doubts:
            self.refuse_not_finite(bad, rows)
        return loss

    def _run_parts(
        self, model: nn.Module, parts: Sequence[dict[str, Any]], weight: Tensor | int | None
    ) -> Tensor:
        """The parts one after the other; ranks exchange gradients after the last one alone."""
        assert self._cut is not None
        count, *self._n_parts = self._n_parts
        *first, last = [*parts, *(self._cut.filler() for _ in range(count - len(parts)))]
        losses = []
        for part in first:
            with self._without_exchange(model):
                losses.append(super().training_step(model, part, weight))
        return torch.stack([*losses, super().training_step(model, last, weight)]).sum()

    @contextlib.contextmanager
    def _without_exchange(self, model: nn.Module) -> Iterator[None]:
        """Let gradients add up; within an accumulation transformers has seen to that."""
        accelerator = self.accelerator
        if not accelerator.sync_gradients:
            yield
            return
        accelerator.gradient_state._set_sync_gradients(False)
        try:
            with contextlib.ExitStack() as stack:
                if accelerator.distributed_type != DistributedType.DEEPSPEED:
                    stack.enter_context(accelerator.no_sync(model))
                yield
        finally:
            accelerator.gradient_state._set_sync_gradients(True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the weighted mean over the step, times the number of ranks.

        DDP, FSDP and DeepSpeed average the gradients of the ranks, hence the factor. Without
        `num_items_in_batch` it is the mean over this batch alone. A step in which nothing has a
        label has loss and gradient 0, not NaN.
        """
        table = self.item_table(model, inputs)
        weight, loss = table[:, WEIGHT].detach(), table[:, LOSS]
        # `where`, not a product alone: 0 times a NaN is NaN
        total = torch.where(weight > 0, weight * loss, 0.0).sum()
        if num_items_in_batch is None:
            loss = total / weight.sum().clamp(min=1)
        else:
            whole = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            loss = total * (self.accelerator.num_processes / whole)
            self._window.add(table)
        return (loss, {"logits": table[:, self.predicted]}) if return_outputs else loss

    def refuse_not_finite(self, bad: Tensor, rows: Tensor) -> None:
        """Stop if the scores of a real item are not finite.

        Parameters
        ----------
        bad : Tensor
            ``[B]`` bool.
        rows : Tensor
            ``[B]`` rows of the source, -1 if unknown.

        Raises
        ------
        ModelError
            With the first such rows; in training once the backward is queued.
        """
        if self._doubts is not None:
            self._doubts.append((bad, rows))
        elif bool(bad.any()):
            named = rows[bad].tolist()
            where = f"rows {', '.join(map(str, named[:5]))}" if min(named) >= 0 else "a batch"
            raise ModelError(
                f"step {self.state.global_step}: scores that are not finite in {where}",
                "lower the learning rate, clip gradients (max_grad_norm), take bf16 in place of "
                "fp16, and check that the base gives finite scores",
            )

    # ------------------------------------------------------------------ figures

    def summarise(self, table: Tensor, *, all_ranks: bool = False) -> dict[str, float]:
        """Exact figures of a table; over all ranks if asked for (every rank must then call)."""
        weight, loss = table[:, WEIGHT], table[:, LOSS]
        sums = {
            "loss": SumCount(float((weight * loss).sum()), round(float(weight.sum()))),
            f"num_{self.items}": SumCount().add(table[:, REAL]),
            "tokens": SumCount().add(table[:, TOKENS]),
            **self.sums(table),
        }
        if all_ranks:
            all_reduce_metrics(sums)
        figures = {name: value.mean for name, value in sums.items()}
        figures[f"num_{self.items}"] = sums[f"num_{self.items}"].sum
        figures["tokens"] = sums["tokens"].sum
        figures["weight"] = float(sums["loss"].count)
        return figures

    def wide_columns(self, values: Tensor) -> Tensor:
        """``[B, W, …]`` to columns of a table, filled up with NaN to those of the widest row."""
        filling = [0, 0] * (values.dim() - 2) + [0, self._widest - values.shape[1]]
        return nn.functional.pad(values, filling, value=float("nan")).flatten(1)

    def evaluated(self, table: Tensor) -> tuple[dict[str, float], Any]:
        """Figures, and the predictions ``[n, columns]`` float32."""
        figures = self.summarise(table) | self.further(table)
        for name in ("tokens", "weight"):
            del figures[name]
        return figures, table[:, self.predicted].to(torch.float32).numpy()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers; ``training_loss`` is the weighted mean over the whole run.

        Raises
        ------
        ModelError
            Where the GPU's memory ends, with what takes it and the cure.
        """
        try:
            output = super().train(*args, **kwargs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            where = f"step {self.state.global_step}"
            raise does_not_fit(self.model, self.args.device, where) from error
        return output._replace(training_loss=output.metrics["train_loss"])

    def restore(self, totals: Mapping[str, Any]) -> None:
        super().restore(totals)
        self._window = ItemTables()
        self._sums = np.array(totals.get("sums", [0.0, 0.0]))
        self._tokens = float(totals.get("tokens", 0.0))

    def totals(self) -> dict[str, Any]:
        sums, tokens = self._sums.copy(), self._tokens
        if self._window.used:  # items since the last log
            figures = self._figures_of(self._window.table())
            weight = figures["weight"]
            if weight:
                sums += [figures["loss"] * weight, weight]
            tokens += figures["tokens"]
        return super().totals() | {"sums": sums.tolist(), "tokens": tokens}

    def _figures_of(self, table: Tensor) -> dict[str, float]:
        return self.summarise(table, all_ranks=self.accelerator.num_processes > 1)

    def _drain(self) -> dict[str, float]:
        """Figures of the items since the last call, over all ranks; empty if there are none."""
        if not self._window.used:  # on all ranks alike: each holds as many micro-batches
            return {}
        figures = self._figures_of(self._window.pop())
        weight = figures.pop("weight")
        if weight:
            self._sums += [figures["loss"] * weight, weight]
        self._tokens += figures.pop("tokens")
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the exact figures of the items since the last log in place of averaged averages."""
        if "loss" in logs and "eval_loss" not in logs:
            figures = self._drain()
            figures.pop(f"num_{self.items}", None)
            logs |= {name: value for name, value in figures.items() if np.isfinite(value)}
            logs["num_tokens"] = round(self._tokens)
        elif "train_loss" in logs:
            self._drain()
            total, weight = self._sums
            if weight:
                logs["train_loss"] = float(total / weight)
            logs[self.total] = float(weight)
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in transformers; other rows than those of the trainer are tokenised first."""
        rows = self._prepare_many(eval_dataset, metric_key_prefix)
        return super().evaluate(rows, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Score rows: predictions ``[n, columns]`` in the order of the rows.

        A row that was dropped, for its length or for want of a label, has NaN in its place; the
        metrics leave it out, and a log line says how many there are.
        """
        n_rows = len(test_dataset)
        rows = self.prepare_rows(test_dataset, metric_key_prefix)
        output = super().predict(rows, ignore_keys, metric_key_prefix)
        if len(rows) == n_rows:
            return output
        given = self.is_formatted(test_dataset)
        places = self.check_rows(test_dataset, metric_key_prefix)[0] if given else rows["row"]
        found: Any = output.predictions
        predictions = np.full((n_rows, found.shape[1]), np.nan, dtype=np.float32)
        predictions[list(places)] = found
        return output._replace(predictions=predictions)

    # ------------------------------------------------------------------ the model

    def reward_model(self) -> RewardModel:
        """The model as it is now, ready to score and to be saved: in eval mode, its own forward.

        It is the model that was trained, no copy; this trainer cannot go on with it. Every rank
        may call.

        Raises
        ------
        ModelError
            Under ZeRO-3 and FSDP, where no rank holds the whole model.
        """
        if is_sharded(self):
            raise ModelError(
                "no rank holds the whole model: it is sharded (ZeRO-3, FSDP)",
                "save it (trainer.save_model) and load the folder, or train by "
                "companion.training.train, which does both",
            )
        model: Any = self.accelerator.unwrap_model(self.model)
        remove_forward(model)
        model.eval()
        return RewardModel(
            model,
            self.processing_class,
            self.formatter,
            notes=self._notes,
            readout=self.readout(self.args),
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A card with what is known by now, in place of TRL's; the run's own follows at its end."""
        if not self.is_world_process_zero():
            return
        model: Any = self.model
        manifest = RewardManifest(
            base_model=model.config.name_or_path or None,
            readout=self.readout(self.args).to_dict(),
            versions=package_versions(),
        )
        manifest.describe(self.formatter)
        folder = str(self.args.output_dir)
        write_card(folder, manifest, self.formatter, model_id=self.hub_model_id)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # with the chat template in use and its recipe, a checkpoint is a whole reward model
        folder = output_dir if output_dir is not None else self.args.output_dir
        self.formatter.save_pretrained(str(folder))


def zero_stage(trainer: Any) -> int:
    """What DeepSpeed shards (1 to 3); 0 without DeepSpeed."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def is_sharded(trainer: Any) -> bool:
    """Whether no rank holds the whole model."""
    return trainer.is_fsdp_enabled or zero_stage(trainer) == 3


def partition(model: Any, accelerator: Any) -> None:
    """Cut a model for ZeRO-3, a parameter at a time, into shards of what rank 0 holds.

    ``deepspeed.initialize`` does so too, but first puts the whole model on each device.
    """
    import deepspeed

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(accelerator.mixed_precision, torch.float32)
    for parameter in model.parameters():
        if is_reader():
            parameter.data = parameter.data.to(dtype)
        else:  # it will be sent: no memory is touched
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)


def decide_text(formatter: RewardFormatter, rows: Dataset, args: Any) -> str | None:
    """Decide how text is read, as the settings or the training rows say; a note of it, if new.

    The first rows that a formatter is given decide, so those of training come first.
    """
    asked: Any = getattr(args, "text", "auto")
    if asked != "auto":
        formatter.text = asked
        return None
    if formatter.text is None:
        names = {"prompt", "chosen", "completion", "messages"} & set(rows.column_names)
        some = rows.select(range(min(len(rows), 200))).select_columns(sorted(names))
        formatter.decide_text(list(some))
    args.text = formatter.text
    prompts = rows.features.get("prompt")
    if getattr(prompts, "dtype", None) != "string":
        return None
    return (
        "rows of text are read as a question and its answer, in the chat template (--text plain "
        "reads them as they are)"
        if formatter.text == "chat"
        else "rows of text are read as they are, prompt and completion one behind the other "
        "(--text chat writes them in the chat template)"
    )


def load_start(
    labels: int | None, config: PairwiseRewardConfig, model: ModelArguments
) -> RewardModel:
    """A base with a fresh head: of one score a text, or of so many outputs a token (`labels`).

    With an adapter, if one is asked for.
    """
    if model.load_in_4bit and not model.use_peft:
        raise CompanionError(
            "load_in_4bit: weights in 4 bits are not trained", "add --use_peft, which trains LoRA"
        )
    if model.load_in_4bit and _sends(config):
        raise CompanionError(
            "load_in_4bit: weights in 4 bits are not sharded here", "train with DDP or ZeRO-2"
        )
    reading = one_reader(is_proved) if _sends(config) else contextlib.nullcontext()
    with whole_parameters(), reading:
        start = load_base(
            str(model.model_name_or_path),
            labels=labels,
            head_seed=config.seed,
            keep_head=model.keep_head,
            dtype=model.dtype,
            max_length=config.max_length,
            overlong=config.overlong,  # type: ignore[arg-type]
            chat_template=_read_template(config),
            split_special_tokens=config.split_special_tokens,
            attn_implementation=model.attn_implementation,
            revision=model.model_revision,
            trust_remote_code=config.trust_remote_code,
            load_in_4bit=model.load_in_4bit,
        )
        _fit_positions(start, config)
        if model.use_peft:
            apply_lora(start, **model.lora)
        return start


def _sends(config: PairwiseRewardConfig) -> bool:
    """Whether rank 0 will send its weights to the other ranks, which need not read them."""
    if is_deepspeed_zero3_enabled():
        return True
    fsdp = bool(config.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return fsdp and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


def _read_template(config: PairwiseRewardConfig) -> str | None:
    """The chat template of ``--chat_template_path``, if one is given."""
    if config.chat_template_path is None:
        return None
    path = Path(config.chat_template_path)
    if not path.is_file():
        raise CompanionError(f"{path}: no such file", "give a Jinja file")
    return path.read_text(encoding="utf-8")


def _fit_positions(reward_model: RewardModel, config: PairwiseRewardConfig) -> None:
    """A model cannot read beyond the positions that it was made for."""
    most = getattr(reward_model.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    if config.max_length is None or config.max_length > most:
        reward_model.notes.append(
            f"max_length set to {most} tokens (was {config.max_length}): the base has no more "
            "positions"
        )
        config.max_length = most
        reward_model.formatter.max_length = most


@contextlib.contextmanager
def whole_parameters() -> Iterator[None]:
    """Load a model in full on the CPU although ZeRO-3 is on.

    transformers would partition each parameter as it is made: the fresh head could not be drawn
    from a seed, and a load on one rank alone would wait for the others for ever. A model that is
    trained is cut by :func:`partition`.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            deepspeed.set_hf_deepspeed_config(reference())


def _prepare_head(model: Any, labels: int | None, peft_config: Any) -> None:
    """Check the head, put it in fp32, and give the model the forward of the kind."""
    if labels is not None:
        prepare_token_head(model, labels)
        install_forward(model, forward_tokens)
    else:
        if type(find_head(model)) is nn.Linear and not hasattr(model, "peft_config"):
            install_head(model)
        check_head(model)
        install_forward(model, forward_scores)
    if peft_config is not None:  # LoRA neither trains nor saves the head unless it is told to
        kept = list(peft_config.modules_to_save or [])
        if "score" not in kept:
            peft_config.modules_to_save = [*kept, "score"]
            logger.warning("LoRA: 'score' added to modules_to_save, else the head stays random")
    elif not any(p.requires_grad for p in find_head(model).parameters()):
        raise ModelError(
            "the head is frozen, so the reward stays random",
            'wrap the model with modules_to_save=["score"], or by companion.models.apply_lora',
        )


def _unpack(
    model: Any, args: Any, processing_class: Any, formatter: RewardFormatter | None
) -> tuple[Any, Any, RewardFormatter]:
    """The bare model, its tokenizer and its formatter, from whatever was given."""
    if isinstance(model, RewardModel):
        for note in model.notes:
            logger.info(note)
        processing_class = processing_class or model.tokenizer
        formatter = formatter or model.formatter
        model = model.model
    if processing_class is None and formatter is None:
        raise ModelError(
            "a bare model came without a tokenizer",
            "give processing_class=tokenizer, formatter=…, or the base's name as the model",
        )
    processing_class = processing_class or formatter.tokenizer  # type: ignore[union-attr]
    formatter = formatter or RewardFormatter(
        processing_class, max_length=args.max_length, overlong=args.overlong
    )
    return model, processing_class, formatter


def _refuse_shared_rows(trainer: Any) -> None:
    """Refuse set-ups in which ranks share rows, which are counted once a rank."""
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size()}
    sizes["sequence"] = trainer.get_sp_size()
    used = [f"{name} parallelism of {size}" for name, size in sizes.items() if size > 1]
    if trainer.args.n_gpu > 1:
        used.append(f"nn.DataParallel over {trainer.args.n_gpu} GPUs")
    if used:
        raise CompanionError(
            f"{' and '.join(used)}: ranks would share {trainer.items}, which are counted once a "
            "rank",
            "start a process for each device (torchrun, accelerate launch: DDP, FSDP, DeepSpeed "
            "ZeRO), or show it one device (CUDA_VISIBLE_DEVICES=0)",
        )


def _use_packing(model: Any, args: Any, pad_token_id: int) -> bool:
    """Whether batches are packed; if not although they were to be, the log says why."""
    if args.packing == "off":
        return False
    why = packing_fault(model, pad_token_id, training=True)
    if args.torch_compile:
        why = "torch_compile would compile anew for every batch"
    if why is not None and args.process_index == 0:
        logger.warning(f"batches are padded, not packed: {why}")
    return why is None


class TrainingProgress(ProgressCallback):
    """A bar with the latest figures, and one line for each look at held-out rows.

    In place of transformers' callback, which prints a dictionary for every log.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show training figures in the bar and held-out figures in a line."""
        bar = self.training_bar
        if bar is None or not logs:
            return
        if "loss" in logs:
            bar.set_postfix(
                {name: f"{logs[name]:.3f}" for name in ("loss", "accuracy") if name in logs}
            )
        for key in [key for key in logs if key.endswith("_accuracy")]:
            name = key.removesuffix("accuracy")
            loss = logs.get(name + "nll", logs.get(name + "loss", float("nan")))
            which = name.removeprefix("eval_").strip("_")  # 'eval_hard_' is the set 'hard'
            counts = [k for k in logs if k.startswith(name + "num_")]
            counted = "".join(f", {logs[k]:,.0f} {k.removeprefix(name + 'num_')}" for k in counts)
            bar.write(
                f"step {state.global_step:>6,}  held out{f' ({which})' if which else ''}: "
                f"accuracy {logs[key]:.3f}, loss {loss:.3f} nats{counted}"
            )
