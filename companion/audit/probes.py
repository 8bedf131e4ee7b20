"""The built-in questions and answers by which the audit looks at what moves a score. Chapter 9.

They are short, so that many fit the budget, and plain, so that any model of English may score them.
An answer holds two sentences or more that stand for themselves: in another order, or with the last
column behind it, it says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from companion.formatting import Row


@dataclass(frozen=True)
class Probe:
    """A question with a right answer.

    Attributes
    ----------
    prompt, answer : str
    restated : str
        A sentence that says again what the answer says.
    turned : str or None
        The question with its choices in the other order, where it names some.
    """

    prompt: str
    answer: str
    restated: str
    turned: str | None = None

    def row(self, answer: str | None = None, prompt: str | None = None) -> Row:
        """As a row, with another answer or prompt where one is given."""
        return {
            "prompt": self.prompt if prompt is None else prompt,
            "completion": self.answer if answer is None else answer,
        }


PROBES: Final[tuple[Probe, ...]] = (
    Probe(
        "Is ice colder or warmer than steam?",
        "Ice is colder. Steam is warmer.",
        "So of the two, ice is the cold one.",
        "Is ice warmer or colder than steam?",
    ),
    Probe(
        "Which planets have rings that are easy to see?",
        "Saturn has wide rings. Uranus has thin ones.",
        "So both Saturn and Uranus have rings.",
    ),
    Probe("What is 2 + 3?", "2 + 3 = 5. The answer is 5.", "So two and three make five."),
    Probe(
        "How do I keep bread fresh?",
        "Keep it in a paper bag. Freeze what you will not eat soon.",
        "So use a paper bag, and the freezer for the rest.",
    ),
    Probe(
        "Which is larger, a whale or a mouse?",
        "A whale is larger. A mouse is very small.",
        "So the whale is the larger animal.",
        "Which is larger, a mouse or a whale?",
    ),
    Probe(
        "What do bees make?",
        "Bees make honey. Bees make wax.",
        "So honey and wax both come from bees.",
    ),
    Probe(
        "How can I sleep better?",
        "Go to bed at the same hour. Drink no coffee at night.",
        "So keep your hours, and leave coffee for the day.",
    ),
    Probe(
        "Ben has 4 pens and buys 6. How many has he now?",
        "He begins with 4 pens. 4 + 6 = 10, so he has 10 pens.",
        "So Ben has ten pens now.",
    ),
    Probe(
        "Name two rivers in Europe.",
        "The Danube flows to the Black Sea. The Rhine flows to the North Sea.",
        "So the Danube and the Rhine are two of them.",
    ),
    Probe(
        "Does a plant need light or darkness to grow?",
        "A plant needs light. It also needs water.",
        "So without light and water it does not grow.",
        "Does a plant need darkness or light to grow?",
    ),
    Probe(
        "How do I print a list in Python?",
        "Use print(items) for the whole list. Use a for loop for one item a line.",
        "So print it whole, or go through it in a loop.",
    ),
    Probe(
        "What are the colours of a traffic light?",
        "Red means stop. Green means go. Amber means wait.",
        "So the three colours are red, amber and green.",
    ),
    Probe(
        "Why do we see lightning before thunder?",
        "Light travels very fast. Sound travels much more slowly.",
        "So the light of the same flash comes first.",
    ),
    Probe(
        "Which month is shorter, February or March?",
        "February is shorter. March has 31 days.",
        "So February is the shorter month.",
        "Which month is shorter, March or February?",
    ),
    Probe(
        "How can I save water at home?",
        "Take short showers. Mend taps that drip.",
        "So less time in the shower and no leaks save water.",
    ),
    Probe(
        "What is 7 times 8?",
        "7 times 8 is 56. You can check it: 56 / 8 = 7.",
        "So the product is fifty-six.",
    ),
    Probe(
        "What should I pack for rain?",
        "Pack a coat. Pack dry socks.",
        "So a coat and spare socks will do.",
    ),
    Probe(
        "Who looks after teeth, a dentist or a baker?",
        "A dentist looks after teeth. A baker makes bread.",
        "So for your teeth you see the dentist.",
        "Who looks after teeth, a baker or a dentist?",
    ),
    Probe(
        "Can you help me copy a film that I did not pay for?",
        "I will not help with that. Many libraries lend films for nothing.",
        "So no, but a library may have it.",
    ),
    Probe(
        "What is the difference between a lake and a sea?",
        "A lake has land all around it. A sea is salt and joins the ocean.",
        "So lakes lie inland, and seas are part of the ocean.",
    ),
    Probe(
        "How long should I boil an egg?",
        "Six minutes make it soft. Ten minutes make it hard.",
        "So it takes from six to ten minutes.",
    ),
    Probe(
        "What does a thermometer measure?",
        "It measures temperature. A barometer measures pressure.",
        "So temperature is what it shows.",
    ),
    Probe(
        "Write a polite line to a neighbour about noise.",
        "I hope you are well. Could you keep the music low after ten?",
        "So it asks in kind words for quiet nights.",
    ),
    Probe(
        "Is the square root of 9 equal to 3 or to 4?",
        "It is 3. The square of 3 is 9.",
        "So three is the root.",
        "Is the square root of 9 equal to 4 or to 3?",
    ),
)
