"""Write how many bytes of a rank weights, gradients and Adam take under ZeRO."""

from __future__ import annotations

from typing import Any

import numpy as np

from companion.course.exercise import Exercise, Mutant, Property, Unusable
from companion.course.exercises._tools import Attempt, a_kind, expect

WEIGHT, GRADIENT, OPTIMIZER = 2, 2, 12


def _bytes(
    parameters: int,
    ranks: int,
    stage: int,
    largest: int,
    *,
    weight: int = WEIGHT,
    gradient: int = GRADIENT,
    optimizer: int = OPTIMIZER,
    ahead: int = 0,
    gathered: int = WEIGHT + GRADIENT,
    alone: bool = False,
    up: bool = True,
) -> int:
    part = -(-parameters // ranks) if up else parameters // ranks
    stage = min(stage + ahead, 3) if stage else 0
    total = optimizer * (part if stage >= 1 else parameters)
    total += gradient * (part if stage >= 2 else parameters)
    total += weight * (part if stage >= 3 else parameters)
    if stage >= 3 and (ranks > 1 or alone):
        total += gathered * largest
    return total


def _ask(attempt: Attempt, *case: int) -> int:
    got = attempt(*case)
    if isinstance(got, bool) or not isinstance(got, (int, np.integer)):
        raise Unusable(f"the result: expected a whole number of bytes, got {a_kind(got)}")
    return int(got)


def _same(attempt: Attempt, *case: int) -> None:
    got, want = _ask(attempt, *case), _bytes(*case)
    parameters, ranks, stage, largest = case
    expect(got == want,
           f"{parameters:,} parameters, {ranks} rank{'s' * (ranks > 1)}, stage {stage}, largest "
           f"layer {largest:,}: {got:,} bytes; it should be {want:,}")  # fmt: skip


def _replicated(attempt: Attempt) -> None:
    for parameters, ranks in ((1000, 1), (1000, 8), (600_000_000, 4)):
        _same(attempt, parameters, ranks, 0, 100)


def _first(attempt: Attempt) -> None:
    for parameters, ranks in ((1000, 2), (8_000, 8)):
        _same(attempt, parameters, ranks, 1, 100)


def _second(attempt: Attempt) -> None:
    for parameters, ranks in ((1000, 2), (8_000, 8)):
        _same(attempt, parameters, ranks, 2, 100)


def _third(attempt: Attempt) -> None:
    for parameters, ranks in ((1000, 2), (8_000_000_000, 8)):
        _same(attempt, parameters, ranks, 3, parameters // 10)


def _rest(attempt: Attempt) -> None:
    for stage in (1, 2, 3):
        _same(attempt, 1001, 4, stage, 10)


def _alone(attempt: Attempt) -> None:
    for stage in (1, 2, 3):
        _same(attempt, 1000, 1, stage, 100)


def no_master(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, optimizer=8)


def all_fp32(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(
        parameters, ranks, stage, largest, weight=4, gradient=4, optimizer=8, gathered=8
    )  # fmt: skip


def fp32_gradients(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, gradient=4, gathered=6)


def one_ahead(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, ahead=1)


def all_divided(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return 16 * -(-parameters // ranks) if stage else 16 * parameters


def weights_of_layer(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, gathered=WEIGHT)


def nothing_gathered(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, gathered=0)


def rounded_down(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, up=False)


def gathered_alone(parameters: int, ranks: int, stage: int, largest: int) -> Any:
    return _bytes(parameters, ranks, stage, largest, alone=True)


def _probes() -> list[tuple[Any, ...]]:
    return [
        (parameters, ranks, stage, 3)
        for parameters, ranks in ((14, 4), (12, 3), (9, 1))
        for stage in (0, 1, 2, 3)
    ]


EXERCISE = Exercise(
    id="ch08.bytes_a_rank",
    parameters=("parameters", "ranks", "stage", "largest"),
    properties=(
        Property(
            "stage 0 holds everything on every rank",
            "Weights and gradients in bf16, master weights and two moments in fp32: whole on each "
            "rank, however many there are.",
            _replicated,
        ),
        Property(
            "stage 1 shards the optimiser's state",
            "What is fp32 is cut into parts; weights and gradients are whole.",
            _first,
        ),
        Property(
            "stage 2 shards the gradients too",
            "The weights alone are whole.",
            _second,
        ),
        Property(
            "stage 3 shards the weights too, and gathers a layer",
            "While the largest layer is at work, its weights and gradients are whole, beside the "
            "part.",
            _third,
        ),
        Property(
            "a part is rounded up",
            "All ranks have equally large parts, of whole parameters.",
            _rest,
        ),
        Property(
            "one rank",
            "Alone, a rank has everything at every stage, and nothing has to be gathered.",
            _alone,
        ),
    ),
    mutants=(
        Mutant(
            "Adam's two moments are counted, and the fp32 master weights are forgotten. In bf16 "
            "alone a small update is rounded away, so they are kept.",
            no_master,
        ),
        Mutant(
            "Weights and gradients have 4 bytes, the optimiser 8. On one rank that is 16 as well, "
            "but other parts of it are sharded.",
            all_fp32,
            "DeepSpeed #5099",
        ),
        Mutant(
            "Gradients have 4 bytes. Some trainers keep them so, and come to 18 in all; here they "
            "are in bf16.",
            fp32_gradients,
            "Megatron-LM #654",
        ),
        Mutant(
            "Each stage is taken for the next: 1 shards the optimiser's state, 2 the gradients "
            "too, 3 the weights too.",
            one_ahead,
        ),
        Mutant(
            "Every stage divides all 16 bytes by the ranks. Only stage 3 shards all of them.",
            all_divided,
        ),
        Mutant(
            "Of the layer at work only the weights are counted. Its gradients are whole as well, "
            "until they are reduced.",
            weights_of_layer,
        ),
        Mutant(
            "Nothing is gathered. A rank cannot compute with an eighth of a matrix: for a moment "
            "the layer at work is whole.",
            nothing_gathered,
        ),
        Mutant(
            "Parts are rounded down. Their sum is then less than the model.",
            rounded_down,
        ),
        Mutant(
            "A rank that is alone gathers a layer that it has already.",
            gathered_alone,
        ),
    ),
    probes=_probes,
    hints=(
        "Make three numbers first: bytes a parameter of weights, gradients, optimiser's state. "
        "They add up to 16.",
        "A part has `-(-parameters // ranks)` parameters. From which stage on is each of the three "
        "a part?",
        "`2 * (part if stage == 3 else parameters)`, the like for gradients from stage 2 and for "
        "12 bytes from stage 1; at stage 3 with several ranks, `4 * largest` more.",
    ),
    right="Activations come on top, and with long texts they are more than all of this. "
    "`companion plan` counts them from the model's shape.",
)
