"""The monitor's file for Prometheus; rules and dashboard name only what exists."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from companion.errors import CompanionError, DataError
from companion.monitoring import write_prometheus

RECIPES = Path(__file__).resolve().parents[2] / "recipes/monitor"
VERDICT: dict[str, Any] = {
    "verdict": "retrain",
    "code": 20,
    "time": "2026-01-05T12:00:00+00:00",
    "model_version": "0123456789abcdef",
    "looks": 7,
    "labels": {"used": 1400, "ties": 12, "set_aside": 30},
    "tests": [
        {"name": "accuracy", "e_value_log": 7.25, "threshold_log": 5.7, "alarm": True},
        {"name": "calibration", "e_value_log": -1.0, "threshold_log": 5.7, "alarm": False},
        {"name": 'slice "long\\n"', "e_value_log": None, "threshold_log": 5.7, "alarm": False},
    ],
    "golden": {"ok": True, "state": "ok"},
    "traffic": [{"name": "scores"}],
    "figures": {"accuracy": 0.71, "ece": float("nan")},
    "reasons": ["accuracy fell"],
}
#: what Prometheus and node_exporter have by themselves
THEIRS = {"up": {"job", "instance"}, "node_textfile_scrape_error": {"instance"}}
Series = dict[str, list[dict[str, str]]]


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Each series by its name and its labels."""
    return {
        (one.name, *(f"{k}={v}" for k, v in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


# ---------------------------------------------------------------------- the file


def test_the_file_says_what_the_verdict_says(tmp_path: Path) -> None:
    file = tmp_path / "tutor.prom"
    write_prometheus(VERDICT, file)
    m = "monitor=tutor"
    assert samples(file.read_text("utf-8")) == {
        ("companion_monitor_verdict", m): 20,
        ("companion_monitor_last_run_timestamp_seconds", m): 1767614400,
        ("companion_monitor_model_info", m, "version=0123456789abcdef"): 1,
        ("companion_monitor_looks_total", m): 7,
        ("companion_monitor_labels_total", m, "outcome=used"): 1400,
        ("companion_monitor_labels_total", m, "outcome=ties"): 12,
        ("companion_monitor_labels_total", m, "outcome=set_aside"): 30,
        ("companion_monitor_log_e_value", m, "test=accuracy"): 7.25,
        ("companion_monitor_log_e_value", m, "test=calibration"): -1,
        ("companion_monitor_threshold", m, "test=accuracy"): 5.7,
        ("companion_monitor_threshold", m, "test=calibration"): 5.7,
        ("companion_monitor_threshold", m, 'test=slice "long\\n"'): 5.7,
        ("companion_monitor_alarm", m, "test=accuracy"): 1,
        ("companion_monitor_alarm", m, "test=calibration"): 0,
        ("companion_monitor_alarm", m, 'test=slice "long\\n"'): 0,
        ("companion_monitor_golden_ok", m): 1,
        ("companion_monitor_traffic_warnings", m): 1,
        ("companion_monitor_accuracy", m): 0.71,  # and no ece: it is no number
    }
    assert os.listdir(tmp_path) == ["tutor.prom"]


def test_a_bare_verdict_and_a_name(tmp_path: Path) -> None:
    bare = {"code": 30, "time": "2026-01-05T12:00:00", "golden": {"ok": False}, "tests": None}
    write_prometheus(bare, tmp_path / "x.prom", monitor="other")
    assert samples((tmp_path / "x.prom").read_text("utf-8")) == {
        ("companion_monitor_verdict", "monitor=other"): 30,
        ("companion_monitor_last_run_timestamp_seconds", "monitor=other"): 1767614400,
        ("companion_monitor_golden_ok", "monitor=other"): 0,
    }


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for verdict, name, said in (
        (VERDICT, "tutor.txt", "end in .prom"),
        (VERDICT, "no/such/folder.prom", "cannot be written"),
        ({**VERDICT, "code": None}, "x.prom", "no code"),
        ({**VERDICT, "time": "today"}, "x.prom", "time is 'today'"),
    ):
        with pytest.raises(DataError, match=said):
            write_prometheus(verdict, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(CompanionError, match=r"companion\[serve\]"):
        write_prometheus(VERDICT, tmp_path / "x.prom")


def test_who_reads_while_it_is_written_sees_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "tutor.prom"
    write_prometheus(VERDICT, file)
    whole = len(samples(file.read_text("utf-8")))
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(len(samples(file.read_text("utf-8"))))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(60):
        write_prometheus(VERDICT, file)
    stop.set()
    reader.join(30)
    assert set(seen) == {whole}


# ---------------------------------------------------------------------- what there is


@pytest.fixture(scope="module")
def known(tiny_rewards: Callable[[str], Path], tmp_path_factory: Any) -> Series:
    """All series of a real server that was asked a few things, and of a monitor's file."""
    from served import client

    from companion.serving import running

    file = tmp_path_factory.mktemp("prom") / "tutor.prom"
    write_prometheus({**VERDICT, "figures": {"accuracy": 0.7, "ece": 0.1}}, file)
    texts = [file.read_text("utf-8")]
    with running(tiny_rewards("qwen3"), allow_unchecked=True) as server, client(server.url) as http:
        row = {"prompt": "Ana buys 3 pens .", "completion": "Ben has 3 books ."}
        assert http.post("/v1/rewards", json={"items": [row]}).status_code == 200
        assert http.post("/v1/rewards", json={"items": [{}]}).status_code == 400
        texts.append(http.get("/metrics").text)
    found: Series = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                found.setdefault(one.name, []).append(dict(one.labels))
    return found


@pytest.fixture(scope="module")
def reasons() -> set[str]:
    """The reasons for which a server refuses, as its own description has them."""
    from companion.serving import make_app

    class Stand:
        def __getattr__(self, name: str) -> Any:
            return None

    stand: Any = Stand()
    described = json.dumps(make_app(stand).openapi())
    return set(re.findall(r"`([a-z_]+)`: ", described))


def rules() -> dict[str, Any]:
    return dict(yaml.safe_load((RECIPES / "alerts.yaml").read_text("utf-8")))


def dashboard() -> dict[str, Any]:
    return dict(json.loads((RECIPES / "dashboard.json").read_text("utf-8")))


def expressions(given: Any) -> Iterator[str]:
    """All of rules or of a dashboard, its variables too."""
    if isinstance(given, dict):
        for key, value in given.items():
            if key == "expr":
                yield value
            elif key == "definition":
                yield re.sub(r"label_values\((.*), (\w+)\)", r"count by (\2) (\1)", value)
            else:
                yield from expressions(value)
    elif isinstance(given, list):
        for value in given:
            yield from expressions(value)


def wrong(expression: str, known: Series, reasons: set[str]) -> list[str]:
    """What an expression names that does not exist."""
    found = []
    plain = re.sub(r'"[^"]*"', '""', expression)
    for name, matchers in re.findall(r"\b(up|(?:companion|node)_\w+)\b(?:\{(.*?)\})?", plain):
        if name in THEIRS:
            own = THEIRS[name]
        elif name in known:
            own = {"instance", "job"}.union(*known[name])
        else:
            found.append(name)
            continue
        labels = re.findall(r"(\w+)\s*(?:=|!=|=~|!~)\"", matchers)
        found += [f"{name}{{{label}}}" for label in labels if label not in own]
    by = re.findall(r"by \(([\w, ]+)\)", plain)
    every = {"instance", "job"}.union(*(labels for all_ in known.values() for labels in all_))
    found += [f"by ({n})" for part in by for n in part.split(", ") if n not in every]
    for value in re.findall(r'reason=~?"([^"]*)"', expression):
        found += [f"reason {one}" for one in value.split("|") if one not in reasons]
    for value in re.findall(r'outcome="([^"]*)"', expression):
        found += [f"outcome {value}"] if value not in VERDICT["labels"] else []
    return found


def test_rules_and_dashboard_name_what_exists(known: Series, reasons: set[str]) -> None:
    assert {"queue_full", "deadline"} <= reasons
    for given, fewest in ((rules(), 14), (dashboard(), 25)):
        listed = list(expressions(given))
        assert len(listed) >= fewest
        assert {one: bad for one in listed if (bad := wrong(one, known, reasons))} == {}


@pytest.mark.parametrize(
    "expression",
    [
        "companion_request_total > 0",
        "rate(companion_requests[5m])",
        'companion_requests_total{code="500"}',
        'sum by (model) (companion_monitor_verdict{monitor="m"})',
        'companion_refusals_total{reason="full"}',
        'companion_monitor_labels_total{outcome="new"}',
        "companion_monitor_last_run_seconds",
    ],
)
def test_a_wrong_name_is_found(expression: str, known: Series, reasons: set[str]) -> None:
    assert wrong(expression, known, reasons)


def test_each_series_of_the_monitor_is_asked_for(known: Series) -> None:
    """By a rule or a panel; else nobody would see it."""
    asked = " ".join([*expressions(rules()), *expressions(dashboard())])
    unseen = {n for n in known if n.startswith("companion_monitor_") and n not in asked}
    assert unseen == {
        "companion_monitor_alarm",  # the verdict says it
        "companion_monitor_looks_total",
        "companion_monitor_model_info",
    }


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))
    asked = {target["refId"] for p in panels for target in p.get("targets", [])}
    assert asked <= {"A", "B", "C"}


# ---------------------------------------------------------------------- promtool


@pytest.fixture(scope="module")
def promtool() -> Callable[..., subprocess.CompletedProcess[str]]:
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool (Debian: the package prometheus), or PROMTOOL=its path")
    program: str = found

    def run(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)

    return run


def test_promtool_takes_the_rules_and_their_tests(promtool: Any) -> None:
    checked = promtool("check", "rules", RECIPES / "alerts.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", RECIPES / "alerts_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_each_alert_has_a_test_that_sets_it_off_and_one_that_does_not() -> None:
    names = {rule["alert"] for group in rules()["groups"] for rule in group["rules"]}
    tests = yaml.safe_load((RECIPES / "alerts_test.yaml").read_text("utf-8"))["tests"]
    asked = [one for test in tests for one in test["alert_rule_test"]]
    assert {one["alertname"] for one in asked if one.get("exp_alerts")} == names
    quiet = {one["alertname"] for one in asked if not one.get("exp_alerts")}
    assert names - quiet == {"CompanionMonitorFileUnreadable"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("== 30", "== 31"),
        pytest.param("> 8 * 24", "> 80 * 24", marks=pytest.mark.slow),
        pytest.param("for: 15m", "for: 3h", marks=pytest.mark.slow),
        pytest.param("[10m]) > 0", "[10m]) > 9", marks=pytest.mark.slow),
    ],
)
def test_promtool_finds_a_rule_that_was_changed(
    old: str, new: str, promtool: Any, tmp_path: Path
) -> None:
    text = (RECIPES / "alerts.yaml").read_text("utf-8")
    assert old in text
    (tmp_path / "alerts.yaml").write_text(text.replace(old, new), encoding="utf-8")
    shutil.copy(RECIPES / "alerts_test.yaml", tmp_path)
    assert promtool("test", "rules", tmp_path / "alerts_test.yaml").returncode != 0


def test_promtool_reads_the_dashboard_and_the_files(promtool: Any, tmp_path: Path) -> None:
    listed = [
        {"record": f"dashboard:{i}", "expr": one.replace("$__rate_interval", "5m")}
        for i, one in enumerate(expressions(dashboard()))
    ]
    group = {"groups": [{"name": "dashboard", "rules": listed}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    checked = promtool("check", "rules", tmp_path / "rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    broken = copy.deepcopy(group)
    broken["groups"][0]["rules"][0]["expr"] += ")"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(broken), encoding="utf-8")
    assert promtool("check", "rules", tmp_path / "rules.yaml").returncode != 0
    write_prometheus(VERDICT, tmp_path / "x.prom")
    checked = promtool("check", "metrics", input=(tmp_path / "x.prom").read_text("utf-8"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
