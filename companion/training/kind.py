"""What a kind of training is, and the kinds that there are.

A new kind is one file, with its settings, rows, batches, trainer and a :class:`Kind` named
``KIND``, and one line in :data:`KINDS`; ``companion train`` then knows it. The file is imported
when the kind is asked for. Chapter 3.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from companion.errors import CompanionError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from companion.evaluation.evaluation import Evaluation
    from companion.models.manifest import RewardManifest
    from companion.training.config import RowArguments
    from companion.training.trainer import ExactTrainer

    E = TypeVar("E", bound=Evaluation)
else:
    E = TypeVar("E")

#: kind -> the module whose ``KIND`` it is, and what it trains
KINDS: dict[str, tuple[str, str]] = {
    "pairwise": (
        "companion.training.pairwise",
        "a score from pairs, chosen against rejected (Bradley–Terry)",
    ),
    "kwise": (
        "companion.training.kwise",
        "a score from rankings of K completions of a prompt (Plackett–Luce)",
    ),
    "outcome": (
        "companion.training.outcome",
        "the probability that a solution is right, at every token (ORM)",
    ),
    "process": (
        "companion.training.process",
        "whether each step of a solution is good, at its end (PRM)",
    ),
}


@dataclass(frozen=True)
class Kind(Generic[E]):
    """All that :func:`companion.training.train` has to know of a kind.

    Attributes
    ----------
    trainer : subclass of ExactTrainer
        How rows become token ids, batches and a table of figures, what the head gives, how that is
        read, and the class of the settings.
    rows : str
        Kind of the rows, of those in :mod:`companion.data.formats`.
    scored : callable
        ``scored(given, rows, predictions, manifest)``: the evaluation, not yet measured, of n
        held-out rows as loaded, the same as tokenised, and what ``predict`` gives of them. The
        manifest says what was calibrated, if anything was by then.
    data : type
        Class of the arguments that say which rows to train on.
    """

    trainer: type[ExactTrainer]
    rows: str
    scored: Callable[
        [Sequence[Mapping[str, Any]], Dataset, np.ndarray[Any, Any], RewardManifest], E
    ]
    data: type[RowArguments]


def load_kind(name: str) -> Kind[Any]:
    """The kind of this name.

    Raises
    ------
    CompanionError
        If there is none.
    """
    if name not in KINDS:
        raise CompanionError(
            f"there is no training of the kind {name!r}", f"there are: {', '.join(KINDS)}"
        )
    kind: Kind[Any] = importlib.import_module(KINDS[name][0]).KIND
    return kind
