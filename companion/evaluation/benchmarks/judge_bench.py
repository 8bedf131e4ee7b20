"""JudgeBench (Tan et al. 2024, arXiv 2410.12784)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from companion.evaluation.benchmarks.benchmark import (
    Item,
    PairBenchmark,
    Result,
    Row,
    choice_of,
    pooled,
    share,
    subset_results,
    text_of,
)
from companion.functional.resampling import Array

#: Category -> how the sources of its rows begin.
CATEGORIES: Final = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}


class JudgeBench(PairBenchmark):
    """JudgeBench: a right and a wrong answer of one model to a hard question.

    A judge is asked in both orders, and a pair is right if the verdicts for the right answer are
    more than those for the wrong one: a tie or no verdict counts for neither
    (``utils/metrics.py`` of ScalerLab/JudgeBench). A reward model is right if the right answer
    scores higher. A category, and the figure over all, is the share of its pairs.
    """

    name = "judgebench"
    title = "JudgeBench"
    dataset = "ScalerLab/JudgeBench"
    splits = ("gpt",)
    fields = "question, response_A, response_B, label (A>B or B>A), source"

    def item(self, row: Row) -> Item | str:
        """A row with ``question``, ``response_A``, ``response_B``, ``label`` and ``source``."""
        sides = text_of(row, "response_A"), text_of(row, "response_B")
        if choice_of(row, "label", ("A>B", "B>A")) == "B>A":
            sides = sides[::-1]
        return Item(text_of(row, "source"), text_of(row, "question"), sides)

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """Over all, the categories, and the sources."""
        lines = [("overall", "overall", dict(outcomes))]
        for name, begin in CATEGORIES.items():
            own = {source: table for source, table in outcomes.items() if source.startswith(begin)}
            if own:
                lines.append((name, "section", own))
        found = [
            Result(name, level, len(pooled(own)), {"accuracy": share(pooled(own))})
            for name, level, own in lines
        ]
        return [*found, *subset_results(outcomes)]
