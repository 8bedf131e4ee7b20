"""The reward function: one text, one score, inside GRPO as anywhere else."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import torch

from companion import RewardFunction, RewardScorer, load_reward_model
from companion.errors import DataError, ModelError
from companion.models import ReferenceStats, RewardManifest

USER = [{"role": "user", "content": "how many pens"}]
ANSWERS = ["Ana has 3 pens", "no", "the answer is 7 so yes"]


@pytest.fixture
def scorer(tiny_reward):
    return RewardScorer(load_reward_model(tiny_reward))


@pytest.fixture
def with_reference(scorer):
    manifest = scorer.reward_model.manifest or RewardManifest()
    scores = np.linspace(-1.0, 3.0, 101)
    manifest.reference = ReferenceStats.from_scores(scores, "a test")
    scorer.reward_model.manifest = manifest
    return scorer


def _chat():
    return [USER] * 3, [[{"role": "assistant", "content": text}] for text in ANSWERS]


def test_chat_and_plain_prompts_have_the_scores_of_the_scorer(scorer):
    function = scorer.as_reward_func()
    prompts, completions = _chat()
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    got = function(prompts=prompts, completions=completions, answer=[1, 2, 3], trainer_state=None)
    np.testing.assert_allclose(got, scorer.score(rows).raw, atol=1e-6)
    plain = function(prompts=["how many pens "] * 3, completions=ANSWERS)
    texts = [{"prompt": "how many pens ", "completion": text} for text in ANSWERS]
    np.testing.assert_allclose(plain, scorer.score(texts).raw, atol=1e-6)
    assert function.counts["scored"] == 6


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2"])
def test_a_group_of_completions_is_packed_and_scored_as_each_alone(kind, tiny_rewards):
    packed = RewardScorer(load_reward_model(tiny_rewards(kind)))
    single = RewardScorer(packed.reward_model, packing="off")
    prompt = [{"role": "user", "content": "Ana has 3 boxes with 4 pens each how many pens now"}]
    completions = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    got = packed.as_reward_func()(prompts=[prompt] * 3, completions=completions)
    rows = [{"prompt": prompt, "completion": completion} for completion in completions]
    want = [single.score([row]).raw[0] for row in rows]
    np.testing.assert_allclose(got, want, atol=1e-5)
    needed, computed = packed.tokens
    assert computed < needed  # the prompt once for the group


def test_a_completion_that_was_cut_off_is_known_by_its_ids(scorer):
    eos = scorer.reward_model.tokenizer.eos_token_id
    prompts, completions = _chat()
    ids = [[20, 21, eos], [20, 21], []]
    whole = RewardFunction(scorer)(prompts=prompts, completions=completions)
    as_it_stands = RewardFunction(scorer)(
        prompts=prompts, completions=completions, completion_ids=ids
    )
    assert as_it_stands[0] == pytest.approx(whole[0], abs=1e-6)
    assert abs(as_it_stands[1] - whole[1]) > 1e-4
    left_out = RewardFunction(scorer, truncated=None)
    assert left_out(prompts, completions, completion_ids=ids)[1:] == [None, None]
    assert left_out.counts["truncated"] == 2
    penalty = RewardFunction(scorer, truncated=-2.5)
    assert penalty(prompts, completions, completion_ids=ids)[1:] == [-2.5, -2.5]
    # another policy ends its turns with another token
    other = RewardFunction(scorer, truncated=None, eos_token_ids=[21])
    assert [r is None for r in other(prompts, completions, completion_ids=ids)] == [
        True, False, True,
    ]  # fmt: skip


def test_no_gradient_and_eval_mode_and_back(scorer):
    model = scorer.reward_model.model.train()
    with torch.enable_grad():
        rewards = RewardFunction(scorer)(*_chat())
    assert all(isinstance(reward, float) for reward in rewards)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_scores_that_are_not_finite_and_empty_completions_give_none(scorer, caplog):
    prompts, completions = _chat()
    completions[1] = [{"role": "assistant", "content": ""}]
    function = RewardFunction(scorer)
    logged = {}
    rewards = function(prompts, completions, log_metric=logged.__setitem__)
    assert [r is None for r in rewards] == [False, True, False]
    assert logged["reward_model/without_reward"] == pytest.approx(1 / 3)
    assert "without a reward" in caplog.text
    with torch.no_grad():
        scorer.reward_model.model.score.weight.fill_(float("inf"))
    assert function(*_chat()) == [None] * 3
    assert sum(n for reason, n in function.counts.items() if "not finite" in reason) == 3


def test_transforms(with_reference):
    raw = np.array(RewardFunction(with_reference)(*_chat()))
    z = (raw - with_reference.reference.mean) / with_reference.reference.std
    expected = {
        "centered": raw - with_reference.reference.mean,
        "z": z,
        "sigmoid": 1 / (1 + np.exp(-z)),
    }
    for name, values in expected.items():
        got = RewardFunction(with_reference, transform=name)(*_chat())
        np.testing.assert_allclose(got, values, atol=1e-6)
    clipped = RewardFunction(with_reference, clip=0.01)(*_chat())
    assert np.abs(clipped).max() <= 0.01


def test_it_is_named_and_can_be_pickled(tiny_reward, scorer):
    function = RewardFunction(partial(RewardScorer.from_pretrained, tiny_reward), name="helpful")
    again = pickle.loads(pickle.dumps(function))
    assert again.__name__ == "helpful"
    assert not isinstance(again, torch.nn.Module)
    np.testing.assert_allclose(again(*_chat()), function(*_chat()), atol=1e-6)
    assert len(pickle.dumps(function)) < 10_000, "the weights do not travel"
    np.testing.assert_allclose(
        pickle.loads(pickle.dumps(RewardFunction(scorer)))(*_chat()), function(*_chat()), atol=1e-6
    )


def test_bad_settings_are_refused(scorer):
    with pytest.raises(DataError, match="transform is 'tanh'"):
        RewardFunction(scorer, transform="tanh")
    with pytest.raises(DataError, match="clip is 0"):
        RewardFunction(scorer, clip=0)
    with pytest.raises(DataError, match="truncated is 'drop'"):
        RewardFunction(scorer, truncated="drop")
    scorer.reward_model.manifest = None
    with pytest.raises(ModelError, match="needs a reference set"):
        RewardFunction(scorer, transform="z")
    with pytest.raises(DataError, match="lengths differ"):
        RewardFunction(scorer)(prompts=[USER], completions=[])


@pytest.mark.parametrize("chat", [True, False])
def test_trl_trains_with_it(chat, tiny_base, scorer, tmp_path):
    """TRL's own GRPOTrainer, unmodified; it logs the mean of the rewards that we gave."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    function, given = RewardFunction(scorer), []

    def recorded(**arguments):
        given.append(function(**arguments))
        return given[-1]

    prompt = USER if chat else "how many pens has Ana"
    trainer = GRPOTrainer(
        model=str(tiny_base),
        reward_funcs=recorded,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=8, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            logging_steps=1, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 4),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )  # fmt: skip
    trainer.train()
    logged = next(row for row in trainer.state.log_history if "rewards/recorded/mean" in row)
    rewards = [r for r in given[0] if r is not None]
    assert rewards
    assert logged["rewards/recorded/mean"] == pytest.approx(np.mean(rewards), abs=1e-4)


def test_a_policy_that_echoes_its_prompt_has_a_reward(scorer):
    """In a file it would be a mistake of the rows; here it is what the policy did."""
    prompt = "Ana has 3 pens"
    reward = scorer.as_reward_func()([prompt], [f"{prompt} and with it 4 more"])
    assert reward[0] is not None
    with pytest.raises(DataError, match="begins with the prompt"):
        scorer.score([{"prompt": prompt, "completion": f"{prompt} and with it 4 more"}])
