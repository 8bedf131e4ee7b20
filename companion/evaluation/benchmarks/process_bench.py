"""ProcessBench (Zheng et al. 2024, arXiv 2412.06559)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from companion.errors import DataError
from companion.evaluation.benchmarks.benchmark import (
    Item,
    Result,
    Row,
    StepBenchmark,
    mean,
    text_of,
    texts_of,
)
from companion.evaluation.token_metrics import figures_of_hits
from companion.functional.resampling import Array


class ProcessBench(StepBenchmark):
    """ProcessBench: name the first wrong step of a solution, or say that there is none.

    The F1 of a subset is the harmonic mean of two accuracies: on solutions with an error, of which
    the first wrong step must be named, and on those without one, which must be passed whole. Over
    all is the mean of the subsets' F1 (section 4 of the paper; ``code/run_eval_prm_trl.py`` of
    QwenLM/ProcessBench). A step is named if P(wrong) is above the threshold of the manifest, which
    was fitted on other rows; the paper fits it on GSM8K for models without a natural one.
    """

    name = "processbench"
    title = "ProcessBench"
    dataset = "Qwen/ProcessBench"
    splits = ("gsm8k", "math", "olympiadbench", "omnimath")
    fields = "id (gsm8k-0, …), problem, steps (a list), label (place of the first error, or -1)"
    subsets = splits

    def item(self, row: Row) -> Item | str:
        """A row with ``id`` (whose beginning is the subset), ``problem``, ``steps``, ``label``."""
        subset, dash, _ = text_of(row, "id").rpartition("-")
        if not dash or subset not in self.subsets:
            raise DataError(
                f"field 'id': {row['id']!r} does not begin with one of {', '.join(self.subsets)}"
            )
        steps, label = texts_of(row, "steps"), row.get("label")
        if type(label) is not int or not -1 <= label < len(steps):
            raise DataError(f"field 'label': {label!r} is no place of {len(steps)} steps, nor -1")
        wrong = frozenset() if label == -1 else frozenset([label])
        return Item(subset, text_of(row, "problem"), steps, wrong=wrong)

    def outcomes(self, items: Sequence[Item], said: Sequence[Array], tie: float = 0.0) -> Array:
        """``[n, 2]``: whether there is an error, and whether what was named is right.

        Of a guess that calls each step wrong with a probability, how probable that is.
        """
        table = []
        for item, called in zip(items, said, strict=True):
            first = min(item.wrong, default=len(called))
            passed = float(np.prod(1 - called[:first]))
            table.append([float(bool(item.wrong)), passed * (called[first] if item.wrong else 1)])
        return np.array(table, dtype=np.float64).reshape(-1, 2)

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """Over all, and the subsets; each with both accuracies."""
        names = {
            "F1": "first_error_f1",
            "accuracy on errors": "accuracy_on_errors",
            "accuracy on right": "accuracy_on_right",
        }
        subsets = []
        for subset, own in outcomes.items():
            found = figures_of_hits(own)
            figures = {name: found[key] for name, key in names.items()}
            subsets.append(Result(subset, "subset", len(own), figures))
        overall = {name: mean([line.figures[name] for line in subsets]) for name in names}
        return [Result("overall", "overall", sum(x.n for x in subsets), overall), *subsets]
