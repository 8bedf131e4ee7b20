"""Scores from a server: those of the model here, whatever the server does on the way."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import pytest

from companion import RemoteScorer, RewardScorer, load_reward_model, open_reward
from companion.errors import DataError, ServiceError
from companion.models import ReferenceStats, RewardManifest

pytestmark = pytest.mark.serving
USER = [{"role": "user", "content": "how many pens"}]
ROWS = [
    {"prompt": USER, "completion": "Ana has 3 pens"},
    {"prompt": USER, "completion": "the answer is 7", "terminated": False},
    {"prompt": "how many pens ", "completion": "no"},
]


@pytest.fixture
def service(serve: Any, tiny_reward: Any) -> Any:
    return serve(RewardScorer(load_reward_model(tiny_reward)))


def remote(service: Any, folder: Any, **settings: Any) -> RemoteScorer:
    return RemoteScorer.from_pretrained(service.url, folder, backoff=0.001, **settings)


@pytest.mark.parametrize("protocol", ["classify", "companion"])
def test_scores_are_those_of_the_model_here(service: Any, tiny_reward: Any, protocol: Any) -> None:
    scorer = remote(service, tiny_reward, protocol=protocol, batch_size=2, model="reward")
    local = service.scorer.score(ROWS)
    there = scorer.score(ROWS)
    np.testing.assert_allclose(there.raw, local.raw, atol=1e-5)
    np.testing.assert_array_equal(there.n_tokens, local.n_tokens)
    assert scorer.counts == {"requests": 2, "texts": 3}
    assert [body["model"] for body in service.bodies] == ["reward", "reward"]
    # what was sent are the formatter's ids: one BOS, an EOS only where the text was finished
    sent = [ids for body in service.bodies for ids in body.get("input", body.get("input_ids"))]
    tokenizer = scorer.tokenizer
    assert [ids.count(tokenizer.bos_token_id) for ids in sent] == [1, 1, 1]
    assert [ids[-1] == tokenizer.eos_token_id for ids in sent] == [True, False, True]


def test_a_reward_function_over_http(service: Any, tiny_reward: Any) -> None:
    there = open_reward(f"{service.url}#{tiny_reward}")
    here = RewardScorer.from_pretrained(tiny_reward).as_reward_func()
    arguments = {
        "prompts": [USER] * 2,
        "completions": [[{"role": "assistant", "content": text}] for text in ("no", "yes so")],
        "completion_ids": [[20, 2], [20, 21]],
    }
    np.testing.assert_allclose(there(**arguments), here(**arguments), atol=1e-5)
    assert there.__name__ == f"reward_{tiny_reward.name}"
    again = pickle.loads(pickle.dumps(there))
    np.testing.assert_allclose(again(**arguments), here(**arguments), atol=1e-5)


def test_a_server_that_is_back_soon_costs_retries_and_no_reward(
    service: Any, tiny_reward: Any
) -> None:
    service.failures = [503, 500, 429]
    scorer = remote(service, tiny_reward)
    assert scorer.score(ROWS).n_dropped == 0
    assert scorer.counts["retries"] == 3
    assert scorer.counts["requests"] == 1


def test_a_server_that_is_gone_is_an_error(service: Any, tiny_reward: Any) -> None:
    service.failures = [503] * 9
    with pytest.raises(ServiceError, match="answered 503 after 3 tries: sick"):
        remote(service, tiny_reward, retries=2).score(ROWS, on_error="skip")
    service.failures = [400]
    before = len(service.bodies)
    with pytest.raises(ServiceError, match="answered 400: sick"):
        remote(service, tiny_reward).score(ROWS, on_error="skip")
    assert len(service.bodies) == before + 1, "what the server refuses is not asked again"
    service.shutdown()
    service.server_close()
    with pytest.raises(ServiceError, match="no answer after 2 tries"):
        remote(service, tiny_reward, retries=1).score(ROWS, on_error="skip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"data": a["data"][1:]}, "indices|scores for 3"),
        (lambda a: {"scores": []}, "KeyError"),
        (lambda a: {"data": [{**d, "probs": [0.5, 0.5]} for d in a["data"]]}, "no scalar"),
    ],
)
def test_answers_that_do_not_fit_are_errors(
    service: Any, tiny_reward: Any, change: Any, message: str
) -> None:
    service.change = change
    with pytest.raises(ServiceError, match=message):
        remote(service, tiny_reward).score(ROWS)


def test_a_score_that_is_not_finite_is_one_reason(service: Any, tiny_reward: Any) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"][0]["probs"] = [None]  # of the last text
        return answer

    service.change = change
    scores = remote(service, tiny_reward).score(ROWS, on_error="skip")
    assert [reason is None for reason in scores.reasons] == [True, True, False]
    assert "not finite" in str(scores.reasons[2])


def test_a_sigmoid_on_the_server_is_noticed(
    service: Any, tiny_reward: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        for item in answer["data"]:
            item["probs"] = [1 / (1 + np.exp(-item["probs"][0]))]
        return answer

    reference = ReferenceStats.from_scores(np.linspace(-5, 5, 101), "a test")
    scorer = RemoteScorer(
        service.url, service.scorer.formatter, manifest=RewardManifest(reference=reference)
    )
    with caplog.at_level(logging.WARNING):
        scorer.score(ROWS * 10)
        assert "sigmoid" not in caplog.text
        service.change = change
        scorer.score(ROWS * 10)
    assert "sigmoid" in caplog.text


def test_a_key_is_sent_and_bad_settings_are_refused(
    service: Any, tiny_reward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPANION_REWARD_API_KEY", "secret")
    remote(service, tiny_reward).score(ROWS)
    assert service.headers[-1]["Authorization"] == "Bearer secret"
    for wrong in ({"protocol": "grpc"}, {"batch_size": 0}):
        with pytest.raises(DataError):
            remote(service, tiny_reward, **wrong)
    with pytest.raises(DataError, match="is no URL"):
        RemoteScorer("localhost:8000", service.scorer.formatter)
