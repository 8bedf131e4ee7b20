"""``companion train grpo``: what the policy sees, what ends its turns, and what is said of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_stub import WRITER, online, running_hub
from huggingface_hub import ModelCard

from companion import Policy, train_grpo
from companion.cli.train import parse
from companion.generation import policy as sampling

#: assistants end with <|end|> (3), which is not the EOS (2); `brief` is an argument
TEMPLATE = (
    "{%- if brief %}<|system|>less<|end|>{% endif %}"
    "{%- for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}<|end|>{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_differences_are_said_and_held_out_prompts_are_written_as_in_training(
    make_tokenizer: Any, make_causal: Any, tiny_reward: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    base = make_causal("qwen3", make_tokenizer(chat_template=TEMPLATE), tmp_path / "base")
    tools = [{"type": "function", "function": {"name": "count"}}]
    rows = [
        {"prompt": [{"role": "user", "content": f"how many pens {i}"}], "tools": json.dumps(tools)}
        for i in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_rewards.py").write_text(
        "seen = []\n"
        "def tools(prompts, completions, tools, **columns):\n"
        "    seen.extend(tools)\n"
        "    return [float(len(c[-1]['content'])) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    written: list[tuple[Any, list[list[int]]]] = []
    encode = sampling.encode_prompts

    def recorded(formatter: Any, prompts: Any, **settings: Any) -> list[list[int]]:
        written.append((settings, encode(formatter, prompts, **settings)))
        return written[-1][1]

    monkeypatch.setattr(sampling, "encode_prompts", recorded)
    flags = [
        *("--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--reward_model", str(tiny_reward), "own_rewards:tools"),
        *("--output_dir", str(tmp_path / "out"), "--chat_template_kwargs", '{"brief": true}'),
        *("--monitor_prompts", "2", "--test_prompts", "2", "--monitor_completions", "2"),
        *("--per_device_train_batch_size", "4", "--num_generations", "2", "--max_steps", "1"),
        *("--max_completion_length", "4", "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", "true"),
    ]
    data, model, config = parse(flags, "grpo")
    lines: list[str] = []
    result = train_grpo(config, model, data, say=lines.append)
    for note in (
        "the reward model reads the columns tools, but TRL writes the policy's prompts without",
        "the policy's chat template ends a turn with '<|end|>' (3), at which no completion stops",
    ):
        assert any(note in text for text in result.notes), note
        assert any(note in line for line in lines), note
    proxy: Any = result.monitor.viewer.scorers["proxy"]
    assert proxy.functions[0].eos_token_ids == {2, 3}, "the policy's, not the reward model's"
    import own_rewards

    assert own_rewards.seen
    assert all(own_rewards.seen), "the held-out ones too"
    less = make_tokenizer().convert_tokens_to_ids(["<|system|>", "less", "<|end|>"])
    assert written
    assert all(ids[:3] == less for _, prompts in written for ids in prompts)
    plain = Policy.from_pretrained(base, device="cpu").sample(
        [rows[0]["prompt"]], 1, max_new_tokens=2
    )
    assert plain
    assert written[-1][0]["chat_template_kwargs"] is None


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_policy_goes_to_the_hub_with_a_card(
    lora: bool, tiny_base: Path, tiny_reward: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Not the one at each look, which TRL would upload, nor the one at the end."""
    rows = [{"prompt": [{"role": "user", "content": f"how many {i}"}]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "falling_reward.py").write_text(
        "calls = []\n"
        "def falls(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    return [-float(len(calls))] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = [
        *("--model_name_or_path", str(tiny_base), "--dataset_name", str(tmp_path / "rows.jsonl")),
        *("--reward_model", str(tiny_reward), "--held_out_scorer", "falling_reward:falls"),
        *("--output_dir", str(tmp_path / "my-policy"), "--push_to_hub", "--hub_token", WRITER),
        *("--monitor_prompts", "8", "--test_prompts", "2", "--monitor_completions", "1"),
        *("--per_device_train_batch_size", "4", "--num_generations", "2", "--max_steps", "2"),
        *("--max_completion_length", "4", "--save_steps", "1", "--report_to", "none"),
        *("--disable_tqdm", "true", *(["--use_peft"] if lora else [])),
    ]
    lines: list[str] = []
    with running_hub() as hub, online(hub, monkeypatch):
        data, model, config = parse(flags, "grpo")
        result = train_grpo(config, model, data, say=lines.append)
    assert f"uploaded to {hub.url}/me/my-policy" in lines
    files = hub.files("me/my-policy")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert {weights, "grpo_result.json", "monitor.jsonl", "README.md", "tokenizer.json"} <= set(
        files
    )
    assert not any(name.startswith(("last", "checkpoint")) for name in files)
    assert (result.output_dir / "last").is_dir()
    assert files[weights] == (result.output_dir / weights).read_bytes()
    assert sum("/commit/" in asked for asked in hub.asked) == 1
    card = ModelCard(files["README.md"].decode())
    assert card.data.pipeline_tag == "text-generation"
    assert "gain of gold" in card.text
    assert f"`{tiny_reward.name}`" in card.text
    assert str(tmp_path) not in card.content
    for path in [*result.output_dir.rglob("README.md")]:
        assert "None" not in path.read_text(), path
