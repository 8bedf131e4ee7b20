"""Batches with little padding: sort by length, fill a budget of tokens (Chapter 6).

On 20,000 log-normal lengths a fixed batch of 32 in arrival order is 78% padding; a budget of padded
tokens over sorted lengths is under 4%.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from companion.errors import DataError


def token_budget_batches(
    lengths: Sequence[int], max_tokens: int, max_rows: int | None = None
) -> list[list[int]]:
    """Split indices into batches of similar lengths whose padded size fits a budget.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text, at least 1.
    max_tokens : int
        Budget for rows × longest row of a batch. A text that is longer gets a batch of its own.
    max_rows : int, optional
        Most rows of a batch.

    Returns
    -------
    list of list of int
        Longest texts first, so that a lack of memory shows at once; every index exactly once.

    Raises
    ------
    DataError
        For a budget below 1 or a length below 1.
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise DataError(
            f"the budget is max_tokens={max_tokens}, max_rows={max_rows}", "use positive numbers"
        )
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if order and lengths[order[-1]] < 1:
        raise DataError(f"text {order[-1]} has {lengths[order[-1]]} tokens", "drop empty texts")
    batches: list[list[int]] = []
    for index in order:
        batch = batches[-1] if batches else None
        fits = (
            batch is not None
            and (len(batch) + 1) * lengths[batch[0]] <= max_tokens
            and (max_rows is None or len(batch) < max_rows)
        )
        if batch is not None and fits:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def pad_batch(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Pad token ids to one width.

    Parameters
    ----------
    sequences : sequence of sequences of int
        At least one, none of them empty.
    pad_id : int
        The pad id of the model's configuration.
    side : {"right", "left"}
    pad_to_multiple_of : int, optional
        Round the width up.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask``, both ``[B, T]`` int64.

    Raises
    ------
    DataError
        For no sequence, an empty one, or an unknown side.
    """
    if side not in ("right", "left"):
        raise DataError(f"side is {side!r}", "use 'right' or 'left'")
    if not sequences:
        raise DataError("there is no sequence to pad")
    for row, ids in enumerate(sequences):
        if len(ids) == 0:
            raise DataError(f"sequence {row} is empty", "drop empty texts before the batch is made")
    width = max(map(len, sequences))
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        input_ids[row, place] = torch.as_tensor(ids, dtype=torch.int64)
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
