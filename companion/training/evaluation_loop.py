"""The evaluation loop of the trainers: n rows in, figures of exactly n rows out.

Chapter 4.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from companion.errors import ModelError
from companion.models.memory import is_out_of_memory
from companion.training.batches import ExactBatches, ItemTables

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


class ExactEvaluation(ExactBatches):
    """Replaces ``Trainer.evaluation_loop``, which averages what batches report.

    In transformers the loss of a batch is repeated batch-size times and averaged, and TRL's metrics
    are means of batch means over ranks (trl #7010). Here each rank's items are gathered as they
    are, the padding is taken out, and the figures are computed from the whole table.
    """

    def item_table(self, model: Any, inputs: Any) -> Any:
        """Score a batch: figures of each item, ``[B, columns]``.

        The first columns are :data:`companion.training.trainer.REAL` (0 for padding) and so on.

        Raises
        ------
        ModelError
            If a score is not finite; the message names the rows.
        """
        raise NotImplementedError

    def evaluated(self, table: Any) -> tuple[dict[str, float], Any]:
        """Figures and predictions from the table of all items, padding taken out."""
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score all rows; ``predictions`` are those of :meth:`evaluated`, in the order of rows.

        Where the memory does not hold a batch, all is begun anew with half as many rows a batch,
        which stays so (under FSDP and DeepSpeed it is an error: ranks could not go on alone).
        """
        model = self._model_for_evaluation()
        model.eval()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # type: ignore[union-attr]
        size = self.args.eval_batch_size
        while (tables := self._score_all(model, dataloader)) is None:
            # outside of the handler, whose traceback holds the tensors
            torch.cuda.empty_cache()
            if size == 1:
                raise ModelError(
                    "evaluation: a single row does not fit into the GPU's memory",
                    "lower max_length, or take --bf16_full_eval",
                )
            size //= 2
            logger.warning(f"evaluation: out of memory, going on with {size} rows a batch")
            self.args.per_device_eval_batch_size = size
            rows: Any = dataloader.dataset
            dataloader = self._get_dataloader(rows.rows, description, size)
        figures, predictions = self.evaluated(tables.pop())
        labels = np.zeros(len(predictions), dtype=np.int64)
        if self.compute_metrics is not None:
            more = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
            figures |= denumpify_detensorize(more)
        prefix = f"{metric_key_prefix}_"
        metrics = {
            name if name.startswith(prefix) else prefix + name: value
            for name, value in figures.items()
        }
        return EvalLoopOutput(
            predictions=predictions, label_ids=labels, metrics=metrics, num_samples=len(predictions)
        )

    def _score_all(self, model: Any, dataloader: DataLoader[Any]) -> ItemTables | None:
        """The items of all batches and ranks; None on all ranks if the memory of one has ended."""
        self.callback_handler.eval_dataloader = dataloader
        tables = ItemTables()
        for batch in dataloader:
            table = None
            try:
                inputs = self._prepare_inputs(batch)
                with torch.no_grad(), self.compute_loss_context_manager():
                    table = self.item_table(model, inputs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                    raise  # the other ranks wait in the middle of their forward
            if self._on_any_rank(table is None):
                return None
            # every rank holds as many rows, padding included, so a plain gather fits
            tables.add(self.accelerator.gather(table).cpu())
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        return tables

    def _on_any_rank(self, said: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return said
        flag = torch.tensor([said], device=self.args.device)
        return bool(self.accelerator.gather(flag).any())

    def _model_for_evaluation(self) -> Any:
        """The wrapped model; wrapped now if nothing was trained yet (as transformers does it)."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
        model: Any = self._wrap_model(self.model, training=False)  # type: ignore[arg-type]
        if len(self.accelerator._models) == 0 and model is self.model:
            whole = self.is_fsdp_enabled and not self.args.torch_compile
            if self.is_deepspeed_enabled or whole:
                model = self.accelerator.prepare(model)
            else:
                model = self.accelerator.prepare_model(model, evaluation_mode=True)
            if self.is_fsdp_enabled:
                self.model = model
            if model is not self.model:
                self.model_wrapped = model
            if self.is_deepspeed_enabled:
                self.deepspeed: Any = self.model_wrapped
        if not self.is_in_train and (self.args.fp16_full_eval or self.args.bf16_full_eval):
            dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16
            model = model.to(dtype=dtype, device=self.args.device)
        return model
