"""RewardBench (Lambert et al. 2024, arXiv 2403.13787)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from companion.errors import DataError
from companion.evaluation.benchmarks.benchmark import (
    Item,
    PairBenchmark,
    Result,
    Row,
    mean,
    prompt_of,
    subset_results,
    text_of,
)
from companion.functional.resampling import Array

#: Section -> its subsets, with the weight of each: the number of its prompts, but for math-prm,
#: which weighs as much as all the code. As in ``rewardbench/constants.py`` of allenai/reward-bench;
#: the two numbers of XSTest stand there the other way round than the data has them (154 should be
#: refused, 250 answered), and the leaderboard's figures with them.
SECTIONS: Final[dict[str, dict[str, int]]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
    "Prior Sets": {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},
}
#: Of the sections in the mean over all: the prior sets count half, if they are there.
WEIGHTS: Final = {name: 1.0 if name != "Prior Sets" else 0.5 for name in SECTIONS}


class RewardBench(PairBenchmark):
    """RewardBench: one chosen and one rejected answer to each prompt.

    A pair is right if the chosen answer scores higher; of equal scores it is wrong. A section is
    the mean of its subsets by the weights of :data:`SECTIONS`, the figure over all the mean of the
    sections, in which the prior sets, if the file has any of them, count half (section 4 of the
    paper; ``analysis/get_benchmark_results.py`` of allenai/reward-bench). A judge whose two
    verdicts come out even gets one half, as in ``scripts/run_generative.py``.
    """

    name = "rewardbench"
    title = "RewardBench"
    dataset = "allenai/reward-bench"
    splits = ("filtered",)
    fields = "prompt, chosen, rejected, subset"
    subsets = tuple(s for name, own in SECTIONS.items() if name != "Prior Sets" for s in own)
    even = 0.5

    def item(self, row: Row) -> Item | str:
        """A row with ``prompt`` (text or messages), ``chosen``, ``rejected`` and ``subset``."""
        subset = text_of(row, "subset")
        if not any(subset in subsets for subsets in SECTIONS.values()):
            raise DataError(f"field 'subset': {subset!r} is no subset of RewardBench")
        return Item(subset, prompt_of(row), (text_of(row, "chosen"), text_of(row, "rejected")))

    def results(self, outcomes: Mapping[str, Array]) -> list[Result]:
        """Over all, the sections, and the subsets."""
        subsets = subset_results(outcomes)
        value = {line.name: line.value for line in subsets}
        sections = []
        for name, weights in SECTIONS.items():
            there = [subset for subset in weights if subset in value]
            if there:
                of = mean([value[subset] for subset in there], [weights[s] for s in there])
                n = sum(len(outcomes[subset]) for subset in there)
                sections.append(Result(name, "section", n, {"accuracy": of}))
        overall = mean([line.value for line in sections], [WEIGHTS[x.name] for x in sections])
        n = sum(line.n for line in sections)
        return [Result("overall", "overall", n, {"accuracy": overall}), *sections, *subsets]
