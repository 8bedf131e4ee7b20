"""The monitor in TRL's own trainers: what it measures, logs and leaves alone."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from companion import Policy, RewardFunction, RewardScorer
from companion.errors import CompanionError, DataError
from companion.rl import OveroptimizationMonitor, completion_kl
from companion.rl.monitor import frozen_copy

USER = [{"role": "user", "content": "how many pens"}]
HELD_OUT = [f"how many pens {n}" for n in range(10)]
KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def words(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(text.split())) for text in texts]


def train(
    kind: str, base: Any, folder: Any, monitor: Any, reward: Any = words, prompt: Any = USER
) -> Any:
    trainer_class, config_class = KINDS[kind]
    trainer = trainer_class(
        model=str(base),
        reward_funcs=reward,
        args=config_class(
            output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            logging_steps=1, disable_tqdm=True, learning_rate=1e-2, beta=0.0,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 12),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[] if monitor is None else [monitor],
    )  # fmt: skip
    trainer.train()
    return trainer


def watch(**settings: Any) -> OveroptimizationMonitor:
    return OveroptimizationMonitor(
        HELD_OUT, words, words, every=1, completions=2, max_completion_length=6, **settings
    )


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_trl_trains_unmodified_with_the_reward_and_the_monitor(
    kind: str, chat: bool, tiny_base: Any, tiny_reward: Any, tmp_path: Any
) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward, device="cpu")
    function, given = RewardFunction(scorer), []

    def recorded(**arguments: Any) -> Any:
        given.append((arguments, function(**arguments)))
        return given[-1][1]

    prompt = USER if chat else "how many pens has Ana"
    monitor = watch()
    trainer = train(kind, tiny_base, tmp_path, monitor, recorded, prompt)
    assert [look.step for look in monitor.looks] == [0, 1, 2, 3]
    rows = [row for row in trainer.state.log_history if "rewards/recorded/mean" in row]
    assert len(rows) == len(given) == 3
    for row, (arguments, rewards) in zip(rows, given, strict=True):
        finite = [r for r in rewards if r is not None]
        assert row["rewards/recorded/mean"] == pytest.approx(np.mean(finite), abs=1e-4)
        # and they are the scorer's, for the texts that TRL handed over
        eos = scorer.tokenizer.eos_token_id
        texts = [
            {"prompt": p, "completion": c, "terminated": ids[-1] == eos}
            for p, c, ids in zip(
                arguments["prompts"],
                arguments["completions"],
                arguments["completion_ids"],
                strict=True,
            )
        ]
        direct = scorer.score(texts, on_error="skip").raw
        np.testing.assert_allclose(
            np.array([np.nan if r is None else r for r in rewards]), direct, atol=1e-5
        )


def test_it_measures_from_the_policy_that_the_run_began_with(tiny_base: Any, tmp_path: Any) -> None:
    """beta is 0: TRL reports no KL and holds no reference."""
    monitor = watch()
    trainer = train("grpo", tiny_base, tmp_path, monitor)
    kls = [look.mean("kl") for look in monitor.looks]
    assert kls[0] == pytest.approx(0.0, abs=1e-6)
    assert kls[-1] > 0.01
    start = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tokenizer = trainer.processing_class
    look = monitor.viewer.look(Policy(trainer.model.eval(), tokenizer), Policy(start, tokenizer), 3)
    np.testing.assert_allclose(look.figures["kl"], monitor.looks[-1].figures["kl"], atol=1e-4)
    logged = [row for row in trainer.state.log_history if "monitor/kl" in row]
    assert [row["monitor/kl"] for row in logged] == pytest.approx(kls)


def test_a_plain_copy_would_compute_with_the_policy_in_training(tiny_base: Any) -> None:
    """TRL binds a forward of its own to the instance; deepcopy takes the binding along."""
    import copy

    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    add_fused_lm_head(model)
    plain, frozen = copy.deepcopy(model), frozen_copy(model)
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits.detach().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(frozen(input_ids=ids).logits, before)
    assert not torch.allclose(plain(input_ids=ids).logits, before), "if equal, TRL has mended it"


def test_watching_changes_nothing_in_the_training(tiny_base: Any, tmp_path: Any) -> None:
    with_it = train("grpo", tiny_base, tmp_path, watch()).model.state_dict()
    torch.manual_seed(0)
    without = train("grpo", tiny_base, tmp_path, None).model.state_dict()
    for name, value in without.items():
        torch.testing.assert_close(with_it[name], value)


def test_the_estimators_of_the_kl_agree_with_the_sum_over_all_texts() -> None:
    """Two distributions of two tokens over three places: the KL is a sum over 8 texts."""
    p, q = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    texts = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1).T
    weights = p[texts].prod(axis=1)
    exact = 3 * float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        values = [
            completion_kl(np.log(p[text]), np.log(q[text]), estimator)  # type: ignore[arg-type]
            for text in texts
        ]
        assert weights @ np.array(values) == pytest.approx(exact)
        if estimator == "k3":
            assert min(values) >= 0


def test_set_ups_that_cannot_work_are_refused(tiny_base: Any, tmp_path: Any) -> None:
    with pytest.raises(DataError, match="on_budget is 'raise_beta' without"):
        watch(on_budget="raise_beta")
    with pytest.raises(DataError, match="kl_budget is 0"):
        watch(kl_budget=0.0)
    with pytest.raises(DataError, match="may not be called gold"):
        watch(further={"gold": words})
    with pytest.raises(DataError, match="no held-out prompts"):
        OveroptimizationMonitor([], words)
    with pytest.raises(CompanionError, match="no beta above 0"):
        train("grpo", tiny_base, tmp_path, watch(on_budget="raise_beta", kl_budget=1.0))


@pytest.mark.parametrize(
    ("corrected", "level", "warned"),
    [(True, "token", False), (False, "token", True), (True, "sequence", True)],
)
def test_raise_beta_says_when_the_penalty_pulls_on_another_kl(
    corrected: bool, level: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = watch(on_budget="raise_beta", kl_budget=1.0)
    args = SimpleNamespace(use_bias_correction_kl=corrected, importance_sampling_level=level)
    monitor._trainer = SimpleNamespace(beta=0.1, args=args)
    with caplog.at_level(logging.WARNING, "companion"):
        monitor._check(args)
    assert ("gradient of another KL" in caplog.text) is warned
