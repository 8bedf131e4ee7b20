"""A policy on held-out prompts: completions, scored by several scorers, and the KL.

One such evaluation in training is called a look.

Chapter 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from companion.errors import DataError
from companion.formatting.conversation import as_reply
from companion.functional.resampling import Array, Interval, bootstrap_interval
from companion.generation.policy import Policy, Sample
from companion.rl.rewards import RewardCallable

KLEstimator = Literal["k1", "k3"]


@dataclass
class Look:
    """What one look found; arrays ``[n]`` hold one value a prompt, the mean over its completions.

    Attributes
    ----------
    step : int
        Optimiser steps taken before the look.
    figures : dict of str to ndarray
        ``kl`` (nats a completion), ``proxy``, ``gold`` and further scorers by their names; NaN for
        a prompt none of whose completions has a score.
    without : dict of str to int
        Completions without a score, for each scorer.
    length : float
        Mean tokens of a completion.
    truncated : float
        Share of the completions that were cut off.
    texts : list of list of str
        The completions of each prompt; empty on ranks other than 0.
    """

    step: int
    figures: dict[str, Array]
    without: dict[str, int]
    length: float
    truncated: float
    texts: list[list[str]] = field(default_factory=list, repr=False)

    def mean(self, name: str) -> float:
        """Mean of a figure over the prompts that have it; NaN if none has."""
        values = self.figures[name]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def interval(self, name: str) -> Interval:
        """95% bootstrap interval of that mean; prompts are drawn."""
        values = self.figures[name]
        finite = values[np.isfinite(values)]
        return bootstrap_interval(finite) if finite.size else Interval(math.nan, math.nan)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without the texts; None in place of NaN."""
        figures = {
            name: [number(value) for value in values] for name, values in self.figures.items()
        }
        return {
            "step": self.step,
            "figures": figures,
            "without": self.without,
            "length": self.length,
            "truncated": self.truncated,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Look:
        """The inverse of :meth:`to_dict`."""
        figures = {
            name: np.array([math.nan if x is None else x for x in values], dtype=np.float64)
            for name, values in saved["figures"].items()
        }
        return cls(saved["step"], figures, saved["without"], saved["length"], saved["truncated"])


@dataclass
class Viewer:
    """How to look: the prompts, the scorers, and how completions are drawn.

    Each rank draws the completions of its share of the prompts; all get all figures. A completion
    depends on its prompt, its number and the seed alone, so looks at two policies differ by the
    policies and not by the dice.

    Parameters
    ----------
    rows : sequence of mappings
        Each with ``prompt`` (text or messages); other columns are handed to the scorers.
    scorers : mapping of str to callable
        Reward functions as TRL calls them.
    completions : int
        Of each prompt.
    max_completion_length : int
        Tokens, EOS included.
    temperature : float
        Above 0; the KL is that of the distributions at this temperature, as in TRL.
    kl_estimator : {"k1", "k3"}
        See :func:`completion_kl`.
    seed : int
    """

    rows: Sequence[Mapping[str, Any]]
    scorers: Mapping[str, RewardCallable]
    completions: int = 4
    max_completion_length: int = 256
    temperature: float = 1.0
    kl_estimator: KLEstimator = "k1"
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise DataError(
                "no held-out prompts", "give at least one; a hundred or more to stop by"
            )
        if self.completions < 1 or not self.temperature > 0:
            raise DataError(
                f"completions is {self.completions} and temperature is {self.temperature}",
                "use at least one completion and a positive temperature",
            )
        if self.kl_estimator not in ("k1", "k3"):
            raise DataError(f"kl_estimator is {self.kl_estimator!r}", "use 'k1' or 'k3'")

    def look(
        self,
        policy: Policy,
        reference: Policy,
        step: int,
        *,
        as_reference: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Look:
        """Sample, score and compare with the reference; every rank must call.

        Parameters
        ----------
        policy, reference : Policy
            May be one and the same, if `as_reference` makes it the reference.
        step : int
            Only kept in the result.
        as_reference : callable
            Gives the context in which the reference is computed (a disabled adapter, say).
        """
        state = PartialState()
        mine = range(state.process_index, len(self.rows), state.num_processes)
        rows = [self.rows[i] for i in mine]
        found: list[tuple[int, list[Sample], dict[str, list[float]]]] = []
        if rows:
            groups = policy.sample(
                [row["prompt"] for row in rows],
                self.completions,
                temperature=self.temperature,
                max_new_tokens=self.max_completion_length,
                seed=self.seed,
            )
            values = self._values(rows, groups, policy, reference, as_reference)
            m = self.completions
            for i, (index, group) in enumerate(zip(mine, groups, strict=True)):
                own = {name: column[i * m : (i + 1) * m] for name, column in values.items()}
                found.append((index, group, own))
        everything = sorted(gather_object(found), key=lambda item: item[0])
        samples = [sample for _, group, _ in everything for sample in group]
        tables = {
            name: np.array([item[2][name] for item in everything], dtype=np.float64)
            for name in ("kl", *self.scorers)
        }
        return Look(
            step,
            {name: _row_means(table) for name, table in tables.items()},
            {name: int(np.isnan(tables[name]).sum()) for name in self.scorers},
            float(np.mean([sample.n_tokens for sample in samples])),
            float(np.mean([not sample.terminated for sample in samples])),
            [[sample.text for sample in item[1]] for item in everything]
            if state.is_main_process
            else [],
        )

    def _values(
        self,
        rows: Sequence[Mapping[str, Any]],
        groups: Sequence[Sequence[Sample]],
        policy: Policy,
        reference: Policy,
        as_reference: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, list[float]]:
        """For each scorer, and for the KL, a value for each completion."""
        repeated = [row for row in rows for _ in range(self.completions)]
        samples = [sample for group in groups for sample in group]
        prompts = [row["prompt"] for row in repeated]
        own = policy.logprobs(prompts, samples, temperature=self.temperature).tokens
        with as_reference():
            other = reference.logprobs(prompts, samples, temperature=self.temperature).tokens
        values = {
            "kl": [completion_kl(a, b, self.kl_estimator) for a, b in zip(own, other, strict=True)]
        }
        texts = [as_reply(p, sample.text) for p, sample in zip(prompts, samples, strict=True)]
        names = {name for row in rows for name in row} - {"prompt", "completion", "completion_ids"}
        columns = {name: [row.get(name) for row in repeated] for name in sorted(names)}
        ids = [sample.token_ids for sample in samples]
        for name, scorer in self.scorers.items():
            given = scorer(prompts=prompts, completions=texts, completion_ids=ids, **columns)
            column = [math.nan if value is None else float(value) for value in given]
            if len(column) != len(samples):
                raise DataError(
                    f"the scorer {name!r} gave {len(column)} scores for {len(samples)} completions"
                )
            values[name] = [value if math.isfinite(value) else math.nan for value in column]
        return values


def number(value: float) -> float | None:
    """As plain JSON; None in place of NaN."""
    return None if math.isnan(value) else float(value)


def completion_kl(logprobs: Array, reference: Array, estimator: KLEstimator = "k1") -> float:
    """Estimate of the KL divergence of policy from reference, in nats, from one completion.

    With d = log π − log π_ref of each token that the policy drew, k1 is the sum of d and k3 the sum
    of exp(−d) − 1 + d (Schulman 2020, http://joschu.net/blog/kl-approx.html). Both have the KL of
    the whole completion as their expectation. k3 is never negative and varies less as long as the
    policies are near; TRL logs it, as a mean over tokens. At several nats, where a budget is spent,
    it is k1 that varies less: the exp(−d) of a token that only the reference likes is huge.
    Chapter 5.

    Parameters
    ----------
    logprobs, reference : ndarray ``[T]``
        Log-probabilities in nats of the completion's tokens under either.
    estimator : {"k1", "k3"}
    """
    difference = np.asarray(logprobs, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if estimator == "k1":
        return float(difference.sum())
    return float((np.expm1(-difference) + difference).sum())


def _row_means(table: Array) -> Array:
    """``[n, m]`` to ``[n]``: means of what is not NaN."""
    counts = np.isfinite(table).sum(axis=1)
    sums = np.nansum(table, axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
