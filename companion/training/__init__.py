"""Train reward models of every kind, exactly. Chapter 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.training.batches import (
        Collator as Collator,
        PaddedSampler as PaddedSampler,
    )
    from companion.training.config import (
        DataArguments as DataArguments,
        ModelArguments as ModelArguments,
        PairwiseRewardConfig as PairwiseRewardConfig,
        RowArguments as RowArguments,
        default_learning_rate as default_learning_rate,
    )
    from companion.training.kind import KINDS as KINDS, Kind as Kind, load_kind as load_kind
    from companion.training.kwise import (
        KwiseRewardConfig as KwiseRewardConfig,
        KwiseRewardTrainer as KwiseRewardTrainer,
        format_rankings as format_rankings,
        train_kwise as train_kwise,
    )
    from companion.training.memory import (
        ScoringPlan as ScoringPlan,
        TrainingPlan as TrainingPlan,
        plan_scoring as plan_scoring,
        plan_training as plan_training,
    )
    from companion.training.outcome import (
        OutcomeRewardConfig as OutcomeRewardConfig,
        OutcomeRewardTrainer as OutcomeRewardTrainer,
        format_outcomes as format_outcomes,
        train_outcome as train_outcome,
    )
    from companion.training.pairwise import (
        PairCollator as PairCollator,
        PairwiseRewardTrainer as PairwiseRewardTrainer,
        format_pairs as format_pairs,
        train_pairwise as train_pairwise,
    )
    from companion.training.preemption import PreemptionCallback as PreemptionCallback
    from companion.training.process import (
        ProcessRewardConfig as ProcessRewardConfig,
        ProcessRewardTrainer as ProcessRewardTrainer,
        format_steps as format_steps,
        train_process as train_process,
    )
    from companion.training.rows import FormatReport as FormatReport
    from companion.training.run import TrainingResult as TrainingResult, train as train
    from companion.training.trainer import ExactTrainer as ExactTrainer
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
