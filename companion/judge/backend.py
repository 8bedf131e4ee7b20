"""Questions to a judge's model and its answers; what every backend has in common. Chapter 3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from companion.judge.templates import JudgeTemplate, Outcome


@dataclass(frozen=True)
class Question:
    """Messages, the template that they were made by, and how many tokens the answer may have."""

    messages: tuple[dict[str, str], ...]
    template: JudgeTemplate
    max_tokens: int

    def key(self, identity: dict[str, Any]) -> str:
        """SHA-256 of all that decides the answer: model, settings, template, texts."""
        content = {
            "model": identity,
            "messages": list(self.messages),
            "template": self.template.to_dict(),
            "max_tokens": self.max_tokens,
        }
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes
    ----------
    text : str
        As the model wrote it, without special tokens.
    finished : bool
        Whether the model ended it by itself. False if ``max_tokens`` or a filter cut it off, or a
        server gave it up.
    probabilities : dict or None
        See :func:`companion.judge.probabilities.verdict_probabilities`; None where the backend
        gives none.
    refused : str or None
        Why this question cannot be answered (it is too long, the server rejects it). Not cached.
    kept : bool
        Whether the same question would be answered so again. What was no answer (no text at all,
        one that a server gave up) is not cached.
    """

    text: str
    finished: bool
    probabilities: dict[Outcome, float] | None = None
    refused: str | None = None
    kept: bool = True


class Backend(Protocol):
    """A model that can be asked."""

    name: str  #: of the model, for reports
    retries: int  #: requests that had to be sent again

    def identity(self) -> dict[str, Any]:
        """Model and settings, as JSON values: equal identities give equal answers."""

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Ask; yield (index, answer) as they come, in any order.

        Raises
        ------
        JudgeError
            If the model cannot be asked at all.
        """
