"""Scores from a server: those of the model here, whatever the server does on the way."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest

from companion import RemoteScorer, RewardScorer, load_reward_model, open_reward
from companion.errors import DataError, ReadoutError, ServiceError
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
    if protocol == "classify":
        assert [body["model"] for body in service.bodies] == ["reward", "reward"]
    else:
        assert {body["model_version"] for body in service.bodies} == {service.version}
    # what was sent are the formatter's ids: one BOS, an EOS only where the text was finished
    sent = [
        item["input_ids"] if isinstance(item, dict) else item
        for body in service.bodies
        for item in body.get("input", body.get("items"))
    ]
    tokenizer = scorer.tokenizer
    assert [ids.count(tokenizer.bos_token_id) for ids in sent] == [1, 1, 1]
    ended = sorted(ids[-1] == tokenizer.eos_token_id for ids in sent)
    assert ended == [False, True, True]


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
    with pytest.raises(ServiceError, match="answered 503: sick, after 3 tries"):
        remote(service, tiny_reward, retries=2).score(ROWS, on_error="skip")
    service.failures = [400]
    before = len(service.bodies)
    with pytest.raises(ServiceError, match="answered 400: sick"):
        remote(service, tiny_reward).score(ROWS, on_error="skip")
    assert len(service.bodies) == before + 1, "what the server refuses is not asked again"
    service.shutdown()
    service.server_close()
    with pytest.raises(ServiceError, match=r"no answer .*after 2 tries"):
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


@pytest.mark.parametrize("value", ["1.0", True, [1.0], {"raw": 1.0}])
@pytest.mark.parametrize("protocol", ["classify", "companion"])
def test_what_is_no_number_is_no_score(
    value: Any, protocol: Any, service: Any, tiny_reward: Any
) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        first = (answer.get("data") or answer.get("rewards"))[0]
        first |= {"probs": [value], "raw": value}
        return answer

    service.change = change
    with pytest.raises(ServiceError, match="is no number"):
        remote(service, tiny_reward, protocol=protocol).score(["yes good", "no"])


def test_a_reply_that_is_nested_too_deeply(
    service: Any, tiny_reward: Any, monkeypatch: Any
) -> None:
    handler = service.RequestHandlerClass
    send = handler._send
    monkeypatch.setattr(handler, "_send", lambda self, *_: send(self, 200, b"[" * 100_000))
    with pytest.raises(ServiceError, match="answered no JSON"):
        remote(service, tiny_reward).score(["yes good"])


def test_a_limit_of_the_server_that_is_no_number(service: Any, tiny_reward: Any) -> None:
    service.max_length = "12"
    with pytest.raises(ServiceError, match="max_length is '12'"):
        remote(service, tiny_reward, protocol="companion").score(["yes good"])


@pytest.mark.parametrize("asked", ["3600", "inf", "nan", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_server_does_not_let_a_client_wait_longer_than_its_timeout(
    asked: str, service: Any, tiny_reward: Any
) -> None:
    service.failures, service.retry_after = [503], asked
    scorer = remote(service, tiny_reward, timeout=0.5)
    begun = time.monotonic()
    assert len(scorer.score(["yes good"]).raw) == 1
    assert scorer.counts["retries"] == 1
    assert time.monotonic() - begun < 60  # (it asked for an hour, at least)


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
    for wrong in (
        {"protocol": "grpc"},
        {"protocol": "/score"},
        {"batch_size": 0},
        {"in_flight": 0},
        {"model_version": "x"},
    ):
        with pytest.raises(DataError):
            remote(service, tiny_reward, **wrong)
    for url in ("localhost:8000", "http://", [service.url, "host"]):
        with pytest.raises(DataError, match="is no URL"):
            RemoteScorer(url, service.scorer.formatter)
    with pytest.raises(DataError, match="no URL of a server"):
        RemoteScorer([], service.scorer.formatter)


# ---------------------------------------------------------------------- the companion's protocol


def change_of(index: int, /, **changed: Any) -> Any:
    """A change to the answer to one text, wherever it stands."""
    return lambda a: (
        a | {"rewards": [r | changed if r["index"] == index else r for r in a["rewards"]]}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"rewards": a["rewards"][1:]}, "indices"),
        (change_of(0, index=1), "indices"),
        (lambda a: a | {"rewards": a["rewards"] * 2}, "indices"),
        (change_of(1, raw=None), "no reason says why"),
        (change_of(1, raw="0.5"), "is no number"),
        (change_of(1, raw=True), "is no number"),
        (change_of(1, reason="sick"), "both a score and a reason"),
        (change_of(1, n_tokens=3), "3 were scored"),  # (BOS added, or cut)
        (change_of(1, cut_tokens=2), "were scored"),
        (lambda a: {"scores": [0.0] * 3}, "KeyError"),
        (lambda a: [a], "does not fit"),
        (lambda a: a | {"model_version": None}, "model_version is None"),
        (lambda a: a | {"model_version": "fedc"}, "version fedc, and it was 0123456789abcdef"),
    ],
)
def test_wrong_answers_of_the_companions_protocol_are_errors(
    service: Any, tiny_reward: Any, change: Any, message: str
) -> None:
    scorer = remote(service, tiny_reward, protocol="companion")
    service.change = change
    with pytest.raises(ServiceError, match=message):
        scorer.score(ROWS, on_error="skip")


def test_the_order_of_answers_is_their_index(service: Any, tiny_reward: Any) -> None:
    scorer = remote(service, tiny_reward, protocol="companion")
    expected = service.scorer.score(ROWS).raw
    for order in ([0, 1, 2], [2, 0, 1]):
        service.change = lambda a, order=order: a | {"rewards": [a["rewards"][i] for i in order]}
        np.testing.assert_allclose(scorer.score(ROWS).raw, expected, atol=1e-5)


def test_the_servers_reason_is_what_is_read(service: Any, tiny_reward: Any) -> None:
    service.change = change_of(1, raw=None, reason="the head overflowed", warnings=["hot"])
    scorer = remote(service, tiny_reward, protocol="companion")
    scores = scorer.score(ROWS, on_error="skip")
    assert scores.reasons == [None, "the head overflowed", None]
    assert np.isnan(scores.raw).tolist() == [False, True, False]
    with pytest.raises(ReadoutError, match="row 1: the head overflowed; 1 such in all"):
        scorer.score(ROWS)
    pairs = [{"prompt": USER, "chosen": "yes", "rejected": "no"} for _ in range(2)]
    found = scorer.score_pairs(pairs, on_error="skip")  # text 1 is the first pair's rejected
    assert found.reasons == ["the head overflowed", None]
    assert np.isnan(found.chosen).tolist() == [True, False]
    assert any("3 texts came back with a warning" in note for note in scorer.notes)


def test_what_is_too_long_for_the_server_is_a_row_and_not_the_run(
    service: Any, tiny_reward: Any
) -> None:
    longest = int(service.scorer.score(ROWS).n_tokens.max())
    service.max_length = longest - 1
    scorer = remote(service, tiny_reward, protocol="companion")
    reason = f"{longest} tokens, the server takes {longest - 1}"
    for on_error in ("skip", "raise"):  # as with a text that the model has no positions for
        scores = scorer.score(ROWS, on_error=on_error)
        assert 1 <= scores.n_dropped < 3
        assert set(scores.reasons) == {None, reason}
    strict = remote(service, tiny_reward, protocol="companion", overlong="error")
    with pytest.raises(DataError, match=reason):
        strict.score(ROWS)


def test_a_native_error_is_its_message_and_cure(service: Any, tiny_reward: Any) -> None:
    scorer = remote(service, tiny_reward, protocol="companion")
    scorer.score(ROWS)
    service.max_length = 1  # after the server was asked
    with pytest.raises(ServiceError) as caught:
        scorer.score(ROWS, on_error="skip")
    assert "answered 400: items[0] is too long" in caught.value.what
    assert caught.value.cure == "shorten it"


def test_versions_are_pinned(service: Any, tiny_reward: Any) -> None:
    scorer = remote(service, tiny_reward, protocol="companion")
    assert scorer.model_version is None
    print_of_old = scorer.fingerprint()
    scorer.score(ROWS)
    assert scorer.model_version == service.version
    old, service.version = service.version, "fedcba9876543210"
    for again in (scorer, pickle.loads(pickle.dumps(scorer))):
        with pytest.raises(ServiceError, match="answered 409") as caught:
            again.score(ROWS, on_error="skip")
        assert old in caught.value.what
        assert service.version in caught.value.what
        assert "new scorer" in str(caught.value.cure)
    fresh = remote(service, tiny_reward, protocol="companion")
    assert fresh.fingerprint() != print_of_old
    assert fresh.score(ROWS).n_dropped == 0
    pinned = remote(service, tiny_reward, protocol="companion", model_version=old)
    for call in (pinned.fingerprint, lambda: pinned.score(ROWS)):
        with pytest.raises(ServiceError, match=f"{service.version}.*{old} by the parameter"):
            call()


def test_another_kind_or_name_is_refused(
    service: Any, tiny_reward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServiceError, match="serves reward, not other"):
        remote(service, tiny_reward, protocol="companion", model="other").score(ROWS)
    told = service.models()
    told["data"][0]["kind"] = "process"
    monkeypatch.setattr(service, "models", lambda: told)
    with pytest.raises(ServiceError, match=r"of the kind process.* scalar"):
        remote(service, tiny_reward, protocol="companion").score(ROWS)


# ---------------------------------------------------------------------- several servers


@pytest.fixture
def two(serve: Any, tiny_reward: Any) -> list[Any]:
    scorer = RewardScorer(load_reward_model(tiny_reward))
    return [serve(scorer), serve(scorer)]


def stopped(service: Any) -> None:
    service.shutdown()
    service.server_close()


def of_both(two: list[Any], folder: Any, **settings: Any) -> RemoteScorer:
    urls = [service.url for service in two]
    given = {"backoff": 0.001, "batch_size": 1, "protocol": "companion"} | settings
    return RemoteScorer.from_pretrained(urls, folder, **given)


@pytest.mark.parametrize("protocol", ["classify", "companion"])
def test_several_servers_share_a_call(two: Any, tiny_reward: Any, protocol: Any) -> None:
    scorer = of_both(two, tiny_reward, protocol=protocol)
    done: list[int] = []
    rows = ROWS * 4
    expected = two[0].scorer.score(rows).raw
    np.testing.assert_allclose(scorer.score(rows, progress=done.append).raw, expected, atol=1e-5)
    assert done == [1] * 12
    assert all(len(service.bodies) >= 2 for service in two)
    assert scorer.counts == {"requests": 12, "texts": 12}


@pytest.mark.parametrize("protocol", ["classify", "companion"])
def test_a_server_that_is_gone_is_left_out(
    two: Any, tiny_reward: Any, protocol: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = of_both(two, tiny_reward, protocol=protocol, backoff=60)
    scorer.score(ROWS)
    stopped(two[1])
    expected = two[0].scorer.score(ROWS * 4).raw
    with caplog.at_level(logging.WARNING):
        found = scorer.score(ROWS * 4).raw
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scorer.counts["left_out"] == 1  # (a minute is not over)
    assert f"{two[1].url}: no answer" in caplog.text
    assert "left out for 60 s" in caplog.text
    assert any("1 times a server did not answer" in note for note in scorer.notes)
    # from the start, too
    fresh = of_both(two, tiny_reward, protocol=protocol, backoff=60)
    np.testing.assert_allclose(fresh.score(ROWS * 4).raw, expected, atol=1e-5)


def test_a_server_that_is_sick_for_a_moment_comes_back(
    two: Any, tiny_reward: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = of_both(two, tiny_reward)
    scorer.score(ROWS)
    two[0].failures = [503]
    two[0].retry_after = "0"
    with caplog.at_level(logging.WARNING):
        assert scorer.score(ROWS * 4).n_dropped == 0
    assert scorer.counts["left_out"] == 1
    assert scorer.counts["retries"] == 1
    before = len(two[0].bodies)
    assert scorer.score(ROWS * 4).n_dropped == 0
    assert len(two[0].bodies) > before
    assert caplog.text.count("answers again") == 1


def test_all_gone_is_an_error_that_names_them(two: Any, tiny_reward: Any) -> None:
    scorer = of_both(two, tiny_reward, retries=1)
    scorer.score(ROWS)
    for service in two:
        stopped(service)
    for asked in (scorer, of_both(two, tiny_reward, retries=1)):
        with pytest.raises(ServiceError, match="after 2 tries each") as caught:
            asked.score(ROWS, on_error="skip")
        assert all(service.url in caught.value.what for service in two)


def test_servers_of_two_versions_are_an_error_that_names_both(two: Any, tiny_reward: Any) -> None:
    two[1].version = "fedcba9876543210"
    with pytest.raises(ServiceError) as caught:
        of_both(two, tiny_reward).score(ROWS)
    for service in two:
        assert service.url in caught.value.what
        assert service.version in caught.value.what
    # one that was away when they were asked
    two[1].version = two[0].version
    scorer = of_both(two, tiny_reward)
    scorer.score(ROWS)
    two[1].version = "fedcba9876543210"
    with pytest.raises(ServiceError, match=r"answered 409"):
        scorer.score(ROWS * 20)


# ---------------------------------------------------------------------- many at once


@pytest.mark.parametrize("protocol", ["classify", "companion"])
def test_fifty_calls_at_once(service: Any, tiny_reward: Any, protocol: Any) -> None:
    scorer = remote(service, tiny_reward, protocol=protocol)
    rows = [{"prompt": USER, "completion": "no " * (1 + i % 5)} for i in range(50)]
    expected = service.scorer.score(rows).raw
    done: list[int] = []

    async def main() -> Any:
        loop_thread = threading.get_ident()

        def moved(n: int) -> None:
            assert threading.get_ident() == loop_thread
            done.append(n)

        return await asyncio.gather(*(scorer.score_async([r], progress=moved) for r in rows))

    found = asyncio.run(main())
    np.testing.assert_allclose([scores.raw[0] for scores in found], expected, atol=1e-5)
    assert scorer.counts == {"requests": 50, "texts": 50}
    assert sum(done) == 50

    async def pairs() -> Any:
        row = {"prompt": USER, "chosen": "yes", "rejected": "no"}
        return await scorer.score_pairs_async([row]), await service.scorer.score_pairs_async([row])

    there, here = asyncio.run(pairs())
    np.testing.assert_allclose(there.chosen, here.chosen, atol=1e-5)


def test_a_scorer_is_called_where_a_loop_runs(service: Any, tiny_reward: Any) -> None:
    """As a cell of a notebook does."""
    scorer = remote(service, tiny_reward)

    async def cell() -> Any:
        return scorer.score(ROWS)

    np.testing.assert_allclose(asyncio.run(cell()).raw, service.scorer.score(ROWS).raw, atol=1e-5)


@pytest.mark.parametrize("waits_for", ["an answer", "a pause"])
def test_a_call_that_is_cancelled_leaves_no_thread(
    service: Any, tiny_reward: Any, waits_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = remote(service, tiny_reward)
    if waits_for == "an answer":
        service.delay = 60.0
    else:
        service.failures, service.retry_after = [503] * 9, "60"
    ended = threading.Event()
    whole = type(scorer).score

    def score(*arguments: Any, **settings: Any) -> Any:
        try:
            return whole(scorer, *arguments, **settings)
        finally:
            ended.set()

    monkeypatch.setattr(scorer, "score", score)

    async def main() -> None:
        task = asyncio.create_task(scorer.score_async(ROWS))
        for _ in range(1000):
            if service.bodies:
                break
            await asyncio.sleep(0.01)
        assert service.bodies
        assert not ended.is_set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended.wait(30)
    if waits_for == "an answer":  # and the server knows that nobody waits
        for _ in range(1000):
            if service.left:
                break
            time.sleep(0.01)
        assert service.left == [True]


def test_a_local_call_that_is_cancelled_ends_with_its_batch(tiny_reward: Any) -> None:
    scorer = RewardScorer(load_reward_model(tiny_reward), max_rows_per_batch=1)
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    run, done = scorer._runner.run, []

    def slow(ids: Any, progress: Any) -> Any:
        def moved(n: int) -> None:
            begun.set()
            assert go_on.wait(30)
            progress(n)
            done.append(n)

        try:
            return run(ids, moved)
        finally:
            ended.set()

    scorer._runner.run = slow

    async def main() -> None:
        task = asyncio.create_task(scorer.score_async(ROWS * 5))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(main())
    assert ended.wait(30)
    assert done == []
    scorer._runner.run = run
    assert scorer.score(ROWS).n_dropped == 0  # the model's lock is free
