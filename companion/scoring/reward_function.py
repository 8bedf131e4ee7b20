"""A reward function for TRL's ``GRPOTrainer`` and ``RLOOTrainer`` that scores as training did.

Handed a reward *model*, TRL itself joins prompt and completion as text, adds neither BOS nor EOS
although the reward trainer trained with both, never calls ``eval()``, and puts an end-of-turn on
completions that were cut off, which hides that they were (trl 1.16, ``_calculate_rewards``). Here
the one formatter makes the token ids and the scorer the scores, so a text has the score that it had
in training and has in serving. Chapter 5.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from companion.errors import DataError, ModelError
from companion.models.manifest import ReferenceStats

logger = logging.getLogger(__name__)

Transform = Literal["raw", "centered", "z", "sigmoid"]


class RowScorer(Protocol):
    """What a reward function asks of a scorer, whether the model is here or on a server."""

    @property
    def reference(self) -> ReferenceStats | None:
        """The reference set of the manifest."""

    @property
    def tokenizer(self) -> Any:
        """The reward model's tokenizer."""

    def score(self, rows: Sequence[Any], *, on_error: Literal["raise", "skip"]) -> Any:
        """:class:`Scores` in the order of the rows; with "skip" a bad row has NaN and a reason."""


class RewardFunction:
    """Prompts and completions in, a float or None for each completion out.

    What TRL asks of a reward function is kept: any further columns are taken and ignored, the
    function has a name, it can be pickled, and it is no ``nn.Module`` (TRL would take those another
    way). It runs without gradients and in eval mode, whatever is on around it.

    Parameters
    ----------
    scorer : Scorer or str
        A scorer, here or on a server, or the folder or hub id of a reward model.
    transform : {"raw", "centered", "z", "sigmoid"}
        What becomes of the raw score: nothing; minus the mean of the manifest's reference set; in
        its standard deviations; or the logistic function of the z score. GRPO's group scaling
        undoes all but the last; with several rewards, or without scaling, they matter.
    clip : float, optional
        Bound on the absolute value, after the transform.
    truncated : "score", None or float
        What a completion gets that was cut off: the score of the text as it stands, without EOS;
        None, which leaves it out of the advantages; or a fixed reward (a penalty), in the units of
        the transform.
    eos_token_ids : sequence of int, optional
        The *policy's* tokens that end a completion. A completion whose ids do not end in one was
        cut off. Default: the EOS of the reward model's tokenizer, which is right where policy and
        reward model have one tokenizer.
    name : str
        What TRL logs it as.

    Attributes
    ----------
    counts : Counter
        Completions so far: ``scored``, ``truncated``, and those without a score by their reason.

    Raises
    ------
    ModelError
        If the transform needs a reference set and the model's manifest has none.
    DataError
        For an unknown transform, or a clip that is not positive.
    """

    def __init__(
        self,
        scorer: RowScorer | Callable[[], RowScorer],
        *,
        transform: Transform = "raw",
        clip: float | None = None,
        truncated: Literal["score"] | float | None = "score",
        eos_token_ids: Sequence[int] | None = None,
        name: str = "reward_model",
    ) -> None:
        if transform not in ("raw", "centered", "z", "sigmoid"):
            raise DataError(f"transform is {transform!r}", "use raw, centered, z or sigmoid")
        if clip is not None and not clip > 0:
            raise DataError(f"clip is {clip}", "use a positive number or None")
        if isinstance(truncated, str) and truncated != "score":
            raise DataError(f"truncated is {truncated!r}", "use 'score', None or a number")
        self._make = scorer if callable(scorer) else None
        self.scorer: RowScorer = scorer() if callable(scorer) else scorer
        if transform != "raw" and self.scorer.reference is None:
            raise ModelError(
                f"transform={transform!r} needs a reference set, and the manifest has none",
                "train with held-out pairs, or use transform='raw'",
            )
        if eos_token_ids is None:
            eos = self.scorer.tokenizer.eos_token_id
            eos_token_ids = [] if eos is None else [eos]
        if not eos_token_ids and truncated != "score":
            raise DataError(
                "no EOS is known, so every completion would count as cut off",
                "give the policy's eos_token_ids",
            )
        self.transform: Transform = transform
        self.clip = clip
        self.truncated = truncated
        self.eos_token_ids = frozenset(eos_token_ids)
        self.__name__ = name
        self.counts: Counter[str] = Counter()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of completions, in their order.

        Parameters
        ----------
        prompts, completions : sequence
            ``[B]`` texts, or lists of messages.
        completion_ids : sequence of sequences of int, optional
            The policy's token ids, by which a completion that was cut off is known. Without them
            all count as finished.
        log_metric : callable, optional
            TRL's; gets the shares of completions that were cut off and that have no reward.
        **columns
            What else TRL hands over; not used.

        Raises
        ------
        DataError
            If the lengths differ.
        """
        n = len(prompts)
        if len(completions) != n or (completion_ids is not None and len(completion_ids) != n):
            raise DataError(f"{n} prompts, {len(completions)} completions: the lengths differ")
        cut = [
            completion_ids is not None
            and bool(self.eos_token_ids)
            and (not len(ids) or int(ids[-1]) not in self.eos_token_ids)
            for ids in (completion_ids if completion_ids is not None else [()] * n)
        ]
        rows: list[Mapping[str, Any]] = [
            {"prompt": prompt, "completion": completion, "terminated": not was_cut}
            for prompt, completion, was_cut in zip(prompts, completions, cut, strict=True)
        ]
        scored = [i for i in range(n) if self.truncated == "score" or not cut[i]]
        rewards: list[float | None] = [
            float(self.truncated) if isinstance(self.truncated, (int, float)) else None
        ] * n
        if scored:
            scores = self.scorer.score([rows[i] for i in scored], on_error="skip")
            for place, value in zip(scored, self._transformed(scores), strict=True):
                rewards[place] = float(value) if math.isfinite(value) else None
            self._count(scores.reasons)
        self.counts["truncated"] += sum(cut)
        if log_metric is not None:
            log_metric(f"{self.__name__}/truncated", sum(cut) / max(n, 1))
            log_metric(f"{self.__name__}/without_reward", rewards.count(None) / max(n, 1))
        return rewards

    def _transformed(self, scores: Any) -> np.ndarray:
        values: np.ndarray = (
            scores.z if self.transform == "sigmoid" else getattr(scores, self.transform)
        )
        if self.transform == "sigmoid":
            values = 1.0 / (1.0 + np.exp(-values))
        return values if self.clip is None else np.clip(values, -self.clip, self.clip)

    def _count(self, reasons: Sequence[str | None]) -> None:
        bad = Counter(reason for reason in reasons if reason is not None)
        for reason in bad:
            if reason not in self.counts:
                logger.warning(f"{self.__name__}: completions without a reward: {reason}")
        self.counts += Counter({"scored": len(reasons) - bad.total()}) + bad

    def __getstate__(self) -> dict[str, Any]:
        """Without its scorer, if that can be made anew."""
        state = dict(self.__dict__)
        if self._make is not None:
            del state["scorer"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._make is not None:
            self.scorer = self._make()
