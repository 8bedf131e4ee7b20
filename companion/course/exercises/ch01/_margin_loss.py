"""Find the bug: margins that are subtracted from the wrong pairs (ms-swift #9927)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, normal, tensor

BROADCAST = (
    "`[B, 1] − [B]` is broadcast to `[B, B]` without a word: every pair is trained on every other "
    "pair's margin. Bring all three to `[B]` first."
)


def _inputs(seed: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    margin = torch.arange(size, dtype=torch.float32) % 4
    return normal(seed, size, 1), normal(seed + 1, size, 1), margin


def _shapes(loss: Attempt) -> None:
    for size in (1, 2, 7):
        tensor(loss(*_inputs(0, size)), (size,), f"the loss of {size} pairs")


def _values(loss: Attempt) -> None:
    for seed in range(3):
        c, r, m = _inputs(seed, 9)
        gap = (c - r).double().squeeze(1).numpy() - m.double().numpy()
        close(tensor(loss(c, r, m)), np.logaddexp(0.0, -gap), "the loss of random pairs")


def _own(loss: Attempt) -> None:
    c, r, m = _inputs(4, 5)
    before = tensor(loss(c, r, m))
    other = m.clone()
    other[3] += 2.0
    after = tensor(loss(c, r, other))
    keep = torch.tensor([0, 1, 2, 4])
    close(after[keep], before[keep], "four pairs, after another pair's margin changed")


def broken(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    logits = head_chosen - head_rejected
    logits = logits - margin
    return -F.logsigmoid(logits)


def broadcast_averaged(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    return -F.logsigmoid(head_chosen - head_rejected - margin).mean(dim=1)


def squeezed_all(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    logits = (head_chosen - head_rejected).squeeze() - margin.squeeze()
    return -F.logsigmoid(logits)


def added(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    return -F.logsigmoid((head_chosen - head_rejected).squeeze(1) + margin)


def multiplied(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    return -F.logsigmoid((head_chosen - head_rejected).squeeze(1) * margin)


def outside(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    return -F.logsigmoid((head_chosen - head_rejected).squeeze(1)) + margin


def column(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    return -F.logsigmoid(head_chosen - head_rejected - margin[:, None])


def ignored(head_chosen: Tensor, head_rejected: Tensor, margin: Tensor) -> Tensor:
    return -F.logsigmoid((head_chosen - head_rejected).squeeze(1))


def _probes() -> list[tuple[Any, ...]]:
    return [_inputs(0, 1), _inputs(1, 4), _inputs(2, 6)]


EXERCISE = Exercise(
    id="ch01.margin_loss",
    parameters=("head_chosen", "head_rejected", "margin"),
    broken=broken,
    properties=(
        Property(
            "one loss for each pair, also for a batch of one",
            "The result should have the shape `[B]`, whatever B is.",
            _shapes,
        ),
        Property(
            "it is −log σ(chosen − rejected − margin)",
            "The margin is what chosen has to be ahead by: it is subtracted inside of σ.",
            _values,
        ),
        Property(
            "a pair's margin moves that pair's loss alone",
            "The loss of a pair should depend on its own margin and on no other pair's.",
            _own,
        ),
    ),
    mutants=(
        Mutant(BROADCAST, broken, "ms-swift #9927"),
        Mutant(
            "The mean over the extra axis brings the shape back to `[B]`, and hides that `[B, 1] − "
            "[B]` was broadcast: each loss is the mean over all pairs' margins.",
            broadcast_averaged,
            "ms-swift #9927",
        ),
        Mutant(
            "`squeeze()` without an axis removes every axis of length 1, so a last batch of one "
            "pair loses its batch axis. Name the axis: `squeeze(-1)`.",
            squeezed_all,
        ),
        Mutant(
            "The margin is added to the difference: clear pairs would be allowed to lose by that "
            "much. It is subtracted, so that they must win by it.",
            added,
        ),
        Mutant(
            "The margin multiplies the difference. A margin of 0 would then switch the pair off, "
            "and a large one changes its temperature. It is subtracted.",
            multiplied,
        ),
        Mutant(
            "The margin stands outside of the logarithm, where it is a constant: it changes the "
            "loss that is logged and nothing that is learned.",
            outside,
        ),
        Mutant(
            "The arithmetic is right, but the result is a column `[B, 1]`: the next function that "
            "meets it with a `[B]` will broadcast. Take the last axis off the head's output.",
            column,
        ),
        Mutant("The margin is not used: this is the plain loss.", ignored),
    ),
    probes=_probes,
    hints=(
        "Print the shape after every line, with three pairs.",
        "A head gives `[B, 1]`, a column of the data `[B]`. What does PyTorch make of `[3, 1] − "
        "[3]`?",
        "`(head_chosen - head_rejected).squeeze(-1) - margin`: the axis is named, so that a batch "
        "of one keeps its own.",
    ),
    right="With `mean()` after it, the wrong version gave one innocent number. The companion's "
    "loss refuses shapes that differ, which turns this bug into an error.",
)
