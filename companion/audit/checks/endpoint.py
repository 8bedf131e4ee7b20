"""Checks that only endpoints need: what a server does around its model. Chapter 9."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from scipy.special import expit

from companion.audit.endpoint import Answer, EndpointSubject
from companion.audit.outcome import Check, Kind, Outcome, Room, found, not_asked, sound
from companion.audit.scripts import compare, endpoint_script
from companion.audit.shrinking import shrink
from companion.audit.subject import Ability, BudgetSpent, Subject
from companion.formatting import Row
from companion.models.golden import ROWS

#: Longer than what OpenRLHF's own server reads, of which it says nothing.
_LONG: Final = 2_600
_SENTENCE: Final = tuple(
    "The sea is wide and salt and the boats go out before the sun is up .".split()  # noqa: SIM905
)
#: endings that have little in common, the last word least
_ENDS: Final = (
    "so the answer is 17 and all is well .",
    "no , that was wrong , I am sorry !",
    "Thank you for asking me this ?",
)


def _texts(own: EndpointSubject) -> list[Row]:
    """The golden texts in a form of which one request takes several."""
    if own.protocol == "companion":
        return list(ROWS)
    return [f"{row['prompt']}\n{row['completion']}" for row in ROWS]


def _script(own: EndpointSubject, what: str, end: str, **bodies: Any) -> str:
    return endpoint_script(own.route, own.protocol, what, end, **bodies)


def _endpoint(subject: Subject) -> EndpointSubject | None:
    return subject if isinstance(subject, EndpointSubject) else None


# ---------------------------------------------------------------------- one text, one score


def _batch(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    texts = _texts(own)
    alone = own.rows_alone(texts)
    allowed = own.rounding(alone)
    by = np.abs(own.call_rows(texts) - alone)
    worst = int(np.argmax(by - allowed))
    if not by[worst] > allowed[worst]:
        return sound(f"{len(texts)} texts, alone and in one request: {by.max():.2g} at most")
    others = [i for i in range(len(texts)) if i != worst]

    def gap(chosen: Sequence[int]) -> float:
        there = own.call_rows([*(texts[i] for i in chosen), texts[worst]])
        return float(abs(there[-1] - alone[worst]))

    try:
        others = shrink(others, lambda fewer: gap(fewer) > allowed[worst])
        shown = gap(others) > allowed[worst]  # (not where it must stand in its own place)
    except BudgetSpent:
        shown = False
    together = [*(texts[i] for i in others), texts[worst]] if shown else texts
    place = len(together) - 1 if shown else worst
    script = _script(
        own,
        "A text has another score beside other texts.",
        compare(
            *("scores(ALONE)[0]", "alone", f"scores(TOGETHER)[{place}]", "beside others"),
            float(allowed[worst]),
        ),
        ALONE=own.body_of_rows([texts[worst]]),
        TOGETHER=own.body_of_rows(together),
    )
    return found(
        f"{int((by > allowed).sum())} of {len(texts)} texts have another score in one request "
        f"than alone, by up to {by[worst]:.3g} (rounding explains {allowed[worst]:.2g})",
        size=float(by[worst]),
        script=script,
    )


def _order(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    texts = _texts(own)
    first = own.call_rows(texts)
    by = np.abs(first - own.call_rows(texts[::-1])[::-1])
    allowed = own.rounding(first)
    worst = int(np.argmax(by - allowed))
    if not by[worst] > allowed[worst]:
        return sound(f"{len(texts)} texts in two orders: {by.max():.2g} at most")
    script = _script(
        own,
        "A text's score depends on its place in the request.",
        compare(
            *(f"scores(TEXTS)[{worst}]", "in this order"),
            *(f"scores(REVERSE)[{len(texts) - 1 - worst}]", "in the opposite one"),
            float(allowed[worst]),
        ),
        TEXTS=own.body_of_rows(texts),
        REVERSE=own.body_of_rows(texts[::-1]),
    )
    return found(
        f"the same {len(texts)} texts in the opposite order: scores move by up to "
        f"{by[worst]:.3g} (rounding explains {allowed[worst]:.2g})",
        size=float(by[worst]),
        script=script,
    )


def _repeats(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    return _again(own, [own.call_rows(_texts(own)[5:6]) for _ in range(4)], "")


def _threads(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    texts = _texts(own)
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(own.call_rows, [texts[5:6], texts[:1]] * 8))
    return _again(own, scores[::2], " while others were asked")


def _again(own: EndpointSubject, scores: Sequence[np.ndarray], how: str) -> Outcome:
    """Whether one text had one score each time."""
    texts = _texts(own)
    before = own.rows_alone(texts[5:6])
    seen = np.concatenate([before, *scores])
    most, allowed = float(np.ptp(seen)), float(own.rounding(seen).max())
    if most <= allowed:
        return sound(f"a text {len(seen)} times{how}: {most:.2g} at most")
    script = _script(
        own,
        f"A text has another score when it is asked again{how}.",
        "from concurrent.futures import ThreadPoolExecutor  # noqa: E402\n\n"
        f"with ThreadPoolExecutor({4 if how else 1}) as pool:\n"
        f"    seen = list(pool.map(scores, [TEXT, OTHER] * 8))[::2]\n"
        'print("scores:", seen)\n'
        f"# rounding explains {allowed:.2g}\n"
        f"sys.exit(1 if max(seen)[0] - min(seen)[0] > {allowed!r} else 0)",
        TEXT=own.body_of_rows(texts[5:6]),
        OTHER=own.body_of_rows(texts[:1]),
    )
    return found(
        f"one text, asked {len(seen)} times{how}: scores from {seen.min():.4g} to {seen.max():.4g}",
        size=most,
        script=script,
    )


def _finite(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    texts = _texts(own)
    scores = own.rows_alone(texts)
    bad = np.flatnonzero(~np.isfinite(scores))
    if not bad.size:
        return sound(f"{len(scores)} scores are finite")
    script = _script(
        own,
        "A score is no finite number.",
        "status, seen = post(BODY)\nprint(status, seen)\n"
        'bad = seen is not None and (seen[0] is None or not abs(seen[0]) < float("inf"))\n'
        "sys.exit(1 if bad else 0)",
        BODY=own.body_of_rows([texts[bad[0]]]),
    )
    return found(f"{bad.size} of {len(scores)} scores are not finite", script=script)


def _answers(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    texts = _texts(own)
    alone = own.rows_alone(texts)
    together = own.call_rows(texts)
    allowed = own.rounding(alone)
    moved = np.abs(together - alone) > allowed
    if not moved.any():
        return sound(f"{len(texts)} answers stand in the order of the texts")
    # the same scores at other places; what moves scores does not make them each other's
    apart = np.abs(np.sort(together) - np.sort(alone)).max()
    if apart > np.abs(together - alone).max() / 100:
        return sound("the scores in one request are no other order of those alone")
    place = int(np.argmax(np.abs(together - alone)))
    came = int(np.argmin(np.abs(together - alone[place])))
    pair = [texts[place], texts[came]]
    scores = own.call_rows(pair)
    shown, at = (pair, 0) if abs(scores[0] - alone[place]) > allowed[place] else (texts, place)
    script = _script(
        own,
        "Answers stand in another order than the texts they belong to.",
        compare(
            *("scores(ALONE)[0]", "alone", f"scores(TOGETHER)[{at}]", "at its place among others"),
            float(allowed[place]),
        ),
        ALONE=own.body_of_rows([shown[at]]),
        TOGETHER=own.body_of_rows(shown),
    )
    return found(
        f"{len(texts)} texts have in one request the scores that they have alone, in another "
        f"order: text {place} has its score at place {came}",
        size=float(np.abs(together - alone).max()),
        script=script,
        moved=int(moved.sum()),
    )


# ---------------------------------------------------------------------- what is done to a score


def _ids_alone(own: EndpointSubject) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of the golden texts now and at saving, where the manifest has them."""
    golden = None if own.manifest is None else own.manifest.golden_texts
    if golden is None or golden.places is not None or "ids" not in own.abilities:
        return None
    return own.alone(golden.input_ids), np.array(golden.values, dtype=np.float64)


def _activation(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    pair = _ids_alone(own)
    if pair is not None:
        now, saved = pair
        allowed = own.rounding(saved)
        squashed = np.abs(now - expit(saved))
        if (squashed <= allowed / 4).all() and (np.abs(now - saved) > allowed).any():
            worst = int(np.argmax(np.abs(now - saved)))
            assert own.manifest is not None
            assert own.manifest.golden_texts is not None
            body = own.body_of_ids([own.manifest.golden_texts.input_ids[worst]])
            script = _script(
                own,
                "The server applies a sigmoid to the score, although raw scores were asked for.",
                compare(
                    *("scores(TEXT)[0]", "now", repr(float(saved[worst])), "saved with the model"),
                    float(allowed[worst]),
                ),
                TEXT=body,
            )
            return found(
                f"all {len(now)} golden texts have σ(score), not the score: {now[worst]:.4g} where "
                f"{saved[worst]:.4g} was saved with the model",
                size=float(np.abs(now - saved).max()),
                script=script,
            )
        if not (np.abs(now - saved) > allowed).any():
            return sound(f"{len(now)} golden texts have the raw scores that were saved")
    texts = _texts(own)
    scores = own.rows_alone(texts)
    finite = scores[np.isfinite(scores)]
    if finite.size > 2 and np.ptp(finite) == 0:
        bodies = [own.body_of_rows([text]) for text in texts]
        script = _script(
            own,
            "All texts have the same score.",
            'seen = [score for body in BODIES for score in scores(body)]\nprint("scores:", seen)\n'
            "sys.exit(1 if len(set(seen)) == 1 else 0)",
            BODIES=bodies,
        )
        return found(
            f"{finite.size} quite different texts all have the score {finite[0]:g}: a softmax over "
            "one logit gives 1.0, whatever the logit",
            size=0.0,
            script=script,
        )
    inside = (finite > 0) & (finite < 1)
    reference = None if own.manifest is None else own.manifest.reference
    if reference is not None and inside.all():
        share = float(np.mean([0 < quantile < 1 for quantile in reference.quantiles]))
        if share**finite.size < 1e-9:
            return found(
                f"all {finite.size} scores lie between 0 and 1, and {share:.0%} of the reference "
                "set's do: the server applies a sigmoid, although raw scores were asked for",
                script=None,
            )
    if inside.all():
        return None  # nothing says which; the hazard beside this one names it
    return sound(f"scores from {finite.min():.3g} to {finite.max():.3g}: no probabilities")


def _probabilities(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None or _ids_alone(own) is not None:
        return None
    texts = _texts(own)
    scores = own.rows_alone(texts)
    finite = scores[np.isfinite(scores)]
    if finite.size and ((finite > 0) & (finite < 1)).all() and np.ptp(finite) > 0:
        return found(
            f"all {finite.size} scores lie between 0 and 1, from {finite.min():.3g} to "
            f"{finite.max():.3g}, and nothing here says what they should be"
        )
    return None


def _default(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None or own.protocol != "vllm":
        return None
    raw, plain = _classified(own, use_activation=False), _classified(own)
    if raw is None or plain is None:
        return not_asked("a text without use_activation is refused")
    by = abs(plain - raw)
    if not by > float(own.rounding([raw])[0]):
        return sound("without use_activation the score is raw too")
    return found(
        f"a request that does not say use_activation=false gets {plain:.4g} in place of {raw:.4g}"
        + (", its sigmoid" if abs(plain - expit(raw)) < 1e-3 else ""),
        size=by,
    )


def _ignored(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None or own.protocol != "vllm":
        return None
    raw, plain = _classified(own, use_activation=False), _classified(own)
    if raw is None or plain is None:
        return not_asked("a text without use_activation is refused")
    allowed = float(own.rounding([raw])[0])
    dropped = []
    for name in ("softmax", "activation"):
        value = _classified(own, **{name: False})
        if value is not None and abs(value - plain) <= allowed:
            dropped.append(name)
    if not dropped:
        return sound("softmax and activation are refused, or do what they say")
    if abs(plain - raw) <= allowed:
        return sound(f"{' and '.join(dropped)} are ignored, and the score is raw without them")
    body = _classify_body(own)
    script = _script(
        own,
        f"{dropped[0]}=false is dropped without a word: the score is no raw one.",
        "status, asked = post(ASKED)\n"
        "if status != 200:\n    sys.exit(0)  # it is refused\n"
        + compare(
            *(
                "asked[0]",
                f"with {dropped[0]}=false",
                "scores(RAW)[0]",
                "with use_activation=false",
            ),
            allowed,
        ),
        ASKED={**body, dropped[0]: False},
        RAW={**body, "use_activation": False},
    )
    return found(
        f"{' and '.join(f'{name}=false' for name in dropped)} are accepted and change nothing: "
        f"{plain:.4g}, where the raw score is {raw:.4g}",
        size=abs(plain - raw),
        script=script,
    )


def _classify_body(own: EndpointSubject) -> dict[str, Any]:
    body = own.body_of_rows([_texts(own)[0]])
    body.pop("use_activation")
    return body


def _classified(own: EndpointSubject, **fields: bool) -> float | None:
    answer = own.ask({**_classify_body(own), **fields}, 1)
    return None if answer.scores is None else float(answer.scores[0])


# ---------------------------------------------------------------------- what is read


def _cut(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None or own.kind != "scalar":
        return None
    wanted = _LONG
    if own.max_length is not None:
        wanted = min(wanted, own.max_length + 64)
    n_words = wanted
    if own.tokenizer is not None:
        each = len(own.tokenizer(" ".join(_SENTENCE))["input_ids"]) / len(_SENTENCE)
        n_words = math.ceil(wanted / each)

    def text(n: int, end: int) -> str:
        words = (_SENTENCE * (n // len(_SENTENCE) + 1))[:n]
        return " ".join([*words, _ENDS[end]])

    def ask(n: int, end: int) -> Answer:
        return own.ask(own.body_of_rows([text(n, end)]), 1, n)

    short = [ask(2, end) for end in range(3)]
    if any(answer.scores is None for answer in short):
        return not_asked(f"a short text is refused: {'; '.join(short[0].said)}")
    if len({float(a.scores[0]) for a in short if a.scores is not None}) < 3:
        return not_asked("other endings do not move the score of a short text either")
    said, first = "", ask(n_words, 0)
    if first.scores is None:
        said = f"a text of about {wanted:,} tokens is refused with {first.status}"
        return sound(f"{said}: {'; '.join(first.said)[:200]}", status=first.status)
    if any("cut" in one for one in first.said):
        return sound(f"a text of about {wanted:,} tokens is cut, which the answer says")
    for end in (1, 2):
        other = ask(n_words, end)
        if other.scores is None or other.scores[0] != first.scores[0]:
            return sound(f"the end of a text of about {wanted:,} tokens is read")
    least = n_words
    try:  # the smallest that shows it, of those that double
        for n in (128, 256, 512, 1024, 2048):
            if n >= n_words:
                break
            pair = [ask(n, end).scores for end in (0, 1)]
            if pair[0] is not None and pair[1] is not None and pair[0][0] == pair[1][0]:
                least = n
                break
    except BudgetSpent:
        pass
    script = _script(
        own,
        "The end of a long text is not read: texts that end quite differently have one score.",
        f"words = (WORDS * {least // len(_SENTENCE) + 1})[:{least}]\n"
        "seen = []\n"
        "for end in ENDS:\n"
        '    body = json.dumps(BODY).replace("TEXT", " ".join([*words, end]))\n'
        "    seen.append(scores(json.loads(body)))\n"
        'print("scores:", seen)\n'
        "sys.exit(1 if None not in seen and seen[0] == seen[1] else 0)",
        WORDS=_SENTENCE,
        ENDS=_ENDS[:2],
        BODY=own.body_of_rows(["TEXT"]),
    )
    return found(
        f"texts of about {wanted:,} tokens that end quite differently all have the score "
        f"{first.scores[0]:.6g}, and nothing says that they were cut; of those tried, "
        f"{least:,} words are enough",
        size=0.0,
        script=script,
        words=least,
    )


def _template(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None or own.protocol == "openrlhf" or "ids" not in own.abilities:
        return None
    rows: list[Any] = [row for row in ROWS if row.get("terminated", True)]
    if own.protocol == "vllm":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in rows
        ]
    ids = [own.encode(row) for row in rows]
    as_ids, as_words = own.alone(ids), own.rows_alone(rows)
    by, allowed = np.abs(as_ids - as_words), own.rounding(as_ids)
    worst = int(np.argmax(by - allowed))
    if not by[worst] > allowed[worst]:
        return sound(f"{len(rows)} rows, as ids and as words: {by.max():.2g} at most")
    script = _script(
        own,
        "The server writes a conversation in another way than the model's own formatter.",
        compare(
            *("scores(IDS)[0]", "as token ids", "scores(WORDS)[0]", "as words"),
            float(allowed[worst]),
        ),
        IDS=own.body_of_ids([ids[worst]]),
        WORDS=own.body_of_rows([rows[worst]]),
    )
    return found(
        f"{int((by > allowed).sum())} of {len(rows)} rows have another score as words, which the "
        f"server formats, than as the token ids of --model: {as_words[worst]:.4g} in place of "
        f"{as_ids[worst]:.4g}",
        size=float(by[worst]),
        script=script,
    )


def _golden(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    pair = None if own is None else _ids_alone(own)
    if own is None or pair is None:
        return None
    assert own.manifest is not None
    assert own.manifest.golden_texts is not None
    golden, (now, saved) = own.manifest.golden_texts, pair
    by = np.abs(now - saved)
    allowed = np.maximum(own.rounding(saved), golden.tolerance)
    worst = int(np.argmax(by - allowed))
    if not by[worst] > allowed[worst]:
        return sound(f"{len(now)} golden texts: {by.max():.2g} away from their values at most")
    if (np.abs(now - expit(saved)) <= own.rounding(saved) / 4).all():
        return not_asked("they have the sigmoid of their scores; see activation-applied")
    script = _script(
        own,
        "A golden text has another score than was saved with the model.",
        compare(
            *("scores(TEXT)[0]", "now", repr(float(saved[worst])), "saved with the model"),
            float(allowed[worst]),
        ),
        TEXT=own.body_of_ids([golden.input_ids[worst]]),
    )
    return found(
        f"{int((by > allowed).sum())} of {len(now)} golden texts have another score than was saved "
        f"with --model: {now[worst]:.4g} in place of {saved[worst]:.4g}",
        size=float(by[worst]),
        script=script,
    )


# ---------------------------------------------------------------------- what is refused


def _errors(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    field = {"companion": "items", "vllm": "input", "openrlhf": "query"}[own.protocol]
    bodies: tuple[Any, ...] = ({}, {field: 5}, {field: {"no": "text"}}, [])
    statuses = [own.ask(body, 1).status for body in bodies]
    hidden = [body for body, status in zip(bodies, statuses, strict=True) if status >= 500]
    taken = [body for body, status in zip(bodies, statuses, strict=True) if status == 200]
    if not hidden and not taken:
        said = ", ".join(map(str, dict.fromkeys(statuses)))
        return sound(f"{len(bodies)} requests that hold no text are refused ({said})")
    body = (hidden or taken)[0]
    script = _script(
        own,
        "A request that holds no text is not refused as a bad request (4xx).",
        "status, found = post(BODY)\nprint(status, found)\n"
        "sys.exit(0 if 400 <= status < 500 else 1)",
        BODY=body,
    )
    parts = [f"{len(hidden)} with 500 or more"] if hidden else []
    parts += [f"{len(taken)} with 200"] if taken else []
    return found(
        f"of {len(bodies)} requests that hold no text, {' and '.join(parts)} are answered, as "
        f"{body!r}: a client cannot tell its own mistake from a server that is down",
        script=script,
        statuses=statuses,
    )


def _empty(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    answers = {"no text": own.ask(own.body_of_rows([""]), 1)}
    if own.protocol != "openrlhf":
        row = {"prompt": "What is 2 + 3?", "completion": ""}
        answers["a prompt without a completion"] = own.ask(own.body_of_rows([row]), 1)
    scored = {
        what: float(answer.scores[0])
        for what, answer in answers.items()
        if answer.scores is not None and np.isfinite(answer.scores[0])
    }
    if not scored:
        return sound(f"{' and '.join(answers)} are refused, or have no score")
    what = next(iter(scored))
    body = own.body_of_rows(["" if what == "no text" else row])
    script = _script(
        own,
        "What is empty has a score.",
        "status, found = post(BODY)\nprint(status, found)\n"
        "sys.exit(0 if found is None or found[0] is None else 1)",
        BODY=body,
    )
    said = ", ".join(f"{what} scores {score:.4g}" for what, score in scored.items())
    return found(said, script=script)


# ---------------------------------------------------------------------- the checks


def _check(
    run: Callable[[Subject], Outcome | None],
    name: str,
    kind: Kind,
    room: Room,
    asks: str,
    why: str,
    cure: str,
    threads: Sequence[str] = (),
    needs: Sequence[Ability] = ("rows",),
) -> Check:
    return Check(name, room, kind, asks, why, cure, tuple(threads), frozenset(needs), run)


_GITHUB: Final = "https://github.com/"
_SAME: Final = (
    "A reward that moves with its neighbours is noise in RL, and no evaluation can be repeated."
)

CHECKS: Final[tuple[Check, ...]] = (
    _check(
        _batch,
        "batch-changes-score",
        "fault",
        "read-out",
        "Has a text the same score alone and beside others in one request?",
        _SAME,
        "Pad on the right with a pad token that is not the EOS and a mask, or send a text a "
        "request until the server does.",
        (_GITHUB + "allenai/reward-bench/issues/137",),
    ),
    _check(
        _order,
        "order-changes-score",
        "fault",
        "read-out",
        "Has a text the same score wherever it stands in a request?",
        _SAME,
        "Mend the server's batches; until then send a text a request.",
        (_GITHUB + "allenai/reward-bench/issues/137",),
    ),
    _check(
        _repeats,
        "repeats-differ",
        "fault",
        "read-out",
        "Has the same request the same score again?",
        "A reward that is drawn anew is noise in RL, and two runs cannot be compared.",
        "Switch dropout off (model.eval()), and look for servers of two versions behind one URL.",
        (_GITHUB + "hiyouga/LlamaFactory/issues/761",),
    ),
    _check(
        _threads,
        "threads",
        "fault",
        "read-out",
        "Has a request the same score while others are served?",
        "RL jobs ask with dozens of requests at once: some get scores of other texts.",
        "Let one batch at a time run in a model, as companion serve does.",
        needs=("rows", "threads"),
    ),
    _check(
        _finite,
        "not-finite",
        "fault",
        "head",
        "Are all scores finite numbers?",
        "A NaN makes each comparison false, and one in a batch of rewards spoils all advantages.",
        "Serve the model in float32 or bfloat16; weights that are not finite come of a training "
        "that diverged.",
        (_GITHUB + "huggingface/trl/issues/3236",),
    ),
    _check(
        _answers,
        "answers-out-of-order",
        "fault",
        "read-out",
        "Stands each score at the place of its text?",
        "Each completion is paid for another one; means look right, so nothing shows it.",
        "If the server sorts texts by length, put the scores back into the order of the request.",
    ),
    _check(
        _activation,
        "activation-applied",
        "fault",
        "head",
        "Are the scores raw, as they were asked for?",
        "Behind a sigmoid, good completions are all near 1: differences vanish, and with them what "
        "RL learns from. σ(a) − σ(b) is no margin.",
        'Save the model with config.problem_type = "regression", or serve it without an '
        "activation; /v1/classify of SGLang takes a softmax over one logit: use /classify.",
        (
            _GITHUB + "vllm-project/vllm/issues/11881",
            _GITHUB + "vllm-project/vllm/pull/20538",
            _GITHUB + "sgl-project/sglang/pull/19709",
        ),
    ),
    _check(
        _probabilities,
        "scores-like-probabilities",
        "hazard",
        "head",
        "Do all scores lie between 0 and 1?",
        "If a sigmoid was applied, margins are lost; a model that was trained on such targets "
        "looks the same.",
        "Give --model, whose golden texts or reference set tell, or look at the server's settings.",
        (_GITHUB + "vllm-project/vllm/issues/11881",),
    ),
    _check(
        _default,
        "activation-by-default",
        "hazard",
        "head",
        "Is the score raw if a client does not ask for it?",
        "A client that does not know use_activation=false gets probabilities for rewards.",
        'Send use_activation=false, or save the model with config.problem_type = "regression".',
        (_GITHUB + "vllm-project/vllm/pull/20538",),
    ),
    _check(
        _ignored,
        "fields-ignored",
        "hazard",
        "head",
        "Does a field that names the activation do what it says?",
        "A client that was written for the old name believes that its scores are raw.",
        "Send use_activation=false, the only name that vLLM still reads.",
        (_GITHUB + "vllm-project/vllm/pull/32243", _GITHUB + "vllm-project/vllm/pull/20538"),
    ),
    _check(
        _cut,
        "silent-cut",
        "fault",
        "text",
        "Is the end of a long text read?",
        "A cut completion has the score of its beginning: what is too long is never punished, and "
        "its answer never seen.",
        "Raise the server's limit (OpenRLHF: --data.max_len, by default 2,048), or refuse what is "
        "longer, as companion serve --overlong error does.",
        (_GITHUB + "OpenRLHF/OpenRLHF/blob/main/openrlhf/cli/serve_rm.py",),
    ),
    _check(
        _template,
        "template-mismatch",
        "fault",
        "text",
        "Does the server write a conversation as the model was trained on it?",
        "The model reads texts of a form that it has never seen, and scores them all the same.",
        "Serve the model with its own tokenizer files and chat template, or send token ids.",
        (
            _GITHUB + "allenai/reward-bench/issues/164",
            _GITHUB + "vllm-project/vllm/pull/16976",
        ),
        ("ids", "rows", "tokenizer"),
    ),
    _check(
        _golden,
        "golden-texts-moved",
        "fault",
        "head",
        "Have the golden texts of --model the scores that were saved with it?",
        "What is served is not the model that was evaluated: other weights, another head, another "
        "way to tokenise (a second BOS, an EOS that is missing).",
        "companion serve says in its log what differs; with another engine compare weights, dtype "
        "and tokenizer, and whether it adds special tokens to text that has them.",
        (_GITHUB + "allenai/reward-bench/issues/164",),
        ("ids",),
    ),
    _check(
        _errors,
        "errors-hidden",
        "hazard",
        "text",
        "Is a request that holds no text refused as the client's mistake (4xx)?",
        "Clients repeat a 500, for minutes (verl: 16 times over 331 s; OpenRLHF: five times, then "
        "the reward is None), and never learn that their request is wrong.",
        "Hand a worker's 4xx on as it is, and check bodies before they are read.",
        (
            _GITHUB + "OpenRLHF/OpenRLHF/pull/1325",
            _GITHUB + "THUDM/slime/pull/1582",
            _GITHUB + "verl-project/verl-omni/pull/366",
        ),
    ),
    _check(
        _empty,
        "empty-input",
        "hazard",
        "text",
        "Is what is empty refused?",
        "A policy that says nothing gets a reward, often not the worst one.",
        "Refuse empty completions, or score them with a value of your own.",
        (_GITHUB + "OpenRLHF/OpenRLHF/pull/1325",),
    ),
)
