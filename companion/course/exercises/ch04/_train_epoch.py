"""Find three bugs in a training loop with gradient accumulation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, tensor

MEANS = (
    "Each micro-batch takes its own mean, divided by the number of micro-batches: a mean of means. "
    "The pairs of a short micro-batch then count for more than the others. Divide each *sum* by "
    "the number of pairs of the whole step."
)
STALE = (
    "The gradient is never set back to zero, so every step walks along all gradients since the "
    "beginning of the epoch."
)
LEFT_OVER = (
    "The micro-batches that do not fill a last step are never stepped on: the end of the epoch is "
    "computed and thrown away."
)


def _batches(seed: int, sizes: list[int]) -> list[Tensor]:
    parts = [normal(seed + 31 * i, size, 6) + 0.5 for i, size in enumerate(sizes)]
    parts[-1] = parts[-1] * 3.0  # the last micro-batch is unlike the others: its weight shows
    return parts


def _step(weight: Tensor, pairs: Tensor, rate: float) -> Tensor:
    force = torch.sigmoid(-(pairs @ weight))
    return weight + rate * (force[:, None] * pairs).mean(dim=0)


def _want(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    for start in range(0, len(batches), accumulation):
        weight = _step(weight, torch.cat(batches[start : start + accumulation]), rate)
    return weight


def _against(loop: Attempt, sizes: list[int], accumulation: int, what: str) -> None:
    for seed in range(2):
        start, batches = normal(seed, 6, scale=0.3), _batches(seed + 3, sizes)
        got = tensor(loop(start, batches, 0.3, accumulation), (6,), "the weights")
        close(got, _want(start, batches, 0.3, accumulation), what, rtol=1e-4, atol=1e-5)


def _detached(loop: Attempt) -> None:
    got = tensor(loop(normal(0, 6), _batches(1, [4]), 0.3, 1), (6,), "the weights")
    expect(
        not got.requires_grad,
        "the new weights require a gradient: with them the graph of the whole epoch is kept",
    )


def _plain(loop: Attempt) -> None:
    _against(loop, [4], 1, "one batch, one step")


def _steps(loop: Attempt) -> None:
    _against(loop, [4, 4, 4], 1, "three batches, a step each")


def _even(loop: Attempt) -> None:
    _against(loop, [4, 4, 4, 4], 2, "four batches of 4, a step for every two")


def _uneven(loop: Attempt) -> None:
    _against(loop, [4, 1], 2, "batches of 4 and 1, one step for both")


def _rest(loop: Attempt) -> None:
    _against(loop, [4, 4, 4], 2, "three batches, a step for every two: the third is left over")
    _against(loop, [4, 2], 5, "fewer batches than one step has")


def _epoch(
    weight: Tensor,
    batches: list[Tensor],
    rate: float,
    accumulation: int,
    *,
    means: bool = False,
    stale: bool = False,
    drop: bool = False,
    fixed: bool = False,
    sign: float = 1.0,
) -> Tensor:
    """The right loop, with switches for what can go wrong."""
    weight = weight.clone().requires_grad_(True)
    for start in range(0, len(batches), accumulation):
        window = batches[start : start + accumulation]
        pairs = sum(len(batch) for batch in window)
        if fixed:
            pairs = accumulation * len(window[0])
        for batch in window:
            losses = -F.logsigmoid(sign * (batch @ weight))
            (losses.mean() / accumulation if means else losses.sum() / pairs).backward()
        if drop and len(window) < accumulation:
            break
        grad = weight.grad
        assert grad is not None
        with torch.no_grad():
            weight -= rate * grad
            if not stale:
                grad.zero_()
    return weight.detach()


def broken(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    weight = weight.clone().requires_grad_(True)
    for number, batch in enumerate(batches, start=1):
        loss = -F.logsigmoid(batch @ weight).mean() / accumulation
        loss.backward()
        if number % accumulation == 0:
            with torch.no_grad():
                weight -= rate * weight.grad  # type: ignore[operator]
    return weight.detach()


def mean_of_means(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, means=True)


def stale(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, stale=True)


def dropped(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, drop=True)


def dropped_means(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, drop=True, means=True)


def stale_means(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, stale=True, means=True)


def stale_dropped(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, stale=True, drop=True)


def full_steps(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, fixed=True)


def every_batch(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, 1)


def whole_epoch(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, len(batches))


def window_means(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    for start in range(0, len(batches), accumulation):
        window = batches[start : start + accumulation]
        steps = torch.stack([_step(weight, batch, rate) - weight for batch in window])
        weight = weight + steps.mean(dim=0)
    return weight


def upside_down(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    return _epoch(weight, batches, rate, accumulation, sign=-1.0)


def keeps_graph(weight: Tensor, batches: list[Tensor], rate: float, accumulation: int) -> Tensor:
    with torch.enable_grad():
        return _want(weight.clone().requires_grad_(True), batches, rate, accumulation)


def _look(loop: Attempt, arguments: tuple[Any, ...]) -> Any:
    got = loop(*arguments)
    return got, getattr(got, "requires_grad", None)


def _probes() -> list[tuple[Any, ...]]:
    return [
        (normal(0, 6, scale=0.3), _batches(0, [4, 3, 4, 4, 2]), 0.3, 2),
        (normal(1, 6, scale=0.3), _batches(5, [4, 1]), 0.3, 2),
    ]


EXERCISE = Exercise(
    id="ch04.train_epoch",
    parameters=("weight", "batches", "rate", "accumulation"),
    broken=broken,
    properties=(
        Property(
            "one batch, one step",
            "One step should be `weight − rate · gradient` of the mean loss over the batch's "
            "pairs.",
            _plain,
        ),
        Property(
            "each step with its own gradient alone",
            "Each step should go along its own gradient, and no earlier one's.",
            _steps,
        ),
        Property(
            "a step for every `accumulation` batches",
            "The weights should move once for every `accumulation` micro-batches, by the gradient "
            "of the mean over all their pairs.",
            _even,
        ),
        Property(
            "each pair counts once, also in a short batch",
            "A step goes by the mean over *all* its pairs, so each pair counts once, whatever its "
            "micro-batch's size.",
            _uneven,
        ),
        Property(
            "what is left over at the end is stepped on",
            "The micro-batches that are left over at the end make a step too.",
            _rest,
        ),
        Property(
            "weights without a gradient",
            "The new weights should not require a gradient.",
            _detached,
        ),
    ),
    mutants=(
        Mutant(
            "The new weights still hang on the graph of the epoch: it is kept in memory, and the "
            "next step differentiates through this one. `.detach()` them, or step under "
            "`torch.no_grad()`.",
            keeps_graph,
        ),
        Mutant(
            "All three bugs are still there. The first: the gradient is never set back to zero, so "
            "every step walks along all gradients since the beginning.",
            broken,
        ),
        Mutant(MEANS, mean_of_means),
        Mutant(STALE, stale),
        Mutant(LEFT_OVER, dropped),
        Mutant(
            "Two bugs are left. The micro-batches' means are averaged, so that short ones count "
            "too much; and what does not fill a last step is thrown away.",
            dropped_means,
        ),
        Mutant(
            "Two bugs are left. The gradient is never set back to zero; and the micro-batches' "
            "means are averaged, so that short ones count too much.",
            stale_means,
        ),
        Mutant(
            "Two bugs are left. The gradient is never set back to zero; and what does not fill a "
            "last step is thrown away.",
            stale_dropped,
        ),
        Mutant(
            "The sum is divided by accumulation × the size of the first batch, as if every step "
            "were full. Count the pairs that the step really has.",
            full_steps,
        ),
        Mutant(
            "There is a step after every micro-batch. Accumulation stands for a batch that does "
            "not fit into memory: its parts make one step.",
            every_batch,
        ),
        Mutant(
            "There is one step for the whole epoch. A step belongs after every `accumulation` "
            "micro-batches.",
            whole_epoch,
        ),
        Mutant(
            "Nothing is stale and nothing left over, but a step is the mean of its micro-batches' "
            "means: right only if all are equally large.",
            window_means,
        ),
        Mutant(
            "The sign of the difference is turned round: the loop learns to prefer the rejected "
            "text.",
            upside_down,
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "Three questions: what is in `weight.grad` when a step begins? How much does each pair "
        "count in it? What happens after the last full step?",
        "Cut the batches into windows of `accumulation` and count the pairs of a window before "
        "its first backward pass.",
        "For each window: `pairs = sum(len(b) for b in window)`; `(-F.logsigmoid(b @ weight).sum() "
        "/ pairs).backward()` for each `b`; step; `weight.grad = None`.",
    ),
    right="Over several processes it is the same sum, with the count added up over all of them; "
    "since DDP averages gradients, the loss is also multiplied by the number of processes. "
    "`PairwiseRewardTrainer` does that.",
)
