"""Several files, globs and mixtures: exact counts, said seeds, and the rows that were there."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from companion import load_rows, load_rows_with_report, write_rows
from companion.cli.main import main
from companion.data.mixing import exact_counts, read_mix, recipe_of
from companion.data.splits import dataset_fingerprint
from companion.data.writing import plain_row
from companion.errors import CompanionError, DataError
from companion.training.config import DataArguments
from companion.training.run import load_sets


def pairs(name: str, n: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{name} {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "from": name}
        for i in range(n)
    ]


def mixture(folder: Path, text: str, **rows: list[dict[str, Any]]) -> str:
    for name, own in rows.items():
        write_rows(own, folder / f"{name}.jsonl")
    path = folder / "mix.yaml"
    path.write_text(text.replace("DIR", str(folder)))
    return str(path)


TWO = """
seed: 3
sources:
  - {dataset_name: DIR/a.jsonl, weight: 0.7}
  - {dataset_name: DIR/b.jsonl, weight: 0.3}
"""


# ---------------------------------------------------------------- counts


@given(
    weights=st.lists(
        st.fractions(Fraction(1, 100), 10, max_denominator=100), min_size=1, max_size=6
    ),
    rows=st.integers(1, 10**7),
)
@settings(max_examples=40, deadline=None)
def test_counts_are_exact(weights: list[Fraction], rows: int) -> None:
    counts = exact_counts(weights, rows)
    assert sum(counts) == rows
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight * rows / sum(weights)) < 1


def test_a_mixture_holds_what_its_counts_say(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    rows = {"a": pairs("a", 60), "b": pairs("b", 50)}
    path = mixture(tmp_path, f"rows: 61\n{TWO}".replace("seed: 3", f"seed: {seed}"), **rows)
    dataset, report = load_rows_with_report(path)
    assert Counter(dataset["from"]) == {"a": 43, "b": 18}  # 42.7 and 18.3
    every = [json.dumps(row, sort_keys=True) for own in rows.values() for row in own]
    found = [json.dumps(plain_row(row), sort_keys=True) for row in dataset]
    assert set(found) <= set(every)
    assert len(set(found)) == 61
    assert report.rows_read == 110
    # the order is mixed, and all of it depends on the seed alone
    assert dataset["from"][:] != sorted(dataset["from"])
    assert [plain_row(row) for row in load_rows(path)] == [plain_row(row) for row in dataset]
    other = Path(path)
    other.write_text(other.read_text().replace(f"seed: {seed}", f"seed: {seed + 1}"))
    assert dataset_fingerprint(load_rows(path)) != dataset_fingerprint(dataset)


def test_as_many_as_there_are_and_repeated_rows(tmp_path: Path) -> None:
    rows = {"a": pairs("a", 60), "b": pairs("b", 50)}
    assert Counter(load_rows(mixture(tmp_path, TWO, **rows))["from"]) == {"a": 60, "b": 25}
    with pytest.raises(DataError, match=r"69 rows .*a.jsonl, which holds 60\n.*ask for 85 rows"):
        load_rows(mixture(tmp_path, f"rows: 98\n{TWO}", **rows))
    again = f"rows: 200\n{TWO.replace('0.7}', '0.7, repeat: true}').replace('0.3', '0.2')}"
    dataset = load_rows(mixture(tmp_path, again, **rows))
    counts = Counter(row["prompt"] for row in dataset if row["from"] == "a")
    assert counts.total() == 156
    assert set(counts.values()) == {2, 3}  # each as often as another, up to one
    few = f"rows: 10\n{TWO.replace('0.3', '0.003')}"
    with pytest.raises(DataError, match=r"takes none of .*b.jsonl"):
        load_rows(mixture(tmp_path, few, **rows))


# ---------------------------------------------------------------- what is mixed


def test_layouts_are_read_each_by_its_own_rules(tmp_path: Path) -> None:
    chat = [
        {
            "context": [{"role": "user", "content": f"q{i}"}],
            "response1": "x",
            "response2": "y",
            "overall_preference": -1,
        }
        for i in range(4)
    ]
    renamed = [{"q": f"b {i}", "chosen": "c", "rejected": "d"} for i in range(4)]
    text = TWO.replace("0.3}", "0.7, columns: [q=prompt]}")
    dataset = load_rows(mixture(tmp_path, text, a=chat, b=renamed))
    assert len(dataset) == 8
    prompts = {row["prompt"][0]["content"] for row in dataset}
    assert prompts == {*(f"q{i}" for i in range(4)), *(f"b {i}" for i in range(4))}
    assert {type(row["chosen"]) for row in dataset} == {list}
    # text that has no prompt fits no conversation
    bare = [{"chosen": "c", "rejected": "d"}]
    with pytest.raises(DataError, match=r"do not fit together: .*b.jsonl.*mixed types"):
        load_rows(mixture(tmp_path, TWO.replace("0.3", "0.7"), a=chat[:1], b=bare))


def test_sources_that_do_not_fit(tmp_path: Path) -> None:
    text = TWO.replace("0.3", "0.7")
    margins = [row | {"margin": 1.0} for row in pairs("b", 3)]
    path = mixture(tmp_path, text, a=pairs("a", 3), b=margins)
    with pytest.raises(DataError, match=r"do not fit together: .*'margin'.*\n.*margins='none'"):
        load_rows(path)
    assert len(load_rows(path, margins="none")) == 6
    numbers = [row | {"from": 3} for row in pairs("b", 3)]
    with pytest.raises(DataError, match=r"do not fit together: .*'from': mixed types"):
        load_rows(mixture(tmp_path, text, a=pairs("a", 3), b=numbers))
    bad = [*pairs("b", 3), {"prompt": "x", "chosen": ""}]
    with pytest.raises(DataError, match=r"b.jsonl: 1 of 4 rows cannot be used"):
        load_rows(mixture(tmp_path, text, a=pairs("a", 3), b=bad))
    dataset, report = load_rows_with_report(tmp_path / "mix.yaml", on_error="skip")
    assert (len(dataset), report.bad, len(report.problems)) == (6, 1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: []", "no sources"),
        ("rows: 3", "'sources' is missing"),
        ("[1, 2]", "a list, not keys"),
        ("a: [", "no valid YAML"),
        pytest.param("[" * 1500, "no valid YAML", id="deep"),
        ("seed: true\nsources: [{dataset_name: a, weight: 1}]", "seed is True"),
        ("rows: 1.5\nsources: [{dataset_name: a, weight: 1}]", "rows is 1.5"),
        ("sources: [{dataset_name: a}]", "source 0: 'weight' is missing"),
        ("sources: [{dataset_name: a, weight: -1}]", "source 0: weight is -1"),
        ("sources: [{dataset_name: a, weight: .nan}]", "source 0: weight is nan"),
        ("sources: [{dataset_name: a, weight: .inf}]", "source 0: weight is inf"),
        ("sources: [{dataset_name: a, weigth: 1, weight: 1}]", "no key 'weigth'"),
        ("sources: [{dataset_name: 3, weight: 1}]", "dataset_name is 3"),
        ("sources: [{dataset_name: gone.jsonl, weight: 1}]", "missing file"),
    ],
)
def test_bad_mixtures_say_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert words in str(caught.value)
    assert caught.value.cure
    with pytest.raises(DataError, match="no such file"):
        read_mix(tmp_path / "other.yaml")


# ---------------------------------------------------------------- training and commands


def test_the_recipe_goes_with_the_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = mixture(tmp_path, TWO, a=pairs("a", 60), b=pairs("b", 50))
    sets, sources, notes = load_sets(DataArguments(dataset_mix=path), "pairs")
    assert sources == {"train": path, "held_out": path}
    for part in sets.values():
        recipe = recipe_of(part)
        assert recipe is not None
        assert (recipe["seed"], recipe["rows"]) == (3, 85)
        assert [one["taken"] for one in recipe["sources"]] == [60, 25]
        assert [one["held"] for one in recipe["sources"]] == [60, 50]
    assert any("taken of the 50 of" in note and "(25 rows)" in note for note in notes)
    whole = recipe["sources"][0]["sha256"]
    assert whole == dataset_fingerprint(pairs("a", 60))
    assert recipe_of(load_rows(tmp_path / "a.jsonl")) is None


def test_flags_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(CompanionError, match="--dataset_name and --dataset_mix are given"):
        DataArguments(dataset_name="a.jsonl", dataset_mix="mix.yaml")
    with pytest.raises(CompanionError, match="no YAML file"):
        DataArguments(dataset_mix="mix.jsonl")


def test_globs_and_several_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    write_rows(pairs("a", 3), "a.jsonl")
    write_rows(pairs("b", 4), "deep/a.jsonl")
    write_rows(pairs("c", 5), "c.parquet")
    for source, names in (
        ("*.jsonl", "aaa"),
        ("**/*.jsonl", "aaabbbb"),
        (["c.parquet", "a.jsonl"], "cccccaaa"),
        ([Path("deep/a.jsonl"), Path("a.jsonl")], "bbbbaaa"),
    ):
        assert "".join(load_rows(source)["from"]) == names
    with pytest.raises(DataError, match="missing file"):
        load_rows("no*.jsonl")
    assert main(["data", "check", "a.jsonl", "c.parquet"]) == 0
    assert "a.jsonl, c.parquet: 8 rows" in capsys.readouterr().out
    # files of one name are called by their paths
    with open("deep/a.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"deep/a.jsonl, line 5: malformed JSON"):
        load_rows(["a.jsonl", "deep/a.jsonl"])


def test_the_flag_takes_one_or_several() -> None:
    from companion.cli.train import parse

    common = ["--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "true"]
    assert parse([*common, "--dataset_name", "a.jsonl"])[0].dataset_name == "a.jsonl"
    several = parse([*common, "--dataset_name", "a.jsonl", "b.jsonl"])[0].dataset_name
    assert several == ["a.jsonl", "b.jsonl"]
    assert parse([*common, "--dataset_mix", "m.yaml"])[0].dataset_name == "m.yaml"
