"""The formulas of the field as pure functions, on tensors or NumPy arrays. Chapter 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.functional.agreement import (
        accuracy_ceiling as accuracy_ceiling,
        annotator_agreement as annotator_agreement,
        item_agreement as item_agreement,
        krippendorff_alpha as krippendorff_alpha,
    )
    from companion.functional.betting import (
        bets_of as bets_of,
        by_group as by_group,
        evidence_above as evidence_above,
        likely_start as likely_start,
        log_growth as log_growth,
        mean_lower_limit as mean_lower_limit,
        mix as mix,
        mix_starts as mix_starts,
    )
    from companion.functional.calibration import (
        ReliabilityBins as ReliabilityBins,
        ScoreParts as ScoreParts,
        brier_score as brier_score,
        calibrated_band as calibrated_band,
        confidence_and_correctness as confidence_and_correctness,
        expected_calibration_error as expected_calibration_error,
        fit_temperature as fit_temperature,
        inverse_temperature_limits as inverse_temperature_limits,
        orient_at_random as orient_at_random,
        reliability_bins as reliability_bins,
        score_parts as score_parts,
    )
    from companion.functional.labels import (
        STEP_CLASSES as STEP_CLASSES,
        completion_mask as completion_mask,
        outcome_labels as outcome_labels,
        step_boundaries as step_boundaries,
        step_labels as step_labels,
        step_target as step_target,
    )
    from companion.functional.losses import (
        IGNORE_INDEX as IGNORE_INDEX,
        best_global_shift as best_global_shift,
        bradley_terry_loss as bradley_terry_loss,
        bradley_terry_probability as bradley_terry_probability,
        centering_penalty as centering_penalty,
        grouped_pair_loss as grouped_pair_loss,
        outcome_loss as outcome_loss,
        plackett_luce_loss as plackett_luce_loss,
        process_loss as process_loss,
    )
    from companion.functional.rankings import (
        best_is_best as best_is_best,
        ordered_pairs as ordered_pairs,
        ranking_loss as ranking_loss,
    )
    from companion.functional.readout import (
        last_token_index as last_token_index,
        last_token_readout as last_token_readout,
        pad_id_readout_index as pad_id_readout_index,
        position_ids_from_mask as position_ids_from_mask,
    )
    from companion.functional.reduction import (
        SumCount as SumCount,
        aggregate as aggregate,
        all_reduce_metrics as all_reduce_metrics,
        mean_of_means as mean_of_means,
        weighted_mean_of_means as weighted_mean_of_means,
    )
    from companion.functional.resampling import (
        Interval as Interval,
        bootstrap_interval as bootstrap_interval,
        bootstrap_runs as bootstrap_runs,
    )
    from companion.functional.selection import (
        BestOfNCurve as BestOfNCurve,
        best_of_n as best_of_n,
        best_of_n_curve as best_of_n_curve,
        best_of_n_kl as best_of_n_kl,
        ensemble_scores as ensemble_scores,
        expected_best_of_n as expected_best_of_n,
        majority_vote as majority_vote,
        margin as margin,
        measured_best_of_n_kl as measured_best_of_n_kl,
        pairwise_accuracy as pairwise_accuracy,
        top_k as top_k,
        whiten as whiten,
    )
    from companion.functional.sequential import Fall as Fall, FallTest as FallTest
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
