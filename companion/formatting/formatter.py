"""The one formatter: the only code that turns a row into token ids.

Training, scoring, serving and the audit all call it, so a text has one sequence of ids and hence
one score. Its ids are those of TRL's ``RewardTrainer`` wherever TRL is right; where it is not
(two BOS on a text that already begins with one, reward-bench #164; EOS left out, reward-bench #94;
rows dropped for their length without a word) it does the right thing and counts. Chapter 4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from companion.errors import CompanionError, DataError, ModelError, ReadoutError
from companion.formatting.conversation import transcript_template
from companion.formatting.drafting import Draft, Drafter, Row, Text
from companion.formatting.encoded import Encoded, FormatCounts
from companion.formatting.recipe import (
    RECIPE_FILE,
    RECIPE_VERSION,
    recipe_fingerprint,
    tokenizer_recipe,
)

Overlong = Literal["drop", "error", "truncate_prompt"]

_OVERLONG = ("drop", "error", "truncate_prompt")


class RewardFormatter(Drafter):
    """Turn rows into token ids; know BOS, EOS, the chat template, and what was cut off.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Preferably a fast one: offsets then give the border of prompt and completion.
    max_length : int, optional
        Longest sequence in tokens. None: no limit.
    overlong : {"drop", "error", "truncate_prompt"}
        What to do with a longer one. ``truncate_prompt`` cuts the prompt from its left, keeps BOS,
        and never touches the completion; a completion that is too long by itself is dropped.
        The two sides of a pair are cut each by itself, so that a score depends on its text alone.
    chat_template : str, optional
        In place of the tokenizer's own. A tokenizer without any gets the plain transcript of
        :func:`companion.formatting.conversation.transcript_template`, with a line in ``notes``.

    Notes
    -----
    * Messages: exactly ``tokenizer.apply_chat_template(prompt + completion)``; for a completion
      that was cut off (``terminated=False``) the template's ``continue_final_message``, so that no
      end of turn hides the cut.
    * Plain text: prompt and completion joined as they are, the special tokens that the tokenizer
      adds, never two BOS, one EOS if terminated and none if not.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        overlong: Overlong = "drop",
        chat_template: str | None = None,
    ) -> None:
        if overlong not in _OVERLONG:
            raise DataError(f"overlong is {overlong!r}", f"use one of: {', '.join(_OVERLONG)}")
        if max_length is not None and max_length < 1:
            raise DataError(f"max_length is {max_length}", "use a positive number or None")
        super().__init__(tokenizer, chat_template)
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self.counts = FormatCounts()
        self.notes: list[str] = []
        if chat_template is None and tokenizer.chat_template is None:
            if tokenizer.eos_token is not None:
                self.template_override = transcript_template(self._adds()[0])
            self.notes.append(
                "the tokenizer has no chat template: messages are written as a plain transcript "
                "('User: …', blank line, 'Assistant: …', EOS), which is saved with the model"
            )

    # ------------------------------------------------------------------ what it is made of

    def recipe(self) -> dict[str, Any]:
        """All that decides the ids, as plain JSON: two formatters with equal recipes agree."""
        return {
            **tokenizer_recipe(self.tokenizer, *self._adds()),
            "max_length": self.max_length,
            "overlong": self.overlong,
            "chat_template": self.chat_template,
        }

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the recipe."""
        return recipe_fingerprint(self.recipe())

    @classmethod
    def from_recipe(cls, tokenizer: Any, recipe: Mapping[str, Any]) -> RewardFormatter:
        """Build the formatter that wrote ``recipe``; refuse a tokenizer that would differ.

        Raises
        ------
        ModelError
            If the recipe is of an unknown version, or the tokenizer gives another recipe.
        """
        if recipe.get("version") != RECIPE_VERSION:
            raise ModelError(
                f"the formatter's recipe has the version {recipe.get('version')!r}, "
                f"this companion reads {RECIPE_VERSION}",
                "use the companion that saved the model, or save it anew",
            )
        template = recipe.get("chat_template")
        override = template if template != tokenizer.chat_template else None
        formatter = cls(
            tokenizer,
            max_length=recipe.get("max_length"),
            overlong=recipe.get("overlong", "drop"),
            chat_template=override,
        )
        now = formatter.recipe()
        changed = sorted(key for key in now if now[key] != recipe.get(key))
        if changed:
            raise ModelError(
                f"the tokenizer is not the one that the recipe was made with: {', '.join(changed)} "
                "changed, so the same text would get other token ids and another score",
                "restore the tokenizer files that were saved with the model",
            )
        return formatter

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Save the tokenizer, with the template in use, and the recipe (``reward_formatter.json``).

        The template goes into the tokenizer so that stock tools give the same ids.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        before = self.tokenizer.chat_template
        self.tokenizer.chat_template = self.chat_template
        try:
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.chat_template = before
        text = json.dumps(self.recipe(), ensure_ascii=False, indent=2)
        (folder / RECIPE_FILE).write_text(text + "\n", encoding="utf-8")

    def reset_counts(self) -> None:
        """Begin to count anew."""
        self.counts = FormatCounts()

    # ------------------------------------------------------------------ encoding

    def encode(
        self,
        prompt: Text | None,
        completion: Text | None = None,
        *,
        terminated: bool = True,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Encoded | None:
        """Encode one prompt with its completion, or one whole text or conversation.

        Parameters
        ----------
        prompt, completion : str or list of messages, optional
            With ``completion=None``, ``prompt`` is the whole. A completion that is a string after
            a prompt of messages is taken as a message of the assistant.
        terminated : bool
            False for a completion that was cut off: no EOS, no end of turn.
        tools, chat_template_kwargs
            Handed to the chat template.

        Returns
        -------
        Encoded or None
            None if it is too long and was dropped (``counts.dropped_overlong``).

        Raises
        ------
        DataError
            For an empty completion, a bad role, mixed kinds, or a text that is too long
            under ``overlong="error"``.
        """
        draft = self._draft(
            prompt, completion, terminated, tools, chat_template_kwargs, where="the row"
        )
        return self._count_row([self._tokenize([draft])[0]], [draft])[0]

    def encode_row(
        self, row: Row, field: str = "completion", *, terminated: bool | None = None
    ) -> Encoded | None:
        """Encode one field of a row; see :meth:`encode_many` for the rows it takes."""
        return self.encode_many([row], field, terminated=terminated)[0]

    def encode_pair(self, row: Mapping[str, Any]) -> tuple[Encoded, Encoded] | None:
        """Encode chosen and rejected; None, counted once, if either is too long."""
        return self.encode_pairs([row])[0]

    def encode_many(
        self,
        rows: Sequence[Row],
        field: str = "completion",
        *,
        terminated: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Encoded | None]:
        """Encode many rows with one call of the tokenizer.

        Parameters
        ----------
        rows : sequence
            Each a string, a list of messages, or a mapping with ``prompt`` and ``field``, with
            ``field`` alone, with ``messages``, or with ``text``; optionally ``tools``,
            ``chat_template_kwargs``, and ``terminated`` or ``<field>_terminated``.
        field : str
            The field that holds the completion.
        terminated : bool, optional
            Overrides what the rows say.
        names : sequence of str, optional
            How to call each row in an error; default ``row 0``, ``row 1``, …

        Raises
        ------
        DataError
            For the first bad row, which it names.
        """
        results = self.try_encode_many(rows, field, terminated=terminated, names=names)
        return [_raised(result) for result in results]

    def try_encode_many(
        self,
        rows: Sequence[Row],
        field: str = "completion",
        *,
        terminated: bool | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Encoded | CompanionError | None]:
        """As :meth:`encode_many`, with the error of a bad row in its place."""
        groups = self._encode_groups(rows, [field], terminated, names)
        return [group if isinstance(group, CompanionError) else group[0] for group in groups]

    def encode_pairs(
        self, rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None
    ) -> list[tuple[Encoded, Encoded] | None]:
        """Encode many pairs with one call of the tokenizer; both sides of a row or neither."""
        return [_raised(result) for result in self.try_encode_pairs(rows, names=names)]

    def try_encode_pairs(
        self, rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None
    ) -> list[tuple[Encoded, Encoded] | CompanionError | None]:
        """As :meth:`encode_pairs`, with the error of a bad row in its place."""
        out: list[tuple[Encoded, Encoded] | CompanionError | None] = []
        for group in self._encode_groups(rows, ["chosen", "rejected"], None, names):
            if isinstance(group, CompanionError):
                out.append(group)
            else:
                chosen, rejected = group
                out.append(None if chosen is None or rejected is None else (chosen, rejected))
        return out

    # ------------------------------------------------------------------ inside

    def _encode_groups(
        self,
        rows: Sequence[Row],
        names_of_fields: Sequence[str],
        terminated: bool | None,
        names: Sequence[str] | None,
    ) -> list[list[Encoded | None] | CompanionError]:
        drafts: list[list[Draft] | CompanionError] = []
        for number, row in enumerate(rows):
            where = names[number] if names is not None else f"row {number}"
            try:
                drafts.append([self._draft_row(row, f, terminated, where) for f in names_of_fields])
            except CompanionError as error:
                drafts.append(error)
        flat = [draft for group in drafts if isinstance(group, list) for draft in group]
        encoded = iter(self._tokenize(flat))
        out: list[list[Encoded | None] | CompanionError] = []
        for group in drafts:
            if isinstance(group, CompanionError):
                self.counts.rows += 1
                out.append(group)
                continue
            results = [next(encoded) for _ in group]
            try:
                out.append(self._count_row(results, group))
            except CompanionError as error:
                out.append(error)
        return out

    def _tokenize(self, drafts: Sequence[Draft]) -> list[Encoded]:
        """Ids and prompt lengths, in order: one call for plain texts and one for conversations."""
        out: list[Encoded | None] = [None] * len(drafts)
        for chat in (False, True):
            chosen = [i for i, draft in enumerate(drafts) if draft.chat is chat]
            if not chosen:
                continue
            batch = self.tokenizer(
                [drafts[i].text for i in chosen],
                add_special_tokens=not chat,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=self.tokenizer.is_fast,
                verbose=False,
            )
            adds_eos = not chat and self._adds()[1]
            for place, i in enumerate(chosen):
                ids = list(batch["input_ids"][place])
                if self.tokenizer.is_fast:
                    ends = (end > drafts[i].split for _, end in batch["offset_mapping"][place])
                    length = next((n for n, beyond in enumerate(ends) if beyond), len(ids))
                else:
                    length = self._common_ids(drafts[i], ids)
                out[i] = self._special(ids, length, drafts[i], adds_eos)
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

    def _special(self, ids: list[int], length: int, draft: Draft, adds_eos: bool) -> Encoded:
        """One BOS at most; plain text ends with one EOS, or with none if it was cut off."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
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
        self, encoded: Sequence[Encoded], drafts: Sequence[Draft]
    ) -> list[Encoded | None]:
        """Fit the sequences of one row into ``max_length`` and count what was done."""
        self.counts.rows += 1
        results: list[Encoded | None] = []
        for item, draft in zip(encoded, drafts, strict=True):
            pad = self.tokenizer.pad_token_id
            if pad is not None and item.input_ids[-1] == pad != self.tokenizer.eos_token_id:
                # transformers reads out at the last id that is not the pad id
                raise DataError(
                    f"{draft.where}: the text ends with the pad token "
                    f"{self.tokenizer.pad_token!r}, so stock tools would read its score elsewhere",
                    "take the pad tokens off the text",
                )
            results.append(self._fit(item, draft))
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

    def _fit(self, item: Encoded, draft: Draft) -> Encoded | None:
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
        bos = self.tokenizer.bos_token_id
        keep = int(bos is not None and ids[0] == bos and item.prompt_length > 0)
        if surplus > item.prompt_length - keep:
            return None
        return Encoded(
            ids[:keep] + ids[keep + surplus :],
            item.prompt_length - surplus,
            item.terminated,
            surplus,
        )


def _raised(result: Any) -> Any:
    if isinstance(result, CompanionError):
        raise result
    return result
