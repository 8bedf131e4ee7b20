"""Where a policy's completions end, and what else of a row reaches the reward model in RL."""

from __future__ import annotations

import json
import logging
import pickle
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from companion import RewardFunction, RewardScorer, load_base, load_reward_model
from companion.errors import DataError, ModelError
from companion.models.ends import policy_end_ids, turn_end_ids
from companion.rl import joint_rewards

USER = [{"role": "user", "content": "how many pens"}]
TOOLS = [{"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}]
WORDS = list(map(str, range(20)))


@pytest.fixture(scope="module")
def scorer(tiny_reward: Path) -> RewardScorer:
    return RewardScorer(load_reward_model(tiny_reward))


def answers(n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    print("seed", seed)
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(n)]
    return [[{"role": "assistant", "content": text}] for text in texts]


# ---------------------------------------------------------------------- the row's own columns


def test_tools_and_template_arguments_of_the_rows_reach_the_template(tiny_base: Path) -> None:
    """As TRL hands them over: one entry a completion, a list, JSON text or nothing."""
    template = (
        "{%- if tools %}<|system|>tools {{ tools | length }}{{ tools | tojson }}<|end|>{% endif %}"
        "{%- if brief %}<|system|>less<|end|>{% endif %}"
        "{%- for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
        "{%- endfor %}{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    scorer = RewardScorer(load_base(tiny_base, chat_template=template))
    tools: list[Any] = [TOOLS, None, TOOLS, json.dumps(TOOLS)]
    kwargs: list[Any] = [None, {"brief": True}, {"brief": True}, {}]
    completions = answers(4)
    rows = [
        {"prompt": USER, "completion": c, "tools": t, "chat_template_kwargs": k}
        for c, t, k in zip(completions, tools, kwargs, strict=True)
    ]
    want = scorer.score(rows).raw
    bare = scorer.score([{key: row[key] for key in ("prompt", "completion")} for row in rows]).raw
    assert np.abs(want - bare).min() > 1e-4  # each of the four is another text without them
    function = scorer.as_reward_func()
    columns = {"tools": tools, "chat_template_kwargs": kwargs, "answer": [1, 2, 3, 4]}
    got = function([USER] * 4, completions, **columns, trainer_state=None)
    np.testing.assert_allclose(got, want, atol=1e-6)
    again = pickle.loads(pickle.dumps(function))([USER] * 4, completions, **columns)
    np.testing.assert_allclose(again, want, atol=1e-6)
    with pytest.raises(DataError, match="tools: not one entry for each of the 4 completions"):
        function([USER] * 4, completions, tools=TOOLS)
    with pytest.raises(DataError, match="chat_template_kwargs: not one entry"):
        function([USER] * 4, completions, chat_template_kwargs={"brief": True})


def test_a_row_with_a_bad_tool_column_has_no_reward_and_a_reason(scorer: RewardScorer) -> None:
    function = scorer.as_reward_func()
    got = function([USER] * 2, answers(2), tools=["{", None])
    assert [reward is None for reward in got] == [True, False]
    assert any("'tools' is no valid JSON" in reason for reason in function.counts)


def test_trl_hands_the_columns_over(tiny_base: Path, scorer: RewardScorer, tmp_path: Path) -> None:
    """GRPOTrainer, unmodified: rewards are the scores of rows with their tools."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    function, seen = RewardFunction(scorer), []

    def recorded(**arguments: Any) -> Any:
        seen.append((arguments, function(**arguments)))
        return seen[-1][1]

    rows = [{"prompt": USER, "tools": json.dumps(TOOLS)}, {"prompt": USER, "tools": None}]
    GRPOTrainer(
        model=str(tiny_base),
        reward_funcs=recorded,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=4, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    ).train()  # fmt: skip
    arguments, got = seen[0]
    eos = set(scorer.end_token_ids)
    given = [
        {
            "prompt": arguments["prompts"][i],
            "completion": arguments["completions"][i],
            "tools": arguments["tools"][i],
            "terminated": arguments["completion_ids"][i][-1] in eos,
        }
        for i in range(4)
    ]
    assert sorted(bool(row["tools"]) for row in given) == [False, False, True, True]
    np.testing.assert_allclose(
        np.array(got, dtype=float), scorer.score(given, on_error="skip").raw, atol=1e-6
    )


# ---------------------------------------------------------------------- tokens that end a turn

FAMILIES = {
    "ChatML": ("<|im_end|>", "<|im_start|>{role}\n{content}<|im_end|>\n"),
    "Llama 3": ("<|eot_id|>", "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"),
    "Gemma": ("<end_of_turn>", "<start_of_turn>{role}\n{content}<end_of_turn>\n"),
    "Phi": ("<|end|>", "<|{role}|>\n{content}<|end|>\n"),
    "Mistral": ("</s>", "[INST]{content}</s>"),
    "Zephyr": ("</s>", "<|{role}|>\n{content}</s>\n"),
    "Command": ("<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"),
    "Granite": ("<|end_of_text|>", "<|start_of_role|>{role}{content}<|end_of_text|>"),
    "GPT-OSS": ("<|return|>", "<|start|>{role}<|message|>{content}<|return|>"),
    "no end": (None, "{role}: {content}\n\n"),
}  # fmt: skip


def _template(turn: str) -> str:
    for name in ("role", "content"):
        turn = turn.replace("{" + name + "}", "{{ m." + name + " }}")
    return "{%- for m in messages %}" + turn + "{%- endfor %}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_read_off_the_template(family: str, make_tokenizer: Any) -> None:
    end, turn = FAMILIES[family]
    tokenizer = make_tokenizer(chat_template=_template(turn))
    marks = ["<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|message|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    if end is not None:
        tokenizer.add_tokens([end])  # added, and not marked as special: many are not
    want = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    assert turn_end_ids(tokenizer) == want
    assert policy_end_ids(tokenizer) == sorted({tokenizer.eos_token_id, *want})


def test_templates_that_refuse_or_want_blocks(make_tokenizer: Any) -> None:
    blocks = (
        "{% for m in messages %}{% for b in m.content %}{{ b.text }}{% endfor %}<|end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=blocks)
    assert turn_end_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|end|>")]
    for bad in ("{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[0].content }}"):
        assert turn_end_ids(tokenizer, bad) == []
    assert turn_end_ids(make_tokenizer(chat_template=None)) == []


def test_a_policys_folder_knows_its_ends(
    make_tokenizer: Any, make_causal: Any, tmp_path: Path
) -> None:
    """Llama 3 names several in its generation config, or in the configuration alone."""
    turn = FAMILIES["Phi"][1]  # <|end|> is 3, the EOS 2
    folder = make_causal("llama", make_tokenizer(chat_template=_template(turn)), tmp_path)
    assert policy_end_ids(folder) == [2, 3]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert policy_end_ids(str(folder)) == [2, 3, 4, 5]
    path.unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 6]}))
    assert policy_end_ids(folder) == [2, 3, 6]
    with pytest.raises(ModelError, match="no such folder"):
        policy_end_ids(tmp_path / "elsewhere")


def test_the_reward_function_asks_the_policy_or_its_own_family(
    make_tokenizer: Any, make_causal: Any, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=_template(FAMILIES["Phi"][1]))
    base = make_causal("llama", tokenizer, tmp_path / "base", eos_token_id=[2, 6])
    scorer = RewardScorer(load_base(base))
    assert scorer.end_token_ids == [2, 3, 6]
    assert RewardFunction(scorer).eos_token_ids == {2, 3, 6}
    assert RewardFunction(scorer, policy=make_tokenizer()).eos_token_ids == {2}
    assert scorer.as_reward_func(policy=base).eos_token_ids == {2, 3, 6}
    with pytest.raises(DataError, match="policy is a Linear"):
        scorer.as_reward_func(policy=torch.nn.Linear(1, 1))
    with pytest.raises(DataError, match="both given"):
        scorer.as_reward_func(policy=base, eos_token_ids=[3])


# ---------------------------------------------------------------------- ends that nobody named

END = 9001  # of another tokenizer, and beyond ours


def ids_of(lengths: list[int], seed: int, *, limit: int = 8) -> list[list[int]]:
    """Ids of another tokenizer: an end below the limit, none at it."""
    draw = random.Random(seed)
    return [
        [draw.randrange(5000, 9000) for _ in range(min(n, limit))] + [END] * (n < limit)
        for n in lengths
    ]


@pytest.mark.parametrize("seed", range(5))
def test_an_end_that_nobody_named_is_seen_and_said_once(
    seed: int, scorer: RewardScorer, caplog: pytest.LogCaptureFixture
) -> None:
    """Some are cut off at the limit: exactly those count as cut off, then and from then on."""
    completions, function = answers(8, seed), scorer.as_reward_func()
    for call, lengths in enumerate([[3, 8, 5, 4, 8, 6, 7, 5], [8, 8, 8, 2, 8, 8, 8, 8]]):
        ids = ids_of(lengths, seed + call)
        got = function([USER] * 8, completions, completion_ids=ids)
        rows = [
            {"prompt": USER, "completion": c, "terminated": n < 8}
            for c, n in zip(completions, lengths, strict=True)
        ]
        np.testing.assert_allclose(got, scorer.score(rows).raw, atol=1e-6)
    assert function.counts["truncated"] == 2 + 7
    assert function.counts["assumed_end"] == 6 + 1
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert f"token {END}" in said[0]
    assert "eos_token_ids=" in said[0]


def test_all_that_end_alike_are_finished(scorer: RewardScorer) -> None:
    """Equally long, even equal: of another tokenizer, so nothing says otherwise."""
    function = scorer.as_reward_func()
    completion = [{"role": "assistant", "content": "Ana has 3 pens"}]
    got = function([USER] * 4, [completion] * 4, completion_ids=[[5000, 5001, END]] * 4)
    want = scorer.score([{"prompt": USER, "completion": completion}]).raw[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert function.counts["truncated"] == 0


def test_what_is_no_end(scorer: RewardScorer) -> None:
    """A policy that has collapsed, a limit, too few of them: cut off, as before."""
    encode = scorer.tokenizer.convert_tokens_to_ids
    text = "Ana has 3 pens"
    equal = [[{"role": "assistant", "content": text}]] * 6
    cases = {
        "one token again and again": (equal, [[7] * n for n in (3, 4, 5, 6, 7, 8)]),
        "one token each": (equal, [[7]] * 6),
        "equal texts that our tokenizer reads": (equal, [encode(text.split())] * 6),
        "three alone": (equal[:3], [[5000, END]] * 3),
        "some of many, equally long": (equal, [[5000, 5001, END]] * 4 + [[5000, 5001, 5002]] * 2),
        "a token that stands elsewhere too": (equal, [[5000, 5001, END]] * 5 + [[END, 5002, 5003]]),
        "nothing written": (equal, [[]] * 6),
    }
    for name, (completions, ids) in cases.items():
        function = scorer.as_reward_func()
        function([USER] * len(ids), completions, completion_ids=ids)
        assert function.counts["truncated"] == len(ids), name
        assert function.counts["assumed_end"] == 0, name
    told = scorer.as_reward_func(eos_token_ids=[2])  # whoever says it knows better
    told([USER] * 4, equal[:4], completion_ids=[[5000, 5001, END]] * 4)
    assert told.counts["truncated"] == 4


def test_when_none_seems_to_end_the_cure_is_said_once(
    scorer: RewardScorer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    function = scorer.as_reward_func()
    for _ in range(5):  # two a call: too few for a conclusion
        function([USER] * 2, answers(2), completion_ids=[[5000, END], [5001, 5002, END]])
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "4 completions in a row seem cut off" in said[0]
    assert f"most end with {END}" in said[0]
    assert "policy=" in said[0]
    finished = scorer.as_reward_func(eos_token_ids=[END])
    finished([USER] * 4, answers(4), completion_ids=[[5000, END]] + [[5001, 5002]] * 3)
    assert len(caplog.records) == 1  # one that ends is enough


# ---------------------------------------------------------------------- many threads


class Stub:
    """A scorer without a model: the first word of a completion is its score."""

    reference = None
    end_token_ids = (2,)
    tokenizer = None

    def score(self, rows: Any, *, on_error: str) -> Any:
        raw = np.array([float(row["completion"].split()[0]) for row in rows])
        reasons = [None if value >= 0 else "negative" for value in raw]
        return SimpleNamespace(raw=raw, reasons=reasons)


class Slow(Counter[str]):
    """Other threads come in between reading a count and writing it."""

    def get(self, key: str, default: Any = None) -> Any:
        value = super().get(key, default)
        time.sleep(1e-5)
        return value

    def __getitem__(self, key: str) -> int:
        return int(self.get(key, 0))


def test_counts_hold_when_many_threads_call() -> None:
    function = RewardFunction(Stub())  # type: ignore[arg-type]
    function.counts = Slow()
    barrier = threading.Barrier(8)

    def run(worker: int) -> None:
        barrier.wait()
        for _ in range(20):
            function(["a"] * 3, ["1 a", "2 a", "-1 a"], completion_ids=[[3], [5, 2], [2]])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    calls = 8 * 20
    assert dict(function.counts) == {"scored": 2 * calls, "negative": calls, "truncated": calls}


def test_joint_rewards_of_one_thread_are_not_those_of_another() -> None:
    """The other thread's functions end while those of this one's second batch are not yet asked."""
    other_runs, this_is_done = threading.Event(), threading.Event()

    def number(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        if completions == ["1"]:
            other_runs.set()
            this_is_done.wait(0.1)
        return [float(text) for text in completions]

    first, second = joint_rewards([number, number])
    other = threading.Thread(target=first, args=(["a"], ["1"]))
    other.start()
    other_runs.wait()
    prompts, completions = ["a"], ["2"]
    assert first(prompts, completions) == [2.0]
    this_is_done.set()
    other.join()
    assert second(prompts, completions) == [2.0]
    again = pickle.loads(pickle.dumps(joint_rewards([max, min])))  # without the lock
    assert again[0]._rewards is again[1]._rewards
