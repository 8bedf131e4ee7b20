"""The queue and the engine: a request enters whole, waits, is dropped, and is never lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.errors import ModelError
from companion.formatting import Encoded
from companion.scoring import RewardScorer, ids_of
from companion.serving import Engine, Queue, QueueFull, Request


def texts(*lengths: int, first: int = 0) -> list[Encoded]:
    return [Encoded([first + i] * n, 0, True) for i, n in enumerate(lengths)]


class Scorer:
    """The score of a text is its first id; slow, or broken by one of its texts."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []

    def values(self, texts: Sequence[Any]) -> list[float]:
        ids = [ids_of(text) for text in texts]
        self.batches.append([own[0] for own in ids])
        time.sleep(self.seconds)
        if any(own[0] == 666 for own in ids):
            raise ModelError("a text that breaks its batch")
        return [float(own[0]) for own in ids]


def engine_of(scorer: Any, queue: Queue, budget: int = 64) -> Engine:
    engine = Engine(scorer, queue, budget=budget)
    engine.start()
    return engine


async def ask(queue: Queue, own: Sequence[Any], patience: float = 5.0) -> list[Any]:
    loop = asyncio.get_running_loop()
    request = Request(own, loop, loop.create_future())
    try:
        await queue.put(request, patience)
        return await request.done
    except BaseException:
        queue.drop(request)
        raise


def test_every_request_gets_its_own_values_whatever_the_batches() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    queue = Queue(2000, by_length=rng.random() < 0.5)
    engine = engine_of(Scorer(), queue)

    async def run() -> None:
        calls = []
        for i in range(300):
            own = texts(*[rng.randint(1, 40) for _ in range(rng.randint(1, 5))], first=10 * i)
            calls.append((own, ask(queue, own)))
        found = await asyncio.gather(*(call for _, call in calls))
        for (own, _), values in zip(calls, found, strict=True):
            assert values == [float(ids_of(text)[0]) for text in own]

    asyncio.run(run())
    engine.stop(5)
    assert queue.tokens == queue.waiting_tokens == len(queue) == queue.waiting == 0


def test_a_batch_keeps_to_its_budget_and_a_longer_text_runs_alone() -> None:
    queue, scorer = Queue(10_000), Scorer()
    loop_ran = threading.Event()

    async def run() -> None:
        calls = [asyncio.ensure_future(ask(queue, texts(30, 30, 30, 100, 5)))]
        await asyncio.sleep(0)
        loop_ran.set()
        engine_of(scorer, queue, budget=64)
        await asyncio.gather(*calls)

    asyncio.run(run())
    queue.close()
    assert scorer.batches == [[0, 1], [2], [3], [4]]


def test_texts_of_similar_length_go_together_unless_they_have_waited_long() -> None:
    queue = Queue(10_000, by_length=True, age=1000)

    async def run(queue: Queue) -> list[list[int]]:
        task = asyncio.ensure_future(ask(queue, texts(50, 4, 40, 6, 5)))
        await asyncio.sleep(0)
        taken = []
        while len(queue):
            taken.append([place.length for place in queue.take(60) or []])
        task.cancel()
        return taken

    assert asyncio.run(run(queue)) == [[4, 5, 6, 40], [50]]
    assert asyncio.run(run(Queue(10_000, by_length=True, age=0))) == [[50, 4], [40, 6, 5]]


def test_without_room_a_request_waits_and_is_refused_when_its_patience_ends() -> None:
    queue = Queue(100)

    async def run() -> None:
        first = asyncio.ensure_future(ask(queue, texts(80)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await ask(queue, texts(30, 30), patience=0.05)
        assert queue.waiting == 0
        waits = asyncio.ensure_future(ask(queue, texts(60), patience=5))
        small = asyncio.ensure_future(ask(queue, texts(10), patience=5))  # does not overtake
        await asyncio.sleep(0.05)
        assert queue.waiting == 2
        assert len(queue) == 1
        engine = engine_of(Scorer(), queue)
        assert await first == await waits == await small == [0.0]
        engine.stop(5)

    asyncio.run(run())


def test_a_request_that_is_larger_than_the_queue_is_served_alone() -> None:
    queue = Queue(10)
    engine = engine_of(Scorer(), queue)
    assert asyncio.run(ask(queue, texts(50, 50))) == [0.0, 1.0]
    engine.stop(5)


def test_too_much_that_waits_is_refused_at_once() -> None:
    queue = Queue(10)

    async def run() -> None:
        tasks = [asyncio.ensure_future(ask(queue, texts(10))) for _ in range(100)]
        await asyncio.sleep(0.05)
        refused = [task for task in tasks if task.done()]
        assert len(refused) == 100 - 1 - 16
        assert all(isinstance(task.exception(), QueueFull) for task in refused)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queue.waiting == queue.waiting_tokens == queue.tokens == 0

    asyncio.run(run())


def test_the_texts_of_a_client_that_left_are_not_run() -> None:
    queue, scorer = Queue(1000), Scorer(0.02)

    async def run() -> None:
        engine = engine_of(scorer, queue, budget=10)
        tasks = [asyncio.ensure_future(ask(queue, texts(10, first=i))) for i in range(20)]
        await asyncio.sleep(0.03)
        for task in tasks[5:15]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.stop(5)

    asyncio.run(run())
    run_of = {batch[0] for batch in scorer.batches}
    assert run_of >= {*range(5), *range(15, 20)}
    assert len(run_of & set(range(5, 15))) <= 1  # one may have been on its way
    assert queue.tokens == 0


def test_one_bad_text_harms_only_its_own_request() -> None:
    queue, scorer = Queue(1000), Scorer(0.01)

    async def run() -> None:
        engine = engine_of(scorer, queue, budget=1000)
        good = [asyncio.ensure_future(ask(queue, texts(3, 3, first=i))) for i in (10, 20, 30)]
        bad = asyncio.ensure_future(ask(queue, texts(3, first=666)))
        assert await asyncio.gather(*good) == [[10, 11], [20, 21], [30, 31]]
        with pytest.raises(ModelError, match="breaks its batch"):
            await bad
        engine.stop(5)

    asyncio.run(run())


def test_what_is_inside_is_served_when_the_queue_closes() -> None:
    queue = Queue(20)

    async def run() -> None:
        tasks = [asyncio.ensure_future(ask(queue, texts(8, first=i))) for i in range(12)]
        await asyncio.sleep(0)
        engine = engine_of(Scorer(0.005), queue, budget=10)
        await asyncio.to_thread(engine.stop, 10)
        found = await asyncio.gather(*tasks)
        assert [values[0] for values in found] == list(np.arange(12.0))

    asyncio.run(run())


def test_a_prompt_of_several_requests_is_computed_once(tiny_reward: Path) -> None:
    scorer = RewardScorer.from_pretrained(tiny_reward)
    prompt = "What shall we do with all these boxes of pens? " * 6
    rows = [{"prompt": prompt, "completion": f"Take {word}."} for word in ("one", "two", "all")]
    alone = [scorer.score([row]).raw[0] for row in rows]
    queue = Queue(1 << 20)
    computed: list[tuple[int, int]] = []
    engine = Engine(scorer, queue, watch=lambda _, tokens, own, __: computed.append((tokens, own)))

    async def run() -> list[list[Any]]:
        calls = [asyncio.ensure_future(ask(queue, scorer.prepare([row]).texts)) for row in rows]
        await asyncio.sleep(0)  # all wait before the engine begins
        engine.start()
        return await asyncio.gather(*calls)

    found = asyncio.run(run())
    engine.stop(5)
    np.testing.assert_allclose([values[0] for values in found], alone, atol=1e-5)
    ((tokens, own),) = computed
    assert own < 0.6 * tokens
