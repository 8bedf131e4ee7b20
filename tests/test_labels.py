"""Label builders: what carries a label, on either padding side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from companion import process_loss
from companion.errors import DataError, ShapeError
from companion.functional import (
    STEP_CLASSES,
    completion_mask,
    outcome_labels,
    step_boundaries,
    step_labels,
)


def test_prompt_of_three_and_completion_of_four() -> None:
    mask = torch.ones(2, 7, dtype=torch.long)
    labels = outcome_labels(mask, torch.tensor([3, 3]), torch.tensor([1, 0]))
    assert labels.tolist() == [[-100] * 3 + [1] * 4, [-100] * 3 + [0] * 4]
    assert (labels == -100).sum(1).tolist() == [3, 3]


sizes = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.booleans()), min_size=1)


@settings(deadline=None)
@given(sizes, st.booleans())
def test_outcome_labels_on_either_side(rows: list[tuple[int, int, bool]], left: bool) -> None:
    width = max(p + c for p, c, _ in rows) + 2
    mask, want = [], []
    for prompt, completion, outcome in rows:
        pad = width - prompt - completion
        body = [-100] * prompt + [int(outcome)] * completion
        mask.append([0] * pad + [1] * len(body) if left else [1] * len(body) + [0] * pad)
        want.append([-100] * pad + body if left else body + [-100] * pad)
    prompts = torch.tensor([p for p, _, _ in rows])
    outcomes = torch.tensor([o for _, _, o in rows])
    table = torch.tensor(mask)
    assert outcome_labels(table, prompts, outcomes).tolist() == want
    inside = completion_mask(table, prompts)
    assert inside.sum(1).tolist() == [c for _, c, _ in rows]
    # wrong: the prompt length taken as a column, which left padding moves
    if left:
        columns = torch.arange(width) >= prompts[:, None]
        assert not torch.equal(columns & table.bool(), inside) or not prompts.any()


def test_outcome_labels_refuse_rows_without_completion() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(DataError, match="row 1"):
        outcome_labels(mask, torch.tensor([1, 2]), torch.tensor([1, 0]))
    with pytest.raises(DataError, match="row 0"):
        outcome_labels(mask, torch.tensor([-1, 1]), torch.tensor([1, 0]))
    with pytest.raises(ShapeError):
        outcome_labels(mask, torch.tensor([1]), torch.tensor([1, 0]))
    with pytest.raises(ShapeError):
        outcome_labels(mask, torch.tensor([1, 1]), torch.tensor([1]))


def test_step_labels_stand_at_the_last_token_of_each_step() -> None:
    bounds = step_boundaries(3, [2, 1, 3])
    assert bounds == [4, 5, 8]
    mask = torch.tensor([[1] * 9 + [0], [0] + [1] * 9])
    labels = step_labels(mask, [bounds, bounds], [[1, None, -1], [0, 1, -1]])
    ignore = [-100]
    assert labels[0].tolist() == ignore * 4 + [2] + ignore * 3 + [0] + ignore
    assert labels[1].tolist() == ignore * 5 + [1, 2] + ignore * 2 + [0]
    assert STEP_CLASSES == {-1: 0, 0: 1, 1: 2}
    loss = process_loss(torch.zeros(2, 10, 3), labels)
    assert (loss != 0).sum() == 5  # one term for each rated step, none elsewhere


def test_step_labels_refuse_what_does_not_fit() -> None:
    mask = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(DataError, match="rated 2"):
        step_labels(mask, [[1]], [[2]])
    with pytest.raises(DataError, match="token 5"):
        step_labels(mask, [[5]], [[1]])
    with pytest.raises(DataError, match="same token"):
        step_labels(mask, [[1, 1]], [[1, 1]])
    with pytest.raises(ShapeError, match="row 0"):
        step_labels(mask, [[1]], [[1, 0]])
    with pytest.raises(ShapeError):
        step_labels(mask, [], [])
    with pytest.raises(DataError):
        step_boundaries(2, [1, 0])
