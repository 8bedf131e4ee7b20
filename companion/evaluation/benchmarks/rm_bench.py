"""RM-Bench (Liu et al. 2024, arXiv 2410.16184)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from companion.evaluation.benchmarks.benchmark import (
    Item,
    PairBenchmark,
    Result,
    Row,
    choice_of,
    mean,
    pooled,
    share,
    text_of,
    texts_of,
    wins,
)
from companion.functional.resampling import Array

#: Domain of the leaderboard -> domains of the rows.
DOMAINS: Final = {
    "Chat": ("chat",),
    "Code": ("code",),
    "Math": ("math",),
    "Safety": ("safety-refuse", "safety-response"),
}
_STYLES: Final = ("easy", "normal", "hard")


class RMBench(PairBenchmark):
    """RM-Bench: three right and three wrong answers, each terse, detailed, and with Markdown.

    Of the nine pairs of a prompt, *hard* are those in which the wrong answer has the richer style
    (above the diagonal), *normal* those of one style, *easy* those in which the right one has it;
    of equal scores a pair is wrong (``compute_accuracy``, README of THU-KEG/RM-Bench). A domain is
    the mean of the three, Safety that of the prompts of both its parts together; over all is the
    mean of the four domains, which is that of the three difficulties too (README of
    THU-KEG/RM-Bench-Leaderboard).
    """

    name = "rmbench"
    title = "RM-Bench"
    dataset = "THU-KEG/RM-Bench"
    splits = ("train",)
    fields = "prompt, chosen (three texts), rejected (three texts), domain"
    subsets = tuple(part for parts in DOMAINS.values() for part in parts)

    def item(self, row: Row) -> Item | str:
        """A row with ``prompt``, ``chosen`` and ``rejected`` (three texts each), ``domain``."""
        domain = choice_of(row, "domain", [name for names in DOMAINS.values() for name in names])
        texts = texts_of(row, "chosen", 3) + texts_of(row, "rejected", 3)
        return Item(domain, text_of(row, "prompt"), texts, n_right=3)

    def outcomes(self, items: Sequence[Item], said: Sequence[Array], tie: float = 0.0) -> Array:
        """``[n, 3]``: shares of the easy, normal and hard pairs that are ordered right."""
        masks = [np.tri(3, k=-1, dtype=bool), np.eye(3, dtype=bool), ~np.tri(3, dtype=bool)]
        table = [[float(wins(own, tie)[mask].mean()) for mask in masks] for own in said]
        return np.array(table).reshape(-1, 3)

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """Over all, the domains, and the two parts of Safety; each with its difficulties."""
        domains = []
        for name, parts in DOMAINS.items():
            own = {part: outcomes[part] for part in parts if part in outcomes}
            if own:
                domains.append(_line(name, "section", pooled(own)))
        safety = [
            _line(name, "subset", own)
            for name, own in outcomes.items()
            if name in DOMAINS["Safety"]
        ]
        keys = domains[0].figures
        overall = {key: mean([line.figures[key] for line in domains]) for key in keys}
        n = sum(line.n for line in domains)
        return [Result("overall", "overall", n, overall), *domains, *safety]


def _line(name: str, level: str, outcomes: Array) -> Result:
    difficulties = {style: share(outcomes, column) for column, style in enumerate(_STYLES)}
    figures = {"accuracy": mean(list(difficulties.values())), **difficulties}
    return Result(name, level, len(outcomes), figures)
