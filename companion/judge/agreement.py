"""How far two who label the same rows agree, beyond what chance would give. Chapter 3.

scikit-learn's ``cohen_kappa_score`` computes the same figure, and the tests compare with it; it is
no dependency of the companion, and thousands of resamples want a function of codes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from companion.errors import DataError, ShapeError
from companion.resampling import bootstrap_interval

Codes = npt.NDArray[np.int64]
#: The verdicts of a pair, in the order of their codes.
VERDICTS: Final = ("a", "b", "tie")


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's κ (1960): (p_o − p_e) / (1 − p_e).

    p_o is the share of rows on which both agree, p_e the share on which they would if each kept
    their own frequencies and labelled at random. 1 is perfect, 0 is chance. Chapter 3.

    Parameters
    ----------
    first, second : sequence ``[n]``
        The labels of each; any values that compare.

    Returns
    -------
    float
        NaN if both give one and the same label to all rows: chance alone then explains everything.

    Raises
    ------
    ShapeError
        If the lengths differ or there are no rows.
    """
    if len(first) != len(second) or not len(first):
        raise ShapeError(f"{len(first)} and {len(second)} labels; κ needs as many, and some")
    names = {label: code for code, label in enumerate(dict.fromkeys([*first, *second]))}
    codes = np.array([[names[x], names[y]] for x, y in zip(first, second, strict=True)])
    return _kappa(codes, len(names))


def _kappa(codes: npt.NDArray[Any], size: int) -> float:
    cells = np.bincount(size * codes[:, 0] + codes[:, 1], minlength=size * size)
    table = cells.reshape(size, size) / len(codes)
    expected = float(table.sum(axis=1) @ table.sum(axis=0))
    if 1 - expected < 1e-12:
        return float("nan")
    return (float(np.trace(table)) - expected) / (1 - expected)


def verdict_codes(verdicts: Sequence[str | None]) -> Codes:
    """``[n]`` codes in the order of :data:`VERDICTS`; −1 for None and ``none``."""
    table: dict[str | None, int] = {None: -1, "none": -1}
    table.update({name: i for i, name in enumerate(VERDICTS)})
    try:
        return np.array([table[verdict] for verdict in verdicts], dtype=np.int64)
    except KeyError as error:
        raise DataError(f"no verdict {error.args[0]!r}", "write a, b, tie or none") from error


def agreement(first: Codes, second: Codes, groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Agreement of two on the rows that both labelled.

    Parameters
    ----------
    first, second : int64 array ``[n]``
        Codes of :func:`verdict_codes`; rows with a −1 are left out.
    groups : sequence ``[n]``
        The prompt of each row; intervals draw whole prompts.
    seed : int
        Of the resampling.

    Returns
    -------
    dict
        ``n``; ``agreement`` and ``kappa`` over a, b and tie, each with ``…_interval`` (95%);
        ``n_decided`` and ``agreement_decided`` where neither says tie; ``table``, the counts,
        first by second. Figures without rows are None.
    """
    both = (first >= 0) & (second >= 0)
    codes = np.stack([first[both], second[both]], axis=1)
    out: dict[str, Any] = {"n": len(codes), "left_out": int((~both).sum())}
    if not len(codes):
        return out | {"agreement": None, "kappa": None}
    kept = [group for group, keep in zip(groups, both, strict=True) if keep]
    same = (codes[:, 0] == codes[:, 1]).astype(np.float64)
    kappa = _kappa(codes, len(VERDICTS))
    decided = (codes < 2).all(axis=1)
    table = np.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9).reshape(3, 3)
    return out | {
        "agreement": float(same.mean()),
        "agreement_interval": tuple(bootstrap_interval(same, kept, seed=seed)),
        "kappa": None if np.isnan(kappa) else kappa,
        "kappa_interval": kappa_interval(codes, kept, seed=seed),
        "n_decided": int(decided.sum()),
        "agreement_decided": float(same[decided].mean()) if decided.any() else None,
        "table": table.tolist(),
    }


def kappa_interval(
    codes: npt.NDArray[Any], groups: Sequence[str], *, seed: int = 0, n_resamples: int = 1000
) -> tuple[float, float] | None:
    """95% percentile interval of κ; None where a resample has no κ (all rows alike)."""
    low, high = bootstrap_interval(
        codes,
        groups,
        statistic=lambda drawn: _kappa(drawn, len(VERDICTS)),
        seed=seed,
        n_resamples=n_resamples,
    )
    return None if np.isnan(low) or np.isnan(high) else (low, high)
