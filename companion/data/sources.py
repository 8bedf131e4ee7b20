"""From a name to rows: a file, a folder, a dataset of the hub, or rows in memory. Chapter 4."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from companion.data.columns import exact, reader_of
from companion.data.readers import Record, file_format, read_file, refuse_pipe
from companion.errors import DataError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def looks_like_path(source: str) -> bool:
    """True for a string that can be no hub id: its form or its suffix says that it is a path."""
    if source.startswith((".", "~", os.sep)) or "\\" in source or source.endswith("/"):
        return True
    return file_format(Path(source)) is not None or _HUB_ID.fullmatch(source) is None


def split_name(split: str) -> str:
    """``train`` of ``train[:100]``."""
    return split.split("[", 1)[0]


def open_source(
    source: Any,
    *,
    split: str,
    name: str | None,
    revision: str | None,
    rename: Mapping[str, str],
) -> tuple[str, Iterator[Record]]:
    """A label for messages, and the raw rows.

    Raises
    ------
    DataError
        If there is nothing under that name.
    """
    if isinstance(source, Mapping):  # such as a DatasetDict
        return f"split {split_name(split)!r}", _rows(_pick(source, split, "the mapping"), "dataset")
    if several := _several(source):
        return source_name(source), _open_several(
            several, split=split, name=name, revision=revision, rename=rename
        )
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise DataError(
                f"cannot load rows from {type(source).__name__}",
                "give a path, a hub id, a Dataset, or a list of dicts",
            )
        return "dataset", _rows(source, "dataset")
    text = os.fspath(source)
    path = Path(text).expanduser()
    refuse_pipe(path)
    if path.is_file():
        return path.name, read_file(path, rename)
    if path.is_dir():
        return str(text), _open_folder(path, split, rename)
    if isinstance(source, os.PathLike) or looks_like_path(text):
        raise DataError(
            f"missing file: there is no file or folder {text!r} (looked in {Path.cwd()})",
            "check the path; it is taken from the folder that the command runs in",
        )
    return text, _rows(_load_hub(text, split_name(split), name, revision), text)


def source_name(source: Any) -> str:
    """What to call a source in a table or a manifest: its path or id, or those of several."""
    return ", ".join(map(os.fspath, source)) if _is_names(source) else str(source)


def _is_names(source: Any) -> bool:
    return (
        isinstance(source, (list, tuple))
        and bool(source)
        and all(isinstance(one, (str, os.PathLike)) for one in source)
    )


def _several(source: Any) -> list[Any]:
    """The names of several sources, or of the files of a glob; empty for anything else."""
    if _is_names(source):
        return list(source)
    if not isinstance(source, (str, os.PathLike)):
        return []
    path = Path(source).expanduser()
    if not glob.has_magic(str(path)) or path.exists():
        return []
    return sorted(found for found in glob.glob(str(path), recursive=True) if Path(found).is_file())


def _open_several(sources: Sequence[Any], **settings: Any) -> Iterator[Record]:
    names = Counter(Path(source).name for source in sources)
    for source in sources:
        label, records = open_source(source, **settings)
        twice = names[Path(source).name] > 1  # the rows of such files are called by their paths
        for where, row in records:
            yield where.replace(label, str(source), 1) if twice else where, row


def _rows(dataset: Iterable[Mapping[str, Any]], label: str) -> Iterator[Record]:
    read: dict[str, Callable[[Any], Any]] = {}
    if isinstance(dataset, Dataset):
        dataset = read_exactly = exact(dataset)
        schema = read_exactly.features.arrow_schema
        read = {field.name: reader_of(field.type, decode=False) for field in schema}
    for index, row in enumerate(dataset):
        if isinstance(row, Mapping):
            yield (
                f"{label}, row {index}",
                {k: read[k](v) if k in read else v for k, v in row.items()},
            )
        else:
            raise DataError(f"{label}, row {index}: {type(row).__name__} in place of a mapping")


def _pick(splits: Mapping[str, Any], split: str, label: str) -> Any:
    if split_name(split) not in splits:
        raise DataError(
            f"{label} has no split {split_name(split)!r}",
            f"take one of: {', '.join(map(str, splits))}",
        )
    return splits[split_name(split)]


def _open_folder(path: Path, split: str, rename: Mapping[str, str]) -> Iterator[Record]:
    """A folder of ``save_to_disk`` (Dataset or DatasetDict), or of data files."""
    from datasets import load_from_disk
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:  # damage shows as many types: KeyError, OSError, ArrowInvalid
            raise DataError(
                f"{path}: no readable `datasets` folder ({type(error).__name__}: {error})",
                "write it again with save_to_disk",
            ) from error
        if isinstance(loaded, dict):
            loaded = _pick(loaded, split, str(path))
        yield from _rows(loaded, path.name)
        return
    try:
        # The rules of load_dataset: `train-00000-of-00002.parquet`, `data/test.jsonl`, …
        patterns = get_data_patterns(str(path))
        found = DataFilesDict.from_patterns(patterns, base_path=str(path))
    except (EmptyDatasetError, FileNotFoundError):
        found = {}
    splits: dict[str, list[Path]] = {}
    for key, names in found.items():
        files = [Path(str(item)) for item in names if file_format(Path(str(item))) is not None]
        # In a folder of data files, JSON beside other formats describes them (metadata, reports).
        other = [file for file in files if file_format(file) != "json"]
        if other or files:
            splits[str(key)] = sorted(other or files)
    if not splits:
        raise DataError(
            f"{path}: a folder without data (.jsonl, .json, .parquet, .csv, `datasets` folder)",
            "give the folder that save_to_disk wrote, a folder of data files, or one file",
        )
    for file in _pick(splits, split, str(path)):
        yield from read_file(file, rename)


def _load_hub(source: str, split: str, name: str | None, revision: str | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    local = f"there is no file or folder {source!r} here"
    try:
        return load_dataset(source, name, split=split, revision=revision)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{local}, and the Hugging Face hub has no dataset of that name, or hides it ({error})",
            "check the name; for a private or gated one log in with `hf auth login`",
        ) from error
    except (ConnectionError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        why = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{local}, and the Hugging Face hub cannot be reached to look for it there ({why})",
            "check the name; go online; or fetch it elsewhere, save_to_disk, and give the folder",
        ) from error
    except ValueError as error:  # unknown split or configuration: the text lists those there are
        raise DataError(f"hub dataset {source!r}: {error}", "set split and name") from error
