"""What a set of rows shows of itself before any model sees it: the trouble that its form hides.

Each row may be good and the set sick: preferences that go in a circle, two labels for one pair,
held-out prompts that stand in training in other words, answers that a tokenizer cuts. None of it
stops a run; each is a :class:`Finding` with its count and its cure. Of a row eight numbers and a
sketch of its prompt are kept, no text. Chapters 4 and 9.
"""

from __future__ import annotations

import functools
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, takewhile
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from companion.data.messages import plain
from companion.data.splits import (
    DuplicateReport,
    OverlapReport,
    RowHashes,
    normalise,
    overlap_report,
    prompt_key,
    short_prompt,
    text_hash,
)
from companion.errors import CompanionError

Rows = Any  # a Dataset, or a list of mappings

#: name -> what to do; the names are those of the audit's checks too
CURES: Final[dict[str, str]] = {
    "equal-sides": "leave such pairs out, unless case and white space are what you want to teach",
    "contradicting-labels": "keep them if people disagree (a model learns the share); if not, find "
    "out which label is wrong",
    "cyclic-preferences": "look at the example; take more judgements of such pairs, or leave the "
    "weakest of each circle out",
    "near-duplicate-prompts": "keep them together when you split (companion data split --by "
    "COLUMN), or leave all but one out",
    "leakage": "take the shared prompts out of the training rows",
    "rows-too-long": "raise --max_length, or leave such rows out",
    "equal-sides-after-cut": "raise --max_length, or cut the prompt from its left (--overlong "
    "truncate_prompt)",
    "equal-sides-as-tokens": "take a tokenizer that keeps the difference, or leave such pairs out",
    "unknown-tokens-in-rows": "take a tokenizer whose vocabulary covers the texts",
    "rows-changed-by-template": "take a chat template that writes everything "
    "(--chat_template_path of companion train), or change the rows",
    "special-tokens-in-rows": "read them as letters (--split_special_tokens of companion train), "
    "or take them out of the rows",
    "rows-refused-by-template": "mend the rows, or take another chat template",
}

#: columns that say whose judgement a row is
_ANNOTATORS: Final = ("annotator", "annotator_id", "worker_id")
#: a word; of languages that are written without blanks, a character
_WORD: Final = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+")
#: rows that are tokenised at a time
_BATCH: Final = 256


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in a set of rows.

    Attributes
    ----------
    name : str
        One of :data:`CURES`.
    seen : str
        In a sentence with the numbers.
    rows : int
        How many rows (or prompts, if the sentence says so) have it.
    examples : list of str
    unusable : bool
        Whether the rows cannot be used as they are.
    """

    name: str
    seen: str
    rows: int
    examples: list[str] = field(default_factory=list)
    unusable: bool = False

    @property
    def cure(self) -> str:
        """What to do."""
        return CURES[self.name]

    def __str__(self) -> str:
        lines = [f"warning: {self.name}: {self.seen}", *(f"  {text}" for text in self.examples)]
        return "\n".join([*lines, f"  Cure: {self.cure}"])


@dataclass
class DataReport:
    """What :func:`check_rows` and :func:`check_tokens` saw.

    Attributes
    ----------
    duplicates : DuplicateReport
    findings : list of Finding
    length : dict or None
        Of pairs: ``n`` (of unequal length), ``longer_wins`` and its 95% ``interval`` (the bootstrap
        over prompts), ``median_gap`` (characters, chosen less rejected).
    agreement : dict or None
        Of pairs that were judged more than once: as
        :func:`companion.functional.annotator_agreement`, and ``annotators``, the column or None.
    tokens : dict or None
        Of all texts: ``n``, ``median``, ``p90``, ``p99``, ``max``, and ``max_length``.
    overlap : OverlapReport or None
        With the other set.
    """

    duplicates: DuplicateReport
    findings: list[Finding] = field(default_factory=list)
    length: dict[str, Any] | None = None
    agreement: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    overlap: OverlapReport | None = None

    def find(self, name: str) -> Finding | None:
        """The finding of that name, if there is one."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for a JSON file."""
        found = asdict(self)
        for own, finding in zip(found["findings"], self.findings, strict=True):
            own["cure"] = finding.cure
        return found

    def __str__(self) -> str:
        lines = [str(self.duplicates)]
        if self.length:
            low, high = self.length["interval"]
            share = self.length["longer_wins"]
            lines.append(
                f"the longer one is chosen in {share:.1%} [{100 * low:.1f}, {100 * high:.1f}] of "
                f"{self.length['n']:,} pairs of unequal length: a rule that only counts characters "
                f"is right in {max(share, 1 - share):.1%}"
            )
        if self.agreement:
            lines.append(agreement_sentence(self.agreement))
        if self.tokens:
            t = self.tokens
            limit = "no limit" if t["max_length"] is None else f"the limit is {t['max_length']:,}"
            lines.append(
                f"tokens a text: median {t['median']:,.0f}, 90% {t['p90']:,}, 99% {t['p99']:,}, "
                f"longest {t['max']:,} ({limit})"
            )
        if self.overlap:
            lines.append(str(self.overlap))
        return "\n".join([*lines, *map(str, self.findings)])


def agreement_sentence(agreement: Mapping[str, Any]) -> str:
    """Where the annotators' agreement puts the ceiling, and what that takes for granted."""
    from companion.functional.agreement import ceiling_sentence

    whose = agreement["annotators"]
    said = ceiling_sentence(agreement) or ""
    return said + (
        "" if whose else " (No column says who judged: if repeats are copies, forget it.)"
    )


def check_rows(rows: Rows, *, against: Rows | None = None) -> DataReport:
    """Look for what a set of good rows hides.

    Parameters
    ----------
    rows : Dataset or list of dict
        Canonical rows of any kind (:func:`companion.data.load_rows`).
    against : Dataset or list of dict, optional
        Rows that must share no prompt with them: a held-out set, a benchmark.

    Raises
    ------
    DataError
        For pairs of messages without a prompt.
    """
    marks = _Marks()
    prompts = _Prompts(rows, marks.add)
    report = DataReport(marks.whole.duplicates(rows))
    if marks.pairs:
        _check_pairs(marks, rows, report)
    elif len(marks.labels):
        _check_labels(marks, report)
    _add_near(prompts, report)
    if against is not None:
        _add_leakage(prompts, rows, against, report)
    return report


class _Marks:
    """Of each row: its prompt and its texts as hashes, the gap of lengths, whose it is."""

    def __init__(self) -> None:
        self.whole, self.texts, self.gaps = RowHashes(), array("Q"), array("q")
        self.labels, self.people = array("b"), array("Q")
        self.pairs, self.column = False, ""

    def add(self, row: Mapping[str, Any], key: str) -> None:
        texts = self.whole.add(row, key)
        if "chosen" in row:
            if not self.pairs:
                self.pairs = True
                self.column = next((c for c in _ANNOTATORS if row.get(c) is not None), "")
            self.texts.extend(texts)
            self.gaps.append(len(plain(row["chosen"])) - len(plain(row["rejected"])))
            self.people.append(text_hash(str(row.get(self.column))))
        elif isinstance(row.get("label"), bool):
            self.labels.append(row["label"])

    def rows(self) -> npt.NDArray[np.uint64]:
        """``[n, 3]`` of each row its prompt, its whole, and the whole turned round."""
        return np.array(self.whole.hashes, np.uint64).reshape(-1, 3)


def _check_pairs(marks: _Marks, rows: Rows, report: DataReport) -> None:
    from companion.functional.resampling import accuracy_interval

    groups = marks.rows()[:, 0]
    # (a text under another prompt is another text)
    sides = np.array(marks.texts, np.uint64).reshape(-1, 2) ^ groups[:, None]
    n = len(sides)
    equal = np.flatnonzero(sides[:, 0] == sides[:, 1])
    if equal.size:
        seen = (
            f"{equal.size:,} of {n:,} pairs differ in nothing but case, white space or Unicode form"
        )
        report.findings.append(
            Finding("equal-sides", seen, int(equal.size), _examples(rows, equal))
        )
    gaps = np.array(marks.gaps, np.int64)
    unequal = gaps != 0
    if unequal.any():
        longer = (gaps[unequal] > 0).astype(np.float64)
        report.length = {
            "n": int(unequal.sum()),
            "longer_wins": float(longer.mean()),
            "interval": tuple(accuracy_interval(longer, groups[unequal])),
            "median_gap": float(np.median(gaps)),
        }
    votes = _Votes(sides, groups, np.array(marks.people, np.uint64) if marks.column else None)
    if votes.split.size:
        seen = (
            f"{votes.split.size:,} of {votes.items:,} different pairs have both labels "
            f"({votes.rows_split:,} of {n:,} rows): no model can be right on both"
        )
        report.findings.append(Finding("contradicting-labels", seen, votes.rows_split))
        report.findings[-1].examples.extend(_examples(rows, votes.split))
    if marks.column or votes.split.size:
        report.agreement = votes.agreement()
        if report.agreement is not None:
            report.agreement["annotators"] = marks.column or None
    if circle := votes.cycles():
        n_rows, n_prompts, n_circles, example = circle
        seen = (
            f"{n_rows:,} of {n:,} pairs stand in a circle (A over B, B over C, C over A), of "
            f"{n_prompts:,} prompts: no score orders them all, so at least {n_circles:,} of them "
            "must be wrong"
        )
        places = ", ".join(f"{place:,}" for place in example)
        shown = f"a circle: the rows {places} (from 0) of {short_prompt(rows[example[0]])!r}"
        report.findings.append(Finding("cyclic-preferences", seen, n_rows, [shown]))


def _check_labels(marks: _Marks, report: DataReport) -> None:
    """Of outcomes: is one answer called both right and wrong?"""
    _, item = np.unique(marks.rows()[:, 1], return_inverse=True)
    right = np.bincount(item, weights=np.array(marks.labels, np.float64))
    count = np.bincount(item)
    both = (right > 0) & (right < count)
    if both.any():
        rows = int(count[both].sum())
        seen = f"{int(both.sum()):,} answers are called both right and wrong ({rows:,} rows)"
        report.findings.append(Finding("contradicting-labels", seen, rows))


def _examples(rows: Rows, places: Iterable[Any], n: int = 3) -> list[str]:
    return [
        f"row {i:,} (from 0): {short_prompt(rows[int(i)])}"
        for i, _ in zip(places, range(n), strict=False)
    ]


class _Votes:
    """Of each different pair of texts, which side each judgement took."""

    def __init__(
        self,
        sides: npt.NDArray[np.uint64],
        groups: npt.NDArray[np.uint64],
        people: npt.NDArray[np.uint64] | None,
    ) -> None:
        texts, places = np.unique(sides, return_inverse=True)
        better, worse = places.reshape(-1, 2).T.astype(np.int64)
        turned = better > worse
        code = np.minimum(better, worse) * len(texts) + np.maximum(better, worse)
        _, self._first, item = np.unique(code, return_index=True, return_inverse=True)
        last = np.arange(len(item))
        if people is not None:  # one vote each: the last that they cast
            names, person = np.unique(people, return_inverse=True)
            _, last = np.unique((item * len(names) + person)[::-1], return_index=True)
            last = len(item) - 1 - last
        self.items = len(self._first)
        self._n_texts = len(texts)
        self._better, self._worse, self._item, self._turned = better, worse, item, turned
        self._counts = np.zeros((self.items, 3))
        np.add.at(self._counts, (item[last], turned[last].astype(np.int64)), 1)
        self._counts[better[self._first] == worse[self._first]] = 0  # equal texts say nothing
        self._groups = groups[self._first]
        both = np.zeros((self.items, 2), dtype=bool)
        both[item, turned.astype(np.int64)] = True
        split: npt.NDArray[np.bool_] = np.logical_and(both[:, 0], both[:, 1])
        #: where each pair that has both labels stands first, and how many rows such pairs have
        self.split = np.sort(self._first[split])
        self.rows_split = int(split[item].sum())

    def agreement(self) -> dict[str, Any] | None:
        from companion.functional.agreement import agreement_of_counts

        several = self._counts.sum(axis=1) > 1
        if not several.any():
            return None
        return agreement_of_counts(self._counts[several], self._groups[several])

    def cycles(self) -> tuple[int, int, int, list[int]] | None:
        """Rows and prompts in circles, how many knots of circles there are, and the rows of one.

        What most say of a pair is an arrow from the better text to the worse; an arrow lies on a
        circle just if both its ends are in one strongly connected component (Tarjan 1972).
        """
        from scipy import sparse
        from scipy.sparse import csgraph

        net = np.asarray(self._counts[:, 0] - self._counts[:, 1])[self._item]
        arrows = np.flatnonzero(np.where(self._turned, net < 0, net > 0))
        better, worse = self._better[arrows], self._worse[arrows]
        shape = (self._n_texts, self._n_texts)
        graph = sparse.csr_matrix((np.ones(len(arrows), np.int8), (better, worse)), shape=shape)
        _, knot = csgraph.connected_components(graph, connection="strong")
        inside = np.flatnonzero(knot[better] == knot[worse])
        if not inside.size:
            return None
        # the way back from the end of one arrow to its beginning closes a circle
        start = inside[0]
        _, before = csgraph.breadth_first_order(graph, worse[start])
        row_of = dict(zip(zip(better, worse, strict=True), arrows.tolist(), strict=True))
        example, at = [int(arrows[start])], better[start]
        while at != worse[start]:
            example.insert(1, row_of[before[at], at])
            at = before[at]
        groups = self._groups[self._item[arrows[inside]]]
        n_knots = len(np.unique(knot[better[inside]]))
        return len(inside), len(np.unique(groups)), n_knots, example


class _Prompts:
    """The different prompts of a set: where each stands first, and its sketch."""

    def __init__(
        self, rows: Rows, add: Callable[[Mapping[str, Any], str], None] = lambda row, key: None
    ) -> None:
        from companion.functional.similarity import BANDS, sketch

        self.places, self.hashes, sketches = array("Q"), array("Q"), array("Q")
        self._rows = rows.select_columns(["prompt"]) if _has_prompts(rows) else rows
        seen: set[int] = set()
        for place, row in enumerate(rows):
            key = prompt_key(row)
            add(row, key)
            if row.get("prompt") is None or (own := text_hash(key)) in seen:
                continue
            seen.add(own)
            self.places.append(place)
            self.hashes.append(own)
            sketches.frombytes(sketch(_shingles(row["prompt"])).tobytes())
        self.sketches = np.array(sketches, np.uint64).reshape(-1, BANDS)
        self.shingles = functools.lru_cache(4096)(lambda i: _shingles(self.prompt(i)["prompt"]))

    def prompt(self, number: int) -> Mapping[str, Any]:
        """A row with the prompt of that number."""
        row: Mapping[str, Any] = self._rows[int(self.places[number])]
        return row

    def alike(self, other: _Prompts) -> list[tuple[int, int]]:
        """Numbers of prompts here and there that nearly repeat each other."""
        from companion.functional.similarity import ALIKE, jaccard, likely_pairs

        if not len(self.places) or not len(other.places):
            return []
        pairs = likely_pairs(self.sketches, None if other is self else other.sketches)
        if other is self:
            pairs = np.unique(np.sort(pairs, axis=1)[:, ::-1], axis=0)
        return [
            (i, j)
            for i, j in pairs.tolist()
            if jaccard(self.shingles(i), other.shingles(j)) >= ALIKE
        ]


def _has_prompts(rows: Rows) -> bool:
    return "prompt" in getattr(rows, "column_names", ())


def _shingles(prompt: Any) -> npt.NDArray[np.uint64]:
    from companion.functional.similarity import shingles

    if not isinstance(prompt, str):  # one system message stands before many questions
        prompt = [m for m in prompt if m["role"] not in ("system", "developer")] or prompt
    words = _WORD.findall(normalise(plain(prompt)))
    return shingles([zlib.crc32(word.encode()) for word in words])


def _add_near(prompts: _Prompts, report: DataReport) -> None:
    pairs = prompts.alike(prompts)
    if not pairs:
        return
    later = len({i for i, _ in pairs})
    seen = (
        f"{later:,} of {len(prompts.places):,} different prompts nearly repeat an earlier one: a "
        "split by prompt can put one on either side"
    )
    report.findings.append(
        Finding("near-duplicate-prompts", seen, later, _both(prompts, prompts, pairs))
    )


def _both(ours: _Prompts, theirs: _Prompts, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Three of the pairs, from where they differ on."""
    lines = []
    for i, j in pairs[:3]:
        a, b = (
            " ".join(plain(row["prompt"]).split()) for row in (theirs.prompt(j), ours.prompt(i))
        )
        alike = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(a, b, strict=False)))
        begin = max(alike - 20, 0)
        lines.append(" and ".join(repr(text[begin : begin + 60]) for text in (a, b)))
    return lines


def _add_leakage(prompts: _Prompts, rows: Rows, against: Rows, report: DataReport) -> None:
    report.overlap = overlap_report(rows, against)
    others = _Prompts(against)
    same = set(prompts.hashes)
    pairs = [(i, j) for i, j in others.alike(prompts) if others.hashes[i] not in same]
    near = len({i for i, _ in pairs})
    if near or not report.overlap.clean:
        seen = (
            f"{report.overlap.shared_prompts:,} prompts stand both in these rows, of "
            f"{report.overlap.train_prompts:,}, and in the other set, of "
            f"{report.overlap.test_prompts:,}; {near:,} more of the other set nearly do"
        )
        examples = report.overlap.examples + _both(others, prompts, pairs)
        found = Finding("leakage", seen, report.overlap.shared_prompts + near, examples)
        report.findings.append(found)


def check_tokens(
    rows: Rows,
    formatter: Any,
    report: DataReport,
    *,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Add what a tokenizer makes of the rows: texts that are cut, changed, or refused.

    Parameters
    ----------
    rows : Dataset or list of dict
        Canonical rows. Of steps the texts are looked at as one, without separators.
    formatter : RewardFormatter
        Of the model or tokenizer. Where it does not say how rows of text are read, they are read as
        training on these rows would.
    report : DataReport
        Of :func:`check_rows`; it is added to.
    max_length : int, optional
        Tokens that a text may have; default: the formatter's, else the tokenizer's.
    progress : callable, optional
        Called with the number of rows done since the last call.
    """
    whole = formatter.changed()
    if whole.text is None:
        whole.decide_text(list(islice(iter(rows), _BATCH)))
    limit = max_length or whole.max_length or whole.tokenizer.model_max_length
    # (transformers says 1e30 for a tokenizer that knows no limit)
    max_length = int(limit) if limit < 1e9 else None
    whole.max_length = None
    lengths, refused = array("Q"), Counter[str]()
    counts = dict.fromkeys(
        (
            "rows-too-long",
            "equal-sides-after-cut",
            "equal-sides-as-tokens",
            "unknown-tokens-in-rows",
        ),
        0,
    )
    n_refused = 0
    unknown = whole.tokenizer.unk_token_id
    given = iter(rows)
    while batch := list(islice(given, _BATCH)):
        texts = [list(_sides(row)) for row in batch]
        flat = iter(whole.try_encode_many([text for sides in texts for text in sides]))
        for sides in texts:
            encoded = [next(flat) for _ in sides]
            errors = [item for item in encoded if isinstance(item, CompanionError)]
            if errors:
                n_refused += 1
                # without the row's place, which differs
                refused[errors[0].what.split(": ", 1)[-1]] += 1
                continue
            ids = [item.input_ids for item in encoded if item is not None]
            lengths.extend(map(len, ids))
            counts["unknown-tokens-in-rows"] += unknown is not None and any(
                unknown in own for own in ids
            )
            counts["rows-too-long"] += max_length is not None and max(map(len, ids)) > max_length
            if len(ids) == 2:
                counts["equal-sides-as-tokens"] += ids[0] == ids[1]
                counts["equal-sides-after-cut"] += (
                    max_length is not None
                    and ids[0] != ids[1]
                    and ids[0][:max_length] == ids[1][:max_length]
                )
        if progress is not None:
            progress(len(batch))
    if lengths:
        found = np.array(lengths, np.int64)
        p90, p99 = (int(q) for q in np.quantile(found, (0.9, 0.99), method="lower"))
        sizes = {"median": float(np.median(found)), "p90": p90, "p99": p99, "max": int(found.max())}
        report.tokens = {"n": len(found), **sizes, "max_length": max_length}
    words = {
        "rows-too-long": f"have a text of more than {max_length} tokens: the companion and TRL "
        "drop such rows, a tokenizer that truncates takes the end of the answer",
        "equal-sides-after-cut": f"have the same first {max_length} tokens on both sides: what "
        "differs is lost to a tokenizer that truncates",
        "equal-sides-as-tokens": "have the same tokens on both sides, which teach nothing",
        "unknown-tokens-in-rows": "hold words that the vocabulary lacks (the unknown token)",
    }
    for name, n in counts.items():
        if n:
            seen = f"{n:,} of {len(rows):,} rows {words[name]}"
            report.findings.append(Finding(name, seen, n))
    said = whole.counts
    left_out = said.earlier_left_out + said.tools_left_out
    if left_out:
        seen = (
            f"the chat template leaves out content of earlier turns ({said.earlier_left_out:,} "
            f"texts) or the tools ({said.tools_left_out:,} texts)"
        )
        report.findings.append(Finding("rows-changed-by-template", seen, left_out))
    if said.special_in_text:
        seen = f"{said.special_in_text:,} texts hold special tokens, which are read as such tokens"
        report.findings.append(Finding("special-tokens-in-rows", seen, said.special_in_text))
    if refused:
        seen = f"{n_refused:,} of {len(rows):,} rows cannot be made tokens"
        shown = [f"{n:,} × {what}" for what, n in refused.most_common(3)]
        report.findings.append(
            Finding("rows-refused-by-template", seen, n_refused, shown, unusable=True)
        )
    return report


def _sides(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each text of a row as a row of its own, with what the template is given."""
    shared = {
        k: row[k] for k in ("prompt", "tools", "chat_template_kwargs") if row.get(k) is not None
    }
    if "labels" in row:
        yield shared | {"completion": "\n".join(row["completions"])}
        return
    for name in ("chosen", "rejected", "completion"):
        if row.get(name) is not None:
            ended = row.get(f"{name}_terminated", row.get("terminated"))
            yield shared | {"completion": row[name], "terminated": ended is not False}
    for text in row.get("completions") or ():
        yield shared | {"completion": text}
    if not row.keys() & {"chosen", "completion", "completions"}:
        yield {"messages" if isinstance(row["prompt"], list) else "text": row["prompt"]}
