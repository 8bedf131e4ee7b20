"""The reward model as the reward of reinforcement learning. Chapter 5."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS: dict[str, str] = {
    "RewardFunction": "companion.rl.reward_function",
    "Transform": "companion.rl.reward_function",
    "JointReward": "companion.rl.several",
    "joint_rewards": "companion.rl.several",
    "weighted_sum": "companion.rl.several",
    "open_reward": "companion.rl.sources",
    "Fall": "companion.rl.stopping",
    "FallTest": "companion.rl.stopping",
    "Look": "companion.rl.looks",
    "Viewer": "companion.rl.looks",
    "completion_kl": "companion.rl.looks",
    "OveroptimizationMonitor": "companion.rl.monitor",
    "GRPORunConfig": "companion.rl.config",
    "PolicyArguments": "companion.rl.config",
    "PromptArguments": "companion.rl.config",
    "GRPOResult": "companion.rl.result",
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
