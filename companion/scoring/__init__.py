"""Score texts, conversations and completions; see :mod:`companion.scoring.scorer`."""

from companion.scoring.files import FileReport, score_file
from companion.scoring.remote import RemoteScorer
from companion.scoring.results import PairScores, Scores, TokenScores
from companion.scoring.scorer import RewardScorer, Scorer, TokenScorer, load_scorer, model_kind

__all__ = [
    "FileReport",
    "PairScores",
    "RemoteScorer",
    "RewardScorer",
    "Scorer",
    "Scores",
    "TokenScorer",
    "TokenScores",
    "load_scorer",
    "model_kind",
    "score_file",
]
