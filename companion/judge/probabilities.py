"""How sure a judge was: the probabilities of the verdicts, at the token that decided.

A verdict is a few tokens long, and one of them decides: in ``[[A]]`` the token with the ``A``. The
model's distribution at that token says how probable the other verdicts were. Chapter 3.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import takewhile

from companion.judge.templates import JudgeTemplate, Outcome


def verdict_probabilities(
    template: JudgeTemplate,
    answer: str,
    n_tokens: int,
    start_of: Callable[[int], int],
    alternatives: Callable[[int], Iterable[tuple[str, float]]],
) -> dict[Outcome, float] | None:
    """Probability of each verdict where the answer's verdict was decided.

    Parameters
    ----------
    template : JudgeTemplate
    answer : str
        A finished answer.
    n_tokens : int
        Tokens of the answer.
    start_of : callable
        Token's index to the place in ``answer`` where its text begins; −1 and less are before it.
    alternatives : callable
        Token's index to (text, log-probability in nats) of the likeliest tokens at that place.

    Returns
    -------
    dict or None
        Outcome to probability. The sum may be below 1: tokens that begin no verdict, or could begin
        several, count for none. None without a verdict, or if the token that was written could
        begin several verdicts.
    """
    reading = template.read(answer)
    if reading.outcome is None or n_tokens == 0:
        return None
    verdicts = [(text, outcome) for outcome, texts in template.verdicts.items() for text in texts]
    # the first character in which the verdicts differ
    columns = zip(*(text for text, _ in verdicts), strict=False)
    place = reading.start + sum(1 for _ in takewhile(lambda c: len(set(c)) == 1, columns))
    token = bisect_right(range(n_tokens), place, key=start_of) - 1
    if token < 0:
        return None
    begin = start_of(token)
    lead = answer[max(begin, 0) : reading.start]
    done = max(0, begin - reading.start)
    found = dict.fromkeys(template.verdicts, 0.0)
    written = False
    for text, logprob in alternatives(token):
        rest = _behind(lead, text)
        if rest is None:
            continue
        fits = {outcome for verdict, outcome in verdicts if _fits(rest, verdict[done:])}
        if len(fits) == 1:
            outcome = fits.pop()
            found[outcome] += math.exp(logprob)
            written |= outcome == reading.outcome and answer.startswith(text, max(begin, 0))
    return found if written else None


def _behind(lead: str, text: str) -> str | None:
    """What of a token stands behind the text before the verdict; blanks there don't matter."""
    if not lead.strip():
        return text.lstrip() or None
    return text.removeprefix(lead) or None if text.startswith(lead) else None


def _fits(text: str, verdict: str) -> bool:
    """Whether a token's text is a beginning of the verdict, or the verdict and then no letter."""
    if len(text) <= len(verdict):
        return verdict.startswith(text)
    end = text[len(verdict)]
    return text.startswith(verdict) and not (end.isalnum() and verdict[-1:].isalnum())
