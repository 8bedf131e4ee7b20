"""Twice what it can do, for minutes, and clients that leave: nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from served import ASSETS, seeded

from companion.scoring import RewardScorer, ids_of, load_scorer
from companion.serving import PATIENCE, running

pytestmark = pytest.mark.serving

#: tokens a second of the slow model, tokens of a text, and texts a second that are sent
RATE, LENGTH, SENT = 400, 10, 80
ROOM, ANSWER = 2.0, 20.0


@dataclass
class Seen:
    """What a client that stayed has seen."""

    status: int
    right: bool
    seconds: float


def slowed(scorer: Any) -> Any:
    """Takes its time; a text's score is its first id."""

    def values(texts: Sequence[Any], **_: Any) -> list[float]:
        time.sleep(sum(len(ids_of(text)) for text in texts) / RATE)
        return [float(ids_of(text)[0]) for text in texts]

    scorer.values = values
    return scorer


async def ask(address: str, rng: random.Random) -> Seen | None:
    """One client; None if it left before its answer came."""
    first = rng.randrange(10, 600)
    body = json.dumps({"items": [{"input_ids": [first, *[11] * (LENGTH - 1)]}]}).encode()
    patience = rng.uniform(0, 2 * ROOM) if rng.random() < 0.3 else None
    host, port = address.split(":")
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
    try:
        answer = await asyncio.wait_for(reader.read(), patience)
    except TimeoutError:
        return None
    finally:
        writer.close()
    status = int(answer.split()[1])
    scores = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    right = status != 200 or scores["rewards"][0]["raw"] == first
    return Seen(status, right, time.monotonic() - began)


def resident() -> float:
    """MiB of this process, server and clients."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


async def flood(address: str, seconds: float, rng: random.Random) -> tuple[list[Any], list[float]]:
    """Clients come at random; what they saw, and the memory once a second."""
    tasks: list[asyncio.Task[Seen | None]] = []
    memory: list[float] = []
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        # as many as should be here by now: a busy machine sends them a little later
        while len(tasks) < now * SENT:
            tasks.append(asyncio.ensure_future(ask(address, rng)))
        if len(memory) < now:
            memory.append(resident())
        await asyncio.sleep(rng.expovariate(SENT))
    return await asyncio.gather(*tasks), memory


@pytest.mark.parametrize("seconds", [6, pytest.param(120, marks=pytest.mark.slow)])
def test_at_twice_its_capacity(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol, patience in PATIENCE.items():
        changed = replace(patience, room=ROOM, answer=ANSWER)
        monkeypatch.setitem(PATIENCE, protocol, changed)
    loaded: Any = load_scorer(ASSETS / "pairwise", overlong="error")
    scorer = RewardScorer(loaded.reward_model, max_tokens_per_batch=25)
    capacity = RATE // 2
    with running(scorer, allow_unchecked=True, queue_tokens=capacity) as server:
        slowed(scorer)
        queue = server.service.queue
        address = server.url.removeprefix("http://")
        found, memory = asyncio.run(flood(address, seconds, seeded()))
        assert queue.tokens == queue.waiting == queue.waiting_tokens == len(queue) == 0
        assert server.service.engine.alive
    stayed = [seen for seen in found if seen is not None]
    counts = Counter(seen.status for seen in stayed)
    print(f"{counts}, {len(found) - len(stayed)} left, memory {memory[0]:.0f} to {memory[-1]:.0f}")
    assert all(seen.right for seen in stayed), "a score of another's"
    # no 504: who got in was answered; no 500: nothing broke
    assert set(counts) == {200, 429}
    # what the model can do was done: a client that left wastes at most what was on its way
    assert counts[200] > 0.5 * seconds * RATE / LENGTH
    # refused only after the patience, and answered soon after it (a busy machine needs longer)
    assert all(seen.seconds >= ROOM for seen in stayed if seen.status == 429)
    assert max(seen.seconds for seen in stayed) < ANSWER
    if seconds > 60:
        assert max(memory[60:]) - max(memory[:60]) < 40, "memory grows"
