"""``torchrun -m companion train grpo`` on two processes: looks, files and the end of the run."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import launch

from companion import Policy, RewardScorer, load_reward_model
from companion.cli.main import main
from companion.rl import Look, PromptArguments, Viewer, open_reward, weighted_sum
from companion.rl.run import hold_out

pytestmark = pytest.mark.distributed

SCORER = '''
import os
from pathlib import Path

def words(prompts, completions, **columns):
    """Fewer words are better; each rank writes down how many completions it was asked about."""
    with Path(__file__).with_name(f"asked_{os.environ.get('RANK', 'alone')}").open("a") as file:
        file.write(f"{len(prompts)}\\n")
    return [-float(len(c[-1]["content"].split())) for c in completions]
'''


#: the command, and then: which threads live on? (pytorch #190489)
COMMAND = """
import os
import sys
from pathlib import Path

from companion.cli.train import run_argv

code = run_argv(sys.argv[1:])
names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
left = [name for name in names if "gloo_runloop" in name]
Path(__file__).with_name(f"threads_{os.environ['RANK']}").write_text(str(len(left)))
sys.exit(code)
"""


def _module(place: str) -> Any:
    """Another test file of this folder or beside it."""
    spec = importlib.util.spec_from_file_location(
        Path(place).stem, Path(__file__).parent.joinpath(place)
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_processes_look_alike_write_once_and_stop_together(
    tmp_path: Path,
    tiny_base: Path,
    tiny_reward: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
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
        arguments = [
            *("train", "grpo"),
            *("--model_name_or_path", str(tiny_base), "--reward_model", str(tiny_reward)),
            *("--held_out_scorer", "scorer_of_the_test:words"),
            *("--dataset_name", str(tmp_path / "prompts.jsonl"), "--output_dir", str(output)),
            *("--monitor_prompts", "9", "--test_prompts", "9", "--monitor_completions", "2"),
            *("--per_device_train_batch_size", str(8 // ranks), "--num_generations", "4"),
            *("--max_completion_length", "8", "--learning_rate", "0.01", "--max_steps", "3"),
            *("--monitor_steps", "1", "--kl_budget", "0.0001", "--save_strategy", "no"),
            *("--disable_tqdm", "true", "--report_to", "none"),
        ]
        if ranks == 1:
            monkeypatch.syspath_prepend(tmp_path)
            assert main(arguments) == 0
            text = "".join(capsys.readouterr())
        else:
            path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
            text = launch(["-m", "companion", *arguments], forked=True, PYTHONPATH=path)
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


def test_two_processes_with_a_server_a_second_reward_and_completions_that_are_cut_off(
    tmp_path: Path, tiny_base: Path, tiny_reward: Path
) -> None:
    """Rewards over HTTP and of a function, weighed, with a penalty: as one process has them."""
    rows = [
        {"prompt": [{"role": "user", "content": f"how many pens has {'and ' * (i // 20)}{i % 20}"}]}
        for i in range(38)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "scorer_of_the_test.py").write_text(SCORER)
    (tmp_path / "command.py").write_text(COMMAND)
    scorer = RewardScorer(load_reward_model(tiny_reward))
    service = _module("../scoring/conftest.py").Service(scorer)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        launch(
            [
                *(str(tmp_path / "command.py"), "grpo", "--model_name_or_path", str(tiny_base)),
                *("--reward_model", f"{service.url}#{tiny_reward}", "scorer_of_the_test:words"),
                *("--reward_weights", "1.0", "0.5", "--reward_truncated", "-1"),
                *("--dataset_name", str(tmp_path / "prompts.jsonl")),
                *("--output_dir", str(tmp_path / "out"), "--save_strategy", "no"),
                *("--monitor_prompts", "9", "--test_prompts", "9", "--monitor_completions", "2"),
                *("--per_device_train_batch_size", "4", "--num_generations", "4"),
                *("--max_completion_length", "48", "--max_steps", "2", "--monitor_steps", "2"),
                *("--logging_steps", "1", "--disable_tqdm", "true", "--report_to", "none"),
            ],
            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)]),
        )
    finally:
        service.shutdown()
        service.server_close()
    left = [(tmp_path / f"threads_{rank}").read_text() for rank in (0, 1)]
    assert left == ["0", "0"], "one of gloo's threads could abort the process at its end"
    assert service.bodies, "the server was asked"
    assert all((tmp_path / f"asked_{rank}").read_text() for rank in (0, 1))
    recorded = Look.from_dict(json.loads((tmp_path / "out" / "monitor.jsonl").open().readline()))
    assert 0 < recorded.truncated < 1
    policy = Policy.from_pretrained(tiny_base, device="cpu")
    here = open_reward(str(tiny_reward), truncated=-1.0, eos_token_ids=policy.eos_token_ids)
    proxy = weighted_sum([here, words], [1.0, 0.5])
    data = PromptArguments(
        dataset_name=str(tmp_path / "prompts.jsonl"), monitor_prompts=9, test_prompts=9
    )
    viewer = Viewer(
        hold_out(data)[1], {"proxy": proxy}, completions=2, max_completion_length=48, seed=42
    )
    assert_equal(recorded, viewer.look(policy, policy, 0))


def words(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [-float(len(c[-1]["content"].split())) for c in completions]


def assert_equal(look: Look, other: Look) -> None:
    assert look.figures.keys() == other.figures.keys()
    for name, values in other.figures.items():
        np.testing.assert_allclose(look.figures[name], values, atol=1e-4, err_msg=name)
    assert (look.length, look.truncated) == pytest.approx((other.length, other.truncated))
