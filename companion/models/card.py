"""The model card: ``README.md`` of a saved reward model, written from its manifest.

TRL's card of a reward model says 'fine-tuned version of [None]' of a base from a folder, and shows
a pipeline that writes a second BOS. Chapter 2.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from companion.errors import CompanionError
from companion.formatting import RewardFormatter
from companion.models.manifest import RewardManifest

logger = logging.getLogger(__name__)

CARD_FILE: Final = "README.md"
#: By this line a card is known to be ours, and is written anew.
MARK: Final = (
    "<!-- Written by the companion, anew at each save. Take this line out to keep what you change. "
    "-->"
)
_ASSETS = Path(__file__).parents[1] / "assets"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_ASSETS),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_CHAT = '[{"role": "user", "content": "What is 2 + 2?"}]'
_WHAT = {
    "scalar": "a text one score, read at its last token",
    "outcome": "each token of a completion a probability that the answer will be right",
    "process": "each step of a solution a verdict",
}
#: settings of the run that a reader asks for first
_SETTINGS = (
    *("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "center_rewards_coefficient", "lora", "seed"),
)
#: what figures are called; those without an interval are shown if they stand here
_LABELS = {
    "loss": "loss (nats)",
    "ece": "calibration error, debiased",
    "brier": "Brier score",
    "auc": "AUC",
    "wrong_auc": "AUC of wrong steps",
    "first_error_f1": "F1 of the first error",
}


def write_card(
    directory: str | os.PathLike[str],
    manifest: RewardManifest,
    formatter: RewardFormatter | None = None,
    *,
    model_id: str | None = None,
) -> Path | None:
    """Write ``README.md`` into a folder, unless somebody else's stands there.

    Parameters
    ----------
    directory : path
    manifest : RewardManifest
        What it lacks is left out of the card.
    formatter : RewardFormatter, optional
        Writes the conversation that the card shows.
    model_id : str, optional
        The name to load it by; default: the folder's.

    Returns
    -------
    Path or None
        None if a card by hand stays as it is, which is logged.
    """
    name = model_id or Path(directory).resolve().name
    return put_card(directory, model_card(manifest, formatter, model_id=name))


def put_card(directory: str | os.PathLike[str], text: str) -> Path | None:
    """Write a card, unless one that was written by hand stands there; see :func:`write_card`."""
    path = Path(directory) / CARD_FILE
    if path.exists() and not _is_machine_made(path):
        logger.warning(f"{path} was not written by the companion: it stays as it is")
        return None
    path.write_text(text, encoding="utf-8")
    return path


def render_card(template: str, header: ModelCardData, **given: Any) -> str:
    """A card from a template of the assets; the header becomes its YAML block."""
    text = _TEMPLATES.get_template(template).render(header=header.to_yaml(), mark=MARK, **given)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def model_card(
    manifest: RewardManifest, formatter: RewardFormatter | None = None, *, model_id: str
) -> str:
    """The card's text; see :func:`write_card`."""
    recipe, kind = manifest.formatter, manifest.kind
    plain = recipe.get("text") == "plain"
    sources = [str(part["source"]) for part in _parts(manifest) if part.get("source")]
    header = ModelCardData(
        base_model=manifest.base_model if is_hub_id(manifest.base_model) else None,
        datasets=list(dict.fromkeys(s for s in map(_bare, sources) if is_hub_id(s))) or None,
        library_name="transformers",
        pipeline_tag="text-classification" if kind == "scalar" else "token-classification",
        tags=["reward-model", "rlhf", f"{kind}-reward-model"],
    )
    return render_card(
        "model_card.md",
        header,
        name=model_id.rsplit("/", 1)[-1],
        what=_WHAT[kind],
        about=list(_about(manifest)),
        example=None if formatter is None else _example(formatter, plain),
        reading=list(_reading(recipe)),
        data=list(_data(manifest)),
        held_out=_held_out(manifest.metrics),
        figures=list(_figures(manifest.metrics)),
        training=[
            (name, _cell(manifest.training[name]))
            for name in _SETTINGS
            if manifest.training.get(name) not in (None, -1)
        ],
        kind=kind,
        model_id=model_id,
        prompt='"What is 2 + 2? "' if plain else _CHAT,
        plain=plain,
        reference=manifest.reference is not None,
        read=_places(manifest.readout),
        versions=", ".join(f"{name} {number}" for name, number in manifest.versions.items())
        or "Not recorded",
        notes=list(map(_line, manifest.notes)),
    )


# ---------------------------------------------------------------------- its parts


def _about(manifest: RewardManifest) -> Iterator[tuple[str, str]]:
    if manifest.base_model:
        yield "base", f"`{named(manifest.base_model)}`"
    yield "read-out", f"`{manifest.readout['rule']}`, head in {manifest.readout['head_dtype']}"
    if manifest.readout.get("aggregation"):
        yield "score of a text", f"`{manifest.readout['aggregation']}` of its values"
    if manifest.temperature is not None:
        chance = "probability that the first of two is preferred"
        yield "temperature", f"{manifest.temperature:.4g}: σ(difference / T) is the {chance}"
    if manifest.reference is not None:
        one = manifest.reference
        source = " ".join(named(w) if "/" in w else _line(w) for w in one.source.split())
        yield "reference", f"mean {one.mean:.4g}, sd {one.std:.4g} of {one.n:,} scores ({source})"
    if manifest.created:
        yield "saved", manifest.created


def _reading(recipe: Mapping[str, Any]) -> Iterator[str]:
    """What somebody who tokenises by hand has to know."""
    special = recipe.get("special_tokens", {})
    eos = special.get("eos", {}).get("token")
    if recipe.get("text") == "plain":
        yield "A prompt of text and its completion are joined as they are, without the template."
    elif recipe.get("text") == "chat":
        yield "A prompt of text is written by the chat template, as one question of the user."
    if eos:
        yield (
            f"A finished text ends as the template ends it, plain text with `{eos}`; one that was "
            "cut off has no such end, and another score."
        )
    if recipe.get("adds_bos"):
        bos = special.get("bos", {}).get("token")
        yield (
            f"The tokenizer puts `{bos}` before every text, and a chat template may write it too. "
            "Text pipelines then write two, and the score is another one: tokenise rendered text "
            "with `add_special_tokens=False`."
        )
    if recipe.get("max_length"):
        yield f"Trained on texts of up to {recipe['max_length']:,} tokens."
    if recipe.get("date"):
        yield (
            f"The template writes a date, and this model always reads {_line(recipe['date'])}; "
            "other tools write today's."
        )
    if recipe.get("split_special_tokens"):
        yield "Special tokens inside a user's text are read as text; other tools may not do so."


def _example(formatter: RewardFormatter, plain: bool) -> str | None:
    """A conversation as the model reads it; None where the template refuses such a one."""
    twin = copy.copy(formatter)
    twin.reset_counts()  # those of the formatter are the user's
    prompt: Any = [{"role": "user", "content": "What is 2 + 2?"}]
    try:
        encoded = twin.encode("What is 2 + 2? " if plain else prompt, "4.")
    except CompanionError:
        return None
    return None if encoded is None else str(formatter.tokenizer.decode(encoded.input_ids))


def _parts(manifest: RewardManifest) -> list[Mapping[str, Any]]:
    return [part for part in manifest.data.values() if isinstance(part, Mapping)]


def _data(manifest: RewardManifest) -> Iterator[tuple[str, ...]]:
    for name, part in manifest.data.items():
        if not isinstance(part, Mapping):
            continue
        used = f"{part['kept']:,}" if "kept" in part else ""
        if used and part.get("rows") is not None:
            used += f" of {part['rows']:,}"
        for what in ("dropped_overlong", "truncated"):
            if part.get(what):
                used += f", {part[what]:,} {what.replace('_', ' ')}"
        digest = f"`{str(part['sha256'])[:16]}…`" if part.get("sha256") else ""
        source = f"`{named(str(part['source']))}`" if part.get("source") else ""
        yield name.replace("_", " "), source, used, digest


def _held_out(metrics: Mapping[str, Any]) -> str:
    n, prompts = metrics.get("n"), metrics.get("n_prompts")
    rows = "held-out rows" if n is None else f"{n:,} held-out rows"
    if prompts is not None:
        rows += f" of {prompts:,} prompts"
    return rows


def _figures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Whatever has an interval, then what is known by name."""
    for key, interval in metrics.items():
        name = key.removesuffix("_interval")
        value = metrics.get(name)
        if isinstance(value, Mapping):  # the first error: its F1 has the interval
            name = f"{name}_f1"
            value = value.get(name)
        if name != key and _is_figure(value) and isinstance(interval, (list, tuple)):
            ends = ", ".join(f"{end:.3f}" if _is_figure(end) else "–" for end in interval)
            yield _LABELS.get(name, name.replace("_", " ")), f"{value:.3f}", f"[{ends}]"
    for key, label in _LABELS.items():
        if _is_figure(metrics.get(key)) and f"{key}_interval" not in metrics:
            yield label, f"{metrics[key]:.3f}", ""
    ranked = metrics.get("rankings") or {}
    if _is_figure(ranked.get("best_is_best")):
        low, high = ranked["interval"]
        yield "favourite is the best", f"{ranked['best_is_best']:.3f}", f"[{low:.3f}, {high:.3f}]"
    scaled = metrics.get("at_temperature") or {}
    for key in ("loss", "ece"):
        if _is_figure(scaled.get(key)):
            yield f"{_LABELS[key]} at the temperature", f"{scaled[key]:.3f}", ""


def _places(readout: Mapping[str, Any]) -> str:
    if readout.get("separator") is None:
        return "those of the completion's tokens"
    return (
        f"those of the token that ends each step (steps are separated by {readout['separator']!r})"
    )


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_hub_id(name: str | None) -> bool:
    """Whether this names a repository, and not a file or folder of the machine of the run."""
    if name is None or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or Path(name).exists():
        return False
    return not re.search(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|ya?ml)$", name)


def _bare(source: str) -> str:
    return source.split(" [", 1)[0]  # without its split


def named(source: str) -> str:
    """A hub id as it is; of a path, which is nobody's business, the last part."""
    bare = _bare(source)
    return _line(source if is_hub_id(bare) else Path(bare).name + source[len(bare) :])


def _line(text: Any) -> str:
    """Text within a line or a cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(own)}" for key, own in value.items() if own is not None)
    return f"{value:g}" if isinstance(value, float) else _line(value)


def _is_machine_made(path: Path) -> bool:
    """Ours, or a draft of transformers, TRL or PEFT, which nobody has written."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if MARK in text or "[More Information Needed]" in text:
        return True
    try:
        return "generated_from_trainer" in (ModelCard(text).data.get("tags") or [])
    except Exception:  # a header that is no YAML: written by hand
        return False
