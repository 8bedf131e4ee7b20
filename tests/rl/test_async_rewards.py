"""Reward functions as coroutines: the same rewards, waited for side by side."""

from __future__ import annotations

import asyncio
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from companion import RewardScorer, load_reward_model
from companion.errors import DataError

PROMPT = [{"role": "user", "content": "how many pens"}]


@pytest.fixture
def scorer(tiny_reward: Path) -> RewardScorer:
    return RewardScorer(load_reward_model(tiny_reward))


def test_trl_waits_for_two_at_once_and_they_give_what_the_functions_give(
    tiny_base: Path, scorer: RewardScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPOTrainer, unmodified. Each scorer waits for the other: one after the other would hang."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    together, seen = threading.Barrier(2), []
    score = RewardScorer.score

    def waiting(self: RewardScorer, rows: Any, **settings: Any) -> Any:
        together.wait(60)
        return score(self, rows, **settings)

    monkeypatch.setattr(RewardScorer, "score", waiting)
    functions = [
        scorer.as_async_reward_func(name="one"),
        scorer.as_async_reward_func(name="cut_ones", truncated=-9.0),
    ]
    trainer = GRPOTrainer(
        model=str(tiny_base),
        reward_funcs=functions,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=8, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            disable_tqdm=True, logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 8),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )  # fmt: skip
    calculate = trainer._calculate_rewards

    def recorded(inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
        # one that is whole and one that is cut off, whatever the policy drew
        ids = [[20, scorer.tokenizer.eos_token_id], [20, 21], *ids[2:]]
        seen.append((prompts, completions, ids, calculate(inputs, prompts, completions, ids)))
        return seen[-1][3]

    monkeypatch.setattr(trainer, "_calculate_rewards", recorded)
    trainer.train()
    monkeypatch.setattr(RewardScorer, "score", score)
    assert len(seen) == 2
    for prompts, completions, ids, got in seen:
        for column, settings in enumerate(({}, {"truncated": -9.0})):
            function = scorer.as_reward_func(**settings)
            want = function(prompts, completions, completion_ids=ids)
            assert got[:, column].tolist() == pytest.approx(want, abs=1e-6)
        assert got[1, 1] == -9.0 != got[1, 0]
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"rewards/one/mean", "rewards/cut_ones/mean", "one/truncated"} <= logged
    assert functions[0].counts["scored"] == 8


def test_errors_come_through_and_it_can_be_pickled(scorer: RewardScorer) -> None:
    function = scorer.as_async_reward_func(name="mine")
    assert function.__name__ == "mine"
    with pytest.raises(DataError, match="lengths differ"):
        asyncio.run(function([PROMPT], []))
    again = pickle.loads(pickle.dumps(function))
    answer = [[{"role": "assistant", "content": "yes"}]]
    want = scorer.as_reward_func()([PROMPT], answer)
    assert asyncio.run(again([PROMPT], answer)) == pytest.approx(want, abs=1e-6)
