"""Write the labels of an outcome reward model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, tensor

IGNORE = -100


def _batch(lengths: list[tuple[int, int]], side: str) -> tuple[Tensor, Tensor]:
    """Mask and prompt lengths of rows with (prompt, completion) tokens, padded on one side."""
    width = max(a + b for a, b in lengths) + 1
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, (a, b) in enumerate(lengths):
        if side == "right":
            mask[row, : a + b] = 1
        else:
            mask[row, width - a - b :] = 1
    return mask, torch.tensor([a for a, _ in lengths])


def _cases(side: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    out = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 6, (4, 2), generator=generator).tolist()
        outcomes = torch.tensor([True, False, seed == 1, True])
        out.append((*_batch([(a, b) for a, b in sizes], side), outcomes))
    return out


def _row(mask: Tensor, prompt: int, outcome: bool) -> list[int]:
    """One row, token by token."""
    labels, seen = [], 0
    for real in mask.tolist():
        seen += real
        labels.append(int(outcome) if real and seen > prompt else IGNORE)
    return labels


def _labels(attempt: Attempt, case: tuple[Tensor, Tensor, Tensor]) -> list[list[int]]:
    got = tensor(attempt(*case), tuple(case[0].shape), "the labels")
    labels: list[list[int]] = got.tolist()
    return labels


def _shape(attempt: Attempt) -> None:
    for side in ("right", "left"):
        for case in _cases(side):
            _labels(attempt, case)


def _where(attempt: Attempt, side: str, place: str) -> None:
    """The labels of one kind of place: 'prompt', 'completion' or 'padding'."""
    for case in _cases(side):
        for row, got in enumerate(_labels(attempt, case)):
            mask, prompt, outcome = case[0][row], int(case[1][row]), bool(case[2][row])
            seen = mask.cumsum(0)
            kinds = [
                "padding" if not real else "prompt" if count <= prompt else "completion"
                for real, count in zip(mask.tolist(), seen.tolist(), strict=True)
            ]
            wrong = [
                (column, got[column], want)
                for column, want in enumerate(_row(mask, prompt, outcome))
                if kinds[column] == place and got[column] != want
            ]
            what = "right" if outcome else "wrong"
            expect(
                not wrong,
                f"padding on the {side}, a prompt of {prompt} and a completion of "
                f"{int(mask.sum()) - prompt} tokens that is {what}: the labels are {got}; "
                f"column {wrong[0][0] if wrong else 0} should be {wrong[0][2] if wrong else 0}",
            )


def _completion(attempt: Attempt) -> None:
    _where(attempt, "right", "completion")


def _prompt(attempt: Attempt) -> None:
    _where(attempt, "right", "prompt")


def _padding(attempt: Attempt) -> None:
    _where(attempt, "right", "padding")


def _left(attempt: Attempt) -> None:
    for place in ("completion", "prompt", "padding"):
        _where(attempt, "left", place)


def _position(mask: Tensor) -> Tensor:
    return mask.cumsum(1) - 1


def _spread(keep: Tensor, outcomes: Tensor, ignore: int = IGNORE) -> Tensor:
    return torch.where(keep, outcomes.long()[:, None].expand(keep.shape), ignore)


def one_per_row(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    return outcomes.long()


def prompt_too(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    return _spread(attention_mask.bool(), outcomes)


def padding_too(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    behind = attention_mask.cumsum(1) > prompt_lengths[:, None]
    return _spread(behind, outcomes)


def by_column(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    column = torch.arange(attention_mask.shape[1])
    return _spread(attention_mask.bool() & (column >= prompt_lengths[:, None]), outcomes)


def zero_ignored(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    keep = attention_mask.bool() & (_position(attention_mask) >= prompt_lengths[:, None])
    return _spread(keep, outcomes, 0)


def one_late(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    keep = attention_mask.bool() & (_position(attention_mask) > prompt_lengths[:, None])
    return _spread(keep, outcomes)


def one_early(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    position = _position(attention_mask)
    keep = attention_mask.bool() & (position >= prompt_lengths[:, None] - 1)
    return _spread(keep & (position < attention_mask.sum(1, keepdim=True) - 1), outcomes)


def last_only(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    last = _position(attention_mask) == attention_mask.sum(1, keepdim=True) - 1
    return _spread(attention_mask.bool() & last, outcomes)


def cast_to_bool(attention_mask: Tensor, prompt_lengths: Tensor, outcomes: Tensor) -> Tensor:
    keep = attention_mask.bool() & (_position(attention_mask) >= prompt_lengths[:, None])
    return _spread(keep, outcomes).to(outcomes.dtype)


def _probes() -> list[tuple[Any, ...]]:
    return [_cases("right")[0], _cases("left")[1], _cases("right")[2]]


EXERCISE = Exercise(
    id="ch03.label_outcomes",
    parameters=("attention_mask", "prompt_lengths", "outcomes"),
    properties=(
        Property("one label for each token", "The labels should be [B, T].", _shape),
        Property(
            "the outcome on every token of the completion",
            "The outcome should stand on every completion token, from the first to the last.",
            _completion,
        ),
        Property(
            "−100 on the prompt",
            "The prompt's tokens are the same whether the answer is right or wrong. They carry no "
            "label: −100.",
            _prompt,
        ),
        Property(
            "−100 on the padding",
            "Padding should carry −100, which every loss skips.",
            _padding,
        ),
        Property(
            "the same with padding on the left",
            "With padding on the left the labels should stand on the same tokens.",
            _left,
        ),
    ),
    mutants=(
        Mutant(
            "There is one label for each text. That is a sequence classifier; an outcome model is "
            "asked at every token of the completion.",
            one_per_row,
        ),
        Mutant(
            "The prompt is labelled too. Before the first token of an answer there is nothing to "
            "judge: the model learns there how hard the problem is, and that goes into every "
            "aggregate.",
            prompt_too,
        ),
        Mutant(
            "What follows the completion is labelled as well. Where the mask is 0 the label must "
            "be −100.",
            padding_too,
        ),
        Mutant(
            "Columns are compared with the prompt's length. That is right as long as the padding "
            "is on the right; on the left the prompt begins later.",
            by_column,
        ),
        Mutant(
            "What should be skipped has the label 0. That is no 'nothing' but the class 'wrong': "
            "the model learns that prompts and padding are wrong answers.",
            zero_ignored,
        ),
        Mutant(
            "The first token of the completion has no label: with positions from 0, the completion "
            "begins at the position `prompt_length` itself.",
            one_late,
        ),
        Mutant(
            "The labels stand one token too early, as for a language model that predicts the next "
            "token. Here the model is asked at the token itself.",
            one_early,
        ),
        Mutant(
            "Only the last token has a label. That is the read-out of a sequence score; an outcome "
            "model gets the outcome on each token of the completion.",
            last_only,
        ),
        Mutant(
            "The labels have the dtype of the outcomes: as booleans, −100 is True, and nothing "
            "is skipped any more. Make them integers before you fill.",
            cast_to_bool,
            "trl #2127",
        ),
    ),
    probes=_probes,
    hints=(
        "Which tokens does the answer consist of? A token's place in its row is the number of real "
        "tokens before it.",
        "`attention_mask.cumsum(1) - 1` is that place; padding has none.",
        "`keep = mask.bool() & (mask.cumsum(1) > prompt_lengths[:, None])`, then `torch.where("
        "keep, outcomes.long()[:, None], -100)`.",
    ),
    right="The companion's `outcome_labels` does the same, and raises where a prompt leaves no "
    "token for the completion.",
)
