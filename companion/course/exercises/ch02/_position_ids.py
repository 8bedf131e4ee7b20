"""Write position ids from an attention mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, tensor


def _masks(seed: int) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (5, 1), generator=generator)
    column = torch.arange(8)[None, :]
    left, right = (column >= 8 - lengths).long(), (column < lengths).long()
    return [("right", right), ("left", left), ("mixed", torch.cat([left, right]))]


def _shape(position_ids: Attempt) -> None:
    for _, mask in _masks(0):
        got = tensor(position_ids(mask), tuple(mask.shape), "the position ids")
        expect(got.dtype == torch.int64, f"the dtype is {got.dtype}; indices are int64")


def _real(position_ids: Attempt) -> None:
    for seed in range(3):
        for side, mask in _masks(seed):
            got = tensor(position_ids(mask))
            for row, bits in zip(got.tolist(), mask.tolist(), strict=True):
                seen = [p for p, bit in zip(row, bits, strict=True) if bit]
                expect(
                    seen == list(range(len(seen))),
                    f"{side} padding, mask {bits}: real tokens got the positions {seen}",
                )


def _valid(position_ids: Attempt) -> None:
    for side, mask in _masks(4):
        got = tensor(position_ids(mask))
        low, high = int(got.min()), int(got.max())
        expect(
            low >= 0 and high < mask.shape[1],
            f"{side} padding: positions from {low} to {high} in a row of {mask.shape[1]}",
        )


def _boolean(position_ids: Attempt) -> None:
    mask = torch.tensor([[False, True, True]])
    close(tensor(position_ids(mask))[:, 1:], [[0, 1]], "a boolean mask, real tokens")


def columns(attention_mask: Tensor) -> Tensor:
    return torch.arange(attention_mask.shape[1]).expand(attention_mask.shape).clone()


def from_one(attention_mask: Tensor) -> Tensor:
    return attention_mask.long().cumsum(dim=1)


def negative(attention_mask: Tensor) -> Tensor:
    return attention_mask.long().cumsum(dim=1) - 1


def times_mask(attention_mask: Tensor) -> Tensor:
    return torch.arange(attention_mask.shape[1]) * attention_mask.long()


def from_the_end(attention_mask: Tensor) -> Tensor:
    return (attention_mask.long().flip(1).cumsum(dim=1).flip(1) - 1).clamp(min=0)


def over_rows(attention_mask: Tensor) -> Tensor:
    return (attention_mask.long().cumsum(dim=0) - 1).clamp(min=0)


def as_float(attention_mask: Tensor) -> Tensor:
    return (attention_mask.float().cumsum(dim=1) - 1).clamp(min=0)


def _probes() -> list[tuple[Any, ...]]:
    return [(mask,) for _, mask in _masks(1)]


EXERCISE = Exercise(
    id="ch02.position_ids",
    parameters=("attention_mask",),
    properties=(
        Property(
            "int64, shaped like the mask",
            "Position ids are looked up in a table: int64, one for each token.",
            _shape,
        ),
        Property(
            "real tokens are numbered 0, 1, 2, …",
            "The first real token of each row has position 0, wherever the padding stands.",
            _real,
        ),
        Property(
            "padding gets a position that exists",
            "Padding needs no sensible position, but one that exists: −1 reads past the table, or "
            "its last row.",
            _valid,
        ),
        Property("a boolean mask will do", "A mask may come as booleans.", _boolean),
    ),
    mutants=(
        Mutant(
            "The columns are numbered, padding included. With left padding a text's first token "
            "gets the position of the padding's length: GPT-2 then reads another text, silently.",
            columns,
            "trl #469",
        ),
        Mutant(
            "The positions begin at 1. A model is trained with positions from 0: every token is "
            "shifted by one.",
            from_one,
        ),
        Mutant(
            "Left padding gets −1, which is no row of the position table: an error on a GPU, the "
            "last row elsewhere. Clamp at 0.",
            negative,
        ),
        Mutant(
            "The column numbers are kept at real tokens. With left padding they still count the "
            "padding: the first token has to get 0.",
            times_mask,
        ),
        Mutant(
            "The positions run backwards, from the last token. They count from the text's first "
            "one.",
            from_the_end,
        ),
        Mutant(
            "The sum runs over the rows of the batch (`dim=0`), so that positions depend on the "
            "neighbours. It runs along the text: `dim=1`.",
            over_rows,
        ),
        Mutant("The positions are floats. They index a table of embeddings: int64.", as_float),
    ),
    probes=_probes,
    hints=(
        "At each real token: how many real tokens stand before it?",
        "A cumulative sum along the row counts the real tokens up to and with this one.",
        "`(mask.long().cumsum(dim=1) - 1).clamp(min=0)`.",
    ),
    right="For RoPE models only differences of positions count, which is why left padding works "
    "there without this, and why the bug waits until someone loads a GPT-2.",
)
