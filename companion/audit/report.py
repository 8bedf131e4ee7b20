"""What an audit found, as text, JSON, HTML and JUnit XML; two audits side by side. Chapter 9."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import Any, Final, Literal
from xml.etree import ElementTree

from companion import __version__
from companion.audit.outcome import Check, Level, Outcome
from companion.data.writing import write_text
from companion.errors import DataError
from companion.evaluation.tables import format_table, interval

#: of what :meth:`AuditReport.to_dict` gives
VERSION: Final = 1

#: What a result means for whoever asked. The first two fail the audit.
Verdict = Literal[
    "fault", "over the limit", "waived", "hazard", "bias", "undecided", "sound", "not asked"
]
FAILING: Final[tuple[Verdict, ...]] = ("fault", "over the limit")
#: the order in which results are shown
_ORDER: Final[tuple[Verdict, ...]] = (
    *("fault", "over the limit", "undecided", "waived", "hazard", "bias", "sound", "not asked"),
)
#: characters that no XML document may hold, however they are written (XML 1.0, 2.2)
_NO_XML: Final = re.compile(r"[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Result:
    """One check, what it saw, and what the user had said about it.

    Attributes
    ----------
    check : Check
    outcome : Outcome
    waiver : str or None
        Why its fault is lived with.
    at_most, at_least : float or None
        Limits of the user: the most that the size of a bias may be, in either direction, and the
        least that a figure may be.
    """

    check: Check
    outcome: Outcome
    waiver: str | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def verdict(self) -> Verdict:
        """What it means; see the module.

        A bias is over its limit if its whole interval is. Where the interval holds the limit and
        the estimate is beyond it, it is undecided, which fails nothing: more texts would tell.
        """
        status = self.outcome.status
        if status in ("sound", "not asked"):
            return status
        if status == "found":
            if self.check.kind == "hazard":
                return "hazard"
            return "fault" if self.waiver is None else "waived"
        state = self._beyond()
        if state == "over the limit" and self.waiver is not None:
            return "waived"
        return state or "bias"

    def _beyond(self) -> Literal["over the limit", "undecided"] | None:
        size = self.outcome.size
        if size is None:
            return None
        low, high = self.outcome.interval or (size, size)
        found: list[tuple[bool, bool]] = []  # of each limit: surely beyond, and by the estimate
        if (most := self.at_most) is not None:
            found.append((low > most or high < -most, abs(size) > most))
        if (least := self.at_least) is not None:
            found.append((high < least, size < least))
        if any(surely for surely, _ in found):
            return "over the limit"
        return "undecided" if any(seems for _, seems in found) else None

    @property
    def fails(self) -> bool:
        """Whether the audit fails by it."""
        return self.verdict in FAILING

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        check, outcome = self.check, self.outcome
        return {
            "name": check.name,
            "room": check.room,
            "kind": check.kind,
            "verdict": self.verdict,
            "status": outcome.status,
            "asks": check.asks,
            "seen": outcome.seen,
            "size": outcome.size,
            "interval": None if outcome.interval is None else list(outcome.interval),
            "figures": dict(outcome.figures),
            "why": check.why,
            "cure": check.cure,
            "threads": list(check.threads),
            "script": outcome.script,
            "waiver": self.waiver,
            "at_most": self.at_most,
            "at_least": self.at_least,
        }


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes
    ----------
    target : str
        As it was given.
    what : {"folder", "model", "endpoint"}
    level : {"quick", "full"}
    abilities : tuple of str
        What the target could be asked.
    results : tuple of Result
        In the order of the checks.
    tokens, requests : int
        That went through the model, and to the endpoint.
    seconds : float
    notes : tuple of str
        What was assumed or found on the way, and the waivers that nothing needed.
    protocol : str or None
        Of an endpoint.
    """

    target: str
    what: Literal["folder", "model", "endpoint"]
    level: Level
    abilities: tuple[str, ...]
    results: tuple[Result, ...]
    tokens: int = 0
    requests: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    protocol: str | None = None
    version: str = field(default=__version__)

    @property
    def sound(self) -> bool:
        """Whether nothing fails."""
        return not any(result.fails for result in self.results)

    @property
    def faults(self) -> tuple[str, ...]:
        """Names of what fails."""
        return tuple(result.check.name for result in self.results if result.fails)

    def __getitem__(self, name: str) -> Result:
        """The result of the check of that name."""
        for result in self.results:
            if result.check.name == name:
                return result
        raise KeyError(name)

    def sorted(self) -> list[Result]:
        """The results, what fails first."""
        return sorted(self.results, key=lambda result: _ORDER.index(result.verdict))

    def headline(self) -> str:
        """In one line: sound or not, and how many of each."""
        counts = Counter(result.verdict for result in self.results)
        said = ", ".join(
            _counted(counts[verdict], verdict) for verdict in _ORDER if counts[verdict]
        )
        return f"{'sound' if self.sound else 'NOT SOUND'}: {said or 'nothing was asked'}"

    def cost(self) -> str:
        """What was spent."""
        parts = [f"level {self.level}", f"{self.tokens:,} tokens"]
        if self.what == "endpoint":
            parts.append(f"{self.requests:,} requests")
        return ", ".join([*parts, f"{self.seconds:.1f} s"])

    def table(self, *, details: bool = True) -> str:
        """The report as text: a table, then each thing that was found, with its cure."""
        lines = [
            f"{self.target} ({self.what}{f', {self.protocol}' if self.protocol else ''})",
            self.headline(),
            self.cost(),
            "",
            format_table(_COLUMNS, self._rows()),
        ]
        for result in self.sorted():
            if details and result.verdict not in ("bias", "sound", "not asked"):
                lines += ["", *_told(result)]
        silent = self._silent()
        if silent:
            lines.append("")
        for why, names in silent.items():
            lines.append(_filled(f"not asked ({why}): {', '.join(names)}", "", "  "))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _silent(self) -> dict[str, list[str]]:
        """For each reason the checks that were not asked."""
        found: dict[str, list[str]] = {}
        for result in self.results:
            if result.verdict == "not asked":
                found.setdefault(result.outcome.seen, []).append(result.check.name)
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        """Of what was asked."""
        return [
            (r.check.name, r.check.room, r.verdict, _size(r.outcome))
            for r in self.sorted()
            if r.verdict != "not asked"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``version`` is that of its form."""
        return {
            "version": VERSION,
            "companion": self.version,
            "target": self.target,
            "what": self.what,
            "protocol": self.protocol,
            "level": self.level,
            "sound": self.sound,
            "faults": list(self.faults),
            "abilities": list(self.abilities),
            "tokens": self.tokens,
            "requests": self.requests,
            "seconds": round(self.seconds, 3),
            "checks": [result.to_dict() for result in self.results],
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; folders are made."""
        # (a size may be infinite, which JSON has no word for)
        data = _plain(self.to_dict())
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        return write_text(path, text + "\n")

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Write it as one HTML file that needs no network; folders are made.

        Text that comes from the target is escaped, nothing is fetched, nothing runs.
        """
        from companion.evaluation.report import ASSETS, TEMPLATES

        page = TEMPLATES.get_template("audit.html").render(
            title=f"{self.target}: a reward model audited",
            style=(ASSETS / "report.css").read_text(encoding="utf-8"),
            headline=self.headline(),
            cost=self.cost(),
            columns=_COLUMNS,
            rows=self._rows(),
            told=[r for r in self.sorted() if r.verdict not in ("sound", "not asked")],
            quiet=[(r.check.name, r.outcome.seen) for r in self.sorted() if r.verdict == "sound"],
            silent=self._silent().items(),
            facts=[
                ("target", f"{self.target} ({self.what})"),
                *([("protocol", self.protocol)] if self.protocol else []),
                ("can be asked by", ", ".join(self.abilities)),
                ("companion", self.version),
                *(("note", note) for note in self.notes),
            ],
        )
        return write_text(path, page)

    def write_junit(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JUnit XML, which CI systems gate on; folders are made.

        A check is a test case. What fails is a failure; what was waived or not asked is skipped,
        with the reason; hazards and biases pass, and say what was seen.
        """
        counts = Counter(result.verdict for result in self.results)
        failures = sum(counts[verdict] for verdict in FAILING)
        attributes = {
            "name": f"companion audit {self.target}",
            "tests": str(len(self.results)),
            "failures": str(failures),
            "errors": "0",
            "skipped": str(counts["waived"] + counts["not asked"]),
            "time": f"{self.seconds:.3f}",
        }
        suite = ElementTree.Element("testsuite", {k: _xml(v) for k, v in attributes.items()})
        for result in self.results:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                {"classname": f"audit.{result.check.room}", "name": result.check.name},
            )
            seen = _xml(result.outcome.seen)
            if result.fails:
                failure = ElementTree.SubElement(
                    case, "failure", {"type": result.verdict, "message": seen}
                )
                failure.text = _xml("\n".join([*_told(result), "", result.outcome.script or ""]))
            elif result.verdict in ("waived", "not asked"):
                why = _xml(f"waived: {result.waiver}") if result.waiver else seen
                ElementTree.SubElement(case, "skipped", {"message": why})
            if not result.fails:
                ElementTree.SubElement(case, "system-out").text = f"{result.verdict}: {seen}"
        suites = ElementTree.Element("testsuites")
        suites.append(suite)
        ElementTree.indent(suites)
        text = ElementTree.tostring(suites, encoding="unicode", xml_declaration=True)
        return write_text(
            path, text.replace("<?xml version='1.0' encoding='us-ascii'?>", _HEAD) + "\n"
        )


_HEAD: Final = '<?xml version="1.0" encoding="UTF-8"?>'


_COLUMNS: Final = ("check", "room", "verdict", "size [95%]")


def _counted(n: int, verdict: Verdict) -> str:
    several = {"fault": "faults", "hazard": "hazards", "bias": "biases"}
    return f"{n} {several.get(verdict, verdict) if n > 1 else verdict}"


def _size(outcome: Outcome) -> str:
    if outcome.size is None:
        return "–"
    return f"{outcome.size:.3g}" + interval(outcome.interval)


def _told(result: Result) -> Iterator[str]:
    """A result in full, for a terminal."""
    check = result.check
    yield f"{result.verdict.upper()}  {check.name}"
    limits = [("at most", result.at_most), ("at least", result.at_least)]
    parts = [
        ("seen", result.outcome.seen),
        ("limit", ", ".join(f"{word} {n:g}" for word, n in limits if n is not None)),
        ("waived", result.waiver or ""),
        ("why", check.why),
        ("cure", check.cure),
        ("threads", " ".join(check.threads)),
        ("script", "in the reports (--json, --html)" if result.outcome.script else ""),
    ]
    for name, text in parts:
        if text:
            yield _filled(text, f"  {name + ':':<9}", " " * 11)


def _filled(text: str, first: str, later: str) -> str:
    return fill(
        text,
        width=96,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _xml(text: str) -> str:
    return _NO_XML.sub("�", text)


def _plain(value: Any) -> Any:
    """The value without numbers that are not finite, and of JSON's types alone."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


# ---------------------------------------------------------------------- two audits


def read_audit(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :meth:`AuditReport.save` wrote.

    Raises
    ------
    DataError
        For a file that is none, or of another version.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: no JSON: {error}", "give a file of audit --json") from error
    if not isinstance(data, dict) or "checks" not in data or "target" not in data:
        raise DataError(f"{path}: no audit", "give a file of companion audit --json")
    if data.get("version") != VERSION:
        raise DataError(
            f"{path}: an audit of version {data.get('version')}, this companion reads {VERSION}",
            "make it anew",
        )
    return data


@dataclass(frozen=True)
class AuditDifference:
    """Two audits side by side.

    Attributes
    ----------
    targets : (str, str)
    rows : list of dict
        For each check of either: ``name``, ``verdicts`` and ``sizes`` (a pair each, None where an
        audit lacks it), and ``moved``: the verdict is another, or the intervals do not meet.
    """

    targets: tuple[str, str]
    rows: list[dict[str, Any]]

    def table(self) -> str:
        """As text; what moved comes first, and is marked."""
        shown = [
            (
                f"{'→' if row['moved'] else ' '} {row['name']}",
                *(_shown(*side) for side in zip(row["verdicts"], row["sizes"], strict=True)),
            )
            for row in sorted(self.rows, key=lambda row: not row["moved"])
        ]
        moved = sum(row["moved"] for row in self.rows)
        head = ("  check", "A", "B")
        return "\n".join(
            [
                f"A: {self.targets[0]}\nB: {self.targets[1]}",
                f"{moved} of {len(self.rows)} checks say something else (→)",
                "",
                format_table(head, shown),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": VERSION, "targets": list(self.targets), "checks": self.rows}


def _shown(verdict: str | None, size: Sequence[Any] | None) -> str:
    if verdict is None:
        return "–"
    if size is None or size[0] is None:
        return verdict
    return f"{verdict} {size[0]:.3g}{interval(size[1])}"


def compare_audits(first: Mapping[str, Any], second: Mapping[str, Any]) -> AuditDifference:
    """Two audits, as :func:`read_audit` gives them, check by check.

    A bias moved if the two intervals do not meet: each has its own noise.
    """
    sides = [{one["name"]: one for one in audit["checks"]} for audit in (first, second)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        found = [side.get(name) for side in sides]
        verdicts = [None if one is None else one["verdict"] for one in found]
        sizes = [None if one is None else [one["size"], one["interval"]] for one in found]
        moved = verdicts[0] != verdicts[1]
        ends = [one["interval"] for one in found if one is not None and one["interval"] is not None]
        if len(ends) == 2:
            moved |= ends[0][0] > ends[1][1] or ends[1][0] > ends[0][1]
        rows.append({"name": name, "verdicts": verdicts, "sizes": sizes, "moved": bool(moved)})
    return AuditDifference((str(first["target"]), str(second["target"])), rows)
