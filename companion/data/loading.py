"""``load_rows``: one door for every source and every form of data.

Every row is read, checked and brought to its kind before anything else happens, so a run does not
end in the middle of the night on line 40,000. Python objects do not pile up: the rows become Arrow
tables, a few thousand at a time, and many rows lie on the disk. Chapter 4.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

from companion.data.columns import array_of, exact_dataset, json_fields, mappings, reader_of
from companion.data.formats import (
    Conversion,
    Row,
    closing_notes,
    detect_kind,
    find_conversion,
    signature,
)
from companion.data.mixing import (
    MixSource,
    counts_of,
    drawn,
    is_mix,
    keep_recipe,
    read_mix,
    shuffled,
)
from companion.data.problems import SHOWN, LoadReport, RowError, RowProblem
from companion.data.published import own_columns
from companion.data.readers import Record
from companion.data.sources import open_source, source_name, split_name
from companion.data.splits import dataset_fingerprint, prompt_key
from companion.data.writing import plain_row
from companion.errors import DataError, listed
from companion.layouts import has_turns, rename_columns

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

logger = logging.getLogger(__name__)

_PROBE: Final = 256
_CHUNK: Final = 4096
_NONE_LEFT: Final = "give rows that hold a preference"
#: layout -> what to do if no row of it is left
_NO_PREFERENCE: Final = {
    "scores": "the answers to one prompt are compared: give several with different scores; or say "
    "which scores are right (label true or false), for an outcome model"
}
#: chunks that are in memory at a time; as many more make a file
_CHUNKS: Final = 16


def load_rows(
    source: Any,
    *,
    kind: str = "pairs",
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    margins: str = "given",
    on_error: str = "raise",
    revision: str | None = None,
) -> Dataset:
    """Load rows of one kind from anywhere; check every one.

    Parameters
    ----------
    source : str, path, Dataset, DatasetDict or list of dict
        A file (.jsonl, .json, .csv, .tsv, .parquet; text also .gz), a folder (``save_to_disk``, or
        data files by split), a glob, a hub id, several of these as a list (one set of rows), a
        mixture of sources by weight (.yaml, :mod:`companion.data.mixing`), or rows in memory.
    kind : str
        ``pairs``, ``rankings``, ``outcomes``, ``steps``, ``prompts`` (see
        :mod:`companion.data.formats`), or ``auto``: by the columns.
    split : str
        Of a hub dataset or a folder; a slice such as ``train[:1000]`` works for every source. A
        single file is one split, whatever its name.
    name : str, optional
        Configuration of a hub dataset.
    limit : int, optional
        Stop after this many rows of the result. What follows is not read, nor checked.
    columns : mapping of str to str, optional
        Old to new column names; an empty new name leaves the column out. Known layouts need none
        (:mod:`companion.layouts`).
    margins : {"given", "ratings", "none"}
        For pairs: keep a ``margin`` column, make it from ratings, or drop it.
    on_error : {"raise", "skip"}
        ``skip`` leaves bad rows out, counts them, and logs the counts.
    revision : str, optional
        Of a hub dataset.

    Returns
    -------
    datasets.Dataset
        Canonical rows; other columns are kept.

    Raises
    ------
    DataError
        Names the file, the row (line of JSONL, index elsewhere), the field and the cure, for up to
        five rows, with the counts of all.
    """
    return load_rows_with_report(
        source,
        kind=kind,
        split=split,
        name=name,
        limit=limit,
        columns=columns,
        margins=margins,
        on_error=on_error,
        revision=revision,
    )[0]


def load_rows_with_report(
    source: Any,
    *,
    kind: str = "pairs",
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    margins: str = "given",
    on_error: str = "raise",
    revision: str | None = None,
    max_problems: int = SHOWN,
) -> tuple[Dataset, LoadReport]:
    """As :func:`load_rows`, with the :class:`LoadReport` of what became of the rows."""
    settings: dict[str, Any] = {
        "split": split,
        "limit": limit,
        "columns": columns,
        "margins": margins,
        "on_error": on_error,
        "max_problems": max_problems,
    }
    if is_mix(source):
        return _load_mix(source, kind, **settings)
    return _load(source, kind, name=name, revision=revision, **settings)


def _load(
    source: Any,
    kind: str,
    *,
    split: str,
    name: str | None,
    limit: int | None,
    columns: Mapping[str, str] | None,
    margins: str,
    on_error: str,
    revision: str | None,
    max_problems: int,
    chat: bool = False,
) -> tuple[Dataset, LoadReport]:
    """The rows of one source; with `chat`, conversations, as in the rest of a mixture."""
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error={on_error!r}", "take raise or skip")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} keeps no rows", "give a positive number, or None for all")
    rename = dict(columns or {})
    label, raw = open_source(source, split=split, name=name, revision=revision, rename=rename)
    given: set[str] = set()
    records = ((where, _renamed(row, rename, where, given)) for where, row in raw)
    # The first rows show the columns and the usual form, so that an odd first row is the odd one.
    probe = list(islice(records, _PROBE))
    usable = [row for _, row in probe if isinstance(row, dict)]
    if not probe:
        raise DataError(f"{label}: empty dataset, no rows", "check the file and the split")
    names = _names(usable)
    if missing := [old for old in rename if old not in given]:
        raise DataError(
            f"{label}: no column {missing[0]!r} to rename",
            f"there are: {listed(given)}",
        )
    if usable:
        kind = detect_kind(names) if kind == "auto" else kind
        how = find_conversion(names, kind, margins)
        how.chat = chat or any(has_turns(row) for row in usable)
    else:
        how = Conversion(kind, "unreadable rows", margins)
    report = LoadReport(
        label, kind, how.layout, left_out=how.left_out, notes=how.notes, max_problems=max_problems
    )
    given_rows: Iterator[Record] = chain(probe, records)
    if how.layout == "scores" and kind != "scores":
        given_rows = _by_prompt(given_rows, how, report)
        how = replace(how, layout="rankings")
        probe = list(islice(given_rows, _PROBE))
        usable = [row for _, row in probe if isinstance(row, dict)]
        given_rows = chain(probe, given_rows)
    usual = _usual_signature(usable, how)
    builder = _TableBuilder()
    for record in given_rows:
        report.rows_read += 1
        for row in _convert(record, how, usual, report):
            builder.add(row, record[0])
        if limit is not None and builder.n_rows >= limit and split_name(split) == split:
            break
    closing_notes(how)
    if report.bad and on_error == "raise":
        raise report.error()
    if builder.n_rows == 0:
        reasons = ", ".join(f"{n:,} {why}" for why, n in (how.left_out + report.skipped).items())
        raise DataError(
            f"{label}: none of {report.rows_read:,} rows can be used ({reasons})",
            "\n    ".join(report.cures()) or _NO_PREFERENCE.get(report.layout, _NONE_LEFT),
        )
    dataset = _slice(builder.dataset(), split, limit)
    report.rows_kept = len(dataset)
    if report.skipped or report.left_out or report.notes:
        logger.warning(report.summary())
    return dataset, report


def _load_mix(
    source: str | os.PathLike[str],
    kind: str,
    *,
    split: str,
    limit: int | None,
    columns: Mapping[str, str] | None,
    max_problems: int,
    **settings: Any,
) -> tuple[Dataset, LoadReport]:
    """Rows of several sources by weight, each read by its own layout."""
    mix = read_mix(source)

    def load(one: MixSource, kind: str, chat: bool = False) -> tuple[Dataset, LoadReport]:
        return _load(
            one.dataset_name,
            kind,
            split=one.split or split_name(split),
            name=one.config,
            revision=one.revision,
            limit=one.limit,
            columns={**(columns or {}), **one.columns},
            max_problems=max_problems,
            chat=chat,
            **settings,
        )

    loaded: list[tuple[Dataset, LoadReport]] = []
    for one in mix.sources:
        loaded.append(load(one, loaded[0][1].kind if loaded else kind))
    forms = [signature(plain_row(rows[0])) for rows, _ in loaded]
    if any("messages" in form.values() for form in forms):
        for i, form in enumerate(forms):
            if "messages" not in form.values():
                loaded[i] = load(mix.sources[i], loaded[i][1].kind, chat=True)
    names = [source_name(one.dataset_name) for one in mix.sources]
    counts = counts_of(mix, [len(rows) for rows, _ in loaded], names)

    layout = f"a mixture by seed {mix.seed}"
    report = LoadReport(os.fspath(source), loaded[0][1].kind, layout, max_problems=max_problems)
    report.mix = {"seed": mix.seed, "rows": sum(counts), "sources": []}
    builder, usual, expected = _TableBuilder(), {}, {}  # type: ignore[var-annotated]
    for i, ((rows, own), one, n, place) in enumerate(
        zip(loaded, mix.sources, counts, names, strict=True)
    ):
        taken = rows.select(drawn(len(rows), n, mix.seed, i))
        for number, given in enumerate(taken):
            row = {key: value for key, value in plain_row(given).items() if value is not None}
            where = f"{place}, row {number} of those taken"
            try:
                expected = expected or signature(row)
                _check_signature(row, given, expected)
                _check_types(row, usual)
            except RowError as error:
                raise DataError(
                    f"the sources of {source} do not fit together: {RowProblem.of(error, where)}",
                    "give all of them prompts, and margins or none (margins='none'); leave other "
                    "columns out (columns: [id=])",
                ) from error
            builder.add(row, where)
        report.rows_read += own.rows_read
        for name in ("skipped", "left_out", "notes"):
            getattr(report, name).update(getattr(own, name))
        report.problems = [*report.problems, *own.problems][:max_problems]
        report.notes[f"taken of the {len(rows):,} of {place} (weight {float(one.weight):g})"] = n
        report.mix["sources"].append(
            {
                "source": place,
                "weight": float(one.weight),
                "held": len(rows),
                "taken": n,
                "sha256": dataset_fingerprint(taken),
            }
        )
    dataset = builder.dataset().select(shuffled(sum(counts), mix.seed))
    dataset = _slice(dataset, split, limit)
    keep_recipe(dataset, report.mix)
    report.rows_kept = len(dataset)
    logger.warning(report.summary())
    return dataset, report


def _names(rows: list[Row]) -> set[str]:
    """The columns of the rows, by the companion's names where another is published."""
    found: set[str] = set()
    for row in rows:
        own: list[Mapping[str, Any]] = [row]
        with suppress(RowError):
            own = own_columns(row, Counter())
        found.update(column for one in own for column in one)
    return found


def _renamed(
    given: Row | RowError, rename: Mapping[str, str], where: str, seen: set[str]
) -> Row | RowError:
    if isinstance(given, RowError) or not rename:
        return given
    seen.update(given)
    return rename_columns(given, rename, where)


def _by_prompt(records: Iterable[Record], how: Conversion, report: LoadReport) -> Iterator[Record]:
    """Scored answers as one ranking for each prompt; bad rows as they are.

    All rows are read, and kept in memory, before the first ranking is there.
    """
    found: dict[str, tuple[str, Row]] = {}
    lost: dict[str, None] = {}
    for where, given in records:
        one = how.afresh()
        try:
            if isinstance(given, RowError):
                raise given
            (row,) = one(given)
            key = prompt_key(row)
        except RowError as error:
            yield where, error
            continue
        how.notes.update(one.notes)
        report.rows_read += 1
        ranking = {"prompt": row["prompt"], "completions": [], "ratings": []}
        _, ranking = found.setdefault(key, (where, ranking))
        ranking["completions"].append(row["completion"])
        ranking["ratings"].append(row["score"])
        lost.update(dict.fromkeys(row.keys() - {"prompt", "completion", "score"}))
    if lost:
        how.notes[f"of each scored answer only text and score kept, not {', '.join(lost)}"] += 1
    for where, ranking in found.values():
        if len(ranking["completions"]) < 2:
            how.left_out["answers that are alone with their prompt"] += 1
            continue
        report.rows_read -= 1  # whoever reads it counts it
        yield where, ranking


def _usual_signature(rows: list[Row], how: Conversion) -> dict[str, str]:
    """The most frequent form of each field among the first rows."""
    trial = how.afresh()
    seen: dict[str, Counter[str]] = {}
    for row in rows:
        with suppress(RowError):
            for converted in trial(row)[:1]:
                types = {f"type of {key}": kind for key, kind in _types(converted)}
                for key, value in (signature(converted) | types).items():
                    seen.setdefault(key, Counter())[value] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in seen.items()}


#: columns whose form :func:`companion.data.formats.signature` says
_CANONICAL: Final = frozenset(
    ("prompt", "chosen", "rejected", "completion", "completions", "labels", "ranks", "ratings")
)


def _types(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What Arrow must find in all rows of the other columns, where it does not take anything."""
    for key, value in row.items():
        if key not in _CANONICAL and (kind := _type(value)):
            yield key, kind


def _type(value: Any) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "large number"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)) and not any(mappings([value])):
        inner = set(map(_type, value)) - {None}
        return f"list of {' and '.join(sorted(map(str, inner)))}" if inner else None
    return None


def _check_types(row: Row, usual: dict[str, str]) -> None:
    for key, found in _types(row):
        if "large" in found:
            raise RowError("number too large", key)
        expected = usual.setdefault(f"type of {key}", found)
        if " and " in found:
            raise RowError("mixed types", key, found)
        if found != expected:
            raise RowError("mixed types", key, f"{found} here, {expected} in other rows")


def _convert(
    record: Record, how: Conversion, usual: dict[str, str], report: LoadReport
) -> list[Row]:
    where, given = record
    one = how.afresh()  # a row that fails half-way must not leave its notes behind
    try:
        if isinstance(given, RowError):
            raise given
        rows = one(given)
        for row in rows:
            _check_signature(row, given, usual)
            _check_types(row, usual)
    except RowError as error:
        report.add(RowProblem.of(error, where))
        return []
    how.notes.update(one.notes)
    how.left_out.update(one.left_out)
    return rows


def _check_signature(row: Row, given: Row, usual: dict[str, str]) -> None:
    for name, found in signature(row).items():
        expected = usual.setdefault(name, found)
        if found == expected:
            continue
        if found == "none":
            raise RowError("null" if name in given else "missing field", name, "other rows have it")
        if expected == "none":
            raise RowError("mixed types", name, "other rows have no such field")
        raise RowError("mixed types", name, f"{found} here, {expected} in other rows")


def _slice(dataset: Dataset, split: str, limit: int | None) -> Dataset:
    """``train[:10%]`` by the rules of `datasets`, and the limit."""
    base = split_name(split)
    if base != split:
        from datasets import ReadInstruction

        try:
            parts = ReadInstruction.from_spec(split).to_absolute({base: len(dataset)})
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"split {split!r}: {error}", "write e.g. train[:100] or train[:10%]"
            ) from error
        keep = [i for part in parts for i in range(len(dataset))[part.from_ : part.to]]
        if not keep:
            raise DataError(f"split {split!r} holds none of {len(dataset):,} rows")
        dataset = dataset.select(keep)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


class _TableBuilder:
    """Rows to Arrow, in chunks; many chunks to files, which are mapped into memory.

    ``Dataset.from_list`` drops columns that the first row lacks, and ``Dataset.from_generator``
    keeps the types of the first chunk, in which a column may be null. The files lie where
    `datasets` keeps its own temporary ones (``TMPDIR``), and go when the process ends.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        #: the first tables, as files that other processes can open
        self._stored: list[MemoryMappedTable] = []
        self._rows: list[Row] = []
        self._places: list[str] = []
        self._tables: list[pa.Table] = []
        self._first_places: list[str] = []

    def add(self, row: Row, where: str) -> None:
        self._rows.append(row)
        self._places.append(where)
        self.n_rows += 1
        if len(self._rows) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        if not self._rows:
            return
        arrays: dict[str, pa.Array] = {}
        for column in dict.fromkeys(key for row in self._rows for key in row):
            values = [row.get(column) for row in self._rows]
            try:
                arrays[column] = array_of(values)
            except (pa.ArrowException, OverflowError) as error:
                place, detail = _odd_one(values, self._places)
                raise DataError(
                    f"{place}, field {column!r}: mixed types ({detail}; {error})",
                    "give the column one type in all rows, or remove it",
                ) from error
        self._tables.append(pa.table(arrays))
        self._first_places.append(self._places[0])
        self._rows, self._places = [], []
        if len(self._tables) >= len(self._stored) + _CHUNKS:
            self._store()

    def _store(self) -> None:
        """Move the tables that are in memory to a file."""
        import pyarrow as pa  # type: ignore[import-untyped]
        from datasets.fingerprint import get_temporary_cache_files_directory
        from datasets.table import MemoryMappedTable

        files = len(self._stored)
        self._tables[files:] = [pa.concat_tables(self._alike(self._tables[files:]))]
        handle, path = tempfile.mkstemp(".arrow", "rows-", get_temporary_cache_files_directory())
        with open(handle, "wb") as file, pa.ipc.new_stream(file, self._tables[-1].schema) as writer:
            writer.write_table(self._tables[-1])
        self._stored.append(MemoryMappedTable.from_file(path))
        self._tables[-1] = self._stored[-1].table

    def dataset(self) -> Dataset:
        from datasets.table import InMemoryTable, concat_tables

        self._flush()
        blocks: list[Any] = [InMemoryTable(table) for table in self._alike(self._tables)]
        for place, stored in enumerate(self._stored):
            if stored.table.schema == blocks[place].schema:
                blocks[place] = stored
        return exact_dataset(concat_tables(blocks))

    def _alike(self, tables: list[pa.Table]) -> list[pa.Table]:
        """The tables with the columns and types of all of them."""
        import pyarrow as pa  # type: ignore[import-untyped]

        tables = _agreed(tables)
        try:
            # Permissive: a column that is null in one chunk takes its type from another.
            head = pa.concat_tables([t.slice(0, 0) for t in tables], promote_options="permissive")
            return [
                table
                if table.schema == head.schema
                else pa.concat_tables([head, table], promote_options="permissive")
                for table in tables
            ]
        except pa.ArrowException as error:
            raise DataError(
                f"mixed types: the chunks that begin at {', '.join(self._first_places[:3])} … "
                f"do not fit together ({error})",
                "give each column one type in all rows, or remove it",
            ) from error


def _agreed(tables: list[pa.Table]) -> list[pa.Table]:
    """A field that is JSON in one table is JSON in all."""
    import pyarrow as pa  # type: ignore[import-untyped]

    found: dict[str, set[str]] = {}
    for table in tables:
        for field in table.schema:
            found.setdefault(field.name, set()).update(json_fields(field.type))
    agreed = []
    for table in tables:
        for place, field in enumerate(table.schema):
            missing = found[field.name] - json_fields(field.type)
            if missing and not pa.types.is_null(field.type):
                values = map(reader_of(field.type), table.column(place).to_pylist())
                array = array_of(list(values), found[field.name])
                table = table.set_column(place, field.name, array)
        agreed.append(table)
    return agreed


def _odd_one(values: list[Any], places: list[str]) -> tuple[str, str]:
    """The first value whose type is not the usual one."""
    types = [type(value).__name__ for value in values if value is not None]
    usual = Counter(types).most_common(1)[0][0] if types else "null"
    for value, place in zip(values, places, strict=True):
        if value is not None and type(value).__name__ != usual:
            return place, f"{type(value).__name__} here, {usual} in other rows"
    return places[0], f"{usual} of several shapes"
