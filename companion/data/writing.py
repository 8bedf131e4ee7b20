"""Rows to a file, by suffix; the same rows always give the same bytes (JSONL, CSV). Chapter 4."""

from __future__ import annotations

import csv
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
from companion.errors import DataError


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the null keys that Arrow adds to messages; what is in them stays."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if v is not None} if "role" in value else value
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_json(value: Any) -> str:
    """JSON that any tool reads: UTF-8, one line; dates and other types as text, NaN as null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file appears under its own name only when it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
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
