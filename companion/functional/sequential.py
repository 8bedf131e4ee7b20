"""When to stop: has the held-out score truly fallen, or is it noise? Chapter 5.

A run looks at the held-out score many times and remembers the best of them. Both make false alarms:
the best of several noisy means is too high, and the next one is lower even if nothing has changed.
So a fall is called one only if it is significant against *every* choice of the earlier look that
noise could have made for us: a one-sided paired test at level alpha divided by the number of pairs
of looks. The chance that a run whose true score never falls is ever stopped is then at most alpha.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from companion.errors import DataError, ShapeError
from companion.functional.resampling import Array

#: Fewer prompts than this have no distribution of their mean to speak of.
FEWEST_PROMPTS = 8


@dataclass(frozen=True)
class Fall:
    """What one look at the held-out score says.

    Attributes
    ----------
    look, best : int
        This look, and the best so far: the last that was better than the best before it.
    change : float
        Mean of this look minus mean of the best, on the prompts that have both; at most 0.
    p_value : float
        Of the one-sided paired t test that the score has not fallen; 1 for the best look itself.
    level : float
        The p-value below which it is a fall.
    fallen : bool
    """

    look: int
    best: int
    change: float
    p_value: float
    level: float
    fallen: bool


class FallTest:
    """Tells a held-out score that has fallen from its best from one that looks so.

    Parameters
    ----------
    looks : int
        How often the run will look in all, the look before the first step included. More looks than
        that are an error: their false alarms were not paid for.
    alpha : float
        Chance of ever stopping a run whose expected score has never been higher than it is now.

    Notes
    -----
    The same prompts must be scored at each look; the test is on the differences prompt by prompt.
    Several completions of a prompt are averaged first. With K looks there are K(K − 1)/2 pairs of
    an earlier and a later one, and each is given alpha / (K(K − 1)/2) (Bonferroni). Whichever
    earlier look is taken as the best, its pair is among them.

    Raises
    ------
    DataError
        For fewer than two looks, or an alpha outside (0, 1).
    """

    def __init__(self, looks: int, alpha: float = 0.05) -> None:
        if looks < 2:
            raise DataError(f"looks is {looks}", "look at least twice: before the run and after")
        if not 0 < alpha < 1:
            raise DataError(f"alpha is {alpha}", "use a probability inside (0, 1)")
        self.looks = looks
        self.alpha = alpha
        self.history: list[Array] = []
        self.best = 0

    @property
    def level(self) -> float:
        """What a p-value is held against."""
        return self.alpha / (self.looks * (self.looks - 1) / 2)

    def add(self, values: npt.ArrayLike) -> Fall:
        """Take the scores of one look and say whether they have fallen.

        Parameters
        ----------
        values : array ``[n]``
            A score for each prompt; NaN where there is none.

        Raises
        ------
        ShapeError
            If the number of prompts differs from before.
        DataError
            For a look beyond `looks`, or one that shares fewer than eight scored prompts with the
            best.
        """
        scores = np.asarray(values, dtype=np.float64)
        if scores.ndim != 1 or (self.history and scores.shape != self.history[0].shape):
            raise ShapeError(f"scores of shape {list(scores.shape)}: one for each prompt is wanted")
        if len(self.history) == self.looks:
            raise DataError(
                f"this is look {self.looks + 1}, and {self.looks} were planned",
                "make a FallTest with more looks",
            )
        if np.isfinite(scores).sum() < FEWEST_PROMPTS:
            raise DataError(
                f"only {int(np.isfinite(scores).sum())} prompts have a held-out score",
                f"give at least {FEWEST_PROMPTS}, and see why the others have none",
            )
        self.history.append(scores)
        look = len(self.history) - 1
        if look == 0:
            return Fall(0, 0, 0.0, 1.0, self.level, False)
        # prompt by prompt: a mean over what is left rises where bad completions lose their score
        change, p_value = paired_fall(self.history[self.best], scores)
        if change > 0:
            self.best = look
            return Fall(look, look, 0.0, 1.0, self.level, False)
        return Fall(look, self.best, change, p_value, self.level, p_value < self.level)


def paired_fall(before: Array, after: Array) -> tuple[float, float]:
    """Mean change and its one-sided p-value, on the prompts that are finite in both.

    Raises
    ------
    DataError
        If there are fewer than eight of them.
    """
    both = np.isfinite(before) & np.isfinite(after)
    if both.sum() < FEWEST_PROMPTS:
        raise DataError(
            f"only {int(both.sum())} prompts have a held-out score in both looks",
            f"give at least {FEWEST_PROMPTS}, and see why the others have none",
        )
    change = after[both] - before[both]
    if np.ptp(change) == 0:  # no spread: certain, or nothing at all
        return float(change[0]), 0.0 if change[0] < 0 else 1.0
    return float(change.mean()), float(stats.ttest_1samp(change, 0.0, alternative="less").pvalue)
