"""The reward model as the reward of reinforcement learning. Chapter 5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.rl.config import (
        GRPORunConfig as GRPORunConfig,
        PolicyArguments as PolicyArguments,
        PromptArguments as PromptArguments,
    )
    from companion.rl.monitor import OveroptimizationMonitor as OveroptimizationMonitor
    from companion.rl.policy_evaluation import (
        Look as Look,
        Viewer as Viewer,
        completion_kl as completion_kl,
    )
    from companion.rl.rewards import (
        JointReward as JointReward,
        RewardCallable as RewardCallable,
        joint_rewards as joint_rewards,
        open_reward as open_reward,
        weighted_sum as weighted_sum,
    )
    from companion.rl.run import GRPOResult as GRPOResult, train_grpo as train_grpo
    from companion.rl.verl import RewardManager as RewardManager
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
