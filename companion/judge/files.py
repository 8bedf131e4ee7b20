"""Judge a file; a run that was stopped goes on from its cache. Chapter 3.

The output appears when it is complete. Until then every answer stands in the cache, so the same
command asks only what is still open.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from companion.data.problems import RowError, RowProblem
from companion.data.readers import read_file
from companion.data.writing import check_output, to_json, whole_file
from companion.errors import DataError
from companion.judge.items import Item, read_item
from companion.judge.judge import Grading, Judge, PairVerdict, Progress

_OF_PAIRS: Final = ("preference", "reason", "first", "swapped", "logit_first", "logit_swapped")
_OF_GRADES: Final = ("rating", "reason", "expected_rating")
#: Fields of the output that the judge writes; a field of the input by that name gets ``input_``.
_OURS: Final = frozenset({*_OF_PAIRS, *_OF_GRADES, "judge", "answers"})


@dataclass
class JudgeFileReport:
    """What became of the rows of a file.

    Attributes
    ----------
    rows : int
        Rows of the input.
    outcomes : Counter
        ``a``, ``b``, ``tie`` and ``none``; pointwise ``rated`` and ``none``.
    reasons : Counter
        Why there is none, or a tie (``disagreement``).
    bad_rows : list of str
        Rows that could not be read (``on_error="skip"``); they are not in the output.
    """

    rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)


def judge_file(
    judge: Judge,
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    keep_answers: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    chunk_rows: int = 256,
    progress: Progress | None = None,
    on_total: Progress | None = None,
) -> JudgeFileReport:
    """Judge the rows of a file and write them with their verdicts.

    All rows are read and checked before the first question. The output trains a reward model as it
    is: ``companion train pairwise`` takes ``a``, ``b`` and ``preference``, and leaves out ties and
    rows without a verdict, with their counts.

    Parameters
    ----------
    judge : Judge
        Its template decides whether pairs are compared or completions graded.
    input_path : str or path
        .jsonl, .json, .csv or .parquet; see :func:`companion.judge.read_item` for the fields.
    output_path : str or path
        .jsonl. Rows keep their fields.
    limit : int, optional
        Take the first rows only.
    keep_answers : bool
        Write what the model said into each row.
    on_error : {"raise", "skip"}
        Whether a bad row, or one that the model refuses, stops the run.
    overwrite : bool
        Replace an output that is there.
    chunk_rows : int
        Rows asked about at a time.
    progress, on_total : callable, optional
        Called with the number of answers that came; and once, before, with the number to come.

    Returns
    -------
    JudgeFileReport

    Raises
    ------
    DataError
        For a bad row (file and line), a row that the model refuses, or an output that is there.
    JudgeError
        If the model cannot be asked; the same call goes on from the cache.
    """
    source, target = Path(input_path), Path(output_path)
    if target.suffix != ".jsonl":
        raise DataError(f"{target}: the output is a .jsonl file")
    check_output(target, source, regular=True)
    if target.exists() and not overwrite:
        raise DataError(f"{target}: is there already", "give another output, or --overwrite")
    if chunk_rows < 1 or (limit is not None and limit < 1):
        raise DataError(f"chunk_rows={chunk_rows}, limit={limit}", "use positive numbers")
    report = JudgeFileReport()
    rows = _read(judge, source, limit, on_error, report)
    pairwise = judge.template.mode == "pairwise"
    ask: Callable[..., Sequence[PairVerdict | Grading]] = (
        judge.compare_items if pairwise else judge.grade_items
    )
    if on_total is not None:
        on_total(len(rows) * (2 if pairwise else 1))
    with whole_file(target) as part, open(part, "w", encoding="utf-8") as out:
        for begin in range(0, len(rows), chunk_rows):
            chunk = rows[begin : begin + chunk_rows]
            verdicts = ask([item for _, item in chunk], progress=progress)
            for (name, item), verdict in zip(chunk, verdicts, strict=True):
                record = _record(item, verdict, judge, keep_answers)
                _count(report, record, name, judge, on_error)
                out.write(to_json(record) + "\n")
        out.flush()
        os.fsync(out.fileno())
    return report


def _read(
    judge: Judge, source: Path, limit: int | None, on_error: str, report: JudgeFileReport
) -> list[tuple[str, Item]]:
    items: list[tuple[str, Item]] = []
    for where, row in read_file(source):
        if limit is not None and report.rows >= limit:
            break
        report.rows += 1
        try:
            if isinstance(row, RowError):
                raise RowProblem.of(row, where).as_error() from row
            items.append((where, read_item(row, judge.template.mode, where)))
        except DataError as error:
            if on_error == "raise":
                raise
            report.bad_rows.append(error.what)
    if not items:
        raise DataError(f"{source}: no rows to judge", "check the file")
    return items


def _record(
    item: Item, verdict: PairVerdict | Grading, judge: Judge, keep_answers: bool
) -> dict[str, Any]:
    record = {f"input_{k}" if k in _OURS else k: v for k, v in item.row.items()}
    fields, answers = (
        (_OF_PAIRS, list(verdict.answers))
        if isinstance(verdict, PairVerdict)
        else (_OF_GRADES, [verdict.answer])
    )
    record |= {name: getattr(verdict, name) for name in fields}
    if fields is _OF_PAIRS and record["preference"] is None:
        record["preference"] = "none"
    record["judge"] = judge.backend.name
    return record | {"answers": answers} if keep_answers else record


def _count(
    report: JudgeFileReport, record: dict[str, Any], name: str, judge: Judge, on_error: str
) -> None:
    reason = record["reason"]
    known = ("disagreement", "no verdict", "conflicting verdicts", "cut off")
    if reason is not None and reason not in known:
        if on_error == "raise":
            raise DataError(f"{name}: {reason}", "mend or shorten the row, or --on_error skip")
        reason = "refused"
    if reason is not None:
        report.reasons[reason] += 1
    rated = "none" if record.get("rating") is None else "rated"
    report.outcomes[record.get("preference", rated)] += 1
