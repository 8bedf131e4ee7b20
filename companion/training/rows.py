"""From rows of any kind to rows of token ids, with a count of all that was dropped or cut.

Chapters 3 and 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from companion.errors import DataError, listed
from companion.formatting import REMARKS, Encoded, RewardFormatter
from companion.training.tokenising import tokenise_rows

#: fate of a row that was dropped for its length
OVERLONG = "dropped for their length"
#: fate of a pair that is kept, though nothing can be learned from it
IDENTICAL = "+with equal sides, which teach nothing"
#: columns of a row that is dropped
_NOTHING = {"row": -1, "length": 0, "cut": 0}


@dataclass
class FormatReport:
    """What became of the rows of one set.

    Attributes
    ----------
    source : str
        Name of the set.
    noun : str
        What a row is called.
    rows, kept, dropped_overlong : int
        Rows given, rows left, rows with a text above ``max_length`` that were dropped.
    truncated, tokens_cut : int
        Rows in which a prompt was cut, and tokens that were cut.
    identical : int or None
        Of pairs: those kept whose two sides are the same tokens.
    longest : int
        Tokens of the longest text that was kept.
    counts : dict of str to int, or None
        Of other kinds: what else was left out or found, in words that follow a number.
    remarks : dict of str to int, or None
        What the formatter noticed of the rows (:data:`companion.formatting.REMARKS`), if anything.
    """

    source: str
    noun: str = "pairs"
    rows: int = 0
    kept: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    identical: int | None = None
    longest: int = 0
    counts: dict[str, int] | None = None
    remarks: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts by name, without those of other kinds."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        del found["noun"]
        return found

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept:,} of {self.rows:,} {self.noun} kept"
        parts = []
        if self.dropped_overlong:
            parts.append(f"{self.dropped_overlong:,} {OVERLONG}")
        if self.truncated:
            parts.append(f"{self.truncated:,} with a cut prompt ({self.tokens_cut:,} tokens)")
        others = {IDENTICAL[1:]: self.identical, **(self.counts or {})}
        parts += [f"{count:,} {what}" for what, count in others.items() if count]
        remarks = (self.remarks or {}).items()
        parts += [f"{count:,} with {REMARKS[name]}" for name, count in remarks]
        return f"{text}; {', '.join(parts) or 'none dropped, none cut'}"


def check_columns(dataset: Dataset, wanted: Sequence[str], source: str, kind: str) -> None:
    """Refuse rows without the columns of their kind.

    Raises
    ------
    DataError
        With the columns that there are.
    """
    missing = [name for name in wanted if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"{source}: no column {' and no column '.join(map(repr, missing))}; there are: "
            f"{listed(dataset.column_names)}",
            f"load the rows with companion.data.load_rows(…, kind={kind!r})",
        )


def format_all(
    dataset: Dataset,
    formatter: RewardFormatter,
    convert: Callable[..., list[dict[str, Any]]],
    columns: Mapping[str, Any],
    *,
    source: str,
    noun: str,
    num_proc: int | None,
    **arguments: Any,
) -> tuple[Dataset, FormatReport]:
    """Tokenise rows of any kind in one pass, and count what became of them.

    Parameters
    ----------
    convert : callable
        ``convert(rows, names, formatter, **arguments)`` gives for each row its `columns`, with
        ``length`` (tokens) and ``cut`` (tokens cut); or, if it is dropped, no more than ``fate``:
        :data:`OVERLONG` or why, in words that follow a number. A fate that begins with "+" is
        counted, and the row is kept. ``remarks`` are those of :func:`remarks_of`. It must be a
        function of a module.
    columns : mapping of str to feature
        What the trainer reads.
    source, noun : str
        What to call the set, and its rows, in messages.
    num_proc : int, optional
        Processes; default :func:`companion.training.tokenising.default_processes`.

    Returns
    -------
    rows : Dataset
        The `columns`, ``row`` (index in the source) and ``length``.
    report : FormatReport

    Raises
    ------
    DataError
        For the first bad row, which it names, and if no row is left.
    """
    features = {**columns, "row": Value("int64"), "length": Value("int32"), "cut": Value("int32")}
    features |= {"fate": Value("string"), "remarks": Value("string")}
    rows = tokenise_rows(
        dataset,
        _format_batch,
        formatter,
        Features(features),
        kind=noun,
        source=source,
        num_proc=num_proc,
        arguments={"convert": convert, "columns": list(columns), "arguments": arguments},
    )
    # Arrow's own columns: of millions of rows, lists of Python's objects are no small matter
    table = rows.select_columns(["cut", "fate", "remarks", "length"]).with_format("arrow")[:]
    cut, fates = table["cut"].to_numpy(), _counts(table["fate"])
    dropped = [fate for fate in fates if fate and not fate.startswith("+")]
    kept = np.flatnonzero(~pc.is_in(table["fate"], pa.array(dropped, pa.string())).to_numpy())
    report = FormatReport(
        source,
        noun,
        rows=len(rows),
        kept=len(kept),
        dropped_overlong=fates[OVERLONG],
        truncated=int((cut > 0).sum()),
        tokens_cut=int(cut.sum()),
        longest=int(table["length"].to_numpy()[kept].max(initial=0)),
    )
    if noun == "pairs":
        report.identical = fates[IDENTICAL]
    else:
        report.counts = {}
        for fate, count in fates.items():
            if fate and fate != OVERLONG:
                name = fate.lstrip("+")
                report.counts[name] = report.counts.get(name, 0) + count
    remarks = Counter[str]()
    for names, count in _counts(table["remarks"]).items():
        remarks.update(dict.fromkeys(names.split(), count))
    report.remarks = {name: remarks[name] for name in REMARKS if remarks[name]} or None
    if not kept.size:
        cure = "look at the counts: are these rows of the right kind?"
        if report.dropped_overlong:
            cure = (
                "raise --max_length, or take --overlong truncate_prompt if it is the prompts "
                "that are long"
            )
        what = f"{report}: none is left to use"
        if noun == "pairs":
            long = f"a text of more than {formatter.max_length} tokens"
            what = f"{source}: all {len(rows):,} pairs have {long}, so none is left"
        raise DataError(what, cure)
    if len(kept) < len(rows):
        rows = rows.select(kept)
    return rows.remove_columns(["cut", "fate", "remarks"]), report


def _counts(texts: pa.ChunkedArray) -> Counter[str]:
    """How often each text stands there, in the order of the first."""
    return Counter({one["values"]: one["counts"] for one in pc.value_counts(texts).to_pylist()})


def _format_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    formatter: RewardFormatter,
    source: str,
    convert: Callable[..., list[dict[str, Any]]],
    columns: list[str],
    arguments: dict[str, Any],
) -> dict[str, list[Any]]:
    rows = [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]
    found = convert(rows, [f"{source}, row {i}" for i in indices], formatter, **arguments)
    own = ("row", "length", "cut", "fate", "remarks")
    out: dict[str, list[Any]] = {name: [] for name in (*columns, *own)}
    for index, item in zip(indices, found, strict=True):
        for name in out:
            out[name].append(item.get(name, _NOTHING.get(name)))
        out["row"][-1] = index
        out["fate"][-1] = item.get("fate", "")
        out["remarks"][-1] = item.get("remarks", "")
    return out


def remarks_of(*texts: Encoded | None) -> str:
    """What the formatter noticed of the texts of a row, each once."""
    return " ".join(sorted({name for text in texts if text is not None for name in text.remarks}))


def ids_feature() -> Any:
    """A list of token ids."""
    return List(Value("int32"))
