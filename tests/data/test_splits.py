"""Splits by prompt: what must hold for any rows, and the wrong ways, caught."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import assume, given, settings, strategies as st

from companion.data import (
    dataset_fingerprint,
    duplicate_report,
    overlap_report,
    prompt_key,
    split_by_prompt,
)
from companion.errors import DataError

Row = dict[str, Any]


def row(prompt: str, i: int = 0) -> Row:
    return {"prompt": prompt, "chosen": f"good {i}", "rejected": f"bad {i}", "id": str(i)}


#: few different prompts, so that they repeat
PROMPTS = st.lists(st.integers(0, 12).map(lambda i: f"prompt {i}"), min_size=2, max_size=40)


def sides(rows: list[Row], **arguments: Any) -> dict[str, str]:
    """id -> side."""
    train, test = split_by_prompt(rows, **arguments)
    return {r["id"]: "train" for r in train} | {r["id"]: "test" for r in test}


def try_sides(rows: list[Row], **arguments: Any) -> dict[str, str]:
    try:
        return sides(rows, **arguments)
    except DataError:
        assume(False)
        raise


@given(prompts=PROMPTS, seed=st.integers(0, 1000), exact=st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_prompt_on_both_sides_and_no_row_lost(
    prompts: list[str], seed: int, exact: bool
) -> None:
    rows = [row(prompt, i) for i, prompt in enumerate(prompts)]
    side = try_sides(rows, test_fraction=0.4, seed=seed, exact=exact)
    assert len(side) == len(rows)
    for prompt in set(prompts):
        assert len({side[r["id"]] for r in rows if r["prompt"] == prompt}) == 1
    train, test = split_by_prompt(rows, 0.4, seed=seed, exact=exact)
    assert overlap_report(train, test).clean
    assert train == [r for r in rows if side[r["id"]] == "train"]  # in the source's order


@given(prompts=PROMPTS, extra=PROMPTS, seed=st.integers(0, 100), order=st.randoms())
@settings(max_examples=80, deadline=None)
def test_a_side_depends_on_the_prompt_alone(
    prompts: list[str], extra: list[str], seed: int, order: random.Random
) -> None:
    rows = [row(prompt, i) for i, prompt in enumerate(prompts)]
    before = try_sides(rows, test_fraction=0.4, seed=seed)
    more = rows + [row(prompt, 100 + i) for i, prompt in enumerate(extra)]
    order.shuffle(more)
    after = sides(more, test_fraction=0.4, seed=seed)
    assert {i: side for i, side in after.items() if i in before} == before


def test_a_larger_fraction_only_adds_to_the_test_part() -> None:
    rows = [row(f"p{i}", i) for i in range(300)]
    small, large = sides(rows, test_fraction=0.1), sides(rows, test_fraction=0.3)
    assert {i for i, s in small.items() if s == "test"} <= {
        i for i, s in large.items() if s == "test"
    }


def test_wrong_splits_are_caught() -> None:
    """By row, by position, and by Python's hash: what each of them does."""
    rows = [row(f"p{i % 100}", i) for i in range(400)]
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    report = overlap_report(shuffled[:360], shuffled[360:])  # by row
    assert not report.clean
    assert report.test_rows_affected == 40  # with 4 rows a prompt, nearly every test row leaks
    # scikit-learn's or datasets' train_test_split: by row as well
    parts = Dataset.from_list(rows).train_test_split(test_size=0.1, seed=0)
    assert overlap_report(parts["train"], parts["test"]).test_rows_affected > 30
    assert overlap_report(*split_by_prompt(rows, 0.1)).clean

    def by_position(some: list[Row]) -> set[str]:  # the first prompts seen go to train
        prompts = list(dict.fromkeys(r["prompt"] for r in some))
        return set(prompts[int(0.9 * len(prompts)) :])

    assert by_position(rows) != by_position(rows[::-1])
    # hash() of a string differs from one process to the next
    code = "print(sorted(i for i in range(50) if hash(f'p{i}') % 10 == 0))"
    ours = (
        "from companion.data.splits import split_by_prompt as s;"
        "print([r['prompt'] for r in s([{'prompt': f'p{i}'} for i in range(50)], 0.2)[1]])"
    )
    outputs = [
        [
            subprocess.run(
                [sys.executable, "-c", text],
                capture_output=True,
                check=True,
                env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            ).stdout
            for seed in ("1", "2")
        ]
        for text in (code, ours)
    ]
    assert outputs[0][0] != outputs[0][1]
    assert outputs[1][0] == outputs[1][1]


def test_the_sides_of_known_prompts_are_the_same_everywhere() -> None:
    """A release that moved prompts between the parts would leak every old test set."""
    rows = [row(f"p{i}", i) for i in range(40)]
    _, test = split_by_prompt(rows, 0.2, seed=0)
    assert [r["prompt"] for r in test] == KNOWN


KNOWN = ["p7", "p10", "p11", "p18", "p22", "p24", "p27", "p28", "p31", "p37"]


def test_shares() -> None:
    rows = [row(f"p{i}", i) for i in range(4000)]
    _, test = split_by_prompt(rows, 0.1, seed=3)
    assert 330 < len(test) < 470  # 400 ± 3.7 standard deviations
    _, test = split_by_prompt(rows, 0.1, seed=3, exact=True)
    assert len(test) == 400
    other = split_by_prompt(rows, 0.1, seed=4)[1]
    assert {r["id"] for r in other} != {r["id"] for r in split_by_prompt(rows, 0.1, seed=3)[1]}


def test_datasets_stay_datasets_and_keys_can_be_given() -> None:
    rows = [row(f"p{i}", i) | {"problem": i % 7} for i in range(60)]
    train, test = split_by_prompt(Dataset.from_list(rows), 0.3)
    assert isinstance(train, Dataset)
    assert len(train) + len(test) == 60
    train, test = split_by_prompt(rows, 0.3, key="problem")
    assert not {r["problem"] for r in train} & {r["problem"] for r in test}
    train, test = split_by_prompt(rows, 0.3, key=lambda r: str(r["problem"] % 2), exact=True)
    assert not {r["problem"] % 2 for r in train} & {r["problem"] % 2 for r in test}


def test_mistakes() -> None:
    rows = [row("only one", i) for i in range(10)]
    with pytest.raises(DataError, match="part is empty: 10 rows with 1 different prompts"):
        split_by_prompt(rows, 0.1)
    for fraction in (0, 1, -0.1, 10):
        with pytest.raises(DataError, match="test_fraction"):
            split_by_prompt(rows, fraction)
    with pytest.raises(DataError, match="field 'topic': missing"):
        split_by_prompt(rows, 0.5, key="topic")
    with pytest.raises(DataError, match="without a prompt"):
        prompt_key({"completion": "x"})


def test_prompt_keys() -> None:
    def said(text: str, role: str = "user") -> list[Row]:
        return [{"role": role, "content": text}]

    same = [
        "What is 2?",
        "what  is\n2? ",
        said("What is 2?"),
        [{**said("What is 2?")[0], "n": None}],
    ]
    assert len({prompt_key({"prompt": p}) for p in same}) == 1
    system = said("Be kind.", "system") + said("What is 2?")
    different = ["What is 2?", "What is 3?", system, said("What is 2?", "system")]
    different.append(said("What is") + said("2?"))
    assert len({prompt_key({"prompt": p}) for p in different}) == len(different)
    # no prompt: what both texts share, to the last line break
    a = {"chosen": "Q: sky?\nA: blue", "rejected": "Q: sky?\nA: black"}
    b = {"chosen": "Q: sky?\nA: blue, I think", "rejected": "Q: sky?\nA: green"}
    assert prompt_key(a) == prompt_key(b)


def test_duplicates() -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    turned = {"prompt": "P ", "chosen": "b", "rejected": "a"}
    other = {"prompt": "q", "chosen": "a", "rejected": "b"}
    report = duplicate_report([pair, pair, turned, other, {"chosen": "x y", "rejected": "x z"}])
    assert (report.rows, report.prompts, report.largest) == (5, 3, 3)
    assert (report.repeated_rows, report.contradictions, report.without_prompt) == (1, 1, 1)
    assert report.examples[0] == ("p", 3)
    assert "3 × p" in str(report)
    assert "1 pairs contradict" in str(report)
    assert report.as_dict()["rows"] == 5
    # the order of steps matters: the reversed list is another row, not a contradiction
    steps = {"prompt": "p", "completions": ["a", "b"], "labels": [1, 1]}
    report = duplicate_report([steps, steps | {"completions": ["b", "a"]}])
    assert (report.repeated_rows, report.contradictions) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_reports_count_what_plain_sets_count(seed: int) -> None:
    """Hashes and sorted arrays, against the texts themselves in the order of the rows."""
    rng = random.Random(seed)
    rows = [
        {"prompt": f"p{rng.randrange(60)}", "chosen": rng.choice("abc"), "rejected": "a"}
        | ({"rejected": "b"} if rng.random() < 0.5 else {})
        for _ in range(150)
    ]
    texts = [(r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    repeated = [t in texts[:i] for i, t in enumerate(texts)]
    turned = [(p, r, c) in texts[:i] for i, (p, c, r) in enumerate(texts)]
    report = duplicate_report(iter(rows))
    prompts = Counter(r["prompt"] for r in rows)
    assert report.repeated_rows == sum(repeated) > 0
    contradictions = sum(t and not r for t, r in zip(turned, repeated, strict=True))
    assert report.contradictions == contradictions > 0
    assert (report.prompts, report.examples) == (len(prompts), prompts.most_common(3))

    train, test = rows[:110], rows[110:]
    overlap = overlap_report(iter(train), iter(test))
    both = {r["prompt"] for r in train} & {r["prompt"] for r in test}
    bodies = {(r["prompt"], *sorted((r["chosen"], r["rejected"]))) for r in train}
    assert overlap.shared_prompts == len(both) > 0
    assert overlap.train_rows_affected == sum(r["prompt"] in both for r in train)
    assert overlap.test_rows_affected == sum(r["prompt"] in both for r in test)
    assert overlap.train_prompts == len({r["prompt"] for r in train})
    assert overlap.shared_rows == sum(
        (r["prompt"], *sorted((r["chosen"], r["rejected"]))) in bodies for r in test
    )


def test_overlap_across_forms() -> None:
    train = [row("What is 2?", 1), row("x", 2)]
    test = [
        {"prompt": [{"role": "user", "content": "What is  2?"}], "chosen": "bad 1"}
        | {"rejected": "good 1"},
        row("new", 3),
        row("x", 9),
    ]
    report = overlap_report(train, test)
    assert (report.shared_prompts, report.train_rows_affected, report.test_rows_affected) == (
        2,
        2,
        2,
    )
    assert report.shared_rows == 1  # the first, turned round
    assert "in both: What is 2?" in str(report)
    assert not report.clean


def test_fingerprints() -> None:
    rows = [row("p", 1) | {"margin": 1.0}, row("q", 2) | {"margin": 2.5}]
    mark = dataset_fingerprint(rows)
    assert mark == dataset_fingerprint(rows[::-1])
    assert mark == dataset_fingerprint(Dataset.from_list(rows))
    assert mark == dataset_fingerprint([dict(reversed(r.items())) | {"none": None} for r in rows])
    assert mark == dataset_fingerprint([r | {"margin": r["margin"] + 0} for r in rows])
    assert mark == dataset_fingerprint([rows[0] | {"margin": 1}, rows[1]])
    ordered = dataset_fingerprint(rows, ordered=True)
    assert ordered != dataset_fingerprint(rows[::-1], ordered=True)
    for changed in (
        [rows[0]],
        [rows[0], rows[0], rows[1]],
        [rows[0], rows[1] | {"margin": 2.25}],
        [rows[0], rows[1] | {"chosen": "good  2"}],
    ):
        assert mark != dataset_fingerprint(changed)
