"""Traffic without labels: what is large and no noise is said, and small weeks do not cry wolf."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from companion.errors import DataError
from companion.models import ReferenceStats
from companion.monitoring import (
    TrafficSummary,
    compare_traffic,
    merge_summaries,
    population_stability,
    read_traffic,
    summarise_traffic,
    traffic,
)

WORDS = [f"w{i}" for i in range(400)]


def week(
    rng: np.random.Generator,
    n: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    length: float = 5.0,
    cut: float = 0.0,
    unfinished: float = 0.0,
    warned: float = 0.0,
    repeated: float = 0.0,
    version: str = "v1",
) -> list[dict[str, Any]]:
    """`n` rows, each of its own prompt."""
    scores = rng.normal(mean, std, n)
    rows = []
    for i in range(n):
        words = rng.choice(WORDS, max(4, int(rng.lognormal(math.log(4 * length), 0.4)))).tolist()
        if rows and rng.random() < repeated:
            words = [*rows[-1]["completion"].split(), "so"]
        rows.append(
            {
                "prompt": f"prompt {i}",
                "completion": " ".join(words),
                "score": float(scores[i]),
                "cut_tokens": int(rng.random() < cut),
                "terminated": bool(rng.random() >= unfinished),
                "warnings": ["unlike the manifest's template: …"] if rng.random() < warned else [],
                "model_version": version,
                "time": f"2026-01-{1 + i % 7:02d}T12:00:00+00:00",
            }
        )
    return rows


@pytest.fixture
def rng() -> np.random.Generator:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def names(now: Any, before: Any, **more: Any) -> list[str]:
    return [one.name for one in compare_traffic(now, before, **more)]


# ---------------------------------------------------------------------- summaries


def test_a_summary_is_what_the_rows_hold() -> None:
    rows: list[Any] = [
        {"prompt": "p", "completion": "one two three four", "score": 1.0, "terminated": True},
        {"prompt": "p", "completion": "ONE two  three four", "score": 3.0, "terminated": False},
        {"prompt": "q", "completion": "nothing like it", "score": None, "cut_tokens": 3},
        {"prompt_id": "q", "completion": "five", "score": float("nan"), "cut_tokens": 0},
        {
            "prompt": "r",
            "chosen": "six",
            "rejected": "seven",
            "scores": {"chosen": 2, "rejected": 0},
        },
        {"no": "text"},
        DataError("log line 7: no valid JSON"),
        {"text": "whole", "warnings": ["a text without a prompt"], "time": 0},
        {
            "text": "w",
            "warnings": ["unfinished: …", "3 tokens of the prompt were cut"],
            "time": "x",
        },
    ]
    found = summarise_traffic(iter(rows))
    assert (found.texts, found.bad_rows, found.groups) == (8, 2, 5)
    assert found.bad == [
        "row 5: holds no completion, text, messages or input_ids",
        "log line 7: no valid JSON",
    ]
    assert found.scores is not None
    assert (found.scores.n, found.scores.mean) == (4, 1.5)
    assert found.shares == {
        "cut": [1, 2],
        "unfinished": [2, 3],
        "duplicates": [1, 8],
        "template_warnings": [1, 2],
        "not_scored": [2, 6],
    }
    assert found.begin == found.end == "1970-01-01T00:00:00+00:00"
    assert found.length_unit == "characters"
    assert TrafficSummary.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(DataError, match="no summary"):
        TrafficSummary.from_dict({"texts": 1})


def test_texts_are_not_kept(rng: np.random.Generator) -> None:
    assert "w1" not in json.dumps(summarise_traffic(week(rng, 50)).to_dict())


def test_near_duplicates_are_those_of_a_plain_loop(rng: np.random.Generator) -> None:
    texts = [rng.choice(WORDS[:30], rng.integers(0, 12)).tolist() for _ in range(40)]
    for _ in range(40):
        text = list(texts[rng.integers(len(texts))])
        for _ in range(rng.integers(0, 3)):
            text.insert(rng.integers(len(text) + 1), str(rng.choice(WORDS)))
        texts.append(text)

    def shingles(text: list[str]) -> set[tuple[str, ...]]:
        size = min(3, len(text))
        return {tuple(text[i : i + size]) for i in range(max(1, len(text) - size + 1))}

    sets = [shingles(text) for text in texts]
    repeats = {
        j
        for i, j in combinations(range(len(sets)), 2)
        if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])
    }
    assert 5 < len(repeats) < 60
    rows = [{"prompt": "p", "completion": " ".join(text)} for text in texts]
    assert summarise_traffic(rows).shares["duplicates"] == [len(repeats), len(texts)]


def test_a_long_prompt_in_common_is_no_repeat_and_the_same_ids_are() -> None:
    prompt = list(range(100))
    ids = [[*prompt, i, 7, 7 + i] for i in range(20)]
    unknown = summarise_traffic([{"input_ids": x, "raw": 0.0} for x in ids + ids[:5]])
    assert unknown.shares["duplicates"] == [5, 25]
    known = summarise_traffic([{"input_ids": x, "prompt_length": 100} for x in ids])
    assert known.shares["duplicates"] == [0, 20]
    assert (known.groups, unknown.groups) == (1, 25)


def test_the_share_of_repeats_does_not_grow_with_the_week(rng: np.random.Generator) -> None:
    """Texts from a small stock: among more of them, more repeat another."""
    stock = [" ".join(rng.choice(WORDS, 12)) for _ in range(1500)]
    shares = []
    for n in (500, 2500):
        rows = [{"prompt": str(i), "completion": rng.choice(stock)} for i in range(n)]
        k, of = summarise_traffic(rows).shares["duplicates"]
        assert of == n
        shares.append(k / of)
    assert abs(shares[0] - shares[1]) < 0.07
    assert shares[1] < 0.25  # of all 2,500 at once, 51% do


def test_several_weeks_are_one_summary(rng: np.random.Generator) -> None:
    weeks = [week(rng, n, mean=m, cut=0.1) for n, m in ((300, 0.0), (500, 1.0), (200, -1.0))]
    merged = merge_summaries([summarise_traffic(rows) for rows in weeks])
    whole = summarise_traffic([row for rows in weeks for row in rows])
    assert merged.scores is not None
    assert whole.scores is not None
    assert merged.scores.mean == pytest.approx(whole.scores.mean)
    assert merged.scores.std == pytest.approx(whole.scores.std)
    # within a hundredth of their rank: what a summary knows
    both = merged.scores.below(np.asarray(whole.scores.quantiles))
    np.testing.assert_allclose(both, np.linspace(0, 1, 101), atol=0.015)
    assert {n: merged.shares[n] for n in merged.shares if n != "duplicates"} == {
        n: whole.shares[n] for n in whole.shares if n != "duplicates"
    }
    assert (merged.begin, merged.end, merged.versions) == (whole.begin, whole.end, whole.versions)
    with pytest.raises(DataError, match="0 weeks"):
        merge_summaries([])


# ---------------------------------------------------------------------- comparison


def test_psi_by_hand() -> None:
    """Two bins, 50:50 before and 75:25 now, of 1,000 each, with the half counts."""
    before = traffic.Spread.of(np.linspace(0, 1, 1001)[:-1])
    now = traffic.Spread.of(np.concatenate([np.linspace(0, 0.49, 750), np.linspace(0.51, 1, 250)]))
    assert before is not None
    assert now is not None
    psi, bins = population_stability(now, before, bins=2)
    p, q = np.array([750.5, 250.5]) / 1001, np.array([0.5, 0.5])
    assert bins == 2
    assert psi == pytest.approx(((p - q) * np.log(p / q)).sum(), rel=0.02)
    assert population_stability(before, before) == (0.0, 10)
    constant = traffic.Spread.of(np.ones(100))
    assert constant is not None
    assert population_stability(constant, constant)[0] == 0.0
    assert population_stability(now, constant)[0] > 1
    stars = [
        traffic.Spread.of(rng.integers(1, 6, 1000)) for rng in map(np.random.default_rng, (1, 2))
    ]
    shifted = traffic.Spread.of(np.random.default_rng(3).integers(2, 7, 1000))
    assert stars[0] is not None
    assert stars[1] is not None
    assert shifted is not None
    assert population_stability(stars[0], stars[1])[0] < 0.05
    assert population_stability(stars[0], stars[1])[1] == 5
    assert population_stability(shifted, stars[1])[0] > 1


@pytest.mark.parametrize("wide", [1, 4, 40])
def test_whole_numbers_are_no_change(wide: int, rng: np.random.Generator) -> None:
    """Lengths are whole, and many texts have the same: that alone was taken for a change."""
    weeks = np.round(rng.normal(85, wide, (120, 300)))
    spreads = [traffic.Spread.of(week, step=1.0) for week in weeks]
    found = []
    for now, before in zip(spreads[::2], spreads[1::2], strict=True):
        assert now is not None
        assert before is not None
        found.append(population_stability(now, before)[0])
    assert np.mean(found) < 0.09  # 2/300 times the degrees of freedom, at most 9
    assert np.mean(np.array(found) > 0.186) < 0.05  # the bound at this size, alpha 0.001


def test_quiet_weeks_do_not_cry_wolf_whatever_their_size(rng: np.random.Generator) -> None:
    """False warnings of 450 weeks; the customary PSI > 0.1 alone fires in most small ones."""
    false = naive = looks = 0
    for n in (30, 100, 400):
        for _ in range(15):
            baseline = _scores(rng, n * 4)
            for _ in range(10):
                now = _scores(rng, n)
                looks += 1
                false += bool(compare_traffic(now, baseline))
                assert now.scores is not None
                assert baseline.scores is not None
                naive += population_stability(now.scores, baseline.scores)[0] > 0.1
    assert false <= 5, f"{false} of {looks}"  # expected at most 0.45; 6 or more: 1 in 10^5
    assert naive > 0.2 * looks


def test_completions_of_one_prompt_count_once(rng: np.random.Generator) -> None:
    """With 8 correlated completions a prompt; counting texts fires."""
    false = by_texts = 0
    for _ in range(60):
        before, now = (_scores(rng, 240, per_prompt=8) for _ in "ab")
        assert now.groups == 30
        false += "scores" in names(now, before)
        for one in (now, before):
            one.groups = one.texts
        by_texts += "scores" in names(now, before)
    assert false <= 3
    assert by_texts > 8  # of 2,000 it was 40%, and none by prompts


def _scores(
    rng: np.random.Generator, n: int, mean: float = 0.0, per_prompt: int = 1
) -> TrafficSummary:
    """A summary of scores alone; those of one prompt are correlated by 0.9."""
    own = rng.normal(size=n)
    if per_prompt > 1:
        prompts = np.repeat(rng.normal(size=n // per_prompt), per_prompt)
        own = math.sqrt(0.9) * prompts + math.sqrt(0.1) * own
    scores = traffic.Spread.of(mean + own)
    return TrafficSummary(texts=n, groups=n // per_prompt, scores=scores)


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({"mean": 1.0}, "scores", "standard deviations"),
        ({"std": 2.0}, "scores", "PSI"),
        ({"length": 12.0}, "lengths", "characters"),
        ({"cut": 0.3}, "cut", "prompt was cut"),
        ({"unfinished": 0.3}, "unfinished", "cut off"),
        ({"repeated": 0.5}, "duplicates", "repeat"),
        ({"warned": 0.2}, "template_warnings", "template"),
    ],
)
def test_a_change_is_told_and_nothing_else(change: dict[str, Any], name: str, says: str) -> None:
    rng = np.random.default_rng(2)  # fixed: of a thousand quiet comparisons one may warn
    usual = {"cut": 0.05, "unfinished": 0.05, "repeated": 0.1}
    before = summarise_traffic(week(np.random.default_rng(1), 800, **usual))
    now = summarise_traffic(week(rng, 400, **{**usual, **change}))
    said = compare_traffic(now, before)
    assert name in {one.name for one in said}
    # (a repeat carries a word more, and the length of what it repeats)
    assert {one.name for one in said} <= {name, "lengths"}
    (own,) = (one for one in said if one.name == name)
    assert says in own.what
    assert own.size > own.bound
    json.dumps(own.to_dict(), allow_nan=False)


def test_small_changes_of_large_weeks_are_no_news(rng: np.random.Generator) -> None:
    before = _scores(rng, 100_000)
    assert names(_scores(rng, 100_000, mean=0.1), before) == []
    assert names(_scores(rng, 100_000, mean=0.4), before) == ["scores"]


def test_scores_of_another_model_are_not_compared(rng: np.random.Generator) -> None:
    before = summarise_traffic(week(rng, 200))
    other = summarise_traffic(week(rng, 200, mean=5.0, version="v2"))
    assert names(other, before) == ["model_version"]
    mixed = summarise_traffic(week(rng, 100) + week(rng, 100, mean=5.0, version="v2"))
    assert names(mixed, before) == ["model_version"]
    assert names(TrafficSummary(), before) == ["no_traffic"]


def test_against_the_reference() -> None:
    rng = np.random.default_rng(1)  # by chance alone one draw in a hundred is warned of
    reference = ReferenceStats.from_scores(rng.normal(size=2000), "held-out pairs")
    quiet = _scores(rng, 1000)
    assert names(quiet, None, reference=reference) == []
    moved = _scores(rng, 1000, mean=2.0)
    said = compare_traffic(moved, None, reference)
    assert [one.name for one in said] == ["scores", "outside"]
    assert "+2." in said[0].what or "+1.9" in said[0].what
    # what was so from the first week on is said by 'outside' alone
    assert names(moved, _scores(rng, 4000, mean=2.0), reference=reference) == ["outside"]
    few = _scores(rng, 8, mean=0.3)
    assert names(few, None, reference=reference) == []
    with pytest.raises(DataError, match="alpha"):
        compare_traffic(quiet, None, alpha=1.5)


# ---------------------------------------------------------------------- files


def test_rows_of_files(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "p", "completion": "c", "score": 1.0})
    (tmp_path / "requests-1.jsonl").write_text(f"{good}\n\n[1]\n{good[:20]}", encoding="utf-8")
    (tmp_path / "requests-2.jsonl").write_text(good + "\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    found = summarise_traffic(read_traffic(tmp_path))
    assert (found.texts, found.bad_rows) == (2, 2)
    assert found.bad == [
        "requests-1.jsonl line 3: no object",
        "requests-1.jsonl line 4: no valid JSON",
    ]
    assert summarise_traffic(read_traffic(tmp_path / "requests-2.jsonl")).texts == 1
    for wrong in (tmp_path / "none.jsonl", tmp_path / "sub"):
        with pytest.raises(DataError, match="no JSONL"):
            read_traffic(wrong)


@pytest.mark.serving
@pytest.mark.parametrize("text", [False, True])
def test_the_log_of_a_server_is_read(
    text: bool, tiny_reward: Path, tmp_path: Path, client: Callable[[str], Any]
) -> None:
    from companion.serving import running

    rows = [{"prompt": "Ana buys 3 pens .", "completion": f"Ben has {i} books ."} for i in range(6)]
    rows[0] |= {"terminated": False}  # type: ignore[dict-item]
    bare = [11, 12, 13, 14]
    settings: dict[str, Any] = {"log_dir": tmp_path, "log_text": text}
    with (
        running(tiny_reward, allow_unchecked=True, **settings) as server,
        client(server.url) as http,
    ):
        answer = http.post("/v1/rewards", json={"items": rows}).json()
        assert http.post("/v1/rewards", json={"items": [{"input_ids": bare}]}).status_code == 200
        assert http.post("/classify", json={"input": [bare]}).status_code == 200
    found = summarise_traffic(read_traffic(tmp_path))
    assert (found.texts, found.bad_rows) == (8, 0)
    assert found.versions == {answer["model_version"]: 8}
    assert found.shares["cut"] == [0, 6]
    assert found.shares["unfinished"] == [1, 6]
    assert found.shares["not_scored"] == [0, 8]
    assert found.shares["duplicates"] == [1, 8]
    assert found.prompts_known == 6
    assert found.groups == 3  # one prompt, and two requests
    assert found.length_unit == "tokens"
    without = summarise_traffic(read_traffic(tmp_path), golden=[bare, [1, 2]])
    assert (without.texts, without.golden) == (6, 2)
