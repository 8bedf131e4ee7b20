"""What an audit asks, and what it answers: checks, outcomes, the report. Chapter 9.

A check looks for one thing. Its kind says what its answer means:

``fault``
    A score is wrong for every user. It fails the audit.
``hazard``
    The model is sound as it is meant to be used, and wrong in a way of use that its class allows
    (stock sequence classification and a tail that is masked, say). It is named and never fails.
``bias``
    How much something moves the score that should not, with an interval. It never fails, unless the
    user has set a threshold for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from companion.audit.subject import Ability, Subject

Kind = Literal["fault", "hazard", "bias"]
Room = Literal["read-out", "text", "head", "meaning", "data"]
Level = Literal["quick", "full"]
#: ``not asked``: the target lacks what the check needs, or the budget is spent; it says which
Status = Literal["sound", "found", "measured", "not asked"]


@dataclass(frozen=True)
class Outcome:
    """What one check saw.

    Attributes
    ----------
    status : {"sound", "found", "measured", "not asked"}
        ``found``: the fault or the hazard is there. ``measured``: of a bias.
    seen : str
        In one or two sentences with the numbers.
    size : float or None
        How bad: for a fault or hazard the largest difference between two scores that should be one,
        in raw units of the score, where there is one; for a bias the mean shift, in units of the
        standard deviation of the scores of different texts.
    interval : (float, float) or None
        Of a bias, 95%.
    figures : dict
        Further plain numbers, for machines.
    script : str or None
        The smallest input that still shows it, as a Python script that runs by itself, without the
        companion: it prints what is wrong and exits with 1 while it is.
    """

    status: Status
    seen: str
    size: float | None = None
    interval: tuple[float, float] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    script: str | None = None


@dataclass(frozen=True)
class Check:
    """One thing that an audit looks for.

    Attributes
    ----------
    name : str
        What waivers, thresholds, reports and specimens call it: ``pad-is-eos``.
    room : {"read-out", "text", "head", "meaning", "data"}
    kind : {"fault", "hazard", "bias"}
    asks : str
        The question, for people.
    why : str
        What goes wrong for those who use such a model.
    cure : str
    threads : tuple of str
        Where others met it: addresses of upstream threads, papers.
    needs : frozenset of str
        What the target must be able to do; see :data:`companion.audit.subject.Ability`.
    run : callable
        Takes the subject, gives the outcome; None where there is nothing to say of this target
        (left padding of a model that is never padded, say).
    level : {"quick", "full"}
        From which level on it is asked.
    instead : frozenset of str or None
        What will do where what it needs is not there, for a check that has another way.
    """

    name: str
    room: Room
    kind: Kind
    asks: str
    why: str
    cure: str
    threads: tuple[str, ...]
    needs: frozenset[Ability]
    run: Callable[[Subject], Outcome | None]
    level: Level = "quick"
    instead: frozenset[Ability] | None = None

    def lacks(self, abilities: Set[Ability]) -> list[Ability]:
        """What a target of these abilities lacks for it; empty if it can be asked."""
        lacking = self.needs - abilities
        if lacking and self.instead is not None and self.instead <= abilities:
            return []
        return sorted(lacking)


def sound(seen: str, **figures: Any) -> Outcome:
    """All is as it should be."""
    return Outcome("sound", seen, figures=figures)


def found(
    seen: str, *, size: float | None = None, script: str | None = None, **figures: Any
) -> Outcome:
    """The fault, or the hazard, is there."""
    return Outcome("found", seen, size=size, script=script, figures=figures)


def measured(seen: str, size: float, interval: tuple[float, float], **figures: Any) -> Outcome:
    """How large a bias is."""
    return Outcome("measured", seen, size=size, interval=interval, figures=figures)


def not_asked(why: str) -> Outcome:
    """Nothing was asked, and why."""
    return Outcome("not asked", why)
