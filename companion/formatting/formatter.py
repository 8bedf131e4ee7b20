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
from typing import Any

from companion.errors import CompanionError, DataError, ModelError
from companion.formatting.conversation import transcript_template
from companion.formatting.drafting import Row, Text
from companion.formatting.encoded import Encoded, FormatCounts
from companion.formatting.encoding import Encoder, Overlong
from companion.formatting.recipe import (
    RECIPE_FILE,
    RECIPE_VERSION,
    recipe_fingerprint,
    tokenizer_recipe,
)

_OVERLONG = ("drop", "error", "truncate_prompt")


class RewardFormatter(Encoder):
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
        super().__init__(tokenizer, chat_template, max_length, overlong)
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
        return _raised(self._encode_drafts([[draft]])[0])[0]  # type: ignore[no-any-return]

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


def _raised(result: Any) -> Any:
    if isinstance(result, CompanionError):
        raise result
    return result
