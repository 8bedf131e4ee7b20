"""Train, use, serve and monitor reward models for RLHF.

The names that most users need; each room (``companion.functional``, ``companion.training``, …) has
more. All are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

__version__ = "0.2.0"

if TYPE_CHECKING:
    from companion.data.loading import (
        load_rows as load_rows,
        load_rows_with_report as load_rows_with_report,
    )
    from companion.data.splits import (
        dataset_fingerprint as dataset_fingerprint,
        split_by_prompt as split_by_prompt,
    )
    from companion.data.writing import write_rows as write_rows
    from companion.errors import CompanionError as CompanionError
    from companion.evaluation.benchmarks.running import evaluate_benchmark as evaluate_benchmark
    from companion.evaluation.pairs import evaluate_pairs as evaluate_pairs
    from companion.evaluation.rankings import evaluate_rankings as evaluate_rankings
    from companion.evaluation.report import write_report as write_report
    from companion.evaluation.tokens import evaluate_tokens as evaluate_tokens
    from companion.formatting.formatter import RewardFormatter as RewardFormatter
    from companion.functional.calibration import (
        expected_calibration_error as expected_calibration_error,
        fit_temperature as fit_temperature,
    )
    from companion.functional.losses import (
        bradley_terry_loss as bradley_terry_loss,
        bradley_terry_probability as bradley_terry_probability,
        outcome_loss as outcome_loss,
        plackett_luce_loss as plackett_luce_loss,
        process_loss as process_loss,
    )
    from companion.functional.readout import last_token_readout as last_token_readout
    from companion.functional.reduction import aggregate as aggregate
    from companion.functional.resampling import bootstrap_interval as bootstrap_interval
    from companion.functional.selection import (
        best_of_n as best_of_n,
        best_of_n_kl as best_of_n_kl,
        pairwise_accuracy as pairwise_accuracy,
        whiten as whiten,
    )
    from companion.generation.policy import Policy as Policy
    from companion.judge.files import judge_file as judge_file
    from companion.judge.judge import Judge as Judge
    from companion.judge.local import LocalBackend as LocalBackend
    from companion.judge.report import judge_report as judge_report
    from companion.judge.server import ServerBackend as ServerBackend
    from companion.judge.templates import load_template as load_template
    from companion.models.loading import (
        load_base as load_base,
        load_reward_model as load_reward_model,
    )
    from companion.models.lora import apply_lora as apply_lora
    from companion.models.manifest import RewardManifest as RewardManifest
    from companion.models.reward_model import RewardModel as RewardModel
    from companion.models.saving import save_reward_model as save_reward_model
    from companion.rl.config import (
        GRPORunConfig as GRPORunConfig,
        PolicyArguments as PolicyArguments,
        PromptArguments as PromptArguments,
    )
    from companion.rl.monitor import OveroptimizationMonitor as OveroptimizationMonitor
    from companion.rl.rewards import open_reward as open_reward
    from companion.rl.run import train_grpo as train_grpo
    from companion.scoring.files import score_file as score_file
    from companion.scoring.remote import RemoteScorer as RemoteScorer
    from companion.scoring.reward_function import RewardFunction as RewardFunction
    from companion.scoring.scorer import (
        RewardScorer as RewardScorer,
        Scorer as Scorer,
        TokenScorer as TokenScorer,
        load_scorer as load_scorer,
    )
    from companion.search.best_of_n import rank_file as rank_file
    from companion.search.search import (
        best_of_n_search as best_of_n_search,
        step_beam_search as step_beam_search,
    )
    from companion.training.config import (
        DataArguments as DataArguments,
        ModelArguments as ModelArguments,
        PairwiseRewardConfig as PairwiseRewardConfig,
        RowArguments as RowArguments,
    )
    from companion.training.kwise import (
        KwiseRewardConfig as KwiseRewardConfig,
        KwiseRewardTrainer as KwiseRewardTrainer,
        train_kwise as train_kwise,
    )
    from companion.training.memory import plan_training as plan_training
    from companion.training.outcome import (
        OutcomeRewardConfig as OutcomeRewardConfig,
        OutcomeRewardTrainer as OutcomeRewardTrainer,
        train_outcome as train_outcome,
    )
    from companion.training.pairwise import (
        PairwiseRewardTrainer as PairwiseRewardTrainer,
        train_pairwise as train_pairwise,
    )
    from companion.training.process import (
        ProcessRewardConfig as ProcessRewardConfig,
        ProcessRewardTrainer as ProcessRewardTrainer,
        train_process as train_process,
    )
    from companion.training.run import TrainingResult as TrainingResult
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
