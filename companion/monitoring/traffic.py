"""Texts without labels: do their scores, their lengths and their form look as before? Chapter 7.

What is seen here is a warning and never a verdict: a policy that learns *should* move its scores,
and nothing without a label says whether the model is still right. So a week is held against the
first weeks of the same traffic, and only what is both large and more than noise is said.

A week is kept as a summary, not as texts: counts, and 101 quantiles of scores and lengths.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

from companion.errors import DataError
from companion.functional.similarity import ALIKE, shingles

if TYPE_CHECKING:
    from companion.models.manifest import ReferenceStats

#: Chance that a single comparison warns of nothing. With some eight comparisons a week that is a
#: false warning in about two and a half years.
ALPHA: Final = 0.001
#: PSI from which a change is worth a line, whatever the size of the sample: the customary bound of
#: 'some change' (0.25: 'large'). Of normal scores it is a shift of the mean by 0.32 standard
#: deviations, or a standard deviation that is 1.25 times what it was.
PSI_BOUND: Final = 0.1
#: A share must rise by two points and by half of what it was: a doubling of one cut text in a
#: thousand is no news, nor is 31% of near-duplicates after 30%.
SHARE_RISE: Final = 0.02
SHARE_GROWTH: Final = 0.5
#: Share of scores beyond the reference's 1st or 99th percentile (2% of the reference's own) from
#: which the model is said to be asked for what it was not measured on.
OUTSIDE_BOUND: Final = 0.1
#: Near-duplicates are looked for among this many texts at a time, in their order: the share of
#: texts that repeat another grows with their number, and so weeks of two sizes can be compared.
BLOCK: Final = 500
_GRID: Final = np.linspace(0.0, 1.0, 101)

#: The shares of a summary, in words.
SHARES: Final[Mapping[str, str]] = {
    "cut": "texts whose prompt was cut to fit",
    "unfinished": "completions that were cut off",
    "duplicates": "texts that nearly repeat another",
    "template_warnings": "texts with a warning about their form or template",
    "not_scored": "texts without a score",
}


@dataclass(frozen=True)
class Spread:
    """A distribution, kept as its quantiles.

    Attributes
    ----------
    n : int
        Number of values.
    mean, std : float
        Sample standard deviation; 0 of a single value.
    quantiles : list of float
        The 101 percentiles 0, 1, …, 100.
    """

    n: int
    mean: float
    std: float
    quantiles: list[float]

    @classmethod
    def of(cls, values: npt.ArrayLike, step: float = 0.0) -> Spread | None:
        """Of finite values; None of none.

        Values on a grid of this `step` are spread evenly over it before their quantiles are taken:
        between quantiles that fall together nobody could say how many texts lie at or below.
        """
        array = np.sort(np.asarray(values, dtype=np.float64))
        if not array.size:
            return None
        std = float(array.std(ddof=1)) if array.size > 1 else 0.0
        _, first, count = np.unique(array, return_index=True, return_counts=True)
        place = (np.arange(array.size) - np.repeat(first, count) + 0.5) / np.repeat(count, count)
        spread = array + step * (place - 0.5)
        return cls(int(array.size), float(array.mean()), std, np.quantile(spread, _GRID).tolist())

    def below(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Share of the values at or below each point, between the quantiles by a line."""
        grid = np.asarray(self.quantiles)
        unique, first = np.unique(grid, return_index=True)
        low, high = _GRID[first], _GRID[np.searchsorted(grid, unique, side="right") - 1]
        steps = high > low  # equal quantiles: several texts have that very value
        low[1:] = np.where(steps[1:] & steps[:-1], high[:-1], low[1:])  # between two is nothing
        at = np.searchsorted(unique, points, side="right") - 1
        here, after = np.clip(at, 0, None), np.clip(at + 1, None, len(unique) - 1)
        gap = unique[after] - unique[here]
        way = np.divide(points - unique[here], gap, out=np.zeros(len(points)), where=gap > 0)
        return np.where(at < 0, 0.0, high[here] + way * (low[after] - high[here]) * (gap > 0))


@dataclass
class TrafficSummary:
    """A week of traffic, without its texts.

    Attributes
    ----------
    texts : int
        How many there were.
    groups : int
        Prompts, where they are known, else requests, else texts: what counts as independent.
    scores : Spread or None
        Raw ones, of texts that have one.
    lengths : Spread or None
    length_unit : str
        ``tokens`` or ``characters``.
    shares : dict of str to [int, int]
        By the names in :data:`SHARES`: how many, of how many of which it is known.
    prompts_known : int
        Texts whose prompt is told apart. Of the others only exact repeats count as duplicates.
    versions : dict of str to int
        Texts by ``model_version``, where they have one.
    begin, end : str or None
        Earliest and latest time, ISO 8601.
    golden : int
        Golden texts that were left out.
    bad_rows : int
        Rows that hold no text.
    bad : list of str
        What was wrong with the first five of them.
    """

    texts: int = 0
    groups: int = 0
    scores: Spread | None = None
    lengths: Spread | None = None
    length_unit: str = "tokens"
    shares: dict[str, list[int]] = field(default_factory=dict)
    prompts_known: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    begin: str | None = None
    end: str | None = None
    golden: int = 0
    bad_rows: int = 0
    bad: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrafficSummary:
        """What :meth:`to_dict` gave.

        Raises
        ------
        DataError
            For other data.
        """
        try:
            own = dict(data)
            for name in ("scores", "lengths"):
                own[name] = None if own[name] is None else Spread(**own[name])
            return cls(**own)
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"no summary of traffic: {error}", "give what TrafficSummary.to_dict made"
            ) from error


@dataclass(frozen=True)
class TrafficWarning:
    """One thing that is not as before.

    Attributes
    ----------
    name : str
        ``scores``, ``lengths``, ``outside``, a share's name, ``model_version`` or ``no_traffic``.
    what : str
        In words, with the size of the change.
    size, bound : float
        The change, and what it was held against: PSI, or a difference of shares.
    """

    name: str
    what: str
    size: float
    bound: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


# ---------------------------------------------------------------------- rows


def read_traffic(path: str | os.PathLike[str]) -> Iterator[dict[str, Any] | DataError]:
    """Rows of a JSONL file, or of all ``*.jsonl`` of a folder (the server's ``--log_dir``).

    A line that is no object is given as the error that names it.

    Raises
    ------
    DataError
        If there is no such file, or no file in the folder.
    """
    given = Path(path)
    files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path}: no JSONL there", "give a file, or the folder of --log_dir")
    return _rows_of(files)


def _rows_of(files: Sequence[Path]) -> Iterator[dict[str, Any] | DataError]:
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:  # the last line of a log that is being written, say
                    yield DataError(f"{file.name} line {number}: no valid JSON")
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    yield DataError(f"{file.name} line {number}: no object")


@dataclass
class _Text:
    """What is known of one text."""

    units: list[Any]  # words or token ids of the completion; of the whole, if that is unknown
    group: Any
    length: int
    unit: str
    prompt_known: bool
    score: Any = None
    has_score: bool = False
    row: Mapping[str, Any] = field(default_factory=dict)


def summarise_traffic(
    rows: Iterable[Mapping[str, Any] | DataError], *, golden: Iterable[Sequence[int]] = ()
) -> TrafficSummary:
    """Scores, lengths, and shares of a week of texts.

    Parameters
    ----------
    rows : iterable of mapping
        Each ``prompt`` and ``completion`` (text or messages), ``input_ids`` (with
        ``prompt_length``), ``text`` or ``item`` (a line of the request log); or the two sides of a
        pair (``chosen`` and ``rejected``, ``a`` and ``b``, with ``scores``). Beside it, where they
        are known: ``score`` or ``raw``, ``n_tokens``, ``cut_tokens``, ``terminated``, ``warnings``,
        ``prompt_id``, ``model_version``, ``time`` (ISO 8601 or Unix seconds). They are read once,
        and not kept.
    golden : iterable of sequence of int
        Token ids of the golden texts: the log of a server that is checked by them holds them, and
        they are no traffic.

    Returns
    -------
    TrafficSummary
        Rows that hold no text are counted and named.
    """
    found = TrafficSummary(shares={name: [0, 0] for name in SHARES})
    scores: list[float] = []
    lengths: dict[str, list[int]] = {"tokens": [], "characters": []}
    groups: set[Any] = set()
    versions: Counter[str] = Counter()
    times: list[float] = []
    block: list[_Text] = []
    blocks: list[tuple[int, int]] = []
    own = {tuple(ids) for ids in golden}
    for number, row in enumerate(rows):
        if own and isinstance(row, Mapping) and _ids_of(row) in own:
            found.golden += 1
            continue
        try:
            if isinstance(row, DataError):
                raise row
            texts = _texts_of(row, number)
        except DataError as error:
            found.bad_rows += 1
            found.bad += [error.what] if len(found.bad) < 5 else []
            continue
        time = seconds_of(row.get("time"))
        times = [min([*times[:1], time]), max([*times[1:], time])] if time is not None else times
        for text in texts:
            found.texts += 1
            found.prompts_known += text.prompt_known
            groups.add(text.group)
            lengths[text.unit].append(text.length)
            if row.get("model_version") is not None:
                versions[str(row["model_version"])] += 1
            for name, value in _marks(text).items():
                if value is not None:
                    found.shares[name][0] += value
                    found.shares[name][1] += 1
            if text.has_score and _is_finite(text.score):
                scores.append(float(text.score))
            block.append(text)
        if len(block) >= BLOCK:
            blocks.append(_repeats(block[:BLOCK]))
            block = block[BLOCK:]
    if not blocks and len(block) > 1:  # a last block that is shorter would find fewer
        blocks.append(_repeats(block))
    found.shares["duplicates"] = [sum(part) for part in zip(*blocks, strict=True)] or [0, 0]
    found.groups = len(groups)
    found.scores = Spread.of(scores)
    # (a mixture of two units would say nothing)
    found.length_unit = max(lengths, key=lambda unit: len(lengths[unit]))
    found.lengths = Spread.of(lengths[found.length_unit], step=1.0)
    found.versions = dict(versions)
    if times:
        begin, end = (datetime.fromtimestamp(t, UTC).isoformat(timespec="seconds") for t in times)
        found.begin, found.end = begin, end
    return found


def merge_summaries(weeks: Sequence[TrafficSummary]) -> TrafficSummary:
    """One summary of several weeks, for a baseline; quantiles within a hundredth of their rank.

    Raises
    ------
    DataError
        For no week, or lengths in two units.
    """
    weeks = [week for week in weeks if week.texts]
    units = {week.length_unit for week in weeks}
    if len(units) != 1:
        raise DataError(
            f"{len(weeks)} weeks with texts, lengths in {' and '.join(sorted(units)) or 'no unit'}",
            "give weeks of one kind of rows",
        )
    total = TrafficSummary(length_unit=units.pop())
    for week in weeks:
        total.texts += week.texts
        total.groups += week.groups
        total.prompts_known += week.prompts_known
        total.golden += week.golden
        total.bad_rows += week.bad_rows
        total.bad = [*total.bad, *week.bad][:5]
        total.versions = dict(Counter(total.versions) + Counter(week.versions))
    total.shares = {
        name: [sum(week.shares.get(name, [0, 0])[i] for week in weeks) for i in (0, 1)]
        for name in SHARES
    }
    total.begin = min((week.begin for week in weeks if week.begin), default=None)
    total.end = max((week.end for week in weeks if week.end), default=None)
    total.scores = _mixture([week.scores for week in weeks])
    total.lengths = _mixture([week.lengths for week in weeks])
    return total


# ---------------------------------------------------------------------- comparison


def compare_traffic(
    now: TrafficSummary,
    baseline: TrafficSummary | None = None,
    reference: ReferenceStats | None = None,
    *,
    alpha: float = ALPHA,
) -> list[TrafficWarning]:
    """What is not as before, the size of each change in words; warnings, never a verdict.

    Distributions are compared by the population stability index over the baseline's deciles,
    ``PSI = sum((p - q) * ln(p / q))``. Under no change it is distributed about as
    ``(1/n + 1/m) * chi2(bins - 1)`` (Yurdakul and Naranjo, 2020, 'Statistical properties of the
    population stability index', Journal of Risk Model Validation, doi 10.21314/JRMV.2020.227), so
    its bound falls with the size of both samples, down to :data:`PSI_BOUND`. Shares are compared
    by Fisher's exact test. ``n`` and ``m`` are the numbers of prompts, not of texts: completions of
    one prompt go together.

    Parameters
    ----------
    now : TrafficSummary
        The week.
    baseline : TrafficSummary, optional
        Of the first weeks of the same traffic.
    reference : ReferenceStats, optional
        Of the manifest. Its texts were not drawn from the policy that is scored, so scores are held
        against it only for how many lie outside, and as a whole where there is no baseline.
    alpha : float
        Chance that one comparison warns where nothing has changed.

    Raises
    ------
    DataError
        For an `alpha` outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise DataError(f"alpha is {alpha}", "use a probability inside (0, 1)")
    if not now.texts:
        what = "no texts"
        if baseline is not None and baseline.texts:
            what += f", and {baseline.texts:,} when watching began"
        return [TrafficWarning("no_traffic", what, 0.0, 0.0)]
    said: list[TrafficWarning] = []
    comparable = True
    if len(now.versions) > 1:
        told = ", ".join(f"{n:,} of {v}" for v, n in sorted(now.versions.items()))
        said.append(
            TrafficWarning(
                "model_version", f"scores of several models: {told}", len(now.versions), 1
            )
        )
        comparable = False
    others = set() if baseline is None else set(baseline.versions)
    if comparable and now.versions and others and set(now.versions) != others:
        what = f"scores are of {next(iter(now.versions))}, the baseline's of "
        what += f"{' and '.join(sorted(others))}: not compared"
        said.append(TrafficWarning("model_version", what, 1.0, 0.0))
        comparable = False
    if comparable and now.scores is not None:
        said += _of_scores(now, baseline, reference, alpha)
    if baseline is not None:
        said += _of_lengths(now, baseline, alpha)
        said += _of_shares(now, baseline, alpha)
    return said


def population_stability(now: Spread, before: Spread, bins: int = 10) -> tuple[float, int]:
    """PSI over the deciles of `before`, and the number of bins that hold anything.

    Half a count is added to each bin, without which an empty one would make it infinite. A value
    that many texts have has a bin of its own.
    """
    grid = np.asarray(before.quantiles)
    edges = np.quantile(grid, np.linspace(0, 1, bins + 1)[1:-1])
    steps = [edge for edge in edges if (grid == edge).sum() > 1]
    edges = np.unique([*edges, *np.nextafter(steps, -np.inf)])
    shares = [
        np.diff(np.concatenate([[0.0], spread.below(edges), [1.0]])) for spread in (now, before)
    ]
    filled = (shares[0] > 1e-9) | (shares[1] > 1e-9)  # between two steps there may be nothing
    p, q = (
        (share[filled] * spread.n + 0.5) / (spread.n + 0.5 * filled.sum())
        for share, spread in zip(shares, (now, before), strict=True)
    )
    return float(((p - q) * np.log(p / q)).sum()), int(filled.sum())


def _psi_bound(bins: int, n: int, m: int, alpha: float) -> float:
    noise = float(stats.chi2.isf(alpha, max(bins - 1, 1))) * (1 / max(n, 1) + 1 / max(m, 1))
    return max(PSI_BOUND, noise)


def _of_scores(
    now: TrafficSummary,
    baseline: TrafficSummary | None,
    reference: ReferenceStats | None,
    alpha: float,
) -> list[TrafficWarning]:
    assert now.scores is not None
    said = []
    own = now.scores
    independent = _independent(now, own.n)
    unit = 0.0 if reference is None else reference.std
    if baseline is not None and baseline.scores is not None:
        before, others = baseline.scores, _independent(baseline, baseline.scores.n)
        psi, bins = population_stability(own, before)
        bound = _psi_bound(bins, independent, others, alpha)
        if psi > bound:
            what = _moved("scores", own, before, unit or before.std, psi, bound)
            said.append(TrafficWarning("scores", what, psi, bound))
    if reference is None:
        return said
    if baseline is None:
        before = Spread(reference.n, reference.mean, reference.std, list(reference.quantiles))
        psi, bins = population_stability(own, before)
        bound = _psi_bound(bins, independent, reference.n, alpha)
        if psi > bound:
            what = _moved("scores", own, before, unit, psi, bound)
            what += "; against the model's reference, whose texts the policy did not write"
            said.append(TrafficWarning("scores", what, psi, bound))
    low, high = reference.quantiles[1], reference.quantiles[99]
    under, over = own.below(np.array([np.nextafter(low, -np.inf), high]))
    outside = float(under + 1 - over)
    # (each end of the interval that a share of this many texts has)
    noise = float(stats.norm.isf(alpha)) * math.sqrt(0.02 * 0.98 / independent)
    bound = max(OUTSIDE_BOUND, 0.02 + noise)
    if outside > bound:
        what = (
            f"{outside:.0%} of the scores lie outside what the reference holds, {low:.3g} to "
            f"{high:.3g} (2% of its own do; bound {bound:.0%}): {1 - float(over):.0%} above, "
            f"{float(under):.0%} below"
        )
        said.append(TrafficWarning("outside", what, outside, bound))
    return said


def _of_lengths(
    now: TrafficSummary, baseline: TrafficSummary, alpha: float
) -> list[TrafficWarning]:
    own, before = now.lengths, baseline.lengths
    if own is None or before is None or now.length_unit != baseline.length_unit:
        return []
    psi, bins = population_stability(own, before)
    n, m = _independent(now, own.n), _independent(baseline, before.n)
    bound = _psi_bound(bins, n, m, alpha)
    if psi <= bound:
        return []
    middle = f"median {before.quantiles[50]:.0f} → {own.quantiles[50]:.0f} {now.length_unit}"
    what = f"lengths: {middle}, PSI {psi:.2f} (bound {bound:.2f})"
    return [TrafficWarning("lengths", what, psi, bound)]


def _of_shares(now: TrafficSummary, baseline: TrafficSummary, alpha: float) -> list[TrafficWarning]:
    said = []
    for name, words in SHARES.items():
        (k, n), (j, m) = now.shares.get(name, [0, 0]), baseline.shares.get(name, [0, 0])
        if not n or not m:
            continue
        if name == "duplicates" and _prompts_known(now) != _prompts_known(baseline):
            continue  # exact repeats of whole texts are not near ones of completions
        share, before = k / n, j / m
        bound = max(SHARE_RISE, SHARE_GROWTH * before)
        if share - before < bound:
            continue
        few, many = _independent(now, n), _independent(baseline, m)
        k, j = round(share * few), round(before * many)
        if float(stats.hypergeom.sf(k - 1, few + many, k + j, few)) >= alpha:
            continue
        what = f"{words}: {before:.1%} → {share:.1%}"
        said.append(TrafficWarning(name, what, share - before, bound))
    return said


def _moved(name: str, own: Spread, before: Spread, unit: float, psi: float, bound: float) -> str:
    """How a distribution moved, in words."""
    told = f"{name}: mean {before.mean:.3g} → {own.mean:.3g}"
    if unit > 0:
        told += f" ({(own.mean - before.mean) / unit:+.2f} standard deviations)"
    told += f", standard deviation {before.std:.3g} → {own.std:.3g}"
    return f"{told}, PSI {psi:.2f} (bound {bound:.2f})"


def _independent(summary: TrafficSummary, n: int) -> int:
    """How many of `n` texts count: as many as there are groups, by their share."""
    return max(1, round(n * min(1.0, summary.groups / max(summary.texts, 1))))


def _prompts_known(summary: TrafficSummary) -> bool:
    return 2 * summary.prompts_known >= summary.texts


def _mixture(parts: Sequence[Spread | None]) -> Spread | None:
    """All parts together, each by its number."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    n = sum(part.n for part in known)
    mean = sum(part.n * part.mean for part in known) / n
    squares = sum((part.n - 1) * part.std**2 + part.n * (part.mean - mean) ** 2 for part in known)
    points = np.unique(np.concatenate([part.quantiles for part in known]))
    share = np.sum([part.n / n * part.below(points) for part in known], axis=0)
    places = np.minimum(np.searchsorted(share, _GRID - 1e-12), len(points) - 1)
    std = math.sqrt(squares / (n - 1)) if n > 1 else 0.0
    return Spread(n, mean, std, points[places].tolist())


# ---------------------------------------------------------------------- texts


def _texts_of(row: Mapping[str, Any], number: int) -> list[_Text]:
    """The texts of a row: one, or the two sides of a pair.

    Raises
    ------
    DataError
        If there is none.
    """
    where = f"row {row.get('id', number)}"
    sides = next((s for s in (("chosen", "rejected"), ("a", "b")) if s[0] in row), None)
    if sides is not None and row.get("completion") is None and row.get("input_ids") is None:
        scores = row.get("scores") or {}
        if not isinstance(scores, Mapping):
            raise DataError(f"{where}: scores is no object")
        texts = []
        for side in sides:
            own = {**row, "completion": row.get(side)}
            if side in scores:
                own["score"] = scores[side]
            texts.append(_text_of(own, where))
        return texts
    return [_text_of(row, where)]


def _text_of(row: Mapping[str, Any], where: str) -> _Text:
    name = next((name for name in ("raw", "score") if name in row), None)
    score = None if name is None else row[name]
    shared: dict[str, Any] = {"score": score, "has_score": name is not None, "row": row}
    prompt, ids = row.get("prompt"), row.get("input_ids")
    if isinstance(ids, list) and ids:
        cut = row.get("prompt_length") or 0
        known = cut > 1  # (1: the BOS alone)
        group: Any = row.get("prompt_id")
        if group is None:
            group = tuple(ids[:cut]) if known else row.get("request", where)
        # no border: only the same text counts as the same, not one that shares a long prompt
        units = ids[cut:] if known else [tuple(ids)]
        return _Text(units, _key(group), len(ids), "tokens", known, **shared)
    item = row.get("item")
    if row.get("completion") is None and isinstance(item, Mapping):
        return _text_of({**item, **{k: v for k, v in row.items() if k != "item"}}, where)
    completion = _words(row.get("completion"))
    known = completion is not None
    if completion is None:
        messages = row.get("messages")
        completion = _words(row.get("text") if messages is None else messages)
        if isinstance(messages, list) and len(messages) > 1:
            completion, prompt, known = _words(messages[-1:]), messages[:-1], True
    if completion is None:
        raise DataError(f"{where}: holds no completion, text, messages or input_ids")
    group = row.get("prompt_id")
    if group is None:
        group = row.get("request", where) if prompt is None else prompt
    n_tokens = row.get("n_tokens")
    if isinstance(n_tokens, int) and not isinstance(n_tokens, bool):
        length, unit = n_tokens, "tokens"
    else:
        length, unit = len(completion), "characters"
    units = completion.casefold().split() if known else [completion]
    return _Text(units, _key(group), length, unit, known, **shared)


def _ids_of(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The token ids of a row, if it has them."""
    ids = row.get("input_ids")
    return tuple(ids) if isinstance(ids, list) and ids and isinstance(ids[0], int) else None


def _key(group: Any) -> int:
    """A prompt as a number: texts are not kept."""
    return hash(group if isinstance(group, tuple) else json.dumps(group, sort_keys=True))


def _words(value: Any) -> str | None:
    """The words of a text or of messages; None if it is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return "\n".join(str(one.get("content") or "") for one in value)
    return None


def _marks(text: _Text) -> dict[str, bool | None]:
    """What is known of a text, by the names of the shares; None where it is not."""
    row = text.row
    told = row.get("warnings")
    words = [str(one) for one in told] if isinstance(told, list) else None
    cut, finished = row.get("cut_tokens"), row.get("terminated")
    unfinished = None if not isinstance(finished, bool) else not finished
    template: bool | None = None
    if words is not None:
        # what a server says of the two other marks, in the answers that a client may have kept
        own = [
            w for w in words if not w.startswith("unfinished:") and "tokens of the prompt" not in w
        ]
        template = bool(own)
        if unfinished is None and any(w.startswith("unfinished:") for w in words):
            unfinished = True
    return {
        "cut": cut > 0 if isinstance(cut, (int, float)) else None,
        "unfinished": unfinished,
        "template_warnings": template,
        "not_scored": not _is_finite(text.score) if text.has_score else None,
    }


def _repeats(texts: Sequence[_Text]) -> tuple[int, int]:
    """How many of the texts nearly repeat an earlier one, of how many.

    By the exact Jaccard similarity of their sets of three units in a row, all at once: the product
    of a sparse matrix ``[texts, shingles]`` of zeros and ones with itself counts what two share.
    """
    numbers: dict[Any, int] = {}
    rows, columns = [], []
    for i, text in enumerate(texts):
        own = shingles([numbers.setdefault(unit, len(numbers)) for unit in text.units])
        rows.append(np.full(len(own), i))
        columns.append(own)
    places, column = np.unique(np.concatenate(columns), return_inverse=True)
    row = np.concatenate(rows)
    ones = np.ones(len(row), dtype=np.int64)
    matrix = sparse.csr_matrix((ones, (row, column)), shape=(len(texts), len(places)))
    both = sparse.tril(matrix @ matrix.T, k=-1, format="coo")
    sizes = np.bincount(row, minlength=len(texts))
    alike = both.data / (sizes[both.row] + sizes[both.col] - both.data) >= ALIKE
    return int(np.unique(both.row[alike]).size), len(texts)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def seconds_of(time: Any) -> float | None:
    """Unix seconds of what a row says; None if it says nothing that is a time."""
    if _is_finite(time):
        return float(time)
    try:
        found = datetime.fromisoformat(str(time))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
