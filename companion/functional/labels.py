"""Labels of outcome and process reward models (Chapter 3).

Positions count a row's real tokens from 0, so that the padding side does not matter. What carries
no label is -100, which every loss skips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from companion.errors import DataError, ShapeError
from companion.functional.checks import as_mask, has_dims
from companion.functional.losses import IGNORE_INDEX

#: rating of a step -> class of the process head
STEP_CLASSES: dict[int, int] = {-1: 0, 0: 1, 1: 2}
#: how the labels of steps are taken: three classes, good or bad, or probabilities of good
LABEL_TYPES = ("three", "binary", "soft")
#: what a label of 0 may be where steps are good or bad
NEUTRALS = ("good", "bad", "ignore")


def _real_positions(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mask as booleans, and for each token how many real tokens stand before it."""
    mask = as_mask("attention_mask", attention_mask)
    has_dims("attention_mask", mask, 2, "[B, T]")
    return mask, mask.long().cumsum(dim=1) - 1


def completion_mask(attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """True at the tokens of the completion: real, and behind the prompt.

    Parameters
    ----------
    attention_mask : Tensor
        ``[B, T]``, 1 (or true) at real tokens, padding on any side.
    prompt_lengths : Tensor
        ``[B]`` integers, real tokens of each prompt.

    Returns
    -------
    Tensor
        ``[B, T]`` booleans.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    DataError
        If a row has no completion token left, or a negative prompt length; the row is named.
    """
    mask, position = _real_positions(attention_mask)
    if prompt_lengths.shape != mask.shape[:1]:
        raise ShapeError(
            f"prompt_lengths must be [{mask.shape[0]}], not {list(prompt_lengths.shape)}"
        )
    lengths = prompt_lengths.to(mask.device)
    bad = (lengths < 0) | (lengths >= mask.sum(dim=1))
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise DataError(
            f"row {row}: a prompt of {int(lengths[row])} tokens in a text of "
            f"{int(mask[row].sum())} leaves no completion",
            "drop rows whose completion is empty or was cut away",
        )
    return mask & (position >= lengths[:, None])


def outcome_labels(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    """Copy each row's outcome onto all its completion tokens.

    Parameters
    ----------
    attention_mask : Tensor
        ``[B, T]``, 1 (or true) at real tokens, padding on any side.
    prompt_lengths : Tensor
        ``[B]`` integers, real tokens of each prompt.
    outcomes : Tensor
        ``[B]`` booleans, or integers 0 (wrong) and 1 (right).

    Returns
    -------
    Tensor
        ``[B, T]`` int64: 0 or 1 at completion tokens, -100 at prompt and padding.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    DataError
        If a row has no completion token.
    """
    inside = completion_mask(attention_mask, prompt_lengths)
    outcome = as_mask("outcomes", outcomes).to(inside.device)
    if outcome.shape != inside.shape[:1]:
        raise ShapeError(f"outcomes must be [{inside.shape[0]}], not {list(outcome.shape)}")
    spread = outcome.long()[:, None].expand(inside.shape)
    return torch.where(inside, spread, IGNORE_INDEX)


def step_boundaries(prompt_length: int, step_lengths: Sequence[int]) -> list[int]:
    """Position of the last token of each step, counted from the first real token.

    Parameters
    ----------
    prompt_length : int
        Tokens of the prompt.
    step_lengths : sequence of int
        Tokens of each step, its separator included; at least one each.

    Raises
    ------
    DataError
        If a length is not positive (a step without a token has no place for a label).
    """
    boundaries, end = [], prompt_length
    for number, length in enumerate(step_lengths):
        if length < 1:
            raise DataError(f"step {number} has {length} tokens; it needs at least one")
        end += length
        boundaries.append(end - 1)
    return boundaries


def step_labels(
    attention_mask: Tensor,
    boundaries: Sequence[Sequence[int]],
    ratings: Sequence[Sequence[int | None]],
) -> Tensor:
    """Put each step's class at the step's last token.

    Parameters
    ----------
    attention_mask : Tensor
        ``[B, T]``, 1 (or true) at real tokens, padding on any side.
    boundaries : sequence of sequences of int
        For each row the positions of the steps' last tokens, counted from the first real token
        (:func:`step_boundaries`).
    ratings : sequence of sequences of int or None
        For each row the steps' ratings, -1, 0 or +1; None for a step that nobody rated.

    Returns
    -------
    Tensor
        ``[B, T]`` int64: 0 for -1, 1 for 0, 2 for +1; -100 elsewhere. (A raw -1 would raise deep
        inside the cross-entropy, or index the last class from behind.)

    Raises
    ------
    ShapeError
        If the counts of rows or of steps differ.
    DataError
        If a rating is unknown, or a boundary lies outside the row or is used twice.
    """
    mask, _ = _real_positions(attention_mask)
    rows = mask.shape[0]
    if not len(boundaries) == len(ratings) == rows:
        raise ShapeError(
            f"{rows} rows in the mask, {len(boundaries)} of boundaries, {len(ratings)} of ratings"
        )
    labels = torch.full(mask.shape, IGNORE_INDEX, dtype=torch.int64, device=mask.device)
    for row in range(rows):
        places, values = list(boundaries[row]), list(ratings[row])
        if len(places) != len(values):
            raise ShapeError(f"row {row}: {len(places)} steps but {len(values)} ratings")
        length = int(mask[row].sum())
        columns = mask[row].nonzero().squeeze(1)
        if len(set(places)) != len(places):
            raise DataError(f"row {row}: two steps end at the same token")
        for place, value in zip(places, values, strict=True):
            if not 0 <= place < length:
                raise DataError(
                    f"row {row}: a step ends at token {place} of a text of {length}",
                    "a text that was cut loses its last steps: drop it, or drop those ratings",
                )
            if value is None:
                continue
            if value not in STEP_CLASSES:
                raise DataError(
                    f"row {row}: a step is rated {value!r}", "ratings are -1, 0, +1 or None"
                )
            labels[row, columns[place]] = STEP_CLASSES[value]
    return labels


def step_target(label: Any, label_type: str, neutral: str, where: str) -> float:
    """A step's label as the loss takes it: a class, a probability, or -100.

    Parameters
    ----------
    label : int, float or None
        −1, 0 or +1; with soft labels the probability that the step is good; None (or NaN) for a
        step that nobody rated.
    label_type : str
        One of :data:`LABEL_TYPES`.
    neutral : str
        What 0 is with ``label_type="binary"``, one of :data:`NEUTRALS`.
    where : str
        How to call the place in errors.

    Raises
    ------
    DataError
        For a label that does not fit the type.
    """
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return IGNORE_INDEX
    if label_type == "soft":
        if not 0 <= label <= 1:
            raise DataError(
                f"{where}: the label {label!r} is no probability",
                "soft labels lie in [0, 1]; for −1, 0 and +1 take --label_type three or binary",
            )
        return float(label)
    if label not in STEP_CLASSES:
        raise DataError(
            f"{where}: the label {label!r} is none of −1, 0, +1 and null",
            "for probabilities take --label_type soft",
        )
    if label_type == "three":
        return STEP_CLASSES[int(label)]
    if label == 0:
        return {"good": 1.0, "bad": 0.0, "ignore": IGNORE_INDEX}[neutral]
    return float(label > 0)
