"""Work shared by the processes of a launcher: each item in one of them, the results in all.

accelerate's own parts, put together so that an error of one process is everybody's, in place of a
wait for a process that has ended. Chapter 8.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from companion.errors import CompanionError
from companion.formatting import RewardFormatter

T = TypeVar("T")
Result = TypeVar("Result")

#: Longest that a process waits for the others, whose rows may be longer.
_PATIENCE = timedelta(hours=12)


def launched_processes() -> PartialState | None:
    """The processes that torchrun or ``accelerate launch`` started; None for one by itself.

    Each has a GPU of its own, if there are any. What they send each other are Python objects of the
    host, so gloo carries them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    return PartialState(cpu=not torch.cuda.is_available(), backend="gloo", timeout=_PATIENCE)


def across_processes(
    items: Sequence[T],
    work: Callable[[Sequence[T]], Sequence[Result]],
    processes: PartialState | None,
) -> list[Result]:
    """The results of all items, in their order, in every process; all of them must call.

    Parameters
    ----------
    items : sequence
        The same in every process. Each gets a part without gaps, so that texts that begin alike
        stay together.
    work : callable
        From some items to as many results, which can be pickled.
    processes : PartialState, optional
        None: this process does all.

    Raises
    ------
    CompanionError
        The first in order that `work` raised in any process.
    """
    if processes is None:
        return list(work(items))
    found: list[Any] = []
    with processes.split_between_processes(list(items)) as own:
        try:
            found = list(work(own)) if own else []
        except CompanionError as error:
            found = [error]
    found = gather_object(found)
    for result in found:
        if isinstance(result, CompanionError):
            raise result
    return found


def in_first_process(work: Callable[[], Result], processes: PartialState | None) -> Result:
    """What the first process finds, in all of them; :func:`across_processes` with one item."""
    return across_processes([None], lambda _: [work()], processes)[0]


def add_up_counts(formatter: RewardFormatter, processes: PartialState | None) -> None:
    """Give a formatter that read some of the rows the counts and notes of all processes."""
    if processes is None:
        return
    told = gather_object([(formatter.counts.to_dict(), formatter.notes)])
    formatter.reset_counts()
    for counts, notes in told:
        formatter.counts.add(**counts)
        formatter.notes += [note for note in notes if note not in formatter.notes]
