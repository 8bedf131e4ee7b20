"""Read-out: does the score of a text depend on that text alone, and on its last token? Chapter 9.

Texts are scored alone, and in the batches, orders, paddings and threads in which they may come. A
model here is asked in float32 (:attr:`companion.audit.Subject.exact`), so that what half precision
does to a batch, which ``dtype-deviation`` measures, hides nothing and is taken for no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np

from companion.audit.local import LocalSubject
from companion.audit.outcome import Check, Outcome, found, not_asked, sound
from companion.audit.scripts import compare, local_script
from companion.audit.shrinking import shrink
from companion.audit.subject import Ability, Batch, Subject
from companion.engine.positions import length_borders
from companion.errors import first_line
from companion.models.golden import ROWS
from companion.models.guards import has_absolute_positions

Ids = list[int]
_MADE: WeakKeyDictionary[Subject, list[Ids]] = WeakKeyDictionary()
#: Most tokens of a text, and how many texts.
_LONGEST, _TEXTS = 64, 8
_THREADS = 4
#: Why what stock classes do to find the last token is not asked of such a model.
BY_TOKEN: Final = "the model has a value for each token, and its user reads them by the mask"
#: what a model raises of a batch that it does not take
_REFUSALS = (ValueError, RuntimeError, IndexError, TypeError, AttributeError)


# ---------------------------------------------------------------------- the texts


def texts_of(subject: Subject) -> list[Ids]:
    """Made-up texts that end with EOS, do not, or hold it twice; and some of the golden texts."""
    if subject not in _MADE:
        _MADE[subject] = _make_texts(subject)
    return _MADE[subject]


def _make_texts(subject: Subject) -> list[Ids]:
    decoder = None if subject.config is None else subject.config.get_text_config()
    positions = getattr(decoder, "max_position_embeddings", None) or 0
    limit = min(_LONGEST, positions) if positions > 2 else _LONGEST
    end = [i for i in [subject.tokenizer.eos_token_id] if i is not None]
    draw = _drawing(subject)
    made = [
        draw(11) + end,
        draw(4) + end,
        draw(7),
        draw(3) + end + draw(12) + end,
        draw(2),
        draw(limit - 1) + end,
    ]
    real = []
    for row in ROWS:
        try:
            real.append(subject.encode(row))
        except Exception:  # a chat template is a program of its own, and may raise what it likes
            continue
    known = sorted((ids for ids in real if 1 < len(ids) <= limit), key=len)
    step = max(1, len(known) // (_TEXTS - len(made)))
    texts = made + known[::step][: _TEXTS - len(made)]
    return [ids for ids in texts if 0 < len(ids) <= limit]


def _drawing(subject: Subject) -> Callable[[int], Ids]:
    """Of so many ids of ordinary tokens, the same in every audit."""
    tokenizer = subject.tokenizer
    decoder = None if subject.config is None else subject.config.get_text_config()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    size = min(len(tokenizer), getattr(decoder, "vocab_size", None) or len(tokenizer))
    ordinary = [i for i in range(size) if i not in special]
    generator = np.random.default_rng(0)
    return lambda count: generator.choice(ordinary, size=max(count, 1)).tolist()


def _unpadded(local: LocalSubject) -> Outcome | None:
    """Why no batch is made, if so."""
    if "padding" not in local.abilities:
        return not_asked("no batch can be padded; see pad-missing")
    return None


# ---------------------------------------------------------------------- batches


def _batch(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if (outcome := _unpadded(local)) is not None:
        return outcome
    texts = texts_of(local)
    want = local.alone(texts)
    try:
        scores = local.call(Batch(texts))
    except _REFUSALS as error:
        return not_asked(f"the model takes no batch: {first_line(error)}")
    differs = local.differ(texts, want, scores)
    if not differs.any():
        lengths = [len(text) for text in texts]
        return sound(
            f"{len(want)} texts of {min(lengths)} to {max(lengths)} tokens have the same scores "
            f"alone and in one batch (up to {_far(want, scores):.2g}"
            f"{', in float32' if local is not subject else ''})"
        )
    worst = _worst(differs, want, scores)
    return found(
        f"{int(differs.sum())} of {len(want)} texts have another score in a batch than alone: "
        f"{want[worst]:.4f} alone is {scores[worst]:.4f} in the batch, where scores have a "
        f"standard deviation of {want.std():.3g}",
        size=_far(want, scores),
        script=_batch_script(local, texts, worst),
        texts=int(differs.sum()),
    )


def _batch_script(local: LocalSubject, texts: list[Ids], worst: int) -> str | None:
    """The text that moved with the neighbours that move it, both as short as may be."""
    text = texts[worst]

    def moves(text: Ids, others: Sequence[tuple[bool, Ids]]) -> bool:
        before, after = _around(others)
        beside = local.call(Batch([*before, text, *after]))[len(before)]
        return bool(local.beyond([text], local.alone([text]), np.array([beside]))[0])

    others = [(i < worst, other) for i, other in enumerate(texts) if i != worst]
    others = shrink(others, lambda fewer: moves(text, fewer))
    text = shrink(text, lambda fewer: moves(fewer, others))
    if len(others) == 1:
        stands, other = others[0]
        others = [(stands, shrink(other, lambda fewer: moves(text, [(stands, fewer)])))]
    before, after = _around(others)
    end = compare(
        "scores([TEXT])[0]",
        "alone",
        f"scores([*BEFORE, TEXT, *AFTER])[{len(before)}]",
        "beside the other",
        float(local.tolerance([text])[0]),
    )
    what = "A text has another score beside another text."
    return local_script(local, what, end, BEFORE=before, TEXT=text, AFTER=after)


def _around(others: Sequence[tuple[bool, Ids]]) -> tuple[list[Ids], list[Ids]]:
    """Texts before and behind one."""
    before = [other for stands_before, other in others if stands_before]
    return before, [other for stands_before, other in others if not stands_before]


def _order(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if (outcome := _unpadded(local)) is not None:
        return outcome
    texts = texts_of(local)
    try:
        first = local.call(Batch(texts))
        back = local.call(Batch(texts[::-1]))[::-1]
    except _REFUSALS as error:
        return not_asked(f"the model takes no batch: {first_line(error)}")
    differs = local.differ(texts, first, back)
    if not differs.any():
        return sound(
            f"{len(texts)} texts in reverse have the same scores (up to {_far(first, back):.2g})"
        )
    worst = _worst(differs, first, back)

    def wrong(fewer: list[Ids]) -> bool:
        one, other = local.call(Batch(fewer)), local.call(Batch(fewer[::-1]))[::-1]
        return len(fewer) > 1 and bool(local.beyond(fewer, one, other).any())

    fewest = shrink(texts, wrong)
    tolerance = float(local.tolerance(fewest).max())
    script = local_script(
        local,
        "Texts have other scores when their order in the batch changes.",
        f"""
there, back = scores(TEXTS), scores(TEXTS[::-1])[::-1]
print("in this order:", there, "in reverse:", back)
# rounding explains {tolerance:.2g}
sys.exit(0 if all(abs(a - b) <= {tolerance!r} for a, b in zip(there, back)) else 1)
""",
        TEXTS=fewest,
    )
    return found(
        f"{int(differs.sum())} of {len(texts)} texts have another score when the batch comes in "
        f"reverse: {first[worst]:.4f} becomes {back[worst]:.4f}",
        size=_far(first, back),
        script=script,
    )


# ---------------------------------------------------------------------- padding


def _other_side(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if (outcome := _unpadded(local)) is not None:
        return outcome
    side = "right" if local.side == "left" else "left"
    texts = texts_of(local)
    try:
        if local.differ(texts, local.alone(texts), local.call(Batch(texts))).any():
            return not_asked("a batch changes scores on the tokenizer's own side already")
    except _REFUSALS as error:
        return not_asked(f"the model takes no batch: {first_line(error)}")
    return _padded(
        local,
        side,
        f"padded {side} (the tokenizer pads {local.side})",
        f"Padded {side}, a text has another score than alone.",
    )


def _absolute(subject: Subject) -> Outcome | None:
    local = _local(subject)
    if not has_absolute_positions(local.model):
        return None
    if (outcome := _unpadded(local)) is not None:
        return outcome
    if local.side == "right":
        return sound("positions come from a table, and the tokenizer pads right, which is right")
    return _padded(
        local,
        "left",
        "padded left, as its tokenizer does: the padding is counted as positions",
        "Padded left, a text has another score than alone: the padding is counted.",
    )


def _padded(local: LocalSubject, side: str, how: str, what: str) -> Outcome:
    texts = texts_of(local)
    want = local.alone(texts)
    try:
        scores = local.call(Batch(texts, side=side))  # type: ignore[arg-type]
    except _REFUSALS as error:
        return not_asked(f"the model takes no batch padded {side}: {first_line(error)}")
    differs = local.differ(texts, want, scores)
    if not differs.any():
        return sound(f"{len(texts)} texts {how} have their scores (up to {_far(want, scores):.2g})")
    worst = _worst(differs, want, scores)

    def moves(text: Ids, width: int) -> bool:
        one = local.alone([text])
        other = local.call(Batch([text, [text[0]] * width], side=side))[:1]  # type: ignore[arg-type]
        return bool(local.beyond([text], one, other)[0])

    text, width, script = texts[worst], max(map(len, texts)), None
    if moves(text, width):
        text = shrink(text, lambda fewer: moves(fewer, width))
        tolerance = float(local.tolerance([text])[0])
        end = compare(
            "scores([TEXT])[0]",
            "alone",
            f"scores([TEXT, [TEXT[0]] * {width}], {side!r})[0]",
            f"padded {side}",
            tolerance,
        )
        script = local_script(local, what, end, TEXT=text)
    return found(
        f"{int(differs.sum())} of {len(texts)} texts have another score {how}: "
        f"{want[worst]:.4f} alone is {scores[worst]:.4f}",
        size=_far(want, scores),
        script=script,
    )


def _pad_missing(subject: Subject) -> Outcome | None:
    local = _local(subject)
    pad, known = local.pad_id, local.config.get_text_config().pad_token_id
    if pad is None:
        where = "the tokenizer has no pad token"
        where += "" if known is not None else ", and the configuration none either"
        body = """
try:
    tokenizer.pad({"input_ids": [[1, 2], [1]]})
except ValueError as error:
    print("no batch can be padded:", error)
    sys.exit(1)
print("a batch can be padded")
"""
        what = "The tokenizer has no pad token: no batch can be made."
        return found(f"{where}: no batch can be made", script=local_script(local, what, body))
    if pad >= local.embeddings:
        body = """
rows = model.get_input_embeddings().weight.shape[0]
print("pad id:", tokenizer.pad_token_id, "embeddings:", rows)
sys.exit(1 if tokenizer.pad_token_id >= rows else 0)
"""
        return found(
            f"the pad id is {pad}, and the model has embeddings for {local.embeddings}: a "
            "padded batch fails",
            script=local_script(local, "The pad token has no embedding.", body),
        )
    if known is not None or local.kind != "scalar":
        return sound(f"the tokenizer pads with {pad}, the configuration has {known}")
    return _pad_unknown(local, pad)


def _pad_unknown(local: LocalSubject, pad: int) -> Outcome:
    """The tokenizer pads, and the configuration does not know with what."""
    texts = texts_of(local)
    text = texts[0]
    want = float(local.alone([text])[0])
    try:
        local.call(Batch(texts[:2]))
        refused = ""
    except _REFUSALS as error:
        refused = f"a batch is refused ({first_line(error)})"
    if not _filled_differs(local, text, pad):
        said = f"the tokenizer pads with {pad} and config.pad_token_id is None"
        body = """
try:
    print(scores(TEXTS))
except ValueError as error:
    sys.exit(f"a batch is refused: {error}")
"""
        script = local_script(local, "A batch is refused.", body, TEXTS=texts[:2])
        return found(f"{said}: {refused}", script=script) if refused else sound(said)
    filled = float(local.call(Batch([text + [pad] * 3], side="right", masked=[3]))[0])
    text = shrink(text, lambda fewer: _filled_differs(local, fewer, pad))
    end = compare(
        "scores([TEXT])[0]",
        "the text",
        "scores([TEXT + [tokenizer.pad_token_id] * 3], hidden=3)[0]",
        "padded by three tokens, which the mask hides",
        float(local.tolerance([text])[0]),
    )
    what = "The score of a padded text is that of its padding."
    return found(
        f"the tokenizer pads with {pad} and config.pad_token_id is None: one text that is padded "
        f"right has the score of its padding ({filled:.4f}, not {want:.4f})"
        f"{', and ' * bool(refused)}{refused}",
        size=abs(filled - want),
        script=local_script(local, what, end, TEXT=text),
    )


def _filled_differs(local: LocalSubject, text: Ids, pad: int) -> bool:
    filled = local.call(Batch([text + [pad] * 3], side="right", masked=[3]))
    want = local.alone([text])
    return bool(local.beyond([text], want, filled)[0])


def _pad_ids(subject: Subject) -> Outcome | None:
    if subject.kind != "scalar":
        return not_asked(BY_TOKEN)
    pad, known = subject.tokenizer.pad_token_id, subject.config.get_text_config().pad_token_id
    if pad is None or known is None or "padding" not in subject.abilities:
        return None  # pad-missing says it
    if pad == known:
        return sound(f"tokenizer and configuration have the same pad id, {pad}")
    local = _local(subject)
    texts = texts_of(local)
    want, scores = local.alone(texts), local.call(Batch(texts))
    differs = local.differ(texts, want, scores)
    if not differs.any():
        return sound(
            f"the tokenizer pads with {pad} and config.pad_token_id is {known}, but the score is "
            f"read at the same token, padded {local.side}"
        )

    def moves(text: Ids) -> bool:
        both = local.call(Batch([text, [text[0]] * (len(text) + 2)]))[:1]
        return bool(local.beyond([text], local.alone([text]), both)[0])

    first = int(np.argmax(differs))
    text, script = texts[first], None
    if moves(text):
        text = shrink(text, moves)
        end = compare(
            "scores([TEXT])[0]",
            "alone",
            "scores([TEXT, [TEXT[0]] * (len(TEXT) + 2)])[0]",
            "padded as the tokenizer does",
            float(local.tolerance([text])[0]),
        )
        script = local_script(
            local,
            "The tokenizer pads with another id than the configuration knows.",
            end,
            TEXT=text,
        )
    return found(
        f"the tokenizer pads with {pad}, config.pad_token_id is {known}: of {int(differs.sum())} "
        f"of {len(texts)} texts the score is read at a pad token",
        size=_far(want, scores),
        script=script,
        tokenizer=pad,
        config=known,
    )


def _pad_is_eos(subject: Subject) -> Outcome | None:
    if subject.kind != "scalar":
        return not_asked(BY_TOKEN)
    tokenizer = subject.tokenizer
    known, eos = subject.config.get_text_config().pad_token_id, tokenizer.eos_token_id
    if known is None or eos is None or known != eos:
        return sound(f"the pad id is {known}, the EOS {eos}")
    if subject.manifest is not None:
        return sound(
            f"the pad token is the EOS ({tokenizer.eos_token!r}), but the manifest names the "
            f"read-out: {subject.manifest.readout['rule']}"
        )
    ends = _ends_of_turns(subject)
    if ends and known not in ends:
        return sound(
            f"the pad token is the EOS ({tokenizer.eos_token!r}), but the chat template ends an "
            f"answer with another token, at which the score is read"
        )
    local = _local(subject)
    text = [i for i in texts_of(local)[2] if i != eos]
    cut, whole = local.alone([text, [*text, eos]])
    if local.differ([text], np.array([cut]), np.array([whole]))[0]:
        return sound("the pad token is the EOS, and the score is read there all the same")
    text = shrink(text, lambda fewer: _same_without(local, fewer, eos))
    tolerance = float(local.tolerance([text])[0])
    script = local_script(
        local,
        "A finished text and one that was cut off have one score: the EOS is taken for padding.",
        f"""
cut, finished = scores([TEXT])[0], scores([[*TEXT, tokenizer.eos_token_id]])[0]
print(f"cut off: {{cut:.6f}}; finished: {{finished:.6f}}")
# rounding explains {tolerance:.2g}
sys.exit(1 if abs(cut - finished) <= {tolerance!r} else 0)
""",
        TEXT=text,
    )
    return found(
        f"the pad token is the EOS ({tokenizer.eos_token!r}): it is skipped as padding, so a text "
        f"has the score {whole:.4f} finished and {cut:.4f} cut off",
        script=script,
    )


def _same_without(local: LocalSubject, text: Ids, eos: int) -> bool:
    cut, whole = local.alone([text, [*text, eos]])
    return bool(abs(cut - whole) <= local.tolerance([text])[0])


def _ends_of_turns(subject: Subject) -> set[int]:
    """Last ids of conversations as the model's users write them; none without a template."""
    if not subject.tokenizer.chat_template:
        return set()
    ends = set()
    for row in ROWS[:2]:
        try:
            ends.add(subject.encode(row)[-1])
        except Exception:  # a chat template is a program of its own, and may raise what it likes
            continue
    return ends


def _masked_tail(subject: Subject) -> Outcome | None:
    if subject.kind != "scalar":
        return not_asked(BY_TOKEN)
    local = _local(subject)
    text, tail = texts_of(local)[0], _drawing(local)(3)
    tail = [i for i in tail if i != local.pad_id] or tail
    want = local.alone([text])
    scores = local.call(Batch([text + tail], masked=[len(tail)]))
    if not local.differ([text], want, scores)[0]:
        return sound("tokens that the mask hides at the end are not read")
    text = shrink(text, lambda fewer: _tail_moves(local, fewer, tail[:1]))
    end = compare(
        "scores([TEXT])[0]",
        "the text",
        f"scores([TEXT + {tail[:1]!r}], hidden=1)[0]",
        "with one more token, which the mask hides",
        float(local.tolerance([text])[0]),
    )
    return found(
        f"a text with {len(tail)} more tokens, which the mask hides, has the score "
        f"{scores[0]:.4f} in place of {want[0]:.4f}: the last token is found by its id, not by the "
        "mask",
        size=_far(want, scores),
        script=local_script(local, "A token that the mask hides is read.", end, TEXT=text),
    )


def _tail_moves(local: LocalSubject, text: Ids, tail: Ids) -> bool:
    hidden = local.call(Batch([text + tail], masked=[len(tail)]))
    return bool(local.beyond([text], local.alone([text]), hidden)[0])


def _all_pad(subject: Subject) -> Outcome | None:
    if subject.kind != "scalar":
        return not_asked(BY_TOKEN)
    local = _local(subject)
    if (outcome := _unpadded(local)) is not None:
        return outcome
    text = texts_of(local)[0]
    try:
        score = float(local.call(Batch([text, []]))[1])
    except _REFUSALS as error:
        return sound(f"a row of nothing but padding is refused: {first_line(error)}")
    if not np.isfinite(score):
        return sound(f"a row of nothing but padding has the score {score}")
    body = """
score = scores([TEXT, []])[1]
print(f"a row without a text has the score {score:.6f}")
sys.exit(1 if score == score else 0)
"""
    return found(
        f"a row of nothing but padding has a score, {score:.4f}, and no error",
        script=local_script(local, "A row without a text has a score.", body, TEXT=text[:1]),
    )


# ---------------------------------------------------------------------- positions


def _positions(subject: Subject) -> Outcome | None:
    borders = length_borders(subject.config)
    if not borders:
        return None
    local = _local(subject)
    if (outcome := _unpadded(local)) is not None:
        return outcome
    border, each = borders[0]
    lengths = [4, border + 1, border + 8] if each else [4, border + 1]
    cost = sum(lengths) + len(lengths) * lengths[-1]
    kind = "dynamic NTK" if each else "LongRoPE"
    if local.max_tokens is not None and cost > local.max_tokens // 5:
        return not_asked(
            f"{kind} changes the positions of a batch beyond {border:,} tokens: to see it takes "
            f"{cost:,} tokens, more than a fifth of the budget"
        )
    draw = _drawing(local)
    texts = [draw(length) for length in lengths]
    want = np.array([local.call(Batch([text]))[0] for text in texts])  # the shortest first
    local.alone(texts[:1])
    scores = local.call(Batch(texts))
    differs = np.array(
        [
            bool(local.differ(texts[:1], want[i : i + 1], scores[i : i + 1])[0])
            for i in range(len(texts))
        ]
    )
    if not differs.any():
        return sound(f"{kind}: texts on both sides of {border:,} tokens keep their scores")
    i = int(np.argmax(differs))
    body = compare(
        "scores([TEXT])[0]",
        "alone",
        f"scores([TEXT, (TEXT * {lengths[-1]})[:{lengths[-1]}]])[0]",
        f"beside one of {lengths[-1]} tokens",
        float(local.tolerance(texts[:1])[0]),
    )
    return found(
        f"{kind}: a text of {lengths[i]:,} tokens has the score {want[i]:.4f} alone and "
        f"{scores[i]:.4f} beside one of {lengths[-1]:,}: one set of frequencies is taken for the "
        "batch, by its longest text",
        size=_far(want, scores),
        script=local_script(
            local, "A text has another score beside a long one.", body, TEXT=texts[i]
        ),
        border=border,
    )


# ---------------------------------------------------------------------- threads, repeats


def _threads(subject: Subject) -> Outcome | None:
    local = _local(subject)
    texts = texts_of(local)[:6]
    want = local.alone(texts)

    def work(start: int) -> np.ndarray:
        scores = np.empty(len(texts))
        for i in np.roll(np.arange(len(texts)), start):
            scores[i] = local.call(Batch([texts[i]]))[0]
        return scores

    with ThreadPoolExecutor(_THREADS) as pool:
        seen = list(pool.map(work, range(_THREADS)))
    differs = np.array([local.differ(texts, want, scores) for scores in seen])
    if not differs.any():
        return sound(f"{_THREADS} threads at once got the same scores of {len(texts)} texts")
    far = max(_far(want, scores) for scores in seen)
    tolerance = float(local.tolerance(texts).max())
    script = local_script(
        local,
        "Threads that score at once get other scores.",
        f"""
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

want = [scores([text])[0] for text in TEXTS]
with ThreadPoolExecutor({_THREADS}) as pool:
    for _ in range(20):
        got = list(pool.map(lambda text: scores([text])[0], TEXTS * {_THREADS}))
        # rounding explains {tolerance:.2g}
        wrong = sum(abs(a - b) > {tolerance!r} for a, b in zip(got, want * {_THREADS}))
        if wrong:
            sys.exit(f"{{wrong}} of {{len(got)}} scores differ from those of one thread")
print("all scores are those of one thread")
""",
        TEXTS=texts,
    )
    return found(
        f"{_THREADS} threads that score at once got {int(differs.sum())} of {differs.size} scores "
        f"wrong, by up to {far:.3g}",
        size=far,
        script=script,
    )


def _repeats(subject: Subject) -> Outcome | None:
    local = _local(subject)
    texts = sorted(texts_of(local), key=len)
    want = local.alone(texts)[:4]  # and the longest after them: what a model keeps shows
    again = np.array([[local.call(Batch([text]))[0] for text in texts[:4]] for _ in range(2)])
    differs = np.array([local.differ(texts[:4], want, scores) for scores in again])
    if not differs.any():
        return sound(
            f"4 texts asked three times have one score each (up to {_far(want, again):.2g})"
        )
    at = int(np.argmax(differs.any(axis=0)))
    tolerance = float(local.tolerance([texts[at]])[0])
    script = local_script(
        local,
        "The same text has another score when it is asked again.",
        f"""
first = scores([TEXT])[0]
scores([OTHER])
again = [scores([TEXT])[0] for _ in range(8)]
print("first:", first, "again:", again)
# rounding explains {tolerance:.2g}
sys.exit(0 if all(abs(first - score) <= {tolerance!r} for score in again) else 1)
""",
        TEXT=texts[at],
        OTHER=texts[-1],
    )
    return found(
        f"of 4 texts asked again {int(differs.any(axis=0).sum())} have another score, by up to "
        f"{_far(want, again):.3g}",
        size=_far(want, again),
        script=script,
    )


# ---------------------------------------------------------------------- inside


def _local(subject: Subject) -> LocalSubject:
    exact = subject.exact
    assert isinstance(exact, LocalSubject)
    return exact


def _far(one: Any, other: Any) -> float:
    return float(np.max(np.abs(np.nan_to_num(np.asarray(one) - other, nan=np.inf))))


def _worst(differs: np.ndarray, one: np.ndarray, other: np.ndarray) -> int:
    """Of those that differ the one that is furthest."""
    far = np.abs(np.nan_to_num(one - other, nan=np.inf))
    return int(np.argmax(np.where(differs, far, -1)))


_HF: Final = "https://github.com/huggingface"
_DEPENDS = "A score that depends on what else is in the batch cannot be compared with another: the "
#: a model here: servers are asked by companion.audit.checks.endpoint
_NEEDS: Final[frozenset[Ability]] = frozenset({"weights"})
CHECKS: Final[tuple[Check, ...]] = (
    Check(
        "pad-missing",
        "read-out",
        "fault",
        "Can a batch be padded?",
        "Without a pad token, or an embedding for it, no batch can be scored; with one that the "
        "configuration does not know, a padded text has the score of its padding, without a word.",
        "Give the tokenizer a pad token of its own, resize the embeddings if it is new, and set "
        "config.pad_token_id to its id; "
        "companion.models.load_base does both at the start of a training.",
        (
            f"{_HF}/trl/issues/422",
            "https://github.com/allenai/reward-bench/issues/115",
            "https://github.com/meta-llama/llama-cookbook/issues/199",
        ),
        _NEEDS,
        _pad_missing,
    ),
    Check(
        "pad-ids-differ",
        "read-out",
        "fault",
        "Do tokenizer and configuration mean the same pad token?",
        "The score is read at the last token that is not config.pad_token_id: padded with another "
        "id, that is a pad token.",
        "Set config.pad_token_id to the tokenizer's pad id and save the configuration.",
        (f"{_HF}/transformers/issues/29419", f"{_HF}/transformers/issues/35352"),
        _NEEDS,
        _pad_ids,
    ),
    Check(
        "pad-is-eos",
        "read-out",
        "fault",
        "Is the end of a text told from padding?",
        "The EOS is skipped as padding, so the score cannot tell a finished text from one that was "
        "cut off; engines that read the last token give other scores.",
        "Train with a pad token of its own (companion.models.load_base takes one). For a model "
        "that was trained so nothing helps: it has learnt nothing at the EOS.",
        (
            f"{_HF}/transformers/issues/35352",
            f"{_HF}/trl/issues/2778",
            "https://github.com/RLHFlow/RLHF-Reward-Modeling/issues/49",
        ),
        _NEEDS,
        _pad_is_eos,
    ),
    Check(
        "batch-changes-score",
        "read-out",
        "fault",
        "Has a text in a batch the score that it has alone?",
        _DEPENDS + "best of several completions is then a matter of their lengths.",
        "Find what looks at the other rows: the pad ids, the padding side, positions, a forward of "
        "the model's own. companion.RewardScorer scores such a model a text at a time.",
        (
            "https://github.com/allenai/reward-bench/issues/137",
            f"{_HF}/transformers/issues/24265",
        ),
        _NEEDS,
        _batch,
    ),
    Check(
        "order-changes-score",
        "read-out",
        "fault",
        "Has a batch in reverse the same scores?",
        _DEPENDS + "ranking then depends on who came first.",
        "Find what passes from row to row: a forward of the model's own, or answers of a server "
        "that are put back in another order.",
        ("https://github.com/allenai/reward-bench/issues/137",),
        _NEEDS,
        _order,
    ),
    Check(
        "padding-side",
        "read-out",
        "hazard",
        "Have texts their scores on the side where the tokenizer does not pad?",
        "Servers and pipelines that pad on the other side get other scores.",
        "Pad as the model's tokenizer does; pass position_ids for a table of positions.",
        (f"{_HF}/transformers/issues/35909", f"{_HF}/trl/issues/469"),
        _NEEDS,
        _other_side,
    ),
    Check(
        "absolute-positions",
        "read-out",
        "fault",
        "Are positions counted from the text's first token?",
        "The tokenizer pads left and the model counts the padding as positions, so each row but "
        "the longest is scored as if it began later.",
        "Set tokenizer.padding_side = 'right' and save the tokenizer.",
        (f"{_HF}/trl/issues/469", f"{_HF}/transformers/issues/808"),
        _NEEDS,
        _absolute,
    ),
    Check(
        "positions-by-batch",
        "read-out",
        "fault",
        "Are a text's positions its own in a batch with longer ones?",
        "LongRoPE and dynamic NTK take one set of frequencies for a batch, by its longest text, "
        "and dynamic NTK keeps it for later ones: short texts then have other scores.",
        "Put texts on both sides of the border into batches of their own, as "
        "companion.RewardScorer does.",
        (
            f"{_HF}/transformers/issues/25306",
            f"{_HF}/transformers/issues/25104",
            "https://github.com/ggml-org/llama.cpp/pull/24875",
        ),
        _NEEDS,
        _positions,
    ),
    Check(
        "masked-tail",
        "read-out",
        "hazard",
        "Are tokens at the end that the mask hides left out of the reading?",
        "Stock classes never look at the mask for the last token: whoever hides tokens by the mask "
        "alone gets the score of a hidden one.",
        "Fill what is hidden with the pad id, or read by the mask, as companion does.",
        (f"{_HF}/transformers/issues/35352",),
        _NEEDS,
        _masked_tail,
    ),
    Check(
        "all-pad-row",
        "read-out",
        "hazard",
        "Is a row without a text refused?",
        "An empty text gets a number that looks like a score.",
        "Refuse empty texts before the model sees them.",
        (f"{_HF}/transformers/issues/35352",),
        _NEEDS,
        _all_pad,
    ),
    Check(
        "repeats-differ",
        "read-out",
        "fault",
        "Has a text the same score when it is asked again?",
        "A score that changes by itself is noise in every use: rewards, rankings, comparisons.",
        "Call model.eval(); look for dropout in the model's own code, and for what it keeps from "
        "one call to the next.",
        (f"{_HF}/transformers/issues/25306", "https://github.com/hiyouga/LlamaFactory/issues/761"),
        _NEEDS,
        _repeats,
    ),
    Check(
        "threads",
        "read-out",
        "fault",
        "Do threads that score at once get their own scores?",
        "A server or a trainer with several threads gets scores of other texts, now and then.",
        "Hold a lock around the model's forward (companion.RewardScorer does), or keep nothing in "
        "the module while it runs.",
        ("https://github.com/pytorch/pytorch/issues/51452",),
        _NEEDS,
        _threads,
    ),
)
