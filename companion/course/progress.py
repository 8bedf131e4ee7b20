"""Which exercises are solved: a small JSON file on the reader's own machine.

It lies where the platform keeps the state of programs (``$XDG_STATE_HOME`` or ``~/.local/state``,
``~/Library/Application Support``, ``%LOCALAPPDATA%``). The environment variable
``COMPANION_PROGRESS_FILE`` names another file; empty, or the null device, it keeps nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from companion.course.catalogue import CATALOGUE, CHAPTERS, Entry, entries_of

VARIABLE = "COMPANION_PROGRESS_FILE"
_FOLDER = "reward-model-companion"


@dataclass
class Record:
    """What is kept of one exercise.

    Attributes
    ----------
    attempts : int
        Checks of an attempt, up to the first right one.
    hints : int
        The highest hint that was asked for, 0 to 3.
    solved : str or None
        When it was first solved (ISO 8601, UTC).
    """

    attempts: int = 0
    hints: int = 0
    solved: str | None = None


def progress_path() -> Path | None:
    """Where progress is kept; None if nothing is to be kept."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return None if given in ("", os.devnull) else Path(given).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        root = Path(local) if local else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Application Support"
    else:
        state = os.environ.get("XDG_STATE_HOME")
        # a relative path is to be ignored, says the XDG specification
        root = Path(state) if state and os.path.isabs(state) else Path.home() / ".local" / "state"
    return root / _FOLDER / "progress.json"


def load() -> dict[str, Record]:
    """Read the file; one that cannot be read counts as empty (:func:`record` puts it aside)."""
    path = progress_path()
    try:
        return _parse(path) if path is not None else {}
    except (OSError, ValueError):
        return {}


def _parse(path: Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("exercises"), dict):
        raise ValueError("not a progress file")
    records = {}
    for name, value in content["exercises"].items():
        if not isinstance(value, dict):
            raise ValueError(f"{name}: not a record")
        solved = value.get("solved")
        records[str(name)] = Record(
            int(value.get("attempts", 0)),
            int(value.get("hints", 0)),
            None if solved is None else str(solved),
        )
    return records


def _write(path: Path, records: Mapping[str, Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "version": 1,
        "exercises": {name: asdict(record) for name, record in records.items()},
    }
    # written aside and moved, so that an interrupted write leaves the old file whole
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".progress-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def record(
    exercise_id: str, *, attempted: bool = False, solved: bool = False, hint: int = 0
) -> list[str]:
    """Add an event; return what the reader should know (nothing, as a rule). Never raises.

    Parameters
    ----------
    exercise_id : str
    attempted : bool
        An answer was checked.
    solved : bool
        And it was right.
    hint : int
        The hint that was asked for.
    """
    path = progress_path()
    if path is None or not (attempted or hint):
        return []
    notes = []
    try:
        try:
            records = _parse(path)
        except ValueError:
            aside = path.with_suffix(".unreadable.json")
            os.replace(path, aside)
            notes.append(f"The progress file could not be read; it was put aside as {aside}.")
            records = {}
        entry = records.setdefault(exercise_id, Record())
        entry.attempts += attempted and entry.solved is None
        entry.hints = max(entry.hints, hint)
        if solved and entry.solved is None:
            entry.solved = datetime.now(UTC).isoformat(timespec="seconds")
        _write(path, records)
    except OSError as error:
        notes.append(f"Progress could not be kept: {error}. {VARIABLE} names another file.")
    return notes


def reset(chapter: int | None = None) -> int:
    """Forget everything, or one chapter; return how many exercises were forgotten.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path = progress_path()
    records = load()
    gone = [name for name in records if chapter is None or name.startswith(f"ch{chapter:02d}.")]
    if path is None or not path.exists():
        return 0
    kept = {name: value for name, value in records.items() if name not in gone}
    if kept:
        _write(path, kept)
    else:
        path.unlink()
    return len(gone)


def next_exercise(records: Mapping[str, Record]) -> Entry | None:
    """The first exercise that is not solved; None if all are."""
    for entry in CATALOGUE:
        if entry.id not in records or records[entry.id].solved is None:
            return entry
    return None


def table(records: Mapping[str, Record], *, width: int = 20, details: bool = False) -> str:
    """Progress as text: a bar for each chapter, and what comes next."""
    lines = []
    for chapter, (title, _) in CHAPTERS.items():
        entries = entries_of(chapter)
        done = [e for e in entries if e.id in records and records[e.id].solved]
        full = round(width * len(done) / len(entries))
        left = sum(e.minutes for e in entries if e not in done)
        rest = f"about {left} minutes left" if left else "done"
        bar = "█" * full + "░" * (width - full)
        lines.append(f"{chapter}  {bar}  {len(done)}/{len(entries)}  {title} ({rest})")
        if details:
            for entry in entries:
                found = records.get(entry.id, Record())
                sign = "✓" if found.solved else "·"
                facts = [f"{found.attempts} attempts" if found.attempts != 1 else "1 attempt"]
                facts += [f"hint {found.hints}"] if found.hints else []
                told = ", ".join(facts) if found.attempts or found.hints else entry.line
                lines.append(f"     {sign} {entry.id:<28}{told}")
    following = next_exercise(records)
    if following is None:
        lines.append("All exercises are solved.")
    else:
        stem = CHAPTERS[following.chapter][1]
        lines.append(f"Next: {following.title} ({following.id}, {following.line})")
        lines.append(f"      in exercises/{stem}.md")
    return "\n".join(lines)
