"""What scoring returns: arrays in input order, and a reason for each row without a score.

Chapter 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from companion.models.manifest import ReferenceStats
from companion.models.readout import TokenReadout


@dataclass
class Scores:
    """Scores of rows, in input order; ``[N]`` arrays.

    Attributes
    ----------
    raw : numpy.ndarray
        float64, the model's scalar; NaN where a row has none. Only differences of raw scores of
        one model mean something.
    n_tokens : numpy.ndarray
        int64, length of each text in tokens; 0 where a row was dropped.
    reasons : list of (str or None)
        Why a row has no score.
    centered, z, percentile : numpy.ndarray or None
        Against the manifest's reference set: minus its mean, in its standard deviations, share of
        it below (0 to 100). None without a reference set.
    """

    raw: np.ndarray
    n_tokens: np.ndarray
    reasons: list[str | None]
    centered: np.ndarray | None = None
    z: np.ndarray | None = None
    percentile: np.ndarray | None = None

    def against(self, reference: ReferenceStats | None) -> Self:
        """Fill in what a reference set gives, if there is one; returns itself."""
        if reference is not None:
            self.centered = reference.centered(self.raw)
            self.z = reference.z(self.raw)
            self.percentile = reference.percentile(self.raw)
        return self

    @property
    def n_dropped(self) -> int:
        """Number of rows without a score."""
        return sum(reason is not None for reason in self.reasons)

    def record(self, i: int) -> dict[str, Any]:
        """What a line of a file says of row `i`, which has a score."""
        found: dict[str, Any] = {"score": float(self.raw[i]), "n_tokens": int(self.n_tokens[i])}
        for name in ("centered", "z", "percentile"):
            values: np.ndarray | None = getattr(self, name)
            if values is not None:
                found[name] = float(values[i])
        return found

    def __len__(self) -> int:
        return len(self.raw)


@dataclass(kw_only=True)
class TokenScores(Scores):
    """Scores of an outcome or process model, with the values they are made of. Chapter 3.

    ``raw`` is the aggregate of each text's values.

    Attributes
    ----------
    values : list of (numpy.ndarray or None)
        Of each text, the values in [0, 1] that were aggregated: one a completion token (outcome),
        or one a step (process).
    wrong : list of (numpy.ndarray or None)
        P(wrong) at the same places. With one label it is 1 − value.
    logits : list of (numpy.ndarray or None)
        ``[places, labels]`` each, what both are made of.
    places : list of (list of int or None)
        Where they stand in the text's token ids.
    readout : TokenReadout
        How they were read.
    """

    values: list[np.ndarray | None]
    wrong: list[np.ndarray | None]
    logits: list[np.ndarray | None]
    places: list[list[int] | None]
    readout: TokenReadout

    def first_errors(self, threshold: float = 0.5) -> list[int | None]:
        """Index of the first step (or token) whose P(wrong) is above the threshold, or None."""
        return [_first_above(wrong, threshold) for wrong in self.wrong]

    def record(self, i: int) -> dict[str, Any]:
        """What a line of a file says of row `i`, which has a score.

        The score; of an outcome model ``token_scores``, of a process model ``step_scores``,
        ``step_wrong`` (P(wrong) of each step) and ``first_error``: the index of the first step
        whose P(wrong) is above the threshold of the manifest, or None.
        """
        values, wrong = self.values[i], self.wrong[i]
        assert values is not None
        assert wrong is not None
        if self.readout.kind == "outcome":
            return {**super().record(i), "token_scores": values.tolist()}
        return {
            **super().record(i),
            "step_scores": values.tolist(),
            "step_wrong": wrong.tolist(),
            "first_error": _first_above(wrong, self.readout.threshold),
        }


def _first_above(wrong: np.ndarray | None, threshold: float) -> int | None:
    above = [] if wrong is None else np.flatnonzero(wrong > threshold).tolist()
    return above[0] if above else None


@dataclass
class PairScores:
    """Raw scores of pairs, in input order; ``[N]`` arrays, NaN (tokens: 0) where a pair has none.

    A pair is dropped as a whole: ``reasons[i]`` says why.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    reasons: list[str | None]

    @property
    def kept(self) -> np.ndarray:
        """``[N]`` bool: pairs that have scores."""
        return np.array([reason is None for reason in self.reasons], dtype=bool)

    @property
    def n_dropped(self) -> int:
        """Number of pairs without scores."""
        return sum(reason is not None for reason in self.reasons)

    def __len__(self) -> int:
        return len(self.chosen)
