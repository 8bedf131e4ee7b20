"""Special tokens in what was given: found, and on request read as the letters that they are.

Like transformers and TRL, the formatter lets ``<|im_end|>`` in a user's text end the turn, and
counts it. With ``split_special_tokens`` it does not: transformers' switch of that name splits those
of the chat template too, so a text is here tokenised in the pieces between the template's own.
(``apply_chat_template(…, sanitize_control_tokens=True)`` of transformers 5.23 does so for messages,
with the same ids, but not for plain text, nor with spans that say where a completion begins.)
Chapter 2.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, Final

from companion.errors import DataError, ModelError

Span = tuple[int, int]

_OPEN, _CLOSE, _FIRST = "\ue0f0", "\ue0f1", 0xE100
_HIDDEN: Final = re.compile(f"{_OPEN}(.){_CLOSE}")


class SpecialTokens:
    """The special tokens of a tokenizer, found in texts.

    Tokens that are in the vocabulary but not marked as special (``<think>``) are meant to be
    written, and do not count.
    """

    def __init__(self, tokenizer: Any) -> None:
        known = {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        } | set(tokenizer.all_special_tokens)
        self.tokens = sorted(filter(None, known), key=lambda token: (-len(token), token))
        self.pattern = re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")
        self._first = {token[0] for token in self.tokens}

    def within(self, text: str) -> bool:
        """Whether one stands in the text."""
        for letter in self._first:
            if letter in text:
                break
        else:
            return False
        return self.pattern.search(text) is not None

    def hidden(self, value: Any, where: str) -> Any:
        """The text, list or mapping with stand-ins for the tokens in it."""
        if isinstance(value, str):
            if _OPEN in value:
                raise DataError(
                    f"{where}: holds the character U+E0F0, which stands for a special token here",
                    "take it out, or leave split_special_tokens off",
                )
            return self.pattern.sub(
                lambda m: f"{_OPEN}{chr(_FIRST + self.tokens.index(m[0]))}{_CLOSE}", value
            )
        if isinstance(value, Mapping):
            return {key: self.hidden(item, where) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hidden(item, where) for item in value]
        return value

    def shown(self, text: str) -> tuple[str, tuple[Span, ...]]:
        """A text with the tokens in place of their stand-ins, and where they are."""
        out, spans, length, last = [], [], 0, 0
        for match in _HIDDEN.finditer(text):
            token = self.tokens[ord(match[1]) - _FIRST]
            out += [text[last : match.start()], token]
            length += match.start() - last + len(token)
            spans.append((length - len(token), length))
            last = match.end()
        return "".join([*out, text[last:]]), tuple(spans)


class PieceTokenizer:
    """Tokenises a text in the pieces between its special tokens, but for some that are letters."""

    def __init__(self, tokenizer: Any, special: SpecialTokens) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "split_special_tokens needs a fast tokenizer", "use the fast tokenizer of the model"
            )
        self.special = special
        self._id_of = tokenizer.convert_tokens_to_ids
        # a copy: the switch is kept in the tokenizer, which other threads may be using
        self._letters = copy.deepcopy(tokenizer)

    def __call__(self, text: str, letters: tuple[Span, ...] = ()) -> tuple[list[int], list[Span]]:
        """Ids and spans; special tokens within `letters` are spelt."""
        ids: list[int] = []
        spans: list[Span] = []

        def spell(begin: int, end: int) -> None:
            if begin == end:
                return
            piece = self._letters(
                text[begin:end],
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids.extend(piece["input_ids"])
            spans.extend((a + begin, b + begin) for a, b in piece["offset_mapping"])

        last = 0
        for match in self.special.pattern.finditer(text):
            if any(begin < match.end() and match.start() < end for begin, end in letters):
                continue
            spell(last, match.start())
            ids.append(self._id_of(match[0]))
            spans.append(match.span())
            last = match.end()
        spell(last, len(text))
        return ids, spans

    def check(self, text: str, ids: list[int]) -> None:
        """Refuse a tokenizer that has other ids for a text in pieces.

        Raises
        ------
        ModelError
        """
        if self(text)[0] != ids:
            raise ModelError(
                "split_special_tokens cannot be honoured: this tokenizer gives a text in pieces "
                "other tokens than in one",
                "leave it off, and take special tokens out of the texts",
            )
