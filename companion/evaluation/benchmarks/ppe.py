"""The human preferences of PPE (Frick et al. 2024, arXiv 2410.14872)."""

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
    pooled,
    prompt_of,
    share,
    subset_results,
    text_of,
)
from companion.functional.resampling import Array

#: Columns that say what a prompt is, and what they are called here.
FLAGS: Final = {
    "hard_prompt": "hard prompts",
    "easy_prompt": "easy prompts",
    "if_prompt": "instruction following",
    "is_code": "code",
    "math_prompt": "math",
}
_WINNERS: Final = ("model_a", "model_b", "tie", "tie (bothbad)")


class PPEHumanPreference(PairBenchmark):
    """PPE, human preferences: which of two answers a visitor of Chatbot Arena preferred.

    The accuracy over the battles that have a winner (section 4 of the paper); ties are left out and
    counted. Of PPE's other figures, those that rank the models that wrote the answers, and the
    benchmarks of correctness, are not formed. The sections overlap: a prompt may be hard and about
    code.
    """

    name = "ppe"
    title = "PPE human preference"
    dataset = "lmarena-ai/PPE-Human-Preference-V1"
    splits = ("test",)
    fields = "prompt, response_1, response_2, winner (model_a, model_b, tie, tie (bothbad))"

    def item(self, row: Row) -> Item | str:
        """A row with ``prompt``, ``response_1``, ``response_2`` and ``winner``.

        Optional are ``language``, which gives the subsets, and the columns of :data:`FLAGS`.
        """
        winner = choice_of(row, "winner", _WINNERS)
        if winner.startswith("tie"):
            return "no winner"
        sides = text_of(row, "response_1"), text_of(row, "response_2")
        if winner == "model_b":
            sides = sides[::-1]
        tags = {name: float(bool(row[name])) for name in FLAGS if row.get(name) is not None}
        return Item(str(row.get("language") or "(none)"), prompt_of(row), sides, tags=tags)

    def outcomes(self, items: Sequence[Item], said: Sequence[Array], tie: float = 0.0) -> Array:
        """``[n, 1 + flags]``: whether the pair is right; the same where a flag is set, else NaN."""
        right = super().outcomes(items, said, tie)
        flags = [[(item.tags or {}).get(name, 0.0) for name in FLAGS] for item in items]
        marked = np.array(flags).reshape(-1, len(FLAGS)) > 0
        return np.concatenate([right, np.where(marked, right, np.nan)], axis=1)

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """Over all, by what the prompt is, and by its language."""
        whole = pooled(outcomes)
        found = [Result("overall", "overall", len(whole), {"accuracy": share(whole)})]
        for column, title in enumerate(FLAGS.values(), start=1):
            if n := int((~np.isnan(whole[:, column])).sum()):
                found.append(Result(title, "section", n, {"accuracy": share(whole, column)}))
        return [*found, *subset_results(outcomes)]
