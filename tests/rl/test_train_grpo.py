"""``companion train grpo`` on a tiny policy: what it trains, holds out, stops by and leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from companion import PromptArguments, train_grpo
from companion.cli.main import main
from companion.cli.train import parse
from companion.data import prompt_key
from companion.errors import CompanionError, DataError, RunEnded
from companion.rl.run import hold_out

EARLY = "tests_rl_gold:first_is_best"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """40 prompts, of which two stand there twice."""
    file = tmp_path / "prompts.jsonl"
    texts = [f"how many pens has {'and ' * (i // 20)}{i % 20}" for i in range(38)]
    rows = [
        {"prompt": [{"role": "user", "content": text}], "number": i}
        for i, text in enumerate([*texts, texts[0], texts[1]])
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with a held-out scorer that only goes down, and one that reads a column."""
    (tmp_path / "tests_rl_gold.py").write_text(
        "asked = []\n"
        "def first_is_best(prompts, completions, **columns):\n"
        "    asked.append(len(prompts))\n"
        "    return [-float(len(asked))] * len(prompts)\n"
        "def numbers(prompts, completions, number, **columns):\n"
        "    return [float(n) for n in number]\n"
        "def words(prompts, completions, **columns):\n"
        "    return [-float(len(c[-1]['content'].split())) for c in completions]\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def flags(tmp_path: Path, prompts: Path, tiny_base: Path, tiny_reward: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(tiny_base), "--dataset_name", str(prompts)),
        *("--reward_model", str(tiny_reward), "--output_dir", str(tmp_path / "out")),
        *("--monitor_prompts", "8", "--test_prompts", "8", "--monitor_completions", "2"),
        *("--per_device_train_batch_size", "8", "--num_generations", "4"),
        *("--max_completion_length", "8", "--learning_rate", "0.01", "--max_steps", "4"),
        *("--monitor_steps", "2", "--save_strategy", "no", "--logging_steps", "1"),
        *("--disable_tqdm", "true", "--report_to", "none"),
    ]


def run(flags: list[str], *callbacks: TrainerCallback) -> Any:
    data, model, config = parse(flags, "grpo")
    return train_grpo(config, model, data, say=lambda line: None, callbacks=list(callbacks))


def test_a_run_reports_kl_and_rewards_and_keeps_the_best(
    flags: list[str], scorers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--held_out_scorer", "tests_rl_gold:words", "--also_measure", "tests_rl_gold:numbers"]
    assert main(["train", "grpo", *flags, *more]) == 0
    out = capsys.readouterr().out
    assert " to train on; held out: 8 to stop by, 8 for the figures" in out
    assert "gain of gold, best against start" in out
    saved = json.loads((tmp_path / "out" / "grpo_result.json").read_text())
    assert saved["steps"] == 4
    assert saved["figures"]["start"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert saved["figures"]["end"]["kl"]["mean"] > 0.01  # though beta is 0
    assert set(saved["gains"]) == {"proxy", "gold", "numbers"}
    assert saved["counts"][f"reward_{Path(flags[5]).name}"]["scored"] > 0
    looks = [json.loads(line) for line in (tmp_path / "out" / "monitor.jsonl").open()]
    assert [look["step"] for look in looks] == [0, 2, 4]
    best = int(np.argmax([np.mean(look["figures"]["gold"]) for look in looks]))
    assert saved["best_step"] == looks[best]["step"]
    assert (tmp_path / "out" / "last" / "model.safetensors").exists() is (best != 2)


def test_the_best_policy_is_the_one_that_is_saved(
    flags: list[str], scorers: None, tiny_base: Path, tmp_path: Path
) -> None:
    """The held-out score only falls: the start is best, the end is saved beside it."""
    result = run([*flags, "--held_out_scorer", EARLY])
    assert (result.best_step, result.steps) == (0, 2)
    assert "fallen" in result.reason
    kept = load_file(tmp_path / "out" / "model.safetensors")
    last = load_file(tmp_path / "out" / "last" / "model.safetensors")
    start = load_file(tiny_base / "model.safetensors")
    for name, value in start.items():
        torch.testing.assert_close(kept[name], value)
    assert any(not torch.equal(last[name], value) for name, value in start.items())
    np.testing.assert_array_equal(result.best.figures["proxy"], result.start.figures["proxy"])


def test_the_kl_budget_stops_the_run(flags: list[str]) -> None:
    result = run([*flags, "--kl_budget", "0.0001", "--monitor_steps", "1"])
    assert result.steps == 1
    assert "KL budget is spent" in result.reason
    assert result.best_step == 1, "without a held-out scorer the last policy is kept"
    assert not (result.output_dir / "last").exists()


def test_beta_is_raised_where_that_is_asked_for(flags: list[str]) -> None:
    budget = ["--kl_budget", "0.0001", "--on_budget", "raise_beta", "--beta", "0.01"]
    result = run([*flags, *budget, "--monitor_steps", "1"])
    assert result.steps == 4
    assert result.reason is None
    betas = [row["monitor/beta"] for row in result.log_history if "monitor/beta" in row]
    assert betas == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
    assert any("kl" in row for row in result.log_history), "TRL's own"


def test_several_rewards_and_their_weights(
    flags: list[str], scorers: None, tiny_rewards: Any
) -> None:
    second = "tests_rl_gold:words"
    flags = [*flags, "--reward_weights", "1.0", "0.5"]
    flags.insert(flags.index("--reward_model") + 2, second)
    result = run(flags)
    first = f"rewards/reward_{Path(flags[5]).name}/mean"
    row = next(row for row in result.log_history if first in row)
    assert row["reward"] == pytest.approx(row[first] + 0.5 * row["rewards/words/mean"], abs=1e-4)


def test_a_lora_run_measures_from_the_base(flags: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run([*flags, "--use_peft", "true", "--lora_r", "4", "--learning_rate", "0.05"])
    assert result.start.mean("kl") == pytest.approx(0.0, abs=1e-6)
    assert result.end.mean("kl") > 0.001
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_resumed_run_goes_on_with_its_looks(
    flags: list[str], scorers: None, tmp_path: Path
) -> None:
    gold = ["--held_out_scorer", "tests_rl_gold:words"]
    steps = ["--save_strategy", "steps", "--save_steps", "2"]
    whole = run([*flags, *gold, *steps])
    record = (tmp_path / "out" / "monitor.jsonl").read_text()
    again = run(
        [*flags, *gold, *steps, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    )
    assert [look.step for look in again.monitor.looks] == [0, 2, 4]
    for a, b in zip(whole.monitor.looks, again.monitor.looks, strict=True):
        np.testing.assert_allclose(a.figures["kl"], b.figures["kl"], atol=1e-4)
    assert len((tmp_path / "out" / "monitor.jsonl").read_text().splitlines()) == len(
        record.splitlines()
    )
    assert again.train_metrics["train_loss"] == pytest.approx(
        whole.train_metrics["train_loss"], abs=1e-4
    )
    last = [*flags, *gold, *steps, "--resume_from_checkpoint", "last"]
    with pytest.raises(CompanionError, match=r"of another run \(beta: 0.0 -> 0.1\)"):
        run([*last, "--beta", "0.1"])


class AskedToEnd(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_asked_to_end_goes_on_as_if_it_had_not_been(
    flags: list[str], scorers: None, tmp_path: Path
) -> None:
    """The dice of the completions go on from the checkpoint too."""
    more = ["--held_out_scorer", "tests_rl_gold:words", "--gradient_accumulation_steps", "2"]
    more += ["--monitor_steps", "4"]  # not at the step of the checkpoint
    whole = run([*flags, *more])
    weights = {name: value.clone() for name, value in end(whole).items()}
    out = ["--output_dir", str(tmp_path / "again")]
    with pytest.raises(RunEnded, match=r"at step 2 of 4, saved in .*again/checkpoint-2"):
        run([*flags, *more, *out], AskedToEnd())
    assert [path.name for path in (tmp_path / "again").glob("checkpoint*")] == ["checkpoint-2"]
    again = run([*flags, *more, *out, "--resume_from_checkpoint", "auto"])
    assert [look.step for look in again.monitor.looks] == [0, 4]
    assert again.steps == 4
    found = end(again)
    assert max(float((found[name] - value).abs().max()) for name, value in weights.items()) == 0.0


@pytest.mark.slow
def test_what_the_monitor_has_stopped_stays_stopped(
    flags: list[str], scorers: None, tmp_path: Path
) -> None:
    """Asked to end at the step at which the budget is spent, and started again."""
    more = ["--kl_budget", "0.0001", "--resume_from_checkpoint", "auto"]
    with pytest.raises(RunEnded, match="at step 2 of 4"):
        run([*flags, *more], AskedToEnd())
    for _ in range(2):
        again = run([*flags, *more])
        assert again.steps == 2
        assert "the KL budget is spent" in again.reason


def end(result: Any) -> dict[str, torch.Tensor]:
    """The policy after the last step."""
    last = result.output_dir / "last"
    return load_file((last if last.is_dir() else result.output_dir) / "model.safetensors")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward_weights", "1", "2"], "2 reward_weights for 1 rewards"),
        (["--on_budget", "raise_beta"], "without a kl_budget"),
        (["--reward_truncated", "cut"], "reward_truncated is 'cut'"),
        (["--monitor_steps", "0"], "monitor_steps is 0"),
        (["--num_generations", "3"], "do not fit"),
    ],
)
def test_settings_that_do_not_fit(flags: list[str], more: list[str], message: str) -> None:
    with pytest.raises(CompanionError, match=message):
        parse([*flags, *more], "grpo")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--test_prompts", "60"], "68 prompts are to be held out, and there are 38"),
        (["--held_out_scorer", "tests_rl_gold:nothing"], "no such function"),
        (["--held_out_scorer", "tests_rl_gold:value"], "is a int, not a function"),
        (["--held_out_scorer", "http://127.0.0.1:9"], "which model does the server run"),
        (["--model_name_or_path", ""], "--model_name_or_path is missing"),
    ],
)
def test_mistakes_that_are_told(
    flags: list[str], scorers: None, more: list[str], message: str
) -> None:
    with pytest.raises(CompanionError, match=message):
        run([*flags, *more])


def test_no_held_out_prompt_is_trained_on(prompts: Path) -> None:
    data = PromptArguments(dataset_name=str(prompts), monitor_prompts=5, test_prompts=7)
    train, monitored, tested, notes = hold_out(data)
    parts = [set(map(prompt_key, part)) for part in (train, monitored, tested)]
    assert [len(parts[1]), len(parts[2]), len(monitored), len(tested)] == [5, 7, 5, 7]
    assert not parts[0] & (parts[1] | parts[2])
    assert not parts[1] & parts[2]
    assert notes == []
    # a file of their own, whose prompts stand in the training rows too
    data.eval_dataset_name = str(prompts)
    with pytest.raises(DataError, match="0 prompts to train on"):
        hold_out(data)
