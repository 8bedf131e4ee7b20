"""Agreement and biases against scikit-learn, and against judges whose bias is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from companion.cli.main import main
from companion.errors import DataError, ShapeError
from companion.judge import (
    annotator_report,
    cohen_kappa,
    judge_report,
    load_annotations,
)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    first = random.choice(["a", "b", "tie"], 200, p=[0.5, 0.3, 0.2])
    second = np.where(random.random(200) < 0.6, first, random.choice(["a", "b", "tie"], 200))
    assert cohen_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_kappa_of_extremes():
    assert cohen_kappa(["a", "b"], ["a", "b"]) == 1.0
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1.0
    assert np.isnan(cohen_kappa(["a", "a"], ["a", "a"]))
    with pytest.raises(ShapeError):
        cohen_kappa(["a"], ["a", "b"])


def rows_of(n, place, own, long):
    """Verdicts of a judge that takes the first place, its own, or the longer text, by chance."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(n):
        texts = ["w " * 5, "w " * 9]
        better = random.integers(2)  # for people, neither length nor author matters
        said = []
        for order in (0, 1):
            pick, roll = better, random.random()
            if roll < place:
                pick = order
            elif roll < place + own:
                pick = 0
            elif roll < place + own + long:
                pick = 1
            said.append("ab"[pick])
        rows.append({
            "prompt": f"p{i}", "a": texts[0], "b": texts[1], "first": said[0], "swapped": said[1],
            "preference": said[0] if said[0] == said[1] else "tie", "reason": None,
            "given_preference": "ab"[better], "model_a": "me", "model_b": "you", "judge": "me",
        })  # fmt: skip
    return rows


def test_a_fair_judge_shows_no_bias():
    figures = judge_report(rows_of(400, 0, 0, 0)).figures
    assert figures["position"]["first_share"] == pytest.approx(0.5)
    assert figures["position"]["consistent"] == 1.0
    assert figures["length"]["difference"] == 0.0
    assert figures["agreement"]["kappa"] == 1.0


@pytest.mark.parametrize(
    ("dials", "part", "name", "neutral"),
    [
        ({"place": 0.6, "own": 0, "long": 0}, "position", "first_share", 0.5),
        ({"place": 0, "own": 0, "long": 0.6}, "length", "difference", 0.0),
        ({"place": 0, "own": 0.6, "long": 0}, "self_preference", "difference", 0.0),
    ],
)
def test_each_bias_shows_in_its_own_figure(dials, part, name, neutral):
    figures = judge_report(rows_of(600, **dials)).figures
    low, high = figures[part][f"{name}_interval"]
    assert low > neutral + 0.1
    assert low <= figures[part][name] <= high


def test_a_place_that_is_preferred_does_not_decide_after_swapping():
    """With one order the place decides; with both it makes ties, and the decided rows are right."""
    figures = judge_report(rows_of(600, 0.6, 0, 0)).figures
    rows = rows_of(600, 0.6, 0, 0)
    one_order = np.mean([row["first"] == row["given_preference"] for row in rows])
    assert figures["agreement"]["agreement_decided"] > one_order + 0.1


def test_rows_that_lack_a_field_are_named():
    with pytest.raises(DataError, match="row 0: no 'first'"):
        judge_report([{"prompt": "p", "a": "x", "b": "y", "preference": "a"}])
    with pytest.raises(DataError, match="no verdicts"):
        judge_report([])


# ---------------------------------------------------------------------- several annotators

VOTES = {  # pair -> verdict of ann, ben, cy and the model
    "1": "aaaa", "2": "aabb", "3": "bbtb", "4": "tttb", "5": "abt-", "6": "bbbb",
}  # fmt: skip
NAMES = ("ann", "ben", "cy", "model")


def annotation_rows():
    said = {"a": "a", "b": "b", "t": "tie"}
    return [
        {"id": key, "prompt": f"p{key}", "a": "x", "b": "y", "preference": said[vote],
         "annotator": name, "kind": "judge" if name == "model" else "human"}
        for key, votes in VOTES.items()
        for name, vote in zip(NAMES, votes, strict=True)
        if vote != "-"
    ]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_annotators_against_a_direct_computation(tmp_path):
    path = write(tmp_path / "votes.jsonl", annotation_rows())
    annotations = load_annotations(path)
    assert annotations.annotators == list(NAMES)
    assert annotations.human == [True, True, True, False]
    assert annotations.majority().tolist() == [0, 0, 1, 2, -1, 1]
    figures = annotator_report(annotations).figures
    for i, first in enumerate(NAMES):
        for j in range(i + 1, 4):
            both = [(v[i], v[j]) for v in VOTES.values() if "-" not in v[i] + v[j]]
            found = figures["with_each_other"][f"{first} | {NAMES[j]}"]
            assert found["n"] == len(both)
            assert found["agreement"] == pytest.approx(np.mean([x == y for x, y in both]))
            assert found["kappa"] == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))
    model = figures["with_majority"]["model"]
    assert (model["n"], model["agreement"]) == (5, pytest.approx(3 / 5))
    # a person is compared with the others, never with himself
    assert annotations.majority(without="ann").tolist() == [0, -1, -1, 2, -1, 1]
    assert figures["with_majority"]["ann"]["n"] == 3
    out = tmp_path / "figures.json"
    assert main(["judge-report", "--input", str(path), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["pairs"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": "first"}, "line 25.*unknown preference"),
        ({"annotator": "ann"}, "line 25.*'ann' judges '6' twice"),
        ({"annotator": "eve", "a": "z"}, "line 25.*another pair"),
        ({"annotator": None}, "line 25.*no 'annotator'"),
        ({"annotator": "ann", "id": "7", "kind": "judge"}, "two kinds"),
    ],
)
def test_bad_annotation_rows_are_named(tmp_path, change, message):
    rows = annotation_rows()
    bad = {**rows[-1], "annotator": "eve", **change}
    path = write(tmp_path / "votes.jsonl", [*rows, bad, {**rows[0], "annotator": "eve"}])
    message = message.replace("line 25", f"line {len(rows) + 1}")
    with pytest.raises(DataError, match=message):
        load_annotations(path)
