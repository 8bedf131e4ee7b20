"""Score texts, conversations and completions; see :mod:`companion.scoring.scorer`."""

from companion.scoring.opening import load_scorer, model_kind
from companion.scoring.remote import RemoteScorer
from companion.scoring.results import PairScores, Scores
from companion.scoring.scorer import RewardScorer
from companion.scoring.streaming import FileReport, score_file
from companion.scoring.token_scorer import TokenScorer, TokenScores

__all__ = [
    "FileReport",
    "PairScores",
    "RemoteScorer",
    "RewardScorer",
    "Scores",
    "TokenScorer",
    "TokenScores",
    "load_scorer",
    "model_kind",
    "score_file",
]
