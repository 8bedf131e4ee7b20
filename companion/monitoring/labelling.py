"""Which of two completions is better: pairs in, people's judgements out. Chapter 7.

A judgement is a row ``prompt, a, b, label`` with label ``a``, ``b`` or ``tie``, which training,
evaluation and the monitor read; training leaves ties out and counts them. It is appended and made
durable before the page hears of it, so a kill at any moment loses nothing. Whoever judges sees
neither scores nor earlier labels, and which side comes first is drawn for each pair and annotator.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from filelock import FileLock, Timeout

from companion.data.messages import same_text
from companion.data.problems import RowError, RowProblem
from companion.data.readers import read_file, read_rows
from companion.data.splits import prompt_key
from companion.data.writing import plain_row, to_json
from companion.errors import DataError
from companion.judge.items import GIVEN, read_item
from companion.layouts import rename_columns, with_prompt

Row = dict[str, Any]

#: The labels of a pair, in the order of their codes.
LABELS: Final = ("a", "b", "tie")
#: What a person can say of a pair, by its place on the page.
CHOICES: Final = ("first", "second", "tie", "skip")
#: fields that a judgement writes, so that what a row had there is another's
_OURS: Final = ("annotator", "time", "shown_first", "kind")
_LONGEST_NAME: Final = 64


@dataclass(frozen=True)
class LabelPair:
    """A pair to judge.

    Attributes
    ----------
    id : str
        The row's, or a hash of its texts.
    row : dict
        ``id``, ``prompt_id``, ``prompt``, ``a``, ``b`` and the other fields of the row; what was
        said of the pair before is ``given_preference``.
    """

    id: str
    row: Row

    def turns(self, name: str) -> list[dict[str, str]]:
        """Role and text of each turn of ``prompt``, ``a`` or ``b``; text alone has no role."""
        value = self.row[name]
        if isinstance(value, str):
            return [{"role": "", "text": value}]
        return [{"role": turn["role"], "text": _content(turn)} for turn in value]


def _content(turn: Mapping[str, Any]) -> str:
    calls = turn.get("tool_calls")
    parts = [turn.get("content") or "", json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(filter(None, parts))


def pair_id(row: Mapping[str, Any]) -> str:
    """A hash of prompt and texts, the same on every machine: the id of a pair that has none."""
    texts = json.dumps([row["prompt"], row["a"], row["b"]], ensure_ascii=False)
    return hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_pairs(
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
) -> tuple[list[LabelPair], list[str]]:
    """Pairs of a file, each once, in its order.

    Parameters
    ----------
    path : str or path
        Rows with ``prompt`` and ``a``, ``b``, or ``chosen``, ``rejected`` (whose sides are then
        drawn by a hash; the label that they had is kept as ``given_preference``). ``id`` and
        ``prompt_id`` are made from the texts where they are absent; other fields are kept.
    columns : mapping of str to str, optional
        Old to new names of fields; an empty new name leaves the field out.
    on_error : {"raise", "skip"}
        ``skip`` leaves bad rows out, and a note names each.

    Returns
    -------
    pairs : list of LabelPair
    notes : list of str
        What was left out.

    Raises
    ------
    DataError
        For a file without pairs, or a bad row: line, field and cure.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error={on_error!r}", "take raise or skip")
    pairs: dict[str, LabelPair] = {}
    notes: list[str] = []
    again = 0
    for where, record in read_file(Path(path), columns):
        try:
            if isinstance(record, RowError):
                raise RowProblem.of(record, where).as_error()
            pair = _pair(rename_columns(record, columns or {}, where), where)
            known = pairs.setdefault(pair.id, pair)
            if not _same(known.row, pair.row):
                raise DataError(
                    f"{where}, field 'id': {pair.id!r} stood for another pair before",
                    "give each pair an id of its own, or leave the field out",
                )
            again += known is not pair
        except DataError as error:
            if on_error == "raise":
                raise
            notes.append(f"left out: {error.what}")
    if again:
        notes.append(f"{again:,} rows repeat a pair that stood before them: left out")
    if not pairs:
        raise DataError(f"{path}: no pairs to judge", "; ".join(notes) or "the file is empty")
    return list(pairs.values()), notes


def _pair(record: Row, where: str) -> LabelPair:
    try:
        named = dict(with_prompt(record))
    except RowError as error:
        raise RowProblem.of(error, where).as_error() from error
    row = _by_side(read_item(named, "pairwise", where).row, named)
    if same_text(row["a"], row["b"]):
        raise DataError(
            f"{where}: the two completions are the same", "leave the row out: there is no choice"
        )
    for name, default in (("prompt_id", prompt_key), ("id", pair_id)):
        value = row.get(name)
        if value is not None and not isinstance(value, (str, int)):
            raise DataError(f"{where}, field {name!r}: {value!r}", "give a text, or leave it out")
        row[name] = default(row) if value is None else str(value)
    for name in _OURS:
        if name in row:
            row[f"given_{name}"] = row.pop(name)
    return LabelPair(row["id"], {"id": row.pop("id"), "prompt_id": row.pop("prompt_id"), **row})


def _by_side(row: Row, record: Row) -> Row:
    """What a row said of ``chosen`` and ``rejected``, of ``a`` and ``b``: the label may turn."""
    if "chosen" not in record or GIVEN not in row:
        return dict(row)
    sides = dict(zip(("chosen", "rejected"), "ab" if row[GIVEN] == "a" else "ba", strict=True))
    out: Row = {}
    for key, value in row.items():
        for old, new in sides.items():
            if key.endswith(f"_{old}"):
                key = f"{key.removesuffix(old)}{new}"
            elif key.startswith(f"{old}_"):
                key = f"{key.removeprefix(f'{old}_')}_{new}"
        if key == "margin":
            key = "given_margin"
        if key == "scores" and isinstance(value, Mapping):
            value = {sides.get(name, name): score for name, score in value.items()}
        out[key] = value
    return out


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(row.get(name) == other.get(name) for name in ("prompt", "a", "b"))


def shown_first(pair_id: str, annotator: str, seed: int = 0) -> str:
    """Which side an annotator sees first, ``a`` or ``b``: a coin that falls the same each time."""
    digest = hashlib.sha256(f"{seed}\x00{annotator}\x00{pair_id}".encode("utf-8", "surrogatepass"))
    return "ab"[digest.digest()[0] % 2]


def annotator_name(value: Any) -> str:
    """A name as it is written into rows. Raises DataError."""
    name = " ".join(value.split()) if isinstance(value, str) else ""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise DataError(
            f"no annotator's name: {value!r}", f"give 1 to {_LONGEST_NAME} letters or digits"
        )
    return name


# ---------------------------------------------------------------------- figures


def label_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a file of judgements says of its annotators.

    Parameters
    ----------
    rows : sequence of mappings
        With ``id``, ``label`` and ``annotator``; ``prompt_id`` (or ``prompt``), ``shown_first``.
        Rows without an annotator count as one's own.

    Returns
    -------
    dict
        ``rows``, ``pairs``; ``annotators``: of each the counts of ``a``, ``b``, ``tie``, and
        ``first_share``, how often the side shown first was taken when one was (1/2 if the place
        makes no difference). ``agreement``: as
        :func:`companion.functional.annotator_agreement`, on pairs that several judged.
    """
    from companion.functional.agreement import annotator_agreement

    first_row: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first_row.setdefault(str(row["id"]), row)
    places = {key: place for place, key in enumerate(first_row)}
    groups = [str(row.get("prompt_id") or prompt_key(row)) for row in first_row.values()]
    names = list(dict.fromkeys(row.get("annotator") or "" for row in rows))
    codes = np.full((len(places), len(names)), -1, dtype=np.int64)
    people: dict[str, Counter[str]] = {name: Counter() for name in names}
    for row in rows:
        name, label = row.get("annotator") or "", row["label"]
        codes[places[str(row["id"])], names.index(name)] = LABELS.index(label)
        people[name][label] += 1
        if label != "tie" and row.get("shown_first") in ("a", "b"):
            people[name]["placed"] += 1
            people[name]["first"] += label == row["shown_first"]
    return {
        "rows": len(rows),
        "pairs": len(places),
        "annotators": {
            name or "(no name)": {label: count[label] for label in LABELS}
            | {"first_share": count["first"] / count["placed"] if count["placed"] else None}
            for name, count in people.items()
        },
        "agreement": annotator_agreement(codes, groups) if len(names) > 1 else None,
    }


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures in words, one sentence a line."""
    from companion.functional.agreement import ceiling_sentence, share_of

    lines = []
    for name, count in figures["annotators"].items():
        n = sum(count[label] for label in LABELS)
        line = f"{name}: {n:,} judged, {count['tie']:,} ties"
        if count["first_share"] is not None:
            line += f"; took the one shown first in {count['first_share']:.0%} of the rest"
        lines.append(line)
    both = figures["agreement"]
    if both is None or not both["n"]:
        return [*lines, "No two people have judged the same pair, so their agreement is unknown."]
    alpha = "has no value, since all verdicts are the same"
    if both["alpha"] is not None:
        ends = both["alpha_interval"]
        alpha = f"= {both['alpha']:.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
        alpha += " (0 is chance, 1 is perfect)"
    lines.append(
        f"{both['n']:,} pairs were judged by several people. They agree on "
        f"{share_of(both, 'agreement')}, ties counted; Krippendorff's α {alpha}."
    )
    return lines + ([said] if (said := ceiling_sentence(both)) else [])


# ---------------------------------------------------------------------- the file


class _LabelFile:
    """Judgements, one a line, for one process; each is on the disk when :meth:`add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.closed = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f"{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(
                f"{path}: another process is writing it",
                "open that one's page (it takes several annotators), or give another --output",
            ) from error
        try:
            try:
                with open(path, "ab"):  # one that cannot be written is known before the work
                    pass
            except OSError as error:
                raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
            self._mend()
            self.rows = self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.closed = True
        self._lock.release()

    def _mend(self) -> None:
        """Cut off a last line that a kill has torn: nobody was told that it was written."""
        with open(self.path, "r+b") as file:
            text = file.read()
            tail = text[text.rfind(b"\n") + 1 :]
            if not tail.strip():
                return
            try:
                whole = isinstance(json.loads(tail), dict)
            except ValueError:
                whole = False
            if whole:  # written by an editor that ends no last line
                file.write(b"\n")
            else:
                file.truncate(len(text) - len(tail))
                self.notes.append(f"{self.path.name}: the last line was torn, and is cut off")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[Row]:
        rows: list[Row] = []
        seen: set[tuple[str, str]] = set()
        for where, row in read_rows(self.path):
            for name in ("id", "prompt", "a", "b", "label", "annotator"):
                if row.get(name) is None:
                    raise DataError(
                        f"{where}, field {name!r}: missing", "give a file that this command wrote"
                    )
            if row["label"] not in LABELS:
                raise DataError(f"{where}, field 'label': {row['label']!r}", "write a, b or tie")
            key = (str(row["id"]), str(row["annotator"]))
            if key in seen:
                raise DataError(f"{where}: {key[1]!r} judges {key[0]!r} twice", "keep one of them")
            seen.add(key)
            rows.append(row)
        return rows

    def _check_open(self) -> None:
        if self.closed:
            raise DataError("the command is ending: nothing was recorded", "start it again")

    def add(self, row: Row) -> None:
        self._check_open()
        text = (to_json(row) + "\n").encode("utf-8", "surrogatepass")
        with open(self.path, "ab") as file:
            size = file.tell()
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise DataError(
                    f"{self.path}: cannot be written ({error.strerror or error})",
                    "nothing was recorded; make room, and judge the pair again",
                ) from error
        if not size:
            _sync_folder(self.path.parent)
        self.rows.append(row)

    def remove(self, pair: str, annotator: str) -> None:
        """Take one judgement out; the other lines stay byte for byte."""
        self._check_open()
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            kept = []
            for line in self.path.read_bytes().split(b"\n"):
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf")) if line.strip() else {}
                if (str(row.get("id")), row.get("annotator")) != (pair, annotator):
                    kept.append(line)
            with open(part, "wb") as file:
                file.write(b"\n".join(kept))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror or error})",
                "the judgement still stands; make room, and undo it again",
            ) from error
        _sync_folder(self.path.parent)
        self.rows = [
            row for row in self.rows if (str(row["id"]), row["annotator"]) != (pair, annotator)
        ]


def _sync_folder(path: Path) -> None:
    """Make a new or moved name durable; not every file system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---------------------------------------------------------------------- the session


class Stale(DataError):
    """A judgement of a pair that is not the one to judge now; the page is to be drawn anew."""


@dataclass
class _Annotator:
    """What one person has done: pairs judged, pairs skipped (in this run), and in which order."""

    judged: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, None] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)


class Labelling:
    """Pairs, their judgements, and what each annotator has still to do; safe among threads.

    A context manager: the file of judgements is this process's until the end of the block.

    Parameters
    ----------
    pairs : sequence of LabelPair
        Every annotator sees each once, in this order.
    path : str or path
        The judgements. A file that is there is gone on with.
    annotator : str, optional
        The only one who judges. If absent, several may, each under a name.
    seed : int
        Of the sides.

    Raises
    ------
    DataError
        For a file that another process writes, or that holds other rows; the line is named.
    """

    def __init__(
        self,
        pairs: Sequence[LabelPair],
        path: str | os.PathLike[str],
        *,
        annotator: str | None = None,
        seed: int = 0,
    ) -> None:
        self.pairs = {pair.id: pair for pair in pairs}
        self.annotator = None if annotator is None else annotator_name(annotator)
        self.seed = seed
        self._mutex = threading.Lock()
        self._people: dict[str, _Annotator] = {}
        self._figures: tuple[int, dict[str, Any]] | None = None
        self._changes = 0
        self._file = _LabelFile(Path(path))
        self.found = len(self._file.rows)
        try:
            for row in self._file.rows:
                self._take_over(row)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Labelling:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file; nothing is recorded any more."""
        with self._mutex:
            self._file.close()

    @property
    def notes(self) -> list[str]:
        """What was mended when the file was opened."""
        return self._file.notes

    @property
    def rows(self) -> list[Row]:
        """The judgements of the file, those of other pairs too."""
        return list(self._file.rows)

    def _take_over(self, row: Row) -> None:
        pair = self.pairs.get(str(row["id"]))
        if pair is None:  # of another week
            return
        if not _same(pair.row, row):
            raise DataError(
                f"{self._file.path}: the id {pair.id!r} is that of another pair there",
                "ids that are numbers of lines mean another pair in each file: leave the field "
                "'id' out (a hash of the texts takes its place), or give another --output",
            )
        person = self._person(row["annotator"])
        person.judged[pair.id] = row["label"]
        person.history.append(("label", pair.id))

    def _person(self, name: str) -> _Annotator:
        return self._people.setdefault(name, _Annotator())

    def _known(self, annotator: Any) -> str:
        if self.annotator is None:
            return annotator_name(annotator)
        if annotator not in (None, self.annotator):
            raise DataError(
                f"this page is for {self.annotator!r}, not for {annotator!r}",
                "start it without --annotator for several",
            )
        return self.annotator

    def _next(self, person: _Annotator) -> LabelPair | None:
        done = person.judged.keys() | person.skipped.keys()
        return next((pair for key, pair in self.pairs.items() if key not in done), None)

    def view(self, annotator: str | None) -> dict[str, Any]:
        """What the page of an annotator shows: counts, and the next pair by its places.

        Raises
        ------
        DataError
            For no name, or that of another.
        """
        with self._mutex:
            return self._view(self._known(annotator))

    def _view(self, name: str) -> dict[str, Any]:
        person = self._person(name)
        pair = self._next(person)
        shown: dict[str, Any] | None = None
        if pair is not None:
            sides = "ab" if shown_first(pair.id, name, self.seed) == "a" else "ba"
            shown = {
                "id": pair.id,
                "prompt": pair.turns("prompt"),
                "first": pair.turns(sides[0]),
                "second": pair.turns(sides[1]),
            }
        return {
            "annotator": name,
            "fixed": self.annotator is not None,
            "total": len(self.pairs),
            "judged": len(person.judged),
            "skipped": len(person.skipped),
            "can_undo": bool(person.history),
            "pair": shown,
        }

    def judge(self, annotator: str | None, pair_id: str, choice: str) -> dict[str, Any]:
        """Record a judgement, or skip a pair; it is durable when this returns.

        Parameters
        ----------
        annotator : str, optional
        pair_id : str
            Of the pair that is shown.
        choice : {"first", "second", "tie", "skip"}
            By its place on the page.

        Returns
        -------
        dict
            The next :meth:`view`.

        Raises
        ------
        DataError
            For an unknown choice, or if the file cannot be written: then nothing was recorded.
        Stale
            If the pair is not the one to judge now.
        """
        if choice not in CHOICES:
            raise DataError(f"no choice {choice!r}", f"take one of: {', '.join(CHOICES)}")
        with self._mutex:
            name = self._known(annotator)
            person = self._person(name)
            pair = self._next(person)
            if pair is None or pair.id != pair_id:
                raise Stale("this pair is judged already, in another window?", "go on to the next")
            if choice == "skip":
                person.skipped[pair.id] = None
                person.history.append(("skip", pair.id))
                return self._view(name)
            first = shown_first(pair.id, name, self.seed)
            other = "b" if first == "a" else "a"
            label = {"first": first, "second": other, "tie": "tie"}[choice]
            row = {
                **pair.row,
                "label": label,
                "annotator": name,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "shown_first": first,
                "kind": "human",
            }
            self._file.add(plain_row(row))
            person.judged[pair.id] = label
            person.history.append(("label", pair.id))
            self._changes += 1
            return self._view(name)

    def undo(self, annotator: str | None) -> dict[str, Any]:
        """Take back the annotator's last judgement or skip; its pair comes again."""
        with self._mutex:
            name = self._known(annotator)
            person = self._person(name)
            while person.history:
                what, key = person.history[-1]
                if what == "label":
                    self._file.remove(key, name)
                    del person.judged[key]
                    self._changes += 1
                found = what == "label" or key in person.skipped
                person.skipped.pop(key, None)
                person.history.pop()
                if found:  # (a skip may have been undone by `again`)
                    break
            return self._view(name)

    def again(self, annotator: str | None) -> dict[str, Any]:
        """Show the pairs that were skipped once more."""
        with self._mutex:
            name = self._known(annotator)
            self._person(name).skipped.clear()
            return self._view(name)

    def figures(self) -> dict[str, Any]:
        """:func:`label_figures` of the file, with ``skipped``: pairs left aside in this run."""
        with self._mutex:
            rows, version = self.rows, self._changes
            skipped = {name: len(p.skipped) for name, p in self._people.items() if p.skipped}
            known = self._figures
        if known is None or known[0] != version:
            known = self._figures = (version, label_figures(rows))
        return {**known[1], "skipped": skipped}
