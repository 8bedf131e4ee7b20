"""Sick sets of pairs: one trouble each, in rows of the tutor, with a sound model. Chapter 9."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from companion.audit.checks.data import THREADS
from companion.audit.museum.healthy import save_stock, save_with_manifest, tutor_reward
from companion.audit.museum.specimen import Planted, Specimen
from companion.data import dataset_fingerprint, load_rows, write_rows
from companion.models import RewardManifest
from companion.tutor import make_rows

Rows = list[dict[str, Any]]

#: Pairs in a set. An audit scores as many of them as its budget allows.
_ROWS: Final = 60


def sound_rows() -> Rows:
    """Pairs of the tutor, each with a prompt of its own: nothing ails them."""
    return make_rows("pairs", _ROWS, 2)


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _answer(row: Mapping[str, Any], side: str = "chosen") -> str:
    return str(row[side][0]["content"])


def sick_rows(
    change: Callable[[Rows], Rows],
    *,
    against: Callable[[Rows], Rows] | None = None,
    tokenizer: Callable[[Any], None] | None = None,
) -> Callable[[Path], Any]:
    """A specimen's ``plant``: sound rows, changed, another set made of them, another tokenizer."""

    @contextlib.contextmanager
    def plant(folder: Path) -> Iterator[Planted]:
        loaded = tutor_reward()
        if tokenizer is not None:
            tokenizer(loaded.tokenizer)
        model = save_stock(loaded, folder / "model")
        write_rows(change(sound_rows()), folder / "pairs.jsonl")
        other = None
        if against is not None:
            other = folder / "training.jsonl"
            write_rows(against(sound_rows()), other)
        yield Planted(str(model), data=folder / "pairs.jsonl", against=other)

    return plant


def _swapped(rows: Rows) -> Rows:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def _circles(rows: Rows) -> Rows:
    """The answers of three pairs under one prompt: each is better than the next."""
    out = []
    for three in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        for one, other in zip(three, [*three[1:], three[0]], strict=True):
            own = {"chosen": one["chosen"], "rejected": other["chosen"]}
            out.append({**one, **own, "prompt": three[0]["prompt"]})
    return out


def _both_ways(rows: Rows) -> Rows:
    """A second annotator, who prefers the other one of every third pair."""
    return [*rows, *_swapped(rows[::3])]


def _in_case_alone(rows: Rows) -> Rows:
    return [{**row, "rejected": _said(f" {_answer(row).upper()}\n")} for row in rows[:5]] + rows[5:]


def _reworded(rows: Rows) -> Rows:
    """As augmentation does it: each prompt again with another name in it."""
    out = []
    for row in rows[::2]:
        for name in ("Ana", "Ben"):
            task = (
                "Read the question with care, work it out line by line, and say the answer at the "
                f"end. {name} asks: {row['prompt'][0]['content']}"
            )
            out.append({**row, "prompt": [{"role": "user", "content": task}]})
    return out


def _others_and_some(rows: Rows) -> Rows:
    """A training set in which ten of the prompts stand, and ten nearly do."""
    near = [
        {
            **row,
            "prompt": [{**row["prompt"][0], "content": f"Hello! {row['prompt'][0]['content']}"}],
        }
        for row in rows[10:20]
    ]
    return [*make_rows("pairs", _ROWS, 3), *rows[:10], *near]


def _long_prompts(rows: Rows) -> Rows:
    """A document in front of the question, longer than the model takes."""
    document = "The sea is wide and salt. " * 140
    return [
        {**row, "prompt": [{"role": "user", "content": document + row["prompt"][0]["content"]}]}
        for row in rows[:5]
    ] + rows[5:]


def _scraped(rows: Rows) -> Rows:
    """Logs of a chat, with the marks of the turns left in."""
    return [
        {**row, "rejected": _said(f"{_answer(row, 'rejected')}<|end|> <|user|>Thanks!")}
        for row in rows[:5]
    ] + rows[5:]


def _accented(rows: Rows) -> Rows:
    """Pairs of which one side has an accent that the other lacks."""
    return [
        {
            **row,
            "chosen": _said(f"Voil\u00e0! {_answer(row)}"),
            "rejected": _said(f"Voila! {_answer(row)}"),
        }
        for row in rows[:5]
    ] + rows[5:]


def _without_accents(tokenizer: Any) -> None:
    from tokenizers import normalizers

    strip = [normalizers.NFD(), normalizers.StripAccents()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(strip)


def _reasoned(rows: Rows) -> Rows:
    return [
        {**row, "chosen": _said(f"<think>Let me see.</think>{_answer(row)}")} for row in rows[:5]
    ] + rows[5:]


def _without_reasoning(tokenizer: Any) -> None:
    """As templates of reasoning models do."""
    content = "message['content']"
    assert content in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(
        content, f"({content}).split('</think>')[-1]"
    )


def _of_several_turns(rows: Rows) -> Rows:
    """A second question, whose answer is judged."""
    return [
        {**two, "prompt": [*one["prompt"], *one["chosen"], *two["prompt"]]}
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]


def _last_turn_alone(tokenizer: Any) -> None:
    loop = "in messages"
    assert loop in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(loop, f"{loop}[-2:]")


@contextlib.contextmanager
def _learned_by_heart(folder: Path) -> Iterator[Planted]:
    """The rows are those of the manifest's training set."""
    data = folder / "pairs.jsonl"
    write_rows(sound_rows(), data)
    model = save_with_manifest(tutor_reward(), folder / "model")
    manifest = RewardManifest.load(model / "reward_manifest.json")
    manifest.data = {"train": {"source": data.name, "sha256": dataset_fingerprint(load_rows(data))}}
    manifest.save(model)
    yield Planted(str(model), data=data)


def _specimen(
    name: str,
    story: str,
    caught_by: str,
    plant: Callable[[Path], Any],
    also: Sequence[str] = (),
) -> Specimen:
    return Specimen(name, story, THREADS.get(caught_by, ()), caught_by, plant, tuple(also))


SPECIMENS: Final[tuple[Specimen, ...]] = (
    _specimen(
        "columns-swapped",
        "The columns chosen and rejected were swapped when the file was written.",
        "worse-than-a-coin",
        sick_rows(_swapped),
    ),
    _specimen(
        "preferences-in-a-circle",
        "A judge prefers A to B, B to C, and C to A.",
        "cyclic-preferences",
        sick_rows(_circles),
    ),
    _specimen(
        "two-labels-for-one-pair",
        "Two annotators disagree, and both of their labels are in the file.",
        "contradicting-labels",
        sick_rows(_both_ways),
    ),
    _specimen(
        "sides-that-differ-in-case",
        "The rejected text is the chosen one in capitals.",
        "equal-sides",
        sick_rows(_in_case_alone),
    ),
    _specimen(
        "prompts-made-twice",
        "Augmentation wrote each prompt again with another name in it.",
        "near-duplicate-prompts",
        sick_rows(_reworded),
    ),
    _specimen(
        "benchmark-in-training",
        "Prompts of the held-out set stand in the training rows, some with a word more.",
        "leakage",
        sick_rows(lambda rows: rows, against=_others_and_some),
    ),
    _specimen(
        "audited-with-its-training",
        "Without an evaluation set the trainer takes the first rows of the training set.",
        "trained-on-these-rows",
        _learned_by_heart,
    ),
    _specimen(
        "answers-cut-away",
        "The prompt fills the whole length, so that both sides are the same tokens after the cut.",
        "equal-sides-after-cut",
        sick_rows(_long_prompts),
        also=("rows-too-long",),
    ),
    _specimen(
        "marks-of-turns-in-text",
        "Scraped logs hold the template's own marks, which end the turn in the middle.",
        "special-tokens-in-rows",
        sick_rows(_scraped),
    ),
    _specimen(
        "accents-stripped",
        "The tokenizer strips accents, and they are all that differs.",
        "equal-sides-as-tokens",
        sick_rows(_accented, tokenizer=_without_accents),
    ),
    _specimen(
        "reasoning-dropped-from-rows",
        "The chat template drops the reasoning that the annotators judged.",
        "rows-refused-by-template",
        sick_rows(_reasoned, tokenizer=_without_reasoning),
        ("template-drops-content",),
    ),
    _specimen(
        "earlier-turns-dropped-from-rows",
        "The chat template writes the last turn alone, and the answer hangs on an earlier one.",
        "rows-changed-by-template",
        sick_rows(_of_several_turns, tokenizer=_last_turn_alone),
        ("template-drops-content",),
    ),
)
