"""From rows of pairs to rows of token ids, with a count of all that was dropped or cut.

Chapter 4.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from companion.errors import DataError
from companion.formatting import RewardFormatter
from companion.training.tokenising import tokenise_rows

logger = logging.getLogger(__name__)

IDS = ("chosen_ids", "rejected_ids")


@dataclass
class FormatReport:
    """What became of the rows of one set.

    Attributes
    ----------
    source : str
        Name of the set.
    rows, kept, dropped_overlong : int
        Rows given, rows left, rows with a text above ``max_length`` that were dropped.
    truncated, tokens_cut : int
        Rows in which a prompt was cut, and tokens that were cut.
    identical : int
        Kept rows whose two sides are the same tokens: nothing can be learned from them.
    longest : int
        Tokens of the longest text that was kept.
    """

    source: str
    rows: int = 0
    kept: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    identical: int = 0
    longest: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept:,} of {self.rows:,} pairs kept"
        parts = []
        if self.dropped_overlong:
            parts.append(f"{self.dropped_overlong:,} dropped for their length")
        if self.truncated:
            parts.append(f"{self.truncated:,} with a cut prompt ({self.tokens_cut:,} tokens)")
        if self.identical:
            parts.append(f"{self.identical:,} with equal sides, which teach nothing")
        return f"{text}; {', '.join(parts) or 'none dropped, none cut'}"


def is_formatted(dataset: Any) -> bool:
    """Whether the rows hold token ids already."""
    return all(name in dataset.column_names for name in IDS)


def format_pairs(
    dataset: Dataset,
    formatter: RewardFormatter,
    *,
    source: str = "pairs",
    num_proc: int | None = None,
    allow_empty: bool = False,
) -> tuple[Dataset, FormatReport]:
    """Tokenise pairs with the one formatter.

    Parameters
    ----------
    dataset : datasets.Dataset
        Rows with ``chosen`` and ``rejected``, optionally ``prompt`` and ``margin``.
    formatter : RewardFormatter
        Its ``max_length`` and ``overlong`` say what happens to long texts.
    source : str
        How to call the set in messages.
    num_proc : int, optional
        Processes; default :func:`companion.training.tokenising.default_processes`.
    allow_empty : bool
        Return no rows in place of an error if none is left.

    Returns
    -------
    rows : datasets.Dataset
        ``chosen_ids``, ``rejected_ids``, ``row`` (index in the source), ``length`` (of the longer
        side) and ``margin`` if the source has one.
    report : FormatReport

    Raises
    ------
    DataError
        For a bad row, which it names; a margin that is missing or not finite; and if no row is
        left.
    """
    missing = [name for name in ("chosen", "rejected") if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"{source}: no column {' and no column '.join(map(repr, missing))}; there are: "
            f"{', '.join(dataset.column_names)}",
            "load the rows with companion.data.load_rows, which knows the usual formats",
        )
    has_margin = "margin" in dataset.column_names
    features = {name: List(Value("int32")) for name in IDS}
    features |= {"row": Value("int64"), "length": Value("int32")}
    features |= {"cut": Value("int32"), "same_length": Value("bool")}
    if has_margin:
        features["margin"] = Value("float32")
    rows = tokenise_rows(
        dataset,
        _format_batch,
        formatter,
        Features(features),
        kind="pairs",
        source=source,
        num_proc=num_proc,
        arguments={"has_margin": has_margin},
    )
    cut = rows["cut"][:]
    lengths = rows["length"][:]
    report = FormatReport(
        source,
        rows=len(dataset),
        kept=len(rows),
        dropped_overlong=len(dataset) - len(rows),
        truncated=sum(c > 0 for c in cut),
        tokens_cut=sum(cut),
        identical=_identical(
            rows.with_format("arrow")[:], np.asarray(rows["same_length"][:], dtype=bool)
        ),
        longest=max(lengths, default=0),
    )
    if not len(rows) and not allow_empty:
        raise DataError(
            f"{source}: all {len(dataset):,} pairs have a text of more than "
            f"{formatter.max_length} tokens, so none is left",
            "raise --max_length, or take --overlong truncate_prompt if it is the prompts that "
            "are long",
        )
    return rows.remove_columns(["cut", "same_length"]), report


def _identical(table: Any, same_length: np.ndarray) -> int:
    """How many rows of an Arrow table hold the same ids on both sides."""
    places = np.flatnonzero(same_length)
    pairs = zip(*(table[name].take(places).to_pylist() for name in IDS), strict=True)
    return sum(chosen == rejected for chosen, rejected in pairs)


def _format_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    formatter: RewardFormatter,
    source: str,
    has_margin: bool,
) -> dict[str, list[Any]]:
    rows = [
        {name: values[i] for name, values in batch.items() if values[i] is not None}
        for i in range(len(indices))
    ]
    pairs = formatter.encode_pairs(rows, names=[f"{source}, row {i}" for i in indices])
    out: dict[str, list[Any]] = {"chosen_ids": [], "rejected_ids": [], "row": [], "length": []}
    out |= {"cut": [], "same_length": []}
    if has_margin:
        out["margin"] = []
    for index, row, pair in zip(indices, rows, pairs, strict=True):
        if has_margin:
            _check_margin(row.get("margin"), f"{source}, row {index}")
        if pair is None:
            continue
        chosen, rejected = pair
        out["chosen_ids"].append(chosen.input_ids)
        out["rejected_ids"].append(rejected.input_ids)
        out["row"].append(index)
        out["length"].append(max(len(chosen), len(rejected)))
        out["cut"].append(chosen.cut_tokens + rejected.cut_tokens)
        out["same_length"].append(len(chosen) == len(rejected))
        if has_margin:
            out["margin"].append(float(row["margin"]))
    return out


def _check_margin(value: Any, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(
            f"{where}, field 'margin': {value!r} is no finite number",
            "give every pair a number, or leave the column out (--margins none)",
        )


def check_formatted(
    dataset: Dataset, *, max_length: int | None, source: str
) -> tuple[Dataset, FormatReport]:
    """Check rows that hold token ids already, and count what is longer than ``max_length``.

    Raises
    ------
    DataError
        For an empty sequence, a margin that is not finite, or if no row is left.
    """
    report = FormatReport(source, rows=len(dataset))
    table = dataset.select_columns(list(IDS)).with_format("arrow")[:]
    sizes = [pc.list_value_length(table[name]).to_numpy() for name in IDS]
    empty = np.flatnonzero((sizes[0] == 0) | (sizes[1] == 0))
    if empty.size:
        raise DataError(f"{source}, row {empty[0]}: a side has no tokens", "drop empty texts")
    if "margin" in dataset.column_names:
        for index, value in enumerate(dataset["margin"][:]):
            _check_margin(value, f"{source}, row {index}")
    lengths = np.maximum(*sizes)
    keep = np.flatnonzero(lengths <= (max_length if max_length is not None else math.inf))
    report.longest = int(lengths[keep].max(initial=0))
    report.identical = _identical(table.take(keep), sizes[0][keep] == sizes[1][keep])
    report.kept = len(keep)
    report.dropped_overlong = report.rows - report.kept
    if not report.kept:
        raise DataError(
            f"{source}: all {report.rows:,} pairs have a side of more than {max_length} tokens, so "
            "none is left",
            "raise --max_length",
        )
    return (dataset if report.kept == report.rows else dataset.select(keep)), report
