"""Rows to a file, by suffix; the same rows always give the same bytes (JSONL, CSV). Chapter 4."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from companion.data.readers import file_format
from companion.errors import DataError, system_fault


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the null keys that Arrow adds to messages; what is in them stays."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if v is not None} if "role" in value else value
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_json(value: Any) -> str:
    """JSON that any tool reads: UTF-8, one line; dates and other types as text.

    Half of a surrogate pair, which has no UTF-8, is written as JSON's escape; a number that is not
    finite, which JSON has not, as null.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str, allow_nan=False)
    return text


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(path: str | os.PathLike[str], *inputs: Any, regular: bool = False) -> None:
    """Fail before the work, not after it, if a file cannot be written, or is an input.

    Parameters
    ----------
    path : str or path
        To be written; its folder is made.
    *inputs : str, path, list of them, or None
        What is read, by any path: a file by another name (a link) is the same file; of a pattern
        (``*.jsonl``) all that it finds. Names that are no files (hub ids, None) are passed over.
    regular : bool
        Refuse devices and pipes, which can be neither gone on with nor replaced.

    Raises
    ------
    DataError
    """
    target = Path(path)
    if target.is_dir():
        raise DataError(f"{target} is a folder", "name a file in it")
    for source in _each(inputs):
        if _same_file(target, source):
            raise DataError(
                f"{source}: input and output are the same file",
                "give another output: what is read would be overwritten",
            )
    if regular and target.exists() and not target.is_file():
        raise DataError(f"{target}: is a device or a pipe, not a file", "name a file")
    above = next(place for place in target.parents if os.path.lexists(place))
    if not above.is_dir():
        raise DataError(f"cannot write to {target}: {above} is no folder", "name another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{target}: its folder cannot be made ({error.strerror})", "name another place"
        ) from error
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise DataError(f"{target}: may not be written", "name a place that you may write to")


def _each(inputs: Iterable[Any]) -> Iterator[Any]:
    for source in inputs:
        if isinstance(source, (list, tuple)):
            yield from _each(source)
        elif source is not None:
            yield source
            if glob.has_magic(str(source)):
                yield from glob.glob(str(source), recursive=True)


def _same_file(one: Path, other: Any) -> bool:
    try:
        if os.path.samefile(one, other):
            return not one.is_char_device()  # (/dev/null, twice)
    except (OSError, ValueError):
        pass
    try:
        return one.resolve() == Path(other).resolve()  # (neither is there yet)
    except (OSError, ValueError, RuntimeError):
        return False


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file appears under its own name only when it is whole.

    A device or a pipe that is there (/dev/stdout) is written to, and not replaced.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text as UTF-8, whole or not at all; folders are made. Returns the path.

    Raises
    ------
    DataError
        If it cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            # (half of a surrogate pair, which a row may hold, has no UTF-8)
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise unwritable(target, error) from error
    return target


def unwritable(target: Path, error: OSError) -> DataError:
    """The error of a file that could not be written."""
    fault = system_fault(error)
    return DataError(
        f"{target}: cannot be written ({error.strerror or error})",
        None if fault is None else fault.cure,
    )


def write_rows(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> int:
    """Write rows as .jsonl, .json, .csv (each also .gz) or .parquet; return their number.

    The file appears under its name only when it is whole.

    Raises
    ------
    DataError
        For a suffix that names no format, or a folder that cannot be written.
    """
    target = Path(path)
    kind = file_format(target)
    if kind is None or (kind == "parquet" and target.suffix == ".gz"):
        raise DataError(
            f"{target}: cannot tell the format from the name",
            "end it with .jsonl, .jsonl.gz, .json, .csv or .parquet",
        )
    plain = [plain_row(row) for row in rows]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            if kind == "parquet":
                _write_parquet(plain, part)
            else:
                _write_text(plain, part, kind, packed=target.suffix == ".gz")
    except OSError as error:
        raise unwritable(target, error) from error
    return len(plain)


def _write_text(rows: list[dict[str, Any]], part: Path, kind: str, *, packed: bool) -> None:
    with open(part, "wb") as raw:
        # mtime=0 and no name inside: the same rows give the same bytes.
        binary: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        with io.TextIOWrapper(binary, encoding="utf-8", newline="") as handle:
            if kind == "jsonl":
                handle.writelines(to_json(row) + "\n" for row in rows)
            elif kind == "json":
                handle.write("[\n" + ",\n".join(map(to_json, rows)) + "\n]\n")
            else:
                header = list(dict.fromkeys(key for row in rows for key in row))
                writer = csv.writer(handle, delimiter="\t" if kind == "tsv" else ",")
                writer.writerow(header)
                writer.writerows([_cell(row.get(key)) for key in header] for row in rows)


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else to_json(value)


def _write_parquet(rows: list[dict[str, Any]], part: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    from companion.data.columns import array_of  # loads `datasets`, which takes seconds

    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        table = pa.table({key: array_of([row.get(key) for row in rows]) for key in columns})
    except pa.ArrowException as error:
        raise DataError(f"Parquet cannot hold these rows ({error})", "write .jsonl") from error
    pq.write_table(table, part)
