"""Batches of rows that are halved where a GPU's memory ends, and stay so. Chapter 5."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from companion.engine.padded import token_budget_batches
from companion.errors import ModelError
from companion.models.head import without_adapter
from companion.models.memory import is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: of a model, for each use and each budget that it was given: what was left when the memory ended.
#: Beside the model, not in a policy: a look of the monitor makes a new one each time.
_MOST: WeakKeyDictionary[Any, dict[Hashable, int]] = WeakKeyDictionary()


def halving_batches(
    model: Any,
    use: Hashable,
    costs: Sequence[int],
    budget: int,
    compute: Callable[[list[int]], Sequence[T]],
) -> Iterator[tuple[list[int], Sequence[T]]]:
    """Compute rows in batches within a budget; where the memory ends, the rest with half of it.

    The halved budget is remembered for later calls with the same model and use.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    use : hashable
        What the budget is for, and whose it is: another use has a budget of its own.
    costs : sequence of int
        Of each row, in tokens; a batch costs its rows × its dearest row.
    budget : int
        Most that a batch may cost; a dearer row gets a batch of its own.
    compute : callable
        Gets the places of the rows of a batch, and gives a value for each. What it computed is
        lost when the memory ends in it, so it must begin anew when it is called again.

    Yields
    ------
    tuple
        Places and their values, of one batch; every row exactly once.

    Raises
    ------
    ModelError
        If the memory does not hold a single row.
    """
    kept = _MOST.setdefault(without_adapter(model), {})
    budget = min(budget, kept.get(use, budget))
    waiting = list(range(len(costs)))
    while waiting:
        done: set[int] = set()
        for chosen in token_budget_batches([costs[row] for row in waiting], budget):
            rows = [waiting[i] for i in chosen]
            try:
                values = compute(rows)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cost = len(rows) * costs[rows[0]]  # the dearest comes first
                if len(rows) == 1:
                    raise ModelError(
                        f"a text of {cost} tokens does not fit into the GPU's memory",
                        "shorten it, or what is to be generated (max_new_tokens); load the model "
                        "in half precision; or free the GPU of other models",
                    ) from error
                budget = kept[use] = max(1, cost // 2)
                logger.warning(
                    f"out of memory with {len(rows)} texts of {costs[rows[0]]} tokens: going on "
                    f"with {budget} tokens a batch"
                )
                break
            done.update(rows)
            yield rows, values
        waiting = [row for row in waiting if row not in done]
        if waiting:  # outside the handler, whose traceback holds the tensors
            torch.cuda.empty_cache()
