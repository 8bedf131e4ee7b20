"""Derive the shift that a weighted centring penalty with a target asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, number

Case = tuple[Tensor, Tensor, Tensor, float, float]


def _total(case: Case, shift: float) -> float:
    c, r, w, target, coefficient = case
    c, r = c + shift, r + shift
    penalty = (w * (c + r - 2 * target).square()).sum() / w.sum()
    return float(-F.logsigmoid(c - r).mean() + coefficient * penalty)


def _cases() -> list[Case]:
    out = []
    for seed in range(3):
        for coefficient, target in ((0.01, 0.0), (0.5, 3.0), (0.1, -1.25)):
            size = 1 + 9 * seed
            c = normal(seed, size, dtype=torch.float64) + 1.5
            r = normal(seed + 5, size, dtype=torch.float64) * 3
            w = normal(seed + 8, size, dtype=torch.float64).abs() + 0.1
            out.append((c, r, w, target, coefficient))
    return out


def _scalar(shift: Attempt) -> None:
    for case in _cases():
        number(shift(*case), "the shift")


def _least(shift: Attempt) -> None:
    for case in _cases():
        best = number(shift(*case))
        here = _total(case, best)
        for step in (-0.5, -0.01, 0.01, 0.5):
            expect(
                here < _total(case, best + step),
                f"{len(case[0])} pairs, target {case[3]:g}: with your shift {best:.4f} loss + "
                f"penalty is {here:.6f}; with {best + step:.4f} it is "
                f"{_total(case, best + step):.6f}",
            )


def _again(shift: Attempt) -> None:
    for c, r, *rest in _cases():
        best = number(shift(c, r, *rest))
        again = number(shift(c + best, r + best, *rest))
        close(again, 0.0, "the shift that is left after shifting", atol=1e-6)


def _free(shift: Attempt) -> None:
    c, r, w, target, _ = _cases()[7]
    got = [number(shift(c, r, w, target, coefficient)) for coefficient in (0.01, 10.0)]
    close(got[0], got[1], "coefficient 0.01 against 10")
    close(number(shift(c, r, 5 * w, target, 0.01)), got[0], "all weights five times as large")


def _mean(c: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """Weighted mean of c + r."""
    return (w * (c + r)).sum() / w.sum()


def whole_sum(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return 2 * target - _mean(c, r, w)


def positive(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return _mean(c, r, w) / 2 - target


def chosen_only(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return target - (w * c).sum() / w.sum()


def unweighted(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return target - (c + r).mean() / 2


def no_target(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return -_mean(c, r, w) / 2


def half_target(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return (target - _mean(c, r, w)) / 2


def by_count(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return target - (w * (c + r)).mean() / 2


def squared(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return target - _mean(c, r, w * w) / 2


def scaled(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return coefficient * (target - _mean(c, r, w) / 2)


def nothing(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return torch.zeros(())


def difference(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return target - (w * (c - r)).sum() / w.sum() / 2


def per_pair(c: Tensor, r: Tensor, w: Tensor, target: float, coefficient: float) -> Tensor:
    return target - (c + r) / 2


EXERCISE = Exercise(
    id="ch04.weighted_shift",
    parameters=("chosen", "rejected", "weights", "target", "coefficient"),
    properties=(
        Property(
            "one number",
            "One shift for all scores was asked for: a single number.",
            _scalar,
        ),
        Property(
            "no other shift is better",
            "With another shift the sum of loss and penalty is lower: set the penalty's derivative "
            "with respect to s to zero.",
            _least,
        ),
        Property(
            "after shifting, nothing is left to shift",
            "Applied twice, the second shift should be 0.",
            _again,
        ),
        Property(
            "neither the coefficient nor the weights' sum matters",
            "The loss does not feel a common shift, so there is nothing that the penalty would "
            "have to be weighed against; and only the weights' proportions count.",
            _free,
        ),
    ),
    mutants=(
        Mutant(
            "The factor 2 is lost: the shift is added to *both* scores, so c + r moves by 2s. Half "
            "of this shift is enough.",
            whole_sum,
        ),
        Mutant("The sign is turned round: this shift doubles what should vanish.", positive),
        Mutant(
            "Only the chosen scores are brought to the target. The penalty is on the sum of both.",
            chosen_only,
        ),
        Mutant(
            "The weights are not used. A pair of ten annotators counts ten times here, as it does "
            "in the penalty.",
            unweighted,
        ),
        Mutant("The target is left out: this shift brings the weighted mean to 0.", no_target),
        Mutant(
            "The target is halved as well. A pair lies at the target if *each* of its scores does, "
            "so the sum lies at 2t.",
            half_target,
        ),
        Mutant(
            "The weighted sum is divided by the number of pairs. A weighted mean is divided by the "
            "sum of the weights.",
            by_count,
        ),
        Mutant(
            "The weights stand in the sum twice. In the penalty they stand before the square, not "
            "within it.",
            squared,
        ),
        Mutant(
            "The coefficient is taken for the size of the shift. It says how strongly the penalty "
            "counts; against a shift nothing pulls the other way, so any positive value gives the "
            "same minimum. (In training it decides how *fast* one gets there.)",
            scaled,
        ),
        Mutant(
            "Bradley–Terry does not feel a shift, but the penalty does: their sum has one best "
            "shift, and it is not 0.",
            nothing,
        ),
        Mutant(
            "This is the mean *margin*, which no shift changes. The penalty is on the sum "
            "chosen + rejected.",
            difference,
        ),
        Mutant(
            "There is one shift for each pair. That would make each penalty 0, but the question is "
            "for one number that is added to all scores.",
            per_pair,
        ),
    ),
    probes=lambda: [tuple(case) for case in _cases()[3:]],
    hints=(
        "Which of the two terms, loss and penalty, changes if all scores are shifted by s?",
        "The penalty is Σ w·(c + r + 2s − 2t)² / Σ w, a parabola in s.",
        "Its derivative is 4·Σ w·(c + r + 2s − 2t) / Σ w times the coefficient; set it to zero.",
    ),
    right="With equal weights and t = 0 it is the chapter's −mean(c + r)/2. Weights come from "
    "counts of annotators; a target keeps a threshold that somebody has set on the old scores.",
)
