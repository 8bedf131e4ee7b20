"""Score with outcome and process models: values of tokens or steps, and their aggregate.

As :class:`companion.scoring.scorer.RewardScorer` for models of one score a text: each text's values
depend on that text alone, and what a value means is said by the manifest. Chapter 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from companion.errors import CompanionError, DataError, ReadoutError
from companion.formatting import Encoded, Overlong, RewardFormatter, Row
from companion.formatting.steps import EncodedSteps, as_conversation, encode_steps, split_steps
from companion.models.reward_model import RewardModel
from companion.models.token_models import load_token_model
from companion.models.token_readout import TokenReadout
from companion.reduction import How, aggregate
from companion.scoring.running import BatchRunner, Packing


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
    logits : list of (numpy.ndarray or None)
        ``[places, labels]`` each, what both are made of.
    places : list of (list of int or None)
        Where they stand in the text's token ids.
    n_tokens : numpy.ndarray
        ``[N]`` int64; 0 where a row was dropped.
    reasons : list of (str or None)
        Why a row has no score.
    readout : TokenReadout
        How they were read.
    """

    raw: np.ndarray
    values: list[np.ndarray | None]
    wrong: list[np.ndarray | None]
    logits: list[np.ndarray | None]
    places: list[list[int] | None]
    n_tokens: np.ndarray
    reasons: list[str | None]
    readout: TokenReadout

    def first_errors(self, threshold: float = 0.5) -> list[int | None]:
        """Index of the first step (or token) whose P(wrong) is above the threshold, or None."""
        found: list[int | None] = []
        for wrong in self.wrong:
            above = np.flatnonzero(wrong > threshold) if wrong is not None else np.zeros(0)
            found.append(int(above[0]) if above.size else None)
        return found

    @property
    def n_dropped(self) -> int:
        """Number of rows without a score."""
        return sum(reason is not None for reason in self.reasons)

    def record(self, i: int) -> dict[str, Any]:
        """What a line of a file says of row `i`, which has a score.

        The score; of an outcome model ``token_scores``, of a process model ``step_scores``,
        ``step_wrong`` (P(wrong) of each step) and ``first_error``: the index of the first step
        whose P(wrong) is above the threshold of the manifest, or None.
        """
        values, wrong = self.values[i], self.wrong[i]
        assert values is not None
        assert wrong is not None
        found: dict[str, Any] = {"score": float(self.raw[i]), "n_tokens": int(self.n_tokens[i])}
        if self.readout.kind == "outcome":
            return {**found, "token_scores": values.tolist()}
        above = np.flatnonzero(wrong > self.readout.threshold)
        return {
            **found,
            "step_scores": values.tolist(),
            "step_wrong": wrong.tolist(),
            "first_error": int(above[0]) if above.size else None,
        }

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
        Budget for the computed tokens of a batch; default 2,048 on a CPU, on CUDA what the free
        memory holds. A batch that does not fit is tried again with half of them.
    packing : {"auto", "off"}
        As for :class:`companion.scoring.scorer.RewardScorer`.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        readout: TokenReadout,
        *,
        max_tokens_per_batch: int | None = None,
        packing: Packing = "auto",
    ) -> None:
        self.reward_model = reward_model
        self.readout = readout
        self._runner = BatchRunner(
            reward_model.model,
            reward_model.pad_token_id,
            max_tokens=max_tokens_per_batch,
            packing=packing,
        )

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
        max_length: int | None = None,
        overlong: Overlong | None = None,
        packing: Packing = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> TokenScorer:
        """Load an outcome or process model that the companion saved.

        Parameters
        ----------
        device : str, optional
            Default: the GPU if there is one.
        aggregation, step_score, max_length, overlong : optional
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
        reward_model.limit_texts(max_length, overlong)
        return cls(
            reward_model, readout, max_tokens_per_batch=max_tokens_per_batch, packing=packing
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.reward_model.model.parameters()).device

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all texts of the last call, and tokens that were computed for them."""
        return self._runner.tokens_needed, self._runner.tokens_computed

    @property
    def formatter(self) -> RewardFormatter:
        """The formatter of the model, with its counts."""
        return self.reward_model.formatter

    @property
    def notes(self) -> list[str]:
        """What was repaired or assumed while loading."""
        return self.reward_model.notes

    def score(
        self,
        rows: Sequence[Row],
        *,
        terminated: bool | None = None,
        field: str = "completion",
        on_error: Literal["raise", "skip"] = "raise",
        names: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> TokenScores:
        """Score solutions.

        Parameters
        ----------
        rows : sequence
            Each a mapping with ``prompt`` and ``completion``, or with ``messages``, or a list of
            messages, of which the last is the solution. For a process model also with ``prompt``
            and ``completions``, the steps; a solution in one piece is split at the separator.
            ``terminated=False`` for a solution that goes on (its last step is closed by the
            separator, as in training).
        terminated : bool, optional
            In place of what the rows say.
        field : str
            Field of the completion in place of ``completion``.
        on_error : {"raise", "skip"}
            A bad row raises, or gets NaN and the reason.
        names : sequence of str, optional
            How to call the rows in errors.
        progress : callable, optional
            Called with the number of texts of each batch done.

        Raises
        ------
        CompanionError
            With ``on_error="raise"``.
        """
        if isinstance(rows, (str, bytes, Mapping)):
            raise DataError("score takes a list of rows, not one", "wrap it: score([row])")
        rows = list(rows)
        names = list(names) if names is not None else [f"row {i}" for i in range(len(rows))]
        found = self._encode(rows, names, field, terminated)
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
        nothing: list[Any] = [None] * len(rows)
        out = TokenScores(
            np.full(len(rows), np.nan),
            list(nothing),
            list(nothing),
            list(nothing),
            list(nothing),
            np.zeros(len(rows), dtype=np.int64),
            reasons,
            self.readout,
        )
        solutions = [item for item in (found[i] for i in kept) if isinstance(item, EncodedSteps)]
        all_logits = self.logits(solutions, progress=progress)
        for index, item, logits in zip(kept, solutions, all_logits, strict=True):
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
            out.logits[index] = logits.double().numpy()
            out.places[index] = list(item.ends)
            out.n_tokens[index] = len(item.encoded)
        return out

    def logits(
        self,
        solutions: Sequence[EncodedSteps],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[torch.Tensor]:
        """Logits ``[places, labels]`` (float32, on the CPU) at the places of encoded texts."""
        return self._runner.run_tokens(
            [item.encoded.input_ids for item in solutions],
            [item.ends for item in solutions],
            progress,
        )

    def _encode(
        self, rows: Sequence[Row], names: Sequence[str], field: str, terminated: bool | None
    ) -> list[EncodedSteps | CompanionError | None]:
        """Of each row its ids and places, or why there are none."""
        found: list[Any] = []
        for row, name in zip(rows, names, strict=True):
            try:
                found.append(self._solution(row, name, field, terminated))
            except CompanionError as error:
                found.append(error)
        good = [i for i, item in enumerate(found) if not isinstance(item, CompanionError)]
        solutions, names = [found[i] for i in good], [names[i] for i in good]
        if self.readout.kind == "process":
            assert self.readout.separator is not None
            encoded: Sequence[Any] = encode_steps(
                self.formatter,
                solutions,
                self.readout.separator,
                chat=self.readout.chat,
                names=names,
            )
        else:
            encoded = [
                EncodedSteps(item, list(range(item.prompt_length, len(item))))
                if isinstance(item, Encoded)
                else item
                for item in self.formatter.try_encode_many(solutions, names=names)
            ]
        for i, item in zip(good, encoded, strict=True):
            found[i] = item
        return found

    def _solution(self, row: Any, name: str, field: str, terminated: bool | None) -> dict[str, Any]:
        """The row as the formatter takes it: the prompt apart, and for a process model the steps.

        Without a prompt nothing would say where the completion begins, and its values would be
        mixed with those of the prompt.
        """
        given = dict(row) if isinstance(row, Mapping) else {"messages": row}
        messages = given.get("messages")
        if field in given and field != "completion":
            given["completion"] = given.pop(field)
        elif "prompt" not in given and isinstance(messages, (list, tuple)) and messages:
            given |= {"prompt": list(messages[:-1]), "completion": [messages[-1]]}
        if not given.get("prompt"):
            raise DataError(
                f"{name}: no prompt, so nothing says where the completion begins",
                "give prompt and completion, or a list of messages",
            )
        if terminated is not None:
            given["terminated"] = terminated
        elif not isinstance(given.get("terminated", True), bool):
            raise DataError(f"{name}: 'terminated' is {given['terminated']!r}, not true or false")
        completion = given.get("completion")
        if self.readout.kind == "outcome":
            if (
                self.readout.chat
                and isinstance(given["prompt"], str)
                and isinstance(completion, str)
            ):
                given |= as_conversation(given["prompt"], completion)
            return given
        if "completions" in given:
            return given
        if isinstance(completion, (list, tuple)) and len(completion) == 1:
            completion = completion[0].get("content")
        if not isinstance(completion, str):
            raise DataError(
                f"{name}: no steps: neither 'completions' nor a {field!r} of one text or message",
                "give the steps as a list of texts",
            )
        assert self.readout.separator is not None
        return {**given, "completions": split_steps(completion, self.readout.separator)}
