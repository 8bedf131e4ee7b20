"""Splits by prompt, and reports of what would make a held-out figure a lie.

Pairs of one prompt share its difficulty and often a completion. Split by row, a prompt stands on
both sides, and the held-out accuracy measures memory (chapter 9, 'correlated pairs'). Here a
prompt's side is a hash of its text and the seed: it depends on no other row, so new data never move
an old prompt from test to train. Chapter 1.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any, TypeVar, cast

import numpy as np

from companion.data.messages import plain
from companion.data.pages import sparing
from companion.errors import DataError

Rows = TypeVar("Rows")
Key = str | Callable[[Mapping[str, Any]], str]


def normalise(text: str) -> str:
    """Unicode NFKC, lower case, white space as single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(row: Mapping[str, Any]) -> str:
    """SHA-256 of the normalised prompt: equal for prompts that a reader would call the same.

    A single user message counts as its text, so a file of texts and one of messages compare. A pair
    without a prompt takes what both texts share, up to the last line break (or blank) in it;
    that is a guess, and the reports count such rows.
    """
    prompt = row.get("prompt")
    if prompt is None:
        prompt = _shared_text(row)
    if not isinstance(prompt, str):
        turns = [(message["role"], _words(message.get("content"))) for message in prompt]
        if len(turns) == 1 and turns[0][0] == "user":
            prompt = turns[0][1]
        else:
            prompt = "\x1e".join(f"{role}\x1f{content}" for role, content in turns)
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()


def _words(content: Any) -> str:
    """Content as text; blocks (``[{"type": "text", …}]``) as JSON."""
    return content if isinstance(content, str) else json.dumps(content) if content else ""


def _shared_text(row: Mapping[str, Any]) -> str:
    if not isinstance(row.get("chosen"), str) or not isinstance(row.get("rejected"), str):
        raise DataError("a row without a prompt cannot be split by prompt", "add a prompt field")
    both = zip(row["chosen"], row["rejected"], strict=False)
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], both))
    cut = max(shared.rfind("\n"), 0) or max(shared.rfind(" "), 0)
    return shared[:cut] or "\x1d".join(sorted((row["chosen"], row["rejected"])))


def _keys(rows: Iterable[Mapping[str, Any]], key: Key) -> Iterator[str]:
    if isinstance(key, str):
        for place, row in enumerate(rows):
            if row.get(key) is None:
                raise DataError(
                    f"row {place}, field {key!r}: missing, so the row has no group to stay with",
                    "name a column that all rows have",
                )
            yield str(row[key])
        return
    if key is prompt_key and "prompt" in getattr(rows, "column_names", ()):
        prompts = cast(Any, rows).select_columns(["prompt"])  # decoding the texts is the cost
        if not any(row["prompt"] is None for row in sparing(prompts)):
            rows = prompts
    yield from map(key, sparing(rows))


def _unit(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone, on every machine."""
    digest = hashlib.sha256(f"{seed}\x00{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split_by_prompt(
    dataset: Rows,
    test_fraction: float = 0.1,
    *,
    seed: int = 0,
    key: Key = prompt_key,
    exact: bool = False,
) -> tuple[Rows, Rows]:
    """Split rows so that all rows of a prompt stand on one side.

    Parameters
    ----------
    dataset : Dataset or list of dict
    test_fraction : float
        Share of *prompts* in the test part, 0 < f < 1, up to chance.
    seed : int
        Another seed, another split.
    key : callable or str
        What keeps rows together: :func:`prompt_key`, a function of the row, or a column's name.
    exact : bool
        Fill the test part with whole prompts in the order of their hash until it holds the share
        of *rows*. A prompt may then change sides when rows are added.

    Returns
    -------
    train, test : same type as ``dataset``
        In the order of the source.

    Raises
    ------
    DataError
        If one side is empty.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction={test_fraction}", "give a number between 0 and 1")
    rows = cast(Iterable[Mapping[str, Any]], dataset)
    # a place in [0, 1) is all that is kept of a key: eight bytes for a row
    places = np.fromiter((_unit(name, seed) for name in _keys(rows, key)), np.float64)
    distinct, counts = np.unique(places, return_counts=True)
    if exact:
        wanted = round(test_fraction * len(places))
        tested = distinct[np.cumsum(counts) - counts < wanted]
    else:
        tested = distinct[distinct < test_fraction]
    is_test = places <= (tested[-1] if tested.size else -1.0)
    if is_test.all() or not is_test.any():
        side = "train" if is_test.any() else "test"
        raise DataError(
            f"the {side} part is empty: {len(places):,} rows with {len(distinct):,} different "
            f"prompts, test_fraction={test_fraction}",
            "take another fraction or seed, exact=True, or more prompts",
        )
    train, test = (np.flatnonzero(side) for side in (~is_test, is_test))
    return _take(dataset, train), _take(dataset, test)


def _take(dataset: Any, indices: np.ndarray) -> Any:
    if hasattr(dataset, "select"):
        return dataset.select(indices)
    return [dataset[i] for i in indices]


def completion_texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The normalised completions of a row, in their order."""
    values = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
    values += row.get("completions") or []
    return tuple(_said(value) for value in values)


def _said(value: Any) -> str:
    text = normalise(plain(value))
    calls = (
        [] if isinstance(value, str) else [m["tool_calls"] for m in value if m.get("tool_calls")]
    )
    return text + json.dumps(calls, sort_keys=True, default=str) if calls else text


def text_hash(text: str) -> int:
    """Eight bytes in place of a text: of a hundred million, two alike are one chance in 3,000."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def short_prompt(row: Mapping[str, Any]) -> str:
    """The prompt on one line, for showing."""
    text = " ".join(plain(row["prompt"] if row.get("prompt") else row.get("chosen", "")).split())
    return text if len(text) <= 80 else text[:79] + "…"


class _Printable:
    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a JSON file."""
        return asdict(cast(Any, self))


@dataclass
class DuplicateReport(_Printable):
    """How often prompts and rows repeat within one set.

    Attributes
    ----------
    rows, prompts : int
        Rows, and different prompts (by :func:`prompt_key`).
    largest : int
        Rows of the most frequent prompt.
    repeated_rows : int
        Rows whose prompt and completions stood in an earlier row.
    contradictions : int
        Pairs that stand the other way round in an earlier row. People who disagree are no mistake,
        but no model can be right on both.
    without_prompt : int
        Rows whose prompt is a guess.
    examples : list of (str, int)
        The most frequent prompts, with their number of rows.
    """

    rows: int
    prompts: int
    largest: int
    repeated_rows: int
    contradictions: int
    without_prompt: int
    examples: list[tuple[str, int]] = field(default_factory=list)

    def notes(self, noun: str = "rows") -> list[str]:
        """What a run of training should say of it; nothing if nothing repeats."""
        found = []
        if self.repeated_rows:
            found.append(f"{self.repeated_rows:,} of {self.rows:,} {noun} repeat an earlier one")
        if self.contradictions:
            found.append(
                f"{self.contradictions:,} of {self.rows:,} pairs contradict an earlier pair (the "
                "same two, the other way round): no model can be right on both"
            )
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} rows, {self.prompts:,} different prompts, "
            f"at most {self.largest:,} rows each",
            f"{self.repeated_rows:,} rows repeat an earlier row, "
            f"{self.contradictions:,} pairs contradict an earlier pair",
        ]
        if self.without_prompt:
            lines.append(f"{self.without_prompt:,} rows without a prompt: grouped by shared text")
        lines += [f"  {n:,} × {text}" for text, n in self.examples if n > 1]
        return "\n".join(lines)


class RowHashes:
    """Of each row its prompt, its whole, and the whole turned round, as hashes of eight bytes."""

    def __init__(self) -> None:
        self.hashes, self.without_prompt = array("Q"), 0

    def add(self, row: Mapping[str, Any], key: str) -> list[int]:
        """Add a row with its :func:`prompt_key`; the hashes of its texts."""
        texts = [text_hash(text) for text in completion_texts(row)]
        turned = texts[::-1] if "chosen" in row else texts
        self.hashes.extend(
            (text_hash(key), text_hash(f"{key} {texts}"), text_hash(f"{key} {turned}"))
        )
        self.without_prompt += row.get("prompt") is None
        return texts

    def duplicates(self, rows: Any, n_examples: int = 3) -> DuplicateReport:
        """What repeats; `rows` are looked at for the examples alone."""
        prompts, whole, turned_round = np.array(self.hashes, np.uint64).reshape(-1, 3).T
        _, begins, counts = np.unique(prompts, return_index=True, return_counts=True)
        distinct, first = np.unique(whole, return_index=True)
        # where the other way round of each new row stands first, if it does
        found = np.searchsorted(distinct, turned_round[first]).clip(max=max(len(distinct) - 1, 0))
        contradicts = (distinct[found] == turned_round[first]) & (first[found] < first)
        most = np.lexsort((begins, -counts))[:n_examples].tolist()
        return DuplicateReport(
            rows=len(whole),
            prompts=len(counts),
            largest=int(counts.max(initial=0)),
            repeated_rows=len(whole) - len(distinct),
            contradictions=int(contradicts.sum()),
            without_prompt=self.without_prompt,
            examples=[(short_prompt(rows[int(begins[i])]), int(counts[i])) for i in most],
        )


def duplicate_report(rows: Iterable[Mapping[str, Any]], *, n_examples: int = 3) -> DuplicateReport:
    """Count prompts and rows that repeat, and pairs that contradict each other."""
    if n_examples and not isinstance(rows, Sequence) and not hasattr(rows, "select"):
        rows = list(rows)
    hashes = RowHashes()
    for row in rows:
        hashes.add(row, prompt_key(row))
    return hashes.duplicates(rows, n_examples)


@dataclass
class OverlapReport(_Printable):
    """What two splits share.

    Attributes
    ----------
    train_rows, test_rows, train_prompts, test_prompts : int
    shared_prompts : int
        Prompts that stand in both; 0 is what a held-out figure needs.
    train_rows_affected, test_rows_affected : int
        Rows of those prompts on either side.
    shared_rows : int
        Rows of test whose prompt and completions stand in train, in either order.
    without_prompt : int
        Rows whose prompt is a guess, so that an overlap can be missed.
    examples : list of str
    """

    train_rows: int
    test_rows: int
    train_prompts: int
    test_prompts: int
    shared_prompts: int
    train_rows_affected: int
    test_rows_affected: int
    shared_rows: int
    without_prompt: int
    examples: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True if no prompt stands on both sides."""
        return self.shared_prompts == 0

    def __str__(self) -> str:
        lines = [
            f"train {self.train_rows:,} rows of {self.train_prompts:,} prompts, "
            f"test {self.test_rows:,} rows of {self.test_prompts:,} prompts",
            f"{self.shared_prompts:,} prompts stand in both "
            f"({self.train_rows_affected:,} rows of train, {self.test_rows_affected:,} of test; "
            f"{self.shared_rows:,} whole rows of test stand in train)",
        ]
        if self.without_prompt:
            lines.append(f"{self.without_prompt:,} rows without a prompt: an overlap can be missed")
        return "\n".join(lines + [f"  in both: {text}" for text in self.examples])


def overlap_report(
    train: Iterable[Mapping[str, Any]],
    test: Iterable[Mapping[str, Any]],
    *,
    n_examples: int = 3,
) -> OverlapReport:
    """Find prompts, and whole rows, that stand in both splits."""
    tested: list[tuple[str, int]] = []  # of test, which is the smaller part: prompts, and rows
    shown: dict[str, str] = {}
    without = 0
    for row in sparing(test):
        key = prompt_key(row)
        tested.append((key, text_hash(f"{key} {sorted(completion_texts(row))}")))
        shown.setdefault(key, short_prompt(row))
        without += row.get("prompt") is None
    test_counts, counts = Counter(key for key, _ in tested), Counter[str]()
    rows, prompts, bodies = {body for _, body in tested}, array("Q"), set[int]()
    for row in sparing(train):
        key = prompt_key(row)
        prompts.append(text_hash(key))
        without += row.get("prompt") is None
        if key in shown:
            counts[key] += 1
            if (body := text_hash(f"{key} {sorted(completion_texts(row))}")) in rows:
                bodies.add(body)
    return OverlapReport(
        train_rows=len(prompts),
        test_rows=len(tested),
        train_prompts=len(np.unique(np.array(prompts, np.uint64))),
        test_prompts=len(shown),
        shared_prompts=len(counts),
        train_rows_affected=counts.total(),
        test_rows_affected=sum(test_counts[key] for key in counts),
        shared_rows=sum(body in bodies for _, body in tested),
        without_prompt=without,
        examples=[text for key, text in shown.items() if key in counts][:n_examples],
    )


def row_digests(rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """SHA-256 of the content of each row, ``[N]`` of 32 bytes; for :func:`dataset_fingerprint`."""
    found = bytearray()
    for row in sparing(rows):
        text = json.dumps(_bare(row), sort_keys=True, ensure_ascii=False, default=str)
        found += hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.frombuffer(found, "S32")


def dataset_fingerprint(
    rows: Iterable[Mapping[str, Any]] | np.ndarray, *, ordered: bool = False
) -> str:
    """SHA-256 of the rows' content: the same on every machine and for every file format.

    Nulls, the order of keys, and 1 against 1.0 make no difference; nor does the order of the rows
    unless ``ordered``. For the manifest, to tell whether two models saw the same data. In place of
    rows, their :func:`row_digests` do.
    """
    digests = rows if isinstance(rows, np.ndarray) else row_digests(rows)
    whole = hashlib.sha256(f"{len(digests)}\n".encode())
    whole.update((digests if ordered else np.sort(digests)).tobytes())
    return whole.hexdigest()


def _bare(value: Any) -> Any:
    """Without nulls in mappings; whole floats as integers."""
    if isinstance(value, Mapping):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_bare(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
