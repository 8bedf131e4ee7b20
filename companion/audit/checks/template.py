"""What a chat template makes of a conversation: its end, what it drops, the day. Chapter 9.

A template is asked as users ask it: ``apply_chat_template``. Where a target formats rows itself,
two rows whose texts differ must have different scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np

from companion.audit.outcome import Check, Outcome, found, not_asked, sound
from companion.audit.subject import Ability, Subject
from companion.audit.tokenizing import (
    ANSWER,
    QUESTION,
    TALK,
    alike_script,
    gap_of,
    ids_of,
    moves,
    render,
    talk_of,
    template_of,
    tokenizer_script,
)
from companion.errors import CompanionError
from companion.formatting import Row
from companion.formatting.conversation import Message
from companion.formatting.template import asks_for_date, left_out, tools_left_out, with_date
from companion.models.ends import turn_end_ids


def _eos_missing(subject: Subject) -> Outcome | None:
    if template_of(subject.tokenizer) is None:
        return None
    done = render(subject.tokenizer, TALK)
    begun = render(subject.tokenizer, TALK, continue_final_message=True)
    if done is None or begun is None:
        return None
    whole, cut = ids_of(subject.tokenizer, done), ids_of(subject.tokenizer, begun)
    if whole != cut:
        end = subject.tokenizer.decode(whole[len(cut) :]) if whole[: len(cut)] == cut else ""
        return sound(f"the chat template ends an answer with {end!r}")
    return found(
        "the chat template writes nothing behind the last answer: a finished answer and one that "
        "was cut off are the same text",
        script=tokenizer_script(
            subject,
            "done = tokenizer.apply_chat_template(TALK, return_dict=False)\n"
            "cut = tokenizer.apply_chat_template(\n"
            "    TALK, return_dict=False, continue_final_message=True\n)\n"
            "print(tokenizer.decode(done))\nsys.exit(done == cut)\n",
            TALK=TALK,
        ),
    )


def _other_end(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    ends = turn_end_ids(tokenizer)
    if template_of(tokenizer) is None or tokenizer.eos_token_id is None or not ends:
        return None
    end = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.eos_token_id in ends:
        return sound(f"the chat template ends an answer with EOS, {end!r}")
    return found(
        f"the chat template ends an answer with {end!r}, and EOS is {tokenizer.eos_token!r}: who "
        "looks for EOS takes every answer for one that was cut off"
    )


def _template_mismatch(subject: Subject) -> Outcome | None:
    if subject.what == "endpoint":
        return None  # the endpoint's own check of this name
    tokenizer, formatter = subject.tokenizer, subject.formatter
    others: dict[str, Callable[[list[Message]], list[int] | None]] = {}
    flags: dict[str, Any] = {}
    template = template_of(tokenizer)
    adopted = subject.manifest is not None and "read_as" in subject.manifest.readout
    if adopted:  # its manifest may write the text otherwise on purpose (the answer's header)
        pass
    elif subject.manifest is not None and formatter is not None and template is not None:
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
            if (text := render(tokenizer, talk, chat_template=written)) is None
            else ids_of(tokenizer, text)
        )
    if not others:
        return None
    talks = [TALK, [*TALK, *talk_of("Are you sure?", "Yes.")]]
    for who, encode in others.items():
        for talk in talks:
            text = render(tokenizer, talk, **flags)
            mine = None if text is None else ids_of(tokenizer, text)
            theirs = encode(talk)
            if mine == theirs or mine is None or theirs is None:
                continue
            gap = gap_of(subject, mine, theirs)
            return found(
                f"the tokenizer's chat template and that of {who} make different texts of one "
                f"conversation: {tokenizer.decode(mine)[:120]!r} and "
                f"{tokenizer.decode(theirs)[:120]!r}{moves(gap)}",
                size=gap,
                script=tokenizer_script(
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
    if template_of(tokenizer) is None:
        return None
    asked = {"role": "user", "content": "dravelune or fistorel?"}
    talks = {name: [asked, message] for name, message in _CONTENTS.items()}
    earlier = {"role": "assistant", "content": "Neither maltrigo nor pesquavi."}
    talks["several turns"] = [asked, earlier, *TALK]
    kept = []
    for name, talk in talks.items():
        text = render(tokenizer, talk)
        if text is None:
            continue
        lost = [what for number, what in left_out(talk, text)]
        if not lost:
            kept.append(name)
            continue
        # another text in its place: two answers that differ in nothing else become one
        other = [{**m, "content": str(m["content"]).replace("quorvexa", "lintrabor")} for m in talk]
        same = talk != other and render(tokenizer, other) == text
        return found(
            f"the chat template leaves out {lost[0]} of a conversation with {name}: of "
            f"{talk[-1]['content']!r} it makes {text[-160:]!r}"
            + ("; another text there gives the same tokens" if same else ""),
            script=tokenizer_script(
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
    answers = (ANSWER, "I like boats.", "Nobody knows that.", "It is the Baltic.")
    questions = (QUESTION, "How many legs has a spider?", "Say hello.", "What is 2 + 3?")
    thoughts = ("Let me see.", "I will lie to her.", "North of Egypt?", "Two and two.")
    variants: dict[str, list[Row]] = {
        "the answer": [{"prompt": QUESTION, "completion": text} for text in answers],
        "the question": [{"prompt": text, "completion": ANSWER} for text in questions],
        "the reasoning in the answer": [
            {"prompt": QUESTION, "completion": f"<think>\n{text}\n</think>\n\n{ANSWER}"}
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
                said, size=0.0, script=alike_script(subject, f"Two {said}.", rows[0], rows[1])
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
    if template_of(tokenizer) is None:
        return None
    thought = {"role": "assistant", "content": "<think>\nquorvexa\n</think>\n\nIt is so."}
    talks: dict[str, list[Message]] = {
        "a system message": [{"role": "system", "content": "Speak as zelmitro does."}, *TALK],
        "reasoning_content": talk_of(reasoning_content="quorvexa or zelmitro?"),
        "the reasoning of an earlier turn": [TALK[0], thought, *TALK],
        "tool calls": [TALK[0], _CALL],
    }
    lost, refused = [], []
    for what, talk in talks.items():
        text = render(tokenizer, talk)
        if text is None:
            refused.append(what)
        elif any(True for _ in left_out(talk, text)):
            lost.append(what)
    text = render(tokenizer, TALK, tools=[_TOOL])
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
    called = [TALK[0], _CALL]
    padded = [TALK[0], {**_CALL, "tool_calls": [padded_call]}]
    texts = {
        "tools": (
            render(tokenizer, TALK, tools=[_TOOL]),
            render(tokenizer, TALK, tools=[padded_tool]),
        ),
        "tool calls": (render(tokenizer, called), render(tokenizer, padded)),
    }
    if texts["tools"][0] is None and texts["tool calls"][0] is None:
        return None
    changed = [what for what, (one, other) in texts.items() if one is not None and one != other]
    if not changed:
        return sound("fields of tools and tool calls that are null are as if they were not there")
    one, other = texts[changed[0]]
    gap = (
        None
        if other is None
        else gap_of(subject, *(ids_of(tokenizer, str(t)) for t in (one, other)))
    )
    return found(
        f"a field that is null in {' and '.join(changed)} "
        + ("is refused" if other is None else f"is written into the text{moves(gap)}"),
        size=gap,
        fields=changed,
    )


def _boundary(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    worst: tuple[float, str, str] | None = None
    apart = 0
    answers = (ANSWER, " " + ANSWER, "\n" + ANSWER, "42 of them.")
    for answer in answers:
        whole = render(tokenizer, talk_of(answer=answer))
        head = render(tokenizer, TALK[:1], add_generation_prompt=True)
        if whole is None or head is None:
            head, whole = QUESTION, QUESTION + answer
        at = whole.find(answer.strip())
        if at < 0:
            continue
        why = "the tokenizer joins the end of the prompt with the beginning of the answer"
        if not whole.startswith(head):
            why = "what the template opens an answer with is not what it writes before one"
        pieces = [*ids_of(tokenizer, head), *ids_of(tokenizer, whole[len(head) :])]
        if not whole.startswith(head):
            pieces = [*ids_of(tokenizer, head), *ids_of(tokenizer, whole[at:])]
        together = ids_of(tokenizer, whole)
        if pieces == together:
            continue
        apart += 1
        gap = gap_of(subject, together, pieces)
        if worst is None or (gap or 0.0) > worst[0]:
            worst = gap or 0.0, why, answer
    if worst is None:
        return sound("prompt and answer tokenised apart are the whole text's tokens")
    gap, why, answer = worst
    return found(
        f"{apart} of {len(answers)} answers have other tokens if prompt and answer are tokenised "
        f"apart, {answer!r} for one: {why}{moves(gap or None)}",
        size=gap or None,
    )


def _date(subject: Subject) -> Outcome | None:
    tokenizer = subject.tokenizer
    template = template_of(tokenizer)
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
        texts.append(render(tokenizer, TALK, chat_template=fixed))
    if texts[0] == texts[1] or None in texts:
        return sound("the chat template can write a date, and does not in an ordinary conversation")
    gap = gap_of(subject, *(ids_of(tokenizer, str(text)) for text in texts))
    formatter = subject.formatter
    if subject.manifest is not None and formatter is not None and "date" in formatter.recipe():
        return sound(
            f"the chat template writes a date, and the manifest fixes it to {formatter.day}; "
            f"stock tools write today's{moves(gap)}"
        )
    return found(
        f"the chat template writes the day's date: tomorrow the same text has other tokens"
        f"{moves(gap)}",
        size=gap,
        script=tokenizer_script(
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
            TALK=TALK,
        ),
    )


_TOKENIZER: Final[frozenset[Ability]] = frozenset({"tokenizer"})
_ROWS: Final[frozenset[Ability]] = frozenset({"rows"})

CHECKS: Final[tuple[Check, ...]] = (
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
        name="other-end-token",
        room="text",
        kind="hazard",
        asks="Does the chat template end an answer with the tokenizer's EOS?",
        why="Trainers, clients and rewards that look for EOS count each finished answer as cut "
        "off, or put EOS behind the end that is there.",
        cure="set eos_token to the token that ends a turn, in tokenizer and generation config, or "
        "look for both",
        threads=("https://github.com/huggingface/trl/issues/7039",),
        needs=_TOKENIZER,
        run=_other_end,
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
)
