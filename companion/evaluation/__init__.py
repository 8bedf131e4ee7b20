"""Figures of a reward model on held-out rows, their tables, and a report. Chapters 3 and 4."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Evaluation": "evaluation",
    "OutcomeEvaluation": "tokens",
    "PairEvaluation": "pairs",
    "RankingEvaluation": "rankings",
    "StepEvaluation": "tokens",
    "TokenEvaluation": "tokens",
    "evaluate_pairs": "pairs",
    "evaluate_rankings": "rankings",
    "evaluate_tokens": "tokens",
    "pairwise_metrics": "metrics",
    "summary_rows": "pairs",
    "write_report": "report",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
