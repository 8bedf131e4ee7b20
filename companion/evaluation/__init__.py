"""A reward model on held-out rows: figures beside limits and floors; reports. Chapter 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.evaluation.benchmarks.benchmark import (
        Benchmark as Benchmark,
        Item as Item,
        Result as Result,
    )
    from companion.evaluation.benchmarks.catalogue import BENCHMARKS as BENCHMARKS
    from companion.evaluation.benchmarks.running import (
        BenchmarkEvaluation as BenchmarkEvaluation,
        evaluate_benchmark as evaluate_benchmark,
    )
    from companion.evaluation.comparison import (
        Comparison as Comparison,
        compare_scorers as compare_scorers,
    )
    from companion.evaluation.evaluation import Evaluation as Evaluation
    from companion.evaluation.figures import (
        draw_accuracy as draw_accuracy,
        draw_margins as draw_margins,
        draw_reliability as draw_reliability,
        draw_score_by_length as draw_score_by_length,
        draw_training_curve as draw_training_curve,
        style as style,
        use_style as use_style,
    )
    from companion.evaluation.metrics import pairwise_metrics as pairwise_metrics
    from companion.evaluation.pairs import (
        PairEvaluation as PairEvaluation,
        evaluate_pairs as evaluate_pairs,
        gold_probability as gold_probability,
        subset_rows as subset_rows,
        summary_rows as summary_rows,
    )
    from companion.evaluation.rankings import (
        RankingEvaluation as RankingEvaluation,
        evaluate_rankings as evaluate_rankings,
    )
    from companion.evaluation.report import write_report as write_report
    from companion.evaluation.tables import format_table as format_table
    from companion.evaluation.token_metrics import (
        first_error_figures as first_error_figures,
        fit_threshold as fit_threshold,
        guessing_f1 as guessing_f1,
        outcome_metrics as outcome_metrics,
        process_metrics as process_metrics,
        roc_auc as roc_auc,
    )
    from companion.evaluation.tokens import (
        OutcomeEvaluation as OutcomeEvaluation,
        StepEvaluation as StepEvaluation,
        TokenEvaluation as TokenEvaluation,
        evaluate_tokens as evaluate_tokens,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
