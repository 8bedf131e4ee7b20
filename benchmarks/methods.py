"""Ways to score texts: what users do today, and the companion's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measuring import Outcome
from benchmarks.shapes import PAD, TokenIds
from companion.engine import BatchRunner, Packing, pad_batch

Method = Callable[[], Callable[[], Outcome]]
#: The batch size of the usual loop.
BATCH = 16


def _stock(model: Any, ids: TokenIds, batches: Sequence[Sequence[int]]) -> Outcome:
    """``model(input_ids, attention_mask).logits``, a padded batch at a time."""
    device = next(model.parameters()).device
    computed, total = 0, 0.0
    with torch.inference_mode():
        for rows in batches:
            batch = pad_batch([ids[i] for i in rows], PAD)
            computed += batch["input_ids"].numel()
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
            total += float(logits.float().sum())
    return Outcome(computed, total / len(ids))


def scoring_methods(model: Any, ids: TokenIds, budgets: Sequence[int | None]) -> dict[str, Method]:
    """Name to method; the first is the one that the others are compared with.

    ``check`` is the mean score, which must be the same for all.
    """
    n = len(ids)
    by_length = sorted(range(n), key=lambda i: -len(ids[i]))
    orders: dict[str, list[Sequence[int]]] = {
        "loop of 16, arrival order": [range(i, min(i + BATCH, n)) for i in range(0, n, BATCH)],
        "one by one": [[i] for i in range(n)],
        "loop of 16, sorted": [by_length[i : i + BATCH] for i in range(0, n, BATCH)],
    }

    def companion(packing: Packing, budget: int | None) -> Outcome:
        runner = BatchRunner(model, PAD, max_tokens=budget, packing=packing)
        scores = runner.run(ids)
        return Outcome(runner.tokens[1], float(scores.mean()))

    methods: dict[str, Method] = {
        name: lambda batches=batches: lambda: _stock(model, ids, batches)  # type: ignore[misc]
        for name, batches in orders.items()
    }
    methods["companion, padded"] = lambda: lambda: companion("off", None)
    for budget in budgets:
        name = "companion" if budget is None else f"companion, {budget} tokens"
        methods[name] = lambda budget=budget: lambda: companion("auto", budget)  # type: ignore[misc]
    return methods
