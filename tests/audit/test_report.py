"""What an audit found, in four forms; limits, waivers, and two audits side by side."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, strategies as st

from companion.audit import AuditReport, Check, Outcome, Result, compare_audits, read_audit
from companion.audit.outcome import Kind
from companion.audit.waivers import check_names, read_waivers, split_limits, split_waivers
from companion.cli.main import main
from companion.errors import DataError

EVIL = "<script>alert('x')</script> & \x00\x1b[31m ]]> \ud800 \"q\""
THREAD = "https://github.com/huggingface/trl/issues/2778"


def result(
    name: str, kind: Kind, outcome: Outcome, waiver: str | None = None, **limits: float
) -> Result:
    check = Check(
        *(name, "text", kind, "Is it so?", EVIL, "mend it", (THREAD,)),
        frozenset(),
        lambda subject: None,
    )
    return Result(check, outcome, waiver, **limits)


@pytest.fixture
def report() -> AuditReport:
    results = (
        result("healthy", "fault", Outcome("sound", "nothing")),
        result("wrong", "fault", Outcome("found", EVIL, size=math.inf, script="print('<b>')")),
        result("known", "fault", Outcome("found", "as ever"), waiver="we live with it"),
        result("risky", "hazard", Outcome("found", "in one way of use", size=2.0)),
        result("leans", "bias", Outcome("measured", "a bit", 0.4, (0.2, 0.6), {"n": 7})),
        result("much", "bias", Outcome("measured", "a lot", 0.9, (0.8, 1.0)), at_most=0.5),
        result("maybe", "bias", Outcome("measured", "perhaps", 0.6, (0.3, 0.9)), at_most=0.5),
        result("absent", "bias", Outcome("not asked", "the target has no weights")),
    )
    return AuditReport("m", "folder", "quick", ("ids",), results, notes=(EVIL,), seconds=1.5)


VERDICTS = {
    "healthy": "sound",
    "wrong": "fault",
    "known": "waived",
    "risky": "hazard",
    "leans": "bias",
    "much": "over the limit",
    "maybe": "undecided",
    "absent": "not asked",
}


def test_what_a_result_means(report: AuditReport) -> None:
    assert {r.check.name: r.verdict for r in report.results} == VERDICTS
    assert report.faults == ("wrong", "much")
    assert not report.sound
    assert report["risky"].outcome.size == 2.0
    with pytest.raises(KeyError):
        report["of no such name"]
    text = report.table()
    assert text.index("wrong") < text.index("leans") < text.index("healthy")
    assert "NOT SOUND: 1 fault, 1 over the limit" in text
    assert "not asked (the target has no weights): absent" in text
    assert "we live with it" in text


numbers = st.floats(-5, 5).map(lambda x: round(x, 3))


@given(size=numbers, half=st.floats(0, 3), most=st.floats(0, 5), least=numbers)
def test_a_limit_fails_by_the_whole_interval_alone(
    size: float, half: float, most: float, least: float
) -> None:
    """Whatever lies in the interval may be the truth; only if all of it is beyond, it fails."""
    low, high = size - half, size + half
    inside = [low + (high - low) * i / 50 for i in range(51)]
    outcome = Outcome("measured", "", size, (low, high))
    above = result("x", "bias", outcome, at_most=most).verdict
    assert (above == "over the limit") == (
        all(x > most for x in inside) or all(x < -most for x in inside)
    )
    assert (above == "bias") == (abs(size) <= most)
    below = result("x", "bias", outcome, at_least=least).verdict
    assert (below == "over the limit") == all(x < least for x in inside)
    assert result("x", "bias", outcome).verdict == "bias"
    waived = result("x", "bias", outcome, "known", at_most=most)
    assert not waived.fails


def test_json(report: AuditReport, tmp_path: Path) -> None:
    path = report.save(tmp_path / "deep" / "audit.json")
    data = read_audit(path)
    assert [one["verdict"] for one in data["checks"]] == list(VERDICTS.values())
    assert data["checks"][1]["size"] is None  # infinite, which JSON cannot say
    assert data["checks"][4]["figures"] == {"n": 7}
    assert data["faults"] == ["wrong", "much"]
    for text, what in (("{", "no JSON"), ("{}", "no audit"), ("[]", "no audit")):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(DataError, match=what):
            read_audit(tmp_path / "bad")
    (tmp_path / "bad").write_text(json.dumps(data | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        read_audit(tmp_path / "bad")
    with pytest.raises(DataError, match="No such file"):
        read_audit(tmp_path / "none")


def test_junit(report: AuditReport, tmp_path: Path) -> None:
    """XML that any parser reads, whatever a model or a server put into it."""
    root = ElementTree.parse(report.write_junit(tmp_path / "audit.xml")).getroot()
    (suite,) = root
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == list(VERDICTS)
    failed = {name for name, case in cases.items() if case.find("failure") is not None}
    skipped = {name for name, case in cases.items() if case.find("skipped") is not None}
    assert failed == {"wrong", "much"}
    assert skipped == {"known", "absent"}
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("8", "2", "2")
    failure = cases["wrong"].find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "<script>alert" in failure.get("message", "")
    assert "print('<b>')" in failure.text
    assert THREAD in failure.text
    skip = cases["known"].find("skipped")
    assert skip is not None
    assert skip.get("message") == "waived: we live with it"
    assert "hazard" in (cases["risky"].findtext("system-out") or "")


def test_html(report: AuditReport, tmp_path: Path) -> None:
    """One file, escaped: nothing of it is fetched, and nothing runs."""
    page = report.write_html(tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert not re.search(r"<(img|link|iframe|object)|src=|url\(", page)
    assert set(re.findall(r'href="([^"]*)"', page)) == {THREAD}
    for name in VERDICTS:
        assert name in page
    assert "print(&#39;&lt;b&gt;&#39;)" in page


def test_waivers(tmp_path: Path) -> None:
    assert split_waivers(["a=why, b=c", " b = so "]) == {"a": "why, b=c", "b": "so"}
    for bad in (["a"], ["a="], ["a= "], ["a=x", "a=y"]):
        with pytest.raises(DataError, match=r"without a reason|twice"):
            split_waivers(bad)
    file = tmp_path / "waivers.yaml"
    file.write_text("pad-is-eos: served alone\ndropout: >\n  two\n  lines\n")
    assert read_waivers(file) == {"pad-is-eos": "served alone", "dropout": "two lines"}
    file.write_text("# none\n")
    assert read_waivers(file) == {}
    for text, what in (("- a", "no list"), ("a:", "without a reason"), ("{", "no YAML")):
        file.write_text(text)
        with pytest.raises(DataError, match=what):
            read_waivers(file)
    with pytest.raises(DataError, match="No such file"):
        read_waivers(tmp_path / "none")
    assert split_limits(["a=0.5", "b=-1e-3"], "--at_most") == {"a": 0.5, "b": -0.001}
    for bad in ("a", "a=x", "a=nan", "a=inf"):
        with pytest.raises(DataError, match="--at_most"):
            split_limits([bad], "--at_most")
    with pytest.raises(DataError, match="it may be pad-is-eos"):
        check_names(["pad-eos"], {"pad-is-eos", "dropout"}, "--waive")


def test_two_audits(
    report: AuditReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = AuditReport(
        *("other", "endpoint", "quick", ("rows",)),
        (
            result("wrong", "fault", Outcome("sound", "mended")),
            result("leans", "bias", Outcome("measured", "less", 0.3, (0.1, 0.5))),
            result("much", "bias", Outcome("measured", "", 0.1, (0.0, 0.2)), at_most=0.5),
            result("new", "hazard", Outcome("found", "")),
        ),
    )
    files = [str(report.save(tmp_path / "a.json")), str(other.save(tmp_path / "b.json"))]
    rows = {row["name"]: row for row in compare_audits(*map(read_audit, files)).rows}
    assert {name for name, row in rows.items() if not row["moved"]} == {"leans"}
    assert rows["wrong"]["verdicts"] == ["fault", "sound"]
    assert rows["new"]["verdicts"] == [None, "hazard"]
    out = tmp_path / "both.json"
    assert main(["compare", "--audits", *files, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "8 of 9 checks say something else" in shown
    assert shown.index("→ wrong") < shown.index("leans")
    assert json.loads(out.read_text())["targets"] == ["m", "other"]
    assert main(["compare", "a", "--audits", *files]) == 2
    assert main(["compare", "only-one"]) == 2
    assert "NEW" in capsys.readouterr().err


def test_a_bias_far_from_the_others_interval_moved(report: AuditReport) -> None:
    def audit(low: float, high: float) -> dict[str, object]:
        one = result("b", "bias", Outcome("measured", "", (low + high) / 2, (low, high)))
        return AuditReport("m", "folder", "quick", (), (one,)).to_dict()

    for second, moved in (((0.5, 0.7), True), ((0.39, 0.7), False), ((-1.0, 0.1), True)):
        (row,) = compare_audits(audit(0.2, 0.4), audit(*second)).rows
        assert row["moved"] is moved
