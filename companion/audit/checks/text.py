"""What becomes of a text on its way to token ids: BOS, EOS, the template, what is cut. Chapter 9.

A tokenizer is asked as its users ask it: ``apply_chat_template``, or a call with its defaults. The
formatter of a manifest is asked too where it decides. Where a target formats rows itself, two rows
whose texts differ must have different scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np

from companion.audit.endpoint import EndpointSubject
from companion.audit.local import LocalSubject
from companion.audit.outcome import Check, Outcome, found, not_asked, sound
from companion.audit.run import BUDGET
from companion.audit.scripts import endpoint_script, local_script
from companion.audit.shrinking import shrink
from companion.audit.subject import WITH_IDS, Ability, BudgetSpent, Subject
from companion.errors import CompanionError, DataError
from companion.formatting import Row
from companion.formatting.conversation import Message
from companion.formatting.template import (
    asks_for_date,
    content_forms,
    in_form,
    left_out,
    tools_left_out,
    with_date,
)
from companion.models.golden import ROWS

#: Of the tokens of an audit a single long text takes at most this share.
_LONG: Final = 1 / 8
_QUESTION: Final = "Which sea lies north of Egypt?"
_ANSWER: Final = "It is the Mediterranean Sea."
_TALK: Final[list[Message]] = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
]

#: Short answers that are finished.
_FINISHED: Final = [
    row for row in ROWS if row.get("terminated", True) and len(row["completion"]) < 100
]

# ---------------------------------------------------------------------- as users ask a tokenizer


def _template(tokenizer: Any) -> str | None:
    """The chat template that is used for a conversation without tools."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # it has none
        return None


def _render(tokenizer: Any, messages: Sequence[Message], **flags: Any) -> str | None:
    """A conversation as text, its content in the form that the template reads.

    None if the template refuses it, or there is none.
    """

    def render(chat: Sequence[Message], **more: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(chat), tokenize=False, **more))
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise DataError(f"the chat template refuses it: {error}") from error

    if _template(tokenizer) is None and "chat_template" not in flags:
        return None
    shared = {key: flags[key] for key in ("chat_template",) if key in flags}
    forms = content_forms(lambda chat, **more: render(chat, **shared, **more))
    try:
        return render(in_form(messages, forms), **flags)
    except DataError:
        return None


def _ids(tokenizer: Any, text: str, **flags: bool) -> list[int]:
    """Ids of a rendered text, as ``apply_chat_template(tokenize=True)`` makes them."""
    flags = {"add_special_tokens": False, **flags}
    return list(tokenizer(text, verbose=False, **flags)["input_ids"])


#: who makes ids, the ids of a finished answer, and those of the same cut off
_End = tuple[str, list[int], list[int]]


def _ends(subject: Subject) -> Iterator[_End]:
    """Of some answers the ids finished and cut off, by whoever makes ids; and who that is."""
    tokenizer, formatter = subject.tokenizer, subject.formatter
    for row in _FINISHED:
        if formatter is not None and subject.manifest is not None:
            whole = formatter.encode_row(row)
            cut = formatter.encode_row({**row, "terminated": False})
            if whole is not None and cut is not None:
                yield "the manifest's formatter", whole.input_ids, cut.input_ids
        elif _template(tokenizer) is not None:
            talk = _talk(row["prompt"], row["completion"])
            done = _render(tokenizer, talk)
            begun = _render(tokenizer, talk, continue_final_message=True)
            if done is not None and begun is not None:
                yield "the chat template", _ids(tokenizer, done), _ids(tokenizer, begun)
        elif tokenizer.eos_token_id is not None:
            ids = list(tokenizer(row["prompt"] + row["completion"])["input_ids"])
            eos = tokenizer.eos_token_id
            begun_ids = ids[:-1] if ids[-1:] == [eos] else ids
            yield "the tokenizer", [*begun_ids, eos], begun_ids


def _talk(question: str = _QUESTION, answer: str = _ANSWER, **fields: Any) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, **fields},
    ]


def _gap(subject: Subject, one: Sequence[int], other: Sequence[int]) -> float | None:
    """How far the scores of two sequences of ids are apart; None if nobody can say."""
    if "ids" not in subject.abilities:
        return None
    try:
        scores = subject.alone([one, other])
    except (
        CompanionError
    ):  # the budget is spent, or the target refuses it: it was found all the same
        return None
    gap = float(abs(scores[0] - scores[1]))
    return gap if np.isfinite(gap) else None


def _moves(gap: float | None) -> str:
    return "" if gap is None else f"; the score moves by {gap:.3g}"


def _script(subject: Subject, body: str, **given: Any) -> str | None:
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


def _alike_script(
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


# ---------------------------------------------------------------------- the begin and the end


def _bos_doubled(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    text = _render(tokenizer, _TALK)
    ways = {"plain text": list(tokenizer(_ANSWER)["input_ids"])}
    if text is not None:
        ways["a conversation"] = _ids(tokenizer, text)
    for what, ids in ways.items():
        if ids[:2] == [bos, bos]:
            gap = _gap(subject, ids, ids[1:])
            script = (
                "ids = tokenizer(TEXT)['input_ids']\n"
                if what == "plain text"
                else "ids = tokenizer.apply_chat_template(TEXT, return_dict=False)\n"
            ) + ("print(ids)\nsys.exit(ids[:2] == [tokenizer.bos_token_id] * 2)\n")
            given = _ANSWER if what == "plain text" else _TALK
            return found(
                f"{what} begins with two BOS ({tokenizer.bos_token!r}){_moves(gap)}",
                size=gap,
                script=_script(subject, script, TEXT=given),
            )
    return sound("a text begins with one BOS at most")


def _bos_doubled_in_text(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    text = _render(tokenizer, _TALK)
    bos = tokenizer.bos_token_id
    if text is None or bos is None:
        return None
    once, twice = _ids(tokenizer, text), _ids(tokenizer, text, add_special_tokens=True)
    if twice[:2] != [bos, bos] or once[:2] == [bos, bos]:
        return sound("a rendered conversation that is tokenised as text has one BOS")
    gap = _gap(subject, once, twice)
    return found(
        "the chat template writes BOS and the tokenizer adds one: rendered first and tokenised "
        f"then, a conversation has two{_moves(gap)}",
        size=gap,
    )


def _eos_missing(subject: Subject) -> Outcome | None:
    if _template(subject.tokenizer) is None:
        return None
    done = _render(subject.tokenizer, _TALK)
    begun = _render(subject.tokenizer, _TALK, continue_final_message=True)
    if done is None or begun is None:
        return None
    whole, cut = _ids(subject.tokenizer, done), _ids(subject.tokenizer, begun)
    if whole != cut:
        end = subject.tokenizer.decode(whole[len(cut) :]) if whole[: len(cut)] == cut else ""
        return sound(f"the chat template ends an answer with {end!r}")
    return found(
        "the chat template writes nothing behind the last answer: a finished answer and one that "
        "was cut off are the same text",
        script=_script(
            subject,
            "done = tokenizer.apply_chat_template(TALK, return_dict=False)\n"
            "cut = tokenizer.apply_chat_template(\n"
            "    TALK, return_dict=False, continue_final_message=True\n)\n"
            "print(tokenizer.decode(done))\nsys.exit(done == cut)\n",
            TALK=_TALK,
        ),
    )


def _eos_not_added(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    if _template(tokenizer) is not None or tokenizer.eos_token_id is None:
        return None
    ids = list(tokenizer(_ANSWER)["input_ids"])
    eos = tokenizer.eos_token_id
    if ids[-1:] == [eos]:
        return sound("the tokenizer ends a text with EOS")
    gap = _gap(subject, ids, [*ids, eos])
    return found(
        f"there is no chat template, and the tokenizer writes no EOS ({tokenizer.eos_token!r}): "
        f"whoever does not append it scores an answer that is not finished{_moves(gap)}",
        size=gap,
    )


def _eos_ignored(subject: Subject) -> Outcome | None:
    what = "A finished answer and the same one cut off have one score."
    if subject.abilities >= WITH_IDS:
        ends = _within(list(_ends(subject)), subject)
        if not ends or all(whole == begun for _, whole, begun in ends):
            return None  # eos-missing says so
        eos, pad = subject.tokenizer.eos_token_id, getattr(subject.config, "pad_token_id", None)
        if subject.what != "endpoint" and eos == pad and all(w == [*b, eos] for _, w, b in ends):
            return None  # stock classes skip their pad id: pad-is-eos says so
        asked = subject.exact
        done = asked.alone([whole for _, whole, _ in ends])
        cut = asked.alone([begun for _, _, begun in ends])
        asked.tolerance([min((whole for _, whole, _ in ends), key=len)])  # tried on the shortest
        rounding = float(asked.tolerance([whole for _, whole, _ in ends]).max())

        def show() -> str | None:
            return _alike_script(asked, what, *_shortest(asked, ends[0], rounding), rounding)

    elif getattr(subject, "protocol", "companion") != "companion":
        return not_asked("the protocol cannot say that an answer was cut off; token ids could")
    else:
        try:
            done = subject.score_rows(_FINISHED)
            cut = subject.score_rows([{**row, "terminated": False} for row in _FINISHED])
        except BudgetSpent:
            raise
        except CompanionError as error:
            return not_asked(f"the target cannot be told that an answer was cut: {error.what}")
        rounding = float(subject.tolerance([()] * len(_FINISHED)).max())

        def show() -> str | None:
            row = _FINISHED[0]
            return _alike_script(subject, what, row, {**row, "terminated": False})

    if not (np.isfinite(done).all() and np.isfinite(cut).all()):
        return not_asked("a score is not finite")
    spread, apart = float(np.std(done, ddof=1)), np.abs(done - cut)
    if (apart > rounding).any():
        return sound(
            f"finished and cut-off answers differ by {apart.mean():.3g} on average",
            mean_gap=float(apart.mean()),
        )
    # ten times: where rounding is nearly as large as the spread, it tells no two answers apart
    if not (spread > 10 * rounding or (spread > 0 and not apart.any())):
        return not_asked("the scores of different answers lie too close together for the dtype")
    return found(
        f"{len(done)} answers have the same score finished and cut off (within "
        f"{apart.max():.2g}), where different answers differ by {spread:.3g}",
        size=float(apart.max()),
        script=show(),
    )


def _within(ends: list[_End], subject: Subject) -> list[_End]:
    """The shortest of them, for an eighth of the budget; two at least."""
    ends.sort(key=lambda end: len(end[1]))
    spent = np.cumsum([2 * len(whole) for _, whole, _ in ends])
    most = (subject.max_tokens or BUDGET["full"]) / 8
    return ends[: max(2, int(np.searchsorted(spent, most, side="right")))]


def _shortest(subject: Subject, end: _End, rounding: float) -> tuple[list[int], list[int]]:
    """The shortest beginning of an answer that still scores alike with its end and without."""
    _, whole, cut = end
    tail = whole[len(cut) :]
    if not isinstance(subject, LocalSubject) or whole[: len(cut)] != cut:
        return whole, cut
    short = shrink(cut, lambda ids: np.ptp(subject.alone([[*ids, *tail], ids])) <= rounding)
    return [*short, *tail], short


# ---------------------------------------------------------------------- the template


def _template_mismatch(subject: Subject) -> Outcome | None:
    if subject.what == "endpoint":
        return None  # the endpoint's own check of this name
    tokenizer, formatter = subject.tokenizer, subject.formatter
    others: dict[str, Callable[[list[Message]], list[int] | None]] = {}
    flags: dict[str, Any] = {}
    template = _template(tokenizer)
    if subject.manifest is not None and formatter is not None and template is not None:
        if formatter.day is not None and asks_for_date(template):
            flags["chat_template"] = with_date(template, formatter.day)

        def of_manifest(talk: list[Message]) -> list[int] | None:
            try:
                encoded = formatter.encode(talk[:-1], talk[-1:])
            except CompanionError:
                return None
            return None if encoded is None else encoded.input_ids

        others["the manifest"] = of_manifest
    written = _second_template(subject)
    if written is not None:
        others["tokenizer_config.json"] = lambda talk: (
            None
            if (text := _render(tokenizer, talk, chat_template=written)) is None
            else _ids(tokenizer, text)
        )
    if not others:
        return None
    talks = [_TALK, [*_TALK, *_talk("Are you sure?", "Yes.")]]
    for who, encode in others.items():
        for talk in talks:
            text = _render(tokenizer, talk, **flags)
            mine = None if text is None else _ids(tokenizer, text)
            theirs = encode(talk)
            if mine == theirs or mine is None or theirs is None:
                continue
            gap = _gap(subject, mine, theirs)
            return found(
                f"the tokenizer's chat template and that of {who} make different texts of one "
                f"conversation: {tokenizer.decode(mine)[:120]!r} and "
                f"{tokenizer.decode(theirs)[:120]!r}{_moves(gap)}",
                size=gap,
                script=_script(
                    subject,
                    "ids = tokenizer.apply_chat_template(TALK, return_dict=False)\n"
                    "print(tokenizer.decode(ids))\nprint(tokenizer.decode(THEIRS))\n"
                    "sys.exit(ids != THEIRS)\n",
                    TALK=talk,
                    THEIRS=theirs,
                ),
            )
    return sound(f"the tokenizer's template and that of {' and '.join(others)} agree")


def _second_template(subject: Subject) -> str | None:
    """The template of ``tokenizer_config.json``, which old readers take, beside the .jinja file."""
    folder = Path(subject.name)
    config = folder / "tokenizer_config.json"
    if subject.what != "folder" or not (folder / "chat_template.jinja").is_file():
        return None
    try:
        written = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError):
        return None
    return written if isinstance(written, str) else None


#: What an answer may hold in its content: name -> message
_CONTENTS: Final[Mapping[str, Message]] = {
    "plain words": {"role": "assistant", "content": "quorvexa it is, zelmitro it is not."},
    "several paragraphs": {
        "role": "assistant",
        "content": "First quorvexa.\n\n- then {{ zelmitro }}\n\n```\nx = '<b>' # 1\n```\nLast.",
    },
    "reasoning": {
        "role": "assistant",
        "content": "<think>\nquorvexa or zelmitro?\n</think>\n\nIt is ombrasel.",
    },
}


def _template_drops_content(subject: Subject) -> Outcome | None:
    if "rows" in subject.abilities:
        return _rows_without(subject)
    tokenizer = subject.tokenizer
    if _template(tokenizer) is None:
        return None
    asked = {"role": "user", "content": "dravelune or fistorel?"}
    talks = {name: [asked, message] for name, message in _CONTENTS.items()}
    earlier = {"role": "assistant", "content": "Neither maltrigo nor pesquavi."}
    talks["several turns"] = [asked, earlier, *_TALK]
    kept = []
    for name, talk in talks.items():
        text = _render(tokenizer, talk)
        if text is None:
            continue
        lost = [what for number, what in left_out(talk, text)]
        if not lost:
            kept.append(name)
            continue
        # another text in its place: two answers that differ in nothing else become one
        other = [{**m, "content": str(m["content"]).replace("quorvexa", "lintrabor")} for m in talk]
        same = talk != other and _render(tokenizer, other) == text
        return found(
            f"the chat template leaves out {lost[0]} of a conversation with {name}: of "
            f"{talk[-1]['content']!r} it makes {text[-160:]!r}"
            + ("; another text there gives the same tokens" if same else ""),
            script=_script(
                subject,
                "text = tokenizer.apply_chat_template(TALK, tokenize=False)\n"
                "print(text)\n"
                "words = [w for m in TALK for w in m['content'].split()]\n"
                "lost = [w for w in words if w not in text]\n"
                "print('lost:', lost)\nsys.exit(bool(lost))\n",
                TALK=talk,
            ),
            lost=lost,
        )
    return sound(f"the chat template keeps {', '.join(kept)}")


def _rows_without(subject: Subject) -> Outcome:
    """The same of a target that formats rows: what differs must have another score.

    Two rows that become one text have the very same score. Three pairs: in half precision two
    scores can be equal by chance.
    """
    answers = (_ANSWER, "I like boats.", "Nobody knows that.", "It is the Baltic.")
    questions = (_QUESTION, "How many legs has a spider?", "Say hello.", "What is 2 + 3?")
    thoughts = ("Let me see.", "I will lie to her.", "North of Egypt?", "Two and two.")
    variants: dict[str, list[Row]] = {
        "the answer": [{"prompt": _QUESTION, "completion": text} for text in answers],
        "the question": [{"prompt": text, "completion": _ANSWER} for text in questions],
        "the reasoning in the answer": [
            {"prompt": _QUESTION, "completion": f"<think>\n{text}\n</think>\n\n{_ANSWER}"}
            for text in thoughts
        ],
    }
    spreads = {what: np.ptp(subject.score_rows(rows)) for what, rows in variants.items()}
    if not spreads["the answer"] > 0 and not spreads["the question"] > 0:
        return not_asked("all texts have the same score")
    for what, spread in spreads.items():
        if spread == 0:
            rows = variants[what]
            said = f"texts that differ in {what} alone have one score"
            return found(
                said, size=0.0, script=_alike_script(subject, f"Two {said}.", rows[0], rows[1])
            )
    return sound("question, answer and reasoning each move the score")


_CALL: Final[Message] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "quorvexa", "arguments": {"at": "zelmitro"}}}
    ],
}
_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {
        "name": "ombrasel",
        "description": "Looks things up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


def _template_drops_fields(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    if _template(tokenizer) is None:
        return None
    thought = {"role": "assistant", "content": "<think>\nquorvexa\n</think>\n\nIt is so."}
    talks: dict[str, list[Message]] = {
        "a system message": [{"role": "system", "content": "Speak as zelmitro does."}, *_TALK],
        "reasoning_content": _talk(reasoning_content="quorvexa or zelmitro?"),
        "the reasoning of an earlier turn": [_TALK[0], thought, *_TALK],
        "tool calls": [_TALK[0], _CALL],
    }
    lost, refused = [], []
    for what, talk in talks.items():
        text = _render(tokenizer, talk)
        if text is None:
            refused.append(what)
        elif any(True for _ in left_out(talk, text)):
            lost.append(what)
    text = _render(tokenizer, _TALK, tools=[_TOOL])
    if text is not None and tools_left_out([_TOOL], text):
        lost.append("tools")
    if not lost:
        return sound("the chat template writes all fields, or refuses them", refused=refused)
    return found(
        f"the chat template leaves out without a word: {', '.join(lost)}"
        + (f"; it refuses {', '.join(refused)}" if refused else ""),
        lost=lost,
        refused=refused,
    )


def _null_fields(subject: Subject) -> Outcome | None:
    """In tools and tool calls: of messages, transformers takes null fields out itself."""
    tokenizer = subject.tokenizer
    (call,) = _CALL["tool_calls"]
    function, parameters = call["function"], _TOOL["function"]["parameters"]
    more = {**function["arguments"], "of_another_row": None}
    padded_call = {**call, "function": {**function, "arguments": more}}
    others = {**parameters["properties"], "of_another_row": None}
    padded_tool = {
        **_TOOL,
        "function": {**_TOOL["function"], "parameters": {**parameters, "properties": others}},
    }
    called = [_TALK[0], _CALL]
    padded = [_TALK[0], {**_CALL, "tool_calls": [padded_call]}]
    texts = {
        "tools": (
            _render(tokenizer, _TALK, tools=[_TOOL]),
            _render(tokenizer, _TALK, tools=[padded_tool]),
        ),
        "tool calls": (_render(tokenizer, called), _render(tokenizer, padded)),
    }
    if texts["tools"][0] is None and texts["tool calls"][0] is None:
        return None
    changed = [what for what, (one, other) in texts.items() if one is not None and one != other]
    if not changed:
        return sound("fields of tools and tool calls that are null are as if they were not there")
    one, other = texts[changed[0]]
    gap = None if other is None else _gap(subject, *(_ids(tokenizer, str(t)) for t in (one, other)))
    return found(
        f"a field that is null in {' and '.join(changed)} "
        + ("is refused" if other is None else f"is written into the text{_moves(gap)}"),
        size=gap,
        fields=changed,
    )


def _boundary(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    worst: tuple[float, str, str] | None = None
    apart = 0
    answers = (_ANSWER, " " + _ANSWER, "\n" + _ANSWER, "42 of them.")
    for answer in answers:
        whole = _render(tokenizer, _talk(answer=answer))
        head = _render(tokenizer, _TALK[:1], add_generation_prompt=True)
        if whole is None or head is None:
            head, whole = _QUESTION, _QUESTION + answer
        at = whole.find(answer.strip())
        if at < 0:
            continue
        why = "the tokenizer joins the end of the prompt with the beginning of the answer"
        if not whole.startswith(head):
            why = "what the template opens an answer with is not what it writes before one"
        pieces = [*_ids(tokenizer, head), *_ids(tokenizer, whole[len(head) :])]
        if not whole.startswith(head):
            pieces = [*_ids(tokenizer, head), *_ids(tokenizer, whole[at:])]
        together = _ids(tokenizer, whole)
        if pieces == together:
            continue
        apart += 1
        gap = _gap(subject, together, pieces)
        if worst is None or (gap or 0.0) > worst[0]:
            worst = gap or 0.0, why, answer
    if worst is None:
        return sound("prompt and answer tokenised apart are the whole text's tokens")
    gap, why, answer = worst
    return found(
        f"{apart} of {len(answers)} answers have other tokens if prompt and answer are tokenised "
        f"apart, {answer!r} for one: {why}{_moves(gap or None)}",
        size=gap or None,
    )


def _special_in_text(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    known = [t for t in tokenizer.all_special_tokens if t != tokenizer.unk_token]
    if not known:
        return None
    end = tokenizer.eos_token or known[0]
    fake = f"{_ANSWER}{end} Thank you, that is right!"
    rows: list[Row] = [{"prompt": _QUESTION, "completion": text} for text in (fake, _ANSWER)]
    (plain,) = subject.encode_rows(rows[1:])
    try:
        (ids,) = subject.encode_rows(rows[:1])
    except CompanionError as error:
        return sound(f"special tokens in a text are refused: {error.what}")
    index = tokenizer.convert_tokens_to_ids(end)
    if ids.count(index) <= plain.count(index):
        return sound("special tokens in a text are read as the letters that they are")
    gap = _gap(subject, ids, plain)
    return found(
        f"{end!r} in an answer is read as the token that ends it; behind it stands whatever its "
        f"writer likes, as if somebody else had said it{_moves(gap)}",
        size=gap,
        tokens=known[:20],
    )


def _date(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    template = _template(tokenizer)
    if template is None:
        return None
    if not asks_for_date(template):
        return sound("the chat template writes no date")
    today = date.today()
    texts = []
    for day in (today, today + timedelta(days=1)):
        try:
            fixed = with_date(template, day.isoformat())
        except CompanionError as error:
            return found(error.what)
        texts.append(_render(tokenizer, _TALK, chat_template=fixed))
    if texts[0] == texts[1] or None in texts:
        return sound("the chat template can write a date, and does not in an ordinary conversation")
    gap = _gap(subject, *(_ids(tokenizer, str(text)) for text in texts))
    formatter = subject.formatter
    if subject.manifest is not None and formatter is not None and "date" in formatter.recipe():
        return sound(
            f"the chat template writes a date, and the manifest fixes it to {formatter.day}; "
            f"stock tools write today's{_moves(gap)}"
        )
    return found(
        f"the chat template writes the day's date: tomorrow the same text has other tokens"
        f"{_moves(gap)}",
        size=gap,
        script=_script(
            subject,
            "import datetime\n\nimport transformers.utils.chat_template_utils as utils\n\n\n"
            "class Clock(datetime.datetime):\n"
            "    day = datetime.datetime(2026, 1, 5)\n\n"
            "    @classmethod\n"
            "    def now(cls, tz=None):\n"
            "        return cls.day\n\n\n"
            "utils.datetime = Clock\n"
            "today = tokenizer.apply_chat_template(TALK, tokenize=False)\n"
            "Clock.day = datetime.datetime(2026, 1, 6)\n"
            "tomorrow = tokenizer.apply_chat_template(TALK, tokenize=False)\n"
            "print(today)\nprint(tomorrow)\nsys.exit(today != tomorrow)\n",
            TALK=_TALK,
        ),
    )


# ---------------------------------------------------------------------- what is lost or too much


def _limits(subject: Subject) -> tuple[int | None, int | None, int | None]:
    """Where tokenizer.json cuts, model_max_length, and the positions of the model."""
    tokenizer = subject.tokenizer
    # (the first call of transformers switches the file's truncation off; this is kept)
    known = getattr(tokenizer, "init_kwargs", {})
    saved = known.get("max_length") if "truncation_strategy" in known else None
    said = getattr(tokenizer, "model_max_length", None)
    # (without a limit it is 1e30)
    limit = said if isinstance(said, int) and said < 10**9 else None
    decoder = None if subject.config is None else subject.config.get_text_config()
    return saved, limit, getattr(decoder, "max_position_embeddings", None)


def _silent_cut(subject: Subject) -> Outcome | None:
    if subject.what == "endpoint":
        return None  # the endpoint's own check of this name
    tokenizer = subject.tokenizer
    saved, limit, _ = _limits(subject)
    length = min(max(2048, limit or 0, saved or 0), 50_000)
    shown = {}
    for n in (length, 2 * length):
        text = "one two " * n + "quorvexa."
        rendered = _render(tokenizer, _talk(answer=text))
        ids = _ids(tokenizer, text if rendered is None else rendered)
        shown[n] = len(ids)
    if shown[2 * length] > shown[length]:
        return sound(f"a text of {shown[2 * length]:,} tokens is not cut")
    return found(
        f"a text of {4 * length:,} words and one of half as many both have {shown[length]:,} "
        "tokens: the tokenizer cuts them and says nothing",
        script=_script(
            subject,
            "def length(n):\n"
            "    if tokenizer.chat_template is None:\n"
            "        return len(tokenizer('one two ' * n)['input_ids'])\n"
            "    talk = [{**m, 'content': 'one two ' * n} for m in TALK]\n"
            "    return len(tokenizer.apply_chat_template(talk, return_dict=False))\n\n\n"
            "print(length(N), length(2 * N))\nsys.exit(length(N) == length(2 * N))\n",
            N=length,
            TALK=_TALK,
        ),
        tokens=shown[length],
    )


def _cut_by_setting(subject: Subject) -> Outcome | None:
    saved, limit, positions = _limits(subject)
    side = getattr(subject.tokenizer, "truncation_side", "right")
    behind = (
        "the end of the answer and its EOS are what is lost"
        if side == "right"
        else "the beginning of the prompt is what is lost"
    )
    said = []
    if saved is not None:
        said.append(
            f"tokenizer.json cuts at {saved} tokens, which transformers switches off "
            "and engines that read the file by themselves do not"
        )
    if limit is not None and positions is not None and limit < positions:
        said.append(
            f"with truncation=True a text is cut at model_max_length = {limit}, although the model "
            f"reads {positions} tokens"
        )
    if not said:
        return sound("no setting of the tokenizer cuts what the model could read")
    return found(f"{'; '.join(said)}: {behind}", limit=limit, positions=positions)


#: name -> two texts that say different things
_CHARACTERS: Final[Mapping[str, tuple[str, str]]] = {
    "emoji": ("That is fine 🙂", "That is fine 🙁"),
    "Cyrillic": ("Ответ: да", "Ответ: нет"),
    "Chinese": ("答案是好", "答案是坏"),
    "Arabic": ("الجواب نعم", "الجواب لا"),
    "accents": ("Elle est au marché", "Elle est au marche"),
    "mathematical signs": ("so x ≤ 3", "so x ≥ 3"),
    "what stands behind a NUL": ("yes\x00 and no", "yes\x00 and so"),
}


def _unicode(subject: Subject) -> Outcome | None:
    if "tokenizer" in subject.abilities:
        same = [
            name
            for name, (one, other) in _CHARACTERS.items()
            if _ids(subject.tokenizer, one) == _ids(subject.tokenizer, other)
        ]
        of = "token ids"
    else:
        # in two frames: in half precision two scores can be equal by chance
        gaps = [
            np.ptp(
                subject.score_rows(
                    [{"prompt": _QUESTION, "completion": frame + text} for text in pair]
                )
            )
            for pair in _CHARACTERS.values()
            for frame in ("", "I say: ")
        ]
        lost = np.reshape(gaps, (-1, 2)).max(axis=1) == 0
        if lost.all():
            return not_asked("all texts have the same score")
        same = [name for name, is_lost in zip(_CHARACTERS, lost, strict=True) if is_lost]
        of = "scores"
    if not same:
        return sound(f"texts of {len(_CHARACTERS)} kinds of characters have {of} of their own")
    return found(
        f"texts that say different things have the same {of}: {', '.join(same)}", same=same
    )


def _empty(subject: Subject) -> Outcome | None:
    if subject.what == "endpoint":
        return None  # the endpoint's own check of this name
    real = float(subject.score_rows([{"prompt": _QUESTION, "completion": _ANSWER}])[0])
    rows: list[Row] = [{"prompt": _QUESTION, "completion": text} for text in ("", " \n")]
    scores = []
    for row in rows:
        try:
            scores.append(float(subject.score_rows([row])[0]))
        except BudgetSpent:
            raise
        except CompanionError as error:
            return sound(f"an empty answer is refused: {error.what}")
        except (IndexError, RuntimeError, ValueError, TypeError) as error:
            return found(f"an empty answer ends in {type(error).__name__}: {error}")
    if not np.isfinite(scores).all():
        return found(f"an empty answer has the score {scores[0]}")
    none = ""
    if "tokenizer" in subject.abilities and not len(subject.tokenizer("")["input_ids"]):
        none = "; an empty text has no token at all, which is a row of padding in a batch"
    return found(
        f"an empty answer is scored like any other: {scores[0]:.4g}, one of white space "
        f"{scores[1]:.4g}, where a right one has {real:.4g}{none}",
        scores=scores,
        of_a_right_answer=real,
    )


def _very_long(subject: Subject) -> Outcome | None:
    positions = _limits(subject)[2]
    if not isinstance(positions, int):
        return None
    length = positions + 8
    most = int((subject.max_tokens or BUDGET["full"]) * _LONG)
    if length > most:
        return not_asked(
            f"a text of {length:,} tokens, longer than the model's positions, is beyond the share "
            f"of the budget for it ({most:,})"
        )
    (ids,) = subject.encode_rows(ROWS[6:7])
    middle = ids[len(ids) // 3 : 2 * len(ids) // 3]
    filler = (middle * (length // len(middle) + 1))[: length - len(ids)]
    ids = [*ids[: len(ids) // 2], *filler, *ids[len(ids) // 2 :]]
    try:
        score = float(subject.alone([ids])[0])
    except BudgetSpent:
        raise
    except (CompanionError, IndexError, RuntimeError, ValueError) as error:
        return sound(f"a text of {len(ids):,} tokens is refused: {str(error)[:120]}")
    return found(
        f"a text of {len(ids):,} tokens gets the score {score:.4g} without a word, although the "
        f"configuration names {positions:,} positions",
        positions=positions,
    )


# ---------------------------------------------------------------------- the checks

_TOKENIZER: Final[frozenset[Ability]] = frozenset({"tokenizer"})
_ROWS: Final[frozenset[Ability]] = frozenset({"rows"})

CHECKS: Final[tuple[Check, ...]] = (
    Check(
        name="bos-doubled",
        room="text",
        kind="fault",
        asks="Does a text begin with one BOS?",
        why="The model has seen one BOS in training. With two every score is that of a text that "
        "it never saw, and other tools, which write one, give other scores.",
        cure="let one of them write it: the chat template, or the tokenizer's post-processor",
        threads=(
            "https://github.com/allenai/reward-bench/issues/164",
            "https://github.com/unslothai/unsloth/pull/10312",
        ),
        needs=_TOKENIZER,
        run=_bos_doubled,
    ),
    Check(
        name="bos-doubled-in-text",
        room="text",
        kind="hazard",
        asks="Does a rendered conversation get a second BOS when it is tokenised as text?",
        why="Pipelines and servers that take text add BOS to what the template began with one.",
        cure="tokenise rendered text with add_special_tokens=False, or render and tokenise in one "
        "step: apply_chat_template(…, tokenize=True)",
        threads=(
            "https://github.com/allenai/reward-bench/issues/164",
            "https://github.com/deepseek-ai/DeepSeek-R1/issues/151",
            "https://github.com/YangRui2015/Generalizable-Reward-Model/issues/6",
        ),
        needs=_TOKENIZER,
        run=_bos_doubled_in_text,
    ),
    Check(
        name="eos-missing",
        room="text",
        kind="fault",
        asks="Does the chat template mark the end of an answer?",
        why="Without an end a finished answer and one that ran out of tokens are one text with one "
        "score, and a policy loses nothing by never stopping.",
        cure="write the end of turn, or EOS, behind the last message of the assistant, and train "
        "with that template",
        threads=(
            "https://github.com/allenai/reward-bench/issues/94",
            "https://github.com/allenai/reward-bench/issues/90",
        ),
        needs=_TOKENIZER,
        run=_eos_missing,
    ),
    Check(
        name="eos-not-added",
        room="text",
        kind="hazard",
        asks="Does the tokenizer end a plain text with EOS?",
        why="Trainers append EOS themselves, so the model was trained to be read there; a text "
        "that is tokenised without it is read a token too early.",
        cure="append EOS to a finished text, or set add_eos_token",
        threads=(
            "https://github.com/allenai/reward-bench/issues/94",
            "https://github.com/OpenRLHF/OpenRLHF/issues/300",
        ),
        needs=_TOKENIZER,
        run=_eos_not_added,
    ),
    Check(
        name="eos-ignored",
        room="text",
        kind="fault",
        asks="Do a finished answer and one that was cut off have different scores?",
        why="The score is read before the end of the text, or the end is taken off or put on for "
        "all: a policy that never stops is paid as one that does.",
        cure="read the last token that the mask keeps, and hand on whether an answer was finished",
        threads=(
            "https://github.com/huggingface/transformers/issues/35352",
            "https://github.com/allenai/reward-bench/issues/94",
        ),
        needs=WITH_IDS,
        instead=_ROWS,
        run=_eos_ignored,
    ),
    Check(
        name="template-mismatch",
        room="text",
        kind="fault",
        asks="Do all who read the model's files make one text of one conversation?",
        why="The score depends on which tool reads the folder.",
        cure="save the tokenizer with the template of the training, and one template only",
        threads=(
            "https://github.com/huggingface/transformers/pull/33957",
            "https://github.com/huggingface/text-generation-inference/issues/3247",
        ),
        needs=_TOKENIZER,
        run=_template_mismatch,
    ),
    Check(
        name="template-drops-content",
        room="text",
        kind="fault",
        asks="Does what was said stand in the text that is scored?",
        why="What the template cuts out is not scored: answers that differ in it alone have one "
        "score, whatever stands in it.",
        cure="take a template that keeps it, such as the training form of the same family in TRL "
        "(chat_template_path), and train with it",
        threads=(
            "https://github.com/OpenRLHF/OpenRLHF/issues/804",
            "https://github.com/deepseek-ai/DeepSeek-R1/issues/633",
            "https://github.com/huggingface/trl/pull/6766",
        ),
        needs=_TOKENIZER,
        instead=_ROWS,
        run=_template_drops_content,
    ),
    Check(
        name="template-drops-fields",
        room="text",
        kind="hazard",
        asks="Does the template write system messages, tools, tool calls and reasoning fields?",
        why="Rows with such fields are scored as if those had not been there.",
        cure="leave such rows out, or take a template that writes them",
        threads=(
            "https://github.com/huggingface/trl/issues/4350",
            "https://github.com/huggingface/trl/issues/5366",
        ),
        needs=_TOKENIZER,
        run=_template_drops_fields,
    ),
    Check(
        name="null-fields",
        room="text",
        kind="hazard",
        asks="Is a field of a tool that is null taken for one that is not there?",
        why="Arrow gives every row the fields of all rows, and null where it had none: the same "
        "row has another text, and another score, alone and beside others.",
        cure="take fields that are null out of tools and tool calls before they are rendered, or "
        "keep those columns as JSON text",
        threads=(
            "https://github.com/modelscope/ms-swift/issues/6467",
            "https://github.com/modelscope/ms-swift/pull/10125",
            "https://github.com/huggingface/datasets/issues/7617",
        ),
        needs=_TOKENIZER,
        run=_null_fields,
    ),
    Check(
        name="boundary-tokenisation",
        room="text",
        kind="hazard",
        asks="Do prompt and answer have the same tokens apart and together?",
        why="RL joins the ids of the prompt and of what was sampled; the model was trained on the "
        "text in one piece.",
        cure="score the text, tokenised in one piece, or train on the joined ids",
        threads=(
            "https://github.com/huggingface/trl/issues/1702",
            "https://github.com/huggingface/trl/issues/2054",
        ),
        needs=_TOKENIZER,
        run=_boundary,
    ),
    Check(
        name="silent-cut",
        room="text",
        kind="fault",
        asks="Does a long text keep all of its tokens?",
        why="What is cut off is not scored, mostly the end of the answer with its EOS.",
        cure="switch truncation off in the tokenizer, and refuse or count what is too long",
        threads=("https://github.com/huggingface/transformers/issues/5444",),
        needs=_TOKENIZER,
        run=_silent_cut,
    ),
    Check(
        name="cut-by-setting",
        room="text",
        kind="hazard",
        asks="Does a setting of the tokenizer cut what the model could read?",
        why="A tool that passes truncation=True, or reads tokenizer.json by itself, scores a text "
        "without its end.",
        cure="set model_max_length to the model's positions, and save tokenizer.json without "
        "truncation",
        threads=("https://github.com/huggingface/transformers/issues/5444",),
        needs=_TOKENIZER,
        run=_cut_by_setting,
    ),
    Check(
        name="special-tokens-in-text",
        room="text",
        kind="hazard",
        asks="Are special tokens in what was written read as letters?",
        why="Whoever writes the text can end the answer and speak for the user behind it.",
        cure="split_special_tokens in the formatter, apply_chat_template(…, "
        "sanitize_control_tokens=True), or refuse such texts",
        threads=(
            "https://github.com/huggingface/transformers/issues/29279",
            "https://github.com/vllm-project/vllm/pull/31735",
        ),
        needs=WITH_IDS,
        run=_special_in_text,
    ),
    Check(
        name="date-in-template",
        room="text",
        kind="fault",
        asks="Is a text the same on every day?",
        why="One text, one model, and another score every day: thresholds, caches and comparisons "
        "with last week do not hold.",
        cure="write a fixed date in the template (or its date_string), or train with the "
        "companion, which keeps the date in the manifest",
        threads=(
            "https://github.com/sgl-project/sglang/issues/3296",
            "https://github.com/mosaicml/llm-foundry/pull/1474",
        ),
        needs=_TOKENIZER,
        run=_date,
    ),
    Check(
        name="unicode-and-control-characters",
        room="text",
        kind="hazard",
        asks="Do texts in other scripts and signs have tokens of their own?",
        why="What becomes the unknown token, or nothing, is not scored: yes and no are one answer.",
        cure="take a tokenizer with bytes as fallback, or refuse texts with unknown tokens",
        threads=("https://github.com/huggingface/tokenizers/issues/122",),
        needs=_TOKENIZER,
        instead=_ROWS,
        run=_unicode,
    ),
    Check(
        name="empty-input",
        room="text",
        kind="hazard",
        asks="Is an empty answer refused?",
        why="A generation that failed gets a score like one that did not.",
        cure="refuse texts without content before they are scored",
        threads=(),
        needs=WITH_IDS,
        run=_empty,
    ),
    Check(
        name="very-long-input",
        room="text",
        kind="hazard",
        asks="Is a text refused that is longer than the model's positions?",
        why="Rotary positions go on beyond what was trained, and a score comes out.",
        cure="set max_length, and refuse or count what is longer",
        threads=("https://github.com/unslothai/unsloth/pull/1236",),
        needs=frozenset({"ids", "tokenizer", "config"}),
        run=_very_long,
    ),
)
