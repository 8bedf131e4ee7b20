"""What a set of good rows hides, against plain loops over all of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.cli.main import main
from companion.data import load_rows, write_rows
from companion.data.checking import CURES, check_rows, check_tokens
from companion.functional import accuracy_ceiling, annotator_agreement
from companion.functional.similarity import ALIKE, jaccard, likely_pairs, shingles, sketch

Pair = dict[str, Any]


@pytest.fixture(params=range(3))
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    print(f"seed {request.param}")
    return np.random.default_rng(request.param)


def pair(prompt: str, better: str, worse: str, **rest: Any) -> Pair:
    return {"prompt": prompt, "chosen": better, "rejected": worse, **rest}


# ---------------------------------------------------------------------- circles


def in_circles(rows: list[Pair]) -> set[int]:
    """Rows that say what most say, and that a way of such rows leads back from: by search."""
    says = Counter((row["prompt"], row["chosen"], row["rejected"]) for row in rows)
    after: dict[tuple[str, str], set[str]] = {}
    for (prompt, a, b), n in says.items():
        if n > says[prompt, b, a]:
            after.setdefault((prompt, a), set()).add(b)

    def reaches(prompt: str, a: str, b: str) -> bool:
        seen, todo = {a}, [a]
        while todo:
            new = after.get((prompt, todo.pop()), set()) - seen
            seen |= new
            todo += new
        return b in seen

    return {
        i
        for i, row in enumerate(rows)
        if row["rejected"] in after.get((row["prompt"], row["chosen"]), ())
        and reaches(row["prompt"], row["rejected"], row["chosen"])
    }


def test_circles_are_those_of_a_plain_search(rng: np.random.Generator) -> None:
    rows = []
    for _ in range(120):
        a, b = sorted(rng.choice(5, 2, replace=False))[:: rng.choice([1, -1], p=[0.7, 0.3])]
        rows.append(pair(f"p{rng.integers(6)}", f"text {a}", f"text {b}"))
    want = in_circles(rows)
    assert 0 < len(want) < len(rows)
    finding = check_rows(rows).find("cyclic-preferences")
    assert finding is not None
    assert finding.rows == len(want)
    # the example is a circle: each row's worse text is the next one's better
    said = finding.examples[0].split("the rows ")[1].split(" (from 0)")[0]
    places = [int(place) for place in said.split(", ")]
    assert len(places) > 2
    assert set(places) <= want
    for one, other in zip(places, places[1:] + places[:1], strict=True):
        assert rows[one]["rejected"] == rows[other]["chosen"]
        assert rows[one]["prompt"] == rows[other]["prompt"]


def test_people_who_disagree_make_no_circle() -> None:
    both = [pair("p", "a", "b"), pair("p", "b", "a")]
    order = [pair("p", x, y) for x, y in itertools.combinations("abcd", 2)]
    elsewhere = [pair("p", "a", "b"), pair("p", "b", "c"), pair("q", "c", "a")]
    outvoted = [*order, pair("p", "a", "d"), pair("p", "d", "a")]
    for rows in (both, order, elsewhere, outvoted):
        assert check_rows(rows).find("cyclic-preferences") is None
    finding = check_rows([*order, *[pair("p", "d", "a")] * 2]).find("cyclic-preferences")
    assert finding is not None
    assert finding.rows == 7  # all but a over d, which is outvoted, lie on a way from a to d
    assert "of 1 prompts" in finding.seen


# ---------------------------------------------------------------------- labels


def test_both_labels_of_a_pair_are_counted_once() -> None:
    rows = [pair("p", "a", "b"), pair("P ", "B", "a"), pair("p", "a", "b"), pair("q", "b", "a")]
    finding = check_rows(rows).find("contradicting-labels")
    assert finding is not None
    assert finding.rows == 3
    assert finding.seen.startswith("1 of 2 different pairs")
    assert check_rows([rows[0], rows[3]]).find("contradicting-labels") is None
    outcomes = [
        {"prompt": "p", "completion": text, "label": label}
        for text, label in (("a", True), ("a", False), ("a", True), ("b", True), ("b", True))
    ]
    finding = check_rows(outcomes).find("contradicting-labels")
    assert finding is not None
    assert finding.rows == 3


def test_the_ceiling_is_that_of_the_votes(rng: np.random.Generator) -> None:
    codes = rng.choice([-1, 0, 1], p=[0.3, 0.5, 0.2], size=(40, 3))
    rows = []
    for i, item in enumerate(codes):
        for person, code in enumerate(item):
            sides = [f"a{i}", f"b{i}"]
            if code >= 0:
                better, worse = sides[:: 1 - 2 * code]
                rows.append(pair(f"p{i // 2}", better, worse, annotator=f"person {person}"))
    want = annotator_agreement(codes, [i // 2 for i in range(40)])
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    got = check_rows(shuffled).agreement
    assert got is not None
    assert got["annotators"] == "annotator"
    assert got["n_decided"] == want["n_decided"]
    assert got["agreement_decided"] == pytest.approx(want["agreement_decided"])
    assert got["ceiling"] == pytest.approx(accuracy_ceiling(want["agreement_decided"]))
    # an annotator who says it twice has one voice
    again = check_rows([*shuffled, *shuffled]).agreement
    assert again is not None
    assert again["agreement_decided"] == pytest.approx(want["agreement_decided"])
    # without names, repeats that all agree are copies, and say nothing of people
    assert check_rows([pair("p", "a", "b")] * 4).agreement is None


def test_equal_sides_and_the_imbalance_of_length() -> None:
    rows = [pair("p", "Yes.", " yes. "), *(pair(f"p{i}", "a longer text", "short") for i in (1, 2))]
    rows += [pair("q", "short", "a longer text"), pair("q", "equal", "EQUAM")]
    report = check_rows(rows)
    finding = report.find("equal-sides")
    assert finding is not None
    assert finding.rows == 1
    assert finding.examples == ["row 0 (from 0): p"]
    assert report.length is not None
    assert report.length["n"] == 4
    assert report.length["longer_wins"] == 0.5
    low, high = report.length["interval"]
    assert 0 <= low < 0.5 < high <= 1
    # one who is always longer leaves room for another
    report = check_rows([pair(f"p{i}", "a longer text", "short") for i in range(20)])
    assert report.length is not None
    low, high = report.length["interval"]
    assert low < report.length["longer_wins"] == high == 1


# ---------------------------------------------------------------------- near-duplicates


def texts(rng: np.random.Generator, n: int) -> list[str]:
    """Of three families of words; some are an earlier one with a few words changed."""
    made: list[str] = []
    for _ in range(n):
        if made and rng.random() < 0.5:
            words = made[rng.integers(len(made))].split()
            for _ in range(rng.integers(0, 3)):
                words[rng.integers(len(words))] = f"w{rng.integers(400)}"
        else:
            words = [f"w{i}" for i in rng.integers(400, size=rng.integers(20, 60))]
        made.append(" ".join(words))
    return made


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def similar(a: str, b: str) -> bool:
    both = triples(a), triples(b)
    return len(both[0] & both[1]) / len(both[0] | both[1]) >= ALIKE


def test_near_duplicates_are_those_of_a_plain_loop(rng: np.random.Generator) -> None:
    prompts = list(dict.fromkeys(texts(rng, 150)))
    want = [
        i for i, text in enumerate(prompts) if any(similar(text, other) for other in prompts[:i])
    ]
    assert 10 < len(want) < len(prompts)
    rows = [pair(text, "a", "b") for text in prompts]
    finding = check_rows([*rows, *rows]).find("near-duplicate-prompts")
    assert finding is not None
    assert finding.rows == len(want)
    # a system message that is in front of all is no likeness
    system = {"role": "system", "content": "You are a careful assistant. " * 30}
    rows = [
        pair([system, {"role": "user", "content": f"question {i} of {i * 7}?"}], "a", "b")  # type: ignore[arg-type]
        for i in range(30)
    ]
    assert check_rows(rows).find("near-duplicate-prompts") is None


def test_leakage_is_that_of_a_plain_loop(rng: np.random.Generator) -> None:
    prompts = list(dict.fromkeys(texts(rng, 160)))
    train, test = prompts[:100], [*prompts[100:], *(text.upper() for text in prompts[:5])]
    known = set(train)
    near = [
        text
        for text in test
        if text.lower() not in known and any(similar(text, other) for other in train)
    ]
    assert near
    report = check_rows(
        [pair(text, "a", "b") for text in train], against=[{"prompt": text} for text in test]
    )
    finding = report.find("leakage")
    assert finding is not None
    assert report.overlap is not None
    assert report.overlap.shared_prompts == 5
    assert finding.rows == 5 + len(near)
    apart = check_rows([pair("one", "a", "b")], against=[{"prompt": "two"}])
    assert apart.findings == []


def test_a_sketch_finds_the_likely_and_few_others(rng: np.random.Generator) -> None:
    """Sets of a known similarity, the share that is found against the formula of its bands."""
    for similarity in (0.8, 0.5, 0.1):
        shared = round(200 * similarity)
        found = []
        for _ in range(150):
            both = rng.integers(2**63, size=shared, dtype=np.uint64)
            ends = rng.integers(2**63, size=(2, (200 - shared) // 2), dtype=np.uint64)
            a, b = (np.unique(np.concatenate([both, end])) for end in ends)
            assert jaccard(a, b) == pytest.approx(similarity)
            found.append(len(likely_pairs(sketch(a)[None], sketch(b)[None])) > 0)
        want = 1 - (1 - similarity**4) ** 16
        assert np.mean(found) == pytest.approx(want, abs=0.15), similarity


def test_texts_of_one_pattern_are_no_square_of_comparisons() -> None:
    one = sketch(shingles(range(50)))
    pairs = likely_pairs(np.tile(one, (500, 1)), np.tile(one, (500, 1)))
    assert len(pairs) <= 2 * 500
    short = [shingles(words) for words in ([], [1], [1, 2], [2, 1], [1, 2, 3])]
    assert [len(own) for own in short] == [1] * 5
    assert len({int(own[0]) for own in short}) == 5


def test_rows_without_a_prompt_have_none_that_repeats() -> None:
    rows = [
        {"chosen": f"Question {i}?\nlong answer", "rejected": f"Question {i}?\nno"}
        for i in range(4)
    ]
    report = check_rows(rows, against=rows[2:])
    assert [finding.name for finding in report.findings] == ["leakage"]
    assert report.duplicates.without_prompt == 4
    assert check_rows([*rows, *rows]).duplicates.repeated_rows == 4
    assert check_rows(rows[:1], against=[{"prompt": "another"}]).findings == []


# ---------------------------------------------------------------------- memory, torch


class Written:
    """Rows that are made when they are looked at, as those of a file are."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, i: int) -> Pair:
        return {"prompt": f"prompt {i}" + 8_000 * "x", "completion": 8_000 * "y", "label": i > 9}

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def select(self) -> None: ...


def test_no_texts_are_kept() -> None:
    rows = Written()
    check_rows([rows[0], rows[1]])  # imports
    tracemalloc.start()
    try:
        check_rows(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(rows) * 16_000 / 4


def test_check_needs_no_torch(tmp_path: Path) -> None:
    rows = [pair(f"p{i % 7}", f"long answer {i}", f"no {i}") for i in range(40)]
    write_rows(rows, tmp_path / "x.jsonl")
    program = (
        "import sys; from companion.cli.main import main\n"
        "code = main(['data', 'check', 'x.jsonl', '--against', 'x.jsonl', '--json'])\n"
        "heavy = {'torch', 'transformers', 'trl'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [finding["name"] for finding in found["findings"]] == ["leakage"]
    assert found["findings"][0]["cure"] == CURES["leakage"]
    assert found["overlap"]["shared_prompts"] == 7
    assert found["against"]["rows_kept"] == 40
    assert (found["load"]["rows_read"], found["duplicates"]["prompts"]) == (40, 7)
    assert found["length"]["longer_wins"] == 1


# ---------------------------------------------------------------------- a tokenizer


def test_what_a_tokenizer_does_to_rows(make_tokenizer: Callable[..., Any]) -> None:
    from companion.formatting import RewardFormatter

    formatter = RewardFormatter(make_tokenizer(), text="chat")
    long = " ".join(["yes"] * 30)
    rows = [
        pair("Ana has 3 boxes", "yes", "no"),
        pair("Ana has 3 boxes", "yes", "no " + long),  # one side is too long
        pair(long, "yes good", "yes bad"),  # the prompt alone is, nearly
        pair("hello", "quorvexa", "zelmitro"),  # words that it does not know
        pair("hello", "yes <|end|> no", "no"),
        pair("hello <|tool|> yes", "yes", "no"),
    ]
    report = check_tokens(rows, formatter, check_rows(rows), max_length=33)
    got = {finding.name: finding.rows for finding in report.findings}
    encoded = [formatter.encode_pair(row) for row in rows]
    ids = [[side.input_ids for side in sides] for sides in encoded if sides is not None]
    assert len(ids) == len(rows)
    unknown = formatter.tokenizer.unk_token_id
    want = {
        "rows-too-long": sum(max(map(len, sides)) > 33 for sides in ids),
        "equal-sides-after-cut": sum(a != b and a[:33] == b[:33] for a, b in ids),
        "equal-sides-as-tokens": sum(a == b for a, b in ids),
        "unknown-tokens-in-rows": sum(any(unknown in own for own in sides) for sides in ids),
        "special-tokens-in-rows": 3,  # of texts: one completion, and one prompt on two sides
    }
    assert got == {name: n for name, n in want.items() if n}
    assert {"rows-too-long", "equal-sides-after-cut", "equal-sides-as-tokens"} <= got.keys()
    assert report.tokens is not None
    assert report.tokens["max"] == max(len(own) for sides in ids for own in sides)
    assert report.tokens["n"] == 12


def test_the_template_that_drops_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_tokenizer: Callable[..., Any]
) -> None:
    def talk(*turns: str) -> list[dict[str, str]]:
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [
        pair(talk("hello"), answer("yes"), answer("no")),  # type: ignore[arg-type]
        pair(talk("hello", "good", "bad"), answer("yes"), answer("no")),  # type: ignore[arg-type]
    ]
    whole = make_tokenizer().chat_template
    last = "{%- for message in messages[-2:] %}"
    template = whole.replace("{%- for message in messages %}", last)
    make_tokenizer(chat_template=template).save_pretrained(tmp_path / "drops")
    refuses = whole.replace("message['content']", "message['content'] | replace('no', '')")
    make_tokenizer(chat_template=refuses).save_pretrained(tmp_path / "refuses")
    path = tmp_path / "x.jsonl"
    write_rows(rows, path)
    command = ["data", "check", str(path), "--json", "--tokenizer"]
    assert main([*command, str(tmp_path / "drops")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(f["name"], f["rows"]) for f in found["findings"]] == [("rows-changed-by-template", 2)]
    # a row that cannot be scored as it is cannot be used
    assert main([*command, str(tmp_path / "refuses")]) == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [f["name"] for f in found["findings"]] == ["rows-refused-by-template"]
    assert found["findings"][0]["rows"] == 2
    assert "2 bad rows" in captured.err
    assert CURES["rows-refused-by-template"] in captured.err


def test_findings_are_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair("p", "a", "bb"), pair("p", "bb", "ccc"), pair("p", "ccc", "a")]
    path = tmp_path / "x.jsonl"
    write_rows(rows, path)
    assert main(["data", "check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "warning: cyclic-preferences: 3 of 3 pairs" in out
    assert CURES["cyclic-preferences"] in out
    assert out.splitlines()[-1].startswith("all rows are good; sha256 ")
    assert main(["data", "check", str(path), "--max_length", "5"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main(["data", "check", str(path), "--against", str(tmp_path / "none.jsonl")]) == 2


def test_each_kind_is_checked() -> None:
    from companion.tutor import KINDS, make_rows

    for kind in KINDS:
        if kind == "canaries":
            continue
        rows = make_rows(kind, 30, 0)
        report = check_rows(load_rows(rows, kind=kind))
        assert (report.length is not None) == (kind == "pairs"), kind
        assert str(report).startswith("30 rows")
