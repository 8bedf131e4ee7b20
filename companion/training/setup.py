"""What every trainer of the companion checks before it trains, and says when scores break.

The pairwise trainer builds on TRL's, the others on transformers', so they have no base in common
that could hold this. Chapter 4.
"""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset
from torch import Tensor

from companion.errors import CompanionError, DataError, ModelError
from companion.formatting import RewardFormatter
from companion.models.packed_attention import packing_obstacle
from companion.models.reward_model import RewardModel

logger = logging.getLogger(__name__)


def require_rows(dataset: Any, items: str) -> None:
    """Refuse rows that come as a stream.

    Raises
    ------
    DataError
        If it is no ``datasets.Dataset``.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"train_dataset is a {type(dataset).__name__}",
            f"give a datasets.Dataset: the {items} of a step cannot be counted in a stream",
        )


def unpack_model(
    model: Any, args: Any, processing_class: Any, formatter: RewardFormatter | None
) -> tuple[Any, Any, RewardFormatter]:
    """The bare model, its tokenizer and its formatter, from whatever was given.

    Parameters
    ----------
    model : RewardModel, PreTrainedModel or PeftModel
    args : PairwiseRewardConfig
        For ``max_length`` and ``overlong`` of a formatter that has to be made.
    processing_class : PreTrainedTokenizerBase, optional
    formatter : RewardFormatter, optional

    Raises
    ------
    ModelError
        If a bare model comes with neither tokenizer nor formatter.
    """
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


def switch_evaluation_off(args: Any, items: str) -> None:
    """There are no held-out rows: no evaluation during training, and a line about it."""
    if args.eval_strategy != "no":
        logger.info(f"no held-out {items} were given: no evaluation during training")
        args.eval_strategy = type(args.eval_strategy)("no")
        args.do_eval = False


def refuse_shared_rows(trainer: Any, items: str) -> None:
    """Refuse set-ups in which ranks share rows, which are counted once a rank.

    Raises
    ------
    CompanionError
        For tensor, context or sequence parallelism, and for ``nn.DataParallel``.
    """
    sizes = {"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size()}
    sizes["sequence"] = trainer.get_sp_size()
    used = [f"{name} parallelism of {size}" for name, size in sizes.items() if size > 1]
    if trainer.args.n_gpu > 1:
        used.append(f"nn.DataParallel over {trainer.args.n_gpu} GPUs")
    if used:
        raise CompanionError(
            f"{' and '.join(used)}: ranks would share {items}, which are counted once a rank",
            "start a process for each device (torchrun, accelerate launch: DDP, FSDP, DeepSpeed "
            "ZeRO), or show it one device (CUDA_VISIBLE_DEVICES=0)",
        )


def use_packing(model: Any, args: Any) -> bool:
    """Whether batches are packed; if not although they were to be, the log says why."""
    if args.packing == "off":
        return False
    why = packing_obstacle(model, training=True)
    if args.torch_compile:
        why = "torch_compile would compile anew for every batch"
    if why is not None and args.process_index == 0:
        logger.warning(f"batches are padded, not packed: {why}")
    return why is None


def refuse_not_finite(bad: Tensor, rows: Tensor, step: int) -> None:
    """Stop if the scores of a real item are not finite.

    Parameters
    ----------
    bad : Tensor
        ``[B]`` bool.
    rows : Tensor
        ``[B]`` rows of the source, -1 if unknown.
    step : int
        For the message.

    Raises
    ------
    ModelError
        With the first such rows.
    """
    if bool(bad.any()):
        named = rows[bad].tolist()
        where = f"rows {', '.join(map(str, named[:5]))}" if min(named) >= 0 else "a batch"
        raise ModelError(
            f"step {step}: scores that are not finite in {where}",
            "lower the learning rate, clip gradients (max_grad_norm), take bf16 in place of "
            "fp16, and check that the base gives finite scores",
        )
