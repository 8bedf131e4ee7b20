"""From rows to the tokens that a read-out reads, and from the values there to scores. Chapter 3.

One reading for models of one score a text, one for models of a value for each token or step. A
scorer has the one that its read-out asks for, wherever its model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from companion.errors import CompanionError, DataError
from companion.formatting import Encoded, RewardFormatter, Row
from companion.formatting.steps import EncodedSteps, as_conversation, encode_steps, split_steps
from companion.functional.reduction import aggregate
from companion.layouts import read_row
from companion.models.readout import Readout, ScalarReadout, TokenReadout
from companion.scoring.results import Scores, TokenScores

#: A row as token ids; with the places that are read, where the read-out does not say it all.
Text = Encoded | EncodedSteps
#: Of each row the texts, one or both sides of a pair; an error; or None for one that was dropped.
Found = Sequence[Sequence[Text] | CompanionError | None]


def ids_of(text: Text) -> list[int]:
    """A text's token ids."""
    return text.input_ids if isinstance(text, Encoded) else text.encoded.input_ids


class NoValue(float):
    """NaN in place of what would have been read of a text, and why there is nothing."""

    reason: str

    def __new__(cls, reason: str) -> NoValue:
        self = super().__new__(cls, "nan")
        self.reason = reason
        return self


def without_end(ids: Sequence[int], end: int) -> list[int]:
    """Token ids without those at their end that are `end`; at least the first stays."""
    n = len(ids)
    while n > 1 and ids[n - 1] == end:
        n -= 1
    return list(ids[:n])


class ScalarReading:
    """A text has one score, at its last token."""

    def __init__(self, readout: ScalarReadout) -> None:
        self.readout = readout

    def encode(
        self,
        formatter: RewardFormatter,
        rows: Sequence[Any],
        names: Sequence[str],
        fields: Sequence[str],
        terminated: bool | None = None,
    ) -> Found:
        """Encode one field of each row, or both sides of a pair."""
        found: Found
        if self.readout.finished:
            terminated = True
            rows = [_finished(row, fields) for row in rows]
        if len(fields) == 2:
            found = formatter.try_encode_pairs(rows, names=names)
        else:
            each = formatter.try_encode_many(rows, fields[0], terminated=terminated, names=names)
            found = [[item] if isinstance(item, Encoded) else item for item in each]
        if self.readout.skipped is None:
            return found
        return [
            row if row is None or isinstance(row, CompanionError) else [self._read(t) for t in row]
            for row in found
        ]

    def text(self, encoded: Any, name: str) -> Text:
        """Token ids as a text."""
        return self._read(encoded if isinstance(encoded, Text) else Encoded(list(encoded), 0, True))

    def _read(self, text: Text) -> Text:
        """The text up to the token that is read."""
        if self.readout.skipped is None or not isinstance(text, Encoded):
            return text
        ids = without_end(text.input_ids, self.readout.skipped)
        return replace(text, input_ids=ids, prompt_length=min(text.prompt_length, len(ids) - 1))

    def score(self, value: Any) -> float:
        """The score of a text from what was read of it."""
        return float(value)

    def not_finite(self, values: Sequence[Any]) -> str:
        """What to say of values that are no numbers."""
        return f"the score is not finite ({[float(value) for value in values]})"

    def scores(
        self,
        raw: np.ndarray,
        n_tokens: np.ndarray,
        reasons: list[str | None],
        read: Sequence[tuple[Text, Any] | None],
    ) -> Scores:
        """What scoring returns; `read` are texts and values, None for a row without."""
        return Scores(raw, n_tokens, reasons)


def _finished(row: Any, fields: Sequence[str]) -> Any:
    """A row that says nothing of being cut off."""
    if not isinstance(row, Mapping):
        return row
    said = {"terminated", *(f"{name}_terminated" for name in (*fields, "messages", "text"))}
    return {key: value for key, value in row.items() if key not in said}


class TokenReading:
    """A text has a value at each token of its completion, or at the end of each step."""

    def __init__(self, readout: TokenReadout) -> None:
        self.readout = readout

    def encode(
        self,
        formatter: RewardFormatter,
        rows: Sequence[Any],
        names: Sequence[str],
        fields: Sequence[str],
        terminated: bool | None = None,
    ) -> Found:
        """Encode one field of each row, or both sides of a pair, with the places that are read."""
        sides = [self._encode(formatter, rows, names, field, terminated) for field in fields]
        found: list[Any] = []
        for texts in zip(*sides, strict=True):
            bad = [text for text in texts if not isinstance(text, EncodedSteps)]
            found.append(bad[0] if bad else texts)
        return found

    def _encode(
        self,
        formatter: RewardFormatter,
        rows: Sequence[Row],
        names: Sequence[str],
        field: str,
        terminated: bool | None,
    ) -> list[Any]:
        found: list[Any] = []
        for row, name in zip(rows, names, strict=True):
            notes: Counter[str] = Counter()
            try:
                row = read_row(row, name, (field,), notes)
                found.append(self._solution(formatter, row, name, field, terminated))
                if notes:
                    formatter.counts.add(prompts_found=1)
            except CompanionError as error:
                found.append(error)
        good = [i for i, item in enumerate(found) if not isinstance(item, CompanionError)]
        solutions, names = [found[i] for i in good], [names[i] for i in good]
        encoded: Sequence[Any]
        if self.readout.kind == "process":
            separator = str(self.readout.separator)
            chat = self.readout.chat
            encoded = encode_steps(formatter, solutions, separator, chat=chat, names=names)
            if self.readout.read_token is not None:
                encoded = [self._at_marker(item) for item in encoded]
        else:
            encoded = formatter.try_encode_many(solutions, names=names)
        for i, item, name in zip(good, encoded, names, strict=True):
            found[i] = self.text(item, name) if isinstance(item, Encoded) else item
        return found

    def _at_marker(self, item: Any) -> Any:
        """Read at the token that marks the end of a step, not at the white space behind it."""
        if not isinstance(item, EncodedSteps):
            return item
        ids, marker = item.encoded.input_ids, self.readout.read_token
        ends = [
            next((at for at in range(end, -1, -1) if ids[at] == marker), -1) for end in item.ends
        ]
        if min(ends, default=-1) < 0 or len(set(ends)) < len(ends):
            return DataError(
                f"the separator {self.readout.separator!r} does not hold the token {marker} in "
                "this text",
                "name the separator as the model was trained with it (--step_separator)",
            )
        return replace(item, ends=ends)

    def text(self, encoded: Any, name: str) -> Text:
        """Token ids with the places that are read."""
        if isinstance(encoded, EncodedSteps):
            return encoded
        if isinstance(encoded, Encoded) and self.readout.kind == "outcome":
            return EncodedSteps(encoded, list(range(encoded.prompt_length, len(encoded))))
        raise DataError(
            f"{name}: nothing says which of its tokens to read",
            "give EncodedSteps (companion.formatting.encode_steps), or the rows to score()",
        )

    def score(self, value: Any) -> float:
        """The score of a text: the aggregate of its values."""
        values = self.readout.values(value.double())[None]
        mask = torch.ones_like(values, dtype=torch.bool)
        return float(aggregate(values, mask, self.readout.aggregation)[0])

    def not_finite(self, values: Sequence[Any]) -> str:
        """What to say of values that are no numbers."""
        return "a value is not finite"

    def scores(
        self,
        raw: np.ndarray,
        n_tokens: np.ndarray,
        reasons: list[str | None],
        read: Sequence[tuple[EncodedSteps, torch.Tensor] | None],
    ) -> TokenScores:
        """What scoring returns; `read` are texts and logits, None for a row without."""

        def each(make: Any) -> list[Any]:
            return [None if one is None else make(one[0], one[1].double()) for one in read]

        return TokenScores(
            raw,
            n_tokens,
            reasons,
            values=each(lambda _, logits: self.readout.values(logits).numpy()),
            wrong=each(lambda _, logits: self.readout.wrong(logits).numpy()),
            logits=each(lambda _, logits: logits.numpy()),
            places=each(lambda text, _: list(text.ends)),
            readout=self.readout,
        )

    def _solution(
        self,
        formatter: RewardFormatter,
        row: Any,
        name: str,
        field: str,
        terminated: bool | None,
    ) -> dict[str, Any]:
        """The row as the formatter takes it: the prompt apart, and for a process model the steps.

        Without a prompt nothing would say where the completion begins, and its values would be
        mixed with those of the prompt.
        """
        given = dict(row) if isinstance(row, Mapping) else {"messages": row}
        messages = given.get("messages")
        if field in given and field != "completion":
            given["completion"] = given.pop(field)
            if f"{field}_terminated" in given:
                given["terminated"] = given.pop(f"{field}_terminated")
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
        if self.readout.closed:  # its last step ends as the others do
            given["terminated"] = False
        if self.readout.kind == "outcome":
            if (
                self.readout.chat
                and formatter.text is None
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
        return {**given, "completions": split_steps(completion, str(self.readout.separator))}


def reading_of(readout: Readout) -> ScalarReading | TokenReading:
    """What reads a model's texts by its read-out."""
    return TokenReading(readout) if isinstance(readout, TokenReadout) else ScalarReading(readout)
