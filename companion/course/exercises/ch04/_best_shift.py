"""Derive the shift that the centring penalty asks for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, number


def _total(c: Tensor, r: Tensor, coefficient: float, shift: float) -> float:
    c, r = c + shift, r + shift
    return float((-F.logsigmoid(c - r) + coefficient * (c + r).square()).mean())


def _cases() -> list[tuple[Tensor, Tensor, float]]:
    out = []
    for seed in range(3):
        for coefficient in (0.01, 0.5):
            size = 1 + 9 * seed
            c = normal(seed, size, dtype=torch.float64) + 1.5
            r = normal(seed + 5, size, dtype=torch.float64) * 3
            out.append((c, r, coefficient))
    return out


def _scalar(shift: Attempt) -> None:
    for case in _cases():
        number(shift(*case), "the shift")


def _least(shift: Attempt) -> None:
    for c, r, coefficient in _cases():
        best = number(shift(c, r, coefficient))
        here = _total(c, r, coefficient, best)
        for step in (-0.5, -0.01, 0.01, 0.5):
            expect(
                here < _total(c, r, coefficient, best + step),
                f"{len(c)} pairs: with your shift {best:.4f} loss + penalty is {here:.6f}; with "
                f"{best + step:.4f} it is {_total(c, r, coefficient, best + step):.6f}",
            )


def _again(shift: Attempt) -> None:
    for c, r, coefficient in _cases():
        best = number(shift(c, r, coefficient))
        again = number(shift(c + best, r + best, coefficient))
        close(again, 0.0, "the shift that is left after shifting", atol=1e-6)


def _free(shift: Attempt) -> None:
    c, r, _ = _cases()[2]
    close(number(shift(c, r, 0.01)), number(shift(c, r, 10.0)), "coefficient 0.01 against 10")


def whole_sum(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return -(chosen + rejected).mean()


def positive(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return (chosen + rejected).mean() / 2


def chosen_only(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return -chosen.mean()


def median(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return -torch.cat([chosen, rejected]).median()


def scaled(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return -coefficient * (chosen + rejected).mean() / 2


def nothing(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return torch.zeros(())


def difference(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return -(chosen - rejected).mean() / 2


def per_pair(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    return -(chosen + rejected) / 2


EXERCISE = Exercise(
    id="ch04.best_shift",
    parameters=("chosen", "rejected", "coefficient"),
    properties=(
        Property(
            "one number",
            "One shift for all scores was asked for: a single number.",
            _scalar,
        ),
        Property(
            "no other shift is better",
            "With another shift the sum of loss and penalty is lower: set the derivative of "
            "mean((c + s + r + s)²) with respect to s to zero.",
            _least,
        ),
        Property(
            "after shifting, nothing is left to shift",
            "Applied twice, the second shift should be 0.",
            _again,
        ),
        Property(
            "the coefficient does not matter",
            "The loss does not feel a common shift at all, so there is nothing that the penalty "
            "would have to be weighed against.",
            _free,
        ),
    ),
    mutants=(
        Mutant(
            "The factor 2 is lost: the shift is added to *both* scores, so c + r moves by 2s. Half "
            "of the mean sum is enough.",
            whole_sum,
        ),
        Mutant("The sign is turned round: this shift doubles what should vanish.", positive),
        Mutant(
            "Only the chosen scores are centred. The penalty is on the sum of both.", chosen_only
        ),
        Mutant(
            "A square is made least by the mean. The median makes the absolute value least.",
            median,
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
    probes=lambda: [tuple(case) for case in _cases()[2:]],
    hints=(
        "Which of the two terms, loss and penalty, changes if all scores are shifted by s?",
        "The penalty is mean((c + r + 2s)²), a parabola in s.",
        "Its derivative is 4·mean(c + r + 2s) times the coefficient; set it to zero.",
    ),
    right="−mean(c + r)/2, whatever the coefficient. It makes the *shift* unique, not the whole "
    "minimiser: with one pair, the penalty is 0 at c = −r while the loss goes on falling.",
)
