"""One pass of the formatter over many rows: in several processes, and not twice for the same rows.

What a trainer reads of a large file is the same on every run and every rank. So the token ids of
many rows are kept in the cache of `datasets`, under a key of all that decides them: the rows, the
tokenizer, the chat template, ``max_length``, what happens to long texts, and the versions of the
code. Ranks of one machine share the work: the first one does it, the others wait and read.
Chapter 4.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import datasets
import multiprocess
import pyarrow as pa
import xxhash
from datasets import Dataset, Features
from filelock import FileLock, Timeout

from companion.data.pages import sparing
from companion.data.writing import write_text
from companion.formatting import RewardFormatter

logger = logging.getLogger(__name__)

#: Ids of fewer rows are made faster than they are found again.
CACHE_FROM: Final = 5_000
#: Rows that a process must have to be worth its start.
ROWS_A_PROCESS: Final = 4_000
#: More processes wait for the one that gathers.
MOST_PROCESSES: Final = 16
_PACKAGE: Final = Path(__file__).parents[1]


def tokenise_rows(
    dataset: Dataset,
    function: Callable[..., dict[str, list[Any]]],
    formatter: RewardFormatter,
    features: Features,
    *,
    kind: str,
    source: str,
    num_proc: int | None,
    arguments: Mapping[str, Any],
) -> Dataset:
    """Turn rows into rows of token ids, a batch at a time, by the one formatter.

    Parameters
    ----------
    dataset : Dataset
    function : callable
        ``function(batch, indices, formatter=…, source=…, **arguments)`` gives the columns of
        `features`; it must be a function of a module, since processes are sent it.
    formatter : RewardFormatter
    features : Features
        All columns of the result.
    kind : str
        What the rows are; a part of the key, as are the `arguments`.
    source : str
        How to call the set in messages.
    num_proc : int, optional
        Processes; default :func:`default_processes`.

    Returns
    -------
    Dataset
        From the cache, if there are :data:`CACHE_FROM` rows or more, the tokenizer is a fast one,
        and `datasets` may cache (``datasets.disable_caching()`` forbids it, ``HF_DATASETS_CACHE``
        says where).

    Raises
    ------
    DataError
        For the first bad row, which it names.
    """
    key = cache_key(dataset, formatter, kind, arguments, features)
    # a tokenizer in Python may do what neither vocabulary nor probe shows
    may_keep = bool(formatter.tokenizer.is_fast) and datasets.is_caching_enabled()
    with _cache_file(key, source, keep=may_keep and len(dataset) >= CACHE_FROM) as file:
        if num_proc is None:
            num_proc = default_processes(len(dataset), alone=file is not None)
        if file is not None:
            _drop_unless_whole(file, source)
        made = dataset.map(
            function,
            batched=True,
            with_indices=True,
            fn_kwargs={"formatter": formatter, "source": source, **arguments},
            remove_columns=dataset.column_names,
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=key,
            load_from_cache_file=may_keep,
            cache_file_name=None if file is None else str(file),
            desc=f"Tokenising {source}",
        )
        if file is not None:
            _seal(file)
        return made


def _seal_of(file: Path) -> Path:
    return file.with_suffix(".xxh3")


def _digest_of(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as data:
        while part := data.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _drop_unless_whole(file: Path, source: str) -> None:
    """Remove a file of token ids that is not as it was written: damaged, or altered since.

    Arrow reads altered numbers as they are, and a model would be trained on other texts.
    """
    seal = _seal_of(file)
    if not file.exists():
        return
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if seal.read_text(encoding="ascii").strip() == _digest_of(file):
            return
    if seal.exists():  # (one of an earlier version has none)
        logger.warning(f"{source}: the token ids in {file} were damaged or altered: made anew")
    file.unlink(missing_ok=True)
    seal.unlink(missing_ok=True)


def _seal(file: Path) -> None:
    """Note what was written, for the next run."""
    if file.exists() and not _seal_of(file).exists():
        with contextlib.suppress(OSError):
            write_text(_seal_of(file), _digest_of(file) + "\n")


def default_processes(rows: int, *, alone: bool = True) -> int:
    """Processes that tokenise so many rows: one for 4,000 of them, at most one a core.

    Parameters
    ----------
    alone : bool
        False where every rank of the machine tokenises for itself: each then has its share of the
        cores.

    Returns
    -------
    int
        1 where new processes do not begin as a copy of this one (macOS, Windows): they would run
        the user's script again.
    """
    if multiprocess.get_all_start_methods()[0] != "fork":
        return 1
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if not alone:
        cores //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(cores, rows // ROWS_A_PROCESS, MOST_PROCESSES))


def cache_key(
    dataset: Dataset,
    formatter: RewardFormatter,
    kind: str,
    arguments: Mapping[str, Any],
    features: Features,
) -> str:
    """SHA-256 (32 hexadecimal digits) of all that decides the token ids."""
    parts = {
        "code": _code_digest(),
        "versions": [importlib.metadata.version(n) for n in ("transformers", "tokenizers")],
        "recipe": formatter.fingerprint(),
        "tokenizer": _tokenizer_digest(formatter.tokenizer),
        "day": formatter.day,  # in the recipe, but for one from before
        "kind": kind,
        "arguments": sorted((name, _as_text(value)) for name, value in arguments.items()),
        "features": repr(features),
        "rows": rows_digest(dataset),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _as_text(value: Any) -> str:
    """Of a function its name and its whole file: another version of it makes other ids."""
    if not callable(value):
        return repr(value)
    file = Path(value.__code__.co_filename)
    code = file.read_bytes() if file.is_file() else value.__code__.co_code
    return f"{value.__module__}.{value.__qualname__} {hashlib.sha256(code).hexdigest()}"


def rows_digest(dataset: Dataset) -> str:
    """SHA-256 over the rows themselves, wherever they were loaded from."""
    digest = hashlib.sha256(repr(dataset.features).encode())
    tables = dataset.with_format("arrow").iter(batch_size=10_000)
    for table in sparing(tables, dataset, rows=10_000):
        table = table.replace_schema_metadata(None).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


#: what makes token ids of rows, beside the tokenizer and the file of the kind
_CODE: Final = (
    "formatting/*.py",
    "functional/labels.py",
    "layouts.py",
    "training/rows.py",
)


@functools.cache
def _code_digest() -> str:
    """Of the code that makes the ids, so that those of other code are not read.

    Raises
    ------
    FileNotFoundError
        If there is no such file: a change of code that has moved would go unseen.
    """
    digest = hashlib.sha256()
    for pattern in _CODE:
        files = sorted(_PACKAGE.glob(pattern))
        if not files:
            raise FileNotFoundError(f"{_PACKAGE / pattern}: no such code")
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str | None:
    """Of the whole tokenizer: vocabulary, merges, normaliser, and what it puts around a text."""
    if not tokenizer.is_fast:
        return None
    text = tokenizer.backend_tokenizer.to_str()
    # padding and truncation are as the last call left them, and each call says its own
    head, _, rest = text.partition('"added_tokens":')
    if not set(json.loads(head + '"end":0}')) <= {"version", "truncation", "padding", "end"}:
        rest = text
    own = f"{type(tokenizer).__name__} {getattr(tokenizer, 'split_special_tokens', None)} "
    return hashlib.sha256((own + rest).encode()).hexdigest()


@contextlib.contextmanager
def _cache_file(key: str, source: str, *, keep: bool) -> Iterator[Path | None]:
    """Where the ids lie or will lie, locked; None if they are not to be kept, or cannot be."""
    if not keep:
        yield None
        return
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "reward-model-companion"
    lock = FileLock(folder / f"{key}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info(f"{source}: waiting for a process that tokenises the same rows")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning(f"{source}: token ids are not kept for the next run: {error}")
        yield None
        return
    try:
        yield folder / f"{key}.arrow"
    finally:
        lock.release()
