"""From a row to the text that will be tokenised: kinds of rows, the chat template, the end.

The lower half of :class:`companion.formatting.RewardFormatter`. It decides the characters and the
border between prompt and completion; the formatter decides the ids. Chapter 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from companion.errors import DataError, ModelError
from companion.formatting.conversation import Message, check_ending, check_messages, is_messages

Text = str | Sequence[Mapping[str, Any]]
Row = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


@dataclass(slots=True)
class Draft:
    """A text before tokenisation: ``split`` is the number of characters of the prompt."""

    text: str
    split: int
    chat: bool
    terminated: bool
    where: str


class Drafter:
    """Writes texts; knows the tokenizer's special tokens and template, not its vocabulary."""

    def __init__(self, tokenizer: Any, template_override: str | None) -> None:
        self.tokenizer = tokenizer
        self.template_override = template_override
        self._last_opening: tuple[Any, str] | None = None

    @property
    def chat_template(self) -> Any:
        """The template in use: the override, the tokenizer's own, or the plain transcript."""
        return (
            self.template_override
            if self.template_override is not None
            else self.tokenizer.chat_template
        )

    def _adds(self) -> tuple[bool, bool]:
        """Whether the tokenizer itself puts BOS before, and EOS after, plain text."""
        ids = self.tokenizer("a")["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return (
            bos is not None and ids[:1] == [bos] and bare[:1] != [bos],
            eos is not None and ids[-1:] == [eos] and bare[-1:] != [eos],
        )

    def _draft_row(self, row: Row, field: str, terminated: bool | None, where: str) -> Draft:
        if not isinstance(row, Mapping):
            return self._draft(row, None, terminated is not False, None, None, where)
        prompt, completion = row.get("prompt"), row.get(field)
        if completion is None:
            whole = next((k for k in ("messages", "text") if row.get(k) is not None), None)
            if field != "completion" or whole is None or prompt is not None:
                raise DataError(
                    f"{where}: the field {field!r} is missing or null",
                    f"the row has: {', '.join(map(str, row)) or 'nothing'}",
                )
            prompt = row[whole]
            field = whole
        if terminated is None:
            said = row.get(f"{field}_terminated", row.get("terminated"))
            if said is not None and not isinstance(said, bool):
                raise DataError(f"{where}: 'terminated' is {said!r}, not true or false")
            terminated = said is not False
        if prompt is None or (isinstance(prompt, (list, tuple)) and not prompt):
            prompt, completion = completion, None
        tools = row.get("tools")
        if isinstance(tools, str):  # TRL lets a column of tools be JSON text
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: 'tools' is no valid JSON: {error}") from error
        kwargs = row.get("chat_template_kwargs")
        return self._draft(prompt, completion, terminated, tools, kwargs, f"{where}, {field!r}")

    def _draft(
        self,
        prompt: Text | None,
        completion: Text | None,
        terminated: bool,
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        where: str,
    ) -> Draft:
        for value in (prompt, completion):
            if value is not None and not isinstance(value, str) and not is_messages(value):
                raise DataError(
                    f"{where}: a {type(value).__name__} that is neither text nor a list of messages"
                )
        if prompt is None or (completion is None and isinstance(prompt, str)):
            prompt, completion = ("", prompt) if prompt is not None else ("", completion)
        if isinstance(prompt, str):
            if completion is not None and not isinstance(completion, str):
                if prompt:
                    raise DataError(
                        f"{where}: the prompt is text and the completion is messages",
                        'write the prompt as [{"role": "user", "content": …}]',
                    )
                return self._draft_messages(completion, None, terminated, tools, kwargs, where)
            return self._draft_text(prompt, completion or "", terminated, where)
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return self._draft_messages(prompt, completion, terminated, tools, kwargs, where)

    def _draft_text(self, prompt: str, completion: str, terminated: bool, where: str) -> Draft:
        eos = self.tokenizer.eos_token
        body = completion
        while eos and body.endswith(eos):
            body = body[: -len(eos)]
        if not body.strip():
            raise DataError(f"{where}: the completion is empty", "drop the row or give it a text")
        if terminated and eos is None:
            raise ModelError(
                "the tokenizer has no EOS token, so the end of a text cannot be marked",
                "set tokenizer.eos_token to the token that ended the model's training texts",
            )
        if not terminated and len(body) < len(completion):
            raise DataError(
                f"{where}: said to be cut off (terminated=false), but it ends with {eos!r}",
                "set terminated to true, or take the end token off",
            )
        text = prompt + body + (eos if terminated else "")
        return Draft(text, len(prompt), False, terminated, where)

    def _draft_messages(
        self,
        prompt: Sequence[Mapping[str, Any]],
        completion: Sequence[Mapping[str, Any]] | None,
        terminated: bool,
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        where: str,
    ) -> Draft:
        whole = check_messages([*prompt, *(completion or [])], where)
        if completion is not None and not completion:
            raise DataError(f"{where}: the completion has no messages")
        check_ending(whole, where)
        opening = whole[: len(prompt)] if completion is not None else whole[:-1]
        text = self._render(whole, tools, kwargs, where, continue_final_message=not terminated)
        split = 0
        if opening:
            # the sides of a pair, or the candidates of a prompt, come one after the other
            asked = (opening, tools, kwargs, self.chat_template)
            last = self._last_opening
            if last is None or last[0] != asked:
                last = self._last_opening = asked, self._render_opening(*asked[:3], where)
            head = last[1]
            split = len(head) if text.startswith(head) else _common_prefix(head, text)
        if split == len(text):
            raise DataError(f"{where}: the chat template leaves nothing of the completion")
        return Draft(text, split, True, terminated, where)

    def _render_opening(
        self,
        opening: list[Message],
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        where: str,
    ) -> str:
        # Some templates refuse a conversation that ends here (a lone system message); the border
        # of prompt and completion is then taken from the text without a generation prompt.
        for generation in (True, False):
            try:
                return self._render(opening, tools, kwargs, where, add_generation_prompt=generation)
            except DataError:
                continue
        return ""

    def _render(
        self,
        messages: list[Message],
        tools: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        where: str,
        **flags: bool,
    ) -> str:
        if self.chat_template is None:
            raise ModelError(
                "the tokenizer has neither a chat template nor an EOS token",
                "set tokenizer.eos_token, or give the formatter a chat_template",
            )
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.template_override,
                    tokenize=False,
                    **flags,
                    **(kwargs or {}),
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: the chat template refuses it: {error}") from error


def _common_prefix(a: str, b: str) -> int:
    """Number of leading characters that two strings share."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
