"""The search for good completions: best-of-N and beams over steps. Chapter 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.search.best_of_n import RankReport as RankReport, rank_file as rank_file
    from companion.search.search import (
        Candidate as Candidate,
        SearchResult as SearchResult,
        best_of_n_search as best_of_n_search,
        score_rows as score_rows,
        score_samples as score_samples,
        step_beam_search as step_beam_search,
        within_tokens as within_tokens,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
