"""A number that stands for a result is not typed by hand.

Results are glued from cells. So a decimal number, a percentage, or so many times or seconds in the
prose must have a reason to be typed: its paragraph cites a work or links the thread that it comes
from, or it stands in a cell of the same page (as an input, or asserted there), or it is the version
of something that is pinned, or it is listed below with the reason.
"""

from __future__ import annotations

import re

import pytest
from book_pages import PAGES, ROOT

#: page -> number -> why it is no result
TYPED = {
    "README.md": {
        **dict.fromkeys(("7.0", "7.5", "9.0", "8.6"), "a GPU's compute capability"),
        **dict.fromkeys(("12.6", "13.0"), "a version of CUDA"),
        **dict.fromkeys(("21.6", "22.1"), "of lines that show their form, said to be no run"),
    },
    "book/ch01_bradley_terry.md": {
        "75%": "an accuracy that a reader may meet",
        "80%": "an example of a probability",
        "0.693": "ln 2, asserted as math.log(2)",
    },
    "book/ch02_readout.md": {
        "0.693": "ln 2",
        **dict.fromkeys(
            ("0.1", "0.2", "0.3", "0.4", "0.5", "0.7", "1.5", "9.0"), "an invented batch"
        ),
    },
    "book/ch04_training.md": {
        "0.93": "of a story in an exercise",
        "0.9": "where to become suspicious",
    },
    "book/ch05_use.md": dict.fromkeys(("0.74", "0.73"), "of a story in an exercise"),
    "book/ch06_serving.md": dict.fromkeys(("1.31", "1.28", "1.34"), "of a story in an exercise"),
    "book/ch06_versions.md": {
        "1.7": "a score that a reader may meet",
        **dict.fromkeys(("0.8", "1.2", "2.4"), "of a story in an exercise"),
    },
    "book/ch07_monitoring.md": {"0.7": "of a story in an exercise"},
    "book/ch08_cluster.md": {"95%": "of a story in an exercise"},
    "book/glossary.md": {"80%": "an example of a probability", "73%": "σ(1)"},
}

_NUMBER = re.compile(
    r"(?<![\w.,/#-])(\d*\.\d+(?![\w.]*\.\d)%?|\d+ ?%|\d+(?= (?:times|seconds)\b))(?!\w)"
)
_CELL = re.compile(r"^```\{code-cell\}.*?^```\n", re.MULTILINE | re.DOTALL)
_HIDDEN = re.compile(
    r"\A---\n.*?\n---\n|^```(?!\{(?:exercise|solution|glossary|slider|admonition)).*?^```\n"
    r"|\$\$.*?\$\$|\$[^$]+\$|\{glue:text\}`[^`]*`|<!--.*?-->",
    re.MULTILINE | re.DOTALL,
)
_SOURCE = re.compile(r"\{cite\S*\}`|\]\(https?://|https?://")
_PINS = {
    name.lower(): version
    for name, version in re.findall(
        r"^([\w.-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
} | {"python": "3.11"}


def _is_version(number: str, before: str) -> bool:
    """Whether `number` follows the name of a package and is the pinned version of it."""
    name = re.search(r"([\w.-]+)(?:'s)? $", before)
    return name is not None and f"{_PINS.get(name[1].lower(), '')}.".startswith(f"{number}.")


def unexplained(text: str, typed: dict[str, str] | None = None) -> list[str]:
    """Numbers of a page's prose that have no reason to be typed."""
    cells = "\n".join(_CELL.findall(text))
    backed = {float(token) for token in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", cells)}
    prose = _HIDDEN.sub("", _CELL.sub("", text))
    found, sourced = [], False
    for block in re.split(r"\n\s*\n", prose):
        table = block.lstrip().startswith("|")
        # a table belongs to the paragraph before it, the rows of a table each to themselves
        for line in block.split("\n") if table or block.lstrip().startswith("-") else [block]:
            here = bool(_SOURCE.search(line))
            bare = re.sub(r"`[^`]*`", "", line)
            for match in _NUMBER.finditer(bare):
                number = match[1].replace(" ", "")
                value = float(number.rstrip("%"))
                if not (
                    here
                    or (table and sourced)
                    or value in backed
                    or (number.endswith("%") and value / 100 in backed)
                    or _is_version(number, bare[: match.start()])
                    or number in (typed or {})
                ):
                    found.append(f"{number} in {line.strip()[:90]!r}")
        sourced = bool(_SOURCE.search(block))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_typed_numbers_have_a_reason(page):
    typed = TYPED.get(str(page.relative_to(ROOT)), {})
    text = page.read_text(encoding="utf-8")
    assert unexplained(text, typed) == []
    # the list above goes with the page
    assert [number for number in typed if number.rstrip("%") not in text] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The model reaches 0.734 on held-out pairs.", 1),
        ("It is right on 73.4% of them, and 12 times as fast.", 2),
        ("It is right on {glue:text}`x:.0%` of them.", 0),
        ("The paper reports 73% {cite}`a2020`.\n\nWe see 74%.", 1),
        ("As [thread](https://x.y/z) says:\n\n| a |\n|---|\n| 0.61 |\n", 0),
        ("| a |\n|---|\n| 0.61 |\n", 1),
        ("```{code-cell} ipython3\nx = f(0.7)\n```\nAt 0.7, or 70%, and at 0.8.", 1),
        ("Measured with torch 2.13 and Python 3.11.", 0),
        ("With $p = 0.25$ and `0.5` and\n\n```\n0.75\n```\n", 0),
        ("See section 3.2.2, chapter 4, 2024, 17 pairs.", 0),
    ],
)
def test_the_rule_knows_results(text, count):
    assert len(unexplained(text)) == count
