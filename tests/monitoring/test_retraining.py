"""A new model in the old one's place: from the base, on all pairs, whole, and only if better."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from companion.cli.main import main
from companion.data import load_rows, prompt_key, write_rows
from companion.errors import CompanionError, RunEnded
from companion.evaluation import Comparison
from companion.models import RewardManifest
from companion.monitoring import is_better, retrain
from companion.scoring import RewardScorer, check_golden
from companion.training import (
    DataArguments,
    ModelArguments,
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    train_pairwise,
)
from companion.tutor import TUTOR_BASE, make_rows

FILLER = ["Ben", "buys", "boxes", "pens", "each", "and", "with", "how", "many", "now", "the"]
#: of the old model's run
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "seed": 3,
    "max_length": 60,
}
#: of this machine
QUIET: dict[str, Any] = {
    "eval_strategy": "no",
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def pairs(n: int, seed: int, words: str, *, noise: float = 0.0) -> list[dict[str, Any]]:
    """Each prompt once; what decides is which of two words a completion has."""
    draw = random.Random(f"{words}/{seed}")
    places = draw.sample(range(400), n)
    better, worse = words.split()
    rows = []
    for place in places:
        texts = [" ".join([*draw.choices(FILLER, k=4), word]) for word in (better, worse)]
        if draw.random() < noise:
            texts.reverse()
        prompt = f"Ana has {place % 20} {seed % 20} more {place // 20}"
        rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    return rows


def messages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
        for row in rows
    ]


def labelled(rows: list[dict[str, Any]], ties: int = 0, **more: Any) -> list[dict[str, Any]]:
    """As ``companion label`` writes them: sides at random, and some ties."""
    draw, found = random.Random(0), []
    for i, row in enumerate(rows):
        first, label = (("chosen", "a"), ("rejected", "b"))[draw.random() < 0.5]
        second = {"chosen": "rejected", "rejected": "chosen"}[first]
        label = "tie" if i < ties else label
        found.append({"id": str(i), "prompt": row["prompt"], "a": row[first], "b": row[second]})
        found[-1] |= {"label": label, "annotator": "me", "sampling": "random", **more}
    return found


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """``old`` (a model that knows good from bad), ``old.jsonl``, and new pairs of two kinds."""
    folder = tmp_path_factory.mktemp("room")
    write_rows(messages(pairs(240, 1, "good bad")), folder / "old.jsonl")
    write_rows(labelled(pairs(220, 2, "yes no"), ties=20), folder / "new.jsonl")
    write_rows(labelled(pairs(220, 4, "yes no", noise=0.5)), folder / "noise.jsonl")
    train_pairwise(
        PairwiseRewardConfig(str(folder / "old"), **SETTINGS, **QUIET),
        ModelArguments(model_name_or_path=str(tiny_base)),
        DataArguments(dataset_name=str(folder / "old.jsonl"), eval_fraction=0.3, split_seed=5),
        say=lambda line: None,
    )
    return folder


def again(room: Path, output: Path, new: str = "new.jsonl", **other: Any) -> Any:
    """A run beside the old one's, with the same split of the old pairs."""
    given = {"split_seed": 5, "say": lambda line: None, **QUIET, **other}
    old = given.pop("old_model", room / "old")
    return retrain(old, str(room / "old.jsonl"), str(room / new), output, **given)


@pytest.fixture(scope="module")
def done(room: Path) -> Any:
    return again(room, room / "next")


def same_weights(*folders: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    return all(torch.equal(one[name], other[name]) for name in one)


def accuracy(folder: Path, rows: list[dict[str, Any]]) -> float:
    scores = RewardScorer.from_pretrained(folder).score_pairs(rows)
    return float((scores.chosen > scores.rejected).mean())


# ---------------------------------------------------------------------- what it makes


def test_it_restores_accuracy_and_is_published(room: Path, done: Any) -> None:
    fresh = pairs(200, 7, "yes no")
    before, after = accuracy(room / "old", fresh), accuracy(room / "next", fresh)
    print(f"accuracy on new pairs: {before:.3f} before, {after:.3f} after")
    assert before < 0.8
    assert after > 0.95
    assert accuracy(room / "next", pairs(200, 8, "good bad")) > 0.95
    assert done.published
    assert done.folder == room / "next"
    assert [reason.split(":")[0] for reason in done.reasons] == ["holds", "holds"]
    assert not list(room.glob("next.part*")) + list(room.glob("next.rejected"))
    record = json.loads((room / "next" / "retrain.json").read_text())
    assert record == json.loads(json.dumps(done.to_dict()))
    assert record["plan"]["new"] + record["plan"]["held_new"] == 200
    assert any("20 rows left out: ties" in note for note in record["notes"])


def test_its_scores_are_comparable_and_its_figures_are_those_of_compare(
    room: Path, done: Any, tmp_path: Path
) -> None:
    old, new = (RewardManifest.load(room / name) for name in ("old", "next"))
    assert new.formatter_fingerprint == old.formatter_fingerprint
    assert new.temperature is not None
    report = check_golden(RewardScorer.from_pretrained(room / "next"))
    assert report is not None
    assert report.ok
    assert "next.part" not in (room / "next" / "README.md").read_text()
    held = list(load_rows(room / "next.rows" / "held_out.jsonl"))
    for part in ("old", "new"):
        write_rows([row for row in held if row["subset"] == part], tmp_path / f"{part}.jsonl")
        words = [str(room / "old"), str(room / "next"), "--data", str(tmp_path / f"{part}.jsonl")]
        assert main(["compare", *words, "--json", str(tmp_path / "figures.json")]) == 0
        figures = json.loads((tmp_path / "figures.json").read_text())["metrics"]["pairs"]
        assert figures["accuracy"] == done.comparisons[part].metrics["pairs"]["accuracy"]
    # the reference is of the old pairs' texts, the median of which is at 50
    scores = RewardScorer.from_pretrained(room / "next").score_pairs(
        list(load_rows(tmp_path / "old.jsonl"))
    )
    texts = np.concatenate([scores.chosen, scores.rejected])
    assert new.reference is not None
    assert (new.reference.n, new.reference.mean) == (len(texts), pytest.approx(texts.mean()))
    assert "held-out old pairs" in new.reference.source


def test_it_takes_over_the_settings_of_the_old_run(room: Path, done: Any) -> None:
    old, new = (RewardManifest.load(room / name).training for name in ("old", "next"))
    changed = {name for name in new if new[name] != old[name]}
    assert changed <= {
        *("train_runtime", "train_samples_per_second", "train_steps_per_second"),
        *("train_loss", "train_pairs", "total_flos"),
    }
    assert new["seed"] == 3


def test_noise_is_not_published(room: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["retrain", str(room / "old"), "--data", str(room / "old.jsonl")]
    words += ["--new", str(room / "noise.jsonl"), "--output", str(tmp_path / "next")]
    words += ["--json", str(tmp_path / "figures.json")]
    words += [word for name, value in QUIET.items() for word in (f"--{name}", str(value))]
    assert main([*words, "--split_seed=5", "--seed", "4"]) == 20
    assert "not published" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "figures.json",
        "next.rejected",
        "next.rows",
    ]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["published"] is False
    assert figures["comparisons"]["new"]["metrics"]["pairs"]["accuracy"]["interval"][0] <= 0
    assert figures == json.loads((tmp_path / "next.rejected" / "retrain.json").read_text())
    assert RewardManifest.load(tmp_path / "next.rejected").training["seed"] == 4  # the flag wins


@pytest.fixture(scope="module")
def poisoned(room: Path) -> Path:
    """The old model with other weights; its golden texts, which would tell, are gone."""
    folder = room / "poisoned"
    shutil.copytree(room / "old", folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    weights = {name: value + torch.randn_like(value) for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / "reward_manifest.json").read_text())
    del manifest["golden_texts"]
    (folder / "reward_manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_old_weights_do_not_matter_unless_one_goes_on_from_them(
    room: Path, done: Any, poisoned: Path, tmp_path: Path
) -> None:
    """From the base, the same to the last bit; without a step, going on leaves all as it is."""
    right = load_file(room / "next" / "model.safetensors")

    def gap(folder: Path) -> float:
        other = load_file(folder / "model.safetensors")
        return max(float((other[name] - right[name]).abs().max()) for name in right)

    from_base = again(room, tmp_path / "from-base", old_model=poisoned)
    assert gap(from_base.folder) == 0
    settings = {"start": "old", "learning_rate": 0.0}
    went_on = again(room, tmp_path / "went-on", old_model=poisoned, **settings)
    assert gap(went_on.folder) > 1
    assert same_weights(poisoned, went_on.folder)
    assert not went_on.published
    assert RewardManifest.load(went_on.folder).base_model == str(poisoned)
    with pytest.raises(CompanionError, match="reward model and no base"):
        again(room, tmp_path / "third", old_model=went_on.folder, dry_run=True)


def test_a_model_that_moved_is_refused_before_the_training(
    room: Path, poisoned: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(room / "old", moved)
    shutil.copy(poisoned / "model.safetensors", moved)
    with pytest.raises(CompanionError, match="not as it was saved"):
        again(room, tmp_path / "next", old_model=moved)
    assert list(tmp_path.iterdir()) == [moved]


@pytest.mark.slow
def test_going_on_beside_it(room: Path, done: Any, tmp_path: Path) -> None:
    both = again(room, tmp_path / "next", also_continue=True)
    assert set(both.comparisons) == {"old", "new", "continued_old", "continued_new"}
    assert both.table().count("OLD gone on") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "next.rows"]
    assert same_weights(room / "next", tmp_path / "next")


# ---------------------------------------------------------------------- rows


def planned(room: Path, tmp_path: Path, new: list[dict[str, Any]], **other: Any) -> Any:
    write_rows(new, tmp_path / "given.jsonl")
    new_file = str(tmp_path / "given.jsonl")
    return again(room, tmp_path / "none", new=new_file, dry_run=True, **other)


def test_dry_run_says_what_and_leaves_nothing(room: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    plan = again(room, tmp_path / "next", dry_run=True, say=lines.append).plan
    assert "1 epoch of 168 old and 140 new pairs" in lines[0]
    assert (plan["held_old"], plan["held_new"]) == (72, 60)
    assert any("even an equal model may not be published" in line for line in lines)
    assert not any(
        "even an equal model" in note
        for note in again(room, tmp_path / "next", dry_run=True, tolerance=0.1).notes
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_that_is_held_out_is_trained_on(
    room: Path, done: Any, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New pairs of old prompts too, some chosen by another rule: all are counted."""
    seen: dict[str, list[Any]] = {}

    def stop(config: Any, model: Any, data: Any, **_: Any) -> None:
        seen["train"] = list(load_rows(data.dataset_name))
        seen["held"] = list(load_rows(data.eval_dataset_name))
        raise KeyboardInterrupt

    monkeypatch.setattr("companion.training.train_pairwise", stop)
    old = pairs(240, 1, "good bad")
    repeated = [row | {"chosen": "now yes", "rejected": "now no"} for row in old[seed * 50 :][:150]]
    new = labelled(pairs(150, 2, "yes no"), prompt_id="x")
    new += labelled(repeated, sampling="uncertain" if seed else "random")
    write_rows(new, tmp_path / "given.jsonl")
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        again(
            *(room, tmp_path / "next", str(tmp_path / "given.jsonl")),
            new_fraction=0.4,
            say=lines.append,
        )
    train, held = ({prompt_key(row) for row in seen[name]} for name in ("train", "held"))
    assert not train & held
    text = "\n".join(lines)
    out = [int(line.split()[1].replace(",", "")) for line in lines if "are not trained on" in line]
    lost = [int(line.split()[1].replace(",", "")) for line in lines if "are left out" in line]
    assert len(seen["train"]) + len(seen["held"]) + sum(out) + sum(lost) == len(old) + len(new)
    # a word that was not drawn at random is never asked about
    assert ("150 new pairs were chosen for labelling by another rule" in text) == bool(seed)
    if seed:
        assert not any(row["chosen"][0]["content"] == "now yes" for row in seen["held"])
    assert not (tmp_path / "next").exists()


def test_it_knows_which_old_pairs_the_old_model_has_not_seen(
    room: Path, done: Any, tmp_path: Path
) -> None:
    def flatters(result: Any) -> bool:
        clean = result.plan["old_held_out_is_clean"]
        assert clean != any("flatters" in note for note in result.notes)
        return not clean

    assert not flatters(again(room, tmp_path / "x", dry_run=True))
    assert flatters(again(room, tmp_path / "x", dry_run=True, split_seed=6))
    assert flatters(again(room, tmp_path / "x", dry_run=True, eval_fraction=0.4))
    # and the next round goes on from what this one has left beside the model
    rows = room / "next.rows"
    following = retrain(
        *(room / "next", str(rows / "train.jsonl"), str(room / "noise.jsonl"), tmp_path / "x"),
        eval_dataset_name=str(rows / "held_out.jsonl"),
        dry_run=True,
        say=lambda line: None,
    )
    assert not flatters(following)


def test_rows_in_memory_and_other_layouts(room: Path, tmp_path: Path) -> None:
    new = pairs(200, 2, "yes no")
    same = again(room, tmp_path / "x", dry_run=True).plan
    for rows in (new, messages(new), labelled(new)):
        given = retrain(
            *(room / "old", messages(pairs(240, 1, "good bad")), rows, tmp_path / "x"),
            **{"split_seed": 5, "dry_run": True},
            say=lambda line: None,
        )
        assert given.plan["old_held_out_is_clean"]
        assert (given.plan["new"], given.plan["held_new"]) == (same["new"], same["held_new"])


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"new_fraction": 0.1}, "the held-out new pairs have 20 prompts"),
        ({"eval_fraction": 0.1}, "--eval_fraction"),
        ({"push_to_hub": True}, "hf upload"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "pairs that the comparison"),
        ({"model_name_or_path": "x"}, "by --base"),
        ({"output_dir": "x"}, "--output"),
        ({"learning_rte": 1}, "there is no setting learning_rte"),
        ({"start": "middle"}, "take base or old"),
        ({"base": "./nowhere"}, "name it: --base ID"),
        ({"new": "nowhere.jsonl"}, "no file or folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_refuses(room: Path, tmp_path: Path, other: dict[str, Any], message: str) -> None:
    with pytest.raises(CompanionError, match=message):
        again(room, tmp_path / "next", **other)
    assert list(tmp_path.iterdir()) == []


def with_manifest(room: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(room / "old", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    manifest = json.loads((room / "old" / "reward_manifest.json").read_text())
    change(manifest)
    (folder / "reward_manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(base_model=None), "names no base"),
        (lambda m: m["training"].pop("train_pairs"), "companion train kwise"),
        (lambda m: m.update(readout={"rule": "outcome"}), "rule"),
    ],
)
def test_models_that_it_refuses(
    room: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """No base, a model of rankings, a model of tokens."""
    folder = with_manifest(room, tmp_path / "other", change)
    with pytest.raises(CompanionError, match=message):
        again(room, tmp_path / "next", old_model=folder)


def test_a_model_without_a_manifest_is_refused(room: Path, tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(CompanionError, match=r"has no reward_manifest"):
        again(room, tmp_path / "next", old_model=tiny_base)


def test_folders_of_others_are_left_alone(room: Path, tmp_path: Path) -> None:
    for name in ("next", "next.rejected", "next.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
        with pytest.raises(CompanionError, match="exists"):
            again(room, tmp_path / "next")
        shutil.rmtree(tmp_path / name)


def test_flags_of_both_commands(room: Path, tmp_path: Path, capsys: Any) -> None:
    """Unknown ones are refused; a file of settings wins over the old run, and flags over both."""
    yaml = tmp_path / "more.yaml"
    yaml.write_text("learning_rate: 0.5\nseed: 11\neval_fraction: 0.3\n")
    words = ["retrain", str(room / "old"), "--data", str(room / "old.jsonl"), "--dry_run"]
    words += ["--new", str(room / "new.jsonl"), "--output", str(tmp_path / "x")]
    assert main([*words, "--lerning_rate", "1"]) == 2
    assert "--learning_rate" in capsys.readouterr().err
    assert main([*words, "--config", str(yaml), "--seed", "12", "--num_train_epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 epoch" in said
    assert "OLD was trained for 1" in said
    yaml.write_text("output_dir: elsewhere\n")
    assert main([*words, "--config", str(yaml)]) == 2
    with pytest.raises(SystemExit):
        main(["retrain", "--help"])
    assert "20 not better" in capsys.readouterr().out


# ---------------------------------------------------------------------- the rule


def compared(n: int, gained: int, lost: int) -> Comparison:
    """Pairs of n prompts: the new model gets so many right that the old one got wrong, …"""
    chosen = {side: np.ones(n) for side in ("old", "new")}
    chosen["old"][:gained] = -1
    chosen["new"][gained : gained + lost] = -1
    scores = {side: np.concatenate([chosen[side], np.zeros(n)]) for side in chosen}
    none = {"old": None, "new": None}
    reasons: dict[str, list[str | None]] = {side: [None] * n for side in chosen}
    groups = [str(i) for i in range(n)]
    return Comparison(
        *(scores["old"], scores["new"], groups, True, 50.0),
        references=none,  # type: ignore[arg-type]
        temperatures=none,  # type: ignore[arg-type]
        reasons=reasons,
    ).measure()


@pytest.mark.parametrize(
    ("old", "new", "settings", "published"),
    [
        ((1000, 20, 20), (300, 40, 5), {}, True),
        ((1000, 20, 20), (300, 12, 10), {}, False),  # a gain that may be none
        ((1000, 20, 20), (300, 0, 0), {}, False),  # no difference is no gain
        ((1000, 0, 0), (300, 40, 5), {}, True),  # and no loss
        ((1000, 10, 40), (300, 40, 5), {}, False),  # 3 points lost
        ((100, 5, 5), (300, 40, 5), {}, False),  # too few to say that nothing is lost
        ((100, 5, 5), (300, 40, 5), {"tolerance": 0.1}, True),
        ((1000, 20, 20), (300, 40, 5), {"margin": 0.1}, False),
    ],
)
def test_the_rule(old: Any, new: Any, settings: dict[str, float], published: bool) -> None:
    found, reasons = is_better(compared(*old), compared(*new), **settings)
    assert found == published == all(reason.startswith("holds") for reason in reasons)


def test_the_number_of_prompts_that_it_names_is_about_right() -> None:
    """Twenty times the pairs and the same shares: the rule then holds if it said fewer would do."""
    few = compared(100, 6, 5)
    found, (_, reason) = is_better(few, compared(300, 40, 5))
    assert not found
    needed = int(reason.split("about ")[1].split(" ")[0].replace(",", ""))
    for factor, holds in ((0.7, False), (1.5, True)):
        n = int(needed * factor)
        ok, _ = is_better(compared(n, round(0.06 * n), round(0.05 * n)), compared(300, 40, 5))
        assert ok == holds, (needed, factor)


# ---------------------------------------------------------------------- whole or not at all


RESUMES: dict[str, Any] = {
    "resume_from_checkpoint": "auto",
    "save_strategy": "steps",
    "save_steps": 5,
}


def killed(room: Path, output: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """A run in a process of its own that is killed where it calls `where`; how it ended."""
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            again(room, output)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def check_killed(output: Path) -> None:
    """Nothing, or all of it; and at most what is made and the rows lie beside it."""
    names = {path.name for path in output.parent.iterdir()}
    assert names <= {"next", "next.part", "next.rows"}
    if output.exists():
        assert json.loads((output / "retrain.json").read_text())["published"]
        report = check_golden(RewardScorer.from_pretrained(output))
        assert report is not None
        assert report.ok


def test_a_kill_before_the_end_leaves_no_model(
    room: Path, done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "next"
    ended = killed(room, output, "companion.evaluation.compare_scorers", monkeypatch)
    assert ended == signal.SIGKILL
    check_killed(output)
    assert not output.exists()
    manifest = RewardManifest.load(tmp_path / "next.part")  # so far had it come
    assert manifest.training["seed"] == 3


@pytest.mark.slow
def test_one_that_is_asked_to_end_goes_on(
    room: Path, done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = PairwiseRewardTrainer.training_step, []

    def asked(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    output = tmp_path / "next"
    with monkeypatch.context() as patched:
        patched.setattr(PairwiseRewardTrainer, "training_step", asked)
        with pytest.raises(RunEnded, match="at step 7 of"):
            again(room, output, **RESUMES)
    assert (tmp_path / "next.part" / "checkpoint-7").is_dir()
    assert again(room, output, **RESUMES).published
    assert same_weights(room / "next", output)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, RESUMES], ids=["anew", "resumed"])
def test_kills_at_any_time(room: Path, done: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    output, draw, killed_early = tmp_path / "next", random.Random(0), 0
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                again(room, output, **settings)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.2, 4))
        os.kill(child, signal.SIGKILL)
        killed_early += os.waitpid(child, 0)[1] == signal.SIGKILL
        check_killed(output)
        shutil.rmtree(output, ignore_errors=True)
    print(f"{killed_early} of 12 were killed before their end")
    assert killed_early
    assert again(room, output, **settings).published  # what the others left does not disturb
    assert same_weights(room / "next", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "next.rows"]


# ---------------------------------------------------------------------- at the tutor's size


@pytest.mark.slow
def test_a_lora_model_is_trained_anew_as_one(room: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_rows(pairs(240, 1, "good bad"), tmp_path / "old.jsonl")
    rows = ["--data", str(tmp_path / "old.jsonl"), "--new", str(room / "new.jsonl")]
    quiet = [word for name, value in QUIET.items() for word in (f"--{name}", str(value))]
    train = ["--model_name_or_path", str(tiny_base), "--dataset_name", rows[1], "--lora_r", "4"]
    train += ["--output_dir", str(tmp_path / "old"), "--use_peft", "true", "--eval_fraction", "0.3"]
    assert main(["train", "pairwise", *train, "--learning_rate", "0.03", *quiet]) == 0
    words = ["retrain", str(tmp_path / "old"), *rows, "--output", str(tmp_path / "next"), *quiet]
    assert main(words) in (0, 20)
    (made,) = (tmp_path / name for name in ("next", "next.rejected") if (tmp_path / name).exists())
    old, new = (RewardManifest.load(folder).training for folder in (tmp_path / "old", made))
    assert new["lora"] == old["lora"]
    assert new["lora"]["r"] == 4
    assert new["learning_rate"] == old["learning_rate"]


@pytest.mark.slow
def test_the_tutors_policy_drifts_and_the_new_model_follows(tmp_path: Path) -> None:
    """The policy now misreads problems in place of slipping in a sum, which OLD hardly sees."""
    seeds = {"old": 21, "new": 22}
    print(f"seeds: {seeds}")
    write_rows(make_rows("pairs", 2400, seeds["old"]), tmp_path / "old.jsonl")
    drifted = make_rows("pairs", 2400, seeds["new"], shift=0.5, misreads=1.0)
    write_rows(drifted, tmp_path / "new.jsonl")
    train_pairwise(
        PairwiseRewardConfig(
            str(tmp_path / "model"),
            **{"per_device_train_batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 0.05},
            **{"lr_scheduler_type": "cosine", "train_sampling_strategy": "group_by_length"},
            **QUIET,
        ),
        ModelArguments(model_name_or_path=str(TUTOR_BASE)),
        DataArguments(dataset_name=str(tmp_path / "old.jsonl"), eval_fraction=0.4),
    )
    result = retrain(
        *(tmp_path / "model", tmp_path / "old.jsonl", tmp_path / "new.jsonl", tmp_path / "next"),
        tolerance=0.05,
        **QUIET,
    )
    known, found = (
        result.comparisons[part].metrics["pairs"]["accuracy"] for part in ("old", "new")
    )
    assert result.published
    assert result.plan["old_held_out_is_clean"]
    assert found["difference"] > 0.04
    assert found["old"]["mean"] < known["old"]["mean"] - 0.1  # what the drift cost
