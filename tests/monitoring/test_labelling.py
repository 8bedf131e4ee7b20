"""The labelling page: by keyboard alone, killed and gone on with, and read by what comes after."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import axe, opened
from scipy.stats import binomtest

from companion.cli.main import main
from companion.data import load_rows_with_report, write_rows
from companion.errors import DataError, ServiceError
from companion.judge import annotator_report, load_annotations
from companion.monitoring import (
    Labelling,
    LabelServer,
    label_figures,
    read_pairs,
    shown_first,
)
from companion.tutor import TUTOR_BASE, make_rows

NASTY = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> & \u202eevil"


def rows_of(n, **more):
    return [
        {"id": f"p{i}", "prompt": f"What is {i} + {i}?", "a": f"It is {2 * i}.", "b": f"{i}{i}."}
        | more
        for i in range(n)
    ]


@pytest.fixture
def pairs(tmp_path):
    def make(rows=None, **more):
        path = tmp_path / "pairs.jsonl"
        write_rows(rows_of(6, **more) if rows is None else rows, path)
        return read_pairs(path)[0]

    return make


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def judge_all(labelling, name, choose):
    """Judge until nothing is left; `choose` gets the view."""
    view = labelling.view(name)
    while view["pair"] is not None:
        view = labelling.judge(name, view["pair"]["id"], choose(view))
    return view


# ---------------------------------------------------------------------- rows


def test_a_judgement_is_of_the_text_that_was_shown(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with Labelling(pairs(slice="sums", sampling="random", sampling_share=0.25), out) as labelling:

        def right(view):
            return "first" if view["pair"]["first"][0]["text"].startswith("It is") else "second"

        view = judge_all(labelling, "ana", right)
    assert (view["judged"], view["total"], view["pair"]) == (6, 6, None)
    rows = lines_of(out)
    assert [row["label"] for row in rows] == ["a"] * 6
    assert {row["shown_first"] for row in rows} == {"a", "b"}
    for row, given in zip(rows, rows_of(6), strict=True):
        assert given.items() <= row.items()
        assert (row["annotator"], row["slice"], row["sampling"]) == ("ana", "sums", "random")
        assert row["time"].endswith("+00:00")
        assert len(row["prompt_id"]) == 64


def test_training_takes_the_file_and_leaves_ties_out(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    choices = iter(["first", "tie", "second", "skip", "tie", "first"])
    with Labelling(pairs(scores={"a": 1.5, "b": 0.5}), out) as labelling:
        judge_all(labelling, "ana", lambda view: next(choices))
    rows = lines_of(out)
    assert [row["label"] for row in rows].count("tie") == 2
    dataset, report = load_rows_with_report(out, kind="pairs")
    assert (len(dataset), dict(report.left_out), report.bad) == (3, {"ties": 2}, 0)
    for row, pair in zip((r for r in rows if r["label"] != "tie"), dataset, strict=True):
        other = "b" if row["label"] == "a" else "a"
        assert (pair["chosen"], pair["rejected"]) == (row[row["label"]], row[other])


@pytest.mark.slow
def test_a_training_on_the_file(tmp_path, capfd):
    """Two steps on the tutor's base; ties and contradictions of two annotators are said."""
    write_rows(make_rows("pairs", 60, seed=3), tmp_path / "pairs.jsonl")
    out, rng = tmp_path / "labels.jsonl", random.Random(3)
    with Labelling(read_pairs(tmp_path / "pairs.jsonl")[0], out) as labelling:
        for name in ("ana", "ben"):
            judge_all(labelling, name, lambda view: rng.choice(["first", "second", "tie"]))
    words = ["train", "pairwise", "--model_name_or_path", str(TUTOR_BASE), "--max_steps", "2"]
    words += ["--dataset_name", str(out), "--output_dir", str(tmp_path / "model")]
    assert main(words) == 0
    ties = sum(row["label"] == "tie" for row in lines_of(out))
    said = "".join(capfd.readouterr())
    assert f"{ties} rows left out: ties" in said
    assert (tmp_path / "model" / "reward_manifest.json").exists()


@pytest.mark.parametrize("chosen_is", ["better", "worse"])
def test_sides_named_chosen_turn_with_all_that_is_said_of_them(tmp_path, chosen_is):
    rows = [
        {
            "prompt": f"p{i}",
            "chosen": f"{chosen_is} {i}",
            "rejected": f"other {i}",
            "score_chosen": 2.0,
            "score_rejected": 1.0,
            "margin": 1.0,
            "scores": {"chosen": 3.0, "rejected": 4.0},
        }
        for i in range(12)
    ]
    write_rows(rows, tmp_path / "pairs.jsonl")
    found = read_pairs(tmp_path / "pairs.jsonl")[0]
    sides = set()
    for pair in found:
        own = "a" if pair.row["a"].startswith(chosen_is) else "b"
        other = "b" if own == "a" else "a"
        sides.add(own)
        assert pair.row["given_preference"] == own
        assert pair.row["scores"] == {own: 3.0, other: 4.0}
        assert (pair.row[f"score_{own}"], pair.row[f"score_{other}"]) == (2.0, 1.0)
        assert pair.row["given_margin"] == 1.0
        assert not {"chosen", "rejected", "margin", "label"} & pair.row.keys()
    assert sides == {"a", "b"}
    # judged again, the old label is not in the way
    with Labelling(found, tmp_path / "labels.jsonl") as labelling:
        judge_all(labelling, "ana", lambda view: "first")
    assert len(load_rows_with_report(tmp_path / "labels.jsonl", kind="pairs")[0]) == 12


def test_conversations_keep_their_roles_on_the_page_and_their_form_in_the_file(pairs, tmp_path):
    row = {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2?"},
        ],
        "a": [{"role": "assistant", "content": "4"}],
        "b": [{"role": "assistant", "content": "five"}],
    }
    with Labelling(pairs([row]), tmp_path / "labels.jsonl") as labelling:
        shown = labelling.view("ana")["pair"]
        assert [turn["role"] for turn in shown["prompt"]] == ["system", "user"]
        labelling.judge("ana", shown["id"], "first")
    (written,) = lines_of(tmp_path / "labels.jsonl")
    assert row.items() <= written.items()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "a": "x"}', "line 2, field 'b'.*missing field"),
        ('{"prompt": "p", "a": "x", "b": "x "}', "line 2: the two completions are the same"),
        ('{"prompt": "p", "a": "x", "b": ""}', "line 2, field 'b'.*empty completion"),
        ('{"a": "x", "b": "y"}', "line 2, field 'prompt'.*missing field"),
        ('{"prompt": "p", "a": "x"', "line 2.*malformed JSON"),
        ('["p"]', "line 2.*not a row"),
        ('{"id": "p0", "prompt": "p", "a": "x", "b": "y"}', "line 2.*stood for another pair"),
        ('{"id": [1], "prompt": "p", "a": "x", "b": "y"}', "line 2, field 'id'"),
    ],
)
def test_a_bad_row_is_named_with_line_and_cure(tmp_path, line, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(rows_of(1)[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=said) as caught:
        read_pairs(path)
    assert caught.value.cure
    found, notes = read_pairs(path, on_error="skip")
    assert len(found) == 1
    assert [note for note in notes if "line 2" in note]


def test_columns_of_other_names_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_rows(
        [{"instruction": "Add.", "input": "2, 2", "response_a": "4", "response_b": "5"}], path
    )
    (pair,) = read_pairs(path)[0]
    assert (pair.row["a"], pair.row["b"]) == ("4", "5")
    assert "Add." in pair.row["prompt"]
    assert "2, 2" in pair.row["prompt"]
    write_rows([{"q": "Add.", "left": "4", "right": "5"}], path)
    columns = {"q": "prompt", "left": "a", "right": "b"}
    assert read_pairs(path, columns=columns)[0][0].row["prompt"] == "Add."


def test_repeated_rows_are_counted_and_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_rows(rows_of(3) + rows_of(2), path)
    found, notes = read_pairs(path)
    assert len(found) == 3
    assert notes == ["2 rows repeat a pair that stood before them: left out"]
    path.write_text("\n")
    with pytest.raises(DataError, match="no pairs to judge"):
        read_pairs(path)


# ---------------------------------------------------------------------- sides


def places(first_of, annotators=("ana", "ben", "cleo"), n=400):
    """How often a stands first, for each annotator; and how often two see the same order."""
    sides = np.array([[first_of(f"p{i}", name, 3) == "a" for i in range(n)] for name in annotators])
    return sides.sum(axis=1), (sides[0] == sides[1]).sum(), n


def check_places(first_of):
    shown, same, n = places(first_of)
    for count in (*shown, same):
        assert binomtest(int(count), n).pvalue > 1e-4, (shown, same)


def test_sides_are_drawn_for_each_pair_and_annotator():
    check_places(shown_first)
    assert shown_first("p1", "ana", 3) == shown_first("p1", "ana", 3)
    other = [shown_first(f"p{i}", "ana", 4) == shown_first(f"p{i}", "ana", 3) for i in range(400)]
    assert 120 < sum(other) < 280


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pair, name, seed: "a",
        lambda pair, name, seed: "ab"[(len(name) + seed) % 2],
        lambda pair, name, seed: shown_first(pair, "", seed),
    ],
    ids=["file's order", "one draw for an annotator", "one draw for all annotators"],
)
def test_sides_drawn_wrongly_are_seen(wrong):
    with pytest.raises(AssertionError):
        check_places(wrong)


def test_who_takes_the_first_place_always_leaves_half_the_labels(tmp_path):
    """Position bias costs labels, but does not lean to one side; and the figures show it."""
    write_rows(rows_of(200), tmp_path / "pairs.jsonl")
    with Labelling(read_pairs(tmp_path / "pairs.jsonl")[0], tmp_path / "l.jsonl") as labelling:
        labelling._file.add = labelling._file.rows.append  # the disk is not what is tested
        judge_all(labelling, "ana", lambda view: "first")
        figures = labelling.figures()
    counts = figures["annotators"]["ana"]
    assert counts["first_share"] == 1.0
    assert binomtest(counts["a"], 200).pvalue > 1e-4


# ---------------------------------------------------------------------- going on


def test_undo_takes_back_rows_and_skips_and_touches_no_other_line(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with Labelling(pairs(), out) as labelling:
        for name in ("ana", "ben"):
            for choice in ("first", "tie"):
                labelling.judge(name, labelling.view(name)["pair"]["id"], choice)
        before = out.read_bytes().splitlines(keepends=True)
        view = labelling.undo("ana")
        assert (view["judged"], view["pair"]["id"]) == (1, "p1")
        assert out.read_bytes() == b"".join([before[0], *before[2:]])
        labelling.judge("ana", "p1", "skip")
        view = labelling.view("ana")
        assert (view["judged"], view["skipped"], view["pair"]["id"]) == (1, 1, "p2")
        assert labelling.undo("ana")["pair"]["id"] == "p1"
        assert labelling.undo("ana")["pair"]["id"] == "p0"
        assert labelling.undo("ana")["can_undo"] is False
        assert [row["annotator"] for row in lines_of(out)] == ["ben", "ben"]
    with Labelling(pairs(), out) as labelling:  # of an earlier run too
        assert labelling.undo("ben")["pair"]["id"] == "p1"
    assert len(lines_of(out)) == 1


def test_skipped_pairs_come_again_when_asked_for_and_after_a_restart(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    choices = iter(["skip", "first", "skip", "tie", "first", "first"])
    with Labelling(pairs(), out) as labelling:
        view = judge_all(labelling, "ana", lambda view: next(choices))
        assert (view["judged"], view["skipped"]) == (4, 2)
        assert labelling.figures()["skipped"] == {"ana": 2}
        assert labelling.again("ana")["pair"]["id"] == "p0"
        assert labelling.undo("ana")["pair"]["id"] == "p0"  # takes back p5's judgement
        assert labelling.view("ana")["judged"] == 3
    with Labelling(pairs(), out) as labelling:
        assert labelling.view("ana")["pair"]["id"] == "p0"


def test_a_pair_is_judged_once_by_each(pairs, tmp_path):
    with Labelling(pairs(), tmp_path / "labels.jsonl") as labelling:
        labelling.judge("ana", "p0", "first")
        for pair in ("p0", "p3", "p77"):
            with pytest.raises(DataError, match="judged already"):
                labelling.judge("ana", pair, "first")
        assert labelling.view("ben")["pair"]["id"] == "p0"
        with pytest.raises(DataError, match="no choice 'third'"):
            labelling.judge("ana", "p1", "third")
        for name in ("", "  ", None, 7, "x" * 65, "a\x00b"):
            with pytest.raises(DataError, match="annotator's name"):
                labelling.view(name)
    assert len(lines_of(tmp_path / "labels.jsonl")) == 1
    with (
        Labelling(pairs(), tmp_path / "labels.jsonl", annotator="ana") as labelling,
        pytest.raises(DataError, match="for 'ana', not for 'ben'"),
    ):
        labelling.view("ben")


def test_a_torn_line_is_cut_off_and_a_whole_one_kept(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with Labelling(pairs(), out) as labelling:
        judge_all(labelling, "ana", lambda view: "first")
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    rng = random.Random(0)
    for cut in [ends[2], ends[2] - 1, ends[2] + 1, *(rng.randrange(len(whole)) for _ in range(20))]:
        out.write_bytes(whole[:cut])
        kept = sum(end <= cut + 1 for end in ends)  # a line without its line feed is whole
        with Labelling(pairs(), out) as labelling:
            assert labelling.view("ana")["judged"] == kept
            torn = cut not in ends and cut + 1 not in ends and cut > 0
            assert (
                labelling.notes == ["labels.jsonl: the last line was torn, and is cut off"] * torn
            )
            judge_all(labelling, "ana", lambda view: "first")
        assert [row["id"] for row in lines_of(out)] == [f"p{i}" for i in range(6)]


def test_files_that_are_not_ours_are_refused(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    found = pairs()
    with Labelling(found, out) as labelling:
        labelling.judge("ana", "p0", "tie")
        with pytest.raises(DataError, match="another process is writing"):
            Labelling(found, out)
    row = lines_of(out)[0]
    for change, said in [
        ({"label": "left"}, "line 2, field 'label': 'left'"),
        ({"annotator": None}, "line 2, field 'annotator': missing"),
        ({}, "line 2: 'ana' judges 'p0' twice"),
        ({"annotator": "ben", "b": "another"}, "'p0' is that of another pair"),
    ]:
        out.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
        with pytest.raises(DataError, match=said):
            Labelling(found, out)


def test_a_full_disk_records_nothing_and_says_so(pairs, tmp_path, monkeypatch):
    out = tmp_path / "labels.jsonl"
    with Labelling(pairs(), out) as labelling:
        labelling.judge("ana", "p0", "first")
        before = out.read_bytes()

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DataError, match="No space left"):
                labelling.judge("ana", "p1", "first")
            with pytest.raises(DataError, match="No space left"):
                labelling.undo("ana")
        assert out.read_bytes() == before
        assert labelling.view("ana")["pair"]["id"] == "p1"
        assert labelling.judge("ana", "p1", "tie")["judged"] == 2
    with pytest.raises(DataError, match="ending"):
        labelling.judge("ana", "p2", "tie")


# ---------------------------------------------------------------------- several


def test_agreement_of_two_is_that_of_the_judges_report(tmp_path, capsys):
    write_rows(rows_of(60), tmp_path / "pairs.jsonl")
    out = tmp_path / "labels.jsonl"
    rng = random.Random(5)
    with Labelling(read_pairs(tmp_path / "pairs.jsonl")[0], out) as labelling:

        def mostly(view):
            first = view["pair"]["first"][0]["text"].startswith("It is")
            right, wrong = ("first", "second") if first else ("second", "first")
            return rng.choices([right, wrong, "tie"], [8, 1, 1])[0]

        for name in ("ana", "ben"):
            judge_all(labelling, name, mostly)
        figures = labelling.figures()
    report = annotator_report(load_annotations(out)).figures
    (pair,) = report["with_each_other"].values()
    both = figures["agreement"]
    assert both["n"] == pair["n"] == 60
    assert both["agreement"] == pytest.approx(pair["agreement"])
    assert both["agreement_decided"] == pytest.approx(pair["agreement_decided"])
    assert both["agreement_decided"] < both["ceiling"] < 1
    assert report["people"] == both
    assert label_figures(lines_of(out))["agreement"] == both
    assert main(["judge-report", "--input", str(out)]) == 0
    assert "people: ceiling" in capsys.readouterr().out


def test_many_threads_lose_no_judgement(tmp_path):
    write_rows(rows_of(20), tmp_path / "pairs.jsonl")
    out = tmp_path / "labels.jsonl"
    with Labelling(read_pairs(tmp_path / "pairs.jsonl")[0], out) as labelling:
        threads = [
            threading.Thread(target=judge_all, args=(labelling, f"n{i}", lambda view: "tie"))
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    keys = [(row["id"], row["annotator"]) for row in lines_of(out)]
    assert len(keys) == len(set(keys)) == 160


# ---------------------------------------------------------------------- over HTTP


@contextmanager
def served(found, out, **settings):
    with Labelling(found, out, **settings) as labelling, LabelServer(labelling) as server:
        yield server


def send(server, method, path, body=None, **headers):
    """Status and body; `Host` and others as given, as a browser would never send them."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        names.setdefault("Content-Type", "application/json")
    connection.request(method, path, None if body is None else json.dumps(body), names)
    answer = connection.getresponse()
    with_headers = dict(answer.getheaders())
    text = answer.read()
    connection.close()
    return answer.status, text, with_headers


def test_strangers_are_refused(pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with served(pairs(), out) as server:
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        judged = {"annotator": "ana", "id": "p0", "choice": "first"}
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::1"):
            for method, path, body in [("GET", "/", None), ("POST", "/api/judge", judged)]:
                status, text, _ = send(server, method, path, body, Host=host)
                assert (status, b"Prompt" in text) == (421, False), host
        for origin in ("http://evil.example", "null", f"http://localhost:{port}"):
            host = f"127.0.0.1:{port}"
            assert send(server, "POST", "/api/judge", judged, Host=host, Origin=origin)[0] == 403
        plain = send(server, "POST", "/api/judge", judged, Content_Type="text/plain")
        assert plain[0] == 415
        assert out.read_bytes() == b""
        for host in (f"localhost:{port}", "127.0.0.1:9", "[::1]:8100", "LOCALHOST"):  # a tunnel's
            assert send(server, "GET", "/", Host=host)[0] == 200
        status, _, headers = send(server, "POST", "/api/judge", judged)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert len(lines_of(out)) == 1


def test_bad_requests_are_answered_with_a_reason(pairs, tmp_path):
    with served(pairs(), tmp_path / "labels.jsonl") as server:
        for status, method, path, body in [
            (404, "GET", "/../pyproject.toml", None),
            (404, "POST", "/api/other", {}),
            (400, "POST", "/api/judge", [1]),
            (400, "POST", "/api/judge", {"annotator": "ana", "id": "p0", "choice": "best"}),
            (400, "POST", "/api/judge", {"annotator": {"x": 1}, "id": "p0", "choice": "tie"}),
            (409, "POST", "/api/judge", {"annotator": "ana", "id": "p4", "choice": "tie"}),
            (413, "POST", "/api/judge", {"annotator": "a" * 70_000}),
        ]:
            found, text, _ = send(server, method, path, body)
            assert found == status, path
            assert json.loads(text)["error"]
        port = server.server_address[1]
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port}"):
            LabelServer(server.labelling, port)


# ---------------------------------------------------------------------- killed


def started(folder, *words):
    """A process of the command, and its address."""
    program = "import sys; from companion.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", program, "label", str(folder / "pairs.jsonl")),
            *("--output", str(folder / "labels.jsonl"), "--port", "0", *words),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("ready: "):
            return process, urlsplit(line.split()[1])
    raise AssertionError(process.communicate())


def test_a_killed_command_goes_on_and_has_lost_nothing(tmp_path):
    """kill -9 while judgements pour in: every one that was answered is in the file, once."""
    write_rows(rows_of(400), tmp_path / "pairs.jsonl")
    out = tmp_path / "labels.jsonl"
    rng = random.Random(7)
    answered: list[str] = []
    for _ in range(3):
        process, address = started(tmp_path, "--annotator", "ana")
        try:
            killer = threading.Timer(rng.uniform(0.02, 0.15), process.kill)
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)

            def ask(method, path, body=None, connection=connection):
                connection.request(
                    method, path, body and json.dumps(body), {"Content-Type": "application/json"}
                )
                return json.loads(connection.getresponse().read())

            view = ask("GET", "/api/view")
            assert view["judged"] >= len(answered)
            killer.start()
            while view["pair"] is not None:
                pair = view["pair"]["id"]
                view = ask("POST", "/api/judge", {"id": pair, "choice": "tie"})
                answered.append(pair)
        except (OSError, http.client.HTTPException):
            pass
        finally:
            process.kill()
            process.communicate()
            killer.join()
    found, _ = read_pairs(tmp_path / "pairs.jsonl")
    with Labelling(found, out) as labelling:
        ids = [row["id"] for row in labelling.rows]
    assert len(ids) == len(set(ids))
    assert set(answered) <= set(ids)
    assert len(ids) <= len(answered) + 3  # one an end may have been written and not answered
    assert answered


def test_the_command_ends_by_a_signal_with_its_figures(tmp_path):
    write_rows(rows_of(3), tmp_path / "pairs.jsonl")
    process, address = started(tmp_path, "--json", str(tmp_path / "figures.json"))
    try:
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
        for name, choice in (("ana", "tie"), ("ben", "tie"), ("ana", "skip")):
            pair = "p1" if choice == "skip" else "p0"
            body = json.dumps({"annotator": name, "id": pair, "choice": choice})
            connection.request("POST", "/api/judge", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read()
        process.send_signal(signal.SIGTERM)
        said, noted = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "2 judgements of 1 pairs" in said
    assert "Krippendorff's α has no value" in said
    assert "1 pairs were skipped and have no row" in noted
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["agreement"]["n"] == 1
    assert figures["skipped"] == {"ana": 1}


def test_the_command_refuses_what_cannot_work(tmp_path, capsys):
    write_rows(rows_of(3), tmp_path / "pairs.jsonl")
    source = str(tmp_path / "pairs.jsonl")
    for words, said in [
        (["--output", source], "the same file"),
        (["--output", str(tmp_path / "x.csv")], "plain JSONL"),
        (["--output", str(tmp_path / "x.jsonl"), "--port", "99999"], "cannot listen"),
        (["--output", str(tmp_path / "x.jsonl"), "--annotator", " "], "annotator's name"),
    ]:
        assert main(["label", source, *words]) == 2
        assert said in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    program = (
        "import sys, companion.monitoring.label_page\n"
        "heavy = {'torch', 'transformers', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- in a browser


def texts_of(page, *names):
    return [page.locator(f"#{name}").text_content() for name in names]


def enter(page, name, total):
    """The field has the focus as soon as it is there."""
    page.get_by_label("Your name").wait_for()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.get_by_text(f"0 of {total} judged").wait_for()


def ready(page):
    page.locator("body[data-ready], body:not([data-pair])").wait_for()


def press(page, key, judged):
    """A key, when the pair may be judged; then the page has gone on."""
    ready(page)
    page.keyboard.press(key)
    page.get_by_text(f"{judged} of ").wait_for()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_keys_alone_judge_undo_and_end(width, scheme, browser, pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with served(pairs(), out) as server:
        with opened(browser, server.url, width=width, scheme=scheme) as (page, console):
            page.get_by_label("Your name").wait_for()
            assert axe(page, True) == []
            enter(page, "  ana  maria ", 6)
            shown = []
            for count, key in enumerate(["1", "ArrowRight", "t", "ArrowLeft"], start=1):
                shown.append(
                    [page.locator(f"#{side}").inner_text() for side in ("first", "second")]
                )
                press(page, key, count)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert axe(page, True) == []
            rows = lines_of(out)
            for row, (first, second), place in zip(rows, shown, (0, 1, None, 0), strict=True):
                assert {row["a"], row["b"]} == {first, second}
                assert row[row["shown_first"]] == first
                assert (
                    row["label"] == "tie"
                    if place is None
                    else (row[row["label"]] == (first, second)[place])
                )
            assert rows[0]["annotator"] == "ana maria"

            press(page, "u", 3)
            assert page.get_by_role("status").inner_text() == "Taken back: judge this pair again."
            assert len(lines_of(out)) == 3
            press(page, "2", 4)
            press(page, "s", 4)
            page.get_by_text("4 of 6 judged, 1 skipped").wait_for()
            press(page, "0", 5)
            page.get_by_text("You judged 5 pairs and skipped 1").wait_for()
            assert axe(page, True) == []
            press(page, "r", 5)
            page.locator("#pair").wait_for()
            press(page, "1", 6)
            page.get_by_text("You judged all 6 pairs").wait_for()
            page.get_by_text("ana maria: 6 judged, 2 ties").wait_for()
            assert console == []
        # a second one, in a window of their own; reloaded, the page knows who it was
        with opened(browser, server.url, width=width, scheme=scheme) as (page, console):
            enter(page, "ben", 6)
            press(page, "1", 1)
            page.reload()
            page.get_by_text("1 of 6 judged").wait_for()
            assert page.locator("#who").inner_text() == "ben"
            page.get_by_text("Annotators and their agreement").click()
            page.get_by_text("1 pairs were judged by several people").wait_for()
            assert axe(page, True) == []
            assert console == []
    assert len(lines_of(out)) == 7


def test_a_bouncing_or_held_key_judges_one_pair(browser, pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with (
        served(pairs(), out, annotator="ana") as server,
        opened(browser, server.url) as (page, _),
    ):
        page.get_by_text("0 of 6 judged").wait_for()
        ready(page)
        # two presses within one task of the browser, as fast as a key can bounce
        page.evaluate(
            "for (const repeat of [false, false, true])"
            " document.body.dispatchEvent(new KeyboardEvent('keydown',"
            " {key: '1', repeat, bubbles: true}))"
        )
        page.get_by_text("1 of 6 judged").wait_for()
        page.keyboard.press("Control+1")
        press(page, "2", 2)
    assert [row["id"] for row in lines_of(out)] == ["p0", "p1"]


def test_what_strangers_wrote_is_text(browser, pairs, tmp_path):
    row = {"id": NASTY, "prompt": NASTY, "a": f"one {NASTY}\n\n  two", "b": f"three {NASTY}"}
    with (
        served(pairs([row]), tmp_path / "labels.jsonl") as server,
        opened(browser, server.url) as (page, console),
    ):
        enter(page, "<b>ana</b>", 1)
        texts = [
            page.locator(f"#{place}").text_content() for place in ("prompt", "first", "second")
        ]
        assert texts[0] == NASTY
        assert set(texts[1:]) == {row["a"], row["b"]}
        assert page.title() == "companion label"
        assert page.locator("main img, main script, main b").count() == 0
        press(page, "1", 1)
        page.get_by_text("<b>ana</b>: 1 judged").wait_for()
        assert page.locator("main img, main script, main b").count() == 0
        assert console == []


def test_a_command_that_ended_and_another_window_are_told(browser, pairs, tmp_path):
    out = tmp_path / "labels.jsonl"
    with (
        served(pairs(), out, annotator="ana") as server,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.goto(server.url)
        page.get_by_text("0 of 6 judged").wait_for()
        server.labelling.judge("ana", "p0", "tie")  # as in another window
        ready(page)
        page.keyboard.press("1")
        page.get_by_role("alert").get_by_text("judged already").wait_for()
        page.get_by_text("1 of 6 judged").wait_for()
        press(page, "1", 2)
        page.route("**/api/judge", lambda route: route.abort())
        ready(page)
        page.keyboard.press("1")
        page.get_by_role("alert").get_by_text("does not answer").wait_for()
    assert len(lines_of(out)) == 2
