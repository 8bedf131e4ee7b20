"""What the formatter gives: a text as token ids, and counts of what was done on the way.

Chapter 2.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass

#: one for all formatters: it is held for a moment, and a formatter is pickled and copied
_ADDING = threading.Lock()


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
    """

    input_ids: list[int]
    prompt_length: int
    terminated: bool
    cut_tokens: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class FormatCounts:
    """What a formatter did. ``rows`` counts calls (a pair is one row), the rest as named.

    ``prompts_found`` are rows whose prompt stood under another name, or with a system message or a
    history beside it (:mod:`companion.layouts`).
    """

    rows: int = 0
    sequences: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    unterminated: int = 0
    prompts_found: int = 0

    def add(self, **counts: int) -> None:
        """Add to some of the counts; many threads may."""
        with _ADDING:
            for name, more in counts.items():
                setattr(self, name, getattr(self, name) + more)

    def to_dict(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)
