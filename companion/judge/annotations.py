"""Files in which several people or models judged the same pairs, and who agrees. Chapter 3."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from companion.data.pairs import VERDICT_COLUMNS, verdict_side
from companion.data.problems import CURES, RowError
from companion.data.readers import read_file
from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.judge.agreement import VERDICTS, agreement, verdict_codes
from companion.judge.bias import JudgeReport


@dataclass(frozen=True)
class Annotations:
    """Verdicts of several annotators on the same pairs. Chapter 3.

    Attributes
    ----------
    ids, groups : list ``[n]``
        Of each pair its id, and the key of its prompt.
    annotators : list ``[m]``
    human : list of bool ``[m]``
        Whether an annotator is a person (``kind`` is ``human``).
    codes : int64 array ``[n, m]``
        0 for a, 1 for b, 2 for tie, −1 where an annotator says nothing.
    """

    ids: list[str]
    groups: list[str]
    annotators: list[str]
    human: list[bool]
    codes: npt.NDArray[np.int64]

    def majority(self, *, without: str | None = None) -> npt.NDArray[np.int64]:
        """``[n]`` what more people say than anything else; −1 if no verdict has the most votes.

        Parameters
        ----------
        without : str, optional
            A person to leave out, who is to be compared with the others.
        """
        names = zip(self.annotators, self.human, strict=True)
        people = [i for i, (name, human) in enumerate(names) if human and name != without]
        votes = np.stack(
            [(self.codes[:, people] == code).sum(axis=1) for code in range(len(VERDICTS))], axis=1
        )
        top = votes.max(axis=1)
        clear = (top > 0) & ((votes == top[:, None]).sum(axis=1) == 1)
        return np.where(clear, votes.argmax(axis=1), -1).astype(np.int64)


def load_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Read a file with one row a pair and annotator. Chapter 3.

    Parameters
    ----------
    path : str or path
        Rows with ``id``, ``prompt``, ``a``, ``b``, ``preference`` (or ``winner``), ``annotator``,
        and ``kind`` (``human`` or anything else).

    Returns
    -------
    Annotations
        Pairs and annotators in the order in which they first occur.

    Raises
    ------
    DataError
        For a missing field, an unknown preference, an id that stands for two pairs, or an annotator
        who judges a pair twice; the line is named.
    """
    verdicts: dict[tuple[str, str], str] = {}
    pairs: dict[str, tuple[Any, Any, Any]] = {}
    groups: dict[str, str] = {}
    human: dict[str, bool] = {}
    for record in read_file(Path(path)):
        row, where = record.row, record.where
        if row is None:
            raise DataError(str(record.problem))
        for name in ("id", "prompt", "a", "b", "annotator"):
            if row.get(name) is None:
                raise DataError(f"{where}: no {name!r}", "each row is one annotator's verdict")
        column = next((c for c in VERDICT_COLUMNS if c in row), VERDICT_COLUMNS[0])
        key, who = str(row["id"]), str(row["annotator"])
        try:
            verdict = verdict_side(row.get(column), column)
        except RowError as error:
            raise DataError(
                f"{where}, field {column!r}: {error.reason} ({error.detail})", CURES[error.reason]
            ) from error
        texts = (row["prompt"], row["a"], row["b"])
        if pairs.setdefault(key, texts) != texts:
            raise DataError(f"{where}: id {key!r} stood for another pair before", "mend the ids")
        if (key, who) in verdicts:
            raise DataError(f"{where}: {who!r} judges {key!r} twice", "keep one of the two")
        is_human = row.get("kind") == "human"
        if human.setdefault(who, is_human) != is_human:
            raise DataError(f"{where}: {who!r} has two kinds", "give an annotator one kind")
        verdicts[key, who] = verdict
        groups[key] = prompt_key(row)
    if not verdicts:
        raise DataError(f"{path}: no verdicts", "check the file")
    ids, annotators = list(pairs), list(human)
    codes = np.stack(
        [verdict_codes([verdicts.get((key, who)) for key in ids]) for who in annotators], axis=1
    )
    return Annotations(ids, list(groups.values()), annotators, list(human.values()), codes)


def annotator_report(annotations: Annotations) -> JudgeReport:
    """Agreement of every two annotators, and of each with the majority of the people. Chapter 3.

    Parameters
    ----------
    annotations : Annotations

    Returns
    -------
    JudgeReport
        ``pairs``; ``annotators``: the counts of their verdicts; ``with_each_other``: for ``x | y``
        as :func:`companion.judge.agreement.agreement` says; ``with_majority``: against the
        majority of the people, of a person against that of the *others*. Pairs without a majority
        are left out and counted.
    """
    names, codes, groups = annotations.annotators, annotations.codes, annotations.groups
    counts = {
        name: {
            **{v: int((codes[:, i] == c).sum()) for c, v in enumerate(VERDICTS)},
            "none": int((codes[:, i] < 0).sum()),
        }
        for i, name in enumerate(names)
    }
    each = {
        f"{names[i]} | {names[j]}": agreement(codes[:, i], codes[:, j], groups)
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }
    people = Counter(annotations.human)[True]
    majority = {}
    for i, (name, human) in enumerate(zip(names, annotations.human, strict=True)):
        if people - human >= 1:
            others = annotations.majority(without=name if human else None)
            majority[name] = agreement(codes[:, i], others, groups)
    return JudgeReport(
        {
            "pairs": len(annotations.ids),
            "annotators": counts,
            "with_each_other": each,
            "with_majority": majority or None,
        }
    )
