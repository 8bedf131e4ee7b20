"""Completions from a policy, and the search for good ones. Chapters 3 and 5."""

from companion.search.choosing import Candidate, SearchResult, score_samples, within_tokens
from companion.search.ranking import rank_file
from companion.search.ranks import RankReport
from companion.search.results import Logprobs, Sample
from companion.search.sampling import Policy
from companion.search.searching import best_of_n_search, step_beam_search

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
