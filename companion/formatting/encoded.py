"""What the formatter gives: a text as token ids, and counts of what was done on the way.

Chapter 2.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Final

#: one for all formatters: it is held for a moment, and a formatter is pickled and copied
_ADDING = threading.Lock()

#: what may be said of a text, by the name of its count, in words that follow a number
REMARKS: Final = {
    "whole_texts": "texts without a prompt, read as they are",
    "already_rendered": "texts that hold turns already (their markers, or Human: and Assistant:), "
    "read as they are",
    "earlier_left_out": "texts whose chat template leaves out content of earlier turns",
    "completion_left_out": "texts whose chat template leaves out content of the completion",
    "tools_left_out": "texts whose chat template does not write their tools",
    "special_in_text": "texts with special tokens in what was given, read as such tokens "
    "(split_special_tokens reads them as letters)",
    "special_as_letters": "texts with special tokens in what was given, read as letters",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text as the model sees it.

    Attributes
    ----------
    input_ids : list of int
        Token ids, BOS and EOS included.
    prompt_length : int
        How many of them belong to the prompt. A token that straddles the border counts as
        completion. 0 (or 1 with BOS) for a whole text whose prompt is unknown.
    terminated : bool
        Whether the completion was finished, so that its end was written.
    cut_tokens : int
        Tokens that were cut from the prompt's left to fit ``max_length``.
    remarks : tuple of str
        What was noticed, by the names in :data:`REMARKS`.
    """

    input_ids: list[int]
    prompt_length: int
    terminated: bool
    cut_tokens: int = 0
    remarks: tuple[str, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class FormatCounts:
    """What a formatter did. ``rows`` counts calls (a pair is one row), the rest as named.

    ``prompts_found`` are rows whose prompt stood under another name, or with a system message or a
    history beside it (:mod:`companion.layouts`). Those from ``whole_texts``
    on are explained by :data:`REMARKS`.
    """

    rows: int = 0
    sequences: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    unterminated: int = 0
    prompts_found: int = 0
    whole_texts: int = 0
    already_rendered: int = 0
    earlier_left_out: int = 0
    completion_left_out: int = 0
    tools_left_out: int = 0
    special_in_text: int = 0
    special_as_letters: int = 0

    def add(self, **counts: int) -> None:
        """Add to some of the counts; many threads may."""
        with _ADDING:
            for name, more in counts.items():
                setattr(self, name, getattr(self, name) + more)

    def remarks(self) -> list[str]:
        """What was noticed of the texts, a line each."""
        return [f"{count:,} {REMARKS[n]}" for n in REMARKS if (count := getattr(self, n))]

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)
