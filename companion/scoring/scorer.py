"""The scorer: rows in, scores out, in the same order, each depending on its own text alone.

One rule above all (Chapter 6): a batch, packed or padded, gives each text the score that it has
alone. In float32 they agree within 1e-5, whatever the batch, the order and the padding side;
reward-bench #137 shows what happens elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from companion.errors import CompanionError, DataError, ModelError, ReadoutError
from companion.formatting import Encoded, Overlong, RewardFormatter, Row
from companion.models.loading import load_reward_model
from companion.models.manifest import ReferenceStats
from companion.models.reward_model import RewardModel
from companion.scoring.results import PairScores, Scores
from companion.scoring.reward_function import RewardFunction
from companion.scoring.running import BatchRunner, Packing

OnError = Literal["raise", "skip"]
Progress = Callable[[int], None]


class RewardScorer:
    """Scores with one reward model: token-budget batches, no gradient, eval mode, fp32 head.

    Parameters
    ----------
    reward_model : RewardModel
        From :func:`companion.models.loading.load_reward_model`, or one in training (it is put into
        eval mode while it scores, and back).
    max_tokens_per_batch : int, optional
        Budget for the computed tokens of a batch; default 2,048 on a CPU, on CUDA what the free
        memory holds. A batch that does not fit is tried again with half of them.
    max_rows_per_batch : int, optional
        Most rows of a batch.
    padding_side : {"right", "left"}
        Of batches that are padded. Makes no difference to the scores; right is faster.
    packing : {"auto", "off"}
        "auto": no padding, and a prompt that several texts share is computed once, where that is
        exact for the model; the others are padded, and the log says why.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        *,
        max_tokens_per_batch: int | None = None,
        max_rows_per_batch: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        packing: Packing = "auto",
    ) -> None:
        self.reward_model = reward_model
        self._runner = BatchRunner(
            reward_model.model,
            reward_model.pad_token_id,
            max_tokens=max_tokens_per_batch,
            max_rows=max_rows_per_batch,
            packing=packing,
            padding_side=padding_side,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_tokens_per_batch: int | None = None,
        packing: Packing = "auto",
        max_length: int | None = None,
        overlong: Overlong | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> RewardScorer:
        """Load a reward model for scoring.

        Parameters
        ----------
        device : str, optional
            Default: the GPU if there is one.
        dtype : torch.dtype or str, optional
            Default float32. In half precision a score moves with its batch.
        max_tokens_per_batch, packing
            As for the class.
        max_length, overlong
            In place of what the manifest says.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        reward_model = load_reward_model(
            path_or_id,
            device=device,
            dtype=dtype if dtype is not None else torch.float32,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        reward_model.limit_texts(max_length, overlong)
        return cls(reward_model, max_tokens_per_batch=max_tokens_per_batch, packing=packing)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.reward_model.model.parameters()).device

    @property
    def tokenizer(self) -> Any:
        """The reward model's tokenizer."""
        return self.reward_model.tokenizer

    @property
    def formatter(self) -> RewardFormatter:
        """The formatter of the model, with its counts."""
        return self.reward_model.formatter

    @property
    def reference(self) -> ReferenceStats | None:
        """The reference set of the manifest."""
        manifest = self.reward_model.manifest
        return None if manifest is None else manifest.reference

    @property
    def notes(self) -> list[str]:
        """What was repaired or assumed while loading."""
        return self.reward_model.notes

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all texts of the last call, and tokens that were computed for them.

        Fewer are computed where prefixes are shared, more where there is padding.
        """
        return self._runner.tokens_needed, self._runner.tokens_computed

    @property
    def max_positions(self) -> int | None:
        """Longest text that the model has positions for."""
        config = self.reward_model.model.config.get_text_config()
        value = getattr(config, "max_position_embeddings", None)
        return value if isinstance(value, int) and value > 0 else None

    # ------------------------------------------------------------------ rows

    def score(
        self,
        rows: Sequence[Row],
        *,
        terminated: bool | None = None,
        field: str = "completion",
        on_error: OnError = "raise",
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Score rows.

        Parameters
        ----------
        rows : sequence
            Each a string, a list of messages, ``{"prompt", "completion"}``, ``{"messages"}`` or
            ``{"text"}``.
        terminated : bool, optional
            False: the completions were cut off. Default: what a row says, else True.
        field : str
            Field of the completion in place of ``completion`` (``chosen``, say).
        on_error : {"raise", "skip"}
            What to do with a bad row or a score that is not finite: raise an error that names it,
            or give it NaN and the reason.
        names : sequence of str, optional
            How to call the rows in errors; default ``row 0``, …
        progress : callable, optional
            Called with the number of texts of each batch done.

        Returns
        -------
        Scores
            In input order. A row that was dropped for its length has NaN and the reason.

        Raises
        ------
        CompanionError
            With ``on_error="raise"``.
        """
        rows = _as_rows(rows)
        encoded = self.formatter.try_encode_many(rows, field, terminated=terminated, names=names)
        names = names if names is not None else [f"row {i}" for i in range(len(rows))]
        groups: list[list[Encoded] | CompanionError | None] = [
            [item] if isinstance(item, Encoded) else item for item in encoded
        ]
        values, lengths, reasons = self._score_groups(groups, 1, names, on_error, progress)
        return Scores(values[:, 0], lengths[:, 0], reasons).against(self.reference)

    def score_pairs(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        on_error: OnError = "raise",
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> PairScores:
        """Score ``chosen`` and ``rejected`` of each row (with ``prompt`` or without).

        A pair of which one side is too long has NaN on both, and a reason. Parameters as in
        :meth:`score`.
        """
        rows = _as_rows(rows)
        encoded = self.formatter.try_encode_pairs(rows, names=names)
        names = names if names is not None else [f"row {i}" for i in range(len(rows))]
        groups: list[list[Encoded] | CompanionError | None] = [
            list(item) if isinstance(item, tuple) else item for item in encoded
        ]
        values, lengths, reasons = self._score_groups(groups, 2, names, on_error, progress)
        return PairScores(values[:, 0], values[:, 1], lengths[:, 0], lengths[:, 1], reasons)

    def as_reward_func(self, **settings: Any) -> RewardFunction:
        """This scorer as a reward function for TRL's ``GRPOTrainer`` and ``RLOOTrainer``.

        TRL 1.16 has no PPO trainer; trl #7020 removed it.

        Parameters
        ----------
        **settings
            Those of :class:`RewardFunction`: ``transform``, ``clip``,
            ``truncated``, ``eos_token_ids``, ``name``.
        """
        return RewardFunction(self, **settings)

    # ------------------------------------------------------------------ token ids

    def score_encoded(
        self, encoded: Sequence[Encoded | Sequence[int]], *, progress: Progress | None = None
    ) -> np.ndarray:
        """Score token ids, ``[N]`` float64 in input order.

        Raises
        ------
        ReadoutError
            If a score is not finite; it names the first such text and their number.
        ModelError
            If a text is longer than the model has positions.
        """
        ids = [list(e.input_ids) if isinstance(e, Encoded) else list(e) for e in encoded]
        limit = self.max_positions
        for index, item in enumerate(ids):
            if limit is not None and len(item) > limit:
                raise ModelError(
                    f"text {index} has {len(item)} tokens, the model has positions for {limit}",
                    f"format with max_length={limit}",
                )
        scores = self._runner.run(ids, progress)
        bad = np.flatnonzero(~np.isfinite(scores))
        if bad.size:
            raise ReadoutError(*_not_finite(f"text {bad[0]}", scores[bad[0]], int(bad.size)))
        return scores

    def _score_groups(
        self,
        groups: Sequence[list[Encoded] | CompanionError | None],
        width: int,
        names: Sequence[str],
        on_error: OnError,
        progress: Progress | None,
    ) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Scores ``[N, width]``, lengths ``[N, width]`` and reasons of groups of texts."""
        if on_error not in ("raise", "skip"):
            raise DataError(f"on_error is {on_error!r}", "use 'raise' or 'skip'")
        values = np.full((len(groups), width), np.nan)
        lengths = np.zeros((len(groups), width), dtype=np.int64)
        reasons: list[str | None] = [None] * len(groups)
        limit = self.max_positions
        kept: list[int] = []
        for index, group in enumerate(groups):
            if isinstance(group, CompanionError):
                if on_error == "raise":
                    raise group
                reasons[index] = group.what
            elif group is None:
                reasons[index] = f"longer than max_length={self.formatter.max_length} tokens"
            elif limit is not None and max(map(len, group)) > limit:
                reasons[index] = (
                    f"{max(map(len, group))} tokens, the model has positions for {limit}"
                )
                if on_error == "raise" and self.formatter.overlong == "error":
                    raise DataError(f"{names[index]}: {reasons[index]}", "shorten the text")
            else:
                kept.append(index)
        flat = [item.input_ids for index in kept for item in groups[index] or ()]  # type: ignore[union-attr]
        scores = self._runner.run(flat, progress).reshape(len(kept), width)
        finite = np.isfinite(scores).all(axis=1)
        if not finite.all() and on_error == "raise":
            first = int(np.flatnonzero(~finite)[0])
            count = int((~finite).sum())
            raise ReadoutError(*_not_finite(names[kept[first]], scores[first], count))
        for place, index in enumerate(kept):
            group = groups[index]
            assert isinstance(group, list)
            if finite[place]:
                values[index] = scores[place]
                lengths[index] = [len(item) for item in group]
            else:
                reasons[index] = f"the score is not finite ({scores[place].tolist()})"
        return values, lengths, reasons


def _as_rows(rows: Any) -> Any:
    """A list of rows; a single text or row handed over by mistake is an error, not 20 letters."""
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(
            f"score takes a list of rows, not one {type(rows).__name__}", "wrap it: score([row])"
        )
    listed = list(rows)
    if listed and all(isinstance(r, Mapping) and {"role", "content"} <= set(r) for r in listed):
        raise DataError(
            "score takes a list of rows, and this is one list of messages",
            "wrap it: score([messages])",
        )
    return listed


def _not_finite(where: str, value: Any, count: int) -> tuple[str, str]:
    return (
        f"{where}: the score is not finite ({np.asarray(value).tolist()}); {count} such in all",
        "score in float32; if it stays, the model's training has diverged",
    )
