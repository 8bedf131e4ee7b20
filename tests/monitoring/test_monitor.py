"""The monitor as its users run it: labels in, verdicts out, whatever happens in between.

The labels bring their scores, so that no model is loaded; `test_with_a_model` has one.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.cli.main import main
from companion.errors import DataError
from companion.monitoring import Store, judge, look, make_plan, measure, write_monitor_report

VERSION = "0123456789abcdef"
#: the true inverse temperature of the simulated model
TRUE = 1.0


def seeded() -> np.random.Generator:
    """A generator whose seed is printed."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def draw(rng: np.random.Generator, n: int, inverse: float = TRUE) -> tuple[np.ndarray, np.ndarray]:
    """Margins of pairs, and whether each first is preferred."""
    margins = rng.normal(0, 2, n)
    return margins, (rng.random(n) < 1 / (1 + np.exp(-margins * inverse))).astype(float)


def plan(rng: np.random.Generator, n: int = 3000, **settings: Any) -> Any:
    """Of a calibrated model."""
    margins, outcome = draw(rng, n)
    prompts = [f"r{i}" for i in range(n)]
    asked: dict[str, Any] = {"model": "simulated", "model_version": VERSION, "temperature": 1.0}
    return make_plan(margins, outcome, prompts, **(asked | settings))


def rows(
    rng: np.random.Generator, n: int, name: str, inverse: float = TRUE, **more: Any
) -> list[dict[str, Any]]:
    """Labelled pairs with scores."""
    margins, outcome = draw(rng, n, inverse)
    return [
        {
            "id": f"{name}/{i}",
            "prompt": f"question {name} {i}",
            "a": f"one {i}",
            "b": f"two {i}",
            "label": "a" if first else "b",
            "scores": {"a": float(margin), "b": 0.0},
            "model_version": VERSION,
            "sampling": "random",
            **more,
        }
        for i, (margin, first) in enumerate(zip(margins, outcome, strict=True))
    ]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.create(tmp_path / "watch.sqlite", plan(np.random.default_rng(1))) as made:
        yield made


@pytest.fixture
def give(tmp_path: Path) -> Callable[..., Path]:
    """Write rows into a file."""

    def write(given: list[Any], name: str = "labels.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in given)
        )
        return path

    return write


def bare(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict without the time of its making."""
    return {key: value for key, value in verdict.items() if key != "time"}


# ---------------------------------------------------------------------- verdicts


def test_a_model_that_has_not_changed_is_fine(store: Store, give: Callable[..., Path]) -> None:
    rng = seeded()
    for week in range(6):
        verdict = look(store, labels=give(rows(rng, 200, f"w{week}")))
    assert (verdict["verdict"], verdict["code"], verdict["looks"]) == ("fine", 0, 6)
    assert not verdict["reasons"]
    assert verdict["labels"]["used"] == 1200
    assert verdict["figures"]["ece_band"][0] <= verdict["figures"]["ece_band"][1]


def test_a_fall_is_named_with_its_week_size_and_cure(
    store: Store, give: Callable[..., Path]
) -> None:
    rng = seeded()
    for week in range(10):
        inverse = TRUE if week < 4 else 0.25
        day = f"2026-01-{week + 1:02d}T00:00:00Z"
        verdict = look(store, labels=give(rows(rng, 400, f"w{week}", inverse, time=day)))
    assert verdict["code"] == 20
    tests = {test["name"]: test for test in verdict["tests"]}
    for name in ("accuracy", "calibration"):
        test = tests[name]
        assert test["alarm"]
        assert abs(test["since_look"] - 5) <= 1
        assert f"labels from 2026-01-0{test['since_look']}" in test["what"]
        low, high = test["interval"]
        assert low <= test["now"] <= high
    assert tests["calibration"]["side"] == "overconfident"
    low, high = tests["calibration"]["interval"]
    assert low < 4.0 < high  # the temperature that is now true
    assert tests["accuracy"]["change"] < -0.05
    assert any("companion retrain" in line for line in verdict["advice"])


def test_a_slice_falls_alone(tmp_path: Path, give: Callable[..., Path]) -> None:
    rng = seeded()
    own = plan(rng, 4000, slices=["code" if i % 4 == 0 else "chat" for i in range(4000)])
    with Store.create(tmp_path / "slices.sqlite", own) as store:
        for week in range(8):
            given = rows(rng, 900, f"a{week}", slice="chat")
            given += rows(rng, 100, f"b{week}", -1.0, slice="code")
            verdict = look(store, labels=give(given))
    alarms = [test["name"] for test in verdict["tests"] if test["alarm"]]
    assert "slice code" in alarms
    assert "slice chat" not in alarms
    assert any("label more pairs of slice code" in line for line in verdict["advice"])


# ---------------------------------------------------------------------- rows


def test_what_comes_twice_counts_once(store: Store, give: Callable[..., Path]) -> None:
    given = rows(seeded(), 300, "w")
    first = look(store, labels=give(given))
    again = look(store, labels=give(given + given))
    assert again["labels"] == first["labels"]
    assert again["tests"] == first["tests"]
    two = [dict(row, annotator=name) for row in given[:5] for name in ("ann", "bob")]
    both = look(store, labels=give(two))
    assert sum(both["labels"]["by_sampling"].values()) == 310  # other annotators, other labels
    assert both["labels"]["prompt_seen_before"] == 10
    assert both["figures"]["agreement"]["agreement"] == 1.0


def test_order_within_a_look_does_not_matter(tmp_path: Path, give: Callable[..., Path]) -> None:
    rng = seeded()
    given = rows(rng, 500, "w")
    found = []
    for name in ("one", "two"):
        with Store.create(tmp_path / name, plan(np.random.default_rng(1))) as store:
            found.append(look(store, labels=give(given))["tests"][0]["e_value_log"])
        rng.shuffle(given)
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_labels_that_were_not_chosen_at_random_raise_no_alarm(
    store: Store, give: Callable[..., Path]
) -> None:
    rng = seeded()
    disputed = rows(rng, 1500, "d", -1.0, sampling="uncertainty")
    unknown = [{k: v for k, v in row.items() if k != "sampling"} for row in rows(rng, 50, "u")]
    verdict = look(store, labels=give(disputed + unknown))
    assert verdict["code"] == 10
    assert verdict["labels"] | {"refused": 0} == {
        "used": 0,
        "prompt_seen_before": 0,
        "set_aside": 1550,
        "by_sampling": {"uncertainty": 1500, "unknown": 50},
        "refused": 0,
    }
    assert any("1,500 uncertainty" in line for line in verdict["warnings"])
    # the same rows, called random: what the rule is there for
    lie = [dict(row, id=row["id"] + "x", sampling="random") for row in disputed]
    assert look(store, labels=give(lie))["code"] == 20


def test_bad_rows_are_named_and_skipped(store: Store, give: Callable[..., Path]) -> None:
    good = rows(seeded(), 20, "w")
    bad: list[Any] = [
        "{not json",
        "[1, 2]",
        {"id": 1, "prompt": "p", "a": "x", "b": "y"},
        {"id": 2, "prompt": "p", "a": "x", "b": "y", "label": "A"},
        {"id": 3, "prompt": "p", "chosen": "x", "rejected": "x"},
        {"id": 4, "prompt": "p", "chosen": "x"},
        {**good[0], "id": "t", "time": "yesterday"},
        {**good[0], "id": "s", "scores": {"a": "high", "b": 0}},
        {**good[0], "id": "v", "model_version": "another"},
    ]
    verdict = look(store, labels=give([*good, *bad]))
    assert verdict["labels"]["used"] == 20
    assert sum(verdict["labels"]["refused"].values()) == len(bad)
    assert verdict["bad_rows"][0].startswith("labels.jsonl, line 21")
    assert len(verdict["bad_rows"]) == 5
    assert "scores of another model version" in verdict["labels"]["refused"]


def test_prompts_of_the_reference_are_no_second_sample(
    store: Store, give: Callable[..., Path]
) -> None:
    given = [dict(row, prompt_id=f"r{i}") for i, row in enumerate(rows(seeded(), 50, "w"))]
    verdict = look(store, labels=give(given))
    assert verdict["labels"]["refused"] == {"prompt of the reference": 50}
    assert verdict["labels"]["used"] == 0


def test_a_label_that_comes_late_belongs_to_the_look_that_sees_it(
    store: Store, give: Callable[..., Path]
) -> None:
    rng = seeded()
    look(store, labels=give(rows(rng, 100, "w0", time="2026-03-02T00:00:00Z")))
    late = rows(rng, 50, "late", time="2026-01-01T00:00:00Z")
    look(store, labels=give(late))
    assert np.bincount(store.labels().look).tolist() == [0, 100, 50]


def test_ties_count_half(store: Store, give: Callable[..., Path]) -> None:
    given = [dict(row, label="tie") for row in rows(seeded(), 100, "w")]
    verdict = look(store, labels=give(given))
    assert verdict["figures"]["accuracy"] == 0.5


def test_without_a_scorer_rows_need_scores(store: Store, give: Callable[..., Path]) -> None:
    given = [{k: v for k, v in r.items() if k != "scores"} for r in rows(seeded(), 3, "w")]
    with pytest.raises(DataError, match="labels without scores"):
        look(store, labels=give(given))


# ---------------------------------------------------------------------- phases


def test_an_alarm_stays_until_a_restart(store: Store, give: Callable[..., Path]) -> None:
    rng = seeded()
    assert look(store, labels=give(rows(rng, 3000, "bad", -0.5)))["code"] == 20
    assert look(store, labels=give(rows(rng, 3000, "good")))["code"] == 20
    assert look(store)["code"] == 20
    assert store.restart(plan(np.random.default_rng(2)), "a new model") == 2
    assert look(store)["code"] == 0
    verdict = look(store, labels=give(rows(rng, 300, "new")))
    assert (verdict["code"], verdict["phase"], verdict["labels"]["used"]) == (0, 2, 300)
    assert [one["reason"] for one in store.phases()] == ["init", "a new model"]


def test_a_kind_without_pairs_has_no_labels(tmp_path: Path, give: Callable[..., Path]) -> None:
    from companion.monitoring import Plan

    with Store.create(tmp_path / "process.sqlite", Plan("p", VERSION, 0.01)) as store:
        assert look(store)["verdict"] == "fine"
        with pytest.raises(DataError, match="scores no pairs"):
            look(store, labels=give(rows(seeded(), 3, "w")))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no monitor there"):
        Store(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello, this is no database at all\n" * 50)
    with pytest.raises(DataError, match="no monitor's file"):
        Store(tmp_path / "text")
    Store.create(tmp_path / "one", plan(np.random.default_rng(1)))
    with pytest.raises(DataError, match="is there already"):
        Store.create(tmp_path / "one", plan(np.random.default_rng(1)))


# ---------------------------------------------------------------------- the command


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "companion", "monitor", *map(str, words)]


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_changes_nothing(kills: int, tmp_path: Path, give: Callable[..., Path]) -> None:
    rng = seeded()
    # many small batches, so that most kills hit one of them
    weeks = [rows(rng, 2500, f"w{week}", 0.5 if week else 1.0) for week in range(2)]
    files = [give(week, f"{i}.jsonl") for i, week in enumerate(weeks)]
    found = {}
    draw_time = random.Random(int(rng.integers(10**6)))
    done = 0
    for name in ("quiet", "killed"):
        state = tmp_path / f"{name}.sqlite"
        Store.create(state, plan(np.random.default_rng(1)))
        for i, file in enumerate(files):
            words = command("run", state, "--labels", file, "--no_golden", "--json", tmp_path / "v")
            left = (kills - done) // (len(files) - i) if name == "killed" else 0
            for _ in range(left):
                process = subprocess.Popen(
                    words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                # (the look itself begins after half a second of imports)
                time.sleep(draw_time.uniform(0.3, 1.3))
                process.send_signal(signal.SIGKILL)
                process.wait(30)
                done += 1
            code = subprocess.run(words, capture_output=True, timeout=120, check=False).returncode
            assert code in (0, 20)
        found[name] = json.loads((tmp_path / "v").read_text())
        with Store(state) as store:
            stored = store.labels()
            # a look may have ended before the kill: then the next was one without labels, and only
            # the numbers of those after it are others
            looks = sorted(set(stored.look.tolist()))
            assert len(looks) == 2
            stored.look = np.searchsorted(looks, stored.look) + 1
            verdict = bare(judge(store, measure(store.plan(), stored), look=0))
            wanted = ("verdict", "code", "labels", "figures", "advice")
            found[name] = {key: verdict[key] for key in wanted} | {
                "tests": [
                    (t["name"], t["history"], t["alarm_look"], t["since_look"])
                    for t in verdict["tests"]
                ]
            }
    assert done == kills
    assert found["killed"] == found["quiet"]


def test_its_exit_code_is_the_verdict(
    store: Store, give: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = seeded()
    words = ["monitor", "run", str(store.path), "--no_golden"]
    fine = give(rows(rng, 200, "w"))
    prom, file = tmp_path / "watch.prom", tmp_path / "verdict.json"
    asked = ["--labels", str(fine), "--json", str(file), "--prometheus", str(prom)]
    assert main([*words, *asked]) == 0
    assert json.loads(file.read_text())["verdict"] == "fine"
    assert 'companion_monitor_verdict{monitor="watch"} 0.0' in prom.read_text()
    assert main([*words, "--labels", str(give(rows(rng, 3000, "x", -1.0)))]) == 20
    said = capsys.readouterr().out
    assert "what to do: retrain from the base" in said
    assert main([*words, "--labels", str(tmp_path / "nothing.jsonl")]) == 2
    assert main(["monitor", "run", str(tmp_path / "nothing.sqlite")]) == 2
    assert main([*words, "--protocol", "companion"]) == 2


def test_two_runs_at_once(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with store.alone():
        assert main(["monitor", "run", str(store.path), "--no_golden"]) == 2
    assert "another run of this monitor is going on" in capsys.readouterr().err


def test_traffic_is_a_warning(store: Store, tmp_path: Path, give: Callable[..., Path]) -> None:
    rng = seeded()

    def texts(week: int, words: int) -> Path:
        return give(
            [
                {
                    "prompt": f"q {week} {i}",
                    "completion": " ".join(map(str, rng.integers(0, 999, words + i % 5))),
                    "score": float(rng.normal()),
                    "time": f"2026-02-{week + 1:02d}T00:00:{i % 60:02d}Z",
                }
                for i in range(300)
            ],
            "traffic.jsonl",
        )

    for week in range(3):
        assert look(store, traffic=texts(week, 20))["code"] == 0
    again = look(store, traffic=tmp_path / "traffic.jsonl")  # all of it was seen
    assert store.looks()[-1].traffic["texts"] == 0 or again["code"] == 0
    verdict = look(store, traffic=texts(5, 200))
    assert verdict["code"] == 10
    assert any("lengths" in line for line in verdict["warnings"])


def test_what_the_monitor_itself_asked_is_no_traffic(
    store: Store, give: Callable[..., Path]
) -> None:
    """A server's log holds the labels that a look had it score, under ids of their own."""
    rows_of = [
        {
            "request": request,
            "input_ids": [1, 2, i],
            "prompt_length": 1,
            "raw": 0.5,
            "time": 1.0 + i,
        }
        for i, request in enumerate(["abc", "companion-monitor-1", "companion-monitor-2"])
    ]
    look(store, traffic=give(rows_of, "requests-1.jsonl"))
    assert store.looks()[-1].traffic["texts"] == 1


def test_the_report(store: Store, give: Callable[..., Path], tmp_path: Path) -> None:
    rng = seeded()
    page = write_monitor_report(store, tmp_path / "before.html").read_text()
    assert "not looked at yet" in page
    for week in range(3):
        given = rows(rng, 300, f"w{week}", slice="<script>alert(1)</script>")
        look(store, labels=give(given))
    assert main(["monitor", "report", str(store.path), "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 3
    assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(["']?http|@import""", page)


def test_with_a_model(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`init` scores the reference and plans; `run` scores the labels, and checks golden texts."""
    from companion.data import write_rows
    from companion.models import RewardManifest, load_base, save_reward_model
    from companion.scoring import add_golden_texts
    from companion.tutor import make_rows

    model = tmp_path / "model"
    made = load_base(tiny_base, text="chat")
    save_reward_model(made, model, RewardManifest(), describe=add_golden_texts)
    reference = tmp_path / "reference.jsonl"
    write_rows(make_rows("pairs", 150, seed=5), reference)
    state, file = tmp_path / "watch.sqlite", tmp_path / "plan.json"
    words = ["monitor", "init", str(state), "--model", str(model), "--reference", str(reference)]
    assert main([*words, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "chance of a false alarm, ever: 0.01" in said
    assert json.loads(file.read_text())["accuracy"]["prompts"] == 150
    assert main(words) == 2  # it is there
    labels = tmp_path / "labels.jsonl"
    write_rows([dict(r, sampling="random") for r in make_rows("pairs", 30, seed=6)], labels)
    assert main(["monitor", "run", str(state), "--labels", str(labels), "--json", str(file)]) == 0
    verdict = json.loads(file.read_text())
    assert verdict["golden"]["ok"]
    assert verdict["labels"]["used"] == 30
    assert os.path.isfile(state)
