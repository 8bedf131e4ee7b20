"""Draw the pictures of the README and of the start pages, in light and dark: ``make figures``.

The numbers in them are computed here from the companion's own data and losses; none is typed. The
SVG files are kept in the repository, and a test draws them again and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from companion import bradley_terry_loss, bradley_terry_probability
from companion.tutor import make_rows

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
#: Okabe and Ito's colours, toned for each ground so that text on them stays above 4.5 : 1
THEMES = {
    "light": {
        "ink": "#1f2933", "soft": "#52606d", "line": "#7b8794", "box": "#f5f7fa", "edge": "#cbd2d9",
        "chosen": "#00694e", "chosen_box": "#e3f4ee", "rejected": "#a04000",
        "rejected_box": "#fbece1", "model": "#0b5a8a", "model_box": "#e4f0f8",
    },
    "dark": {
        "ink": "#e4e7eb", "soft": "#a3adb8", "line": "#8b96a3", "box": "#23292f", "edge": "#3e4c59",
        "chosen": "#5fd3ae", "chosen_box": "#15352b", "rejected": "#f2a26b",
        "rejected_box": "#3b2415", "model": "#7cc0ec", "model_box": "#132f42",
    },
}  # fmt: skip


class Canvas:
    """A few SVG shapes in the colours of one theme."""

    def __init__(self, width: int, height: int, theme: str, title: str, description: str) -> None:
        self.colour = THEMES[theme]
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>",
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 20,
        colour: str = "ink",
        anchor: str = "middle",
        weight: int = 400,
        mono: bool = False,
    ) -> None:
        family = f' font-family="{MONO}"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}" fill="{self.colour[colour]}"{family} '
            f'xml:space="preserve">{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = "box", edge: str = "edge"
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="10" '
            f'fill="{self.colour[fill]}" stroke="{self.colour[edge]}" stroke-width="1.5"/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        colour = self.colour["line"]
        self.parts.append(
            f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke="{colour}" stroke-width="2"/>'
        )
        if x1 == x2:  # downwards
            head = f"M{x2 - 6:g} {y2 - 9:g} L{x2:g} {y2:g} L{x2 + 6:g} {y2 - 9:g}"
        else:  # to the right
            head = f"M{x2 - 9:g} {y2 - 6:g} L{x2:g} {y2:g} L{x2 - 9:g} {y2 + 6:g}"
        self.parts.append(
            f'<path d="{head}" fill="none" stroke="{colour}" stroke-width="2" '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def _example() -> dict[str, object]:
    """The first short pair of the tutor in which right stands against wrong."""
    for row in make_rows("pairs", 200, seed=0):
        texts = [row[side][0]["content"].split("\n") for side in ("chosen", "rejected")]
        if (
            row["correct_chosen"]
            and not row["correct_rejected"]
            and all(len(lines) <= 4 and max(map(len, lines)) <= 27 for lines in texts)
        ):
            return row
    raise SystemExit("no pair of the first 200 is short enough to draw")


def draw_map(theme: str) -> str:
    """The system: a pair goes in on top, its loss comes out, and the model goes on to its uses."""
    row = _example()
    scores = [torch.tensor(row[f"reward_{side}"]) for side in ("chosen", "rejected")]
    probability = float(bradley_terry_probability(*scores))
    loss = float(bradley_terry_loss(*scores))
    canvas = Canvas(
        720, 850, theme,
        "From a preference pair to a reward model and its uses",
        "Two completions of one prompt pass through the same language model, whose last token "
        "is read by a linear head; the Bradley-Terry loss compares the two numbers. The trained "
        "model serves best-of-N, reinforcement learning, serving and monitoring.",
    )  # fmt: skip
    first, _, question = row["prompt"][0]["content"].partition(". ")
    canvas.box(20, 12, 680, 72)
    canvas.text(360, 42, f"{first}.", 19)
    canvas.text(360, 69, question, 19)
    for side, left, word in (("chosen", 20, "chosen"), ("rejected", 370, "rejected")):
        lines = row[side][0]["content"].split("\n")
        middle = left + 165
        canvas.arrow(middle, 84, middle, 106)
        canvas.box(left, 108, 330, 152, f"{side}_box", side)
        canvas.text(left + 18, 136, word, 19, side, "start", 700)
        for number, line in enumerate(lines):
            canvas.text(left + 18, 166 + 27 * number, line, 18, "ink", "start", mono=True)
        canvas.arrow(middle, 260, middle, 286)
    canvas.box(20, 288, 680, 190, "model_box", "model")
    canvas.text(360, 318, "one reward model, the same weights for both", 20, "model", weight=700)
    steps = [
        ("tokens", "chat template"),
        ("LM", "without its head"),
        ("last token", "never padding"),
        ("linear head", "one number"),
    ]
    for number, (top, bottom) in enumerate(steps):
        left = 36 + 166 * number
        canvas.box(left, 338, 150, 84, "box", "edge")
        canvas.text(left + 75, 374, top, 18, weight=600)
        canvas.text(left + 75, 401, bottom, 15, "soft")
        if number:
            canvas.arrow(left - 16, 380, left - 1, 380)
    canvas.text(360, 458, "prompt and completion in, one scalar r(x, y) out", 19, "soft")
    for value, middle, side in zip(scores, (185, 535), ("chosen", "rejected"), strict=True):
        canvas.arrow(middle, 478, middle, 504)
        canvas.text(middle, 534, f"r = {float(value):.2f}".replace("-", "−"), 24, side, weight=700)
        canvas.arrow(middle, 548, middle, 574)
    canvas.box(20, 576, 680, 86)
    canvas.text(360, 610, "Bradley–Terry: P(chosen wins) = σ(r_c − r_r)", 21, weight=600)
    canvas.text(
        360, 642, f"here σ({float(scores[0] - scores[1]):.2f}) = {probability:.3f},  "
        f"loss = −log σ = {loss:.3f}", 19, "soft",
    )  # fmt: skip
    canvas.arrow(360, 662, 360, 690)
    canvas.text(360, 716, "one epoch of training, tested on held-out prompts, then", 19, "soft")
    uses = [
        ("best-of-N", "rerank samples"),
        ("RL", "GRPO, PPO"),
        ("serving", "scores over HTTP"),
        ("monitoring", "canaries, drift"),
    ]
    for number, (top, bottom) in enumerate(uses):
        left = 20 + 174 * number
        canvas.box(left, 738, 158, 88, "model_box", "model")
        canvas.text(left + 79, 776, top, 20, "model", weight=700)
        canvas.text(left + 79, 804, bottom, 17, "soft")
    return canvas.svg()


def draw_when(theme: str) -> str:
    """Questions on the left; an answer that leads away from a reward model leaves to the right."""
    questions = [
        (("Can a program check it?", "tests, exact match, format"), "yes",
         ("Use the check as the reward.", "A model would only add error.")),
        (("Do the labels agree?", "well above chance"), "no",
         ("Mend the labels first:", "accuracy will stall near chance.")),
        (("Held out? Drift bounded?", "fresh prompts; a KL budget"), "no",
         ("Not yet: you would not see", "the proxy being gamed.")),
        (("Are differences enough?", "'better', not '8 out of 10'"), "no",
         ("Bradley–Terry cannot say.", "Use graded labels or a rubric.")),
        (("Many scores, or RL?", "thousands of calls a day"), "no",
         ("A generative judge will do:", "no training, a price per call.")),
        (("Is right and wrong labelled?", "answers, or single steps"), "yes",
         ("Outcome or process model:", "maths, code, verified steps.")),
    ]  # fmt: skip
    height = 118 * len(questions) + 108
    canvas = Canvas(
        720, height, theme,
        "When to train a reward model, and when not",
        "Six questions from top to bottom; those that lead away from a Bradley-Terry reward "
        "model name what to do in its place.",
    )  # fmt: skip
    for number, (question, leaves_on, exit_lines) in enumerate(questions):
        top = 12 + 118 * number
        canvas.box(12, top, 336, 84)
        canvas.text(180, top + 36, question[0], 19, weight=600)
        canvas.text(180, top + 64, question[1], 17, "soft")
        canvas.arrow(348, top + 42, 406, top + 42)
        canvas.text(377, top + 32, leaves_on, 18, "rejected", weight=700)
        canvas.box(408, top, 300, 84, "rejected_box", "rejected")
        for line, words in enumerate(exit_lines):
            canvas.text(558, top + 36 + 27 * line, words, 18)
        canvas.arrow(180, top + 84, 180, top + 116)
        stays_on = "no" if leaves_on == "yes" else "yes"
        canvas.text(194, top + 106, stays_on, 18, "chosen", "start", 700)
    top = 12 + 118 * len(questions)
    canvas.box(12, top, 336, 84, "chosen_box", "chosen")
    canvas.text(180, top + 36, "Train a Bradley–Terry model:", 19, "chosen", weight=700)
    canvas.text(180, top + 64, "one scalar, used again and again", 18)
    return canvas.svg()


def _tokens(canvas: Canvas, y: float, colour: str, texts: Sequence[str]) -> None:
    """Rows of tokens side by side: ``p`` of the prompt, ``-`` without a label, ``x`` with one."""
    step, between = 15, 14
    widths = [step * len(text) + 8 for text in texts]
    left = 533 - (sum(widths) + between * (len(texts) - 1)) / 2
    for text, width in zip(texts, widths, strict=True):
        for place, kind in enumerate(text):
            x = left + step * place + (0 if kind == "p" else 8)
            fill = canvas.colour[colour] if kind == "x" else "none"
            dashes = ' stroke-dasharray="2 2"' if kind == "p" else ""
            canvas.parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="12" height="12" rx="2" fill="{fill}" '
                f'stroke="{canvas.colour["line"]}" stroke-width="1.3"{dashes}/>'
            )
        left += width + between


def draw_kinds(theme: str) -> str:
    """What the labels say on the left, the kind that learns from them on the right."""
    rows: list[tuple[tuple[str, str], str, tuple[str, str], list[str]]] = [
        (("A program that checks it", "tests, an exact match"), "rejected",
         ("Use the program", "no reward model at all"), []),
        (("Which of two is better", "pairs: chosen, rejected"), "model",
         ("Pairwise", "one score · Bradley–Terry"), ["pp---x"] * 2),
        (("An order of several", "K completions of a prompt"), "model",
         ("K-wise", "one score · Plackett–Luce"), ["pp---x"] * 3),
        (("Right or wrong", "one outcome for each text"), "model",
         ("Outcome (ORM)", "P(right) at every token"), ["pppxxxxxxxx"]),
        (("Which steps are good", "+1, 0 or −1 for each step"), "model",
         ("Process (PRM)", "a class where a step ends"), ["ppp---x---x"]),
        (("None, or too few", "but a capable language model"), "chosen",
         ("A generative judge", "a verdict in words, not trained"), ["pp----"] * 2),
    ]  # fmt: skip
    height = 118 * len(rows) + 84
    canvas = Canvas(
        720, height, theme,
        "Which kind of reward model for which signal",
        "Six kinds of signal, one below the other, and to the right of each the kind of model that "
        "learns from it, with the tokens that carry its labels.",
    )  # fmt: skip
    canvas.text(162, 32, "You have", 19, "soft")
    canvas.text(533, 32, "so take", 19, "soft")
    for number, (signal, colour, kind, texts) in enumerate(rows):
        top = 46 + 118 * number
        canvas.box(12, top, 300, 102)
        canvas.text(162, top + 46, signal[0], 20, weight=600)
        canvas.text(162, top + 76, signal[1], 17, "soft")
        canvas.arrow(312, top + 51, 356, top + 51)
        canvas.box(358, top, 350, 102, f"{colour}_box", colour)
        lower = 0 if texts else 15
        canvas.text(533, top + 31 + lower, kind[0], 20, colour, weight=700)
        canvas.text(533, top + 59 + lower, kind[1], 18)
        _tokens(canvas, top + 76, colour, texts)
    canvas.text(
        360, height - 14, "squares: tokens; dashed: the prompt; filled: where a label stands", 18,
        "soft",
    )  # fmt: skip
    return canvas.svg()


def draw_failures(theme: str) -> str:
    """From labels to use on the left; on the right what goes wrong there, and what shows it."""
    rows = [
        (("Labels", "people, or a judge"),
         [("5  what the judge likes", "agreement with people", False)]),
        (("Pairs", "and what is held out"),
         [("2  a prompt's pairs apart", "accuracy, too high", False)]),
        (("Training", "one epoch, many ranks"),
         [("1  more than one epoch", "held-out loss", False),
          ("7  a mean of means", "nothing", True)]),
        (("Read-out", "one token of a text"),
         [("6  padding is read", "nothing", True)]),
        (("Scores", "differences, no more"),
         [("3  the scale is free", "thresholds that move", False)]),
        (("Use", "best-of-N, RL"),
         [("4  the proxy is optimised", "gold alone", False)]),
    ]  # fmt: skip
    step = 88
    height = step * sum(len(failures) for _, failures in rows) + 84
    canvas = Canvas(
        720, height, theme,
        "Seven ways in which a reward model fails",
        "The way of a reward model from its labels to its use, from top to bottom; to the right "
        "of each stage the failures that come in there and the figure that shows them. Two of "
        "them, padding that is read and a mean of means, show in no figure.",
    )  # fmt: skip
    canvas.text(146, 32, "where it comes in", 19, "soft")
    canvas.text(514, 32, "what fails, and what shows it", 19, "soft")
    top = 46
    for place, (stage, failures) in enumerate(rows):
        tall = step * len(failures) - 16
        middle = top + tall / 2
        canvas.box(12, top, 268, tall, "model_box", "model")
        canvas.text(146, middle - 4, stage[0], 20, "model", weight=700)
        canvas.text(146, middle + 22, stage[1], 17, "soft")
        if place + 1 < len(rows):
            canvas.arrow(146, top + tall, 146, top + tall + 15)
        for number, (name, shown_by, silent) in enumerate(failures):
            left = top + step * number
            canvas.arrow(280, left + 36, 318, left + 36)
            colours = ("rejected_box", "rejected") if silent else ("box", "edge")
            canvas.box(320, left, 388, 72, *colours)
            canvas.text(514, left + 31, name, 20, "rejected" if silent else "ink", weight=700)
            canvas.text(514, left + 57, f"shown by: {shown_by}", 17, "soft")
        top += step * len(failures)
    canvas.text(360, height - 14, "the numbers are those of the chapter's sections", 18, "soft")
    return canvas.svg()


def drawings() -> dict[str, str]:
    """File name -> SVG, for both themes."""
    makers = {
        "map": draw_map, "when": draw_when, "kinds": draw_kinds, "failures": draw_failures,
    }  # fmt: skip
    return {f"{name}-{theme}.svg": make(theme) for name, make in makers.items() for theme in THEMES}


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    for file_name, svg in drawings().items():
        (folder / file_name).write_text(svg, encoding="utf-8")
    sys.exit(0)
