"""Train, use, serve and monitor reward models for RLHF.

Public names are imported on first use (PEP 562), so ``import companion`` and ``companion --help``
do not pay for torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "CompanionError": "companion.errors",
    "DataError": "companion.errors",
    "ShapeError": "companion.errors",
    "ReadoutError": "companion.errors",
    "ModelError": "companion.errors",
    "bradley_terry_probability": "companion.losses",
    "bradley_terry_loss": "companion.losses",
    "centering_penalty": "companion.losses",
    "best_global_shift": "companion.losses",
    "plackett_luce_loss": "companion.losses",
    "grouped_pair_loss": "companion.losses",
    "ranking_loss": "companion.rankings",
    "ordered_pairs": "companion.rankings",
    "best_is_best": "companion.rankings",
    "outcome_loss": "companion.losses",
    "process_loss": "companion.losses",
    "IGNORE_INDEX": "companion.losses",
    "last_token_index": "companion.readout",
    "last_token_readout": "companion.readout",
    "pad_id_readout_index": "companion.readout",
    "position_ids_from_mask": "companion.readout",
    "STEP_CLASSES": "companion.labels",
    "completion_mask": "companion.labels",
    "outcome_labels": "companion.labels",
    "step_boundaries": "companion.labels",
    "step_labels": "companion.labels",
    "step_target": "companion.labels",
    "aggregate": "companion.reduction",
    "mean_of_means": "companion.reduction",
    "weighted_mean_of_means": "companion.reduction",
    "SumCount": "companion.reduction",
    "all_reduce_metrics": "companion.reduction",
    "margin": "companion.selection",
    "pairwise_accuracy": "companion.selection",
    "best_of_n": "companion.selection",
    "top_k": "companion.selection",
    "best_of_n_kl": "companion.selection",
    "expected_best_of_n": "companion.selection",
    "whiten": "companion.selection",
    "ReliabilityBins": "companion.calibration",
    "confidence_and_correctness": "companion.calibration",
    "orient_at_random": "companion.calibration",
    "brier_score": "companion.calibration",
    "reliability_bins": "companion.calibration",
    "expected_calibration_error": "companion.calibration",
    "calibrated_band": "companion.calibration",
    "fit_temperature": "companion.calibration",
    "Interval": "companion.resampling",
    "bootstrap_interval": "companion.resampling",
    "pairwise_metrics": "companion.metrics",
    "EvaluationResult": "companion.evaluation",
    "evaluate_pairs": "companion.evaluation",
    "summary_rows": "companion.evaluation",
    "write_report": "companion.report",
    "use_style": "companion.figures",
    "DtypeError": "companion._tensors",
    "roc_auc": "companion.token_metrics",
    "outcome_metrics": "companion.token_metrics",
    "process_metrics": "companion.token_metrics",
    "first_error_figures": "companion.token_metrics",
    "RewardFormatter": "companion.formatting",
    "Encoded": "companion.formatting.encoded",
    "FormatCounts": "companion.formatting.encoded",
    "RewardModel": "companion.models.reward_model",
    "RewardManifest": "companion.models.manifest",
    "ReferenceStats": "companion.models.manifest",
    "load_base": "companion.models.loading",
    "load_reward_model": "companion.models.loading",
    "save_reward_model": "companion.models.saving",
    "apply_lora": "companion.models.lora",
    "reward_scores": "companion.models.forward",
    "packed_scores": "companion.models.forward",
    "packing_obstacle": "companion.models.packed_attention",
    "token_budget_batches": "companion.batching.padded",
    "pad_batch": "companion.batching.padded",
    "plan_batches": "companion.batching.plan",
    "pack": "companion.batching.packing",
    "load_token_base": "companion.models.token_models",
    "load_token_model": "companion.models.token_models",
    "save_token_model": "companion.models.token_models",
    "token_logits": "companion.models.token_models",
    "TokenReadout": "companion.models.token_readout",
    "load_causal": "companion.models.causal",
    "encode_prompts": "companion.formatting.prompts",
    "Policy": "companion.search",
    "Sample": "companion.search",
    "Logprobs": "companion.search",
    "RewardFunction": "companion.rl.reward_function",
    "PairwiseRewardConfig": "companion.training.config",
    "PairwiseRewardTrainer": "companion.training.pairwise",
    "TrainingResult": "companion.training.result",
    "train_pairwise": "companion.training.run",
    "KwiseRewardConfig": "companion.training.kwise",
    "KwiseRewardTrainer": "companion.training.kwise",
    "train_kwise": "companion.training.kwise_run",
    "OutcomeRewardConfig": "companion.training.outcome",
    "OutcomeRewardTrainer": "companion.training.outcome",
    "train_outcome": "companion.training.outcome_run",
    "ProcessRewardConfig": "companion.training.process",
    "ProcessRewardTrainer": "companion.training.process",
    "train_process": "companion.training.process_run",
    "TokenTrainingResult": "companion.training.token_run",
    "RewardScorer": "companion.scoring",
    "Scores": "companion.scoring",
    "TokenScorer": "companion.scoring",
    "TokenScores": "companion.scoring",
    "PairScores": "companion.scoring",
    "load_scorer": "companion.scoring.opening",
    "TokenEvaluation": "companion.token_evaluation",
    "evaluate_tokens": "companion.token_evaluation",
    "evaluate_rankings": "companion.ranking_evaluation",
    "load_rows": "companion.data.loading",
    "load_rows_with_report": "companion.data.loading",
    "write_rows": "companion.data.writing",
    "describe_rows": "companion.data.describe",
    "split_by_prompt": "companion.data.splits",
    "prompt_key": "companion.data.splits",
    "duplicate_report": "companion.data.splits",
    "overlap_report": "companion.data.splits",
    "dataset_fingerprint": "companion.data.splits",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'companion' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
