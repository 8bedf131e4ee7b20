"""The read-out by the mask, against a loop, against stock transformers' rule, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from companion.errors import DtypeError, ReadoutError, ShapeError
from companion.functional import (
    last_token_index,
    last_token_readout,
    pad_id_readout_index,
    position_ids_from_mask,
)

LENGTHS = [6, 3, 1, 5]
rows = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8), st.integers(0, 5)), min_size=1)


def right_padded(lengths: list[int]) -> Tensor:
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


def loop(values: Tensor, mask: Tensor) -> Tensor:
    out = []
    for row in range(mask.shape[0]):
        last = None
        for column in range(mask.shape[1]):
            if mask[row, column]:
                last = values[row, column]
        assert last is not None
        out.append(last)
    return torch.stack(out)


def masks(parts: list[tuple[int, int, int]]) -> Tensor:
    width = max(map(sum, parts))
    mask = torch.zeros(len(parts), width, dtype=torch.long)
    for row, (left, length, _) in enumerate(parts):
        mask[row, left : left + length] = 1
    return mask


def test_indices_of_right_padding() -> None:
    assert last_token_index(right_padded(LENGTHS)).tolist() == [5, 2, 0, 4]
    assert last_token_index(right_padded(LENGTHS).flip(1)).tolist() == [5, 5, 5, 5]
    assert last_token_index(right_padded(LENGTHS).bool()).dtype == torch.int64


@settings(deadline=None)
@given(rows, st.integers(0, 99))
def test_readout_is_the_loop(parts: list[tuple[int, int, int]], seed: int) -> None:
    mask = masks(parts)
    generator = torch.Generator().manual_seed(seed)
    for shape in (mask.shape, (*mask.shape, 3)):
        values = torch.randn(shape, generator=generator)
        assert torch.equal(last_token_readout(values, mask), loop(values, mask))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_junk_padding_changes_nothing(extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = right_padded(LENGTHS)
    values = torch.randn(mask.shape, generator=generator)
    junk = torch.randn((len(LENGTHS), extra), generator=generator)
    wide = torch.cat([mask, torch.zeros_like(junk, dtype=torch.long)], 1)
    want = last_token_readout(values, mask)
    assert torch.equal(last_token_readout(torch.cat([values, junk], 1), wide), want)
    left = torch.cat([torch.zeros_like(junk, dtype=torch.long), mask], 1)
    assert torch.equal(last_token_readout(torch.cat([junk, values], 1), left), want)


WRONG: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("the last column", lambda v, m: v[:, -1]),
    ("length - 1 with left padding", lambda v, m: v[torch.arange(len(v)), m.sum(1) - 1]),
    (
        "one column too far",
        lambda v, m: v[torch.arange(len(v)), m.sum(1).clamp(max=v.shape[1] - 1)],
    ),
    ("the first zero", lambda v, m: v[torch.arange(len(v)), m.argmin(1) - 1]),
    ("mean over the row", lambda v, m: v.mean(1)),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[name for name, _ in WRONG])
def test_wrong_readouts_are_caught(name: str, wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    both = torch.tensor([[0, 1, 1, 1, 0, 0]])
    mask = torch.cat([right_padded(LENGTHS), right_padded(LENGTHS).flip(1), both])
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(last_token_readout(values, mask), loop(values, mask))
    assert not torch.equal(wrong(values, mask), loop(values, mask)), name


def test_an_empty_row_is_refused_by_name() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ReadoutError, match="row 1"):
        last_token_index(mask)
    with pytest.raises(ReadoutError, match="row 0"):
        last_token_index(torch.zeros(2, 0, dtype=torch.long))
    assert last_token_index(torch.zeros(0, 4, dtype=torch.long)).shape == (0,)
    assert last_token_index(torch.zeros(0, 0, dtype=torch.long)).shape == (0,)


def test_bad_shapes_and_dtypes() -> None:
    mask = right_padded(LENGTHS)
    with pytest.raises(ShapeError):
        last_token_readout(torch.zeros(4, 5), mask)
    with pytest.raises(ShapeError):
        last_token_readout(torch.zeros(4), mask)
    with pytest.raises(ShapeError):
        last_token_index(mask[0])
    with pytest.raises(DtypeError):
        last_token_index(mask.float())
    with pytest.raises(DtypeError):
        last_token_readout(mask, mask)


def test_half_precision_is_upcast_and_gradients_flow() -> None:
    mask = right_padded(LENGTHS)
    values = torch.randn(mask.shape).bfloat16()
    got = last_token_readout(values, mask)
    assert got.dtype == torch.float32
    assert torch.equal(got, loop(values, mask).float())
    wide = torch.randn((*mask.shape, 2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: last_token_readout(v, mask), (wide,))


# --- the rule of stock transformers -----------------------------------------------------------


def transformers_rule(input_ids: Tensor, pad: int) -> Tensor:
    """The lines of GenericForSequenceClassification, transformers 5."""
    non_pad_mask = (input_ids != pad).to(torch.int32)
    token_indices = torch.arange(input_ids.shape[-1], dtype=torch.int32)
    return (token_indices * non_pad_mask).argmax(-1)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1), st.integers(0, 3))
def test_pad_id_rule_is_that_of_transformers(ids: list[list[int]], pad: int) -> None:
    table = torch.tensor(ids)
    assert pad_id_readout_index(table, pad).tolist() == transformers_rule(table, pad).tolist()


@settings(deadline=None)
@given(rows)
def test_both_rules_agree_if_the_pad_id_stands_in_padding_only(
    parts: list[tuple[int, int, int]],
) -> None:
    mask = masks(parts)
    ids = torch.where(mask.bool(), 5, 0)
    assert torch.equal(pad_id_readout_index(ids, 0), last_token_index(mask))


def test_where_the_two_rules_part() -> None:
    eos = pad = 2
    finished = torch.tensor([[7, 8, eos, pad], [7, 8, 9, eos]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    # pad == EOS: the EOS itself is skipped (transformers #35352)
    assert last_token_index(mask).tolist() == [2, 3]
    assert pad_id_readout_index(finished, pad).tolist() == [1, 2]
    # masked tokens that are no pad ids
    junk = torch.tensor([[7, 8, 9, 9]])
    assert pad_id_readout_index(junk, 0).tolist() == [3]
    assert last_token_index(torch.tensor([[1, 1, 0, 0]])).tolist() == [1]


def test_pad_id_rule_without_a_pad_id() -> None:
    assert pad_id_readout_index(torch.tensor([[7, 8, 0]]), None).tolist() == [2]
    with pytest.raises(ReadoutError, match="pad_token_id"):
        pad_id_readout_index(torch.tensor([[7, 8], [7, 0]]), None)
    with pytest.raises(DtypeError):
        pad_id_readout_index(torch.zeros(1, 2), 0)
    with pytest.raises(ShapeError):
        pad_id_readout_index(torch.zeros(1, 0, dtype=torch.long), 0)
    assert pad_id_readout_index(torch.tensor([[0, 0]]), 0).tolist() == [0]


@settings(deadline=None)
@given(rows)
def test_positions_count_real_tokens(parts: list[tuple[int, int, int]]) -> None:
    mask = masks(parts)
    positions = position_ids_from_mask(mask)
    for row, (_, length, _) in enumerate(parts):
        assert positions[row][mask[row].bool()].tolist() == list(range(length))
    assert (positions >= 0).all()
    assert (positions < mask.shape[1]).all()
    # wrong: the column number, which a left-padded GPT-2 silently takes
    if any(left for left, _, _ in parts):
        columns = torch.arange(mask.shape[1]).expand_as(mask)
        assert not torch.equal(columns[mask.bool()], positions[mask.bool()])
