"""How far annotators agree, and the accuracy that their agreement leaves room for. Chapter 7.

A label is one person's word. Where two who judge the same pair differ, a model can agree with one
of them at most, so agreement bounds accuracy. Codes are integers, one column an annotator: 0 for a,
1 for b, 2 for a tie, −1 where an annotator did not judge the pair. The arithmetic is NumPy float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from companion.errors import DataError, DtypeError, ShapeError
from companion.functional.resampling import bootstrap_interval

Codes = npt.NDArray[np.int64]
#: from this code on, a verdict names no side
_TIE = 2


def _counts(codes: Any) -> npt.NDArray[np.float64]:
    """``[n, c]`` how many annotators gave each item each code."""
    array = np.asarray(codes)
    if array.ndim != 2:
        raise ShapeError(f"codes are of shape {list(array.shape)}", "give [items, annotators]")
    if array.dtype.kind not in "iu":
        raise DtypeError(f"codes are {array.dtype}", "give integers, −1 where nothing was said")
    if array.size and array.min() < -1:
        raise DataError(f"a code is {array.min()}", "give 0 and up, and −1 where nothing was said")
    size = max(int(array.max(initial=0)), _TIE) + 1
    return np.stack([(array == code).sum(axis=1) for code in range(size)], axis=1).astype(float)


def item_agreement(codes: Any) -> npt.NDArray[np.float64]:
    """Of each item, the share of pairs of its annotators who say the same.

    Parameters
    ----------
    codes : int array ``[n, m]``

    Returns
    -------
    float array ``[n]``
        NaN where fewer than two judged.

    Raises
    ------
    ShapeError, DtypeError, DataError
        If the codes are no two-dimensional integers from −1 on.
    """
    return _same(_counts(codes))


def _same(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    many = counts.sum(axis=1)
    pairs = many * (many - 1)
    same = (counts * (counts - 1)).sum(axis=1)
    return np.divide(same, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def krippendorff_alpha(codes: Any) -> float:
    """Krippendorff's α for names: 1 − D_o / D_e, how far annotators agree beyond chance.

    D_o is how often two verdicts on one item differ, D_e how often two verdicts drawn from all do.
    Any number of annotators, and each may have judged other items; an item with one verdict says
    nothing and is left out. 1 is perfect, 0 is chance. (Krippendorff, *Computing Krippendorff's
    Alpha-Reliability*, 2011.)

    Parameters
    ----------
    codes : int array ``[n, m]``

    Returns
    -------
    float
        NaN if no item has two verdicts, or all verdicts are the same.

    Raises
    ------
    ShapeError, DtypeError, DataError
        As :func:`item_agreement`.
    """
    return float(_alpha_of(_parts(_counts(codes)).sum(axis=0)))


def _parts(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``[n, 1 + c]`` what each item adds: how far its verdicts differ, and how many of each."""
    many = counts.sum(axis=1)
    counts, many = counts[many > 1], many[many > 1]
    differ = (many**2 - (counts**2).sum(axis=1)) / (many - 1)
    return np.column_stack([differ, counts])


def _alpha_of(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``[...]`` α of sums ``[..., 1 + c]`` of parts; NaN where all verdicts are the same."""
    differ, each = sums[..., 0], sums[..., 1:]
    total = each.sum(axis=-1)
    expected = total**2 - (each**2).sum(axis=-1)
    nan = np.full_like(expected, np.nan)
    return 1 - np.divide((total - 1) * differ, expected, out=nan, where=expected > 0)


def _alpha_interval(
    counts: npt.NDArray[np.float64], names: Sequence[Any], n_resamples: int = 2000
) -> tuple[float, float] | None:
    """The bootstrap's, over whole groups; None where a resample has no α, or all have the same.

    (As ``bootstrap_interval`` with a statistic, but in products of matrices.)
    """
    from companion.functional.resampling import middle

    kept = list(map(str, compress(names, counts.sum(axis=1) > 1)))
    _, group = np.unique(kept, return_inverse=True)
    parts = _parts(counts)
    sums = np.zeros((int(group.max()) + 1, parts.shape[1]))
    np.add.at(sums, group, parts)
    rng, size = np.random.default_rng(0), len(sums)
    drawn: list[npt.NDArray[np.float64]] = []
    for begin in range(0, n_resamples, 100):
        times = rng.multinomial(size, [1 / size] * size, min(100, n_resamples - begin))
        drawn.append(_alpha_of(times @ sums))
    low, high = middle(np.concatenate(drawn), 0.95)
    return None if math.isnan(low) or low == high else (low, high)


def accuracy_ceiling(agreement: float) -> float:
    r"""The accuracy that agreement :math:`A` of two annotators leaves room for.

    Suppose each says the better side with probability :math:`q`, of itself. Two agree if both are
    right or both wrong, :math:`A = q^2 + (1 - q)^2`, so :math:`q = (1 + \sqrt{2A - 1}) / 2`. A
    model that knows the better side of every pair is right against one annotator's labels with
    :math:`q`; no model can expect more.

    What that takes for granted: annotators are alike (of two who differ, :math:`q - 1/2` is the
    geometric mean of theirs); they err independently (a taste that they share counts as truth); and
    pairs are equally hard. If pairs are not, the formula is too high: with :math:`q_i` of a pair,
    :math:`A = 1/2 + 2\,\overline{(q_i - 1/2)^2}`, and the ceiling, the mean of :math:`q_i`, lies
    anywhere between :math:`A` (some pairs clear, the others a coin) and the formula (all alike).

    Parameters
    ----------
    agreement : float
        In [0, 1], of verdicts that name a side. Below 1/2 the annotators agree less than coins do,
        and the ceiling is 1/2.

    Raises
    ------
    DataError
        If it is no share.
    """
    if not 0 <= agreement <= 1:
        raise DataError(f"agreement is {agreement}", "give a share in [0, 1]")
    return (1 + math.sqrt(max(2 * agreement - 1, 0.0))) / 2


def annotator_agreement(codes: Any, groups: Sequence[Any] | None = None) -> dict[str, Any]:
    """Agreement of all annotators, and the ceiling on accuracy that it allows.

    Parameters
    ----------
    codes : int array ``[n, m]``
        0 for a, 1 for b, 2 for a tie, −1 for nothing.
    groups : sequence ``[n]``, optional
        The prompt of each item; intervals (95%, bootstrap) draw whole prompts.

    Returns
    -------
    dict
        ``n``, the items that two or more judged. ``agreement``, over a, b and tie: the mean of
        :func:`item_agreement`; ``alpha``, :func:`krippendorff_alpha`. ``n_decided``,
        ``agreement_decided``: the same of verdicts that name a side. ``ceiling``:
        :func:`accuracy_ceiling` of that, if all pairs are equally hard; ``ceiling_unequal``, what
        is left of it if they are as unequal as can be. Each with ``…_interval``. A figure, or an
        interval, that the rows do not allow is None: where all agree on everything, resampling has
        nothing to go by.

    Raises
    ------
    ShapeError, DtypeError, DataError
        As :func:`item_agreement`, and if there are not as many groups as items.
    """
    return agreement_of_counts(_counts(codes), groups)


def agreement_of_counts(counts: Any, groups: Sequence[Any] | None = None) -> dict[str, Any]:
    """As :func:`annotator_agreement`, from how many gave each item each code.

    Parameters
    ----------
    counts : array ``[n, 3]``
        How many said a, b and tie.
    groups : sequence ``[n]``, optional
    """
    counts = np.asarray(counts, dtype=np.float64)
    names = range(len(counts)) if groups is None else groups
    if len(names) != len(counts):
        raise ShapeError(f"{len(counts)} items but {len(names)} groups")

    def mean(values: npt.NDArray[np.float64]) -> tuple[int, float | None, Any]:
        kept = ~np.isnan(values)
        if not kept.any():
            return 0, None, None
        ends = tuple(bootstrap_interval(values[kept], list(compress(names, kept))))
        share = float(values[kept].mean())
        return int(kept.sum()), share, ends if ends[0] < ends[1] else None

    n, share, ends = mean(_same(counts))
    n_decided, decided, decided_ends = mean(_same(counts[:, :_TIE]))
    alpha = float(_alpha_of(_parts(counts).sum(axis=0)))
    alpha_ends = None if math.isnan(alpha) else _alpha_interval(counts, names)
    return {
        "n": n,
        "agreement": share,
        "agreement_interval": ends,
        "alpha": None if math.isnan(alpha) else alpha,
        "alpha_interval": alpha_ends,
        "n_decided": n_decided,
        "agreement_decided": decided,
        "agreement_decided_interval": decided_ends,
        "ceiling": None if decided is None else accuracy_ceiling(decided),
        "ceiling_interval": decided_ends and tuple(map(accuracy_ceiling, decided_ends)),
        "ceiling_unequal": None if decided is None else max(decided, 0.5),
        "ceiling_unequal_interval": decided_ends and tuple(max(end, 0.5) for end in decided_ends),
    }


def ceiling_sentence(figures: Mapping[str, Any]) -> str | None:
    """What :func:`annotator_agreement` found of the ceiling, in words; None if it has none."""
    if figures["ceiling"] is None:
        return None
    return (
        f"On {figures['n_decided']:,} pairs at least two took a side, the same one on "
        f"{share_of(figures, 'agreement_decided')}. Measured against one person's labels, a "
        f"model's accuracy can be {share_of(figures, 'ceiling')} at most, if all pairs are equally "
        "hard and people err independently; if some are clear and the others a coin, "
        f"{figures['ceiling_unequal']:.1%} at most."
    )


def share_of(figures: Mapping[str, Any], name: str) -> str:
    """A share with its interval, in percent."""
    ends = figures[f"{name}_interval"]
    text = f"{figures[name]:.1%}"
    return text + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")
