"""What is watched, against what, and how often it may cry wolf. Chapter 7.

The reference is labelled pairs of the model as it was released, on prompts that it did not train
on. What they say is itself an estimate, so that the alarms are not held against the estimates but
against all values that their confidence limits leave open: an alarm comes when, of each of these,
reference and labels together have shown that both cannot be right. (For one true value, e-values of
two independent samples multiply; the least product over all values is no larger than its own.) The
chance that a limit is wrong is paid from the same alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from scipy import stats

from companion.errors import DataError
from companion.functional.betting import TUNED, by_group, evidence_above, mean_lower_limit
from companion.functional.calibration import confidence_and_correctness, inverse_temperature_limits
from companion.functional.resampling import Array

#: shares of alpha: what is not asked (no slices, no temperature) goes to the others
SHARES: Final = {"accuracy": 0.4, "calibration": 0.4, "slices": 0.2}
#: of a test's alpha, what is paid for the reference's limit; the rest is the bettor's
LIMIT_SHARE: Final = 0.5
#: bins of the confidence in which the calibration is bet on, beside all of it together
BINS: Final = 3
#: into how many parts the values from a limit to the estimate are cut
PARTS: Final = 10
#: fewer prompts than this make no reference
FEWEST: Final = 100


@dataclass
class Level:
    """An accuracy of the reference.

    Attributes
    ----------
    n, prompts : int
        Pairs, and the prompts that they belong to.
    mean : float
        Each prompt counts once.
    limit : float
        Lower confidence limit of the mean.
    tolerance : float
        A fall that is not worth an alarm.
    alpha : float
        Of the bettor: the alarm is at 1 / alpha.
    open : list of float
        Accuracies that the reference leaves open, from the limit on; each stands for all up to the
        next. The limit alone, if not given.
    log_e : list of float
        Log of the reference's e-value against each: that the true one is as low as that.
    """

    n: int
    prompts: int
    mean: float
    limit: float
    tolerance: float
    alpha: float
    open: list[float] = field(default_factory=list)
    log_e: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.open:
            self.open, self.log_e = [self.limit], [0.0]

    @property
    def null(self) -> float:
        """Accuracies from here on are no fall."""
        return self.limit - self.tolerance

    @property
    def nulls(self) -> Array:
        """The same for each accuracy that the reference leaves open."""
        return np.asarray(self.open) - self.tolerance


@dataclass
class Calibration:
    """What margins of the reference mean.

    Attributes
    ----------
    temperature : float
        The model's own, at which its probabilities are read.
    inverse : (float, float, float)
        1/T as the reference pairs have it, and its limits; the lower one is where overconfidence
        begins.
    edges : list of float
        Inner edges of the bins of the confidence.
    tolerance : float
        An error of a probability that is not worth an alarm; at least what the reference itself
        shows, if sigmoid(margin / T) does not fit it at any T.
    alpha : float
        As in :class:`Level`.
    open : list of list of float
        1/T that the reference leaves open: from the lower limit upwards, to show overconfidence,
        and from the upper one downwards, to show underconfidence. The limits, if not given.
    log_e : list of list of float
        As in :class:`Level`.
    """

    temperature: float
    inverse: tuple[float, float, float]
    edges: list[float]
    tolerance: float
    alpha: float
    open: list[list[float]] = field(default_factory=list)
    log_e: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.open:
            self.open = [[float(limit)] for limit in self.inverse[1:]]
            self.log_e = [[0.0], [0.0]]


@dataclass
class Plan:
    """What `companion monitor init` writes; plain data.

    Attributes
    ----------
    model : str
        Its folder, id or name.
    model_version : str
        See :class:`companion.models.Identity`; scores of another version are refused.
    alpha : float
        Chance that a model that has not changed is ever called worse.
    accuracy : Level or None
        None for a model of a kind that scores no pairs: only its golden texts and its traffic are
        watched.
    calibration : Calibration or None
        None for a model without a fitted temperature.
    slices : dict of str to Level
    source : str
        Which pairs the reference is, in words.
    sampling : str
        The rule by which pairs must have been chosen to be bet on.
    prompts : list of str
        Those of the reference. Labels of the same prompts are no second sample, and are not taken.
    promise : list of dict
        What the planner said; see :func:`companion.monitoring.promise`.
    golden : dict or None
        The golden texts of the model as it was when the watching began.
    scale : dict or None
        The manifest's reference: mean, standard deviation and quantiles of raw scores.
    notes : list of str
    """

    model: str
    model_version: str
    alpha: float
    accuracy: Level | None = None
    calibration: Calibration | None = None
    slices: dict[str, Level] = field(default_factory=dict)
    source: str = ""
    sampling: str = "random"
    prompts: list[str] = field(default_factory=list)
    promise: list[dict[str, Any]] = field(default_factory=list)
    golden: dict[str, Any] | None = None
    scale: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Plan:
        """Read what :meth:`to_dict` wrote."""
        found = dict(plain)
        if found["accuracy"] is not None:
            found["accuracy"] = Level(**found["accuracy"])
        if found["calibration"] is not None:
            own = found["calibration"]
            found["calibration"] = Calibration(**{**own, "inverse": tuple(own["inverse"])})
        found["slices"] = {name: Level(**one) for name, one in found["slices"].items()}
        return cls(**found)


def rightness(margins: Array, outcome: Array) -> Array:
    """Whether the model orders each pair as the label does: 1, 0, or 0.5 where either is tied.

    Parameters
    ----------
    margins : array ``[n]``
        Score of the first minus that of the second.
    outcome : array ``[n]``
        1 if the first was preferred, 0 if the second, 0.5 for a tie.
    """
    first = np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))
    return np.where(outcome == 0.5, 0.5, np.where(outcome > 0.5, first, 1 - first))


def make_plan(
    margins: Array,
    outcome: Array,
    prompts: Sequence[str],
    *,
    model: str,
    model_version: str,
    temperature: float | None,
    slices: Sequence[str | None] | None = None,
    alpha: float = 0.01,
    accuracy_tolerance: float = 0.0,
    calibration_tolerance: float = 0.01,
    source: str = "",
) -> Plan:
    """A plan from the scores of labelled reference pairs.

    Parameters
    ----------
    margins, outcome : array ``[n]``
        As in :func:`rightness`, raw margins.
    prompts : sequence of str ``[n]``
        Pairs of one prompt are not independent.
    model, model_version, source : str
    temperature : float or None
        At which sigmoid(margin / T) is the model's probability.
    slices : sequence ``[n]``, optional
        A slice with fewer than a hundred prompts is not bet on.
    alpha : float
    accuracy_tolerance, calibration_tolerance : float
        What is not worth an alarm.

    Raises
    ------
    DataError
        For too few pairs, or an alpha or a tolerance out of range.
    """
    if not 0 < alpha < 0.5:
        raise DataError(f"alpha is {alpha}", "use a chance between 0 and 0.5, such as 0.01")
    for tolerance in (accuracy_tolerance, calibration_tolerance):
        if not 0 <= tolerance < 0.25:
            raise DataError(f"a tolerance is {tolerance}", "use a share such as 0.01")
    right = rightness(margins, outcome)
    groups = np.asarray(prompts, dtype=object)
    found = len(set(prompts))
    if found < FEWEST:
        raise DataError(
            f"{found} prompts are no reference; {FEWEST} are the least",
            "label more pairs: what the planner promises grows with them",
        )
    notes = []
    names = np.asarray([None] * len(right) if slices is None else list(slices), dtype=object)
    kept = []
    for name in sorted({str(name) for name in names if name is not None}):
        size = len(set(groups[names == name]))
        if size >= FEWEST:
            kept.append(name)
        else:
            notes.append(f"slice {name}: {size} prompts, fewer than {FEWEST}: it is not bet on")
    asked = {"accuracy"} | ({"calibration"} if temperature else set())
    asked |= {"slices"} if kept else set()
    whole = sum(SHARES[name] for name in asked)
    own = {name: alpha * SHARES[name] / whole for name in asked}

    def level(chosen: Any, share: float) -> Level:
        means = by_group(right[chosen], list(groups[chosen]))
        limit = mean_lower_limit(means, share * LIMIT_SHARE)
        points, log_e = _left_open(
            limit, max(float(means.mean()), limit), lambda levels: evidence_above(means, levels)
        )
        return Level(
            int(np.sum(chosen)),
            means.size,
            float(means.mean()),
            limit,
            accuracy_tolerance,
            share * (1 - LIMIT_SHARE),
            points,
            log_e,
        )

    calibration = None
    if temperature:
        share = own["calibration"] / 2  # it may err on two sides
        best, low, high = inverse_temperature_limits(
            margins, outcome, prompts, alpha=share * LIMIT_SHARE
        )
        confidence, _ = confidence_and_correctness(margins / temperature)
        edges = np.quantile(confidence, np.arange(1, BINS) / BINS)
        if not low <= 1 / temperature <= high:
            notes.append(
                f"the reference pairs ask for a temperature of {1 / best:.3g} where the model has "
                f"{temperature:.3g}: its probabilities are off already, and are held against the "
                "reference"
            )
        # (the limits are those of a normal estimate, and so is what is said within them)
        error = (high - best) / float(stats.t.isf(share * LIMIT_SHARE, found - 1))
        sides = [
            _left_open(end, best, lambda values: _normal_evidence(np.abs(values - best) / error))
            for end in (low, high)
        ]
        calibration = Calibration(
            temperature,
            (best, low, high),
            edges.tolist(),
            calibration_tolerance,
            2 * share * (1 - LIMIT_SHARE),
            [side[0] for side in sides],
            [side[1] for side in sides],
        )
        misfit = _misfit(margins, right, confidence, calibration)
        if misfit > calibration_tolerance:
            calibration.tolerance = misfit
            notes.append(
                f"sigmoid(margin / T) is off by {misfit:.3f} in a part of the reference at any T: "
                "an error of probability up to that is not called one"
            )
    else:
        notes.append("the model has no fitted temperature: its calibration is not watched")
    return Plan(
        model,
        model_version,
        alpha,
        level(np.ones(len(right), dtype=bool), own["accuracy"]),
        calibration,
        {name: level(names == name, own["slices"] / len(kept)) for name in kept},
        source,
        prompts=sorted(set(prompts)),
        notes=notes,
    )


def _left_open(limit: float, best: float, evidence: Any) -> tuple[list[float], list[float]]:
    """Values from the limit to the estimate, and of each part the least that speaks against it.

    Half a stake is kept, so that no value has more than log 2 in its favour: the last part holds
    all values beyond the estimate too.
    """
    points = np.linspace(limit, best, PARTS + 1)
    against = np.logaddexp(0.0, evidence(points[1:])) - np.log(2)
    against[-1] = -np.log(2)
    return points[:-1].tolist(), against.tolist()


def _normal_evidence(distance: Array) -> Array:
    """Log likelihood ratio of a mean of ``TUNED`` standard errors to none."""
    return np.asarray(TUNED * distance - TUNED**2 / 2)


def shortfalls(
    margin: Array, right: Array, low: Any, high: Any, tolerance: float
) -> tuple[Array, Array]:
    """How far outcomes fall short of the least, and exceed the most, that the null allows.

    Parameters
    ----------
    margin, right : array ``[...]``
        Raw margins; 1, 0.5 or 0 as in :func:`rightness`.
    low, high : float, or arrays that fit
        The limits of 1/T.
    tolerance : float, or an array that fits

    Returns
    -------
    (ndarray ``[...]``, ndarray ``[...]``)
        Means at most 0 if the probability of being right lies between those of the two limits of
        1/T, give or take the tolerance.
    """
    least = 1 / (1 + np.exp(-np.abs(margin) * low)) - tolerance
    most = np.minimum(1 / (1 + np.exp(-np.abs(margin) * high)) + tolerance, 1.0)
    return least - right, right - most


def _misfit(margins: Array, right: Array, confidence: Array, calibration: Calibration) -> float:
    """By how much a bin of the reference itself is outside the limits, where that is no noise."""
    _, low, high = calibration.inverse
    places = np.searchsorted(calibration.edges, confidence)
    most = 0.0
    for side in shortfalls(margins, right, low, high, 0.0):
        for place in range(BINS):
            own = side[places == place]
            if own.size > 1 and own.mean() > 3 * own.std() / np.sqrt(own.size):
                most = max(most, float(own.mean()))
    return most
