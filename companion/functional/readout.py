"""Which token's value is the score: the last one of the text, by the attention mask (Chapter 2).

Stock transformers goes by the pad id instead (``GenericForSequenceClassification`` scores the
rightmost token whose id differs from ``config.pad_token_id``) and never looks at the mask. The two
agree if the pad id is right and occurs in padding only; :func:`pad_id_readout_index` is that rule,
kept here to compare and to guard against where they part (transformers #35352, #29419).
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.errors import DtypeError, ReadoutError, ShapeError
from companion.functional.checks import as_float, as_mask, has_dims


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of each row, whatever the padding side.

    Parameters
    ----------
    attention_mask : Tensor
        ``[B, T]``, 1 (or true) at real tokens. Padding may stand right, left or on both sides.

    Returns
    -------
    Tensor
        ``[B]`` int64. Right-padded rows give ``length - 1``.

    Raises
    ------
    ReadoutError
        If a row has no real token; stock transformers scores its position 0 without a word.
    ShapeError, DtypeError
        If the mask is not ``[B, T]`` of booleans, or of 0 and 1.
    """
    mask = as_mask("attention_mask", attention_mask)
    has_dims("attention_mask", mask, 2, "[B, T]")
    # (an axis of length 0 has no maximum, but its rows are empty all the same)
    empty = ~mask.any(dim=1)
    if bool(empty.any()):
        row = int(empty.int().argmax())
        raise ReadoutError(
            f"row {row} of the attention mask is all padding: there is no token to read",
            "drop empty texts before the batch is made",
        )
    if mask.shape[1] == 0:  # and no row at all
        return torch.zeros(0, dtype=torch.int64, device=mask.device)
    position = torch.arange(mask.shape[1], device=mask.device)
    return (position * mask).amax(dim=1)


def last_token_readout(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Value of the last real token of each row, in float32 or float64.

    Parameters
    ----------
    values : Tensor
        ``[B, T]`` scores or ``[B, T, D]`` hidden states, of floating point.
    attention_mask : Tensor
        ``[B, T]``, 1 (or true) at real tokens.

    Returns
    -------
    Tensor
        ``[B]`` or ``[B, D]``; half precision is upcast after the selection.

    Raises
    ------
    ShapeError
        If `values` does not begin with the mask's ``[B, T]``. A ``[B, T, 1]`` gives ``[B, 1]``.
    ReadoutError
        If a row has no real token.
    """
    if values.dim() not in (2, 3) or values.shape[:2] != attention_mask.shape:
        raise ShapeError(
            f"values must be [B, T] or [B, T, D] for a mask of shape "
            f"{list(attention_mask.shape)}, not {list(values.shape)}"
        )
    index = last_token_index(attention_mask)
    rows = torch.arange(values.shape[0], device=values.device)
    return as_float("values", values[rows, index.to(values.device)])


def pad_id_readout_index(input_ids: Tensor, pad_token_id: int | None) -> Tensor:
    """Index that stock transformers would read: the rightmost token that is not the pad id.

    For comparison and guards; the companion scores by :func:`last_token_index`. If the pad id is
    the EOS id, the EOS is skipped, and a finished text is read like one that was cut off
    (transformers #35352).

    Parameters
    ----------
    input_ids : Tensor
        ``[B, T]`` integers.
    pad_token_id : int or None
        ``config.pad_token_id`` of the model. None reads the last column.

    Returns
    -------
    Tensor
        ``[B]`` int64; 0 for a row of nothing but pad ids, as transformers has it.

    Raises
    ------
    ReadoutError
        If the pad id is None and there are several rows (transformers raises ValueError).
    ShapeError, DtypeError
        If `input_ids` is not ``[B, T]`` of integers.
    """
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise DtypeError(f"input_ids must be integers, not {input_ids.dtype}")
    has_dims("input_ids", input_ids, 2, "[B, T]")
    rows, width = input_ids.shape
    if width == 0:
        raise ShapeError("input_ids has no column")
    if pad_token_id is None:
        if rows != 1:
            raise ReadoutError(
                "config.pad_token_id is None: the rows of a batch cannot be told from padding",
                "set config.pad_token_id to the id that the tokenizer pads with",
            )
        return torch.full((1,), width - 1, dtype=torch.int64, device=input_ids.device)
    position = torch.arange(width, device=input_ids.device)
    return (position * (input_ids != pad_token_id)).amax(dim=1)


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens from 0, whatever the padding side.

    A model with absolute positions (GPT-2) scores left-padded rows wrongly, and silently so, unless
    it is given these. Padding gets position 0 if it stands left, the last one if it stands right;
    no real token attends to either.

    Parameters
    ----------
    attention_mask : Tensor
        ``[B, T]``, 1 (or true) at real tokens.

    Returns
    -------
    Tensor
        ``[B, T]`` int64.

    Raises
    ------
    ShapeError, DtypeError
        If the mask is not ``[B, T]`` of booleans, or of 0 and 1.
    """
    mask = as_mask("attention_mask", attention_mask)
    has_dims("attention_mask", mask, 2, "[B, T]")
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
