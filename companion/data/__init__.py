"""Rows: where they come from, what they must hold, how they are split. Chapter 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.data.checking import (
        DataReport as DataReport,
        Finding as Finding,
        check_rows as check_rows,
        check_tokens as check_tokens,
    )
    from companion.data.describe import describe_rows as describe_rows
    from companion.data.formats import KINDS as KINDS, detect_kind as detect_kind
    from companion.data.loading import (
        load_rows as load_rows,
        load_rows_with_report as load_rows_with_report,
    )
    from companion.data.problems import LoadReport as LoadReport, RowProblem as RowProblem
    from companion.data.splits import (
        DuplicateReport as DuplicateReport,
        OverlapReport as OverlapReport,
        dataset_fingerprint as dataset_fingerprint,
        duplicate_report as duplicate_report,
        overlap_report as overlap_report,
        prompt_key as prompt_key,
        split_by_prompt as split_by_prompt,
    )
    from companion.data.writing import write_rows as write_rows
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
