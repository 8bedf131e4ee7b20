"""Score with outcome and process models: values of tokens or steps, and their aggregate.

As :class:`companion.scoring.scorer.RewardScorer` for models of one score a text: each text's values
depend on that text alone, and what a value means is said by the manifest. Chapter 3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from companion.batching import pad_batch, token_budget_batches
from companion.errors import CompanionError, DataError, ReadoutError
from companion.formatting import Encoded, RewardFormatter
from companion.formatting.steps import EncodedSteps, as_conversation, encode_steps, split_steps
from companion.models.reward_model import RewardModel
from companion.models.token_models import load_token_model, token_logits
from companion.models.token_readout import TokenReadout
from companion.reduction import How, aggregate

#: Padded tokens of a batch: small on a CPU, large on a GPU.
_CPU_TOKENS, _GPU_TOKENS = 2048, 16384


@dataclass
class TokenScores:
    """Scores of texts, in input order, with the values they are made of.

    Attributes
    ----------
    raw : numpy.ndarray
        ``[N]`` float64, the aggregate of each text; NaN where a row has none.
    values : list of (numpy.ndarray or None)
        Of each text, the values in [0, 1] that were aggregated: one a completion token (outcome),
        or one a step (process).
    wrong : list of (numpy.ndarray or None)
        P(wrong) at the same places. With one label it is 1 − value.
    places : list of (list of int or None)
        Where they stand in the text's token ids.
    n_tokens : numpy.ndarray
        ``[N]`` int64; 0 where a row was dropped.
    reasons : list of (str or None)
        Why a row has no score.
    """

    raw: np.ndarray
    values: list[np.ndarray | None]
    wrong: list[np.ndarray | None]
    places: list[list[int] | None]
    n_tokens: np.ndarray
    reasons: list[str | None]

    def first_errors(self, threshold: float = 0.5) -> list[int | None]:
        """Index of the first step (or token) whose P(wrong) is above the threshold, or None."""
        found: list[int | None] = []
        for wrong in self.wrong:
            above = np.flatnonzero(wrong > threshold) if wrong is not None else np.zeros(0)
            found.append(int(above[0]) if above.size else None)
        return found

    def __len__(self) -> int:
        return len(self.raw)


class TokenScorer:
    """Scores with one outcome or process model: no gradient, eval mode, fp32 head. Chapter 3.

    Parameters
    ----------
    reward_model : RewardModel
    readout : TokenReadout
        Both from :func:`companion.models.token_models.load_token_model`.
    max_tokens_per_batch : int, optional
        Budget for the padded tokens of a batch; default 2,048 on a CPU, 16,384 on a GPU.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        readout: TokenReadout,
        *,
        max_tokens_per_batch: int | None = None,
    ) -> None:
        self.reward_model = reward_model
        self.readout = readout
        on_cpu = self.device.type == "cpu"
        self.max_tokens_per_batch = max_tokens_per_batch or (_CPU_TOKENS if on_cpu else _GPU_TOKENS)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        aggregation: How | None = None,
        step_score: Literal["good", "expected"] | None = None,
        max_tokens_per_batch: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> TokenScorer:
        """Load an outcome or process model that the companion saved.

        Parameters
        ----------
        device : str, optional
            Default: the GPU if there is one.
        aggregation, step_score : str, optional
            In place of what the manifest says.

        Raises
        ------
        ModelError
            For a folder of another kind, which names the class to take.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        reward_model, readout = load_token_model(
            path_or_id,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        if aggregation is not None:
            readout = replace(readout, aggregation=aggregation)
        if step_score is not None:
            readout = replace(readout, step_score=step_score)
        return cls(reward_model, readout, max_tokens_per_batch=max_tokens_per_batch)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.reward_model.model.parameters()).device

    @property
    def formatter(self) -> RewardFormatter:
        """The formatter of the model, with its counts."""
        return self.reward_model.formatter

    def score(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        names: Sequence[str] | None = None,
    ) -> TokenScores:
        """Score solutions.

        Parameters
        ----------
        rows : sequence of mappings
            Each with ``prompt`` and ``completion``; for a process model with ``prompt`` and
            ``completions``, the steps, or a ``completion`` that is split at the separator.
            ``terminated=False`` for a solution that goes on (its last step is closed by the
            separator, as in training).
        on_error : {"raise", "skip"}
            A bad row raises, or gets NaN and the reason.
        names : sequence of str, optional
            How to call the rows in errors.

        Raises
        ------
        CompanionError
            With ``on_error="raise"``.
        """
        if isinstance(rows, (str, bytes, Mapping)):
            raise DataError("score takes a list of rows, not one", "wrap it: score([row])")
        rows = list(rows)
        names = list(names) if names is not None else [f"row {i}" for i in range(len(rows))]
        found = self._encode(rows, names)
        reasons: list[str | None] = [None] * len(rows)
        kept: list[int] = []
        limit = getattr(
            self.reward_model.model.config.get_text_config(), "max_position_embeddings", None
        )
        for index, item in enumerate(found):
            if isinstance(item, CompanionError):
                if on_error == "raise":
                    raise item
                reasons[index] = item.what
            elif item is None:
                reasons[index] = f"longer than max_length={self.formatter.max_length} tokens"
            elif isinstance(limit, int) and len(item.encoded) > limit:
                reasons[index] = f"{len(item.encoded)} tokens, the model has positions for {limit}"
            else:
                kept.append(index)
        out = TokenScores(
            np.full(len(rows), np.nan),
            [None] * len(rows),
            [None] * len(rows),
            [None] * len(rows),
            np.zeros(len(rows), dtype=np.int64),
            reasons,
        )
        solutions = [item for item in (found[i] for i in kept) if isinstance(item, EncodedSteps)]
        for index, item, logits in zip(kept, solutions, self.logits(solutions), strict=True):
            if not bool(torch.isfinite(logits).all()):
                if on_error == "raise":
                    raise ReadoutError(
                        f"{names[index]}: a value is not finite",
                        "score in float32; if it stays, the model's training has diverged",
                    )
                reasons[index] = "a value is not finite"
                continue
            values = self.readout.values(logits.double())
            mask = torch.ones_like(values, dtype=torch.bool)[None]
            out.raw[index] = float(aggregate(values[None], mask, self.readout.aggregation)[0])
            out.values[index] = values.numpy()
            out.wrong[index] = self.readout.wrong(logits.double()).numpy()
            out.places[index] = list(item.ends)
            out.n_tokens[index] = len(item.encoded)
        return out

    def logits(self, solutions: Sequence[EncodedSteps]) -> list[torch.Tensor]:
        """Logits ``[places, labels]`` (float32, on the CPU) at the places of encoded texts."""
        model = self.reward_model.model
        was_training = model.training
        out: list[torch.Tensor] = [torch.zeros(0)] * len(solutions)
        model.eval()
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                for batch in token_budget_batches(
                    [len(item.encoded) for item in solutions], self.max_tokens_per_batch
                ):
                    padded = pad_batch(
                        [solutions[i].encoded.input_ids for i in batch],
                        self.reward_model.pad_token_id,
                    )
                    logits = token_logits(
                        model,
                        padded["input_ids"].to(self.device),
                        padded["attention_mask"].to(self.device),
                    ).cpu()
                    for row, index in enumerate(batch):
                        out[index] = logits[row, solutions[index].ends].clone()
        finally:
            model.train(was_training)
        return out

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
    ) -> list[EncodedSteps | CompanionError | None]:
        readout = self.readout
        if readout.kind == "process":
            assert readout.separator is not None
            steps = [_in_steps(row, readout.separator) for row in rows]
            return encode_steps(
                self.formatter, steps, readout.separator, chat=readout.chat, names=names
            )
        texts = [
            {**row, **as_conversation(row["prompt"], row["completion"])}
            if readout.chat
            and isinstance(row.get("prompt"), str)
            and isinstance(row.get("completion"), str)
            else row
            for row in rows
        ]
        encoded = self.formatter.try_encode_many(texts, names=names)
        return [
            EncodedSteps(item, list(range(item.prompt_length, len(item))))
            if isinstance(item, Encoded)
            else item
            for item in encoded
        ]


def _in_steps(row: Mapping[str, Any], separator: str) -> Mapping[str, Any]:
    """The row with its steps apart."""
    if "completions" in row:
        return row
    completion = row.get("completion")
    if isinstance(completion, Sequence) and not isinstance(completion, str):
        if len(completion) != 1 or not isinstance(completion[0].get("content"), str):
            raise DataError("a completion of several messages has no steps")
        completion = completion[0]["content"]
    if not isinstance(completion, str):
        raise DataError("a row has neither 'completions' (its steps) nor a 'completion'")
    shared = {key: value for key, value in row.items() if key != "completion"}
    return {**shared, "completions": split_steps(completion, separator)}
