"""PRMBench (Song et al. 2025, arXiv 2501.03124)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from companion.errors import DataError
from companion.evaluation.benchmarks.benchmark import (
    Item,
    Result,
    Row,
    StepBenchmark,
    choice_of,
    mean,
    pooled,
    share,
    text_of,
    texts_of,
)
from companion.functional.resampling import Array

#: Section -> categories, as the rows spell them.
SECTIONS: Final = {
    "Simplicity": ("redundency", "circular"),
    "Soundness": (
        "counterfactual",
        "step_contradiction",
        "domain_inconsistency",
        "confidence",
    ),
    "Sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
_CATEGORIES: Final = tuple(name for names in SECTIONS.values() for name in names)


class PRMBench(StepBenchmark):
    """PRMBench: say of each step whether it is wrong, where solutions were spoilt on purpose.

    F1 is that of the right steps that are called right, negative F1 that of the wrong steps that
    are called wrong, both from the counts of all steps together; the PRM-score is their mean. Of a
    category without a wrong step (``multi_solutions``) it is the F1. A section is the mean of its
    categories; over all the counts of every category are added up (section 4 of the paper; the task
    ``prmtest_classified`` and the tables of ssmisya/PRMBench, in which a negative F1 of which
    nothing is found is -1; here it is 0). *first error* is the share of solutions whose first wrong
    step is called wrong, whatever is said of those before it.

    A step is called wrong if P(wrong) is above the threshold of the manifest. A model that also
    says which steps are redundant is judged by that there in two categories; models here do not.
    The original solutions, which are scored beside the spoilt ones there, count for no figure here.
    """

    name = "prmbench"
    title = "PRMBench"
    dataset = "hitsmy/PRMBench_Preview"
    splits = ("train",)
    fields = (
        "modified_question, modified_process (a list of steps), error_steps (numbers from 1), "
        "classification"
    )
    subsets = _CATEGORIES

    def item(self, row: Row) -> Item | str:
        """A row with ``modified_question``, ``modified_process``, ``error_steps``, its category.

        A number in ``error_steps`` that the solution does not have is left out, as published.
        """
        steps, wrong = texts_of(row, "modified_process"), row.get("error_steps")
        if not isinstance(wrong, (list, tuple)) or not all(
            type(number) is int and number > 0 for number in wrong
        ):
            raise DataError(f"field 'error_steps': {wrong!r} is no list of numbers from 1")
        places = frozenset(number - 1 for number in wrong if number <= len(steps))
        category = choice_of(row, "classification", _CATEGORIES)
        return Item(category, text_of(row, "modified_question"), steps, wrong=places)

    def outcomes(self, items: Sequence[Item], said: Sequence[Array], tie: float = 0.0) -> Array:
        """``[n, 5]``: right steps called right and wrong, wrong ones called so; the first error.

        Of a guess that calls each step wrong with a probability, what is expected.
        """
        table = np.full((len(items), 5), np.nan)
        for line, item, called in zip(table, items, said, strict=True):
            wrong = np.isin(np.arange(len(called)), list(item.wrong))
            line[0], line[1] = (1 - called[~wrong]).sum(), called[~wrong].sum()
            line[2], line[3] = (1 - called[wrong]).sum(), called[wrong].sum()
            if item.wrong:
                line[4] = called[min(item.wrong)]
        return table

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """Over all, the sections, and the categories."""
        subsets = [
            Result(name, "subset", len(own), _figures(own)) for name, own in outcomes.items()
        ]
        sections = []
        for name, categories in SECTIONS.items():
            own = [line for line in subsets if line.name in categories]
            if own:
                keys = own[0].figures
                figures = {key: mean([line.figures[key] for line in own]) for key in keys}
                sections.append(Result(name, "section", sum(x.n for x in own), figures))
        whole = pooled(outcomes)
        return [Result("overall", "overall", len(whole), _figures(whole)), *sections, *subsets]


def _figures(outcomes: Array) -> dict[str, float]:
    kept, lost, missed, caught = outcomes[:, :4].sum(axis=0)
    positive = _f1(kept, missed, lost)
    negative = _f1(caught, lost, missed) if missed + caught else float("nan")
    return {
        "PRM-score": mean([positive, negative]),
        "F1": positive,
        "negative F1": negative,
        "first error": share(outcomes, 4),
    }


def _f1(hits: float, false: float, missed: float) -> float:
    """Harmonic mean of precision and recall; 0 if nothing is found, NaN if nothing is there."""
    there = 2 * hits + false + missed
    return float(2 * hits / there) if there else float("nan")
