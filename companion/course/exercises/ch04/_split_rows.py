"""Write a split that leaks no prompt."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from typing import Any

from companion.course.exercise import Exercise, Mutant, NotReached, Property, Unmet
from companion.course.exercises._tools import Attempt, expect, kind

Row = dict[str, Any]
Rows = list[Row]
SECOND = 8  # the seed of the probe that is run in two processes
LEAK = (
    "Rows are dealt to the two parts one by one. Pairs of one prompt share its difficulty, and "
    "often a completion: with a prompt on both sides the held-out accuracy measures memory. Deal "
    "whole prompts."
)


def _rows(seed: int, prompts: int = 60) -> Rows:
    rng = random.Random(seed)
    rows: Rows = []
    for number in range(prompts):
        text = f"What is {number} plus {rng.randrange(9)}?"
        for pair in range(rng.randrange(1, 5)):
            shown = [text, text.upper(), f"  {text} ", text.replace(" ", "  ")][rng.randrange(4)]
            rows.append({"id": len(rows), "prompt": shown, "chosen": f"{pair}", "rejected": "no"})
    rng.shuffle(rows)
    return rows


def _key(row: Row) -> str:
    return " ".join(row["prompt"].casefold().split())


def _parts(split: Attempt, rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    value = split([dict(row) for row in rows], fraction, seed)
    kind(value, (tuple, list), "two lists of rows, train and test")
    expect(len(value) == 2, f"the result has {len(value)} parts, not train and test alone")
    train, test = value
    kind(train, list, "a list of rows", "train")
    kind(test, list, "a list of rows", "test")
    expect(
        all(isinstance(row, dict) and "id" in row for row in [*train, *test]),
        "a part holds something that is no row of the input",
    )
    return train, test


def _whole(split: Attempt) -> None:
    for seed in range(3):
        rows = _rows(seed)
        train, test = _parts(split, rows, 0.25, seed)
        seen = sorted(row["id"] for row in [*train, *test])
        want = sorted(row["id"] for row in rows)
        lost, twice = len(set(want) - set(seen)), len(seen) - len(set(seen))
        expect(seen == want, f"of {len(want)} rows {lost} are lost and {twice} stand twice")


def _exact(split: Attempt) -> None:
    for seed in range(3):
        train, test = _parts(split, _rows(seed), 0.25, seed)
        shared = {row["prompt"] for row in train} & {row["prompt"] for row in test}
        example = min(shared, default="")
        expect(not shared, f"{len(shared)} prompts stand in both parts, such as {example!r}")


def _normalised(split: Attempt) -> None:
    for seed in range(3):
        train, test = _parts(split, _rows(seed), 0.25, seed)
        shared = {_key(row) for row in train} & {_key(row) for row in test}
        example = [row["prompt"] for row in [*train, *test] if _key(row) in shared][:2]
        expect(
            not shared, f"{len(shared)} prompts stand in both parts, if written alike: {example}"
        )


def _fraction(split: Attempt) -> None:
    for fraction in (0.1, 0.3):
        rows = _rows(7, 300)
        _, test = _parts(split, rows, fraction, 1)
        share = len({_key(row) for row in test}) / 300
        expect(
            abs(share - fraction) < 0.08,
            f"test_fraction={fraction}: the test part has {share:.2f} of the prompts",
        )


def _seeded(split: Attempt) -> None:
    rows = _rows(4)
    sides = []
    for seed in (1, 1, 2, 3):
        sides.append({row["id"] for row in _parts(split, rows, 0.25, seed)[1]})
    expect(sides[0] == sides[1], "two calls with seed 1 gave different parts")
    expect(sides[0] != sides[2] or sides[0] != sides[3], "seeds 1, 2 and 3 gave the same parts")


_CHILD = """
import sys
out, sys.stdout = sys.stdout.buffer, sys.stderr
import dill, pickle
split, rows, fraction, seed = dill.load(sys.stdin.buffer)
pickle.dump([[row["id"] for row in part] for part in split(rows, fraction, seed)], out)
"""


def _elsewhere(split: Attempt, rows: Rows, fraction: float, seed: int) -> list[list[int]]:
    """The ids of both parts, from a process in which strings have other hashes."""
    import dill  # type: ignore[import-untyped]  # comes with datasets

    function = getattr(split, "attempt", split)
    try:
        # with whatever helpers and imports it uses
        sent = dill.dumps((function, rows, fraction, seed), recurse=True)
    except Exception as error:
        raise Unmet(
            f"the function cannot be sent to a second process ({type(error).__name__}: {error}); "
            "let it use nothing but its arguments, imports and functions"
        ) from None
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=sent, env=environment, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unmet("in a second process it did not end within a minute") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Unmet(f"in a second process it failed: {' '.join(said)}")
    ids: list[list[int]] = pickle.loads(done.stdout)  # written by the child above
    return ids


def _moved(split: Attempt, rows: Rows, fraction: float, seed: int) -> int:
    """How many rows are on another side in another process."""
    _, test = _parts(split, rows, fraction, seed)
    return len({row["id"] for row in test} ^ set(_elsewhere(split, rows, fraction, seed)[1]))


def _processes(split: Attempt) -> None:
    try:
        for test in (_whole, _exact, _normalised, _fraction, _seeded):
            test(split)
    except Exception as error:
        raise NotReached from error
    moved = _moved(split, _rows(5), 0.25, 3)
    expect(
        moved == 0,
        f"run again in a new process, with the same rows and seed, it puts {moved} rows on the "
        "other side",
    )


def by_row(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    order = list(rows)
    random.Random(seed).shuffle(order)
    cut = round(test_fraction * len(order))
    return order[cut:], order[:cut]


def _by(rows: Rows, test_fraction: float, seed: int | None, keys: list[str]) -> tuple[Rows, Rows]:
    prompts = sorted(set(keys))
    if seed is not None:
        random.Random(seed).shuffle(prompts)
    test = set(prompts[: round(test_fraction * len(prompts))])
    pairs = list(zip(rows, keys, strict=True))
    return [r for r, k in pairs if k not in test], [r for r, k in pairs if k in test]


def exact_text(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    return _by(rows, test_fraction, seed, [row["prompt"] for row in rows])


def only_stripped(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    return _by(rows, test_fraction, seed, [row["prompt"].strip() for row in rows])


def deduplicated(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    first = list({_key(row): row for row in reversed(rows)}.values())
    return _by(first, test_fraction, seed, [_key(row) for row in first])


def overlap_removed(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    train, test = by_row(rows, test_fraction, seed)
    held_out = {_key(row) for row in test}
    return [row for row in train if _key(row) not in held_out], test


def no_seed(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    return _by(rows, test_fraction, None, [_key(row) for row in rows])


def hash_order(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    keys = [" ".join(row["prompt"].casefold().split()) for row in rows]
    prompts = list(set(keys))
    random.Random(seed).shuffle(prompts)
    test = set(prompts[: round(test_fraction * len(prompts))])
    pairs = list(zip(rows, keys, strict=True))
    return [r for r, k in pairs if k not in test], [r for r, k in pairs if k in test]


def hashed(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    keys = [(" ".join(row["prompt"].casefold().split()), seed) for row in rows]
    draws = [random.Random(hash(key)).random() for key in keys]
    pairs = list(zip(rows, draws, strict=True))
    return (
        [r for r, draw in pairs if draw >= test_fraction],
        [r for r, draw in pairs if draw < test_fraction],
    )


# the second process gets them as it gets a notebook's function, and need not import this module
hash_order.__module__ = hashed.__module__ = "a_notebook"


def swapped(rows: Rows, test_fraction: float, seed: int) -> tuple[Rows, Rows]:
    train, test = _by(rows, test_fraction, seed, [_key(row) for row in rows])
    return test, train


def _look(split: Attempt, arguments: tuple[Any, ...]) -> Any:
    """What is wrong with the split, not who stands where: seeds may be used in many ways."""
    rows, fraction, seed = arguments
    train, test = _parts(split, rows, fraction, seed)
    _, other = _parts(split, rows, fraction, seed + 1)
    ids = [row["id"] for row in [*train, *test]]

    def shared(key: Any) -> bool:
        return bool({key(row) for row in train} & {key(row) for row in test})

    # Whether rows get lost because each prompt keeps one, or because of an overlap.
    once = len({_key(row) for row in [*train, *test]}) == len(ids)
    seen = [
        len(set(ids)) == len(rows),
        once,
        shared(lambda row: row["prompt"]),
        shared(lambda row: row["prompt"].strip()),
        shared(_key),
        len(test) > len(train),
        {row["id"] for row in test} == {row["id"] for row in other},
    ]
    right = len(set(ids)) == len(rows) and not any(seen[2:])
    # a process costs a quarter of a second: in one probe, and for what is right otherwise
    return [*seen, right and seed == SECOND and _moved(split, rows, fraction, seed) > 0]


EXERCISE = Exercise(
    id="ch04.split_rows",
    parameters=("rows", "test_fraction", "seed"),
    properties=(
        Property(
            "every row in one part, none lost, none twice",
            "Every row should stand in one of the two parts, once.",
            _whole,
        ),
        Property("no prompt in both parts", "No prompt may stand in both parts.", _exact),
        Property(
            "not even written with other spaces or capitals",
            "Prompts that differ in white space or capitals alone are one prompt, and may not "
            "stand in both parts.",
            _normalised,
        ),
        Property(
            "about test_fraction of the prompts in test",
            "The test part should hold about `test_fraction` of the prompts.",
            _fraction,
        ),
        Property(
            "the same for a seed, another for another seed",
            "The split must be the same for one seed, and another one for another seed.",
            _seeded,
        ),
        Property(
            "the same in every process",
            "The same rows and seed should give the same split in every process.",
            _processes,
        ),
    ),
    mutants=(
        Mutant(LEAK, by_row),
        Mutant(
            "Prompts are grouped by their exact text. `What is 2?` and `what  is 2? ` are one "
            "prompt to the model, and here they can stand on both sides. Normalise first.",
            exact_text,
        ),
        Mutant(
            "White space at the ends is taken care of, but not that inside of the prompt, nor "
            "capitals.",
            only_stripped,
        ),
        Mutant(
            "All pairs of a prompt but one are thrown away. That leaks nothing, and it loses most "
            "of the data: keep them together in place of dropping them.",
            deduplicated,
        ),
        Mutant(
            "The rows are split one by one, and what overlaps is then dropped from train. Nothing "
            "leaks, but a good part of the data is lost without a word.",
            overlap_removed,
        ),
        Mutant(
            "The seed is not used: there is only one split, and its prompts are the first in "
            "order, which need not be like the others.",
            no_seed,
        ),
        Mutant("The parts are exchanged: the large one is for training.", swapped),
        Mutant(
            "The split hangs on the hash of strings, by the order of a `set` or by `hash`. Python "
            "salts it anew at every start: the run of tomorrow trains on what is held out today. "
            "Sort the prompts before you shuffle, or hash with `hashlib`.",
            hash_order,
            also=(hashed,),
        ),
    ),
    probes=lambda: [(_rows(11), 0.25, 5), (_rows(12), 0.25, SECOND)],
    look=_look,
    replay=False,
    hints=(
        "What must never be separated? Deal that, and let the rows follow.",
        "Make a key for each row (normalised prompt), shuffle the *sorted* distinct keys with "
        "`random.Random(seed)`, and take the first share of them for test.",
        "`test_keys = set(keys[: round(test_fraction * len(keys))])`, then two list comprehensions "
        "over the rows.",
    ),
    right="It was run in a second process too, with another hash seed: the order of a `set` of "
    "strings changes from one start of Python to the next. The companion's `split_by_prompt` "
    "hashes the prompt with SHA-256, so that new rows never move old prompts to the other side.",
)
