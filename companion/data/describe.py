"""What a set of rows looks like, before any model sees it. Chapter 4."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from companion.data.formats import detect_kind
from companion.data.messages import form, plain
from companion.data.splits import prompt_key


def describe_rows(rows: Iterable[Mapping[str, Any]], kind: str | None = None) -> dict[str, Any]:
    """Counts, lengths, labels, and how often the longer completion wins.

    Parameters
    ----------
    rows : iterable of mapping
        Canonical rows, as :func:`companion.data.load_rows` gives them.
    kind : str, optional
        By the columns if not given.

    Returns
    -------
    dict
        ``rows``, ``kind``, ``prompts`` (different ones), ``form``, ``columns``, ``lengths``
        (characters: median, 90%, max, per field), ``subsets``; for pairs ``longer_wins`` (share of
        pairs of unequal length in which the chosen one is longer: the floor that a model has to
        beat) and ``equal_length``; for outcomes and steps ``labels``.
    """
    lengths: dict[str, list[int]] = {}
    labels: Counter[str] = Counter()
    subsets: Counter[str] = Counter()
    columns: dict[str, None] = {}
    prompts: set[str] = set()
    forms: Counter[str] = Counter()
    for row in rows:
        columns.update(dict.fromkeys(row))
        if row.get("prompt") is not None or "chosen" in row:
            prompts.add(prompt_key(row))
        if row.get("subset") is not None:
            subsets[str(row["subset"])] += 1
        forms[form(row["prompt"] if row.get("prompt") is not None else row.get("chosen"))] += 1
        for name in ("prompt", "chosen", "rejected", "completion"):
            if row.get(name) is not None:
                lengths.setdefault(name, []).append(len(plain(row[name])))
        for text in row.get("completions") or []:
            lengths.setdefault("completions", []).append(len(plain(text)))
        given = row["labels"] if "labels" in row else [row["label"]] if "label" in row else []
        # soft labels are counted by tenths
        labels.update(f"{x:.1f}" if isinstance(x, float) else str(x) for x in given)
    out: dict[str, Any] = {
        "rows": forms.total(),
        "kind": kind or detect_kind(columns),
        "prompts": len(prompts),
        "form": dict(forms),
        "columns": list(columns),
        "lengths": {name: _lengths(values) for name, values in lengths.items()},
        "subsets": dict(subsets.most_common()),
    }
    if "chosen" in columns:
        gaps = [c - r for c, r in zip(lengths["chosen"], lengths["rejected"], strict=True)]
        unequal = len(gaps) - gaps.count(0)
        out["longer_wins"] = sum(gap > 0 for gap in gaps) / unequal if unequal else None
        out["equal_length"] = gaps.count(0)
    if labels:
        out["labels"] = dict(labels.most_common())
    return out


def _lengths(values: list[int]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "median": statistics.median(ordered),
        "p90": ordered[int(0.9 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def describe_lines(description: Mapping[str, Any]) -> list[str]:
    """:func:`describe_rows` as text."""
    d = description
    forms = ", ".join(f"{n:,} {name}" for name, n in d["form"].items())
    lines = [
        f"{d['rows']:,} {d['kind']}, {d['prompts']:,} different prompts ({forms})",
        f"columns: {', '.join(d['columns'])}",
    ]
    if d["lengths"]:
        lines.append(f"{'characters':<14}{'n':>9}{'median':>9}{'90%':>9}{'max':>9}")
        for name, v in d["lengths"].items():
            lines.append(
                f"  {name:<12}{v['n']:>9,}{v['median']:>9,.0f}{v['p90']:>9,}{v['max']:>9,}"
            )
    if d.get("longer_wins") is not None:
        lines.append(
            f"the longer completion is chosen in {d['longer_wins']:.1%} "
            f"of pairs of unequal length ({d['equal_length']:,} equal)"
        )
    if "labels" in d:
        lines.append("labels: " + ", ".join(f"{name} {n:,}" for name, n in d["labels"].items()))
    if d["subsets"]:
        top = list(d["subsets"].items())[:10]
        more = f", … ({len(d['subsets'])} in all)" if len(d["subsets"]) > 10 else ""
        lines.append("subsets: " + ", ".join(f"{name} {n:,}" for name, n in top) + more)
    return lines
