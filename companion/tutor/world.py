"""The tutor's world: word problems of two or three steps whose answers are known.

``Ana has 3 boxes with 4 pens each and buys 5. How many pens now?`` is a :class:`Problem`:
a product, then one or two changes. The numbers are small on purpose: all of the world's arithmetic
fits into a model of a million parameters, so what a reward model gets wrong is its training's fault
and not the base's. :attr:`Problem.steps` is the truth that all else in this package is graded
against. Chapter 1.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Final

NAMES: Final = (
    "Ana", "Ben", "Carla", "David", "Emma", "Felix", "Gita", "Hugo",
    "Iris", "Jonas", "Kira", "Liam", "Mona", "Nils", "Olga", "Paul",
)  # fmt: skip
CONTAINERS: Final = ("boxes", "bags", "jars", "trays", "crates", "shelves")
ITEMS: Final = (
    "pens", "apples", "books", "coins", "cards", "shells",
    "stamps", "plums", "beads", "cups", "nuts", "tiles",
)  # fmt: skip
GAINS: Final = ("buys", "finds", "gets")
LOSSES: Final = ("sells", "loses", "drops")

#: No number of the world, right or wrong, exceeds this; each is one token of the tutor base.
MAX_NUMBER: Final = 60
#: Results of right steps lie between 1 and this.
MAX_RESULT: Final = 40
#: The numbers that problems give lie between these two.
SMALLEST: Final = 2
LARGEST: Final = 6

_PROMPT = re.compile(
    r"^(?P<name>\w+) has (?P<a>\d+) (?P<container>\w+) with (?P<b>\d+) (?P<item>\w+) each"
    r"(?:, (?P<verb1>\w+) (?P<c1>\d+))? and (?P<verb2>\w+) (?P<c2>\d+)\. "
    r"How many (?P=item) now\?$"
)


@dataclass(frozen=True)
class Step:
    """One equation ``left op right = result``; ``op`` is ``x``, ``+`` or ``-``."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"

    def says_the_same_as(self, other: Step) -> bool:
        """Whether both are one equation, up to the order of a product's or a sum's operands."""
        if (self.op, self.result) != (other.op, other.result):
            return False
        mine, theirs = (self.left, self.right), (other.left, other.right)
        return mine == theirs or (self.op != "-" and mine == theirs[::-1])


def apply(left: int, op: str, right: int) -> int:
    """The result of ``left op right``."""
    return {"x": left * right, "+": left + right, "-": left - right}[op]


@dataclass(frozen=True)
class Problem:
    """A word problem. ``changes`` holds one or two pairs of verb and number."""

    name: str
    container: str
    item: str
    a: int
    b: int
    changes: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """The problem as the user writes it."""
        *first, (verb, number) = self.changes
        middle = "".join(f", {v} {n}" for v, n in first)
        return (
            f"{self.name} has {self.a} {self.container} with {self.b} {self.item} each{middle}"
            f" and {verb} {number}. How many {self.item} now?"
        )

    @property
    def steps(self) -> tuple[Step, ...]:
        """The right solution, one equation a step."""
        steps = [Step(self.a, "x", self.b, self.a * self.b)]
        for verb, number in self.changes:
            op = "+" if verb in GAINS else "-"
            left = steps[-1].result
            steps.append(Step(left, op, number, apply(left, op, number)))
        return tuple(steps)

    @property
    def answer(self) -> int:
        return self.steps[-1].result


def draw_problem(rng: random.Random) -> Problem:
    """Draw a problem whose results all lie between 1 and :data:`MAX_RESULT`.

    Half of them have two changes (three steps), the others one. ``rng`` is the only source of
    randomness.
    """
    n_changes = 2 if rng.random() < 0.5 else 1
    while True:
        problem = Problem(
            name=rng.choice(NAMES),
            container=rng.choice(CONTAINERS),
            item=rng.choice(ITEMS),
            a=rng.randint(SMALLEST, LARGEST),
            b=rng.randint(SMALLEST, LARGEST),
            changes=tuple(
                (rng.choice(GAINS + LOSSES), rng.randint(SMALLEST, LARGEST))
                for _ in range(n_changes)
            ),
        )
        if all(1 <= step.result <= MAX_RESULT for step in problem.steps):
            return problem


def parse_problem(prompt: str) -> Problem | None:
    """Read a prompt back into a :class:`Problem`; ``None`` if it is not one of this world."""
    match = _PROMPT.match(prompt.strip())
    if match is None:
        return None
    changes = [(match[v], int(match[c])) for v, c in (("verb1", "c1"), ("verb2", "c2")) if match[v]]
    if any(verb not in GAINS + LOSSES for verb, _ in changes):
        return None
    return Problem(
        match["name"], match["container"], match["item"],
        int(match["a"]), int(match["b"]), tuple(changes),
    )  # fmt: skip
