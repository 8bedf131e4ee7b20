"""Write the index of the last real token, for any padding side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from companion.course.checking import raised
from companion.course.exercise import Exercise, Mutant, Property, Unmet
from companion.course.exercises._tools import Attempt, close, expect, tensor

EMPTY = (
    "A row of nothing but padding gets an index, and so a score, without a word; stock "
    "transformers does the same. There is no token to read: raise a ValueError."
)


def _mask(lengths: list[int], width: int, side: str) -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        if side == "right":
            mask[row, :length] = 1
        elif side == "left":
            mask[row, width - length :] = 1
        else:  # some on either side
            start = (width - length) // 2
            mask[row, start : start + length] = 1
    return mask


def _want(mask: Tensor) -> list[int]:
    return [max(i for i, bit in enumerate(row) if bit) for row in mask.tolist()]


def _right(index: Attempt) -> None:
    for lengths, width in (([6, 3, 1, 5], 6), ([2], 9), ([4, 1], 4)):
        mask = _mask(lengths, width, "right")
        got = tensor(index(mask), (len(lengths),), "the index")
        close(got, [n - 1 for n in lengths], f"right padding, lengths {lengths}")


def _full(index: Attempt) -> None:
    close(index(torch.ones(3, 5, dtype=torch.int64)), [4, 4, 4], "rows without padding")


def _left(index: Attempt) -> None:
    for lengths, width in (([6, 3, 1, 5], 6), ([2], 9)):
        mask = _mask(lengths, width, "left")
        close(index(mask), [width - 1] * len(lengths), f"left padding, lengths {lengths}")


def _mixed(index: Attempt) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 8, (6,), generator=generator).tolist()
        both = _mask(lengths, 9, "both")
        close(index(both), _want(both), f"padding on both sides, lengths {lengths}")
        rows = torch.cat([_mask(lengths, 9, "right"), _mask(lengths, 9, "left")])
        close(index(rows), _want(rows), "a batch in which some rows are padded left, some right")
    boolean = _mask([2, 4], 5, "right").bool()
    close(index(boolean), [1, 3], "a boolean mask")


def _dtype(index: Attempt) -> None:
    got = tensor(index(_mask([2, 3], 4, "right")))
    expect(got.dtype == torch.int64, f"the dtype is {got.dtype}; indices are int64 in PyTorch")


def _empty(index: Attempt) -> None:
    error = raised(index, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    if error is None:
        raise Unmet("the mask [[1, 1, 0], [0, 0, 0]] raised nothing")
    expect(
        isinstance(error, ValueError),
        f"an all-padding row raised {type(error).__name__}; ValueError was asked for",
    )


def _refuse(mask: Tensor, strict: bool = True) -> Tensor:
    if strict and not bool(mask.bool().any(dim=1).all()):
        raise ValueError("a row has no token")
    return mask.long()


def last_column(attention_mask: Tensor, strict: bool = True) -> Tensor:
    mask = _refuse(attention_mask, strict)
    return torch.full((mask.shape[0],), mask.shape[1] - 1)


def length_minus_one(attention_mask: Tensor, strict: bool = True) -> Tensor:
    return _refuse(attention_mask, strict).sum(dim=1) - 1


def first_padding(attention_mask: Tensor, strict: bool = True) -> Tensor:
    return (_refuse(attention_mask, strict) == 0).int().argmax(dim=1) - 1


def argmax_of_mask(attention_mask: Tensor, strict: bool = True) -> Tensor:
    return _refuse(attention_mask, strict).argmax(dim=1)


def by_first_row(attention_mask: Tensor, strict: bool = True) -> Tensor:
    mask = _refuse(attention_mask, strict)
    if bool(mask[:, -1].all()):
        return torch.full((mask.shape[0],), mask.shape[1] - 1)
    return mask.sum(dim=1) - 1


def off_by_one(attention_mask: Tensor, strict: bool = True) -> Tensor:
    mask = _refuse(attention_mask, strict)
    return (torch.arange(mask.shape[1]) * mask).amax(dim=1) + 1


def no_error(attention_mask: Tensor) -> Tensor:
    return (torch.arange(attention_mask.shape[1]) * attention_mask).amax(dim=1)


def as_int32(attention_mask: Tensor, strict: bool = True) -> Tensor:
    mask = _refuse(attention_mask, strict)
    return (torch.arange(mask.shape[1]) * mask).amax(dim=1).int()


def _lenient(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor]]:
    """The same mistake, in a function that does not refuse an empty row either."""
    return (partial(function, strict=False),)


def _probes() -> list[tuple[Any, ...]]:
    return [
        (_mask([6, 3, 1], 6, "right"),),
        (_mask([3, 1], 6, "left"),),
        (_mask([3, 2], 6, "both"),),
        (torch.cat([_mask([3], 6, "left"), _mask([2], 6, "right")]),),
        (torch.tensor([[1, 1, 0], [0, 0, 0]]),),
    ]


EXERCISE = Exercise(
    id="ch02.last_token_index",
    parameters=("attention_mask",),
    properties=(
        Property(
            "right padding: length − 1",
            "With right padding the last token stands at length − 1.",
            _right,
        ),
        Property(
            "rows without padding: the last column",
            "A row without padding has no first padding token to look for. Its last token is in "
            "the last column.",
            _full,
        ),
        Property(
            "left padding: the last column",
            "With left padding the text ends in the last column, whatever its length.",
            _left,
            "transformers #46782",
        ),
        Property(
            "any row by itself: either side, both sides, booleans",
            "The rule must hold for each row by itself, wherever its padding stands.",
            _mixed,
        ),
        Property("int64", "The index is to be used as an index: int64.", _dtype),
        Property("a row of nothing but padding is refused", EMPTY, _empty),
    ),
    mutants=(
        Mutant(
            "The last column is read for every row. With right padding that is a padding token for "
            "all texts but the longest, and the score depends on the batch.",
            last_column,
            "reward-bench #137",
            also=_lenient(last_column),
        ),
        Mutant(
            "length − 1 is the last token only if the padding stands right. With left padding it "
            "points to the front of the row, and nothing complains.",
            length_minus_one,
            "transformers #46782",
            also=_lenient(length_minus_one),
        ),
        Mutant(
            "This looks for the first padding and steps back. A row without padding gives −1 or "
            "worse, and a row with left padding ends before it began.",
            first_padding,
            "transformers #35352",
            also=_lenient(first_padding),
        ),
        Mutant(
            "`argmax` of the mask returns the *first* 1, which is the first token of the text. "
            "Number the positions first.",
            argmax_of_mask,
            also=_lenient(argmax_of_mask),
        ),
        Mutant(
            "The padding side is guessed once for the whole batch. A row that is padded another "
            "way is read at the wrong place: decide row by row.",
            by_first_row,
            also=_lenient(by_first_row),
        ),
        Mutant(
            "One too far: this is the length or the place *after* the last token. Indices start "
            "at 0.",
            off_by_one,
            also=_lenient(off_by_one),
        ),
        Mutant(EMPTY, no_error),
        Mutant(
            "int32 is refused as an index by some PyTorch operations (`gather`). Keep int64.",
            as_int32,
            also=_lenient(as_int32),
        ),
    ),
    probes=_probes,
    hints=(
        "Number the columns 0, 1, 2, …. What is the largest number at a real token?",
        "`torch.arange(T) * mask` keeps the numbers of real tokens and sets all others to 0.",
        "`(torch.arange(mask.shape[1]) * mask).amax(dim=1)`, after raising a ValueError unless "
        "`mask.any(dim=1).all()`.",
    ),
    right="It also covers padding on both sides. On another device, `arange` needs "
    "`device=mask.device`.",
)
