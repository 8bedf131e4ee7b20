"""``reward_dtype``: what reward models and scorers are loaded in, said, and part of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from companion import open_reward, train_grpo
from companion.cli.main import main
from companion.cli.train import parse
from companion.errors import CompanionError
from companion.rl import GRPORunConfig, config as config_module
from companion.rl.run import _dtype_note, _scorers


def config_of(folder: Path, **settings: Any) -> GRPORunConfig:
    return GRPORunConfig(str(folder), use_cpu=True, report_to=[], **settings)


def dtype_of(reward: Any) -> torch.dtype:
    return reward.scorer.reward_model.model.dtype  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_it_reaches_the_weights_of_all_that_score(
    dtype: str,
    has_bf16: bool,
    tmp_path: Path,
    tiny_reward: Path,
    tiny_rewards: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_module, "has_bf16", lambda: has_bf16)
    config = config_of(
        tmp_path,
        reward_model=[str(tiny_reward), str(tiny_rewards("llama"))],
        held_out_scorer=str(tiny_rewards("llama")),
        also_measure=[str(tiny_reward)],
        reward_dtype=dtype,
    )
    expected = ("bfloat16" if has_bf16 else "float32") if dtype == "auto" else dtype
    assert config.scorer_dtype == expected
    _, proxy, gold, further = _scorers(config, [2])
    scorers = [*proxy.functions, gold, *further.values()]  # type: ignore[attr-defined]
    assert len(scorers) == 4
    assert [dtype_of(scorer) for scorer in scorers] == [getattr(torch, expected)] * 4
    said = _dtype_note(config)
    assert (said is None) if expected == "float32" else (said is not None and expected in said)
    given = scorers[0](prompts=["how many pens"], completions=["Ana has 3 pens"])
    assert isinstance(given[0], float)


def test_auto_on_this_machine_and_the_default(tmp_path: Path, tiny_reward: Path) -> None:
    config = config_of(tmp_path, reward_model=[str(tiny_reward)])
    assert config.reward_dtype == "auto"
    if not torch.cuda.is_available():
        assert config.scorer_dtype == "float32"
        assert dtype_of(open_reward(str(tiny_reward))) == torch.float32
    assert dtype_of(open_reward(str(tiny_reward), dtype=torch.bfloat16)) == torch.bfloat16


def test_a_server_and_a_function_are_not_concerned(
    tmp_path: Path, tiny_reward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = ["json:dumps", f"http://localhost:1#{tiny_reward}"]
    config = config_of(tmp_path, reward_model=elsewhere, reward_dtype="bfloat16")
    assert _dtype_note(config) is None
    config = config_of(
        tmp_path, reward_model=elsewhere, held_out_scorer=str(tiny_reward), reward_dtype="bfloat16"
    )
    assert "bfloat16" in str(_dtype_note(config))
    assert open_reward("json:dumps", dtype="bfloat16") is json.dumps
    with pytest.raises(SystemExit):
        main(["train", "grpo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--reward_dtype {auto,float32,bfloat16,float16}" in text
    assert "says nothing to a server" in text


def test_a_run_says_it_and_goes_on_with_what_it_began_with(
    tmp_path: Path, tiny_base: Path, tiny_reward: Path
) -> None:
    rows = [{"prompt": f"how many pens has {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []

    def run(*more: str) -> None:
        flags = [
            *("--model_name_or_path", str(tiny_base), "--reward_model", str(tiny_reward)),
            *("--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "o")),
            *("--monitor_prompts", "2", "--test_prompts", "2", "--monitor_completions", "1"),
            *("--per_device_train_batch_size", "2", "--num_generations", "2", "--max_steps", "2"),
            *("--max_completion_length", "4", "--save_steps", "1", "--disable_tqdm", "true"),
            *("--report_to", "none", "--use_cpu", "true", *more),
        ]
        data, model, config = parse(flags, "grpo")
        said.clear()
        train_grpo(config, model, data, say=said.append)

    def record() -> dict[str, Any]:
        file = tmp_path / "o" / "checkpoint-1" / "companion_run.json"
        return json.loads(file.read_text())["run"]  # type: ignore[no-any-return]

    again = "--resume_from_checkpoint", str(tmp_path / "o" / "checkpoint-1")
    run()
    assert not any("reward models and scorers" in line for line in said)
    assert "reward_dtype" not in record()  # as in checkpoints from before, which go on
    run(*again)
    with pytest.raises(CompanionError, match="reward_dtype: nothing -> bfloat16"):
        run("--reward_dtype", "bfloat16", *again)
    run("--reward_dtype", "bfloat16")
    assert sum("loaded in bfloat16" in line for line in said) == 1
    assert record()["reward_dtype"] == "bfloat16"
    result = json.loads((tmp_path / "o" / "grpo_result.json").read_text())
    assert any("loaded in bfloat16" in note for note in result["notes"])
    run("--reward_dtype", "bfloat16", *again)
    with pytest.raises(CompanionError, match="reward_dtype: bfloat16 -> nothing"):
        run(*again)
