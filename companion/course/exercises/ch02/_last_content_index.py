"""Write the index of the last token that is no EOS, for any padding side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from companion.course.checking import raised
from companion.course.exercise import Exercise, Mutant, Property, Unmet
from companion.course.exercises._tools import Attempt, close, expect, tensor

EOS, PAD = 2, 0
EMPTY = (
    "A row without content (nothing but padding and EOS) gets an index, and so a score, without a "
    "word; stock transformers does the same. There is no token to read: raise a ValueError."
)

Batch = tuple[Tensor, Tensor, int]


def _batch(texts: list[list[int]], width: int, side: str, pad: int = PAD) -> Batch:
    """Texts as padded ids and mask; ``both`` has some padding on either side."""
    ids = torch.full((len(texts), width), pad)
    mask = torch.zeros(len(texts), width, dtype=torch.int64)
    for row, text in enumerate(texts):
        start = {"right": 0, "left": width - len(text)}.get(side, (width - len(text)) // 2)
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
    return ids, mask, EOS


def _want(batch: Batch) -> list[int]:
    ids, mask, eos = batch
    return [
        max(i for i, (token, bit) in enumerate(zip(a, b, strict=True)) if bit and token != eos)
        for a, b in zip(ids.tolist(), mask.tolist(), strict=True)
    ]


FINISHED = [[5, 6, 7, EOS], [5, 9, EOS], [8, EOS]]
CUT = [[5, 6, 7, 4], [5, 9], [8]]
DIALOGUE = [[5, EOS, 8, 9, EOS], [EOS, 6, EOS, 7], [7, 7, EOS, EOS]]


def _check(index: Attempt, batch: Batch, what: str) -> None:
    want = _want(batch)
    got = tensor(index(*batch), (len(want),), "the index")
    close(got, want, f"{what}: ids {batch[0].tolist()}, EOS {EOS}, mask {batch[1].tolist()}")


def _finished(index: Attempt) -> None:
    for side in ("right", "left"):
        _check(index, _batch(FINISHED, 6, side), f"finished texts, padding on the {side}")


def _cut(index: Attempt) -> None:
    for side in ("right", "left"):
        _check(index, _batch(CUT, 6, side), f"texts that were cut off, padding on the {side}")
    _check(index, _batch([[5, 6, 7], [4, 8, 9]], 3, "right"), "no padding at all")


def _inside(index: Attempt) -> None:
    for side in ("right", "left"):
        _check(index, _batch(DIALOGUE, 7, side), f"EOS within the text, padding on the {side}")


def _mixed(index: Attempt) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 9, (n,), generator=generator).tolist() for n in (1, 4, 7, 2)]
    texts = [text + [EOS] * (number % 2) for number, text in enumerate(texts)]
    _check(index, _batch(texts, 9, "both"), "padding on both sides")
    right, left = (_batch(texts, 9, side) for side in ("right", "left"))
    both = torch.cat([right[0], left[0]]), torch.cat([right[1], left[1]]), EOS
    _check(index, both, "a batch in which some rows are padded left, some right")
    ids, mask, _ = right
    close(index(ids, mask.bool(), EOS), _want(right), "a boolean mask")


def _same(index: Attempt) -> None:
    for side in ("right", "left"):
        batch = _batch([*FINISHED, *CUT], 6, side, pad=EOS)
        _check(index, batch, f"a pad token that is the EOS, padding on the {side}")
        batch = _batch([*FINISHED, *CUT], 6, side, pad=7)
        _check(index, batch, f"a pad id, 7, that also stands in the text, padding on the {side}")


def _dtype(index: Attempt) -> None:
    got = tensor(index(*_batch(FINISHED, 6, "right")))
    expect(got.dtype == torch.int64, f"the dtype is {got.dtype}; indices are int64 in PyTorch")


def _empty(index: Attempt) -> None:
    for texts in ([[5, 6, 7], []], [[5, 6, 7], [EOS]]):
        ids, mask, eos = _batch(texts, 4, "right")
        told = f"the ids {ids.tolist()} with the mask {mask.tolist()}"
        error = raised(index, ids, mask, eos)
        if error is None:
            raise Unmet(f"{told} raised nothing")
        expect(
            isinstance(error, ValueError),
            f"{told} raised {type(error).__name__}; ValueError was asked for",
        )


def _content(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    inside = mask.bool() & (ids != eos_id)
    if strict and not bool(inside.any(dim=1).all()):
        raise ValueError("a row has no content")
    return inside


def _last(inside: Tensor) -> Tensor:
    return (torch.arange(inside.shape[1]) * inside).amax(dim=1)


def last_real(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    return _last(mask.bool())


def one_before(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    return last_real(ids, mask, eos_id, strict) - 1


def before_first_eos(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    ends = mask.bool() & (ids == eos_id)
    return torch.where(ends.any(1), ends.int().argmax(1) - 1, _last(mask.bool()))


def by_ids(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    return _last(ids != eos_id)


def by_pad_id(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    return _last((ids != PAD) & (ids != eos_id))


def last_column(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    return torch.full((len(ids),), ids.shape[1] - 1)


def counted(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    return _content(ids, mask, eos_id, strict).sum(dim=1) - 1


def length_minus_eos(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    length = mask.long().sum(1)
    final = ids.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
    return length - 1 - (final == eos_id).long()


def first_of_all(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    return _content(ids, mask, eos_id, strict).int().argmax(dim=1)


def one_eos_only(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    _content(ids, mask, eos_id, strict)
    last = _last(mask.bool())
    return last - (ids.gather(1, last[:, None])[:, 0] == eos_id).long()


def no_error(ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    return _last(_content(ids, mask, eos_id, strict=False))


def as_int32(ids: Tensor, mask: Tensor, eos_id: int, strict: bool = True) -> Tensor:
    return _last(_content(ids, mask, eos_id, strict)).int()


def _lenient(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor]]:
    """The same mistake, in a function that does not refuse an empty row either."""
    return (partial(function, strict=False),)


def _probes() -> list[tuple[Any, ...]]:
    return [
        _batch(FINISHED, 6, "right"),
        _batch(CUT, 6, "left"),
        _batch(DIALOGUE, 7, "both"),
        _batch([*FINISHED, *CUT], 6, "right", pad=EOS),
        _batch([*FINISHED, *CUT], 6, "right", pad=7),
        _batch([[5, 6, 7], []], 4, "right"),
    ]


EXERCISE = Exercise(
    id="ch02.last_content_index",
    parameters=("input_ids", "attention_mask", "eos_id"),
    properties=(
        Property(
            "finished texts: the token before the EOS",
            "Of a text that ends in the EOS, the last token of content stands before it.",
            _finished,
        ),
        Property(
            "cut-off texts: the last real token",
            "A text that was cut off has no EOS at its end: its last real token is content.",
            _cut,
        ),
        Property(
            "an EOS within the text, or two at its end",
            "An EOS may also end an earlier turn, and there may be two of them at the end.",
            _inside,
        ),
        Property(
            "any row by itself: either side, both sides, booleans",
            "The rule must hold for each row by itself, wherever its padding stands.",
            _mixed,
        ),
        Property(
            "whatever the pad id is",
            "The pad id may be the EOS, or a token that also stands in texts: what is padding, "
            "the mask alone says.",
            _same,
        ),
        Property("int64", "The index is to be used as an index: int64.", _dtype),
        Property(
            "a row without content is refused",
            "A row of nothing but padding, or padding and EOS, should raise a ValueError.",
            _empty,
        ),
    ),
    mutants=(
        Mutant(
            "This is the last real token, the EOS of a finished text. Finished and cut-off texts "
            "are then read at different kinds of token; the last one of *content* was asked for.",
            last_real,
            also=_lenient(last_real),
        ),
        Mutant(
            "The token before the last is taken of every text. One that was cut off has no EOS at "
            "its end: there it is one too early.",
            one_before,
            also=_lenient(one_before),
        ),
        Mutant(
            "The text is taken to end at its *first* EOS. In a dialogue each turn has one.",
            before_first_eos,
            also=_lenient(before_first_eos),
        ),
        Mutant(
            "The mask is not used, so padding whose id is not the EOS is taken for content.",
            by_ids,
            also=_lenient(by_ids),
        ),
        Mutant(
            "Padding is told by the id 0. The pad id may be another, and may stand in the text; "
            "the mask says what is padding.",
            by_pad_id,
            "transformers #35352",
            also=_lenient(by_pad_id),
        ),
        Mutant(
            "The last column is read for every row. That is padding, or the EOS, for most texts, "
            "and the score depends on the batch.",
            last_column,
            "reward-bench #137",
            also=_lenient(last_column),
        ),
        Mutant(
            "Tokens of content are counted. The count points to the last of them only if the "
            "padding stands right and no EOS stands within the text.",
            counted,
            "transformers #46782",
            also=_lenient(counted),
        ),
        Mutant(
            "length − 1 is the last token only if the padding stands right. With left padding it "
            "points to the front of the row, and nothing complains.",
            length_minus_eos,
            "transformers #46782",
            also=_lenient(length_minus_eos),
        ),
        Mutant(
            "`argmax` of booleans returns the *first* that is true, which is the first token of "
            "the text. Number the positions first.",
            first_of_all,
            also=_lenient(first_of_all),
        ),
        Mutant(
            "One EOS is taken off at the end, but not a second one. Some templates write an EOS "
            "and generation adds another.",
            one_eos_only,
            also=_lenient(one_eos_only),
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
        "Which two things must be true of a token of content? Write them as one tensor of "
        "booleans `[B, T]`.",
        "Number the columns 0, 1, 2, …. What is the largest number at a token of content?",
        "`inside = attention_mask.bool() & (input_ids != eos_id)`; a ValueError unless "
        "`inside.any(dim=1).all()`; then `(torch.arange(T) * inside).amax(dim=1)`.",
    ),
    right="Scores read there compare what was said, whether it was finished or cut off; to know "
    "*that* it was finished, a model has to read the EOS. On another device, `arange` needs "
    "`device=`.",
)
