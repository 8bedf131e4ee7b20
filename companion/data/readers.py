"""Raw rows with their places, from files of every format.

A reader yields a :data:`Record`: the row, or what was wrong with the line. It checks nothing else.
What makes a whole file unusable (missing, cut short, not what its name says) raises DataError.
Chapter 4.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

from companion.data.messages import is_printed
from companion.data.problems import RowError, RowProblem
from companion.errors import DataError

#: suffix (without .gz) -> format
FORMATS: Final = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}

_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")


#: The place of a row of a source, and the row or what is wrong with it.
Record = tuple[str, dict[str, Any] | RowError]


def file_format(path: Path) -> str | None:
    """``jsonl``, ``json``, ``csv``, ``tsv`` or ``parquet`` by the name; None for anything else."""
    name = path.name.lower().removesuffix(".gz")
    return FORMATS.get(Path(name).suffix)


def read_file(path: Path, rename: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Rows of one file.

    Parameters
    ----------
    path : Path
    rename : mapping of str to str, optional
        Old to new column names. CSV needs them to know how to read a cell; rows keep the old ones.

    Raises
    ------
    DataError
        For a file that is missing, damaged, no text, or of no known format.
    """
    kind = file_format(path)
    if kind is None:
        known = ", ".join(FORMATS)
        raise DataError(
            f"{path}: cannot tell the format from the name",
            f"name it with one of {known} (text may end in .gz too)",
        )
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    with open_bytes(path) as handle:
        if kind == "jsonl":
            yield from _read_jsonl(handle, path.name)
            return
        text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
        if kind == "json":
            yield from _read_json(text, path.name)
        else:
            yield from _read_csv(text, path.name, "\t" if kind == "tsv" else ",", rename or {})


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and row of each row of one file; the first that is none is an error."""
    for where, row in read_file(path):
        if isinstance(row, RowError):
            raise RowProblem.of(row, where).as_error() from row
        yield where, row


def refuse_pipe(path: Path) -> None:
    """Refuse a pipe or a device: who counts rows first, or asks whether it is gzip, reads twice.

    Raises
    ------
    DataError
        Before it is opened, which would wait for a writer.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(
            f"{path}: is a pipe or a device, and the rows are read more than once",
            "write them to a file first, and give that",
        )


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if gzip; damage becomes a DataError with the file's name."""
    refuse_pipe(path)
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"  # by content: `.jsonl` files are sometimes gzip
        opened: Any = gzip.open if packed else open
        with opened(path, "rb") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name}: not UTF-8 text (byte {error.object[error.start]:#04x})",
            "convert it, e.g. iconv -f latin1 -t utf-8",
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path.name}: the gzip file is damaged or cut short ({error})", "copy it again"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file", "check the path") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


#: deepest row: Arrow has types of 64 levels, and who walks by recursion comes to an end
_DEEPEST: Final = 50


class _NoJson(ValueError):
    """NaN or Infinity, which Python reads and JSON does not know."""


def _refuse_constant(name: str) -> Any:
    raise _NoJson(name)


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_json(text: bytes | str) -> Any:
    """The value of one JSON text that any reader takes.

    Raises
    ------
    RowError
        Also for NaN and Infinity, half of a surrogate pair (valid JSON, but no text that can be
        stored), integers of more digits than Python reads, and what is nested too deeply.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = _DECODER.decode(text)
        _check_value(value, text)
    except json.JSONDecodeError as error:
        raise RowError("malformed JSON", None, f"{error.msg} at column {error.colno}") from error
    except _NoJson as error:
        given = json.loads(text)
        items = given.items() if isinstance(given, dict) else ()
        field = next((key for key, item in items if _holds_constant(item)), None)
        raise RowError("malformed JSON", field, f"{error} is no JSON") from error
    except UnicodeError as error:
        raise RowError("malformed JSON", None, error.reason) from error  # type: ignore[attr-defined]
    except ValueError as error:  # digits of an integer
        raise RowError("malformed JSON", None, str(error).split(";")[0]) from error
    except RecursionError as error:
        raise RowError("nested too deeply") from error
    return value


def _check_value(value: Any, text: str) -> None:
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    if text.count("[") + text.count("{") > _DEEPEST:
        level, depth = [value], 0
        while level := [
            item
            for one in level
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, (dict, list))
        ]:
            depth += 1
            if depth > _DEEPEST:
                raise RecursionError


def _holds_constant(value: Any) -> bool:
    """Whether NaN or an infinity stands anywhere in it."""
    if isinstance(value, (dict, list)):
        return any(map(_holds_constant, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


def json_lines(handle: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank, without a byte order mark.

    Bytes, so that only a line feed ends a line (U+2028 inside a text does not).
    """
    for number, line in enumerate(handle, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield number, line


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        value = RowError("not a row", None, f"{type(value).__name__} in place of an object")
    return where, value


def _read_jsonl(handle: Iterable[bytes], name: str) -> Iterator[Record]:
    for number, line in json_lines(handle):
        where = f"{name}, line {number}"
        try:
            value = parse_json(line)
        except RowError as error:
            yield where, error
        else:
            yield _record(value, where)


def _read_json(handle: TextIO, name: str) -> Iterator[Record]:
    """A list of objects, an object that holds one list of them, or JSON lines by another name."""
    text = handle.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and isinstance(_from_json(first), dict):
            yield from _read_jsonl((line.encode() for line in text.split("\n")), name)
            return
        raise DataError(
            f"{name}: malformed JSON at line {error.lineno}, column {error.colno} ({error.msg})",
            "mend the file; a file with one object a line should be named .jsonl",
        ) from error
    except (ValueError, RecursionError) as error:  # an integer's digits; depth
        why = str(error).split(";")[0]
        raise DataError(
            f"{name}: cannot be read ({why})", "write JSONL, which names the row"
        ) from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if {"prompt", "chosen", "rejected", "completion", "instruction", "question", "a"} & set(
            value
        ):
            value = [value]
        elif len(lists) == 1:
            value = lists[0]
        else:
            raise DataError(
                f"{name}: an object with {len(lists)} lists, so the rows cannot be found",
                "write a list of objects, or JSONL",
            )
    if not isinstance(value, list):
        raise DataError(f"{name}: holds no rows", "write a list of objects, or JSONL")
    for index, item in enumerate(value):
        where = f"{name}, row {index}"
        try:
            yield _record(parse_json(json.dumps(item)), where)
        except RowError as error:
            yield where, error


def _read_csv(
    handle: TextIO, name: str, delimiter: str, rename: Mapping[str, str]
) -> Iterator[Record]:
    """CSV by the standard library: pandas would read the text ``NA`` as a missing value.

    Fields of the companion get their types (numbers, true and false, JSON lists, messages as JSON);
    another column becomes numbers or booleans if all its cells are; ``id`` and ``subset`` stay
    text.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
    try:
        header = list(reader.fieldnames or [])
    except csv.Error as error:
        raise DataError(f"{name}: malformed CSV in the header ({error})", "mend it") from error
    if len(set(header)) < len(header):
        raise DataError(
            f"{name}: two columns have the same name ({', '.join(header)})", "rename one of them"
        )
    records: list[Record] = []
    while True:
        where = f"{name}, row {len(records)} (line {reader.line_num + 1})"
        try:
            row: dict[Any, Any] | None = next(reader, None)
        except csv.Error as error:
            # The rest cannot be trusted: a quote that never closes swallows what follows.
            raise DataError(
                f"{where}: malformed CSV ({error})", "close the quotes; double those inside a cell"
            ) from error
        if row is None:
            break
        if None in row or None in row.values():
            detail = f"{'more' if None in row else 'fewer'} cells than the header's {len(header)}"
            records.append((where, RowError("malformed CSV", None, detail)))
        else:
            records.append((where, row))
    rows = [row for _, row in records if isinstance(row, dict)]
    for column in header:
        cells = [row[column] for row in rows]
        read = _CELLS.get(rename.get(column, column))
        values = _guess(cells) if read is None else [read(cell) for cell in cells]
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    yield from records


def _from_json(cell: str) -> Any:
    """The cell's value; a cell that is no JSON stays text."""
    try:
        return parse_json(cell)
    except RowError:
        return cell


def _text_or_messages(cell: str) -> Any:
    return _from_json(cell) if is_printed(cell) else cell


def _number(cell: str) -> float | str | None:
    try:
        return float(cell)
    except ValueError:
        return cell if cell.strip() else None


_LABELS: Final = {"true": True, "false": False, "1": 1, "0": 0, "": None}
#: How the cells of a field are read; those of another column are guessed from the whole column.
_CELLS: Final[dict[str, Callable[[str], Any]]] = {
    **dict.fromkeys(
        (
            *("prompt", "chosen", "rejected", "completion", "a", "b", "instruction", "input"),
            *("question", "query", "context", "messages", "conversations", "output"),
            *("rejected_response", "rejected_messages", "chosen_response", "response"),
            *("conversation_a", "conversation_b", "response1", "response2", "response_0"),
            *("response_1", "response_2", "response_a", "response_b"),
        ),
        _text_or_messages,
    ),
    **dict.fromkeys(("id", "subset", "source", "licence", "preference", "winner", "system"), str),
    **dict.fromkeys(
        (
            *("completions", "labels", "ranks", "ratings", "scores", "rest", "history"),
            *("tools", "chat_template_kwargs"),
        ),
        lambda cell: _from_json(cell) if cell.strip() else None,
    ),
    "margin": _number,
    "label": lambda cell: _LABELS.get(cell.strip().lower(), cell),
}


def _guess(cells: list[str]) -> list[Any]:
    filled = [cell for cell in cells if cell != ""]
    longest = max(map(len, filled), default=0)  # (Python reads 4,300 digits)
    if filled and longest < 400 and all(_NUMBER.fullmatch(cell) for cell in filled):
        return [json.loads(cell) if cell else None for cell in cells]
    if filled and all(cell.lower() in ("true", "false") for cell in filled):
        return [cell.lower() == "true" if cell else None for cell in cells]
    return list(cells)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    from companion.data.columns import reader_of  # loads `datasets`, which takes seconds

    try:
        file = pq.ParquetFile(path)
        read = {field.name: reader_of(field.type) for field in file.schema_arrow}
        batches = file.iter_batches(batch_size=1024)
        for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{path.name}, row {index}", {k: read[k](v) for k, v in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name}: no readable Parquet file ({error})", "copy it again"
        ) from error
