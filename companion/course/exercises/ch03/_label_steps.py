"""Find four bugs in the labels of a process reward model."""

from __future__ import annotations

from typing import Any

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, kind, show
from companion.course.exercises.ch03._toys import step_tokenizer

IGNORE, CLASSES = -100, {-1: 0, 0: 1, 1: 2}
PROMPT = "3 boxes , 4 pens each .\nbuy 5 more ."
STEPS = ["3 x 4 = 12", "12 + 5 = 17", "so 17 pens"]
Steps = list[tuple[str, int | None]]

NEXT = (
    "The label stands on the first token of the *next* step: `end` is where the separator ends, "
    "and the token that begins there knows nothing of this step's end but has read on. The step's "
    "last token ends there."
)
MERGED = (
    "The tokenizer has joined the separator with the full stop before it to one token ('.\\n'), "
    "so no token ends the step and nothing else. The label lands on a token that the model meets "
    "in other places too, or on none. Ask whether the separator is a token of its own."
)
ON = (
    "Steps after the first wrong one are labelled. What follows from an error was never judged by "
    "itself: the raters stop there, and so do the labels."
)
RAW = (
    "The ratings are used as labels. A class index counts from 0: −1 raises deep inside of the "
    "cross-entropy (or, written as an index, picks the last class from behind), and the other two "
    "are shifted."
)


def _ends(tokenizer: Any, prompt: str, steps: list[str]) -> tuple[list[tuple[int, int]], list[int]]:
    """Offsets of all tokens, and where each step's separator ends, in characters."""
    text = prompt + "\n" + "".join(step + "\n" for step in steps)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    ends, place = [], len(prompt) + 1
    for step in steps:
        place += len(step) + 1
        ends.append(place)
    return offsets, ends


def _want(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    offsets, ends = _ends(tokenizer, prompt, [step for step, _ in steps])
    labels = [IGNORE] * len(offsets)
    for end, (_, rating) in zip(ends, steps, strict=True):
        if rating is not None:
            labels[[stop for _, stop in offsets].index(end)] = CLASSES[rating]
        if rating == -1:
            break
    return labels


def _run(attempt: Attempt, steps: Steps, prompt: str = PROMPT) -> list[int]:
    got = attempt(step_tokenizer(merges=False), prompt, steps)
    if hasattr(got, "tolist"):
        got = got.tolist()
    kind(got, (list, tuple), "a list of labels")
    return list(got)


def _rated(*ratings: int | None) -> Steps:
    return list(zip(STEPS, ratings, strict=False))


def _marks(attempt: Attempt, steps: Steps, prompt: str, what: str) -> None:
    tokenizer = step_tokenizer(merges=False)
    got, want = _run(attempt, steps, prompt), _want(tokenizer, prompt, steps)
    text = prompt + "\n" + "".join(step + "\n" for step, _ in steps)
    tokens = [text[a:b] for a, b in _ends(tokenizer, prompt, [s for s, _ in steps])[0]]
    shown = [f"{label} on {tokens[i]!r} ({i})" for i, label in enumerate(got[: len(tokens)])
             if label != IGNORE]  # fmt: skip
    right = [f"{label} on {tokens[i]!r} ({i})" for i, label in enumerate(want) if label != IGNORE]
    expect(
        got == want,
        f"{what}: the labels are {', '.join(shown) or 'none'}; "
        f"they should be {', '.join(right) or 'none'}",
    )


def _length(attempt: Attempt) -> None:
    for steps in (_rated(1), _rated(1, 1, 1)):
        got = _run(attempt, steps)
        want = len(_want(step_tokenizer(merges=False), PROMPT, steps))
        expect(len(got) == want, f"{len(got)} labels for {want} tokens")


def _places(attempt: Attempt) -> None:
    """Where there are labels at all, whatever they are."""
    for prompt in (PROMPT, "2 pens ."):
        steps = _rated(1, 1, 1)
        got = _run(attempt, steps, prompt)
        want = _want(step_tokenizer(merges=False), prompt, steps)
        places = [i for i, label in enumerate(got) if label != IGNORE]
        right = [i for i, label in enumerate(want) if label != IGNORE]
        expect(
            places == right,
            f"three right steps: the tokens {places} are labelled; the separators that end the "
            f"steps are the tokens {right}",
        )


def _classes(attempt: Attempt) -> None:
    for ratings in ((1, 0, 1), (0, 1, -1)):
        _marks(attempt, _rated(*ratings), PROMPT, f"ratings {ratings}")


def _unrated(attempt: Attempt) -> None:
    _marks(attempt, _rated(1, None, 1), PROMPT, "a step in the middle that nobody rated")


def _stops(attempt: Attempt) -> None:
    for ratings in ((1, -1, -1), (-1, 1, 1), (1, -1, 0)):
        _marks(attempt, _rated(*ratings), PROMPT, f"ratings {ratings}")


def _merges(attempt: Attempt) -> None:
    tokenizer = step_tokenizer(merges=True)
    steps: Steps = [("3 x 4 = 12 .", 1), ("12 + 5 = 17 .", 1)]
    for chosen in (steps, [("3 x 4 = 12", 1), steps[1]]):
        try:
            got = attempt(tokenizer, PROMPT, chosen)
        except Exception as error:
            inner = getattr(error, "error", error)
            if isinstance(inner, NotImplementedError):
                raise
            expect(
                isinstance(inner, ValueError),
                "a tokenizer with the token '.\\n', a step that ends with a full stop: "
                f"{type(inner).__name__} was raised; ValueError was asked for",
            )
            continue
        labels = got.tolist() if hasattr(got, "tolist") else got
        expect(
            False,
            "a tokenizer with the token '.\\n', a step that ends with a full stop: no ValueError, "
            f"and the labels {show([label for label in labels if label != IGNORE])}",
        )


def _labels(
    tokenizer: Any,
    prompt: str,
    steps: Steps,
    *,
    shift: bool = False,
    unchecked: bool = False,
    on: bool = False,
    raw: bool = False,
    none: int | None = None,
    skip: bool = False,
) -> list[int]:
    """The right labels, with switches for what can go wrong."""
    offsets, ends = _ends(tokenizer, prompt, [step for step, _ in steps])
    labels = [IGNORE] * len(offsets)
    for end, (_, rating) in zip(ends, steps, strict=True):
        token = next(i for i, (_, stop) in enumerate(offsets) if stop >= end)
        if not unchecked and offsets[token] != (end - 1, end):
            raise ValueError("the separator is not a token of its own")
        rating = none if rating is None else rating
        place = token + shift
        if rating is not None and not (skip and rating == -1) and place < len(labels):
            labels[place] = rating if raw else CLASSES[rating]
        if rating == -1 and not on:
            break
    return labels


def broken(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    text = prompt + "\n"
    ends = []
    for step, _ in steps:
        text += step + "\n"
        ends.append(len(text))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    labels = [-100] * len(offsets)
    for end, (_, rating) in zip(ends, steps, strict=True):
        for token, (start, _) in enumerate(offsets):
            if start >= end and rating is not None:
                labels[token] = rating
                break
    return labels


def off_by_one(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    return _labels(tokenizer, prompt, steps, shift=True)


def unchecked(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    return _labels(tokenizer, prompt, steps, unchecked=True)


def reads_on(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    return _labels(tokenizer, prompt, steps, on=True)


def raw_ratings(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    return _labels(tokenizer, prompt, steps, raw=True)


def unrated_neutral(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    return _labels(tokenizer, prompt, steps, none=0)


def error_unlabelled(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    return _labels(tokenizer, prompt, steps, skip=True)


def any_separator(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    _labels(tokenizer, prompt, steps)  # for its check
    text = prompt + "\n" + "".join(step + "\n" for step, _ in steps)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    labels = [IGNORE] * len(offsets)
    places = [i for i, (start, stop) in enumerate(offsets) if text[start:stop] == "\n"]
    for place, (_, rating) in zip(places, steps, strict=False):
        if rating is not None:
            labels[place] = CLASSES[rating]
        if rating == -1:
            break
    return labels


def whole_step(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    offsets, ends = _ends(tokenizer, prompt, [step for step, _ in steps])
    labels = _labels(tokenizer, prompt, steps)
    for begin, end in zip([len(prompt) + 1, *ends], ends, strict=False):
        inside = [i for i, (a, b) in enumerate(offsets) if begin <= a and b <= end]
        for place in inside:
            labels[place] = labels[inside[-1]]
    return labels


def without_prompt(tokenizer: Any, prompt: str, steps: Steps) -> list[int]:
    whole = _labels(tokenizer, prompt, steps)
    return whole[len(tokenizer(prompt + "\n")["input_ids"]) :]


def _probes() -> list[tuple[Any, ...]]:
    plain, merging = step_tokenizer(merges=False), step_tokenizer(merges=True)
    return [
        (plain, PROMPT, _rated(1, None, -1)),
        (plain, PROMPT, _rated(-1, 0, 1)),
        (plain, "2 pens .", _rated(0, 1, 1)),
        (merging, PROMPT, [("3 x 4 = 12 .", 1), ("12 + 5 = 17 .", 1)]),
    ]


EXERCISE = Exercise(
    id="ch03.label_steps",
    parameters=("tokenizer", "prompt", "steps"),
    broken=broken,
    properties=(
        Property(
            "one label for each token of the text",
            "The labels should be as long as the token ids of prompt and steps together.",
            _length,
        ),
        Property(
            "labels on the separators that end the steps, and nowhere else",
            "A step's label belongs on the token that ends it, its separator; all else is −100.",
            _places,
        ),
        Property(
            "−1, 0, +1 are the classes 0, 1, 2",
            "The ratings −1, 0 and +1 should become the classes 0, 1 and 2.",
            _classes,
        ),
        Property(
            "a step that nobody rated has no label",
            "A rating of None is no rating: the step's separator stays at −100.",
            _unrated,
        ),
        Property(
            "nothing is labelled after the first wrong step",
            "Nothing should be labelled after the first step that is rated −1.",
            _stops,
        ),
        Property(
            "a separator that is no token of its own raises",
            "Where the separator is joined with what stands before it, a ValueError was asked for.",
            _merges,
        ),
    ),
    mutants=(
        Mutant("All four bugs are still there. The first: " + NEXT, broken),
        Mutant(NEXT, off_by_one),
        Mutant(MERGED, unchecked, "OpenRLHF #683"),
        Mutant(ON, reads_on),
        Mutant(RAW, raw_ratings),
        Mutant(
            "A step without a rating gets the class 'neutral'. Nobody said that it was: it stays "
            "at −100.",
            unrated_neutral,
        ),
        Mutant(
            "The first wrong step has no label either. It is the most telling one of the whole "
            "solution: the labels stop *behind* it.",
            error_unlabelled,
        ),
        Mutant(
            "The separators are counted from the beginning of the text, so a line break in the "
            "prompt takes the first step's label. Go by where the steps end.",
            any_separator,
        ),
        Mutant(
            "Every token of a step has its label. An outcome is spread like that; a step is judged "
            "once, where it ends and has been read as a whole.",
            whole_step,
        ),
        Mutant(
            "The labels begin at the first step. They must line up with the ids of the whole text: "
            "−100 for each token of the prompt.",
            without_prompt,
        ),
    ),
    probes=_probes,
    hints=(
        "Print each token of the text beside its label, for three steps with the ratings 1, 1, −1. "
        "On which tokens do they stand? And is there a −1?",
        "A token that ends the step has `stop == end`, not `start >= end`. If its span is not "
        "exactly that of the separator, it is joined with something else.",
        "Look for the token with `stop >= end`; raise ValueError unless its span is `(end − 1, "
        "end)`; write `rating + 1`; `break` after a rating of −1.",
    ),
    right="The companion's `encode_steps` and `step_labels` do the same for every separator. A "
    "special token is the safest one: no tokenizer joins it with its neighbours.",
)
