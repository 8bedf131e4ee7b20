"""Predict which changes of a reward GRPO's group scaling lets through, then run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Prediction, Question
from companion.functional.selection import whiten

SAME = ("the same", "different")
SIZE = ("about 0", "about 1", "NaN")


def advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages of ``[groups, completions]`` rewards, as TRL scales them by group."""
    gap = rewards - rewards.mean(dim=1, keepdim=True)
    return gap / (rewards.std(dim=1, keepdim=True) + 1e-4)


def draw(seed: int = 0) -> Tensor:
    """Rewards of 64 prompts with 8 completions; prompts differ in level and spread."""
    generator = torch.Generator().manual_seed(seed)
    level = 2.0 * torch.randn(64, 1, generator=generator)
    spread = 0.3 + torch.rand(64, 1, generator=generator)
    return level + spread * torch.randn(64, 8, generator=generator)


def _add_to_one(rewards: Tensor) -> Tensor:
    changed = rewards.clone()
    changed[0] += 5.0
    return changed


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "whiten each group first": lambda rewards: whiten(rewards, dim=1),
    "whiten the whole batch first": lambda rewards: whiten(rewards.flatten(), dim=0).view_as(
        rewards
    ),
    "add 5 to all rewards of one prompt": _add_to_one,
    "take the sigmoid of each reward": torch.sigmoid,
}
#: eight rewards that are equal, and eight that differ in the sixth decimal
EQUAL = torch.ones(1, 8)
NEARLY = 1.0 + 1e-6 * torch.arange(8.0)[None, :]


def _size(advantage: Tensor) -> str:
    if bool(advantage.isnan().any()):
        return "NaN"
    return "about 0" if float(advantage.abs().max()) < 0.1 else "about 1"


def run() -> dict[str, Any]:
    """Scale the rewards before and after each change, and the two groups without a signal."""
    rewards = draw()
    before = advantages(rewards)
    moved = {name: float((advantages(change(rewards)) - before).abs().max())
             for name, change in CHANGES.items()}  # fmt: skip
    return {
        **{name: "the same" if gap < 0.01 else "different" for name, gap in moved.items()},
        "a group of equal rewards": _size(advantages(EQUAL)),
        "a group that differs by 1e-6": _size(advantages(NEARLY)),
        "that group, whitened first": _size(advantages(whiten(NEARLY, dim=1))),
    }


EXERCISE = Prediction(
    id="ch05.group_scaling",
    run=run,
    questions=(
        Question(
            "whiten each group first",
            SAME,
            {
                "different": "Whitening is taken to help the advantages. They subtract the group's "
                "mean and divide by its deviation anyway: done twice it is done once.",
            },
        ),
        Question(
            "whiten the whole batch first",
            SAME,
            {
                "different": "Numbers of the batch are taken to reach a group. Within a group the "
                "whole change is one shift and one factor, and both are scaled away.",
            },
        ),
        Question(
            "add 5 to all rewards of one prompt",
            SAME,
            {
                "different": "A bonus is taken to make its prompt count for more. It moves the "
                "group's mean by as much as each reward: the advantages do not see it.",
            },
        ),
        Question(
            "take the sigmoid of each reward",
            SAME,
            {
                "the same": "Any monotone change is taken to be undone. Scaling undoes a shift and "
                "a factor; a curve changes the *distances* between the rewards of a group.",
            },
        ),
        Question(
            "a group of equal rewards",
            SIZE,
            {
                "about 1": "A group is taken to have winners always. If all rewards are equal, "
                "each is the mean, and there is nothing to learn from the group.",
                "NaN": "0/0 is feared. TRL adds 1e-4 to the deviation, so that 0 is divided by "
                "something.",
            },
        ),
        Question(
            "a group that differs by 1e-6",
            SIZE,
            {
                "about 1": "The deviation is taken to be all that is divided by. Beside 1e-4 a "
                "deviation of 2e-6 vanishes: such a group hardly counts, and that is as it should "
                "be.",
                "NaN": "Nothing is divided by 0 here: the deviation is small, and 1e-4 is added to "
                "it.",
            },
        ),
        Question(
            "that group, whitened first",
            SIZE,
            {
                "about 0": "Whitening is taken to be harmless. It blows the rounding noise up to a "
                "deviation of 1 *before* the 1e-4 can damp it, and GRPO learns from it as from any "
                "other group.",
                "NaN": "The deviation is 2e-6, not 0: nothing is divided by 0, and the noise comes "
                "out at full size.",
            },
        ),
    ),
    hints=(
        "An advantage is (reward − mean of the group) / (deviation of the group + 1e-4). Put "
        "a·reward + b in.",
        "A shift and a positive factor drop out, whichever numbers they were computed from. What "
        "is not of that form?",
        "Only the sigmoid bends. Among the groups without a signal, compare the deviation with "
        "1e-4: 0, 2e-6, and 1 after whitening.",
    ),
    right="Under group scaling whitening is a no-op at best; at worst it turns noise into a "
    "signal. It matters without scaling, or where several rewards are added.",
)
