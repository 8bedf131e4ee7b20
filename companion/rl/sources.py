"""From a name to a scorer: a reward model's folder or hub id, a server, or a function of yours.

Chapter 5.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Literal

from companion.errors import CompanionError, DataError
from companion.rl.reward_function import RewardFunction, Transform
from companion.rl.several import RewardCallable
from companion.scoring.remote import Protocol, RemoteScorer, is_url

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def open_reward(
    source: str,
    *,
    transform: Transform = "raw",
    clip: float | None = None,
    truncated: Literal["score"] | float | None = "score",
    eos_token_ids: Sequence[int] | None = None,
    protocol: Protocol = "classify",
) -> RewardCallable:
    """A reward function, as TRL calls them, from its name.

    Parameters
    ----------
    source : str
        A folder or hub id of a reward model; ``http://host:port#MODEL``, a server and the folder or
        hub id of the model that it runs, whose formatter makes the token ids here; or
        ``module:function``, called as ``f(prompts=, completions=, completion_ids=, **columns)``.
    transform, clip, truncated, eos_token_ids
        As in :class:`companion.rl.reward_function.RewardFunction`. A function of yours is taken as
        it is.
    protocol : {"classify", "companion"}
        As in :class:`companion.scoring.RemoteScorer`.

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
        scorer: RemoteScorer | str = RemoteScorer.from_pretrained(url, model, protocol=protocol)
        name = model
    elif _FUNCTION.fullmatch(source):
        return _function(source)
    else:
        scorer, name = source, source
    last = re.sub(r"\W+", "_", name.rstrip("/").rsplit("/", 1)[-1])
    return RewardFunction(
        scorer,
        transform=transform,
        clip=clip,
        truncated=truncated,
        eos_token_ids=eos_token_ids,
        name=f"reward_{last}",
    )


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
