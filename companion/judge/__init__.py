"""Ask a language model which completion is better; see :mod:`companion.judge.judge`.

Names are imported on first use, so that reports do not pay for transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

#: public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "Answer": "companion.judge.backend",
    "AnswerCache": "companion.judge.cache",
    "Grading": "companion.judge.judge",
    "Judge": "companion.judge.judge",
    "JudgeFileReport": "companion.judge.files",
    "JudgeReport": "companion.judge.report",
    "JudgeTemplate": "companion.judge.templates",
    "LocalBackend": "companion.judge.local",
    "PairVerdict": "companion.judge.judge",
    "Question": "companion.judge.backend",
    "ServerBackend": "companion.judge.server",
    "annotator_report": "companion.judge.report",
    "cohen_kappa": "companion.judge.report",
    "combine_orders": "companion.judge.judge",
    "judge_file": "companion.judge.files",
    "judge_report": "companion.judge.report",
    "load_annotations": "companion.judge.report",
    "load_template": "companion.judge.templates",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'companion.judge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
