"""Write the loss of a pair so that it never overflows."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, tensor

OVERFLOW = (
    "The formula of the textbook, `-log(sigmoid(x))` or `log(1 + exp(-x))`, overflows: for a pair "
    "that is badly wrong, `exp` is infinite or `sigmoid` rounds to 0, and the gradient is NaN. "
    "Rewrite −log σ so that no power can overflow."
)


def _shapes(loss: Attempt) -> None:
    for shape in ((1,), (5,), (0,), (3, 4)):
        chosen, rejected = normal(1, *shape), normal(2, *shape)
        tensor(loss(chosen, rejected), shape, f"the loss of scores of shape {list(shape)}")


def _values(loss: Attempt) -> None:
    for seed in range(3):
        for dtype in (torch.float32, torch.float64):
            c, r = normal(seed, 64, dtype=dtype), normal(seed + 9, 64, dtype=dtype)
            want = np.logaddexp(0.0, (r.double() - c.double()).numpy())
            close(tensor(loss(c, r)), want, f"the loss of random pairs ({dtype})")
    tie = torch.full((2,), 1.7)
    close(loss(tie, tie), [np.log(2.0)] * 2, "the loss of a tie")


def _finite(loss: Attempt) -> None:
    for dtype in (torch.float32, torch.float64):
        for gap in (-120.0, -1000.0, 1000.0):
            c = torch.tensor([gap], dtype=dtype)
            got = tensor(loss(c, torch.zeros_like(c)))
            close(got, [max(-gap, 0.0)], f"the loss at a margin of {gap:g} ({dtype})")


def _gradient(loss: Attempt) -> None:
    for seed in range(2):
        c = torch.cat([normal(seed, 16), torch.tensor([-500.0, 500.0])]).requires_grad_(True)
        r = torch.cat([normal(seed + 5, 16), torch.zeros(2)])
        total = tensor(loss(c, r)).sum()
        expect(total.requires_grad, "the loss has no gradient: backward() would fail")
        (got,) = torch.autograd.grad(total, c)
        close(got, -torch.sigmoid(r - c), "the gradient for the chosen score, −(1 − p)")


def _dtype(loss: Attempt) -> None:
    c, r = normal(3, 32, dtype=torch.float64), normal(4, 32, dtype=torch.float64)
    got = tensor(loss(c, r))
    expect(got.dtype == torch.float64, f"float64 scores gave a {got.dtype} loss")
    want = np.logaddexp(0.0, (r - c).numpy())
    close(got, want, "float64 scores, to twelve digits", rtol=1e-12, atol=1e-15)


def log_sigmoid(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.log(torch.sigmoid(chosen - rejected))


def log1p_exp(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.log1p(torch.exp(rejected - chosen))


def shares(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.log(torch.exp(chosen) / (torch.exp(chosen) + torch.exp(rejected)))


def epsilon(chosen: Tensor, rejected: Tensor, small: float = 1e-8) -> Tensor:
    return -torch.log(torch.sigmoid(chosen - rejected) + small)


def clamped(chosen: Tensor, rejected: Tensor, most: float = 20.0) -> Tensor:
    return -F.logsigmoid((chosen - rejected).clamp(-most, most))


def clamped_probability(chosen: Tensor, rejected: Tensor, small: float = 1e-8) -> Tensor:
    return -torch.log(torch.sigmoid(chosen - rejected).clamp(min=small))


_SMALL = (1e-6, 1e-7, 1e-9, 1e-10, 1e-12, 1e-15)


def swapped(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid(rejected - chosen)


def averaged(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid(chosen - rejected).mean()


def likelihood(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.sigmoid(chosen - rejected)


def unsigned(chosen: Tensor, rejected: Tensor) -> Tensor:
    return F.logsigmoid(chosen - rejected)


def hinge(chosen: Tensor, rejected: Tensor) -> Tensor:
    return F.relu(1.0 - (chosen - rejected))


def pointwise(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def through_numpy(chosen: Tensor, rejected: Tensor) -> Tensor:
    gap = (rejected - chosen).detach().numpy()
    return torch.from_numpy(np.logaddexp(0.0, gap, dtype=gap.dtype))


def float32(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid((chosen - rejected).float())


def _probes() -> list[tuple[Any, ...]]:
    edge = torch.tensor([-1000.0, -95.0, -30.0, 0.0, 20.0])
    return [
        (normal(0, 6), normal(1, 6)),
        (edge, torch.zeros_like(edge)),
        (normal(2, 4, dtype=torch.float64), normal(3, 4, dtype=torch.float64)),
    ]


def _look(loss: Attempt, arguments: tuple[Any, ...]) -> Any:
    chosen, rejected = arguments
    chosen = chosen.clone().requires_grad_(True)
    result = loss(chosen, rejected)
    if not result.requires_grad:
        return result, "no gradient"
    # the logarithm tells log(1 + e^x), exact for small losses, from log σ, which gives 0 there
    return result, result.detach().log(), torch.autograd.grad(result.sum(), chosen)[0]


EXERCISE = Exercise(
    id="ch01.pair_loss",
    parameters=("chosen", "rejected"),
    properties=(
        Property(
            "one loss for each pair",
            "The loss should have the shape of the scores: one value for each pair. Which mean is "
            "right depends on how the batch was cut up, and the trainer knows that.",
            _shapes,
        ),
        Property(
            "it is −log σ(chosen − rejected), and ln 2 at a tie",
            "The values are not those of −log σ(chosen − rejected).",
            _values,
        ),
        Property(
            "finite at margins of ±1000, and the size of the margin where it is wrong",
            "The loss of a pair that is badly wrong should be the size of its margin, in every "
            "dtype.",
            _finite,
        ),
        Property(
            "its gradient is −(1 − p), however wrong the pair",
            "The gradient should be −(1 − p) for the chosen score: autograd must be able to "
            "follow every step from the scores to the loss.",
            _gradient,
        ),
        Property(
            "as exact as the scores' dtype",
            "float64 scores should give a float64 loss, as exact as float64 is.",
            _dtype,
        ),
    ),
    mutants=(
        Mutant(OVERFLOW, log_sigmoid, "DeepSpeedExamples #423"),
        Mutant(
            "`log(1 + exp(−Δ))` is softplus written out, and it overflows too: in float32 `exp` is "
            "infinite from 89 on. Use a function that takes the large part out first.",
            log1p_exp,
            "DeepSpeedExamples #423",
        ),
        Mutant(
            "This goes back to the strengths, p = e^r: their powers overflow from scores of 89 on, "
            "and inf / inf is NaN, although only the *difference* matters. Write the loss as a "
            "function of chosen − rejected.",
            shares,
            "DeepSpeedExamples #423",
        ),
        Mutant(
            "A small number inside the logarithm hides the overflow and kills the gradient: the "
            "loss can never exceed a constant (−ln 1e-8 ≈ 18.4), and the pairs that are most wrong "
            "stop pulling. Rewrite the formula in place of patching it.",
            epsilon,
            also=(
                clamped_probability,
                *(partial(epsilon, small=x) for x in _SMALL),
                *(partial(clamped_probability, small=x) for x in _SMALL),
            ),
        ),
        Mutant(
            "Clamping the margin makes the loss finite, but outside of the clamp its gradient is "
            "0: the pairs that are most wrong teach nothing.",
            clamped,
            also=tuple(partial(clamped, most=x) for x in (10.0, 15.0, 30.0, 50.0, 80.0, 100.0)),
        ),
        Mutant(
            "Chosen and rejected are exchanged: this loss is small when the *rejected* text has "
            "the higher score. Training would look fine and learn the opposite.",
            swapped,
        ),
        Mutant(
            "A mean over the batch is taken inside of the loss. Return one value for each pair; "
            "the trainer knows which mean is right.",
            averaged,
        ),
        Mutant(
            "This is the probability of the preference, σ(Δ), not its loss. A loss falls as the "
            "model gets better: take the negative logarithm.",
            likelihood,
        ),
        Mutant(
            "This is the log-likelihood: it is negative, and minimising it makes the model worse. "
            "The loss is its negative.",
            unsigned,
        ),
        Mutant(
            "This is the hinge loss of a ranking SVM: it stops at a margin of 1 and corresponds to "
            "no probability. Bradley–Terry asks for −log σ(Δ).",
            hinge,
        ),
        Mutant(
            "Each score is pushed to its own side of 0, as a classifier of good and bad texts "
            "would. Bradley–Terry looks at the difference of the two scores and at nothing else.",
            pointwise,
        ),
        Mutant(
            "The values are right, but the way through NumPy (or `.detach()`, `.item()`) cuts the "
            "graph: there is no gradient to train with.",
            through_numpy,
        ),
        Mutant(
            "The computation is forced into float32, by `.float()` or by a new tensor without the "
            "scores' dtype. Keep their dtype: whoever passes float64 wants it.",
            float32,
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "−log σ(Δ) = log(1 + e^(−Δ)). Which of the two sides can be computed for every Δ, if the "
        "large part is taken out of the logarithm first?",
        "log(1 + e^x) = max(x, 0) + log(1 + e^(−|x|)): the power is never larger than 1.",
        "PyTorch has it: `F.logsigmoid`. Put a minus before it, and take no mean.",
    ),
    right="It is stable, exact and differentiable. `F.softplus(rejected − chosen)` is nearly as "
    "good: above 20 it returns its argument, which is 2e-9 off.",
)
