"""Several rewards: weighed by TRL where all are there, none where one is missing."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from companion.errors import DataError
from companion.rl import joint_rewards, weighted_sum

ARGUMENTS: dict[str, Any] = {"prompts": ["a"] * 4, "completions": ["b"] * 4}


def good(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    return [10.0, 11.0, 12.0, 13.0]


def patchy(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    return [1.0, None, math.inf, math.nan]


def test_a_completion_that_lacks_one_reward_has_none() -> None:
    first, second = joint_rewards([good, patchy])
    assert (first.__name__, second.__name__) == ("good", "patchy")
    for _ in range(2):
        assert first(**ARGUMENTS) == [10.0, None, None, None]
        assert second(**ARGUMENTS) == [1.0, None, None, None]
    assert first.counts["incomplete"] == 6
    assert weighted_sum([good, patchy], [1.0, 2.0])(**ARGUMENTS) == [12.0, None, None, None]


def test_each_is_asked_once_a_batch() -> None:
    calls = []

    def counted(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        calls.append(len(prompts))
        return [float(len(calls))] * len(prompts)

    functions = joint_rewards([counted, counted])
    assert [f.__name__ for f in functions] == ["counted_1", "counted_2"]
    got = [f(**ARGUMENTS)[0] for f in functions]
    assert got == [1.0, 2.0]
    assert len(calls) == 2
    # the same objects with other contents, as a trainer may reuse its lists
    assert [f(**ARGUMENTS)[0] for f in functions] == [3.0, 4.0]
    assert pickle.loads(pickle.dumps(joint_rewards([good, patchy])[0]))(**ARGUMENTS)[0] == 10.0


def test_what_trl_makes_of_it_and_of_half_a_reward(tiny_base: Any, tmp_path: Any) -> None:
    """TRL alone gives a missing reward the value 0; through joint_rewards it is left out."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def half(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [5.0 if i % 2 else None for i in range(len(prompts))]

    def one(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [1.0] * len(prompts)

    rewards = {}
    for name, functions in (("plain", [one, half]), ("joint", joint_rewards([one, half]))):
        trainer = GRPOTrainer(
            model=str(tiny_base),
            reward_funcs=list(functions),
            args=GRPOConfig(
                output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4,
                num_generations=4, max_completion_length=4, use_cpu=True, bf16=False,
                report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
                reward_weights=[1.0, 2.0],
            ),
            train_dataset=Dataset.from_list([{"prompt": "how many pens"}] * 4),
            processing_class=AutoTokenizer.from_pretrained(tiny_base),
        )  # fmt: skip
        trainer.train()
        rewards[name] = next(row["reward"] for row in trainer.state.log_history if "reward" in row)
    assert rewards["plain"] == pytest.approx((1 + 11) / 2), "TRL counts what is missing as 0"
    assert rewards["joint"] == pytest.approx(11.0)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(DataError, match="no reward function"):
        joint_rewards([])
    with pytest.raises(DataError, match="2 reward functions and 1 weights"):
        weighted_sum([good, patchy], [1.0])
    with pytest.raises(DataError, match="gave 4 rewards for 1"):
        joint_rewards([good, patchy])[0](prompts=["a"], completions=["b"])
