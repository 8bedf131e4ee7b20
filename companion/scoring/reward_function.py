"""A reward function for TRL's ``GRPOTrainer`` and ``RLOOTrainer`` that scores as training did.

Handed a reward *model*, TRL itself joins prompt and completion as text, adds neither BOS nor EOS
although the reward trainer trained with both, never calls ``eval()``, and puts an end-of-turn on
completions that were cut off, which hides that they were (trl 1.16, ``_calculate_rewards``). Here
the one formatter makes the token ids and the scorer the scores, so a text has the score that it had
in training and has in serving. Chapter 5.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import numpy as np

from companion.errors import DataError, ModelError
from companion.models.ends import policy_end_ids
from companion.models.manifest import ReferenceStats

logger = logging.getLogger(__name__)

Transform = Literal["raw", "centered", "z", "sigmoid"]

#: Columns of TRL's that decide how the chat template writes a row, one entry a completion.
TEMPLATE_COLUMNS: Final = ("tools", "chat_template_kwargs")
#: Completions from which something is concluded on how the policy ends its turns.
_ENOUGH: Final = 4
#: One for all: held while counts are raised. (A lock of its own could not be pickled.)
_COUNTING: Final = threading.Lock()


class RowScorer(Protocol):
    """What a reward function asks of a scorer, whether the model is here or on a server."""

    @property
    def reference(self) -> ReferenceStats | None:
        """The reference set of the manifest."""

    @property
    def tokenizer(self) -> Any:
        """The reward model's tokenizer."""

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a completion of the reward model's own family."""

    def score(self, rows: Sequence[Any], *, on_error: Literal["raise", "skip"]) -> Any:
        """:class:`Scores` in the order of the rows; with "skip" a bad row has NaN and a reason."""


class RewardFunction:
    """Prompts and completions in, a float or None for each completion out.

    What TRL asks of a reward function is kept: any further columns are taken, the function has a
    name, it can be pickled, and it is no ``nn.Module`` (TRL would take those another way). It runs
    without gradients and in eval mode, whatever is on around it, and many threads may call it.

    The columns ``tools`` and ``chat_template_kwargs`` belong to the row, as in training and in
    ``companion score``, and reach the chat template of the reward model. Settings of the trainer
    (``GRPOConfig.chat_template_kwargs``, ``GRPOTrainer(tools=…)``) do not: they say how the
    *policy's* template writes a prompt, and no other way of scoring a row knows them.

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
        cut off.
    policy : str, path or PreTrainedTokenizerBase, optional
        Where to find them: the policy's folder or hub id (its EOS, its generation config, and what
        its chat template writes behind an answer), or its tokenizer. Without either, those of the
        reward model, which is right where both have one tokenizer; and a token that no completion
        holds but at its end is taken for an end too, with a warning (see Notes).
    name : str
        What TRL logs it as.

    Attributes
    ----------
    counts : Counter
        Completions so far: ``scored``, ``truncated``, ``assumed_end`` (finished by a token that was
        taken for an end), and those without a score by their reason.

    Notes
    -----
    A token is taken for the policy's end of turn if four or more completions of a call end with it,
    none holds it anywhere else, and they are of several lengths, or are all of the call: what a
    limit cuts off is equally long, and breaks off at whatever token comes. Where the reward model's
    tokenizer reads the very text out of the ids, a last token that is part of it is no end. So a
    policy that repeats one token is cut off, and so are equal completions of a policy with the
    reward model's tokenizer; those of a policy with another tokenizer cannot be told apart from
    finished ones.

    Raises
    ------
    ModelError
        If the transform needs a reference set and the model's manifest has none, or the policy
        cannot be read.
    DataError
        For an unknown transform, a clip that is not positive, or both ways to name the ends.
    """

    def __init__(
        self,
        scorer: RowScorer | Callable[[], RowScorer],
        *,
        transform: Transform = "raw",
        clip: float | None = None,
        truncated: Literal["score"] | float | None = "score",
        eos_token_ids: Sequence[int] | None = None,
        policy: Any = None,
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
        if eos_token_ids is not None and policy is not None:
            raise DataError("eos_token_ids and policy are both given", "give one of them")
        # what nobody has said may be found in the completions
        self._told = eos_token_ids is not None or policy is not None
        self._assumed: frozenset[int] = frozenset()
        self._cut_in_a_row, self._warned_of_cuts = 0, False
        if policy is not None:
            eos_token_ids = policy_end_ids(policy)
        elif eos_token_ids is None:
            eos_token_ids = self.scorer.end_token_ids
        if not eos_token_ids and truncated != "score":
            raise DataError(
                "no EOS is known, so every completion would count as cut off",
                "give the policy's eos_token_ids, or policy=",
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
            What else TRL hands over: ``tools`` (a list, JSON text or None for each completion) and
            ``chat_template_kwargs`` (a mapping or None) reach the chat template; the others are
            not used.

        Raises
        ------
        DataError
            If the lengths differ.
        """
        n = len(prompts)
        if len(completions) != n or (completion_ids is not None and len(completion_ids) != n):
            raise DataError(f"{n} prompts, {len(completions)} completions: the lengths differ")
        given = {name: columns[name] for name in TEMPLATE_COLUMNS if columns.get(name) is not None}
        for name, column in given.items():
            if isinstance(column, (str, Mapping)) or len(column) != n:
                raise DataError(
                    f"{name}: not one entry for each of the {n} completions",
                    f"give a list of {n}, as TRL does with a column of the dataset",
                )
        cut = [False] * n
        if completion_ids is not None and self.eos_token_ids:
            cut = self._cut_off(completions, completion_ids)
        rows: list[Mapping[str, Any]] = [
            {
                "prompt": prompts[i],
                "completion": completions[i],
                "terminated": not cut[i],
                "drawn": True,
                **{name: column[i] for name, column in given.items()},
            }
            for i in range(n)
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
        with _COUNTING:
            new = [reason for reason in bad if reason not in self.counts]
            self.counts.update({"scored": len(reasons) - bad.total(), **bad})
        for reason in new:
            logger.warning(f"{self.__name__}: completions without a reward: {reason}")

    # ------------------------------------------------------------------ where completions end

    def _cut_off(self, completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[bool]:
        """Which completions were cut off; counts them, and says once what looks wrong."""
        found = None if self._told else self._new_end(completions, ids)
        last = [int(own[-1]) if len(own) else None for own in ids]
        with _COUNTING:
            new = found is not None and found not in self._assumed
            if found is not None:
                self._assumed |= {found}
            assumed = sum(end in self._assumed for end in last)
            cut = [end not in self.eos_token_ids | self._assumed for end in last]
            self.counts["truncated"] += sum(cut)
            if assumed:
                self.counts["assumed_end"] += assumed
            self._cut_in_a_row = self._cut_in_a_row + len(cut) if all(cut) else 0
            none_ends = self._cut_in_a_row >= _ENOUGH and not self._warned_of_cuts
            self._warned_of_cuts |= none_ends
        named = "eos_token_ids=[…] with its ids, or policy= with its folder or tokenizer"
        if new:
            logger.warning(
                f"{self.__name__}: completions end with the token {found}, which is no known end "
                f"and stands nowhere else in them: it is taken for the policy's end of turn. Say "
                f"so by {named}"
            )
        if none_ends:
            often = Counter(end for end in last if end is not None).most_common(1)
            most = f" (most end with {often[0][0]})" if often else ""
            ends = ", ".join(map(str, sorted(self.eos_token_ids)))
            logger.warning(
                f"{self.__name__}: {self._cut_in_a_row} completions in a row seem cut off, since "
                f"none ends with the token {ends}{most}. If the policy ends its turns with another "
                f"token, give {named}; if they are cut off, raise max_completion_length"
            )
        return cut

    def _new_end(self, completions: Sequence[Any], ids: Sequence[Sequence[int]]) -> int | None:
        """A token that must be the end of a turn, though nobody has named it; see the class."""
        ends = self.eos_token_ids | self._assumed
        # one that is the whole completion says nothing: it may be its text
        last = [int(own[-1]) if len(own) > 1 else None for own in ids]
        often = Counter(end for end in last if end is not None and end not in ends)
        for token, n in often.items():
            if n < _ENOUGH:
                continue
            own = [i for i, end in enumerate(last) if end == token]
            if len({len(ids[i]) for i in own}) == 1 and n < len(ids):
                continue
            if any(int(x) == token for some in ids for x in some[:-1]):
                continue
            if not any(self._is_text(completions[i], ids[i]) for i in own):
                return token
        return None

    def _is_text(self, completion: Any, ids: Sequence[int]) -> bool:
        """Whether the reward model's tokenizer reads the completion, its last token included."""
        if not isinstance(completion, str):
            completion = completion[-1].get("content") if completion else None
        decode = self.scorer.tokenizer.decode
        try:
            last, whole = (decode(x, skip_special_tokens=True) for x in (list(ids[-1:]), list(ids)))
        except (OverflowError, IndexError, TypeError, ValueError):  # an id beyond its vocabulary
            return False
        return bool(last) and isinstance(completion, str) and whole.strip() == completion.strip()

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


class AsyncRewardFunction:
    """A reward function as a coroutine: TRL awaits all of those at once, on a loop of its own.

    Two reward models on servers are then waited for side by side, not one after the other. It gives
    what the function inside gives, in a thread of its own, so that nothing else on the loop waits.

    Parameters
    ----------
    function : RewardFunction
        What is called.

    Attributes
    ----------
    counts : Counter
        Those of the function.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.__name__ = function.__name__

    @property
    def counts(self) -> Counter[str]:
        """Completions so far, by what became of them."""
        return self.function.counts

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """Rewards of completions, as :meth:`RewardFunction.__call__` gives them."""
        return await asyncio.to_thread(self.function, prompts, completions, **columns)
