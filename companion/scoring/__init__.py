"""Score texts, conversations and completions, here or on a server. Chapter 6."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.scoring.adopting import Adopted as Adopted, adopt as adopt
    from companion.scoring.corpus import ScoreRewards as ScoreRewards
    from companion.scoring.files import FileReport as FileReport, score_file as score_file
    from companion.scoring.golden import (
        GoldenReport as GoldenReport,
        add_golden_texts as add_golden_texts,
        check_golden as check_golden,
        golden_texts as golden_texts,
    )
    from companion.scoring.processes import launched_processes as launched_processes
    from companion.scoring.reading import Text as Text, ids_of as ids_of
    from companion.scoring.remote import RemoteScorer as RemoteScorer
    from companion.scoring.results import (
        PairScores as PairScores,
        Scores as Scores,
        TokenScores as TokenScores,
    )
    from companion.scoring.reward_function import (
        AsyncRewardFunction as AsyncRewardFunction,
        RewardFunction as RewardFunction,
        Transform as Transform,
    )
    from companion.scoring.scorer import (
        LocalScorer as LocalScorer,
        OnError as OnError,
        Prepared as Prepared,
        Progress as Progress,
        RewardScorer as RewardScorer,
        Scorer as Scorer,
        TokenScorer as TokenScorer,
        load_scorer as load_scorer,
        model_kind as model_kind,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
