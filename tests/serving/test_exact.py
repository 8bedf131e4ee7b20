"""`exact`: the same score to the last bit, whatever the batch holds; and memory that ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from served import ASSETS, client, rows_of, seeded

from companion.engine import runner
from companion.scoring import load_scorer
from companion.serving import Running, running

pytestmark = pytest.mark.serving


@contextmanager
def serving(kind: str, **settings: Any) -> Iterator[Running]:
    loading = {name: settings.pop(name) for name in ("packing",) if name in settings}
    scorer = load_scorer(ASSETS / kind, overlong="error", **loading)
    with running(scorer, allow_unchecked=True, **settings) as server:
        yield server


def differing(
    server: Running, rows: Sequence[Any], n: int, rng: random.Random, route: str = "/v1/rewards"
) -> int:
    """How many of `n` random compositions of posts have a score that is not the lonely one's.

    Four clients post at a time, so that what stands in one batch is of several posts.
    """
    field, own = ("raw", "rewards") if route == "/v1/rewards" else ("logits", "results")
    with client(server.url) as http:

        def ask(items: Sequence[int]) -> list[Any]:
            answer = http.post(route, json={"items": [rows[i] for i in items]})
            assert answer.status_code == 200, answer.text
            return [item[field] for item in answer.json()[own]]

        alone = [ask([i])[0] for i in range(len(rows))]
        drawn = [rng.choices(range(len(rows)), k=rng.randint(2, 6)) for _ in range(n)]
        with ThreadPoolExecutor(4) as threads:
            found = threads.map(ask, drawn)
            pairs = zip(drawn, found, strict=True)
            return sum(got != [alone[i] for i in items] for items, got in pairs)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_exact_scores_do_not_move_with_the_batch(packing: str) -> None:
    rows = rows_of("pairwise")[:12]
    with serving("pairwise", exact=True, packing=packing) as server:
        assert server.service.deviation == 0.0
        assert differing(server, rows, 20, seeded()) == 0
        with client(server.url) as http:
            model = http.get("/v1/models").json()["data"][0]
            assert model["exact"] is True
            assert model["deviation"] == 0.0
            answer = http.post("/v1/rewards", json={"items": rows}).json()["rewards"]
    scorer = load_scorer(ASSETS / "pairwise", overlong="error", packing=packing)  # type: ignore[arg-type]
    want = [float(scorer.score([row]).raw[0]) for row in rows]
    assert [item["raw"] for item in answer] == want


def test_without_it_scores_do_move_by_what_is_published() -> None:
    with serving("pairwise", packing="off") as server:
        assert differing(server, rows_of("pairwise")[:12], 30, seeded()) > 0
        with client(server.url) as http:
            model = http.get("/v1/models").json()["data"][0]
        assert model["exact"] is False
        assert 0 < model["deviation"] < 1e-5


def test_exact_values_of_steps() -> None:
    with serving("process", exact=True) as server:
        assert differing(server, rows_of("process")[:8], 20, seeded(), "/v1/steps") == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_none_of_ten_thousand_compositions_differs() -> None:
    with serving("pairwise", exact=True) as server:
        assert differing(server, rows_of("pairwise"), 10_000, seeded()) == 0


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("kind", "packing"),
    [("pairwise", "auto"), ("pairwise", "off"), ("process", "auto"), ("outcome", "off")],
)
def test_memory_that_ends_costs_time_and_no_answer(
    kind: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds, failed = 300, []  # type: tuple[int, list[int]]

    def guard(forward: Any) -> Any:
        def call(model: Any, batch: Any, *rest: Any) -> Any:
            size = batch.computed if not rest else batch.numel()
            if size > holds:
                failed.append(size)
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return forward(model, batch, *rest)

        return call

    names = ("packed_scores", "reward_scores", "packed_token_logits", "token_logits")
    rows = rows_of(kind)
    want = load_scorer(ASSETS / kind, overlong="error").score(rows).raw
    route, field, own = ("/v1/steps", "score", "results")
    if kind == "pairwise":
        route, field, own = ("/v1/rewards", "raw", "rewards")
    with serving(kind, packing=packing) as server, client(server.url) as http:
        for name in names:
            monkeypatch.setattr(runner, name, guard(getattr(runner, name)))
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: http.post(route, json={"items": rows}), range(4)))
        for answer in answers:
            assert answer.status_code == 200, answer.text
            found = [item[field] for item in answer.json()[own]]
            np.testing.assert_allclose(found, want, atol=1e-5, rtol=0)
        assert failed, "the memory never ended"
        assert all(b <= a / 2 for a, b in itertools.pairwise(failed)), (
            "a size that failed came again"
        )
        # one text that it does not hold: its request has an error, and the next one is served
        holds = 20
        answer = http.post(route, json={"items": rows[:1]})
        assert answer.status_code == 500
        assert "does not fit" in answer.json()["error"]["message"]
        holds = 300
        assert http.post(route, json={"items": rows[:1]}).status_code == 200
