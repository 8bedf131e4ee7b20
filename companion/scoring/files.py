"""Score a file in chunks; go on where a run was stopped; lose and double no row.

The output has one line for each row of the input, in its order, so the number of whole lines says
where to go on. A line that was torn by a kill is cut off first. A small file beside the output
(``<output>.state.json``) holds the fingerprints of the input, the model and the options: a run goes
on only if all of them are the same. Several processes share each chunk; the first one writes it, so
the number of processes may be another when a run goes on. Chapter 6.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypedDict, Unpack

from accelerate import PartialState
from filelock import FileLock, Timeout

from companion.data.problems import RowError, RowProblem
from companion.data.readers import file_format, json_lines, open_bytes, parse_json, read_file
from companion.data.writing import check_output, to_json, unwritable, write_text
from companion.errors import DataError, listed
from companion.layouts import rename_columns
from companion.scoring.processes import across_processes, add_up_counts, in_first_process
from companion.scoring.scorer import OnError, Progress, Scorer

_STATE_VERSION = 1
_OURS = frozenset(
    {
        *("index", "score", "n_tokens", "error"),
        *("centered", "z", "percentile"),
        *("token_scores", "step_scores", "step_wrong", "first_error"),
    }
)
#: a row's place, and what stands there: the bytes of a line, or the row of a table
Place = tuple[str, bytes | dict[str, Any] | RowError]
#: index of a row, and its place
Line = tuple[int, Place]
_OVERWRITE = "give another output, or --overwrite to begin anew"


@dataclass
class FileReport:
    """What :func:`score_file` did: rows of the input, of earlier runs, and by outcome."""

    rows: int
    resumed_at: int
    scored: int = 0
    without_score: int = 0


class Writing(TypedDict, total=False):
    """Settings of a file that is written in chunks.

    Attributes
    ----------
    overwrite : bool
        Throw away an output that is there.
    chunk_rows : int
        Rows that each process computes before they are written and made durable; default 1,024.
    progress : callable
        Called with the number of rows that have been written, earlier runs' rows first.
    on_total : callable
        Called once, before, with the number of rows of the input.
    processes : PartialState
        Those that share the work (:func:`companion.scoring.launched_processes`): each calls with
        the same arguments, and the first one alone writes.
    whole : bool
        Let the output appear under its name only when it has all rows; until then it is called
        ``<output>.part``.
    allow_empty : bool
        An input without rows is no error, but a file of a corpus.
    """

    overwrite: bool
    chunk_rows: int
    progress: Progress | None
    on_total: Progress | None
    processes: PartialState | None
    whole: bool
    allow_empty: bool


def score_file(
    scorer: Scorer[Any],
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    fields: Sequence[str] = (),
    completion_field: str = "completion",
    columns: Mapping[str, str] | None = None,
    terminated: bool | None = None,
    on_error: OnError = "raise",
    **writing: Unpack[Writing],
) -> FileReport:
    """Score ``input_path`` into ``output_path`` (.jsonl).

    The input is .jsonl (also .gz, and any other name), .json, .csv, .tsv or .parquet.

    Parameters
    ----------
    scorer : Scorer
        Here or on a server. What a line says is its :meth:`Scores.record` or
        :meth:`TokenScores.record`.
    fields : sequence of str
        Fields to copy from the input, besides ``id``; ``("*",)`` copies all. One that has the
        name of an output field (``score``) is called ``input_score``.
    columns : mapping of str to str, optional
        Old to new names of the rows' fields, for what is scored; an empty new name leaves the field
        out. ``fields`` and ``completion_field`` are old and new ones.
    completion_field, terminated, on_error
        As in :meth:`RewardScorer.score`; with ``on_error="skip"`` a bad row gets an ``error``.
    **writing
        ``overwrite``, ``chunk_rows``, ``progress``, ``on_total``, ``processes``, ``whole`` and
        ``allow_empty``; see :class:`Writing`.

    Returns
    -------
    FileReport

    Raises
    ------
    DataError
        For a bad row (file and line), an input without rows or one that is a pipe, or an output
        that belongs to another run.
    """
    source = Path(input_path)
    reference = scorer.reference
    options: dict[str, Any] = {
        "fields": list(fields),
        "completion_field": completion_field,
        "terminated": terminated,
        "on_error": on_error,
    }
    if columns:  # (a run that was begun without them has no such option)
        options["columns"] = dict(columns)
    state = {
        "model": scorer.fingerprint(),
        "formatter": scorer.formatter.fingerprint(),
        "reference": None if reference is None else vars(reference),
        "readout": None if scorer.readout.kind == "scalar" else scorer.readout.to_dict(),
        "options": options,
    }
    report = write_in_chunks(
        source,
        output_path,
        lambda chunk: _score_chunk(scorer, source, chunk, **options),
        state,
        **writing,
    )
    add_up_counts(scorer.formatter, writing.get("processes"))
    return report


def write_in_chunks(
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    records_of: Callable[[Sequence[Line]], list[dict[str, Any]]],
    state: Mapping[str, Any],
    *,
    overwrite: bool = False,
    chunk_rows: int = 1024,
    progress: Progress | None = None,
    on_total: Progress | None = None,
    processes: PartialState | None = None,
    whole: bool = False,
    allow_empty: bool = False,
) -> FileReport:
    """Write one record for each row of a file, in order; go on where a run was stopped.

    Parameters
    ----------
    records_of : callable
        From a chunk of lines to as many records, each with its ``index``, and with an ``error`` if
        the row has no score.
    state : mapping
        What the records depend on besides the input, as JSON; a run goes on only if it is the same.
    input_path, output_path
        As for :func:`score_file`, with its errors.
    overwrite, chunk_rows, progress, on_total, processes, whole, allow_empty
        See :class:`Writing`.
    """
    source, target = Path(input_path), Path(output_path)
    if target.suffix == ".gz":
        raise DataError(f"{target}: the output is plain text, so that a stopped run can go on")
    check_output(target, source, regular=True)
    if chunk_rows < 1:
        raise DataError(f"chunk_rows is {chunk_rows}", "use a positive number")
    with contextlib.ExitStack() as stack:
        out: IO[bytes] | None = None
        part = target.with_name(f"{target.name}.part")

        def begin() -> tuple[int, int]:
            nonlocal out
            if whole and overwrite:
                target.unlink(missing_ok=True)
            written = part if whole and not target.exists() else target
            digest, rows = _input_digest(source)
            if not rows and not allow_empty:
                raise DataError(f"{source}: empty dataset, no rows", "check the file")
            now = {"version": _STATE_VERSION, "input": {"sha256": digest, "rows": rows}, **state}
            written.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(_locked(written))
            done = _resume(out, target, now, overwrite)
            if done > rows:
                raise DataError(f"{target}: has {done} rows, the input {rows}", _OVERWRITE)
            return rows, done

        rows, done = in_first_process(begin, processes)
        report = FileReport(rows=rows, resumed_at=done)
        if on_total is not None:
            on_total(rows)
        if progress is not None and done:
            progress(done)
        numbered = islice(enumerate(_lines(source)), done, None)
        at_a_time = chunk_rows * (1 if processes is None else processes.num_processes)
        while chunk := list(islice(numbered, at_a_time)):
            records = across_processes(chunk, records_of, processes)
            if out is not None:
                text = "".join(to_json(record) + "\n" for record in records).encode()
                try:
                    out.write(text)
                    out.flush()
                    os.fsync(out.fileno())
                except OSError as error:
                    raise unwritable(target, error) from error
            failed = sum("error" in record for record in records)
            report.without_score += failed
            report.scored += len(records) - failed
            if progress is not None:
                progress(len(records))
        read = report.resumed_at + report.scored + report.without_score
        if read != rows:
            raise DataError(
                f"{source}: {rows} rows were counted and {read} read: the file was changed "
                "meanwhile",
                "run again with --overwrite, when nothing writes to it any more",
            )
        if out is not None and part.exists():
            os.replace(part, target)
    return report


# ---------------------------------------------------------------------- input


def _lines(path: Path) -> Iterator[Place]:
    """Place and content of each row."""
    if file_format(path) not in (None, "jsonl"):
        yield from read_file(path)
        return
    with open_bytes(path) as file:
        for number, line in json_lines(file):
            yield f"{path} line {number}", line


def _input_digest(path: Path) -> tuple[str, int]:
    """SHA-256 of what the rows are, and their number."""
    digest, rows = hashlib.sha256(), 0
    for _, row in _lines(path):
        digest.update(row if isinstance(row, bytes) else to_json(_described(row)).encode())
        rows += 1
    return digest.hexdigest(), rows


def _described(row: dict[str, Any] | RowError) -> Any:
    return row if isinstance(row, dict) else [row.reason, row.field, row.detail]


def parse_line(place: Place) -> Any:
    """The row of a line or of a table.

    Raises
    ------
    DataError
        Names the place.
    """
    where, given = place
    try:
        row = parse_json(given) if isinstance(given, bytes) else given
        if isinstance(row, RowError):
            raise row
    except RowError as error:
        raise RowProblem.of(error, where).as_error() from error
    if not isinstance(row, (dict, str, list)):
        raise DataError(
            f"{where}: a {type(row).__name__}, not an object, a text or messages",
            "write an object with prompt and completion, or leave the line out",
        )
    return row


# ---------------------------------------------------------------------- output


def _score_chunk(
    scorer: Scorer[Any],
    source: Path,
    chunk: Sequence[Line],
    fields: Sequence[str],
    completion_field: str,
    terminated: bool | None,
    on_error: OnError,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    rows: list[Any] = []
    for _, place in chunk:
        try:
            rows.append(parse_line(place))
        except DataError as error:
            if on_error == "raise":
                raise
            rows.append(error)
    good = [i for i, row in enumerate(rows) if not isinstance(row, DataError)]
    names = [chunk[i][1][0] for i in good]
    given = [rows[i] for i in good]
    if columns:
        if not chunk[0][0]:
            _check_columns(given, columns, source)
        given = [
            rename_columns(row, columns, name) if isinstance(row, dict) else row
            for row, name in zip(given, names, strict=True)
        ]
    scores = scorer.score(
        given,
        terminated=terminated,
        field=completion_field,
        on_error=on_error,
        names=names,
    )
    records = []
    scored = iter(range(len(good)))
    for row, (index, _) in zip(rows, chunk, strict=True):
        record: dict[str, Any] = {"index": index}
        if isinstance(row, DataError):
            records.append({**record, "score": None, "error": row.what})
            continue
        if isinstance(row, dict):
            for key in list(row) if "*" in fields else ["id", *fields]:
                if key in row:  # a field of the input never passes for one of ours
                    record[f"input_{key}" if key in _OURS else key] = row[key]
        i = next(scored)
        reason = scores.reasons[i]
        record |= scores.record(i) if reason is None else {"score": None, "error": reason}
        records.append(record)
    return records


def _check_columns(rows: Sequence[Any], columns: Mapping[str, str], source: Path) -> None:
    """Refuse an old name that none of the first rows has: it is misspelt."""
    names = {key for row in rows if isinstance(row, dict) for key in row}
    if missing := [old for old in columns if old not in names]:
        raise DataError(
            f"{source}: no column {missing[0]!r} to rename",
            f"there are: {listed(names)}",
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The output, open for reading and appending, for this process and thread alone."""
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"{path}: another process is writing it", "wait for it") from error
    try:
        with open(path, "a+b") as file:
            yield file
    finally:
        lock.release()


def _resume(out: IO[bytes], path: Path, state: dict[str, Any], overwrite: bool) -> int:
    """Number of rows that stand whole in the output; cuts a torn last line; writes the state."""
    beside = path.with_name(path.name + ".state.json")
    size = out.seek(0, os.SEEK_END)
    if overwrite or size == 0:
        out.truncate(0)
        _write_state(beside, state)
        return 0
    if not beside.is_file():
        raise DataError(
            f"{path}: exists and was not begun by this command ({beside.name} is missing)",
            _OVERWRITE,
        )
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{beside}: no valid JSON: {error}", _OVERWRITE) from error
    now = json.loads(json.dumps(state))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise DataError(
            f"{path}: was begun with another {', another '.join(changed)}; going on would mix two "
            "runs in one file",
            _OVERWRITE,
        )
    rows, end, last = 0, 0, b""
    out.seek(0)
    for line in out:
        if not line.endswith(b"\n"):
            break
        rows, end, last = rows + 1, end + len(line), line
    out.truncate(end)
    out.seek(0, os.SEEK_END)
    if rows:
        try:
            index = json.loads(last)["index"]
        except (ValueError, KeyError, TypeError):
            index = None
        if index != rows - 1:
            raise DataError(
                f"{path} line {rows}: should hold row {rows - 1}, it was changed", _OVERWRITE
            )
    return rows


def _write_state(path: Path, state: dict[str, Any]) -> None:
    write_text(path, json.dumps(state, indent=2) + "\n")
