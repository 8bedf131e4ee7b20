"""Texts that nearly repeat another, among many: shingles, and where to look for them. Chapter 9.

Two texts are alike if their sets of three words in a row (shingles) share 80% of what either holds
(Broder, 1997, 'On the resemblance and containment of documents'). Of 200,000 texts not all pairs
can be compared: a sketch of each, 16 numbers, says which are worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

#: Jaccard similarity of two sets of shingles from which a text repeats another.
ALIKE: Final = 0.8
_SHINGLE: Final = 3
_MULTIPLIERS: Final = np.array(
    (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93), np.uint64
)
#: Numbers in a sketch. Two texts of similarity s share a band of four minima with 1 − (1 − s⁴)¹⁶:
#: 99.98% at 0.8, one in 600 at 0.1.
BANDS: Final = 16
_ROWS: Final = 4
_SEEDS: Final = np.random.default_rng(1997).integers(
    0, 2**64, BANDS * _ROWS, dtype=np.uint64, endpoint=False
)


def shingles(units: Sequence[int]) -> Hashes:
    """Hashes ``[n]`` of three units in a row, each once, ascending.

    Parameters
    ----------
    units : sequence of int
        Words or tokens as numbers from 0 on. Fewer than three are one shingle.
    """
    ids = np.array(units if len(units) else [-1], dtype=np.int64).astype(np.uint64)
    ids += np.uint64(1)
    size = min(_SHINGLE, len(ids))
    mixed = np.zeros(len(ids) - size + 1, np.uint64)
    for place in range(size):
        mixed += ids[place : len(mixed) + place] * _MULTIPLIERS[place]
    return np.unique(mixed)


def jaccard(a: Hashes, b: Hashes) -> float:
    """Similarity of two sets of shingles, in [0, 1]."""
    both = np.intersect1d(a, b, assume_unique=True).size
    return both / (a.size + b.size - both)


def sketch(hashes: Hashes) -> Hashes:
    """16 numbers, of which two texts that are alike share one (MinHash in bands; Broder 1997).

    Parameters
    ----------
    hashes : uint64 array ``[n]``
        Of :func:`shingles`.
    """
    mixed = hashes[:, None] ^ _SEEDS
    for multiplier in _MULTIPLIERS[:2]:  # (the finaliser of SplitMix64, whose order is random)
        mixed ^= mixed >> np.uint64(31)
        mixed *= multiplier
    minima = (mixed ^ (mixed >> np.uint64(31))).min(axis=0)
    bands: Hashes = (minima.reshape(BANDS, _ROWS) * _MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    return bands


def likely_pairs(sketches: Hashes, others: Hashes | None = None) -> npt.NDArray[np.int64]:
    """Which texts to compare, by their sketches.

    Parameters
    ----------
    sketches : uint64 array ``[n, 16]``
    others : uint64 array ``[m, 16]``, optional
        Default: `sketches` too; a text is then not compared with itself.

    Returns
    -------
    int64 array ``[k, 2]``
        Places in both, ascending; at most 32 for each of `sketches`: of those that share a band the
        first and the last, so that texts of one pattern do not make a square of comparisons.
    """
    own = others is None
    others = sketches if others is None else others
    codes = np.empty(0, np.int64)
    for band, other in zip(sketches.T, others.T, strict=True):
        order = np.argsort(other, kind="stable")
        ordered = other[order]
        low, high = (np.searchsorted(ordered, band, side) for side in ("left", "right"))
        here = np.flatnonzero(low < high)
        both = np.concatenate([here, here]), order[np.concatenate([low[here], high[here] - 1])]
        new = (both[0] * len(others) + both[1])[both[0] != both[1] if own else ...]
        codes = np.union1d(codes, new)
    return np.column_stack(np.divmod(codes, len(others)))
