"""What the rows of all kinds share on their way to token ids: a report, and one pass over them.

Chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, List, Value

from companion.errors import DataError
from companion.formatting import RewardFormatter
from companion.training.rows import FormatReport
from companion.training.tokenising import tokenise_rows

Batch = dict[str, list[Any]]


@dataclass
class KindReport(FormatReport):
    """As :class:`companion.training.rows.FormatReport`, for rows that are no pairs.

    Attributes
    ----------
    noun : str
        What a row is called.
    counts : dict of str to int
        What else was left out or found, in words.
    """

    noun: str = "rows"
    counts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The counts by name."""
        data = super().to_dict()
        del data["noun"], data["identical"]
        return data

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept:,} of {self.rows:,} {self.noun} kept"
        parts = []
        if self.dropped_overlong:
            parts.append(f"{self.dropped_overlong:,} dropped for their length")
        if self.truncated:
            parts.append(f"{self.truncated:,} with a cut prompt ({self.tokens_cut:,} tokens)")
        parts += [f"{count:,} {text}" for text, count in self.counts.items() if count]
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
            f"{', '.join(dataset.column_names)}",
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
) -> tuple[Dataset, KindReport]:
    """Tokenise rows of any kind in one pass, and count what became of them.

    Parameters
    ----------
    convert : callable
        ``convert(rows, names, formatter, **arguments)`` gives for each row its `columns`, with
        ``length`` (tokens) and ``cut`` (tokens cut); or, if it is dropped, no more than ``fate``:
        :data:`OVERLONG` or why, in words that follow a number. A fate that begins with "+" is
        counted, and the row is kept.
    columns : mapping of str to feature
        What the trainer reads.

    Raises
    ------
    DataError
        For the first bad row, which it names, and if no row is left.
    """
    features = {**columns, "row": Value("int64"), "length": Value("int32"), "cut": Value("int32")}
    features["fate"] = Value("string")
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
    fates = rows["fate"][:]
    report = KindReport(source, rows=len(rows), noun=noun)
    kept = [i for i, fate in enumerate(fates) if not fate or fate.startswith("+")]
    report.kept = len(kept)
    report.dropped_overlong = fates.count(OVERLONG)
    for fate in fates:
        if fate and fate != OVERLONG:
            report.counts[fate.lstrip("+")] = report.counts.get(fate.lstrip("+"), 0) + 1
    cut = rows["cut"][:]
    report.truncated, report.tokens_cut = sum(c > 0 for c in cut), sum(cut)
    if not kept:
        cure = "look at the counts: are these rows of the right kind?"
        if report.dropped_overlong:
            cure = (
                "raise --max_length, or take --overlong truncate_prompt if it is the prompts "
                "that are long"
            )
        raise DataError(f"{report}: none is left to use", cure)
    rows = rows.select(kept).remove_columns(["cut", "fate"])
    report.longest = max(rows["length"][:], default=0)
    return rows, report


#: fate of a row that was dropped for its length
OVERLONG = "dropped for their length"
#: columns of a row that is dropped
_NOTHING = {"row": -1, "length": 0, "cut": 0}


def _format_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    formatter: RewardFormatter,
    source: str,
    convert: Callable[..., list[dict[str, Any]]],
    columns: list[str],
    arguments: dict[str, Any],
) -> Batch:
    rows = [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]
    found = convert(rows, [f"{source}, row {i}" for i in indices], formatter, **arguments)
    out: Batch = {name: [] for name in (*columns, "row", "length", "cut", "fate")}
    for index, item in zip(indices, found, strict=True):
        for name in out:
            out[name].append(item.get(name, _NOTHING.get(name)))
        out["row"][-1] = index
        out["fate"][-1] = item.get("fate", "")
    return out


def ids_feature() -> Any:
    """A list of token ids."""
    return List(Value("int32"))
