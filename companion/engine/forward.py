"""From token ids to scores or logits: backbone, read-out by the mask, head in fp32 (Chapter 2).

Padded batches and packed ones: both give each text the values that it has alone. Both switch the
model's attention while it runs, so each holds the model's lock
(:func:`companion.models.locking.lock_of`) for that time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from companion.engine.attention import packed_mode, plain_mode
from companion.engine.last_layer import LastLayer, prunable, pruned_last_layer
from companion.engine.packing import PackedBatch
from companion.engine.padded import pad_batch
from companion.engine.positions import forget_lengths, length_borders, length_classes
from companion.engine.sdpa import repeated_heads
from companion.errors import ModelError, ShapeError
from companion.functional.checks import as_float
from companion.functional.readout import last_token_readout, position_ids_from_mask
from companion.models.guards import check_batch, check_positions
from companion.models.head import ScoreHead, find_head, without_adapter


def reward_scores(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    check: bool = True,
    **backbone_arguments: Any,
) -> Tensor:
    """Score each row of a padded batch; gradients flow.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder with a sequence-classification head of one label.
    input_ids : Tensor
        ``[B, T]`` integers.
    attention_mask : Tensor, optional
        ``[B, T]``, 1 at real tokens; None if no row is padded. Padding may stand left or right.
    check : bool
        Run :func:`companion.models.check_batch` first.
    **backbone_arguments
        Handed to the backbone as they are.

    Returns
    -------
    Tensor
        ``[B]`` in float32 (float64 for a float64 model), whatever the autocast.

    Notes
    -----
    A right-padded batch goes through the backbone without its mask: a causal model's real tokens
    cannot see what follows them, and the attention kernels without a mask are faster. A left-padded
    one gets the mask and positions that count real tokens only. Rows whose positions would depend
    on each other's lengths (LongRoPE, dynamic NTK) run apart.

    This is backbone, last token and head, whatever the class's own forward would do; scorers and
    trainers ask :mod:`companion.engine.agreement` first whether that is the same.
    """
    inner, hidden, mask = _padded_hidden(
        model, input_ids, attention_mask, check, **backbone_arguments
    )
    return apply_head(find_head(inner), last_token_readout(hidden, mask))


def token_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """Logits of every token of a padded batch, in fp32; gradients flow. Chapter 3.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder with a token-classification head.
    input_ids, attention_mask, check
        As for :func:`reward_scores`.

    Returns
    -------
    Tensor
        ``[B, T, labels]`` float32 (float64 for a float64 model); what stands at padding has no
        meaning.
    """
    inner, hidden, _ = _padded_hidden(model, input_ids, attention_mask, check)
    logits: Tensor = find_head(inner)(hidden)
    return logits


def _padded_hidden(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    check: bool,
    **backbone_arguments: Any,
) -> tuple[Any, Tensor, Tensor]:
    """The model without its LoRA wrapper, hidden states ``[B, T, D]``, and the mask ``[B, T]``."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if check:
        check_batch(input_ids, attention_mask, model.config)
    inner = without_adapter(model)
    with plain_mode(inner):
        if not length_borders(inner.config):
            hidden = _hidden(inner, input_ids, attention_mask, **backbone_arguments)
            return inner, hidden, attention_mask
        classes = length_classes(inner.config, attention_mask.sum(dim=1).tolist())
        if len(set(classes)) > 1 and (backbone_arguments or _is_sharded(inner)):
            raise ModelError(
                "a batch holds texts of lengths for which the model's positions differ (LongRoPE "
                f"or dynamic NTK, borders {length_borders(inner.config)}), and they cannot run "
                "apart here",
                "set max_length to the border, or train without FSDP and ZeRO-3",
            )
        return inner, _hidden_by_class(inner, input_ids, attention_mask, classes), attention_mask


def _hidden(
    inner: Any, input_ids: Tensor, attention_mask: Tensor, **backbone_arguments: Any
) -> Tensor:
    backbone = getattr(inner, inner.base_model_prefix)
    arguments: dict[str, Any] = {"use_cache": False}
    if not (is_causal(inner.config) and bool(attention_mask[:, 0].bool().all())):
        arguments["attention_mask"] = attention_mask
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            arguments["position_ids"] = position_ids_from_mask(attention_mask)
    forget_lengths(inner)
    with repeated_heads(inner, input_ids.device):
        output = backbone(input_ids, **{**arguments, **backbone_arguments})
    hidden: Tensor = output.last_hidden_state
    return hidden


def _hidden_by_class(
    inner: Any, input_ids: Tensor, attention_mask: Tensor, classes: Sequence[Any]
) -> Tensor:
    """``[B, T, D]``; rows of each class run by themselves, padded to the longest of them alone."""
    parts: list[Tensor] = []
    order: list[int] = []
    width = input_ids.shape[1]
    for each in dict.fromkeys(classes):
        rows = [row for row, own in enumerate(classes) if own == each]
        mask = attention_mask[rows]
        used = mask.any(dim=0).nonzero()
        begin, end = int(used[0]), int(used[-1]) + 1
        hidden = _hidden(inner, input_ids[rows, begin:end], mask[:, begin:end])
        parts.append(nn.functional.pad(hidden, (0, 0, begin, width - end)))
        order += rows
    return torch.cat(parts)[torch.tensor(order, device=input_ids.device).argsort()]


def _is_sharded(model: nn.Module) -> bool:
    """Whether each run of the backbone is an exchange among ranks (FSDP, ZeRO-3)."""
    return any(
        hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor"
        for parameter in model.parameters()
    ) or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def packed_scores(model: Any, batch: PackedBatch) -> Tensor:
    """Score each text of a packed batch; gradients flow.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        One for which :func:`companion.engine.packing_obstacle` finds none.
    batch : PackedBatch
        ``input_ids`` ``[1, T]``, on the model's device.

    Returns
    -------
    Tensor
        ``[N]`` in the order of ``batch.rows``, in float32 (float64 for a float64 model), whatever
        the autocast.

    Raises
    ------
    ModelError
        If the attention meets something that it cannot pack, or a layer has another attention.
    """
    inner = without_adapter(model)
    if prunable(inner):
        last_layer = LastLayer(batch.segments, batch.readout, batch.ends)
        hidden = packed_hidden(inner, batch, last_layer)[0]
    else:
        hidden = packed_hidden(inner, batch)[0, batch.readout]
    return apply_head(find_head(inner), as_float("hidden states", hidden))


def packed_token_logits(model: Any, batch: PackedBatch) -> Tensor:
    """Logits of every token of a packed batch, in fp32; gradients flow. Chapter 3.

    Parameters
    ----------
    model, batch
        As for :func:`packed_scores`; the head is one for every token.

    Returns
    -------
    Tensor
        ``[T, labels]`` float32 (float64 for a float64 model);
        :meth:`companion.engine.PackedBatch.text_places` says which belong to a text.
    """
    inner = without_adapter(model)
    logits: Tensor = find_head(inner)(packed_hidden(inner, batch)[0])
    return logits


def packed_hidden(inner: Any, batch: PackedBatch, last_layer: LastLayer | None = None) -> Tensor:
    """Hidden states of a packed batch, from a model without its LoRA wrapper.

    Returns
    -------
    Tensor
        ``[1, T, D]``; with a `last_layer` ``[1, N, D]``, those of the tokens that it reads.
    """
    backbone = getattr(inner, inner.base_model_prefix)
    computed_again = torch.is_grad_enabled() and bool(inner.is_activation_checkpointing)
    with contextlib.ExitStack() as stack:
        stack.enter_context(packed_mode(inner, keep=computed_again))
        if last_layer is not None:
            stack.enter_context(pruned_last_layer(inner, keep=computed_again))
        batch.segments.callers.clear()  # under the model's lock: threads may share a batch
        output = backbone(
            batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            packed_segments=batch.segments if last_layer is None else last_layer,
        )
        called = len(batch.segments.callers)
    layers = inner.config.get_text_config().num_hidden_layers
    if called != layers:
        raise ModelError(
            f"{called} of the {layers} layers of {type(inner).__name__} called the packed "
            "attention; the others mixed the texts of the row",
            "set packing to 'off'",
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def apply_head(head: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states ``[B, D]`` to scores ``[B]`` in fp32, autocast or not.

    Raises
    ------
    ShapeError
        If the head gives more than one value a row.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if isinstance(head, nn.Linear) and not isinstance(head, ScoreHead):
            dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
            bias = None if head.bias is None else head.bias.to(dtype)
            scores = nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), bias)
        else:
            scores = head(hidden)
    if scores.shape[-1] != 1:
        raise ShapeError(f"the head gives {scores.shape[-1]} values a row, a reward model one")
    return scores.squeeze(-1)


def stock_scores(
    model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Score with the model's own stock forward, after the guards have looked at the batch.

    For code that must go through ``model(...)`` (trainers, comparisons). Every case in which stock
    transformers would give a wrong number raises :class:`companion.errors.ReadoutError` here.

    Returns
    -------
    Tensor
        ``[B]``, in the dtype that the forward gives.
    """
    check_batch(input_ids, attention_mask, model.config, position_ids=position_ids)
    check_positions(model, attention_mask, position_ids)
    extra = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **extra).logits
    return logits.squeeze(-1)


def own_logits(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits by the full forward that the model's class has, as its author wrote it.

    Returns
    -------
    Tensor
        ``[B, 1]``, or ``[B, T, labels]`` of a token classifier, in float32.

    Raises
    ------
    ModelError
        If the forward gives something else.
    """
    check_batch(input_ids, attention_mask, model.config)
    inner = without_adapter(model)
    with plain_mode(inner):
        forget_lengths(inner)
        # of the class: a trainer puts one of the companion's in its place
        output = type(inner).forward(
            inner,
            input_ids=input_ids,
            attention_mask=attention_mask,
            **token_types(inner, input_ids),
        )
    logits: Tensor = output.logits
    rows, width = input_ids.shape
    if logits.shape[:1] != (rows,) or logits.shape[1:] not in {(), (1,), (width, logits.shape[-1])}:
        raise ModelError(
            f"{type(inner).__name__}: its forward gives logits {list(logits.shape)} for "
            f"{rows} texts of {width} tokens",
            "a reward model gives one value a text, or values for each token",
        )
    return as_float("logits", logits.reshape(rows, 1) if logits.dim() == 1 else logits)


def token_types(inner: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """``token_type_ids`` of an encoder that tells two parts of a text apart (BERT): 0, then 1.

    The second part begins behind the first token that ends a text (``[SEP]``).
    """
    kinds = getattr(inner.config, "type_vocab_size", None) or 0
    end = inner.config.eos_token_id
    if kinds < 2 or not isinstance(end, int):
        return {}
    if "token_type_ids" not in inspect.signature(type(inner).forward).parameters:
        return {}
    ends = (input_ids == end).long()
    return {"token_type_ids": (ends.cumsum(dim=1) - ends > 0).long()}


def check_texts(ids: Sequence[Sequence[int]], config: Any) -> None:
    """:func:`companion.models.check_batch` for rows of token ids that will be packed.

    Without padding only their ends can be wrong: a text that ends with the pad id, or two BOS.

    Parameters
    ----------
    ids : sequence of sequences of int
        At least one, none of them empty.
    config : transformers.PretrainedConfig
        Of the model.

    Raises
    ------
    ReadoutError
        It names the row.
    """
    text = config.get_text_config()
    pad, bos = text.pad_token_id, text.bos_token_id
    if pad is not None and not any(
        item[-1] == pad or (bos is not None and list(item[:2]) == [bos, bos]) for item in ids
    ):
        return  # no tensors, which cost as much as a tokenizer; below they say what is wrong
    ends = [[*item[:2], item[-1]] if len(item) > 2 else list(item) for item in ids]
    batch = pad_batch(ends, -1 if pad is None else pad)
    check_batch(batch["input_ids"], batch["attention_mask"], config)


def is_causal(config: Any) -> bool:
    """Whether a token sees only those before it, so that right padding needs no mask."""
    text = config.get_text_config()
    return getattr(text, "is_causal", True) is not False and not getattr(
        text, "use_bidirectional_attention", False
    )
