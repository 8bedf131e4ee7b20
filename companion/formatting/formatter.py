"""The one formatter: the only code that turns a row into token ids.

Training, scoring, serving and the audit all call it, so a text has one sequence of ids and hence
one score. Its ids are those of TRL's ``RewardTrainer`` wherever TRL is right; where it is not
(two BOS on a text that already begins with one, reward-bench #164; EOS left out, reward-bench #94;
rows dropped for their length without a word) it does the right thing and counts. Chapters 2 and 4.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from companion.errors import CompanionError, DataError, ModelError, ReadoutError, first_line
from companion.formatting.conversation import (
    Message,
    as_reply,
    check_ending,
    check_messages,
    is_messages,
    transcript_template,
)
from companion.formatting.encoded import Encoded, FormatCounts
from companion.formatting.recipe import (
    RECIPE_FILE,
    RECIPE_VERSION,
    recipe_fingerprint,
    tokenizer_recipe,
)
from companion.formatting.special import PieceTokenizer, Span, SpecialTokens
from companion.formatting.template import (
    asks_for_date,
    content_forms,
    in_form,
    is_rendered,
    left_out,
    repeats,
    tools_left_out,
    turn_headers,
    with_date,
)
from companion.formatting.time_limit import TimeLimit, TooLong
from companion.layouts import read_row

Text = str | Sequence[Mapping[str, Any]]
Row = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
Result = TypeVar("Result")
Overlong = Literal["drop", "error", "truncate_prompt"]
#: how a prompt and completion of text are read: as a question and its answer, or as they are
TextMode = Literal["chat", "plain"]
#: ids and character spans, as the tokenizer gives them
Raw = tuple[list[int], list[tuple[int, int]]]

_OVERLONG = ("drop", "error", "truncate_prompt")
_TOOLS_CURE = 'write [{"type": "function", "function": {"name": …}}]'
#: seconds that the first text of a template may take
_RENDERING = 20.0
#: what a template may raise beside jinja's own: it divides by zero, calls itself, counts too far
_OF_TEMPLATES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Given(NamedTuple):
    """What is said of a text beside its words: whether it was finished, and for the template."""

    where: str
    terminated: bool = True
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    #: whether a completion that the template does not write whole is an error, or counted
    strict: bool = True


@dataclass(slots=True)
class Draft:
    """A text before tokenisation: ``split`` is the number of characters of the prompt."""

    text: str
    split: int
    chat: bool
    terminated: bool
    where: str
    remarks: tuple[str, ...] = ()
    letters: tuple[Span, ...] = ()


class _Special(NamedTuple):
    """Ids of the special tokens; a tokenizer looks each up anew when it is asked."""

    bos: int | None
    eos: int | None
    pad: int | None


class RewardFormatter:
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
    text : {"chat", "plain"}, optional
        How a row with a `prompt` of text is read. ``chat``: the prompt as a user's message and the
        completion as the assistant's; but as they are, and counted, whole texts without a prompt,
        and prompts that hold turns already. ``plain``: as they are. None: not decided, which
        training does (:meth:`decide_text`); read as plain until then.
    date : str, optional
        The day (ISO) that a chat template writes which asks for one; default today. It is kept in
        the recipe, so that a text has the same tokens on every day.
    split_special_tokens : bool
        Special tokens in what was given are spelt as letters; else they are read as such tokens,
        as transformers and TRL do, and counted.

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
        text: TextMode | None = None,
        date: str | None = None,
        split_special_tokens: bool = False,
    ) -> None:
        if overlong not in _OVERLONG:
            raise DataError(f"overlong is {overlong!r}", f"use one of: {', '.join(_OVERLONG)}")
        if max_length is not None and max_length < 1:
            raise DataError(f"max_length is {max_length}", "use a positive number or None")
        if text not in (None, "chat", "plain"):
            raise DataError(f"text is {text!r}", "use 'chat' or 'plain'")
        self.tokenizer = tokenizer
        self.template_override = chat_template
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self.counts = FormatCounts()
        self.notes: list[str] = []
        self.text: TextMode | None = text
        self.split_special_tokens = split_special_tokens
        self._last_opening: tuple[Any, str] | None = None
        self._last_adds: tuple[Any, tuple[bool, bool]] | None = None
        self._of_template: tuple[Any, dict[str, Any]] = None, {}
        self._special_tokens: SpecialTokens | None = None
        self._ends: str | None = None  # a template that is known to end
        self._pieces: PieceTokenizer | None = None
        #: whether the template is the model's own, not the transcript that stands in for one
        self.has_own_template = (chat_template or tokenizer.chat_template) not in (
            *(None, transcript_template(True), transcript_template(False)),
        )
        if chat_template is None and tokenizer.chat_template is None:
            if tokenizer.eos_token is not None:
                self.template_override = transcript_template(self._adds()[0])
            self.notes.append(
                "the tokenizer has no chat template: messages are written as a plain transcript "
                "('User: …', blank line, 'Assistant: …', EOS), which is saved with the model"
            )
        #: the day that the template writes; None: it asks for none
        self.day: str | None = None
        self._day_is_saved = True
        if asks_for_date(self.chat_template):
            self.day = date or Date.today().isoformat()
            self.notes.append(
                f"the chat template writes a date: it is fixed to {self.day} in every text, and "
                "saved with the model"
            )
        if split_special_tokens:
            self._check_pieces()

    # ------------------------------------------------------------------ what it is made of

    def recipe(self) -> dict[str, Any]:
        """All that decides the ids, as plain JSON: two formatters with equal recipes agree.

        What is not decided, asked for or switched on has no key, as in recipes from before.
        """
        own: dict[str, Any] = {} if self.text is None else {"text": self.text}
        if self.day is not None and self._day_is_saved:
            own["date"] = self.day
        if self.split_special_tokens:
            own["split_special_tokens"] = True
        return {
            **tokenizer_recipe(self.tokenizer, *self._adds()),
            "max_length": self.max_length,
            "overlong": self.overlong,
            "chat_template": self.chat_template,
            **own,
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
            text=recipe.get("text"),
            date=recipe.get("date"),
            split_special_tokens=recipe.get("split_special_tokens", False),
        )
        if asks_for_date(template) and recipe.get("date") is None:
            formatter._day_is_saved = False
            formatter.notes[-1] = (
                "the chat template writes the date, and the model was saved without one: today's, "
                f"{formatter.day}, is written, so scores depend on the day; train it anew to fix it"
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

    def changed(
        self,
        *,
        max_length: int | None = None,
        overlong: Overlong | None = None,
        text: TextMode | None = None,
    ) -> RewardFormatter:
        """A formatter like this one, with fresh counts and other settings where they are given."""
        if overlong is not None and overlong not in _OVERLONG:
            raise DataError(f"overlong is {overlong!r}", f"use one of: {', '.join(_OVERLONG)}")
        if max_length is not None and max_length < 1:
            raise DataError(f"max_length is {max_length}", "use a positive number or None")
        if text not in (None, "chat", "plain"):
            raise DataError(f"text is {text!r}", "use 'chat' or 'plain'")
        other = copy.copy(self)
        other.counts, other.notes, other._last_opening = FormatCounts(), list(self.notes), None
        other.max_length = self.max_length if max_length is None else max_length
        other.overlong = self.overlong if overlong is None else overlong
        other.text = self.text if text is None else text
        return other

    def decide_text(self, rows: Sequence[Mapping[str, Any]]) -> TextMode:
        """How text is to be read by the form of the training rows, and from now on is.

        Chat if the rows hold messages, or a prompt of text under the tokenizer's own template;
        else plain.
        """
        self.text = "plain"
        for row in rows:
            fields = [row.get(name) for name in ("prompt", "chosen", "completion", "messages")]
            if any(field and is_messages(field) for field in fields) or (
                self.has_own_template and isinstance(fields[0], str) and fields[0].strip()
            ):
                self.text = "chat"
                break
        return self.text

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

        What the template makes of it is given as it is. Where content of the completion is left
        out, that is counted and noted; with rows (:meth:`encode_many`) and in scoring it is an
        error.

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
        given = Given("the row", terminated, tools, chat_template_kwargs, strict=False)
        (group,) = self._encode_drafts([[self._draft(prompt, completion, given)]])
        return _raised(group[0] if isinstance(group, list) else group)

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
            Each a string, a list of messages, or a mapping with ``prompt`` (or as one of the
            layouts of :mod:`companion.layouts` has it) and ``field``, with ``field`` alone, with
            ``messages``, or with ``text``; optionally ``tools``,
            ``chat_template_kwargs``, ``terminated`` or ``<field>_terminated``, and ``drawn``: true
            for what a policy wrote behind that very prompt, which it may have echoed.
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
        groups = self._encode_drafts(self._drafts(rows, [field], terminated, names))
        return [group[0] if isinstance(group, list) else group for group in groups]

    def encode_pairs(
        self, rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None
    ) -> list[tuple[Encoded, Encoded] | None]:
        """Encode many pairs with one call of the tokenizer; both sides of a row or neither."""
        return [_raised(result) for result in self.try_encode_pairs(rows, names=names)]

    def try_encode_pairs(
        self, rows: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None
    ) -> list[tuple[Encoded, Encoded] | CompanionError | None]:
        """As :meth:`encode_pairs`, with the error of a bad row in its place."""
        groups = self._encode_drafts(self._drafts(rows, ["chosen", "rejected"], None, names))
        return [(group[0], group[1]) if isinstance(group, list) else group for group in groups]

    # ------------------------------------------------------------------ the characters

    @property
    def chat_template(self) -> Any:
        """The template in use: the override, the tokenizer's own, or the plain transcript."""
        if self.template_override is not None:
            return self.template_override
        return self.tokenizer.chat_template

    def _adds(self) -> tuple[bool, bool]:
        """Whether the tokenizer itself puts BOS before, and EOS after, plain text."""
        ids = self.tokenizer("a")["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return (
            bos is not None and ids[:1] == [bos] and bare[:1] != [bos],
            eos is not None and ids[-1:] == [eos] and bare[-1:] != [eos],
        )

    def _adds_now(self) -> tuple[bool, bool]:
        """The same, asked anew only if the tokenizer's settings have changed."""
        tokenizer = self.tokenizer
        settings: Any = tokenizer.bos_token_id, tokenizer.eos_token_id
        settings += tuple(getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos"))
        if self._last_adds is None or self._last_adds[0] != settings:
            self._last_adds = settings, self._adds()
        return self._last_adds[1]

    def _drafts(
        self,
        rows: Sequence[Any],
        fields: Sequence[str],
        terminated: bool | None,
        names: Sequence[str] | None,
        change: Callable[[Any, str], Row] = lambda row, where: row,
    ) -> list[list[Draft] | CompanionError]:
        """The drafts of some fields of each row, changed before by `change`, or its error."""
        self._last_opening = None  # what it was made of may have changed since
        drafts: list[list[Draft] | CompanionError] = []
        for number, row in enumerate(rows):
            where = names[number] if names is not None else f"row {number}"
            try:
                notes: Counter[str] = Counter()
                changed = change(read_row(row, where, fields, notes), where)
                if notes:
                    self.counts.add(prompts_found=1)
                drafts.append([self._draft_row(changed, f, terminated, where) for f in fields])
            except CompanionError as error:
                drafts.append(error)
        return drafts

    def _draft_row(self, row: Row, field: str, terminated: bool | None, where: str) -> Draft:
        if not isinstance(row, Mapping):
            return self._draft(row, None, Given(where, terminated is not False))
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
                what = f"{where}: 'terminated' is {said!r}, not true or false"
                raise DataError(what, "write true for a finished text, false for one cut off")
            terminated = said is not False
        if prompt is None or (isinstance(prompt, (list, tuple)) and not prompt):
            prompt, completion = completion, None
        tools = row.get("tools")
        if isinstance(tools, str):  # TRL lets a column of tools be JSON text
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                said = f"{where}: 'tools' is no valid JSON: {error}"
                raise DataError(said, _TOOLS_CURE) from error
        if tools is not None and not _are_tools(tools):
            raise DataError(
                f"{where}: 'tools' is no list of tools",
                _TOOLS_CURE,
            )
        # (a policy that was given the prompt may echo it: ``drawn`` says that it did)
        both = prompt is not None and completion is not None and not row.get("drawn")
        if both and repeats(prompt, completion):
            raise DataError(
                f"{where}, {field!r}: begins with the prompt, which would then stand twice in the "
                "text",
                "give the completion alone, or the whole text or conversation without 'prompt'",
            )
        kwargs = row.get("chat_template_kwargs")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise DataError(
                f"{where}: 'chat_template_kwargs' is a {type(kwargs).__name__}, no mapping",
                'write e.g. {"enable_thinking": false}',
            )
        given = Given(f"{where}, {field!r}", terminated, tools, kwargs)
        return self._draft(prompt, completion, given)

    def _draft(self, prompt: Text | None, completion: Text | None, given: Given) -> Draft:
        for value in (prompt, completion):
            if value is not None and not isinstance(value, str) and not is_messages(value):
                raise DataError(
                    f"{given.where}: a {type(value).__name__} that is neither text nor a list of "
                    "messages",
                    "write text, or a list of {role, content} messages",
                )
        if prompt is None or prompt == "":  # the completion is the whole
            prompt, completion = completion, None
        if prompt is not None and not isinstance(prompt, str):
            return self._draft_messages(prompt, as_reply(prompt, completion), given)
        if completion is None:
            prompt, completion = "", prompt or ""
        if not isinstance(completion, str):
            raise DataError(
                f"{given.where}: the prompt is text and the completion is messages",
                'write the prompt as [{"role": "user", "content": …}]',
            )
        return self._draft_text(prompt or "", completion, given)

    def _draft_text(self, prompt: str, completion: str, given: Given) -> Draft:
        eos = self.tokenizer.eos_token
        body = self._body(completion, given)
        remarks: list[str] = []
        rendered = is_rendered(prompt or body, self._headers()) if self.text == "chat" else None
        if prompt.strip():
            if rendered:
                remarks.append("already_rendered")
            elif self.text == "chat":
                return self._draft_messages(
                    [{"role": "user", "content": prompt}],
                    [{"role": "assistant", "content": body}],
                    given,
                )
            elif self.text is None and self.has_own_template:
                self._note(
                    "rows of text are read as they are, without the chat template: the model does "
                    "not say how it was trained to read them; --text chat (text='chat') reads "
                    "prompt and completion as a question and its answer, --text plain as they are"
                )
        elif self.text == "chat":
            remarks.append("whole_texts")
        letters: tuple[Span, ...] = ()
        text = prompt + body
        bos = self.tokenizer.bos_token
        start = len(bos) if bos and text.startswith(bos) else 0  # its own, that it may begin with
        if self._special().within(text[start:]):
            if rendered is None:
                rendered = is_rendered(prompt or body, self._headers())
            if rendered:
                pass
            elif self.split_special_tokens:
                remarks.append("special_as_letters")
                hidden = self._special().hidden(text[start:], given.where)
                spans = self._special().shown(hidden)[1]
                letters = tuple((a + start, b + start) for a, b in spans)
            else:
                remarks.append("special_in_text")
        text += eos if given.terminated else ""
        return Draft(
            text, len(prompt), False, given.terminated, given.where, tuple(remarks), letters
        )

    def _body(self, completion: str, given: Given) -> str:
        """A completion of text without the end token that it may bring."""
        where, terminated, eos = given.where, given.terminated, self.tokenizer.eos_token
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
        return body

    def _draft_messages(
        self,
        prompt: Sequence[Mapping[str, Any]],
        completion: Sequence[Mapping[str, Any]] | None,
        given: Given,
    ) -> Draft:
        whole = check_messages([*prompt, *(completion or [])], given.where)
        if completion is not None and not completion:
            raise DataError(f"{given.where}: the completion has no messages")
        check_ending(whole, given.where)
        first = len(prompt) if completion is not None else len(whole) - 1
        remarks: list[str] = []
        whole, given = self._spelt(in_form(whole, self._forms()), given, remarks)
        opening = whole[:first]
        text = self._render(whole, given, continue_final_message=not given.terminated)
        split = 0
        if opening:
            # the sides of a pair, or the candidates of a prompt, come one after the other
            asked = (opening, given.tools, given.template_kwargs, self.chat_template)
            last = self._last_opening
            if last is None or last[0] != asked:
                last = self._last_opening = asked, self._render_opening(opening, given)
            head = last[1]
            split = len(head) if text.startswith(head) else _n_shared(head, text)
        if split == len(text):
            raise DataError(f"{given.where}: the chat template leaves nothing of the completion")
        for number, what in left_out(whole, text):
            if number >= first and not given.strict:
                remarks += ["completion_left_out"] * ("completion_left_out" not in remarks)
                self._note(f"the chat template leaves out or changes the {what} of a completion")
            elif number >= first:
                raise DataError(
                    f"{given.where}: the chat template leaves out or changes the {what} of the "
                    f"completion (message {number}), so it would not be scored",
                    "take a template that keeps it (chat_template=…, --chat_template_path), or "
                    "take it out of the completion",
                )
            elif "earlier_left_out" not in remarks:
                remarks.append("earlier_left_out")
        if given.tools and tools_left_out(given.tools, text):
            remarks.append("tools_left_out")
        letters: tuple[Span, ...] = ()
        if "special_as_letters" in remarks:
            split = len(self._special().shown(text[:split])[0])
            text, letters = self._special().shown(text)
        return Draft(text, split, True, given.terminated, given.where, tuple(remarks), letters)

    def _spelt(
        self, messages: list[Message], given: Given, remarks: list[str]
    ) -> tuple[list[Message], Given]:
        """Note special tokens in messages and tools; with stand-ins, if they are to be letters."""
        special = self._special()
        for message in messages:
            content = message["content"]
            own = content if len(message) == 2 and isinstance(content, str) else _texts(message)
            if special.within(own) if isinstance(own, str) else any(map(special.within, own)):
                break
        else:
            if not given.tools or not any(map(special.within, _texts(given.tools))):
                return messages, given
        if not self.split_special_tokens:
            remarks.append("special_in_text")
            return messages, given
        remarks.append("special_as_letters")
        tools = special.hidden(given.tools, given.where)
        return special.hidden(messages, given.where), given._replace(tools=tools)

    def _known(self, name: str, make: Callable[[], Any]) -> Any:
        """What is known of the template in use; found out when it is first asked for."""
        template = self.chat_template
        if self._of_template[0] != template:
            self._of_template = template, {}
        found = self._of_template[1]
        if name not in found:
            found[name] = make()
        return found[name]

    def _plainly(self, messages: list[Message]) -> str:
        return self._render(messages, Given("a probe"))

    def _in_form(self, messages: list[Message]) -> str:
        return self._plainly(in_form(messages, self._forms()))

    def _headers(self) -> tuple[str, ...]:
        """What stands before the template's turns, by which a rendered text is known."""
        if self.chat_template is None:
            return ()
        ends = (self.tokenizer.bos_token, self.tokenizer.eos_token)
        headers: tuple[str, ...] = self._known("headers", lambda: turn_headers(self._in_form, ends))
        return headers

    def _forms(self) -> tuple[bool, bool]:
        """Whether the template reads content that is text, and content in blocks."""
        if self.chat_template is None:
            return True, True
        forms: tuple[bool, bool] = self._known("forms", lambda: content_forms(self._plainly))
        return forms

    def _special(self) -> SpecialTokens:
        if self._special_tokens is None:
            self._special_tokens = SpecialTokens(self.tokenizer)
        return self._special_tokens

    def _piecewise(self) -> PieceTokenizer:
        if self._pieces is None:
            self._pieces = PieceTokenizer(self.tokenizer, self._special())
        return self._pieces

    def _check_pieces(self) -> None:
        """Refuse a tokenizer whose texts have other ids in pieces than in one."""
        answer = " It's 3,\n  and 12.5. "
        messages = [
            {"role": role, "content": content}
            for role, content in (("user", "Hello  there,\n 12"), ("assistant", answer)) * 2
        ]
        text = self._in_form(messages)
        eos = self.tokenizer.eos_token or ""
        for probe in (text, "Hello  there,\n 12" + answer + eos):
            ids = self.tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
            self._piecewise().check(probe, list(ids))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _render_opening(self, opening: list[Message], given: Given) -> str:
        # Some templates refuse a conversation that ends here (a lone system message); the border
        # of prompt and completion is then taken from the text without a generation prompt.
        for generation in (True, False):
            try:
                return self._render(opening, given, add_generation_prompt=generation)
            except DataError:
                continue
        return ""

    def _render(self, messages: list[Message], given: Given, **flags: bool) -> str:
        if self.chat_template is None:
            raise ModelError(
                "the tokenizer has neither a chat template nor an EOS token",
                "set tokenizer.eos_token, or give the formatter a chat_template",
            )
        from jinja2 import TemplateError

        template = self._template_of_day()
        # the first text shows whether a template ends; a thread for each one would cost too much
        ends = self._ends == self.chat_template
        try:
            with contextlib.nullcontext() if ends else TimeLimit(_RENDERING).running():
                text = str(
                    self.tokenizer.apply_chat_template(
                        messages,
                        tools=given.tools,
                        chat_template=template,
                        tokenize=False,
                        **flags,
                        **(given.template_kwargs or {}),
                    )
                )
        except TooLong:
            raise ModelError(
                f"the chat template has not come to its end after {_RENDERING:g} s",
                "look for a loop that does not end in chat_template.jinja",
            ) from None
        except (TemplateError, *_OF_TEMPLATES) as error:
            raise DataError(
                f"{given.where}: the chat template refuses it: {first_line(error)}"
            ) from error
        self._ends = self.chat_template
        return text

    def _template_of_day(self) -> str | None:
        """The template for transformers, with its date; None for the tokenizer's own."""
        if self.day is None:
            return self.template_override
        day = self.day
        return str(self._known("of day", lambda: with_date(self.chat_template, day)))

    # ------------------------------------------------------------------ the ids

    def _encode_drafts(
        self, drafts: Sequence[list[Draft] | CompanionError], raw: list[Raw] | None = None
    ) -> list[list[Encoded] | CompanionError | None]:
        """Tokenise the drafts of rows, and count; None for a row that is too long.

        `raw` is filled with what the tokenizer gave.
        """
        tokenizer = self.tokenizer
        special = _Special(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        flat = [draft for group in drafts if isinstance(group, list) for draft in group]
        encoded = iter(self._tokenize(flat, special, raw))
        out: list[list[Encoded] | CompanionError | None] = []
        for group in drafts:
            if isinstance(group, CompanionError):
                self.counts.add(rows=1)
                out.append(group)
                continue
            results = [next(encoded) for _ in group]
            try:
                out.append(self._count_row(results, group, special))
            except CompanionError as error:
                out.append(error)
        return out

    def _tokenizer_calls(
        self, texts: Sequence[tuple[str, bool]], **options: bool
    ) -> Iterator[tuple[int, list[int], Any, int, bool]]:
        """One call for the plain texts and one for the conversations (those with True).

        Yields of each text its place, its ids, the batch that it was in and its place there, and
        whether the tokenizer put an EOS behind it.
        """
        for chat in (False, True):
            chosen = [i for i, (_, is_chat) in enumerate(texts) if is_chat is chat]
            if not chosen:
                continue
            batch = self.tokenizer(
                [texts[i][0] for i in chosen],
                add_special_tokens=not chat,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
                **options,
            )
            adds_eos = not chat and self._adds_now()[1]
            for at, place in enumerate(chosen):
                yield place, list(batch["input_ids"][at]), batch, at, adds_eos

    def _tokenize(
        self, drafts: Sequence[Draft], special: _Special, raw: list[Raw] | None
    ) -> list[Encoded]:
        """Ids and prompt lengths, in order."""
        out: list[Encoded | None] = [None] * len(drafts)
        spans: list[Raw] = [([], [])] * len(drafts)
        for i, draft in enumerate(drafts):
            if draft.letters:
                ids, places = self._piecewise()(draft.text, draft.letters)
                if not draft.chat and special.bos is not None and self._adds_now()[0]:
                    ids, places = [special.bos, *ids], [(0, 0), *places]
                spans[i] = list(ids), list(places)
                ends = (end > draft.split for _, end in places)
                length = next((n for n, beyond in enumerate(ends) if beyond), len(ids))
                out[i] = self._ended(ids, length, draft, False, special)
        whole = [i for i, draft in enumerate(drafts) if not draft.letters]
        texts = [(drafts[i].text, drafts[i].chat) for i in whole]
        calls = self._tokenizer_calls(texts, return_offsets_mapping=raw is not None)
        for place, ids, batch, at, adds_eos in calls:
            i = whole[place]
            if raw is not None:
                spans[i] = (list(ids), batch["offset_mapping"][at])
            draft = drafts[i]
            if self.tokenizer.is_fast:
                length = _prompt_length(batch.encodings[at], draft.split)
            else:  # without offsets: ids that the prompt alone shares with the whole
                head = self.tokenizer(draft.text[: draft.split], add_special_tokens=not draft.chat)
                length = _n_shared(head["input_ids"], ids)
            out[i] = self._ended(ids, length, draft, adds_eos, special)
        if raw is not None:
            raw.extend(spans)
        return [encoded for encoded in out if encoded is not None]

    def _ended(
        self, ids: list[int], length: int, draft: Draft, adds_eos: bool, special: _Special
    ) -> Encoded:
        """One BOS at most; plain text ends with one EOS, or with none if it was cut off."""
        length = max(length - drop_second_bos(ids, special.bos), 0)
        if not draft.chat:
            if adds_eos and ids and ids[-1] == special.eos:
                ids.pop()
            if draft.terminated and ids[-1:] != [special.eos]:
                raise ReadoutError(
                    f"the tokenizer does not turn its EOS {self.tokenizer.eos_token!r} into one "
                    f"token: a finished text ends with the id {ids[-1]} in place of {special.eos}",
                    "register the EOS as a special token of the tokenizer",
                )
        length = max(min(length, len(ids) - 1), 0)
        return Encoded(ids, length, draft.terminated, remarks=draft.remarks)

    def _count_row(
        self, encoded: Sequence[Encoded], drafts: Sequence[Draft], special: _Special
    ) -> list[Encoded] | None:
        """Fit the sequences of one row into ``max_length`` and count what was done."""
        self.counts.add(rows=1)
        fitted: list[Encoded | None] = []
        for item, draft in zip(encoded, drafts, strict=True):
            pad = special.pad
            if pad is not None and item.input_ids[-1] == pad != special.eos:
                # transformers reads out at the last id that is not the pad id
                raise DataError(
                    f"{draft.where}: the text ends with the pad token "
                    f"{self.tokenizer.pad_token!r}, so stock tools would read its score elsewhere",
                    "take the pad tokens off the text",
                )
            fitted.append(self._fit(item, draft, special))
        kept = [item for item in fitted if item is not None]
        if len(kept) < len(fitted):
            self.counts.add(dropped_overlong=1)
            return None
        self.counts.add(
            sequences=len(kept),
            unterminated=sum(not item.terminated for item in kept),
            truncated=sum(item.cut_tokens > 0 for item in kept),
            tokens_cut=sum(item.cut_tokens for item in kept),
        )
        remarks = [remark for item in kept for remark in item.remarks]
        if remarks:
            self.counts.add(**{remark: remarks.count(remark) for remark in set(remarks)})
        return kept

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
        ids = ids[:keep] + ids[keep + surplus :]
        return Encoded(ids, item.prompt_length - surplus, item.terminated, surplus, item.remarks)


def _texts(value: Any) -> Iterator[str]:
    """All texts within lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _are_tools(tools: Any) -> bool:
    """Whether it is a list of functions, or of their JSON schemas, each with a name or none."""
    return isinstance(tools, (list, tuple)) and all(
        callable(tool)
        or (isinstance(tool, Mapping) and isinstance(tool.get("function", {}), Mapping))
        for tool in tools
    )


def _n_shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of leading items that two sequences share."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def drop_second_bos(ids: list[int], bos: int | None) -> int:
    """Leave one BOS at the front of the ids, in place; the number of those taken off."""
    before = len(ids)
    while bos is not None and len(ids) > 2 and ids[0] == ids[1] == bos:
        del ids[0]
    return before - len(ids)


def _prompt_length(encoding: Any, split: int) -> int:
    """Number of tokens before the first one that ends beyond the character `split`."""
    place = encoding.char_to_token(split)  # the offsets of all tokens are slow to fetch
    if place is None:  # no token holds that character: white space that the tokenizer drops
        ends = (end > split for _, end in encoding.offsets)
        place = next((n for n, beyond in enumerate(ends) if beyond), len(encoding))
    return int(place)


def _raised(result: Result | CompanionError) -> Result:
    if isinstance(result, CompanionError):
        raise result
    return result
