"""The reward manager for verl, without verl and without a server: what it sends, bears and refuses.

``make test-engines`` runs it in verl itself, against a running server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from companion.errors import DataError, ServiceError
from companion.rl import RewardManager

USER = {"role": "user", "content": "how many pens"}
FOUND = {
    "index": 0,
    "raw": 1.5,
    "z": -0.5,
    "n_tokens": 7,
    "cut_tokens": 0,
    "warnings": [],
    "reason": None,
}
#: What may be answered: a status and a body.
Answer = tuple[int | None, Any]


class Settings(dict):
    """As much of OmegaConf's DictConfig as verl's managers use."""

    __getattr__ = dict.__getitem__


class Item(SimpleNamespace):
    """As much of a DataProto of one item as verl's managers use."""

    def __getitem__(self, index: Any) -> Item:
        return self


def rollout(ids: list[int], *, padding: int = 3, prompt: int = 4, **more: Any) -> Item:
    mask = [1] * (prompt + len(ids)) + [0] * padding
    return Item(
        batch={
            "responses": torch.tensor(ids + [0] * padding),
            "attention_mask": torch.tensor(mask),
        },
        non_tensor_batch={"raw_prompt": np.array([USER], dtype=object), **more},
    )


def answered(**changes: Any) -> Answer:
    return 200, {"model_version": "v1", "rewards": [{**FOUND, **changes}]}


def refused(status: int, **error: Any) -> Answer:
    return status, {"error": {"code": status, "message": "said", "cure": "do so", **error}}


@pytest.fixture
def manager(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``manager(answers, **settings)``: one that is answered from a list, and does not sleep."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("companion.rl.verl.asyncio.sleep", sleep)
    monkeypatch.delenv("COMPANION_REWARD_URL", raising=False)

    def make(answers: list[Answer] = (), **settings: Any) -> Any:  # type: ignore[assignment]
        model = Settings(path=str(tmp_path / "nowhere"))
        config = Settings(
            reward=Settings(reward_kwargs={"url": "http://one:1", **settings}),
            actor_rollout_ref=Settings(model=model),
        )
        made = RewardManager(config=config, tokenizer=tiny_tokenizer, compute_score=None)
        made.asked, made.slept, left = [], slept, list(answers)

        async def ask(where: str, body: Any) -> tuple[int | None, Any, float]:
            made.asked.append((where, json.loads(json.dumps(body))))
            status, answer = left.pop(0) if len(left) > 1 else left[0]
            return status, answer, 0.0

        made._ask = ask
        return made

    return make


def reward(manager: Any, item: Item) -> Any:
    return asyncio.run(manager.run_single(item))


def test_it_sends_messages_response_and_whether_that_ended(
    manager: Any, tiny_tokenizer: Any
) -> None:
    eos, end = tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("<|end|>")
    words = tiny_tokenizer("Ana has 3", add_special_tokens=False)["input_ids"]
    for ids, terminated in ((([*words, eos]), True), (words, False), ([*words, end], False)):
        made = manager([answered()], **{"return": "z"})
        got = reward(made, rollout(ids))
        ((where, body),) = made.asked
        assert where == "http://one:1/v1/rewards"
        assert body == {
            "items": [
                {
                    "prompt": [USER],
                    "completion": [{"role": "assistant", "content": "Ana has 3"}],
                    "terminated": terminated,
                    "drawn": True,
                }
            ],
            "return": ["raw", "z"],
        }
        assert got["reward_score"] == -0.5
        assert got["reward_extra_info"] == {
            "raw": 1.5,
            "n_tokens": 7,
            "cut_tokens": 0,
            "terminated": float(terminated),
            "unscored": 0.0,
        }
        assert made.counts == {"rewards": 1, **({} if terminated else {"cut_off": 1})}
    # the policy's own end, where somebody says it
    made = manager([answered()], eos_token_ids=[end], model_version="v1")
    reward(made, rollout([*words, end]))
    assert made.asked[0][1]["items"][0]["terminated"] is True
    assert made.asked[0][1]["model_version"] == "v1"


def test_the_length_of_one_of_several_outputs_is_its_own(manager: Any, tiny_tokenizer: Any) -> None:
    """There the mask is padded behind both parts, and its last entries are another's."""
    words = tiny_tokenizer("Ana has", add_special_tokens=False)["input_ids"]
    item = rollout([*words, tiny_tokenizer.eos_token_id], padding=5, response_len=np.int64(3))
    item.batch["attention_mask"] = torch.tensor([1] * 8 + [0] * 2)
    made = manager([answered()])
    assert reward(made, item)["reward_extra_info"]["terminated"] == 1.0
    assert made.asked[0][1]["items"][0]["completion"][0]["content"] == "Ana has"
    with pytest.raises(DataError, match="4 turns"):
        reward(made, rollout(words, __num_turns__=np.int32(4)))


@pytest.mark.parametrize("status", [None, 429, 500, 502, 503, 504])
def test_it_waits_for_a_server_that_is_busy_or_away(manager: Any, status: int | None) -> None:
    made = manager([(status, "away")] * 9 + [answered()], url=["http://one:1", "http://two:2/"])
    assert reward(made, rollout([20, 21]))["reward_score"] == 1.5
    assert made.counts["retries"] == 9 == len(made.slept)
    hosts = [where.split("/")[2] for where, _ in made.asked]
    assert set(hosts) == {"one:1", "two:2"}
    assert all(a != b for a, b in itertools.pairwise(hosts))
    assert 8 < sum(made.slept) < 9 * 30
    # but not for ever
    made = manager([(status, "away")], patience=0.0)
    with pytest.raises(ServiceError, match="no reward after 1 tries"):
        reward(made, rollout([20, 21]))


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422])
def test_a_refusal_is_an_error_with_the_servers_cure(manager: Any, status: int) -> None:
    made = manager([refused(status)], unscored=0.0)
    with pytest.raises(ServiceError, match=rf"{status}: said\n  Cure: do so"):
        reward(made, rollout([20, 21]))
    assert len(made.asked) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (refused(400, index=0), "said"),
        (answered(raw=None, reason="not finite"), "not finite"),
        (answered(raw=math.inf), "the score is not finite"),
    ],
)
def test_no_score_is_an_error_or_the_reward_that_was_chosen(
    manager: Any, answer: Answer, why: str
) -> None:
    with pytest.raises(ServiceError, match=why) as caught:
        reward(manager([answer]), rollout([20, 21]))
    assert "unscored=NUMBER" in str(caught.value)
    made = manager([answer], unscored=-2)
    got = reward(made, rollout([20, 21]))
    assert got["reward_score"] == -2.0
    assert got["reward_extra_info"]["unscored"] == 1.0
    assert made.counts["unscored"] == 1
    # verl makes one array of each name: all answers have the same
    usual = reward(manager([answered()]), rollout([20, 21]))
    assert list(got["reward_extra_info"]) == list(usual["reward_extra_info"])


@pytest.mark.parametrize(
    "answer",
    [(200, {"scores": [1.0]}), (200, "<html>"), (200, {"model_version": "v1", "rewards": []})],
)
def test_an_answer_of_another_kind_is_an_error(manager: Any, answer: Answer) -> None:
    with pytest.raises(ServiceError, match="does not fit /v1/rewards"):
        reward(manager([answer], unscored=0.0), rollout([20, 21]))


def test_another_version_in_the_middle_of_a_run_is_said(manager: Any, caplog: Any) -> None:
    other = (200, {**answered()[1], "model_version": "v2"})
    made = manager([answered(), other])
    for _ in range(3):
        reward(made, rollout([20, 21]))
    said = [record.message for record in caplog.records if "version v2" in record.message]
    assert len(said) == 1
    assert made.counts["versions"] == 1


def test_responses_that_never_end_are_said(manager: Any, caplog: Any) -> None:
    made = manager([answered()])
    for _ in range(100):
        reward(made, rollout([20, 21]))
    assert sum("eos_token_ids" in record.message for record in caplog.records) == 1


def test_settings_that_cannot_be_are_named(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in (
        ({"url": None}, "COMPANION_REWARD_URL"),
        ({"url": "one:1"}, "http://host:8000"),
        ({"return": "logit"}, "return is 'logit'"),
        ({"retries": 3}, "retries: no such setting"),
        ({"timeout": "long"}, "timeout is 'long'"),
        ({"unscored": "nan"}, "unscored is 'nan'"),
        ({"eos_token_ids": []}, "all would count as cut off"),
    ):
        with pytest.raises(DataError, match=message):
            manager(**settings)
    monkeypatch.setenv("COMPANION_REWARD_URL", "http://a:1, http://b:2/")
    assert manager(url=None).urls == ["http://a:1", "http://b:2"]


def test_ends_are_those_of_the_policys_folder_too(
    manager: Any, tiny_base: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    assert manager().eos_token_ids == {tiny_tokenizer.eos_token_id}
    folder = shutil.copytree(tiny_base, tmp_path / "policy")
    GenerationConfig(eos_token_id=[2, 19]).save_pretrained(folder)
    settings = Settings(
        reward=Settings(reward_kwargs={"url": "http://one:1"}),
        actor_rollout_ref=Settings(model=Settings(path=str(folder))),
    )
    assert 19 in RewardManager(settings, tiny_tokenizer).eos_token_ids
