"""A model, a server or a judge on a published benchmark: its figures, intervals and floors.

Chapter 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np

from companion.data.messages import plain
from companion.data.splits import prompt_key
from companion.errors import DataError
from companion.evaluation.benchmarks.benchmark import Benchmark, Item, Result, margins
from companion.evaluation.benchmarks.catalogue import find_benchmark
from companion.evaluation.evaluation import Evaluation
from companion.evaluation.tables import format_table, percent
from companion.functional.resampling import Array, accuracy_interval, middle, resamples

if TYPE_CHECKING:
    from companion.scoring import Scorer

Progress = Callable[[int], None]
_RESAMPLES = 500
#: level -> how far a line of the table stands in
_INDENT = {"overall": "", "section": "  ", "subset": "    "}


class Judging(Protocol):
    """What :class:`companion.judge.Judge` offers, which stands on a higher floor."""

    template: Any

    def compare(
        self, rows: Sequence[Any], *, names: Sequence[str] | None, progress: Progress | None
    ) -> Sequence[Any]:
        """A verdict of each pair of ``a`` and ``b``, asked in both orders."""

    def grade(
        self, rows: Sequence[Any], *, names: Sequence[str] | None, progress: Progress | None
    ) -> Sequence[Any]:
        """A rating of each completion."""


@dataclass
class BenchmarkEvaluation(Evaluation):
    """A benchmark's items with what was said of them, and the published figures.

    Attributes
    ----------
    benchmark : Benchmark
    items : list of Item
    said : list of (ndarray or None)
        Of each item what :meth:`Benchmark.outcomes` takes; None where there is nothing.
    reasons : list of str or None
        Why an item does not count.
    skipped : Counter
        Rows that are no items, by reason.
    verdicts : Counter
        Of a judge, how its answers were read.
    notes : list of str
        What was assumed or changed on the way.
    even : float
        What a comparison that comes out even counts.
    seed : int
        Of the bootstrap.
    info : dict
    metrics : dict
        ``benchmark``; ``n_rows``; ``dropped`` {total, reasons}; ``left_out`` {reason: rows}, which
        the published figure leaves out too; ``missing``, published subsets that have no row;
        ``overall``, the figure; ``results``, a list with the overall figure first, of
        ``name``, ``level`` (overall, section or subset), ``n``, ``value``, ``interval`` (95%, over
        prompts; None if there is nothing to go by), ``figures`` (``value`` by its name, and its
        parts) and ``floors`` {rule: value}; ``leaderboard`` {name: value}, the same in one row;
        of a judge ``verdicts`` {what: count}; ``notes``.
    """

    benchmark: Benchmark
    items: list[Item]
    said: list[Array | None]
    reasons: list[str | None]
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    even: float = 0.0
    seed: int = 0
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(own is not None for own in self.said)

    def measure(self) -> Self:
        """Compute every figure, its interval and its floors."""
        lost = self.skipped + Counter(
            reason or "no score"
            for own, reason in zip(self.said, self.reasons, strict=True)
            if own is None
        )
        kept = [i for i, own in enumerate(self.said) if own is not None]
        if not kept:
            listing = ", ".join(f"{count} × {reason}" for reason, count in lost.most_common())
            raise DataError(
                f"{self.benchmark.title}: none of the rows can be used"
                + (f": {listing}" * bool(lost)),
                "look at the reasons: too long for the model, or not readable?",
            )
        items = [self.items[i] for i in kept]
        said = [own for own in self.said if own is not None]
        names = list(dict.fromkeys(item.subset for item in items))
        codes = np.array([names.index(item.subset) for item in items])
        groups = [item.group or prompt_key({"prompt": item.prompt}) for item in items]
        table = self.benchmark.outcomes(items, said, self.even)

        def figures(outcomes: Array, of: Any = codes) -> list[Result]:
            bounds = np.cumsum(np.bincount(of, minlength=len(names)))[:-1]
            parts = np.split(outcomes[np.argsort(of, kind="stable")], bounds)
            own = {name: part for name, part in zip(names, parts, strict=True) if len(part)}
            return self.benchmark.results(own)

        found = figures(table)
        drawn: dict[tuple[str, str], list[float]] = {(x.level, x.name): [] for x in found}
        for places in resamples(len(items), groups, _RESAMPLES, self.seed):
            for line in figures(table[places], codes[places]):
                drawn[line.level, line.name].append(line.value)
        floors = {
            name: {(x.level, x.name): x.value for x in figures(outcomes)}
            for name, outcomes in self.benchmark.floors(items).items()
        }
        results = []
        for line in found:
            key = (line.level, line.name)
            results.append(
                {
                    **{"name": line.name, "level": line.level, "n": line.n, "value": line.value},
                    "interval": _interval(line, drawn[key]),
                    "figures": line.figures,
                    "floors": {name: of[key] for name, of in floors.items()},
                }
            )
        self.metrics = {
            "benchmark": self.benchmark.name,
            "n_rows": len(self.items) + self.skipped.total() + self.left_out.total(),
            "n_prompts": len(set(groups)),
            "dropped": {"total": lost.total(), "reasons": dict(lost.most_common())},
            "left_out": dict(self.left_out),
            "missing": [name for name in self.benchmark.subsets if name not in names],
            "overall": found[0].value,
            "results": results,
            "leaderboard": {line.name: line.value for line in found},
            "verdicts": dict(self.verdicts),
            "notes": self.notes,
        }
        return self

    def table(self) -> str:
        """Return the figures as text: a line each for the whole, its sections and its subsets."""
        results = self.metrics["results"]
        parts = list(results[0]["figures"])
        floors = list(results[0]["floors"])
        head = [self.benchmark.title, "items", f"{parts[0]} [95%]", *parts[1:]]
        rows = [
            [
                _INDENT[line["level"]] + line["name"],
                f"{line['n']:,}",
                _percent(line["value"], line["interval"]),
                *(_percent(line["figures"].get(part)) for part in parts[1:]),
                *(_percent(line["floors"][floor]) for floor in floors),
            ]
            for line in results
        ]
        lines = [format_table([*head, *(f"floor: {name}" for name in floors)], rows)]
        for line in results:
            own = list(line["figures"].items())
            if line["level"] == "subset" and len(own) > len(parts):
                lines.append(
                    f"{line['name']}: " + ", ".join(f"{part} {_percent(x)}" for part, x in own[1:])
                )
        if self.metrics["missing"]:
            lines.append(
                f"{len(self.metrics['missing'])} published subsets have no row here, so the figure "
                f"over all is not the published one: {', '.join(self.metrics['missing'])}"
            )
        for reason, count in self.metrics["left_out"].items():
            lines.append(f"{count:,} rows left out, as published: {reason}")
        if self.verdicts:
            said = ", ".join(f"{count:,} {what}" for what, count in self.verdicts.most_common())
            lines.append(f"verdicts: {said}")
        return "\n".join([*lines, *self.notes])


def _percent(value: float | None, ends: Sequence[float] | None = None) -> str:
    return percent(None if value is None or value != value else value, ends)


def _interval(line: Result, drawn: Sequence[float]) -> list[float] | None:
    """95%: of the resamples in which the figure is defined; Wilson's if all items are alike."""
    values = np.array(drawn)
    values = values[~np.isnan(values)]
    if line.value != line.value or values.size < _RESAMPLES / 2:
        return None
    if line.value in (0.0, 1.0) and np.ptp(values) == 0:
        return list(accuracy_interval(np.full(line.n, line.value), None))
    return list(middle(values, 0.95))


def evaluate_benchmark(
    model: Scorer[Any] | Judging,
    dataset: Iterable[Mapping[str, Any]],
    benchmark: str,
    *,
    names: Sequence[str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    info: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_total: Progress | None = None,
    seed: int = 0,
) -> BenchmarkEvaluation:
    """Measure a model, a server or a judge on a published benchmark.

    Parameters
    ----------
    model : Scorer or Judge
        A scorer of a pairwise or K-wise model, of a process model for those about steps, here or
        on a server; or a :class:`companion.judge.Judge`: with a pairwise template it is asked in
        both orders, with a pointwise one its ratings are the scores.
    dataset : iterable of mappings
        Rows in the published schema.
    benchmark : str
        One of :data:`companion.evaluation.BENCHMARKS`.
    names : sequence of str, optional
        How to call the rows in errors; default ``row 0``, …
    on_error : {"raise", "skip"}
        What to do with a row that cannot be read or scored: raise an error that names it, or leave
        it out and count it.
    info : mapping, optional
        What goes into the result's ``info``.
    progress, on_total : callable, optional
        Called with the number of texts (of a judge: answers) that came; and once, before, with the
        number to come.
    seed : int, default 0
        Of the bootstrap.

    Raises
    ------
    DataError
        If the benchmark asks for what the model cannot give, a row is not of its schema, or no
        row can be used.
    """
    found = find_benchmark(benchmark)
    ask = _asking(model, found)
    rows = list(dataset)
    if not rows:
        raise DataError(f"{found.title}: no rows", "check the file, the split and the limit")
    places = [f"row {i}" for i in range(len(rows))] if names is None else list(names)
    items: list[Item] = []
    kept: list[str] = []
    left_out: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for row, place in zip(rows, places, strict=True):
        try:
            if not isinstance(row, Mapping):
                raise DataError(f"{type(row).__name__} in place of a row")
            item = found.item(row)
        except DataError as error:
            if on_error == "raise":
                cure = f"{found.title} ({found.dataset}) has: {found.fields}"
                raise DataError(
                    f"{place}, {error.what}", f"{cure}; rename a column with --columns old=new"
                ) from error
            skipped[error.what] += 1
            continue
        if isinstance(item, str):
            left_out[item] += 1
        else:
            items.append(item)
            kept.append(place)
    result = BenchmarkEvaluation(
        found,
        items,
        [None] * len(items),
        [None] * len(items),
        left_out=left_out,
        skipped=skipped,
        seed=seed,
        info=dict(info or {}),
    )
    if items:
        ask(result, kept, on_error, progress, on_total)
    return result.measure()


# ---------------------------------------------------------------------- asking

_Ask = Callable[
    [
        BenchmarkEvaluation,
        Sequence[str],
        Literal["raise", "skip"],
        Progress | None,
        Progress | None,
    ],
    None,
]


def _asking(model: Any, benchmark: Benchmark) -> _Ask:
    """How to ask this model for what the benchmark needs; an error if it cannot give it."""
    title = benchmark.title
    if hasattr(model, "compare"):
        pairwise = model.template.mode == "pairwise"
        if benchmark.needs == "steps":
            raise DataError(
                f"{title} asks which step is wrong, and a judge is not", "take a process model"
            )
        if pairwise and benchmark.needs == "scores":
            raise DataError(
                f"{title} needs a score of each text, and the template "
                f"{model.template.name!r} compares two",
                "take a pointwise template",
            )
        return _Judge(model).compare if pairwise else _Judge(model).grade
    kind = model.readout.kind
    wanted = "process" if benchmark.needs == "steps" else "scalar"
    if kind != wanted:
        words = {"scalar": "gives one score a text", "outcome": "is an outcome model"}
        asks = "asks which step is wrong" if wanted == "process" else "compares whole answers"
        raise DataError(
            f"{title} {asks}, and the model {words.get(kind, 'is a process model')}",
            f"take a {'process' if wanted == 'process' else 'pairwise or K-wise'} model",
        )
    return _Scorer(model).steps if wanted == "process" else _Scorer(model).score


class _Scorer:
    """Scores of texts, or P(wrong) of steps."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer
        #: published evaluations put a prompt into the chat template, unless the model says else
        self.chat = scorer.formatter.text != "plain"

    def score(
        self,
        result: BenchmarkEvaluation,
        names: Sequence[str],
        on_error: Literal["raise", "skip"],
        progress: Progress | None,
        on_total: Progress | None,
    ) -> None:
        """A score of each completion; margins where pairs are needed."""
        rows = [self._row(item, text) for item in result.items for text in item.completions]
        if on_total is not None:
            on_total(len(rows))
        scores = self.scorer.score(
            rows, names=_texts(result.items, names), on_error=on_error, progress=progress
        )
        _take_scores(result, scores.raw, scores.reasons)

    def steps(
        self,
        result: BenchmarkEvaluation,
        names: Sequence[str],
        on_error: Literal["raise", "skip"],
        progress: Progress | None,
        on_total: Progress | None,
    ) -> None:
        """Which steps are called wrong: P(wrong) above the threshold of the manifest."""
        readout = self.scorer.readout
        separator = str(readout.separator)
        rows, mended = [], 0
        for item in result.items:
            steps = [plain(step) for step in item.completions]
            clean = [step.replace(separator, " ") for step in steps]
            mended += sum(a != b for a, b in zip(steps, clean, strict=True))
            rows.append({"prompt": item.prompt, "completions": clean})
        if on_total is not None:
            on_total(len(rows))
        scores = self.scorer.score(rows, names=names, on_error=on_error, progress=progress)
        result.said[:] = [
            None
            if wrong is None or np.isnan(wrong).any()
            else (wrong > readout.threshold).astype(np.float64)
            for wrong in scores.wrong
        ]
        result.reasons[:] = scores.reasons
        result.notes.append(f"a step is called wrong if P(wrong) > {readout.threshold:.3f}")
        if mended:
            result.notes.append(f"{mended:,} steps held the separator, which became a blank there")

    def _row(self, item: Item, text: Any) -> dict[str, Any]:
        prompt = item.prompt
        if self.chat or not isinstance(prompt, str):
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(text, str):
                text = [{"role": "assistant", "content": text}]
        return {"prompt": prompt, "completion": text}


class _Judge:
    """Verdicts on pairs, or ratings of texts."""

    def __init__(self, judge: Any) -> None:
        self.judge = judge

    def compare(
        self,
        result: BenchmarkEvaluation,
        names: Sequence[str],
        on_error: Literal["raise", "skip"],
        progress: Progress | None,
        on_total: Progress | None,
    ) -> None:
        """Margins from verdicts in both orders: those for the right answer less those against."""
        rows, places, owners = [], [], []
        for number, (item, name) in enumerate(zip(result.items, names, strict=True)):
            for a in item.completions[: item.n_right]:
                for b in item.completions[item.n_right :]:
                    rows.append({"prompt": item.prompt, "a": a, "b": b})
                    places.append(name)
                    owners.append(number)
        if on_total is not None:
            on_total(2 * len(rows))
        nets: list[list[float]] = [[] for _ in result.items]
        worth = {"a": 1.0, "b": -1.0}
        verdicts = self.judge.compare(rows, names=places, progress=progress)
        for owner, place, verdict in zip(owners, places, verdicts, strict=True):
            _refuse(verdict.reason, place, on_error)
            nets[owner].append(sum(worth.get(x, 0.0) for x in (verdict.first, verdict.swapped)))
            result.verdicts[_short(verdict.reason) or "alike in both orders"] += 1
        result.said[:] = [
            np.array(own).reshape(item.n_right, -1)
            for own, item in zip(nets, result.items, strict=True)
        ]
        result.even = result.benchmark.even

    def grade(
        self,
        result: BenchmarkEvaluation,
        names: Sequence[str],
        on_error: Literal["raise", "skip"],
        progress: Progress | None,
        on_total: Progress | None,
    ) -> None:
        """Ratings as scores: the expected one where the judge gives probabilities."""
        rows = [
            {"prompt": item.prompt, "completion": text}
            for item in result.items
            for text in item.completions
        ]
        if on_total is not None:
            on_total(len(rows))
        places = _texts(result.items, names)
        gradings = self.judge.grade(rows, names=places, progress=progress)
        values = np.full(len(rows), np.nan)
        for i, (grading, place) in enumerate(zip(gradings, places, strict=True)):
            _refuse(grading.reason, place, on_error)
            rating = grading.rating if grading.expected_rating is None else grading.expected_rating
            values[i] = np.nan if rating is None else rating
            result.verdicts[_short(grading.reason) or "ratings"] += 1
        _take_scores(result, values, [_short(grading.reason) for grading in gradings])


#: reasons of a judge that are no refusal
_UNREAD = ("disagreement", "no verdict", "conflicting verdicts", "cut off")


def _short(reason: str | None) -> str | None:
    return reason if reason is None or reason in _UNREAD else "refused"


def _refuse(reason: str | None, place: str, on_error: str) -> None:
    if on_error == "raise" and _short(reason) == "refused":
        raise DataError(
            f"{place}: {reason}", "shorten the row, or leave it out with on_error='skip'"
        )


def _texts(items: Sequence[Item], names: Sequence[str]) -> list[str]:
    """How to call each completion of each item."""
    return [
        f"{name}, completion {k}"
        for item, name in zip(items, names, strict=True)
        for k in range(len(item.completions))
    ]


def _take_scores(result: BenchmarkEvaluation, values: Array, reasons: Sequence[str | None]) -> None:
    """Each item's share of the scores of all texts; an item lacks what one of its texts lacks."""
    end = 0
    for number, item in enumerate(result.items):
        begin, end = end, end + len(item.completions)
        own = np.asarray(values[begin:end], dtype=np.float64)
        result.reasons[number] = next((x for x in reasons[begin:end] if x is not None), None)
        if np.isfinite(own).all():
            pairs = result.benchmark.needs == "pairs"
            result.said[number] = margins(own, item) if pairs else own
