"""Completions from a policy, and the search for good ones. Chapters 3 and 5."""

from companion.search.best_of_n import RankReport, rank_file
from companion.search.policy import Logprobs, Policy, Sample
from companion.search.search import (
    Candidate,
    SearchResult,
    best_of_n_search,
    score_samples,
    step_beam_search,
    within_tokens,
)

__all__ = [
    "Candidate",
    "Logprobs",
    "Policy",
    "RankReport",
    "Sample",
    "SearchResult",
    "best_of_n_search",
    "rank_file",
    "score_samples",
    "step_beam_search",
    "within_tokens",
]
