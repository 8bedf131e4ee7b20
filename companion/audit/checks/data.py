"""What labelled pairs show of the model, and what they show of themselves.

:func:`data_checks` makes the checks for the pairs of ``--data``. They come last in an audit, and
take what is left of its budget: pairs are drawn by prompt, and each text is scored in a call of its
own, so that no fault of batches is in the figures. Chapter 9.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

import numpy as np

from companion.audit.outcome import Check, Kind, Outcome, found, measured, not_asked, sound
from companion.audit.subject import WITH_IDS, Ability, BudgetSpent, Subject
from companion.data import dataset_fingerprint, prompt_key
from companion.data.checking import (
    CURES,
    DataReport,
    agreement_sentence,
    check_rows,
    check_tokens,
)
from companion.data.messages import plain
from companion.errors import DataError, ModelError
from companion.evaluation import PairEvaluation
from companion.evaluation.pairs import prompt_groups, scored_pairs
from companion.functional import bootstrap_interval, inverse_temperature_limits
from companion.functional.resampling import accuracy_interval
from companion.scoring.results import PairScores
from companion.scoring.servers import Refused

#: Fewest scored pairs of which a figure is given.
FEWEST: Final = 20
#: Most pairs that are tokenised to see what is cut or changed; ``companion data check`` takes all.
MOST_TOKENISED: Final = 2_000

#: of the rows -> what is asked, and why it matters; the cures are those of companion data check
_OF_ROWS: Final[dict[str, tuple[str, str]]] = {
    "equal-sides": (
        "Do pairs differ in nothing but case, white space or Unicode form?",
        "Such a pair teaches that these matter, and its label is chance.",
    ),
    "contradicting-labels": (
        "Has one pair both labels?",
        "No model is right on both, so the accuracy has a ceiling below 1.",
    ),
    "cyclic-preferences": (
        "Do preferences of one prompt go in a circle?",
        "No score orders them all: Bradley and Terry's model cannot hold.",
    ),
    "near-duplicate-prompts": (
        "Do prompts nearly repeat others?",
        "A split by prompt puts one on either side, and an interval over prompts is too narrow.",
    ),
    "leakage": (
        "Do these prompts stand in the other set too?",
        "The held-out accuracy then measures memory.",
    ),
    "rows-too-long": (
        "Are texts longer than the model takes?",
        "They are dropped or cut, and the score of a cut answer is that of another text.",
    ),
    "equal-sides-after-cut": (
        "Are the sides of pairs the same after the cut?",
        "Both get one score: a tie that no model can break.",
    ),
    "equal-sides-as-tokens": (
        "Does the tokenizer make both sides the same tokens?",
        "Both get one score: a tie that no model can break.",
    ),
    "unknown-tokens-in-rows": (
        "Do texts hold what the vocabulary lacks?",
        "Different words become the same token, and the model cannot tell them apart.",
    ),
    "special-tokens-in-rows": (
        "Do texts hold special tokens?",
        "They are read as the template's own marks: a text can end a turn, or begin one.",
    ),
    "rows-changed-by-template": (
        "Does the chat template leave content out?",
        "What the template drops is not scored.",
    ),
    "rows-refused-by-template": (
        "Does the chat template refuse rows, or part of a completion?",
        "They cannot be scored as they are.",
    ),
}
#: where others met it
THREADS: Final[dict[str, tuple[str, ...]]] = {
    "worse-than-a-coin": ("https://github.com/llava-rlhf/LLaVA-RLHF/issues/35",),
    "contradicting-labels": ("https://github.com/TIGER-AI-Lab/EditReward/issues/14",),
    "cyclic-preferences": ("https://arxiv.org/abs/2510.15514",),
    "near-duplicate-prompts": ("https://github.com/embeddings-benchmark/mteb/issues/1036",),
    "leakage": ("https://gist.github.com/natolambert/1aed306000c13e0e8c5bc17c1a5dd300",),
    "trained-on-these-rows": ("https://github.com/OpenRLHF/OpenRLHF/issues/1089",),
    "equal-sides-after-cut": ("https://github.com/natolambert/rlhf-book/pull/504",),
    "special-tokens-in-rows": ("https://github.com/huggingface/transformers/issues/29279",),
    "rows-refused-by-template": ("https://github.com/huggingface/trl/pull/6766",),
}
_OF_TOKENS: Final = frozenset(list(_OF_ROWS)[list(_OF_ROWS).index("rows-too-long") :])


def data_checks(
    rows: Sequence[Mapping[str, Any]] | Any,
    *,
    against: Any = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Check, ...]:
    """The checks for some labelled pairs.

    Parameters
    ----------
    rows : Dataset or list of dict
        Canonical pairs (:func:`companion.data.load_rows`), with an optional ``subset``.
    against : Dataset or list of dict, optional
        Rows that must share no prompt with them, such as those that the model was trained on.
    seed : int
        Of the draw, where the budget does not allow for all pairs.
    progress : callable, optional
        Called with the number of pairs scored since the last call.

    Raises
    ------
    DataError
        If they are no pairs.
    """
    if not len(rows) or "chosen" not in rows[0]:
        raise DataError("the data of an audit are pairs", "give rows with chosen and rejected")
    own = _Pairs(rows, against, seed, progress)
    checks = [
        _check(name, "bias", texts, functools.partial(_figure, own, measure))
        for name, (*texts, measure) in _FIGURES.items()
    ]
    checks += [
        _check(name, "bias", texts, functools.partial(measure, own))
        for name, (*texts, measure) in _ROW_FIGURES.items()
    ]
    checks += [
        _check(
            "worse-than-a-coin",
            "hazard",
            _WORSE,
            functools.partial(_figure, own, _worse_than_a_coin),
        ),
        _check("trained-on-these-rows", "hazard", _TRAINED_ON, functools.partial(_trained_on, own)),
    ]
    for name, (asks, why) in _OF_ROWS.items():
        if name != "leakage" or against is not None:
            needs: set[Ability] = {"tokenizer"} if name in _OF_TOKENS else set()
            run = functools.partial(_of_rows, own, name)
            checks.append(_check(name, "hazard", (asks, why, CURES[name]), run, needs))
    return tuple(checks)


def _check(
    name: str,
    kind: Kind,
    texts: Sequence[str],
    run: Callable[[Subject], Outcome | None],
    needs: Iterable[Ability] = (),
) -> Check:
    asks, why, cure = texts
    threads = THREADS.get(name, ())
    return Check(name, "data", kind, asks, why, cure, threads, frozenset(needs), run)


class _Pairs:
    """The pairs, their report, and their scores by a subject; each made when it is asked for."""

    def __init__(
        self, rows: Any, against: Any, seed: int, progress: Callable[[int], None] | None
    ) -> None:
        self.rows, self._against, self._seed, self._progress = rows, against, seed, progress
        self._scored: tuple[Subject, PairEvaluation | str] | None = None

    @functools.cached_property
    def report(self) -> DataReport:
        """What the rows show without a model."""
        return check_rows(self.rows, against=self._against)

    @functools.lru_cache(1)  # noqa: B019 (it lives as long as the audit)
    def report_with(self, formatter: Any) -> DataReport:
        """What a formatter makes of them, or of a draw of them."""
        rows = self.rows
        if len(rows) > MOST_TOKENISED:
            rng = np.random.default_rng(self._seed)
            drawn = rng.choice(len(rows), MOST_TOKENISED, replace=False)
            rows = [rows[i] for i in sorted(drawn.tolist())]
        return check_tokens(rows, formatter, DataReport(self.report.duplicates))

    def evaluation(self, subject: Subject) -> PairEvaluation | str:
        """The pairs that the budget allowed for, with their figures; or why there are none."""
        if self._scored is None or self._scored[0] is not subject:
            self._scored = subject, self._score(subject)
        return self._scored[1]

    def _score(self, subject: Subject) -> PairEvaluation | str:
        # one pair of each prompt before the second of any: pairs of one prompt say less
        times: Counter[str] = Counter()
        turns = []
        for i in np.random.default_rng(self._seed).permutation(len(self.rows)).tolist():
            key = prompt_key(self.rows[i])
            turns.append((times[key], i))
            times[key] += 1
        order = [i for _, i in sorted(turns, key=itemgetter(0))]
        taken, scores, lengths, reasons = [], [], [], []
        for i in order:
            row = self.rows[i]
            try:
                pair, size = zip(*(_score(subject, row, side) for side in _SIDES), strict=True)
                reason = None
            except BudgetSpent:
                break
            except (DataError, ModelError, Refused) as error:
                pair, size, reason = (np.nan, np.nan), (0, 0), error.what
            taken.append(row)
            scores.append(pair)
            lengths.append(size)
            reasons.append(reason)
            if self._progress is not None:
                self._progress(1)
        n = reasons.count(None)
        if n < FEWEST:
            why = "; ".join(sorted({reason for reason in reasons if reason})[:3])
            return f"{n} pairs were scored, fewer than {FEWEST}: " + (why or "no budget is left")
        values, sizes = np.array(scores, np.float64), np.array(lengths)
        pairs = PairScores(values[:, 0], values[:, 1], sizes[:, 0], sizes[:, 1], reasons)
        temperature = None if subject.manifest is None else subject.manifest.temperature
        return scored_pairs(taken, pairs, temperature=temperature).measure()


_SIDES: Final = ("chosen", "rejected")


def _score(subject: Subject, row: Mapping[str, Any], side: str) -> tuple[float, int]:
    """Raw score of one side, and its length: tokens, or characters where nobody makes tokens."""
    names = ("prompt", "tools", "chat_template_kwargs")
    text = {name: row[name] for name in names if row.get(name) is not None}
    text |= {"completion": row[side]}
    ended = row.get(f"{side}_terminated", row.get("terminated"))
    if ended is not None:
        text |= {"terminated": ended}
    score = float(subject.score_rows([text])[0])
    return score, len(subject.encode(text) if subject.abilities >= WITH_IDS else plain(row[side]))


def _figure(
    own: _Pairs,
    measure: Callable[[_Pairs, PairEvaluation, Subject], Outcome | None],
    subject: Subject,
) -> Outcome | None:
    evaluation = own.evaluation(subject)
    if isinstance(evaluation, str):
        return not_asked(evaluation)
    return measure(own, evaluation, subject)


def _scored(evaluation: PairEvaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, gaps of length (chosen less rejected), and prompts of the pairs with scores."""
    keep = np.isfinite(evaluation.margins)
    gaps = evaluation.chosen_lengths - evaluation.rejected_lengths
    return evaluation.margins[keep], gaps[keep], np.array(prompt_groups(evaluation.rows))[keep]


def _span(interval: Sequence[float], scale: float = 100.0) -> str:
    low, high = (scale * end for end in interval)
    return f"[{low:.1f}, {high:.1f}]" if scale == 100 else f"[{low:.2f}, {high:.2f}]"


def _accuracy(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome:
    m = evaluation.metrics
    seen = (
        f"right in {m['accuracy']:.1%} {_span(m['accuracy_interval'])} of {m['n']:,} pairs of "
        f"{m['n_prompts']:,} prompts (of {len(own.rows):,} pairs)"
    )
    if m["longer_wins"]:
        seen += f"; the longer text is the chosen one in {m['longer_wins']['accuracy']:.1%}"
    if m["dropped"]["total"]:
        seen += f"; {m['dropped']['total']:,} pairs could not be scored"
    if own.report.agreement:
        seen += f". {agreement_sentence(own.report.agreement)}"
    low, high = m["accuracy_interval"]
    return measured(seen, m["accuracy"], (low, high), **_plain(m))


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k != "subsets"}


def _ties(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome:
    margins, _, groups = _scored(evaluation)
    tied = (margins == 0).astype(np.float64)
    span = accuracy_interval(tied, groups)
    values = len(np.unique([evaluation.chosen, evaluation.rejected]))
    seen = (
        f"both sides have one score in {tied.mean():.1%} {_span(span)} of {tied.size:,} pairs; "
        f"{values:,} different scores"
    )
    return measured(seen, float(tied.mean()), span, distinct_scores=values)


def _overconfidence(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome:
    from companion.functional import confidence_and_correctness

    margins, _, groups = _scored(evaluation)
    stated = evaluation.temperature or 1.0
    confidence, correct = confidence_and_correctness(margins / stated)
    gap = confidence - correct
    span = bootstrap_interval(gap, groups)
    m = evaluation.metrics["at_temperature"] or evaluation.metrics
    figures = {name: m[name] for name in ("ece", "ece_band", "brier", "loss")}
    whose = "of the manifest" if evaluation.temperature else "(no manifest says another)"
    seen = (
        f"at T = {stated:.2f} {whose} it is sure by {confidence.mean():.1%} in the mean and right "
        f"in {correct.mean():.1%}: {100 * gap.mean():+.1f} points {_span(span)}; calibration error "
        f"{m['ece']:.3f}, of a calibrated model {_span(m['ece_band'], 1)}"
    )
    try:
        inverse, low, high = inverse_temperature_limits(margins, groups=list(groups))
    except DataError as error:
        seen += f"; no temperature can be fitted: {error.what}"
    else:
        ends = [1 / x if x > 0 else np.inf for x in (high, inverse, low)]
        figures["temperature"] = None if inverse == 0 else ends[1]
        seen += f"; these pairs ask for T = {ends[1]:.2f} [{ends[0]:.2f}, {ends[2]:.2f}]"
    return measured(seen, float(gap.mean()), span, stated_temperature=stated, **figures)


def _centring(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome:
    keep = np.isfinite(evaluation.margins)
    scores = np.column_stack([evaluation.chosen, evaluation.rejected])[keep]
    groups = np.array(prompt_groups(evaluation.rows))[keep]
    reference = None if subject.manifest is None else subject.manifest.reference
    mean, std = (0.0, scores.std(ddof=1)) if reference is None else (reference.mean, reference.std)
    if not std > 0:
        return not_asked("all scores are the same")
    moved = (scores.mean(axis=1) - mean) / std
    span = bootstrap_interval(moved, groups)
    whose = "zero" if reference is None else f"the manifest's mean {mean:.2f}"
    seen = (
        f"the mean score is {scores.mean():.2f}, its standard deviation {scores.std(ddof=1):.2f}: "
        f"{moved.mean():+.2f} {_span(span, 1)} standard deviations from {whose}"
    )
    return measured(seen, float(moved.mean()), span, mean=float(scores.mean()))


def _length(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome:
    margins, gaps, groups = _scored(evaluation)
    unequal = gaps != 0
    if unequal.sum() < FEWEST:
        return not_asked(f"{unequal.sum()} pairs are of unequal length, fewer than {FEWEST}")
    margins, longer, groups = margins[unequal], gaps[unequal] > 0, groups[unequal]
    ours = np.where(margins == 0, 0.5, (margins > 0) == longer)
    more = ours - longer
    span = bootstrap_interval(more, groups)
    right = margins > 0
    parts = {
        name: float(right[which].mean()) if which.any() else None
        for name, which in (("longer_chosen", longer), ("shorter_chosen", ~longer))
    }
    seen = (
        f"it takes the longer text in {ours.mean():.1%} of {longer.size:,} pairs, the labels in "
        f"{longer.mean():.1%}: {100 * more.mean():+.1f} points {_span(span)}"
    )
    if None not in parts.values():
        seen += (
            f"; right in {parts['longer_chosen']:.1%} where the longer one is chosen, in "
            f"{parts['shorter_chosen']:.1%} where the shorter one is"
        )
    correlation = evaluation.metrics["score_length"]
    return measured(seen, float(more.mean()), span, accuracy=parts, score_length=correlation)


def _subsets(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome | None:
    subsets = evaluation.metrics["subsets"]
    known = {name: m for name, m in subsets.items() if m["n"] >= FEWEST}
    if len(known) < 2:
        return None if len(subsets) < 2 else not_asked(f"no two subsets have {FEWEST} pairs")
    worst = min(known, key=lambda name: known[name]["accuracy"])
    margins, _, groups = _scored(evaluation)
    keep = np.isfinite(evaluation.margins)
    mine = np.array([str(row.get("subset")) == worst for row in evaluation.rows])[keep]
    right = (margins > 0).astype(np.float64)
    lag = right[~mine].mean() - right[mine].mean()

    def statistic(drawn: np.ndarray) -> float:
        inside = drawn[:, 1] > 0
        if inside.all() or not inside.any():
            return float(lag)
        return float(drawn[~inside, 0].mean() - drawn[inside, 0].mean())

    # the worst of several was picked: as many times as surely (Bonferroni)
    span = bootstrap_interval(
        np.column_stack([right, mine]),
        groups,
        statistic=statistic,
        level=1 - 0.05 / len(known),
        n_resamples=1000,
    )
    listing = ", ".join(
        f"{name} {m['accuracy']:.1%} {_span(m['accuracy_interval'])} of {m['n']:,}"
        for name, m in sorted(known.items(), key=lambda item: item[1]["accuracy"])
    )
    seen = (
        f"the weakest of {len(known)} subsets lags by {100 * lag:.1f} points {_span(span)}: "
        f"{listing}"
    )
    return measured(seen, float(lag), span, subsets=subsets)


_FIGURES: Final[
    dict[str, tuple[str, str, str, Callable[[_Pairs, PairEvaluation, Subject], Outcome | None]]]
] = {
    "accuracy": (
        "In how many pairs has the chosen text the higher score?",
        "It is what the model is for.",
        "Hold it against the floor (the longer text) and the ceiling (the annotators).",
        _accuracy,
    ),
    "tied-pairs": (
        "How many pairs of different texts have one score?",
        "A head in half precision has few values, and a tie teaches a policy nothing.",
        "Read the score out in float32.",
        _ties,
    ),
    "overconfidence": (
        "Is it as often right as sigmoid(margin / T) says?",
        "Whoever takes the margin for a probability is misled by that much.",
        "Fit the temperature anew on held-out pairs (companion evaluate), and keep it in the "
        "manifest.",
        _overconfidence,
    ),
    "centring": (
        "Is the mean score where the manifest, or zero, says?",
        "A reward with an offset is advice to write longer, or shorter, where tokens are summed.",
        "Subtract the mean (centred scores of the companion), or train with "
        "center_rewards_coefficient.",
        _centring,
    ),
    "length-bias": (
        "Does it take the longer text more often than the labels do?",
        "A policy learns to write longer, not better.",
        "Train on pairs that are balanced in length, or take the length out of the margin.",
        _length,
    ),
    "weakest-subset": (
        "How far does the weakest subset lag?",
        "A mean hides it.",
        "Add rows of that kind, or do not use the model on them.",
        _subsets,
    ),
}


_WORSE: Final = (
    "Is it wrong more often than a coin?",
    "Then chosen and rejected are swapped in the rows, or the sign of the score is.",
    "Look at a few pairs; swap the columns, or take the model that was trained with them right.",
)


def _worse_than_a_coin(own: _Pairs, evaluation: PairEvaluation, subject: Subject) -> Outcome:
    figures = evaluation.metrics
    half = figures["accuracy_ties_half"]
    margins, _, groups = _scored(evaluation)
    right = np.where(margins == 0, 0.5, margins > 0)
    span = accuracy_interval(right, groups)
    seen = f"right in {half:.1%} {_span(span)} of {figures['n']:,} pairs, ties counted half"
    return found(seen) if span.high < 0.5 else sound(seen)


def _imbalance(own: _Pairs, subject: Subject) -> Outcome | None:
    length = own.report.length
    if length is None:
        return None
    seen = (
        f"the longer one is chosen in {length['longer_wins']:.1%} {_span(length['interval'])} of "
        f"{length['n']:,} pairs of unequal length"
    )
    return measured(
        seen, length["longer_wins"], length["interval"], median_gap=length["median_gap"]
    )


def _ceiling(own: _Pairs, subject: Subject) -> Outcome | None:
    agreement = own.report.agreement
    if agreement is None or agreement["ceiling"] is None:
        return None
    span = agreement["ceiling_interval"] or (agreement["ceiling"],) * 2
    return measured(agreement_sentence(agreement), agreement["ceiling"], span, **agreement)


_ROW_FIGURES: Final[
    dict[str, tuple[str, str, str, Callable[[_Pairs, Subject], Outcome | None]]]
] = {
    "length-imbalance": (
        "How often is the longer text the chosen one?",
        "A model can reach that accuracy by counting.",
        "Report the accuracy beside it; balance the lengths, or weigh the pairs.",
        _imbalance,
    ),
    "annotators-ceiling": (
        "What accuracy does the annotators' agreement leave room for?",
        "Above it a model has learned the labels of these annotators by heart.",
        "Hold the accuracy against it, not against 1.",
        _ceiling,
    ),
}


def _of_rows(own: _Pairs, name: str, subject: Subject) -> Outcome:
    n = len(own.rows)
    if name not in _OF_TOKENS:
        report = own.report
    elif subject.formatter is None:
        return not_asked("the target has no formatter")
    else:
        report, n = own.report_with(subject.formatter), min(n, MOST_TOKENISED)
    finding = report.find(name)
    if finding is None:
        return sound(f"none of {n:,} rows")
    return found("; ".join([finding.seen, *finding.examples]), rows=finding.rows)


_TRAINED_ON: Final = (
    "Are these the rows that the model was trained on?",
    "The accuracy then measures memory.",
    "Audit with rows of prompts that were held out.",
)


def _trained_on(own: _Pairs, subject: Subject) -> Outcome | None:
    data = {} if subject.manifest is None else subject.manifest.data
    known = (data.get("train") or {}).get("sha256")
    if known is None:
        return None
    if known == dataset_fingerprint(own.rows):
        return found("the fingerprint of these rows is that of the manifest's training rows")
    return sound("another fingerprint than that of the manifest's training rows")
