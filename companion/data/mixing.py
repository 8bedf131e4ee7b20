"""A mixture of sources by weight: exact counts, drawn by a seed that is said.

``datasets.interleave_datasets`` draws the source of each row by chance, so that its counts are
those of the weights on average only, and it ends by its stopping strategy, not at a number of rows;
``concatenate_datasets`` has no weights. Here the counts are a division of the whole by the largest
remainder, and which rows are taken depends on the seed and the place of the source alone.
Chapter 4.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from companion.errors import DataError
from companion.layouts import columns_of

if TYPE_CHECKING:
    from datasets import Dataset

#: what a file of a mixture is called
SUFFIXES: Final = (".yaml", ".yml")
_CURE: Final = (
    "write e.g.\n"
    "      seed: 0\n"
    "      rows: 10000\n"
    "      sources:\n"
    "        - {dataset_name: a.jsonl, weight: 0.7}\n"
    "        - {dataset_name: org/data, weight: 0.3, split: train, columns: [question=prompt]}"
)


@dataclass(frozen=True)
class MixSource:
    """One source of a mixture.

    Attributes
    ----------
    dataset_name : str or list of str
        A file, a glob, several of them, a folder or a hub id.
    weight : Fraction
        Its share of the rows, before they are divided by the sum of all weights.
    split, config, revision, limit
        As of :func:`companion.load_rows`; `split` by default that of the mixture.
    columns : dict of str to str
    repeat : bool
        Its rows may be taken more than once.
    """

    dataset_name: str | list[str]
    weight: Fraction
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    repeat: bool = False


@dataclass(frozen=True)
class Mix:
    """A mixture, as its file says.

    Attributes
    ----------
    sources : list of MixSource
    seed : int
        Of which rows are taken, and of their order.
    rows : int or None
        Rows in all; None: as many as there are without taking one twice.
    """

    sources: list[MixSource]
    seed: int = 0
    rows: int | None = None


def is_mix(source: Any) -> bool:
    """Whether a source of rows is the file of a mixture."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() in SUFFIXES


def read_mix(path: str | os.PathLike[str]) -> Mix:
    """Read the file of a mixture.

    Raises
    ------
    DataError
        Names the source, the key and the cure.
    """
    import yaml

    file = Path(path).expanduser()
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file", "check the path") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: is no valid YAML: {error}", _CURE) from error
    top = _checked(given, f"{file}", {"sources": list, "seed": int, "rows": int}, ("sources",))
    if top.get("rows", 1) < 1 or top.get("seed", 0) < 0 or not top["sources"]:
        raise DataError(f"{file}: no rows, no sources, or a seed below 0", _CURE)
    return Mix(
        [_source(one, f"{file}, source {i}") for i, one in enumerate(top["sources"])],
        top.get("seed", 0),
        top.get("rows"),
    )


def _source(given: Any, where: str) -> MixSource:
    kinds: dict[str, Any] = {
        "dataset_name": (str, list),
        "weight": (int, float),
        "columns": (list, dict),
        "limit": int,
        "repeat": bool,
        **dict.fromkeys(("split", "config", "revision"), str),
    }
    found = _checked(given, where, kinds, ("dataset_name", "weight"))
    weight = found["weight"]
    if not 0 < weight < float("inf"):
        raise DataError(f"{where}: weight is {weight}", "give a positive number")
    name = found["dataset_name"]
    if not name or not all(isinstance(one, str) for one in name):
        raise DataError(f"{where}: dataset_name is {name!r}", _CURE)
    columns = found.get("columns", {})
    if isinstance(columns, list):
        columns = columns_of(map(str, columns))
    found["columns"] = {str(old): str(new or "") for old, new in columns.items()}
    return MixSource(**{**found, "weight": Fraction(str(weight))})


def _checked(
    given: Any, where: str, kinds: Mapping[str, Any], needed: Sequence[str]
) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise DataError(f"{where}: a {type(given).__name__}, not keys and values", _CURE)
    for name in needed:
        if given.get(name) is None:
            raise DataError(f"{where}: {name!r} is missing", _CURE)
    for name, value in given.items():
        if name not in kinds:
            raise DataError(f"{where}: no key {name!r}", f"there are: {', '.join(kinds)}")
        kind = kinds[name]
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise DataError(f"{where}: {name} is {value!r}, a {type(value).__name__}", _CURE)
    return {name: value for name, value in given.items() if value is not None}


def exact_counts(weights: Sequence[Fraction], rows: int) -> list[int]:
    """How many rows of each source: whole numbers that add up to `rows`, by the largest remainder.

    Each differs from its share by less than one. Of equal remainders the first is rounded up.
    """
    whole = sum(weights, Fraction())
    shares = [weight * rows / whole for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: rows - sum(counts)]:
        counts[i] += 1
    return counts


def counts_of(mix: Mix, held: Sequence[int], names: Sequence[str]) -> list[int]:
    """How many rows are taken of sources that hold so many.

    Raises
    ------
    DataError
        If a source holds fewer than are asked for, and may not repeat.
    """
    weights = [one.weight for one in mix.sources]
    whole = sum(weights, Fraction())
    bounds = [
        int(n * whole / one.weight)
        for one, n in zip(mix.sources, held, strict=True)
        if not one.repeat
    ]
    most = min(bounds) if bounds else sum(held)
    counts = exact_counts(weights, most if mix.rows is None else mix.rows)
    for one, n, count, name in zip(mix.sources, held, counts, names, strict=True):
        if count > n and not one.repeat:
            raise DataError(
                f"the mixture asks for {count:,} rows of {name}, which holds {n:,}",
                f"ask for {most:,} rows in all, lower its weight, or say 'repeat: true' there",
            )
        if count == 0:
            raise DataError(
                f"the mixture takes none of {name}: its share of {sum(counts):,} rows is below one",
                "raise its weight or the rows, or leave it out",
            )
    return counts


def drawn(held: int, count: int, seed: int, place: int) -> list[int]:
    """Indices of the rows that are taken of a source: each as often as another, up to one."""
    rng = np.random.default_rng((seed, place))
    rounds = [rng.permutation(held) for _ in range(-(-count // held))]
    return np.concatenate(rounds)[:count].tolist()  # type: ignore[no-any-return]


def shuffled(rows: int, seed: int) -> list[int]:
    """The order of all rows."""
    return np.random.default_rng((seed, rows)).permutation(rows).tolist()  # type: ignore[no-any-return]


def keep_recipe(dataset: Dataset, recipe: Mapping[str, Any]) -> None:
    """Write what a mixture was made of into the dataset; its selections and copies keep it."""
    dataset.info.description = json.dumps({"mix": recipe})


def recipe_of(dataset: Dataset) -> dict[str, Any] | None:
    """What :func:`keep_recipe` wrote, or None for rows that are no mixture."""
    text = dataset.info.description or ""
    return json.loads(text)["mix"] if text.startswith('{"mix": ') else None  # type: ignore[no-any-return]
