"""A monitor's memory: one SQLite file. Chapter 7.

It holds labels and their margins, not e-values: those are computed anew at each look, so that
there is no state that a kill could leave half written. A label's key is its id and its annotator,
so that one that comes twice counts once; a batch is one transaction; a look that was killed is
gone on with under its own number.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from companion.errors import DataError
from companion.monitoring.evidence import Labels
from companion.monitoring.plan import Plan
from companion.monitoring.rows import LabelRow

#: of the tables below
_FORMAT: Final = 1
_TABLES: Final = """
CREATE TABLE plans (phase INTEGER PRIMARY KEY, plan TEXT NOT NULL, began TEXT NOT NULL,
                    reason TEXT NOT NULL);
CREATE TABLE looks (number INTEGER PRIMARY KEY, phase INTEGER NOT NULL, began TEXT NOT NULL,
                    ended TEXT, verdict TEXT, traffic TEXT);
CREATE TABLE labels (id TEXT NOT NULL, annotator TEXT NOT NULL, look INTEGER NOT NULL,
                     prompt TEXT NOT NULL, pair TEXT NOT NULL, margin REAL NOT NULL,
                     outcome REAL NOT NULL, turned INTEGER NOT NULL,
                     time TEXT NOT NULL, slice TEXT, sampling TEXT,
                     PRIMARY KEY (id, annotator)) WITHOUT ROWID;
CREATE INDEX labels_of_look ON labels (look);
"""


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Look:
    """One run of the monitor.

    Attributes
    ----------
    number, phase : int
        Counted from 1. A phase is what follows `init` or a restart.
    began : str
    ended : str or None
        None if it was killed.
    verdict, traffic : dict or None
    """

    number: int
    phase: int
    began: str
    ended: str | None
    verdict: dict[str, Any] | None
    traffic: dict[str, Any] | None


class Store:
    """The file; a context manager, which closes it.

    Parameters
    ----------
    path : path-like

    Raises
    ------
    DataError
        If there is no such file, or it is no monitor's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no monitor there", "make one: companion monitor init")
        try:
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise DataError(
                f"{path}: is no monitor's file ({error})", "begin one: companion monitor init"
            ) from error
        if found != _FORMAT:
            self._db.close()
            raise DataError(
                f"{path}: its tables are of version {found}, and this companion knows {_FORMAT}",
                "use the companion that made it, or make a new one: companion monitor init",
            )

    @classmethod
    def create(cls, path: str | os.PathLike[str], plan: Plan) -> Self:
        """A new monitor, whole or not at all.

        Raises
        ------
        DataError
            If the file is there already, or cannot be written.
        """
        file = Path(path)
        if file.exists():
            raise DataError(
                f"{path}: is there already", "name another file, or: companion monitor restart"
            )
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(draft)) as db, db:
                db.executescript(_TABLES)
                db.execute(f"PRAGMA user_version = {_FORMAT}")
                db.execute("INSERT INTO plans VALUES (1, ?, ?, 'init')", (_json(plan), now()))
            os.rename(draft, file)
        except (OSError, sqlite3.Error) as error:
            draft.unlink(missing_ok=True)
            raise DataError(f"{path}: cannot be written ({error})") from error
        return cls(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._db.close()

    # ------------------------------------------------------------------ plans

    @property
    def phase(self) -> int:
        """The current one."""
        return int(self._db.execute("SELECT max(phase) FROM plans").fetchone()[0])

    def plan(self, phase: int | None = None) -> Plan:
        """What a phase is held against; default: the current one."""
        row = self._db.execute(
            "SELECT plan FROM plans WHERE phase = ?", (phase or self.phase,)
        ).fetchone()
        return Plan.from_dict(json.loads(row[0]))

    def phases(self) -> list[dict[str, Any]]:
        """Number, beginning and reason of each phase."""
        rows = self._db.execute("SELECT phase, began, reason FROM plans ORDER BY phase")
        return [dict(zip(("phase", "began", "reason"), row, strict=True)) for row in rows]

    def restart(self, plan: Plan, reason: str) -> int:
        """Begin a new phase, with a new alpha and a new reference; returns its number."""
        with self._transaction():
            number = self.phase + 1
            self._db.execute(
                "INSERT INTO plans VALUES (?, ?, ?, ?)", (number, _json(plan), now(), reason)
            )
        return number

    # ------------------------------------------------------------------ looks

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs of this monitor out.

        Raises
        ------
        DataError
            If one is there.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(
                f"{self.path}: another run of this monitor is going on", "wait for its end"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self) -> int:
        """The number of the look that is being done: one that was killed, or a new one."""
        with self._transaction():
            row = self._db.execute(
                "SELECT number FROM looks WHERE ended IS NULL AND phase = ?", (self.phase,)
            ).fetchone()
            if row is not None:
                return int(row[0])
            number = int(self._db.execute("SELECT count(*) FROM looks").fetchone()[0]) + 1
            self._db.execute(
                "INSERT INTO looks (number, phase, began) VALUES (?, ?, ?)",
                (number, self.phase, now()),
            )
        return number

    def end(self, number: int, verdict: dict[str, Any], traffic: dict[str, Any] | None) -> None:
        """A look is over."""
        with self._transaction():
            self._db.execute(
                "UPDATE looks SET ended = ?, verdict = ?, traffic = ? WHERE number = ?",
                (now(), json.dumps(verdict), traffic and json.dumps(traffic), number),
            )

    def looks(self) -> list[Look]:
        """All of them."""
        rows = self._db.execute(
            "SELECT number, phase, began, ended, verdict, traffic FROM looks ORDER BY number"
        )
        return [
            Look(*row[:4], *(None if text is None else json.loads(text) for text in row[4:]))
            for row in rows
        ]

    # ------------------------------------------------------------------ labels

    def known(self, rows: Sequence[LabelRow]) -> list[bool]:
        """Whether each judgement is there already."""
        query = "SELECT 1 FROM labels WHERE id = ? AND annotator = ?"
        return [
            self._db.execute(query, (row.id, row.annotator)).fetchone() is not None for row in rows
        ]

    def add(self, look: int, rows: Sequence[LabelRow], margins: Sequence[float]) -> int:
        """Keep judgements, all or none; returns how many were new."""
        with self._transaction():
            before = self._db.total_changes
            self._db.executemany(
                "INSERT OR IGNORE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(row.id, row.annotator, look, row.prompt, row.pair, float(margin)),
                        *(row.outcome, row.turned, row.time, row.slice, row.sampling),
                    )
                    for row, margin in zip(rows, margins, strict=True)
                ],
            )
            return self._db.total_changes - before

    def labels(self, *, sampling: str | None = None, phase: int | None = None) -> Labels:
        """Those of a phase, by look; with `sampling` only those that were chosen by this rule."""
        where, given = "phase = ?", [phase or self.phase]  # type: str, list[Any]
        if sampling is not None:
            where, given = f"{where} AND sampling = ?", [*given, sampling]
        rows = self._db.execute(
            "SELECT look, margin, outcome, prompt, slice FROM labels JOIN looks ON look = number "
            f"WHERE {where} ORDER BY look, id, annotator",
            given,
        ).fetchall()
        look, margin, outcome, prompt, part = zip(*rows, strict=True) if rows else ((),) * 5
        return Labels(
            np.array(look, dtype=np.int64),
            np.array(margin, dtype=np.float64),
            np.array(outcome, dtype=np.float64),
            list(prompt),
            list(part),
        )

    def counts(self) -> dict[str, int]:
        """Labels of the current phase by the rule of their sampling."""
        rows = self._db.execute(
            "SELECT coalesce(sampling, 'unknown'), count(*) FROM labels JOIN looks "
            "ON look = number WHERE phase = ? GROUP BY 1",
            (self.phase,),
        )
        return {str(name): int(count) for name, count in rows}

    def times(self, look: int) -> tuple[str, str] | None:
        """First and last time of a look's labels, where they say one."""
        row = self._db.execute(
            "SELECT min(time), max(time) FROM labels WHERE look = ? AND time != ''", (look,)
        ).fetchone()
        return None if row[0] is None else (row[0], row[1])

    def judgements(self) -> list[tuple[str, str, float]]:
        """Pair, annotator and outcome of the current phase, for the annotators' agreement.

        The outcome is that of the text that stands first in the order of the alphabet.
        """
        rows = self._db.execute(
            "SELECT pair, annotator, CASE turned WHEN 1 THEN 1 - outcome ELSE outcome END "
            "FROM labels JOIN looks ON look = number "
            "WHERE phase = ? AND annotator != '' ORDER BY pair, annotator",
            (self.phase,),
        )
        return [(str(pair), str(name), float(outcome)) for pair, name, outcome in rows]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _json(plan: Plan) -> str:
    return json.dumps(plan.to_dict())
