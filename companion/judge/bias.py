"""What a judge prefers besides the better answer: place, length, its own writing. Chapter 3.

Computed from verdicts as :func:`companion.judge.files.judge_file` writes them. Intervals are
bootstrap intervals (95%) that draw whole prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation.tables import format_table
from companion.judge.agreement import VERDICTS, agreement, verdict_codes
from companion.judge.rows import GIVEN, spoken
from companion.resampling import bootstrap_interval


@dataclass(frozen=True)
class JudgeReport:
    """Figures of a judge (or of several annotators), as plain JSON values. Chapter 3."""

    figures: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write the figures as JSON; folders are made."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.figures, indent=2, ensure_ascii=False, allow_nan=False)
        target.write_text(text + "\n", encoding="utf-8")
        return target

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
        see :func:`companion.judge.agreement.agreement`. Parts that the rows do not allow are None.

    Raises
    ------
    DataError
        If there are no rows, or a row lacks a field (the row is named).
    """
    if not rows:
        raise DataError("no verdicts to report on")
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
    wins = np.concatenate([first == 0, swapped == 1]).astype(np.float64)
    decided = np.concatenate([(first == 0) | (first == 1), (swapped == 0) | (swapped == 1)])
    both = (first >= 0) & (swapped >= 0)
    out: dict[str, Any] = {"n_answers": int(decided.sum()), "n_rows": int(both.sum())}
    out |= _share("first_share", wins[decided], _pick([*groups, *groups], decided))
    agree = (first == swapped)[both].astype(np.float64)
    out |= _share("consistent", agree, _pick(groups, both))
    one, two = (
        np.array([_number(row.get(name)) for row in rows])
        for name in ("logit_first", "logit_swapped")
    )
    known = np.isfinite(one) & np.isfinite(two)
    return out | _share("logit", (one - two)[known] / 2, _pick(groups, known))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _pick(groups: Sequence[str], keep: npt.NDArray[np.bool_]) -> list[str]:
    return [group for group, kept in zip(groups, keep, strict=True) if kept]


def _share(name: str, values: npt.NDArray[Any], groups: Sequence[str]) -> dict[str, Any]:
    if not len(values):
        return {name: None}
    ends = bootstrap_interval(values.astype(np.float64), groups)
    return {name: float(values.mean()), f"{name}_interval": tuple(ends)}


def _lean(
    codes: npt.NDArray[np.int64],
    given: npt.NDArray[np.int64],
    side: npt.NDArray[np.int64],
    groups: Sequence[str],
) -> dict[str, Any]:
    """How often one side (the longer, the judge's own) wins: by the judge, and by the labels."""
    tie = VERDICTS.index("tie")
    judged = (side >= 0) & (codes >= 0) & (codes != tie)
    wins = (codes == side)[judged]
    out: dict[str, Any] = {"n": int(judged.sum())}
    out |= _share("judge", wins, _pick(groups, judged))
    both = judged & (given >= 0) & (given != tie)
    out["n_with_label"] = int(both.sum())
    out |= _share("label", (given == side)[both], _pick(groups, both))
    more = (codes == side)[both].astype(np.float64) - (given == side)[both]
    return out | _share("difference", more, _pick(groups, both))
