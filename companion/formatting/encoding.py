"""From the texts of rows to token ids: one call of the tokenizer for many, BOS and EOS, the length.

The middle of :class:`companion.formatting.RewardFormatter`, between the characters
(:mod:`companion.formatting.drafting`) and the rows. Chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from companion.errors import CompanionError, DataError, ReadoutError
from companion.formatting.drafting import Draft, Drafter, Row
from companion.formatting.encoded import Encoded, FormatCounts

Overlong = Literal["drop", "error", "truncate_prompt"]
#: ids and character spans, as the tokenizer gives them
Raw = tuple[list[int], list[tuple[int, int]]]


class _Special(NamedTuple):
    """Ids of the special tokens; a tokenizer looks each up anew when it is asked."""

    bos: int | None
    eos: int | None
    pad: int | None


class Encoder(Drafter):
    """Turns drafts into token ids within ``max_length``, and counts what it did."""

    def __init__(
        self,
        tokenizer: Any,
        template_override: str | None,
        max_length: int | None,
        overlong: Overlong,
    ) -> None:
        super().__init__(tokenizer, template_override)
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self.counts = FormatCounts()

    def _encode_groups(
        self,
        rows: Sequence[Row],
        names_of_fields: Sequence[str],
        terminated: bool | None,
        names: Sequence[str] | None,
    ) -> list[list[Encoded | None] | CompanionError]:
        self._last_opening = None  # what it was made of may have changed since
        drafts: list[list[Draft] | CompanionError] = []
        for number, row in enumerate(rows):
            where = names[number] if names is not None else f"row {number}"
            try:
                drafts.append([self._draft_row(row, f, terminated, where) for f in names_of_fields])
            except CompanionError as error:
                drafts.append(error)
        return self._encode_drafts(drafts)

    def _encode_drafts(
        self, drafts: Sequence[list[Draft] | CompanionError], raw: list[Raw] | None = None
    ) -> list[list[Encoded | None] | CompanionError]:
        """Tokenise the drafts of rows, and count; `raw` is filled with what the tokenizer gave."""
        tokenizer = self.tokenizer
        special = _Special(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        flat = [draft for group in drafts if isinstance(group, list) for draft in group]
        encoded = iter(self._tokenize(flat, special, raw))
        out: list[list[Encoded | None] | CompanionError] = []
        for group in drafts:
            if isinstance(group, CompanionError):
                self.counts.rows += 1
                out.append(group)
                continue
            results = [next(encoded) for _ in group]
            try:
                out.append(self._count_row(results, group, special))
            except CompanionError as error:
                out.append(error)
        return out

    def _tokenize(
        self, drafts: Sequence[Draft], special: _Special, raw: list[Raw] | None
    ) -> list[Encoded]:
        """Ids and prompt lengths, in order: one call for plain texts and one for conversations."""
        out: list[Encoded | None] = [None] * len(drafts)
        spans: list[Raw] = [([], [])] * len(drafts)
        for chat in (False, True):
            chosen = [i for i, draft in enumerate(drafts) if draft.chat is chat]
            if not chosen:
                continue
            batch = self.tokenizer(
                [drafts[i].text for i in chosen],
                add_special_tokens=not chat,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=raw is not None,
                verbose=False,
            )
            adds_eos = not chat and self._adds()[1]
            for place, i in enumerate(chosen):
                ids = list(batch["input_ids"][place])
                if raw is not None:
                    spans[i] = (list(ids), batch["offset_mapping"][place])
                if self.tokenizer.is_fast:
                    length = _prompt_length(batch.encodings[place], drafts[i].split)
                else:
                    length = self._common_ids(drafts[i], ids)
                out[i] = self._ended(ids, length, drafts[i], adds_eos, special)
        if raw is not None:
            raw.extend(spans)
        return [encoded for encoded in out if encoded is not None]

    def _common_ids(self, draft: Draft, ids: list[int]) -> int:
        """Prompt length without offsets: ids that the prompt alone shares with the whole."""
        prompt = self.tokenizer(draft.text[: draft.split], add_special_tokens=not draft.chat)
        length = 0
        for a, b in zip(prompt["input_ids"], ids, strict=False):
            if a != b:
                break
            length += 1
        return length

    def _ended(
        self, ids: list[int], length: int, draft: Draft, adds_eos: bool, special: _Special
    ) -> Encoded:
        """One BOS at most; plain text ends with one EOS, or with none if it was cut off."""
        bos, eos, _ = special
        while bos is not None and len(ids) > 2 and ids[0] == ids[1] == bos:
            del ids[0]
            length = max(length - 1, 0)
        if not draft.chat:
            if adds_eos and ids and ids[-1] == eos:
                ids.pop()
            if draft.terminated and ids[-1:] != [eos]:
                raise ReadoutError(
                    f"the tokenizer does not turn its EOS {self.tokenizer.eos_token!r} into one "
                    f"token: a finished text ends with the id {ids[-1]} in place of {eos}",
                    "register the EOS as a special token of the tokenizer",
                )
        length = min(length, len(ids) - 1)
        return Encoded(ids, max(length, 0), draft.terminated)

    def _count_row(
        self, encoded: Sequence[Encoded], drafts: Sequence[Draft], special: _Special
    ) -> list[Encoded | None]:
        """Fit the sequences of one row into ``max_length`` and count what was done."""
        self.counts.rows += 1
        results: list[Encoded | None] = []
        for item, draft in zip(encoded, drafts, strict=True):
            pad = special.pad
            if pad is not None and item.input_ids[-1] == pad != special.eos:
                # transformers reads out at the last id that is not the pad id
                raise DataError(
                    f"{draft.where}: the text ends with the pad token "
                    f"{self.tokenizer.pad_token!r}, so stock tools would read its score elsewhere",
                    "take the pad tokens off the text",
                )
            results.append(self._fit(item, draft, special))
        if any(item is None for item in results):
            self.counts.dropped_overlong += 1
            return [None] * len(results)
        for kept in results:
            assert kept is not None
            self.counts.sequences += 1
            self.counts.unterminated += not kept.terminated
            self.counts.truncated += kept.cut_tokens > 0
            self.counts.tokens_cut += kept.cut_tokens
        return results

    def _fit(self, item: Encoded, draft: Draft, special: _Special) -> Encoded | None:
        if self.max_length is None or len(item) <= self.max_length:
            return item
        surplus = len(item) - self.max_length
        if self.overlong == "error":
            raise DataError(
                f"{draft.where}: {len(item)} tokens, {surplus} more than max_length="
                f"{self.max_length}",
                "raise max_length, or use overlong='drop' or 'truncate_prompt'",
            )
        if self.overlong == "drop":
            return None
        ids = item.input_ids
        keep = int(special.bos is not None and ids[0] == special.bos and item.prompt_length > 0)
        if surplus > item.prompt_length - keep:
            return None
        return Encoded(
            ids[:keep] + ids[keep + surplus :],
            item.prompt_length - surplus,
            item.terminated,
            surplus,
        )


def _prompt_length(encoding: Any, split: int) -> int:
    """Number of tokens before the first one that ends beyond the character `split`."""
    place = encoding.char_to_token(split)  # the offsets of all tokens are slow to fetch
    if place is None:  # no token holds that character: white space that the tokenizer drops
        ends = (end > split for _, end in encoding.offsets)
        place = next((n for n, beyond in enumerate(ends) if beyond), len(encoding))
    return int(place)
