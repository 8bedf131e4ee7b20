"""``torchrun -m companion train grpo`` on two processes: looks, files and the end of the run."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.rl import Look, PromptArguments, Viewer, open_reward
from companion.rl.run import hold_out
from companion.search.sampling import Policy

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("torchrun")]

SCORER = '''
import os
from pathlib import Path

def words(prompts, completions, **columns):
    """Fewer words are better; each rank writes down how many completions it was asked about."""
    with Path(__file__).with_name(f"asked_{os.environ.get('RANK', 'alone')}").open("a") as file:
        file.write(f"{len(prompts)}\\n")
    return [-float(len(c[-1]["content"].split())) for c in completions]
'''


def _launcher() -> Any:
    spec = importlib.util.spec_from_file_location(
        "launcher", Path(__file__).with_name("test_exact_gradient.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_look_alike_write_once_and_stop_together(
    tmp_path: Path, tiny_base: Path, tiny_reward: Path
) -> None:
    """An odd number of held-out prompts: the ranks' shares differ."""
    rows = [
        {"prompt": [{"role": "user", "content": f"how many pens has {'and ' * (i // 20)}{i % 20}"}]}
        for i in range(38)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "scorer_of_the_test.py").write_text(SCORER)
    looks, results = [], []
    for ranks in (1, 2):
        output = tmp_path / f"on{ranks}"
        text = _launcher().launch(
            [
                *("-m", "companion", "train", "grpo"),
                *("--model_name_or_path", str(tiny_base), "--reward_model", str(tiny_reward)),
                *("--held_out_scorer", "scorer_of_the_test:words"),
                *("--dataset_name", str(tmp_path / "prompts.jsonl"), "--output_dir", str(output)),
                *("--monitor_prompts", "9", "--test_prompts", "9", "--monitor_completions", "2"),
                *("--per_device_train_batch_size", str(8 // ranks), "--num_generations", "4"),
                *("--max_completion_length", "8", "--learning_rate", "0.01", "--max_steps", "3"),
                *("--monitor_steps", "1", "--kl_budget", "0.0001", "--save_strategy", "no"),
                *("--disable_tqdm", "true", "--report_to", "none"),
            ],
            ranks=ranks,
            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)]),
        )
        assert text.count("saved in") == 1  # rank 0 alone speaks
        assert text.count("stopped at step 1: the KL budget is spent") == 2  # then, in the table
        looks.append([json.loads(line) for line in (output / "monitor.jsonl").open()])
        results.append(json.loads((output / "grpo_result.json").read_text()))
    one, two = looks
    assert [look["step"] for look in one] == [look["step"] for look in two] == [0, 1]
    # before the first step the policies are one; from then on each rank trains on dice of its own
    assert_equal(Look.from_dict(two[0]), Look.from_dict(one[0]))
    start, other = (result["figures"]["start"] for result in results)
    for name in ("kl", "proxy", "gold"):
        assert other[name]["mean"] == pytest.approx(start[name]["mean"], abs=1e-4)
    # what two ranks saw of the policy that they saved is what one sees of it
    proxy = open_reward(str(tiny_reward))
    data = PromptArguments(
        dataset_name=str(tmp_path / "prompts.jsonl"), monitor_prompts=9, test_prompts=9
    )
    viewer = Viewer(
        hold_out(data)[1], {"proxy": proxy}, completions=2, max_completion_length=8, seed=42
    )
    best = tmp_path / "on2" if results[1]["best_step"] == 1 else tmp_path / "on2" / "last"
    policies = [Policy.from_pretrained(place, device="cpu") for place in (best, tiny_base)]
    seen, recorded = viewer.look(policies[0], policies[1], 1), Look.from_dict(two[1])
    recorded.figures.pop("gold")
    assert_equal(recorded, seen)
    assert recorded.mean("kl") > 0.01
    # both ranks took part in all looks, and stopped after the same one
    asked = [(tmp_path / f"asked_{rank}").read_text().split() for rank in (0, 1)]
    assert len(asked[0]) == len(asked[1])
    assert (set(asked[0]), set(asked[1])) == ({"10"}, {"8"})


def assert_equal(look: Look, other: Look) -> None:
    assert look.figures.keys() == other.figures.keys()
    for name, values in other.figures.items():
        np.testing.assert_allclose(look.figures[name], values, atol=1e-4, err_msg=name)
    assert (look.length, look.truncated) == pytest.approx((other.length, other.truncated))
