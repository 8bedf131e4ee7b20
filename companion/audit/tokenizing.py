"""How users ask a tokenizer, and scripts that show what comes of it. Chapter 9."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from companion.audit.endpoint import EndpointSubject
from companion.audit.local import LocalSubject
from companion.audit.scripts import endpoint_script, local_script
from companion.audit.subject import Subject
from companion.errors import CompanionError, DataError
from companion.formatting.conversation import Message
from companion.formatting.template import content_forms, in_form

QUESTION: Final = "Which sea lies north of Egypt?"
ANSWER: Final = "It is the Mediterranean Sea."
TALK: Final[list[Message]] = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
]


def template_of(tokenizer: Any) -> str | None:
    """The chat template that is used for a conversation without tools."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # it has none
        return None


def render(tokenizer: Any, messages: Sequence[Message], **flags: Any) -> str | None:
    """A conversation as text, its content in the form that the template reads.

    None if the template refuses it, or there is none.
    """

    def written(chat: Sequence[Message], **more: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(chat), tokenize=False, **more))
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise DataError(f"the chat template refuses it: {error}") from error

    if template_of(tokenizer) is None and "chat_template" not in flags:
        return None
    shared = {key: flags[key] for key in ("chat_template",) if key in flags}
    forms = content_forms(lambda chat, **more: written(chat, **shared, **more))
    try:
        return written(in_form(messages, forms), **flags)
    except DataError:
        return None


def ids_of(tokenizer: Any, text: str, **flags: bool) -> list[int]:
    """Ids of a rendered text, as ``apply_chat_template(tokenize=True)`` makes them."""
    flags = {"add_special_tokens": False, **flags}
    return list(tokenizer(text, verbose=False, **flags)["input_ids"])


def talk_of(question: str = QUESTION, answer: str = ANSWER, **fields: Any) -> list[Message]:
    """A question and its answer, with further fields of the answer's message."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, **fields},
    ]


def gap_of(subject: Subject, one: Sequence[int], other: Sequence[int]) -> float | None:
    """How far the scores of two sequences of ids are apart; None if nobody can say."""
    if "ids" not in subject.abilities:
        return None
    try:
        scores = subject.alone([one, other])
    except CompanionError:  # (the budget is spent, or it is refused: it was found all the same)
        return None
    gap = float(abs(scores[0] - scores[1]))
    return gap if np.isfinite(gap) else None


def moves(gap: float | None) -> str:
    """The end of a sentence that tells of a gap, if it is known."""
    return "" if gap is None else f"; the score moves by {gap:.3g}"


def tokenizer_script(subject: Subject, body: str, **given: Any) -> str | None:
    """A script that shows a fault of the tokenizer of a model here; the values stand at its top."""
    if not isinstance(subject, LocalSubject):
        return None
    model = repr(subject.name) if subject.what == "folder" else "sys.argv[1]  # where it was saved"
    lines = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    trust = ", trust_remote_code=True" if subject.trusted else ""
    return (
        "import sys\n\nfrom transformers import AutoTokenizer\n\n"
        f"MODEL = {model}\n{lines}tokenizer = AutoTokenizer.from_pretrained(MODEL{trust})\n{body}"
    )


_ALIKE: Final = """
one, other = scores({one})[0], scores({other})[0]
print(one, other)
# rounding explains {rounding:.2g}
sys.exit(1 if abs(one - other) <= {rounding!r} else 0)
"""


def alike_script(
    subject: Subject, what: str, one: Any, other: Any, rounding: float = 0.0
) -> str | None:
    """A script that scores two texts, rows for an endpoint or token ids, which are not to agree."""
    body = _ALIKE.format(one="ONE", other="OTHER", rounding=rounding)
    if isinstance(subject, LocalSubject):
        return local_script(subject, what, body, ONE=[one], OTHER=[other])
    if isinstance(subject, EndpointSubject):
        made = subject.body_of_rows if isinstance(one, Mapping) else subject.body_of_ids
        bodies = {"ONE": made([one]), "OTHER": made([other])}
        return endpoint_script(subject.route, subject.protocol, what, body, **bodies)
    return None
