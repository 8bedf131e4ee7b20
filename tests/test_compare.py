"""Two models on the same rows: what moves, what must not, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from companion.cli.main import main
from companion.errors import DataError, ModelError
from companion.evaluation import compare_scorers
from companion.models import (
    ReferenceStats,
    RewardManifest,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.scoring import RewardScorer, add_golden_texts

WORDS = [
    "Ana",
    "Ben",
    "has",
    "buys",
    "boxes",
    "pens",
    "each",
    "and",
    "with",
    "how",
    "many",
    "now",
    "yes",
    "no",
    "good",
    "bad",
    "right",
]


def texts(n: int, seed: int) -> list[dict[str, Any]]:
    """Rows of prompt and completion; no two alike, several of a prompt."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = draw.choice(WORDS, int(draw.integers(2, 9)))
        rows.append({"prompt": f"how many {i // 3 % 21}", "completion": " ".join(words)})
    return rows


def pairs(n: int, seed: int) -> list[dict[str, Any]]:
    sides = texts(2 * n, seed)
    zipped = zip(sides[::2], sides[1::2], strict=True)
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in zipped
    ]


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model(seed, scale, shift…)``: a folder of a tiny model; made once, not to be changed."""
    made: dict[Any, Path] = {}

    def get(seed: int, **manifest: Any) -> Path:
        key = (seed, *sorted(manifest))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            base = load_base(tiny_base, max_length=96, text="chat")
            random = torch.Generator().manual_seed(seed)
            torch.nn.init.normal_(base.model.score.weight, std=0.3, generator=random)
            save_reward_model(
                base, made[key], RewardManifest(**manifest), describe=add_golden_texts
            )
            if "reference" not in manifest:
                with_reference(made[key], texts(301, seed=9))
        return made[key]

    return get


def with_reference(folder: Path, rows: list[dict[str, Any]]) -> None:
    manifest = RewardManifest.load(folder)
    raw = RewardScorer.from_pretrained(folder).score(rows).raw
    manifest.reference = ReferenceStats.from_scores(raw, "the fixture's texts")
    manifest.save(folder)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Affine(RewardScorer):
    """A model whose scores are ``scale × score + shift`` of another's: the same opinion."""

    scale, shift = 2.0, 1.0

    def _values(self, *args: Any) -> Any:
        return [self.scale * value + self.shift for value in super()._values(*args)]


def affine(folder: Path, scale: float, shift: float) -> Affine:
    """A scorer with a reference on the fixture's texts, and no golden texts, which would move."""
    scorer = Affine(load_reward_model(folder, device="cpu"))
    scorer.scale, scorer.shift = scale, shift
    assert scorer.manifest is not None
    scorer.manifest.golden_texts = None
    scorer.manifest.reference = ReferenceStats.from_scores(
        scorer.score(texts(301, seed=9)).raw, "the fixture's texts"
    )
    return scorer


def test_a_model_beside_itself(model: Callable[..., Path]):
    scorers = [RewardScorer.from_pretrained(model(1, temperature=1.5)) for _ in range(2)]
    result = compare_scorers(*scorers, pairs(120, seed=3))
    figures = result.metrics
    assert figures["correlation"] == {"spearman": pytest.approx(1), "kendall": pytest.approx(1)}
    for name in ("own", "new_remade", "both_remade"):
        flips = figures["accepted"][name]["flipped"]
        if name != "new_remade":  # (OLD keeps a reference of other texts there)
            assert flips["share"] == flips["taken_in"] == flips["left_out"] == 0
    for name in ("accuracy", "log_loss"):
        assert figures["pairs"][name]["difference"] == 0
        assert figures["pairs"][name]["interval"] == [0, 0]
    assert figures["pairs"]["agreement"]["share"] == 1
    assert figures["percentile"]["mean_move"] == 0
    assert any("same version" in note for note in result.notes)
    assert result.info["differs"] == []
    assert len(result) == 120
    assert "–" not in result.table().replace("NEW − OLD", "").replace("──", "")


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 1.0), (0.01, -30.0)])
def test_an_affine_copy_has_the_same_opinion(
    model: Callable[..., Path], scale: float, shift: float
):
    """Ranks, z, percentiles and decisions are OLD's; raw scores and raw thresholds are not."""
    old = RewardScorer.from_pretrained(model(1, temperature=1.5))
    new = affine(model(1, temperature=1.5), scale, shift)
    rows = texts(400, seed=5)
    wrong = []
    for percentile in (10, 50, 83):
        result = compare_scorers(old, new, rows, percentile=percentile)
        figures = result.metrics
        assert figures["correlation"]["spearman"] == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(result.new, scale * result.old + shift, rtol=1e-6)
        for name in ("own", "both_remade"):
            assert figures["accepted"][name]["flipped"]["share"] == 0
        assert figures["z"]["new"] == pytest.approx(figures["z"]["old"], abs=1e-5)
        same_raw = figures["accepted"]["raw"]  # OLD's raw threshold, held against NEW's scores
        wrong.append(abs(same_raw["new"]["share"] - same_raw["old"]["share"]))
    assert max(wrong) > 0.1
    assert any("no golden texts" in note for note in result.notes)


def test_the_figures_by_hand(model: Callable[..., Path]):
    """With the temperature of each, and a bootstrap over prompts, not pairs."""
    old, new = (RewardScorer.from_pretrained(model(s, temperature=t)) for s, t in ((1, 1), (2, 3)))
    assert old.manifest is not None
    assert new.manifest is not None
    old.manifest.temperature, new.manifest.temperature = 0.7, 2.5
    rows = pairs(90, seed=4)
    result = compare_scorers(old, new, rows, percentile=60)
    a, b = (s.score_pairs(rows) for s in (old, new))
    both = [np.concatenate([s.chosen, s.rejected]) for s in (a, b)]
    figures = result.metrics
    assert figures["correlation"]["kendall"] == pytest.approx(stats.kendalltau(*both).statistic)
    assert figures["correlation"]["spearman"] == pytest.approx(stats.spearmanr(*both).statistic)
    found = figures["pairs"]
    ma, mb = a.chosen - a.rejected, b.chosen - b.rejected
    assert found["accuracy"]["difference"] == pytest.approx((mb > 0).mean() - (ma > 0).mean())
    for side, margin, warm in (("old", ma, 0.7), ("new", mb, 2.5)):
        loss = -np.log(1 / (1 + np.exp(-margin / warm)))
        assert found["log_loss"][side]["mean"] == pytest.approx(loss.mean())
    assert found["agreement"]["share"] == pytest.approx((np.sign(ma) == np.sign(mb)).mean())
    above = [s.reference.percentile(v) > 60 for s, v in zip((old, new), both, strict=True)]
    own = figures["accepted"]["own"]
    assert own["old"]["share"] == pytest.approx(above[0].mean())
    assert own["new"]["share"] == pytest.approx(above[1].mean())
    assert own["flipped"]["share"] == pytest.approx((above[0] != above[1]).mean())
    assert own["flipped"]["taken_in"] == pytest.approx((above[1] & ~above[0]).mean())
    assert figures["n_prompts"] == len({row["prompt"] for row in rows}) < len(rows)
    # pairs of one prompt stand or fall together: a copy of each row tells nothing new
    twice = compare_scorers(old, new, rows * 4, percentile=60).metrics["pairs"]["accuracy"]
    np.testing.assert_allclose(twice["interval"], found["accuracy"]["interval"], atol=0.02)
    assert "weights" in result.info["differs"]


def test_what_is_missing_is_said(model: Callable[..., Path]):
    old, new = (RewardScorer.from_pretrained(model(seed)) for seed in (1, 2))
    assert new.manifest is not None
    new.manifest.reference = None
    rows = [*pairs(40, seed=1), {"prompt": "no", "chosen": "yes " * 200, "rejected": "no"}]
    result = compare_scorers(old, new, rows)
    figures = result.metrics
    assert figures["accepted"]["own"]["new"] is figures["accepted"]["own"]["flipped"] is None
    assert figures["accepted"]["both_remade"]["flipped"] is not None
    assert figures["pairs"]["log_loss"]["difference"] is None
    assert figures["dropped"]["total"] == 1
    assert figures["n_texts"] == 80
    said = " ".join(result.notes)
    for words in ("NEW has no reference", "OLD has no temperature", "NEW has no temperature"):
        assert words in said
    assert "OLD has no reference" not in said
    result.table()
    json.dumps(result.to_dict(), allow_nan=False)


def test_scores_of_one_value(model: Callable[..., Path]):
    """Nothing to rank: no correlation, no warning, and no division by zero."""
    old, new = RewardScorer.from_pretrained(model(1)), affine(model(1), 0.0, 3.0)
    figures = compare_scorers(old, new, texts(30, seed=2)).metrics
    assert figures["correlation"] == {"spearman": None, "kendall": None}
    assert figures["z"]["new"] == {"mean": 0.0, "sd": 0.0}


def test_what_is_refused(model: Callable[..., Path], tmp_path: Path):
    old, new = (RewardScorer.from_pretrained(model(seed)) for seed in (1, 2))
    for rows, percentile, words in (
        ([], 50, "no rows"),
        (texts(3, 0), 100, "percentile is 100"),
        ([*pairs(2, 0), *texts(1, 0)], 50, "row 2: no pair"),
        ([*texts(2, 0), *pairs(1, 0)], 50, "row 2: a pair"),
        ([{"prompt": "no"}], 50, "row 0"),
        (texts(1, 0), 50, "1 of 1 texts"),
    ):
        with pytest.raises(DataError, match=words):
            compare_scorers(old, new, rows, percentile=percentile)
    # a model that is not what it was: another head
    moved = tmp_path / "moved"
    shutil.copytree(model(1), moved)
    scorer = RewardScorer.from_pretrained(moved)
    with torch.no_grad():
        scorer.reward_model.model.score.weight.mul_(1.5)
    with pytest.raises(ModelError, match=r"NEW is not as it was saved.*weights"):
        compare_scorers(old, scorer, texts(5, 0))


# ---------------------------------------------------------------------- the command


def run(*argv: Any) -> int:
    return main(["compare", *map(str, argv)])


def test_the_command_on_pairs(
    model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    old, new = model(1), tmp_path / "new"
    shutil.copytree(model(2), new)
    file = write(tmp_path / "pairs.jsonl", pairs(60, seed=8))
    figures = tmp_path / "out" / "figures.json"
    before = RewardManifest.load(new)
    argv = (old, new, "--data", file, "--percentile", 70, "--json", figures)
    assert run(*argv) == 0
    assert RewardManifest.load(new) == before  # nothing is written unless it is asked for
    said = capsys.readouterr()
    assert "accepted above percentile 70" in said.out
    found = json.loads(figures.read_text())
    assert found["metrics"]["n"] == 60
    assert found["metrics"]["accepted"]["percentile"] == 70
    assert found["notes"]
    for note in found["notes"]:
        assert note in said.err

    assert run(*argv, "--write_reference") == 0
    after = RewardManifest.load(new)
    assert after.reference is not None
    assert after.reference.n == 120
    assert "pairs.jsonl" in after.reference.source
    assert after.golden_texts == before.golden_texts
    assert "pairs.jsonl" in (new / "README.md").read_text()
    share = found["metrics"]["accepted"]["new_remade"]["new"]["share"]
    assert share == pytest.approx(0.30, abs=0.01)
    # and it holds: the table of a second run shows it as NEW's own
    assert run(*argv) == 0
    again = json.loads(figures.read_text())["metrics"]["accepted"]
    assert again["own"]["new"]["share"] == pytest.approx(share)
    assert not list(new.glob("*.tmp"))


@pytest.mark.parametrize("form", ["completion", "messages", "blocks", "instruction"])
def test_the_command_on_texts(model: Callable[..., Path], tmp_path: Path, form: str):
    rows: list[Any] = texts(30, seed=6)
    expected = [RewardScorer.from_pretrained(model(s)).score(rows).raw.mean() for s in (1, 2)]
    if form in ("messages", "blocks"):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"]},
                ]
            }
            for row in rows
        ]
        for row in rows if form == "blocks" else ():
            row["messages"][0]["content"] = [
                {"type": "text", "text": row["messages"][0]["content"]}
            ]
    elif form == "instruction":
        rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in rows]
    figures = tmp_path / "figures.json"
    file = write(tmp_path / "rows.jsonl", rows)
    assert run(model(1), model(2), "--data", file, "--json", figures) == 0
    found = json.loads(figures.read_text())["metrics"]
    assert found["pairs"] is None
    assert found["n"] == 30
    assert found["n_prompts"] == 10
    assert found["raw"]["old"]["mean"] == pytest.approx(expected[0], abs=1e-5)
    assert found["raw"]["new"]["mean"] == pytest.approx(expected[1], abs=1e-5)
    assert run(model(1), model(2), "--data", file, "--limit", 7, "--json", figures) == 0
    assert json.loads(figures.read_text())["metrics"]["n"] == 7


def test_the_command_refuses(
    model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = write(tmp_path / "pairs.jsonl", pairs(5, seed=8))
    empty = write(tmp_path / "empty.jsonl", [])
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"prompt": "no", "completion": "yes"}\n{"prompt": \n')
    good = (model(1), model(2))
    for argv, words in (
        ((*good, "--data", tmp_path / "none.jsonl"), "missing file"),
        ((*good, "--data", empty), "no rows"),
        ((*good, "--data", torn), "line 2"),
        ((*good, "--data", file, "--limit", 0), "limit=0"),
        ((*good, "--data", file, "--percentile", 0), "percentile is 0"),
        ((*good, "--data", file, "--protocol", "companion"), "server"),
        ((*good, "--data", file, "--json", tmp_path), "is a folder"),
        ((tmp_path / "gone", good[1], "--data", file), "no such folder"),
        ((good[0], "some/hub-id", "--data", file, "--write_reference"), "no local folder"),
        ((*good, "--data", file, "--max_length", 50, "--write_reference"), "leave out"),
        ((*good, "--data", file, "--columns", "nothing=prompt"), "nothing"),
    ):
        assert run(*argv) == 2, argv
        said = capsys.readouterr()
        assert words in said.err, (argv, said.err)
        assert "Traceback" not in said.err
