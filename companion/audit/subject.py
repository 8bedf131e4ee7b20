"""What is audited: a model here or an endpoint, by what it can be asked. Chapter 9.

A subject is asked as its users ask it. A model here runs by its own forward, with the padding and
the mask that its tokenizer makes, not by the companion's, which reads by the mask and refuses most
of what an audit is to find.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from companion.errors import CompanionError, DataError
from companion.formatting import RewardFormatter, Row
from companion.models.manifest import RewardManifest

#: ``ids``: token ids; ``rows``: prompts and completions, or messages, that the target formats;
#: ``tokenizer``, ``config``, ``weights``: the files behind it; ``padding``: a batch is padded as
#: the asker says (side, pad id, mask); ``threads``: one model object for several threads
Ability = Literal["ids", "rows", "tokenizer", "config", "weights", "padding", "threads"]
#: with these, rows are encoded here
WITH_IDS: Final[frozenset[Ability]] = frozenset({"ids", "tokenizer"})


class BudgetSpent(CompanionError):
    """No tokens or requests are left for this check."""


@dataclass(frozen=True)
class Batch:
    """Texts for one call.

    Attributes
    ----------
    ids : sequence of sequences of int
        Token ids, a text each, without padding.
    side : {"right", "left"}, optional
        Of the padding; default: the tokenizer's.
    pad_id : int, optional
        What fills; default: the tokenizer's pad token.
    masked : sequence of int, optional
        Of each text how many of its last tokens the mask hides.
    """

    ids: Sequence[Sequence[int]]
    side: Literal["right", "left"] | None = None
    pad_id: int | None = None
    masked: Sequence[int] | None = None


class Subject(ABC):
    """A target that checks ask.

    Attributes
    ----------
    name : str
        The folder, hub id or URL as it was given.
    what : {"folder", "model", "endpoint"}
    abilities : frozenset of str
    tokenizer, config : Any or None
    model : Any or None
        The loaded module of a folder or a model; None of an endpoint.
    kind : {"scalar", "outcome", "process"}
        Of a model with a value for each token the score is that at the last one.
    manifest : RewardManifest or None
    formatter : RewardFormatter or None
        The recipe of the manifest; without one that of the tokenizer.
    dtype : str
        In which the target computes, as far as is known: ``float32``, ``bfloat16``, …
    tokens, requests : int
        Spent so far.
    max_tokens, max_requests : int or None
        What may be spent.
    """

    name: str
    what: Literal["folder", "model", "endpoint"]
    abilities: frozenset[Ability]
    tokenizer: Any = None
    config: Any = None
    model: Any = None
    kind: str = "scalar"
    manifest: RewardManifest | None = None
    formatter: RewardFormatter | None = None
    dtype: str = "float32"
    tokens: int = 0
    requests: int = 0
    max_tokens: int | None = None
    max_requests: int | None = None

    @property
    def exact(self) -> Subject:
        """The same target where rounding hides least: a model here in float32."""
        return self

    @abstractmethod
    def call(self, batch: Batch) -> np.ndarray:
        """Scores ``[N]`` float64 of one call: all texts of the batch together.

        Raises
        ------
        BudgetSpent
            If the batch would go beyond what may be spent; nothing was asked then.
        ServiceError
            If an endpoint refuses, or is gone.
        """

    @abstractmethod
    def call_rows(self, rows: Sequence[Row]) -> np.ndarray:
        """The same of rows that the target formats itself (``rows`` in its abilities)."""

    @abstractmethod
    def alone(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores ``[N]`` of each text in a call of its own; a text is asked once in an audit."""

    def rows_alone(self, rows: Sequence[Row]) -> np.ndarray:
        """Scores ``[N]`` of rows that the target formats, each in a call of its own."""
        return np.array([self.call_rows([row])[0] for row in rows], dtype=np.float64)

    def encode_rows(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of rows.

        Raises
        ------
        CompanionError
            If the formatter, or the chat template, refuses one.
        """
        try:
            return [self.encode(row) for row in rows]
        except CompanionError:
            raise
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise DataError(f"a row cannot be written as token ids: {error}") from error

    def score_rows(self, rows: Sequence[Row]) -> np.ndarray:
        """Scores ``[N]`` of rows: by their ids where those can be made here, else as rows.

        Raises
        ------
        CompanionError
            If the target, the formatter, or the chat template refuses a row.
        """
        if self.abilities >= WITH_IDS:
            return self.alone(self.encode_rows(rows))
        return self.rows_alone(rows)

    @abstractmethod
    def tolerance(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Most that rounding may move the score of each text, ``[N]``.

        It follows from the dtype, the depth and the size of what is summed; see the class.
        """

    def beyond(
        self, ids: Sequence[Sequence[int]], one: np.ndarray, other: np.ndarray
    ) -> np.ndarray:
        """Of which texts two scores are further apart than :meth:`tolerance`, ``[N]`` bool.

        A score that is not finite differs from one that is.
        """
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        return ~(same | (np.abs(one - other) <= self.tolerance(ids)))

    def differ(
        self, ids: Sequence[Sequence[int]], one: np.ndarray, other: np.ndarray
    ) -> np.ndarray:
        """The same, where each text that is :meth:`beyond` may be looked at once more."""
        return self.beyond(ids, one, other)

    def close(self) -> None:  # noqa: B027 (most have nothing to put back)
        """Leave the target as it was."""

    def encode(self, row: Row) -> list[int]:
        """Token ids of a row as the model's users would make them: by its formatter."""
        raise NotImplementedError
