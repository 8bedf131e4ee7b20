"""Checks that only endpoints need: what a server does around its model. Chapter 9."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from scipy.special import expit

from companion.audit.endpoint import ROUTES, Answer, EndpointSubject
from companion.audit.outcome import Check, Kind, Outcome, Room, found, not_asked, sound
from companion.audit.subject import Ability, BudgetSpent, Subject
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
_TEXTS: Final = tuple(f"{row['prompt']}\n{row['completion']}" for row in ROWS)


# ---------------------------------------------------------------------- scripts

_SCRIPT: Final = '''\
"""{title}

Exits with 1 while it is so, with 0 when it is mended.
"""

import json
import os
import sys
import urllib.error
import urllib.request

URL = {url!r}
HEADERS = {{"Content-Type": "application/json"}}
if key := os.environ.get("COMPANION_REWARD_API_KEY"):
    HEADERS["Authorization"] = "Bearer " + key


def post(body):
    """The status, and the scores by their index (None if there are none)."""
    request = urllib.request.Request(URL, json.dumps(body).encode(), HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, None
    try:
        {read}
    except (KeyError, TypeError):
        return 200, None


{test}
'''
_READ: Final = {
    "companion": 'found = sorted(answer["rewards"], key=lambda item: item["index"])\n'
    '        return 200, [item["raw"] for item in found]',
    "vllm": 'found = sorted(answer["data"], key=lambda item: item["index"])\n'
    '        return 200, [item["probs"][0] for item in found]',
    "openrlhf": 'return 200, answer["rewards"]',
}


def request_script(subject: EndpointSubject, title: str, test: str) -> str:
    """A script that posts and tests, with the standard library alone.

    `test` is Python that calls ``post(body)``, which gives the status and the scores, prints what
    is wrong and ends with ``sys.exit(1)`` while it is.
    """
    return _SCRIPT.format(
        title=title.replace("\\", "\\\\").replace('"""', "'''"),
        url=subject.route,
        read=_READ[subject.protocol],
        test=test.strip(),
    )


def _same_script(
    subject: EndpointSubject,
    title: str,
    first: Any,
    second: Any,
    places: tuple[int, int],
    tolerance: float,
    *,
    differ: bool = True,
) -> str:
    """That two requests' scores of one text differ, or (`differ` false) of two texts do not."""
    test = (
        f"_, first = post({first!r})\n"
        f"_, second = post({second!r})\n"
        f"first, second = first[{places[0]}], second[{places[1]}]\n"
        'print("scores:", first, second, "difference:", abs(first - second))\n'
        f"sys.exit(int(abs(first - second) {'>' if differ else '<='} {tolerance!r}))"
    )
    return request_script(subject, title, test)


# ---------------------------------------------------------------------- one text, one score


def _by_rows(subject: Subject) -> EndpointSubject | None:
    """The subject, where no token ids can be given; else the read-out's own checks are asked."""
    own = _endpoint(subject)
    return None if own is None or "ids" in own.abilities else own


def _endpoint(subject: Subject) -> EndpointSubject | None:
    return subject if isinstance(subject, EndpointSubject) else None


def _batch(subject: Subject) -> Outcome | None:
    own = _by_rows(subject)
    if own is None:
        return None
    alone = own.rows_alone(_TEXTS)
    return _together(own, list(_TEXTS), alone, "the other texts of its request")


def _order(subject: Subject) -> Outcome | None:
    own = _by_rows(subject)
    if own is None:
        return None
    forward = own.call_rows(_TEXTS)
    back = own.call_rows(_TEXTS[::-1])[::-1]
    by = np.abs(forward - back)
    worst = int(np.argmax(by - own.rounding(forward)))
    most, allowed = float(by[worst]), float(own.rounding(forward)[worst])
    if not most > allowed:
        return sound(f"{len(_TEXTS)} texts in two orders: {most:.2g} at most", most=most)
    script = _same_script(
        own,
        "A text's score depends on its place in the request.",
        own.body_of_rows(_TEXTS),
        own.body_of_rows(_TEXTS[::-1]),
        (worst, len(_TEXTS) - 1 - worst),
        allowed,
    )
    return found(
        f"the same {len(_TEXTS)} texts in the opposite order: one score moves by {most:.3g} "
        f"(rounding: {allowed:.2g})",
        size=most,
        script=script,
    )


def _together(own: EndpointSubject, texts: list[str], alone: np.ndarray, what: str) -> Outcome:
    """Whether texts have in one request the scores that they have alone."""
    allowed = own.rounding(alone)

    def gap(chosen: Sequence[str], single: np.ndarray) -> np.ndarray:
        return np.abs(own.call_rows(chosen) - single)

    by = gap(texts, alone)
    worst = int(np.argmax(by - allowed))
    most = float(by[worst])
    if not most > allowed[worst]:
        return sound(f"{len(texts)} texts, alone and in one request: {most:.2g} at most", most=most)
    kept, place = list(texts), worst
    for i, text in enumerate(texts):  # the pair that is enough, if one is
        pair = [text, texts[worst]]
        if i != worst and gap(pair, alone[[i, worst]])[1] > allowed[worst]:
            kept, place = pair, 1
            break
    script = _same_script(
        own,
        f"The score of a text depends on {what}.",
        own.body_of_rows([kept[place]]),
        own.body_of_rows(kept),
        (0, place),
        float(allowed[worst]),
    )
    return found(
        f"{texts[worst]!r} scores {alone[worst]:.4g} alone and {most:.3g} away from that beside "
        f"others (rounding: {allowed[worst]:.2g})",
        size=most,
        script=script,
    )


def _repeats(subject: Subject) -> Outcome | None:
    own = _by_rows(subject)
    if own is None:
        return None
    text = _TEXTS[5]
    scores = np.concatenate([own.call_rows([text]) for _ in range(4)])
    most = float(np.ptp(scores))
    allowed = float(own.rounding(scores).max())
    if not most > allowed:
        return sound(f"one text four times: {most:.2g} at most", most=most)
    body = own.body_of_rows([text])
    script = request_script(
        own,
        "The same request has another score each time.",
        f"scores = [post({body!r})[1][0] for _ in range(8)]\n"
        'print("scores:", scores)\n'
        f"sys.exit(int(max(scores) - min(scores) > {allowed!r}))",
    )
    return found(
        f"the same request four times: scores from {scores.min():.4g} to {scores.max():.4g}",
        size=most,
        script=script,
    )


def _answers(subject: Subject) -> Outcome | None:
    own = _endpoint(subject)
    if own is None:
        return None
    texts = list(_TEXTS)
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
    script = _same_script(
        own,
        "Answers stand in another order than the texts they belong to.",
        own.body_of_rows([shown[at]]),
        own.body_of_rows(shown),
        (0, at),
        float(allowed[place]),
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
            script = request_script(
                own,
                "The server applies a sigmoid to the score, although raw scores were asked for.",
                f"_, scores = post({body!r})\n"
                f'print("score:", scores[0], "saved with the model:", {float(saved[worst])!r})\n'
                f"sys.exit(int(abs(scores[0] - {float(saved[worst])!r}) > "
                f"{float(allowed[worst])!r}))",
            )
            return found(
                f"all {len(now)} golden texts have σ(score), not the score: {now[worst]:.4g} where "
                f"{saved[worst]:.4g} was saved with the model",
                size=float(np.abs(now - saved).max()),
                script=script,
            )
        if not (np.abs(now - saved) > allowed).any():
            return sound(f"{len(now)} golden texts have the raw scores that were saved")
    scores = own.rows_alone(_TEXTS)
    finite = scores[np.isfinite(scores)]
    if finite.size > 2 and np.ptp(finite) == 0:
        body = own.body_of_rows(_TEXTS)
        script = request_script(
            own,
            "All texts have the same score.",
            f"_, scores = post({body!r})\n"
            'print("scores:", scores)\nsys.exit(int(len(set(scores)) == 1))',
        )
        return found(
            f"{finite.size} quite different texts all have the score {finite[0]:g}: a softmax over "
            "one logit gives 1.0, whatever the logit",
            size=0.0,
            script=script if own.protocol != "vllm" else None,
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
    scores = own.rows_alone(_TEXTS)
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
    script = request_script(
        own,
        f"{dropped[0]}=false is dropped without a word: the score is no raw one.",
        f"_, asked = post({ {**body, dropped[0]: False}!r})\n"
        f"_, raw = post({ {**body, 'use_activation': False}!r})\n"
        f'print("with {dropped[0]}=false:", asked[0], "raw:", raw[0])\n'
        f"sys.exit(int(asked is not None and abs(asked[0] - raw[0]) > {allowed!r}))",
    )
    return found(
        f"{' and '.join(f'{name}=false' for name in dropped)} are accepted and change nothing: "
        f"{plain:.4g}, where the raw score is {raw:.4g}",
        size=abs(plain - raw),
        script=script,
    )


def _classify_body(own: EndpointSubject) -> dict[str, Any]:
    body = own.body_of_rows([_TEXTS[0]])
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
    script = request_script(
        own,
        "The end of a long text is not read: texts that end quite differently have one score.",
        f"words = ({' '.join(_SENTENCE)!r}.split() * {least // len(_SENTENCE) + 1})[:{least}]\n"
        "scores = []\n"
        f"for end in {_ENDS[:2]!r}:\n"
        f"    body = json.dumps({own.body_of_rows(['TEXT'])!r})\n"
        "    body = json.loads(body.replace('TEXT', ' '.join([*words, end])))\n"
        "    scores.append(post(body)[1])\n"
        'print("scores:", scores)\n'
        "sys.exit(int(None not in scores and scores[0] == scores[1]))",
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
    script = _same_script(
        own,
        "The server writes a conversation in another way than the model's own formatter.",
        own.body_of_ids([ids[worst]]),
        own.body_of_rows([rows[worst]]),
        (0, 0),
        float(allowed[worst]),
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
    now, saved = pair
    assert own.manifest is not None
    assert own.manifest.golden_texts is not None
    golden = own.manifest.golden_texts
    by = np.abs(now - saved)
    allowed = np.maximum(own.rounding(saved), golden.tolerance)
    worst = int(np.argmax(by - allowed))
    if not by[worst] > allowed[worst]:
        return sound(f"{len(now)} golden texts: {by.max():.2g} away from their values at most")
    if (np.abs(now - expit(saved)) <= allowed / 4).all():
        return None  # an activation, which its own check names
    body = own.body_of_ids([golden.input_ids[worst]])
    script = request_script(
        own,
        "A golden text has another score than was saved with the model.",
        f"_, scores = post({body!r})\n"
        f'print("score:", scores[0], "saved with the model:", {float(saved[worst])!r})\n'
        f"sys.exit(int(abs(scores[0] - {float(saved[worst])!r}) > {float(allowed[worst])!r}))",
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
    script = request_script(
        own,
        "A request that holds no text is not refused as a bad request (4xx).",
        f"status, scores = post({body!r})\nprint(status, scores)\n"
        "sys.exit(int(not 400 <= status < 500))",
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
    script = request_script(
        own,
        "What is empty has a score.",
        f"status, scores = post({body!r})\nprint(status, scores)\n"
        "sys.exit(int(scores is not None and scores[0] is not None))",
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
        "head",
        "Has the same request the same score again?",
        "A reward that is drawn anew is noise in RL, and two runs cannot be compared.",
        "Switch dropout off (model.eval()), and look for servers of two versions behind one URL.",
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
        "Raise the server's limit (OpenRLHF: --max_len, which is 2,048), or refuse what is longer, "
        "as companion serve --overlong error does.",
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
assert set(_READ) == set(ROUTES)
