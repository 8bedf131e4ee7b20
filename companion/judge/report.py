"""What a judge prefers besides the better answer, and who agrees with whom. Chapter 3.

The biases (place, length, its own writing) are computed from verdicts as
:func:`companion.judge.judge_file` writes them; agreement also from files in which several
people or models judged the same pairs. Intervals are bootstrap intervals (95%) that draw whole
prompts.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, compress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from companion.data.formats import verdict_column, verdict_side
from companion.data.problems import RowError, RowProblem
from companion.data.readers import read_rows
from companion.data.splits import prompt_key
from companion.data.writing import write_text
from companion.errors import DataError, ShapeError
from companion.evaluation.tables import format_table
from companion.functional.agreement import annotator_agreement
from companion.functional.resampling import bootstrap_interval
from companion.judge.items import GIVEN, spoken

Codes = npt.NDArray[np.int64]
#: The verdicts of a pair, in the order of their codes.
VERDICTS: Final = ("a", "b", "tie")


@dataclass(frozen=True)
class JudgeReport:
    """Figures of a judge (or of several annotators), as plain JSON values. Chapter 3."""

    figures: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the figures as JSON; folders are made."""
        text = json.dumps(self.figures, indent=2, ensure_ascii=False, allow_nan=False)
        return write_text(path, text + "\n")

    def table(self) -> str:
        """The figures as text, a line each."""
        return format_table(("figure", "value"), list(_lines(self.figures)))


def _lines(figures: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in figures.items():
        if key.endswith("interval") or key == "table":
            continue
        name = f"{before}{key.replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += _lines(value, f"{name}: ")
        elif value is not None:
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            ends = figures.get(f"{key}_interval")
            lines.append((name, text + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")))
    return lines


def judge_report(rows: Sequence[Mapping[str, Any]], *, own_model: str | None = None) -> JudgeReport:
    """Position, length, self-preference, and agreement with the labels that the rows had.

    Parameters
    ----------
    rows : sequence of mappings
        With ``prompt``, ``a``, ``b``, ``preference``, ``first`` and ``swapped``; where they have
        them, ``given_preference`` (of people, or of the gold reward), ``model_a`` and ``model_b``.
    own_model : str, optional
        What ``model_a`` and ``model_b`` call the judge's own writing; default: the row's ``judge``.

    Returns
    -------
    JudgeReport
        ``verdicts``: counts, and ``reasons``. ``position``: ``first_share``, of single answers that
        name a winner, the share that name the one shown first (0.5 without bias);
        ``consistent``, the share of rows whose two verdicts agree; ``logit``, the mean bias in
        nats where there are probabilities. ``length``: the share of decided rows in which the
        longer text wins, of the judge and of the given labels on the same rows, and the difference,
        which is the bias. ``self_preference``: the same for the judge's own texts. ``agreement``:
        see :func:`agreement`. Parts that the rows do not allow are None.

    Raises
    ------
    DataError
        If there are no rows, or a row lacks a field (the row is named).
    """
    if not rows:
        raise DataError("no verdicts to report on", "check the file")
    for number, row in enumerate(rows):
        for name in ("prompt", "a", "b", "preference", "first", "swapped"):
            if name not in row:
                raise DataError(
                    f"row {number}: no {name!r}", "give a file that 'companion judge' wrote"
                )
    groups = [prompt_key(row) for row in rows]
    codes = verdict_codes([row["preference"] for row in rows])
    given = verdict_codes([row.get(GIVEN) for row in rows])
    longer = np.array([_longer(row) for row in rows])
    own = np.array([_own(row, own_model) for row in rows])
    return JudgeReport(
        {
            "rows": len(rows),
            "verdicts": dict(Counter(row["preference"] for row in rows)),
            "reasons": dict(Counter(row["reason"] for row in rows if row.get("reason"))),
            "position": _position(rows, groups),
            "length": _lean(codes, given, longer, groups),
            "self_preference": _lean(codes, given, own, groups) if (own >= 0).any() else None,
            "agreement": agreement(codes, given, groups) if (given >= 0).any() else None,
        }
    )


def _longer(row: Mapping[str, Any]) -> int:
    """Code of the side with more words; −1 if they have as many."""
    a, b = len(spoken(row["a"]).split()), len(spoken(row["b"]).split())
    return -1 if a == b else int(b > a)


def _own(row: Mapping[str, Any], own_model: str | None) -> int:
    """Code of the side that the judge wrote; −1 if it wrote both, or neither."""
    name = own_model if own_model is not None else row.get("judge")
    mine = [name is not None and row.get(f"model_{side}") == name for side in "ab"]
    return mine.index(True) if sum(mine) == 1 else -1


def _position(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> dict[str, Any]:
    first = verdict_codes([row["first"] for row in rows])
    swapped = verdict_codes([row["swapped"] for row in rows])
    # `swapped` names the completion: b stood first there
    wins = np.concatenate([first == 0, swapped == 1])
    decided = np.isin(np.concatenate([first, swapped]), (0, 1))
    both = (first >= 0) & (swapped >= 0)
    logits = np.array(
        [[row.get("logit_first"), row.get("logit_swapped")] for row in rows], dtype=np.float64
    )
    bias = (logits[:, 0] - logits[:, 1]) / 2
    return {
        "n_answers": int(decided.sum()),
        "n_rows": int(both.sum()),
        **_share("first_share", wins, [*groups, *groups], decided),
        **_share("consistent", first == swapped, groups, both),
        **_share("logit", bias, groups, np.isfinite(bias)),
    }


def _share(
    name: str, values: npt.NDArray[Any], groups: Sequence[str], keep: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    """Mean of the values that are kept, and its interval."""
    if not keep.any():
        return {name: None}
    kept = values[keep].astype(np.float64)
    ends = bootstrap_interval(kept, list(compress(groups, keep)))
    return {name: float(kept.mean()), f"{name}_interval": tuple(ends)}


def _lean(codes: Codes, given: Codes, side: Codes, groups: Sequence[str]) -> dict[str, Any]:
    """How often one side (the longer, the judge's own) wins: by the judge, and by the labels."""
    tie = VERDICTS.index("tie")
    judged = (side >= 0) & (codes >= 0) & (codes != tie)
    both = judged & (given >= 0) & (given != tie)
    wins, labelled = (codes == side).astype(np.float64), (given == side).astype(np.float64)
    return {
        "n": int(judged.sum()),
        **_share("judge", wins, groups, judged),
        "n_with_label": int(both.sum()),
        **_share("label", labelled, groups, both),
        **_share("difference", wins - labelled, groups, both),
    }


# ---------------------------------------------------------------------- agreement


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's κ (1960): (p_o − p_e) / (1 − p_e), how far two agree beyond chance.

    p_o is the share of rows on which both agree, p_e the share on which they would if each kept
    their own frequencies and labelled at random. 1 is perfect, 0 is chance. Chapter 3.

    Parameters
    ----------
    first, second : sequence ``[n]``
        The labels of each; any values that compare.

    Returns
    -------
    float
        NaN if both give one and the same label to all rows: chance alone then explains everything.

    Raises
    ------
    ShapeError
        If the lengths differ or there are no rows.
    """
    if len(first) != len(second) or not len(first):
        raise ShapeError(f"{len(first)} and {len(second)} labels; κ needs as many, and some")
    # (scikit-learn's cohen_kappa_score gives the same; thousands of resamples want codes)
    names = {label: code for code, label in enumerate(dict.fromkeys([*first, *second]))}
    codes = np.array([[names[x], names[y]] for x, y in zip(first, second, strict=True)])
    return _kappa(codes, len(names))


def _kappa(codes: npt.NDArray[Any], size: int) -> float:
    cells = np.bincount(size * codes[:, 0] + codes[:, 1], minlength=size * size)
    table = cells.reshape(size, size) / len(codes)
    expected = float(table.sum(axis=1) @ table.sum(axis=0))
    if 1 - expected < 1e-12:
        return float("nan")
    return (float(np.trace(table)) - expected) / (1 - expected)


def verdict_codes(verdicts: Sequence[str | None]) -> Codes:
    """``[n]`` codes in the order of :data:`VERDICTS`; −1 for None and ``none``."""
    table: dict[str | None, int] = {name: code for code, name in enumerate(VERDICTS)}
    table |= {None: -1, "none": -1}
    try:
        return np.array([table[verdict] for verdict in verdicts], dtype=np.int64)
    except KeyError as error:
        raise DataError(f"no verdict {error.args[0]!r}", "write a, b, tie or none") from error


def agreement(first: Codes, second: Codes, groups: Sequence[str]) -> dict[str, Any]:
    """Agreement of two on the rows that both labelled.

    Parameters
    ----------
    first, second : int64 array ``[n]``
        Codes of :func:`verdict_codes`; rows with a −1 are left out.
    groups : sequence ``[n]``
        The prompt of each row; intervals draw whole prompts.

    Returns
    -------
    dict
        ``n``; ``agreement`` and ``kappa`` over a, b and tie, each with ``…_interval`` (95%; None
        where a resample has no κ, all its rows being alike);
        ``n_decided`` and ``agreement_decided`` where neither says tie; ``table``, the counts,
        first by second. Figures without rows are None.
    """
    both = (first >= 0) & (second >= 0)
    codes = np.stack([first[both], second[both]], axis=1)
    out: dict[str, Any] = {"n": len(codes), "left_out": int((~both).sum())}
    if not len(codes):
        return out | {"agreement": None, "kappa": None}
    kept = list(compress(groups, both))
    same = (codes[:, 0] == codes[:, 1]).astype(np.float64)
    kappa = _kappa(codes, len(VERDICTS))
    decided = (codes < 2).all(axis=1)
    table = np.bincount(3 * codes[:, 0] + codes[:, 1], minlength=9).reshape(3, 3)
    low, high = bootstrap_interval(
        codes, kept, statistic=lambda drawn: _kappa(drawn, len(VERDICTS)), n_resamples=1000
    )
    return out | {
        "agreement": float(same.mean()),
        "agreement_interval": tuple(bootstrap_interval(same, kept)),
        "kappa": None if np.isnan(kappa) else kappa,
        "kappa_interval": None if np.isnan(low) or np.isnan(high) else (low, high),
        "n_decided": int(decided.sum()),
        "agreement_decided": float(same[decided].mean()) if decided.any() else None,
        "table": table.tolist(),
    }


# ---------------------------------------------------------------------- several annotators


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
        Rows with ``id``, ``prompt``, ``a``, ``b``, ``preference`` (or ``winner``, ``label``),
        ``annotator``, and ``kind`` (``human`` or anything else).

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
    human: dict[str, bool] = {}
    for where, row in read_rows(Path(path)):
        for name in ("id", "prompt", "a", "b", "annotator"):
            if row.get(name) is None:
                raise DataError(f"{where}: no {name!r}", "each row is one annotator's verdict")
        column, key, who = verdict_column(row), str(row["id"]), str(row["annotator"])
        try:
            verdict = verdict_side(row.get(column), column)
        except RowError as error:
            raise RowProblem.of(error, where).as_error() from error
        texts = (row["prompt"], row["a"], row["b"])
        if pairs.setdefault(key, texts) != texts:
            raise DataError(f"{where}: id {key!r} stood for another pair before", "mend the ids")
        if (key, who) in verdicts:
            raise DataError(f"{where}: {who!r} judges {key!r} twice", "keep one of the two")
        is_human = row.get("kind") == "human"
        if human.setdefault(who, is_human) != is_human:
            raise DataError(f"{where}: {who!r} has two kinds", "give an annotator one kind")
        verdicts[key, who] = verdict
    if not verdicts:
        raise DataError(f"{path}: no verdicts", "check the file")
    ids, annotators = list(pairs), list(human)
    groups = [prompt_key({"prompt": prompt}) for prompt, _, _ in pairs.values()]
    codes = np.stack(
        [verdict_codes([verdicts.get((key, who)) for key in ids]) for who in annotators], axis=1
    )
    return Annotations(ids, groups, annotators, list(human.values()), codes)


def annotator_report(annotations: Annotations) -> JudgeReport:
    """Agreement of every two annotators, and of each with the majority of the people. Chapter 3.

    Parameters
    ----------
    annotations : Annotations

    Returns
    -------
    JudgeReport
        ``pairs``; ``annotators``: the counts of their verdicts; ``with_each_other``: for ``x | y``
        as :func:`agreement` says; ``people``: of all people together, with the ceiling on accuracy,
        as :func:`companion.functional.annotator_agreement` says; ``with_majority``: against the
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
        for i, j in combinations(range(len(names)), 2)
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
            "people": annotator_agreement(codes[:, annotations.human], groups)
            if people > 1
            else None,
            "with_majority": majority or None,
        }
    )
