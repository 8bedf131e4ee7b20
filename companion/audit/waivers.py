"""What the user said beforehand about single checks: waivers with a reason, and limits. Chapter 9.

A waiver is for a fault that is known and lived with; it says why, so that whoever reads the report
later need not ask. A limit makes a bias fail.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

import yaml

from companion.errors import DataError


def split_waivers(given: Iterable[str]) -> dict[str, str]:
    """``NAME=REASON`` as the command line has them, as name and reason.

    Raises
    ------
    DataError
        For a waiver without a reason, or a name that is waived twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, reason = text.partition("=")
        _add(found, name, reason, "--waive")
    return found


def read_waivers(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a YAML (or JSON) file: for each name its reason; an empty one waives nothing.

    Raises
    ------
    DataError
        For a file that is no such list, or a waiver without a reason.
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no YAML: {error}", "write lines like 'dropout: why'") from error
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise DataError(f"{path}: no list of waivers", "write lines like 'dropout: why'")
    found: dict[str, str] = {}
    for name, reason in data.items():
        _add(found, str(name), "" if reason is None else str(reason), str(path))
    return found


def _add(found: dict[str, str], name: str, reason: str, where: str) -> None:
    name, reason = name.strip(), reason.strip()
    if not reason:
        raise DataError(f"{where}: {name!r} is waived without a reason", "say why it is lived with")
    if name in found:
        raise DataError(f"{where}: {name!r} is waived twice", "keep one of the two")
    found[name] = reason


def split_limits(given: Iterable[str], flag: str) -> dict[str, float]:
    """``NAME=NUMBER`` as the command line has them.

    Raises
    ------
    DataError
        For what is no number.
    """
    found: dict[str, float] = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError as error:
            raise DataError(f"{flag}: {text!r} has no number", "write NAME=NUMBER") from error
        if not math.isfinite(found[name.strip()]):
            raise DataError(f"{flag}: {text!r} is no limit", "write a finite number")
    return found


def check_names(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse a name that no check has: it would be waived, or limited, in vain.

    Raises
    ------
    DataError
        With the names that are meant, perhaps.
    """
    for name in given:
        if name not in known:
            like = get_close_matches(name, sorted(known), 3) or sorted(known)
            raise DataError(f"{what}: no check is called {name!r}", f"it may be {', '.join(like)}")
