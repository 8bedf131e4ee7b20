"""The reward model as the reward of reinforcement learning. Chapter 5."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS: dict[str, str] = {
    "RewardFunction": "companion.scoring.reward_function",
    "Transform": "companion.scoring.reward_function",
    "JointReward": "companion.rl.rewards",
    "joint_rewards": "companion.rl.rewards",
    "weighted_sum": "companion.rl.rewards",
    "open_reward": "companion.rl.rewards",
    "Fall": "companion.sequential",
    "FallTest": "companion.sequential",
    "Look": "companion.rl.policy_evaluation",
    "Viewer": "companion.rl.policy_evaluation",
    "completion_kl": "companion.rl.policy_evaluation",
    "OveroptimizationMonitor": "companion.rl.monitor",
    "GRPORunConfig": "companion.rl.config",
    "PolicyArguments": "companion.rl.config",
    "PromptArguments": "companion.rl.config",
    "GRPOResult": "companion.rl.run",
    "train_grpo": "companion.rl.run",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'companion.rl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
