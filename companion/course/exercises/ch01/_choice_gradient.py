"""Derive the gradient of a choice among K and write it without autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, tensor


def _shapes(gradient: Attempt) -> None:
    for shape in ((1, 2), (7, 3), (4, 5)):
        tensor(gradient(normal(0, *shape)), shape, "the gradient")


def _autograd(gradient: Attempt) -> None:
    for seed in range(2):
        for k in (2, 3, 6):
            for dtype in (torch.float32, torch.float64):
                scores = normal(seed, 10, k, dtype=dtype).requires_grad_(True)
                loss = -F.log_softmax(scores, dim=1)[:, 0].sum()
                (want,) = torch.autograd.grad(loss, scores)
                got = tensor(gradient(scores.detach()), (10, k), "the gradient")
                close(got, want, f"choices among {k}, against autograd ({dtype})")


def _balanced(gradient: Attempt) -> None:
    got = tensor(gradient(normal(5, 12, 4)), (12, 4), "the gradient")
    close(got.sum(1), torch.zeros(12), "the sum of a row")


def _bounded(gradient: Attempt) -> None:
    scores = torch.tensor([[1000.0, 0.0, -1000.0], [-1000.0, 0.0, -1000.0], [-100.0, 1.0, 1.0]])
    want = [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.5, 0.5]]
    close(tensor(gradient(scores), (3, 3), "the gradient"), want, "scores of ±1000 and ±100")


def _by_hand(gradient: Attempt) -> None:
    kept = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)  # what is kept for a backward pass
        return value

    what = "autograd was used, by `backward`, `torch.autograd` or `torch.func`"
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            gradient(normal(3, 4, 3))
    except Exception as error:
        # torch.func refuses to run beside these hooks
        expect("saved tensor hooks" not in str(error), what)
        raise
    expect(not kept, what)


def minus_p(scores: Tensor) -> Tensor:
    p = torch.softmax(scores, dim=1)
    return torch.cat([-p[:, :1], p[:, 1:]], dim=1)


def ascent(scores: Tensor) -> Tensor:
    return -_right(scores)


def _right(scores: Tensor) -> Tensor:
    p = torch.softmax(scores, dim=1)
    return torch.cat([-p[:, 1:].sum(1, keepdim=True), p[:, 1:]], dim=1)


def same_sign(scores: Tensor) -> Tensor:
    return -_right(scores).abs()


def of_softmax(scores: Tensor) -> Tensor:
    p = torch.softmax(scores, dim=1)
    return -p[:, :1] * (torch.eye(scores.shape[1], dtype=p.dtype)[:1] - p)


def overflowing(scores: Tensor) -> Tensor:
    power = torch.exp(scores)
    p = power / power.sum(1, keepdim=True)
    return torch.cat([p[:, :1] - 1, p[:, 1:]], dim=1)


def of_mean(scores: Tensor) -> Tensor:
    return _right(scores) / len(scores)


def only_chosen(scores: Tensor) -> Tensor:
    got = _right(scores)
    return torch.cat([got[:, :1], torch.zeros_like(got[:, 1:])], dim=1)


def pairwise(scores: Tensor) -> Tensor:
    force = torch.sigmoid(scores[:, 1:] - scores[:, :1])
    return torch.cat([-force.sum(1, keepdim=True), force], dim=1)


def pairwise_mean(scores: Tensor) -> Tensor:
    return pairwise(scores) / (scores.shape[1] - 1)


def over_rows(scores: Tensor) -> Tensor:
    p = torch.softmax(scores, dim=0)
    return torch.cat([p[:, :1] - 1, p[:, 1:]], dim=1)


def one_column(scores: Tensor) -> Tensor:
    return _right(scores)[:, 0]


def by_autograd(scores: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_(True)
        loss = -F.log_softmax(leaf, dim=1)[:, 0].sum()
        (got,) = torch.autograd.grad(loss, leaf)
    return got


def _probes() -> list[tuple[Any, ...]]:
    return [
        (normal(0, 5, 3),),
        (normal(1, 4, 2),),
        (torch.tensor([[-1000.0, 1000.0, 3.0], [100.0, 0.0, 1.0]]),),
    ]


def _look(gradient: Attempt, arguments: tuple[Any, ...]) -> Any:
    """The gradient, and whether it was made by autograd."""
    kept = []

    def pack(value: Tensor) -> Tensor:
        kept.append(1)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        return gradient(*arguments), bool(kept)


EXERCISE = Exercise(
    id="ch01.choice_gradient",
    parameters=("scores",),
    properties=(
        Property(
            "one value for each score",
            "The result should be one tensor with the scores' shape, `[B, K]`: a derivative for "
            "each score.",
            _shapes,
        ),
        Property(
            "what autograd finds",
            "The values are not the derivatives of the loss, −r₀ + ln(e^r₀ + … + e^r_K₋₁).",
            _autograd,
        ),
        Property(
            "a row adds up to 0",
            "A shift of all scores of a row does not change its loss, so its derivatives add up "
            "to 0.",
            _balanced,
        ),
        Property(
            "finite and never beyond 1 at scores of ±1000",
            "The derivatives lie between −1 and 1, however large the scores are.",
            _bounded,
        ),
        Property(
            "by hand",
            "The derivative is asked for as a formula, without autograd.",
            _by_hand,
        ),
    ),
    mutants=(
        Mutant(
            "The chosen score is pulled with p. It is pulled with 1 − p, the probability that the "
            "model gave to the *other* completions: what it has learned stops pulling. With p, "
            "the rows that are right already would pull most.",
            minus_p,
        ),
        Mutant(
            "The signs are those of the log-likelihood, which goes up. The loss is its negative: "
            "its derivative for the chosen score is negative, so that descent raises the score.",
            ascent,
        ),
        Mutant(
            "All derivatives of a row have one sign. What raises the chosen score must lower the "
            "others: the loss sees differences alone.",
            same_sign,
        ),
        Mutant(
            "This is the derivative of the probability itself. The chain rule has a factor −1/p "
            "from the logarithm, which cancels the p.",
            of_softmax,
        ),
        Mutant(
            "The derivative is right as a formula, but e^r overflows: inf / inf is NaN. "
            "`torch.softmax` takes the largest score out first.",
            overflowing,
            "DeepSpeedExamples #423",
        ),
        Mutant(
            "This is the gradient of the *mean* over the rows. Asked for is that of each row's "
            "own loss.",
            of_mean,
        ),
        Mutant(
            "The other scores are taken for constants. They come from the same model, and the "
            "loss pushes them down as hard as it pushes the chosen one up.",
            only_chosen,
        ),
        Mutant(
            "This is the gradient of K − 1 *pairs*, each rejected completion against the chosen "
            "one. A choice among K is one event: its probability is one softmax over all K.",
            pairwise,
            also=(pairwise_mean,),
        ),
        Mutant(
            "The softmax runs over the rows of the batch: dim=0. The completions of one choice "
            "stand beside each other, in dim=1.",
            over_rows,
        ),
        Mutant(
            "Only the derivatives for the chosen scores are returned. Those for the others are "
            "asked for too: `[B, K]`.",
            one_column,
        ),
        Mutant(
            "The numbers are right, and autograd has found them. The formula was asked for: "
            "whoever writes a fused kernel, or reads a gradient in a log, needs it.",
            by_autograd,
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "Write the loss as −r₀ + ln(e^r₀ + e^r₁ + …), and take the derivative with respect to each "
        "score by itself.",
        "The derivative of ln Σ e^r with respect to r_j is e^r_j / Σ e^r: the softmax.",
        "`torch.softmax(scores, dim=1)`, and 1 less in column 0.",
    ),
    right="For K = 2 it is the chapter's −(1 − p) and 1 − p. The companion's `ranking_loss` makes "
    "such a choice at each place of a ranking.",
)
