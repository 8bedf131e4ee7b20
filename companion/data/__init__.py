"""Rows: where they come from, what they must hold, how they are split.

Names are imported on first use, so that ``companion.data.tutor`` does not pay for pyarrow.
"""

from __future__ import annotations

import importlib
from typing import Any

#: public name -> module that defines it
_EXPORTS: dict[str, str] = {
    "KINDS": "companion.data.formats",
    "detect_kind": "companion.data.formats",
    "load_rows": "companion.data.loading",
    "load_rows_with_report": "companion.data.loading",
    "LoadReport": "companion.data.problems",
    "RowProblem": "companion.data.problems",
    "DuplicateReport": "companion.data.splits",
    "OverlapReport": "companion.data.splits",
    "dataset_fingerprint": "companion.data.splits",
    "duplicate_report": "companion.data.splits",
    "overlap_report": "companion.data.splits",
    "prompt_key": "companion.data.splits",
    "split_by_prompt": "companion.data.splits",
    "describe_rows": "companion.data.describe",
    "write_rows": "companion.data.writing",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'companion.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
