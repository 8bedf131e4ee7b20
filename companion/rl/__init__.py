"""The reward model as the reward of reinforcement learning. Chapter 5."""

from companion.rl.reward_function import RewardFunction, Transform

__all__ = ["RewardFunction", "Transform"]
