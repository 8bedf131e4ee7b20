"""Rewards by their names, and several rewards of one completion: all of them, or none. Chapter 5.

TRL weighs and adds several reward functions itself (``reward_funcs`` and ``reward_weights``), which
is right as long as every completion has every reward. One that lacks a reward is added up without
it (``nansum``, trl 1.16): it is treated as if that model had given it a 0, which may be the best
score of its group or the worst. Here a completion that lacks one reward has none, and TRL leaves it
out of the mean of its group and gives it no advantage.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from companion.errors import CompanionError, DataError
from companion.formatting import TextMode
from companion.models.readout import ReadAs
from companion.scoring.remote import Protocol, RemoteScorer
from companion.scoring.reward_function import RewardFunction, Transform
from companion.scoring.scorer import RewardScorer
from companion.scoring.servers import is_url

logger = logging.getLogger(__name__)

RewardCallable = Callable[..., Sequence[float | None]]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def open_reward(
    source: str,
    *,
    transform: Transform = "raw",
    clip: float | None = None,
    truncated: Literal["score"] | float | None = "score",
    eos_token_ids: Sequence[int] | None = None,
    protocol: Protocol = "classify",
    text: TextMode | None = None,
    dtype: torch.dtype | str | None = None,
    read_as: ReadAs | None = None,
) -> RewardCallable:
    """A reward function, as TRL calls them, from its name.

    Parameters
    ----------
    source : str
        A folder or hub id of a reward model; ``http://host:port#MODEL``, a server and the folder or
        hub id of the model that it runs, whose formatter makes the token ids here; or
        ``module:function``, called as ``f(prompts=, completions=, completion_ids=, **columns)``.
    transform, clip, truncated, eos_token_ids
        As in :class:`RewardFunction`. A function of yours is taken as
        it is.
    protocol : {"classify", "companion"}
        As in :class:`companion.scoring.RemoteScorer`.
    text : {"chat", "plain"}, optional
        How prompts of text are read, in place of what the model says.
    dtype : torch.dtype or str, optional
        Of a reward model's weights, as in :meth:`RewardScorer.from_pretrained`; nothing to a server
        or a function.
    read_as : ReadAs, optional
        How a published checkpoint is read, as in :meth:`RewardScorer.from_pretrained`.

    Returns
    -------
    callable
        It is called ``reward_`` and the last part of the name.

    Raises
    ------
    DataError
        For a server without a model, or a function that cannot be found.
    ModelError
        For a folder that is no reward model.
    """
    if is_url(source):
        url, _, model = source.partition("#")
        if not model:
            raise DataError(
                f"{source}: which model does the server run?",
                f"give its folder or hub id behind a #: {url}#Org/model",
            )
        scorer: Any = RemoteScorer.from_pretrained(
            url, model, protocol=protocol, text=text, read_as=read_as
        )
        name = model
    elif not is_loaded(source):
        return _function(source)
    else:
        name = source
        scorer = partial(
            RewardScorer.from_pretrained, source, text=text, dtype=dtype, read_as=read_as
        )
    last = re.sub(r"\W+", "_", name.rstrip("/").rsplit("/", 1)[-1])
    return RewardFunction(
        scorer,
        transform=transform,
        clip=clip,
        truncated=truncated,
        eos_token_ids=eos_token_ids,
        name=f"reward_{last}",
    )


def is_loaded(source: str) -> bool:
    """Whether a reward of this name is a model that is loaded here."""
    return not is_url(source) and _FUNCTION.fullmatch(source) is None


def _function(source: str) -> RewardCallable:
    module, name = source.split(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{source}: no such function ({error})",
            "give package.module:function, of a module that can be imported from here",
        ) from error
    if not callable(found):
        raise CompanionError(f"{source}: is a {type(found).__name__}, not a function")
    return found


class _Rewards:
    """What the functions gave for the batch at hand; the first to be asked has all of them run."""

    def __init__(self, functions: Sequence[RewardCallable]) -> None:
        self.functions = list(functions)
        self.counts: Counter[str] = Counter()
        self._batch: tuple[Any, Any] = (None, None)
        self._rewards: list[list[float | None]] = []
        self._asked: set[int] = set()
        self._lock = threading.RLock()  # the batch at hand is one thread's at a time

    def of(self, index: int, prompts: Any, completions: Any, arguments: Any) -> list[float | None]:
        with self._lock:
            same = self._batch[0] is prompts and self._batch[1] is completions
            if not same or index in self._asked:
                self._batch, self._asked = (prompts, completions), set()
                self._rewards = self._run(prompts, completions, arguments)
            self._asked.add(index)
            if len(self._asked) == len(self.functions):
                self._batch = (None, None)  # keep no texts
            return self._rewards[index]

    def _run(self, prompts: Any, completions: Any, arguments: Any) -> list[list[float | None]]:
        columns = []
        for function in self.functions:
            given = list(function(prompts=prompts, completions=completions, **arguments))
            if len(given) != len(completions):
                raise DataError(
                    f"{reward_name(function)} gave {len(given)} rewards for {len(completions)} "
                    "completions"
                )
            columns.append([value if is_reward(value) else None for value in given])
        rows = list(zip(*columns, strict=True))
        whole = [row if None not in row else (None,) * len(row) for row in rows]
        lacking = sum(row != kept for row, kept in zip(rows, whole, strict=True))
        if lacking and not self.counts["incomplete"]:
            logger.warning("completions that lack one of their rewards are left without any")
        self.counts["incomplete"] += lacking
        return [[row[place] for row in whole] for place in range(len(columns))]

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "_batch": (None, None),
            "_rewards": [],
            "_asked": set(),
            "_lock": None,
        }
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


class JointReward:
    """One of several rewards that stand or fall together; made by :func:`joint_rewards`.

    Attributes
    ----------
    counts : Counter
        ``incomplete``: completions that lost their other rewards because one was missing.
    """

    def __init__(self, rewards: _Rewards, index: int, name: str) -> None:
        self._rewards = rewards
        self._index = index
        self.__name__ = name

    @property
    def counts(self) -> Counter[str]:
        """Shared by the functions that were made together."""
        return self._rewards.counts

    def __call__(self, prompts: Any, completions: Any, **arguments: Any) -> list[float | None]:
        """This reward of each completion; None for all of them if any reward is missing."""
        return self._rewards.of(self._index, prompts, completions, arguments)


def joint_rewards(functions: Sequence[RewardCallable]) -> list[JointReward]:
    """Reward functions for TRL's ``reward_funcs`` that leave no completion with half its rewards.

    Weights stay TRL's (``reward_weights`` of its configuration), and so does its choice to add
    before or after normalising (``multi_objective_aggregation``).

    Parameters
    ----------
    functions : sequence of callable
        Each as TRL calls it: ``f(prompts=, completions=, **columns)`` to a list of floats or None.
        NaN and infinite values count as None.

    Returns
    -------
    list of JointReward
        In the same order. Names that are given twice get a number, since TRL logs by name.

    Raises
    ------
    DataError
        Without functions; when called, if a function gives another number of rewards.
    """
    if not functions:
        raise DataError("no reward function", "give at least one")
    rewards, names = _Rewards(functions), list(map(reward_name, functions))
    out = []
    for index, name in enumerate(names):
        number = names[: index + 1].count(name)
        unique = name if names.count(name) == 1 else f"{name}_{number}"
        out.append(JointReward(rewards, index, unique))
    return out


def reward_name(function: RewardCallable) -> str:
    """What TRL logs a reward function as."""
    return str(getattr(function, "__name__", type(function).__name__))


def is_reward(value: float | None) -> bool:
    """Whether this is a finite number."""
    return value is not None and math.isfinite(value)


def weighted_sum(
    functions: Sequence[RewardCallable], weights: Sequence[float] | None = None
) -> RewardCallable:
    """One reward function from several: the weighted sum, None where any part is missing.

    Parameters
    ----------
    functions : sequence of callable
        As in :func:`joint_rewards`.
    weights : sequence of float, optional
        Default: all 1.

    Raises
    ------
    DataError
        Without functions, or with another number of weights.
    """
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if not functions or len(weights) != len(functions):
        raise DataError(f"{len(functions)} reward functions and {len(weights)} weights")
    return _WeightedSum(list(functions), weights)


class _WeightedSum:
    __name__ = "weighted_sum"

    def __init__(self, functions: list[RewardCallable], weights: list[float]) -> None:
        self.functions = functions
        self.weights = weights

    def __call__(self, prompts: Any, completions: Any, **arguments: Any) -> list[float | None]:
        columns = [
            function(prompts=prompts, completions=completions, **arguments)
            for function in self.functions
        ]
        return [
            sum(w * value for w, value in zip(self.weights, row, strict=True))  # type: ignore[operator]
            if all(map(is_reward, row))
            else None
            for row in zip(*columns, strict=True)
        ]
