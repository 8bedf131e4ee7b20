"""Derive the gradient of the loss and write it without autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, show, tensor

Two = tuple[Tensor, Tensor]


def _pair(value: Any, shape: tuple[int, ...]) -> Two:
    expect(
        isinstance(value, (tuple, list)) and len(value) == 2,
        f"the result is {show(value)}; it should be two tensors",
    )
    return tensor(value[0], shape, "the first"), tensor(value[1], shape, "the second")


def _shapes(gradient: Attempt) -> None:
    for shape in ((1,), (7,), (2, 3)):
        _pair(gradient(normal(0, *shape), normal(1, *shape)), shape)


def _autograd(gradient: Attempt) -> None:
    for seed in range(3):
        for dtype in (torch.float32, torch.float64):
            c = normal(seed, 20, dtype=dtype).requires_grad_(True)
            r = normal(seed + 7, 20, dtype=dtype).requires_grad_(True)
            want = torch.autograd.grad(-F.logsigmoid(c - r).sum(), (c, r))
            got = _pair(gradient(c.detach(), r.detach()), (20,))
            close(got[0], want[0], f"d loss / d chosen, against autograd ({dtype})")
            close(got[1], want[1], f"d loss / d rejected, against autograd ({dtype})")


def _opposite(gradient: Attempt) -> None:
    a, b = _pair(gradient(normal(5, 12), normal(6, 12)), (12,))
    close(a + b, torch.zeros(12), "the sum of the two gradients")


def _bounded(gradient: Attempt) -> None:
    c = torch.tensor([1000.0, -1000.0, 100.0, -100.0])
    a, _ = _pair(gradient(c, torch.zeros(4)), (4,))
    close(a, [0.0, -1.0, 0.0, -1.0], "d loss / d chosen at margins of 1000, −1000, 100, −100")


def minus_p(chosen: Tensor, rejected: Tensor) -> Two:
    p = torch.sigmoid(chosen - rejected)
    return -p, p


def ascent(chosen: Tensor, rejected: Tensor) -> Two:
    force = torch.sigmoid(rejected - chosen)
    return force, -force


def same_sign(chosen: Tensor, rejected: Tensor) -> Two:
    force = torch.sigmoid(rejected - chosen)
    return -force, -force


def of_sigmoid(chosen: Tensor, rejected: Tensor) -> Two:
    p = torch.sigmoid(chosen - rejected)
    return -p * (1 - p), p * (1 - p)


def overflowing(chosen: Tensor, rejected: Tensor) -> Two:
    power = torch.exp(rejected - chosen)
    return -power / (1 + power), power / (1 + power)


def of_mean(chosen: Tensor, rejected: Tensor) -> Two:
    force = torch.sigmoid(rejected - chosen) / chosen.numel()
    return -force, force


def only_chosen(chosen: Tensor, rejected: Tensor) -> Two:
    force = torch.sigmoid(rejected - chosen)
    return -force, torch.zeros_like(force)


def one_tensor(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.sigmoid(rejected - chosen)


def _probes() -> list[tuple[Any, ...]]:
    return [
        (normal(0, 5), normal(1, 5)),
        (torch.tensor([-1000.0, 1000.0, 3.0]), torch.zeros(3)),
    ]


EXERCISE = Exercise(
    id="ch01.bt_gradient",
    parameters=("chosen", "rejected"),
    properties=(
        Property(
            "two tensors, shaped like the scores",
            "The result should be two tensors: the derivative for the chosen and that for the "
            "rejected score, one value for each pair.",
            _shapes,
        ),
        Property(
            "what autograd finds",
            "The values are not the derivatives of −log σ(chosen − rejected).",
            _autograd,
        ),
        Property(
            "equal and opposite",
            "The loss looks at the difference of the scores alone, so its two derivatives add up "
            "to 0.",
            _opposite,
        ),
        Property(
            "finite and never beyond 1 at margins of ±1000",
            "The formula is right where it can be computed, but it overflows for pairs that are "
            "badly wrong.",
            _bounded,
        ),
    ),
    mutants=(
        Mutant(
            "The force is taken to be p. It is 1 − p, the probability that the model gave to the "
            "*wrong* outcome: what it has learned stops pulling. With p, the pairs that are right "
            "already would pull most.",
            minus_p,
        ),
        Mutant(
            "The signs are those of the log-likelihood, which goes up. The loss is its negative: "
            "its derivative for the chosen score is negative, so that descent raises the score.",
            ascent,
        ),
        Mutant(
            "Both derivatives have one sign. The loss depends on chosen − rejected: what raises "
            "the one must lower the other.",
            same_sign,
        ),
        Mutant(
            "p(1 − p) is the derivative of σ itself. The chain rule has a factor 1/p from the "
            "logarithm, which cancels the p.",
            of_sigmoid,
        ),
        Mutant(
            "The derivative is right as a formula, but e^(−Δ) overflows: inf / inf is NaN. Write "
            "it with `torch.sigmoid`, which is stable on both sides.",
            overflowing,
            "DeepSpeedExamples #423",
        ),
        Mutant(
            "This is the gradient of the *mean* over the batch. Asked for is that of each pair's "
            "own loss.",
            of_mean,
        ),
        Mutant(
            "The rejected score is taken for a constant. It comes from the same model, and the "
            "loss pushes it down as hard as it pushes the chosen one up.",
            only_chosen,
        ),
        Mutant(
            "Only the derivative for the chosen score is returned; that for the rejected one is "
            "its negative, and is asked for too.",
            one_tensor,
        ),
    ),
    probes=_probes,
    hints=(
        "Write the loss as softplus(−Δ) with Δ = chosen − rejected, and take the derivative with "
        "respect to Δ first.",
        "The derivative of softplus(x) is σ(x). Then the chain rule: ∂Δ/∂chosen = 1, "
        "∂Δ/∂rejected = −1.",
        "−σ(rejected − chosen) and its negative. (1 − σ(Δ) = σ(−Δ), which loses no digits.)",
    ),
    right="The better way to write 1 − p is `σ(−Δ)`: in float32 `1 − σ(Δ)` is exactly 0 from a "
    "margin of 17 on, while the true force is small but there.",
)
