"""A new model from the base, on old and new pairs, published only if it is better. Chapter 7.

Whether a pair of a user's prompts is ordered rightly moves with the policy, so new labels come in,
and a new model is due. It starts from the base and not from the old model, sees old and new pairs
together once, and is then asked beside the old one about prompts that it has not seen. It gets its
place in one move, when all is done, or none.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from companion.data.writing import write_text
from companion.errors import CompanionError, DataError, ModelError

if TYPE_CHECKING:
    from companion.evaluation import Comparison
    from companion.models import RewardManifest

Rows: TypeAlias = list[dict[str, Any]]
Arguments: TypeAlias = Callable[[dict[str, Any]], tuple[Any, Any, Any]]
Source: TypeAlias = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
#: the record of a run; by it a folder is known to be one of ours
RECORD: Final = "retrain.json"
_TEMPLATE: Final = "chat_template.jinja"
#: fewer held-out prompts than these say nothing: the bootstrap's interval of so few is too narrow
FEWEST_PROMPTS: Final = 50
#: a usual share of pairs on which two models part, for the size of an interval to come
_PART: Final = 0.1
#: what the old run decided for itself, or for its machine
_NOT_TAKEN: Final = ("num_train_epochs", "max_steps", "load_best_model_at_end", "bf16", "fp16")
#: what training and scoring read of a pair; other columns may have other types in the other file
_KEPT: Final = ("prompt", "chosen", "rejected", "margin", "tools", "chat_template_kwargs")


@dataclass
class Retraining:
    """What :func:`retrain` did, or with ``dry_run`` would do.

    Attributes
    ----------
    folder : Path
        Of the new model: where it was published, or where it was left aside; None if nothing was
        trained.
    published : bool
    reasons : list of str
        Of each rule whether it holds, with its figure.
    comparisons : dict of str to Comparison
        On the held-out ``old`` and ``new`` pairs, old model against new; with `also_continue` also
        ``continued_old`` and ``continued_new``, old model against the one that went on from it.
    plan : dict
        What was trained from what: base, counts of pairs, settings taken over from the old run.
    notes : list of str
        What was repaired, assumed or left out.
    """

    plan: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    published: bool = False
    reasons: list[str] = field(default_factory=list)
    comparisons: dict[str, Comparison] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "published": self.published,
            "folder": None if self.folder is None else str(self.folder),
            "reasons": list(self.reasons),
            "plan": self.plan,
            "notes": list(self.notes),
            "comparisons": {name: one.to_dict() for name, one in self.comparisons.items()},
        }

    def planned(self) -> str:
        """What is trained on what, and on what it is compared."""
        plan = self.plan
        taken = ", ".join(f"{name} {value}" for name, value in plan["settings"].items())
        return (
            f"from {plan['from']}, {plan['epochs']:g} epoch of {plan['old']:,} old and "
            f"{plan['new']:,} new pairs; held out: {plan['held_old']:,} old pairs of "
            f"{plan['held_old_prompts']:,} prompts, {plan['held_new']:,} new ones of "
            f"{plan['held_new_prompts']:,}\nsettings of OLD's run, unless named anew: {taken}"
        )

    def table(self) -> str:
        """Accuracy of both models on the held-out pairs, and what was decided."""
        from companion.evaluation.tables import format_table, percent

        rows = []
        for name, one in self.comparisons.items():
            found = one.metrics["pairs"]["accuracy"]
            part = name.removeprefix("continued_")
            who = "NEW" if part == name else "OLD gone on"
            rows.append(
                (
                    f"{who} on {part} pairs",
                    f"{one.metrics['n_rows']:,}",
                    percent(found["old"]["mean"]),
                    percent(found["new"]["mean"]),
                    percent(found["difference"], found["interval"]),
                )
            )
        head = ("accuracy, held out", "pairs", "OLD", "then", "difference [95%]")
        where = "published as" if self.published else "not published: it stands in"
        return "\n".join([format_table(head, rows), *self.reasons, f"{where} {self.folder}"])


def retrain(
    old_model: str | os.PathLike[str],
    data: Source,
    new: Source,
    output: str | os.PathLike[str],
    *,
    base: str | None = None,
    start: Literal["base", "old"] = "base",
    margin: float = 0.0,
    tolerance: float = 0.02,
    new_fraction: float = 0.3,
    also_continue: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
    arguments: Arguments | None = None,
    **settings: Any,
) -> Retraining:
    """Train a pairwise model anew on old and new pairs, and publish it if it is better.

    It is better if, in accuracy and by the lower end of the paired 95% interval over prompts, it
    gains more than `margin` on held-out new pairs and loses at most `tolerance` on held-out old
    ones. Under ``torchrun`` every rank must call; rank 0 compares and publishes.

    Parameters
    ----------
    old_model : path or str
        The model in use, a folder or a hub id. Its manifest names the base, and the settings of its
        run, which this one takes over; but it is always one epoch.
    data : path, str or rows
        Old pairs. Which of them are held out is decided as ``companion train`` does, with the
        share of the old model's run. By the fingerprint in its manifest it is known whether it was
        trained on them; if it had a ``split_seed``, ``limit`` or ``eval_dataset_name``, give it.
    new : path, str or rows
        New pairs, in any layout of pairs, or with ``a``, ``b`` and ``label`` (``a``, ``b``,
        ``tie``). Only those whose ``sampling`` is ``random``, or not named, are held out.
    output : path
        The new model's folder, which must not exist. Beside it: ``OUTPUT.rows`` with the pairs of
        training and those held out (the next run's `data` and ``eval_dataset_name``),
        ``OUTPUT.part`` while it is made, and ``OUTPUT.rejected`` if it is not better.
    base : str, optional
        In place of the base that the manifest names.
    start : {"base", "old"}
        ``old`` goes on with the weights and the head of the old model.
    margin, tolerance : float
        In accuracy, from 0 to 1.
    new_fraction : float, default 0.3
        Share of the new pairs that is held out, whole prompts.
    also_continue : bool
        Train a second model from the old one on the same pairs, only to compare.
    dry_run : bool
        Read and split the rows, and train nothing.
    say : callable, optional
        Gets lines of text on rank 0; default ``print``.
    arguments : callable, optional
        From defaults to the data arguments, model arguments and settings of training; else they
        are made of `settings`.
    **settings
        Any of :class:`companion.training.PairwiseRewardConfig`, ``ModelArguments`` and
        ``DataArguments``, in place of the old run's.

    Raises
    ------
    CompanionError
        For a model of another kind, a base that nobody names, rows or settings that cannot be used,
        and an output that exists.
    """
    from companion.training import train_pairwise
    from companion.training.trainer import whole_parameters

    manifest = _manifest_of(old_model)
    origin = str(old_model) if start == "old" else _base_of(manifest, base, old_model)
    target, rejected, part, kept = _places(output)
    fixed = {"model_name_or_path": origin, "dataset_name": data, "output_dir": str(part)}
    defaults = _settings_of(manifest)
    given, model, config = (arguments or _arguments_of(settings))({**defaults, **fixed})
    _check(start, given, model, config, fixed)
    main = config.process_index == 0
    tell: Callable[[str], None] = (say or print) if main else (lambda line: None)

    rows, counts, notes = _rows(given, new, new_fraction, manifest)
    notes += [*_differences(manifest, config), *_too_few(counts["held_old_prompts"], tolerance)]
    plan = {"old_model": str(old_model), "start": start, "from": origin, **counts}
    plan |= {"epochs": config.num_train_epochs, "settings": defaults}
    plan |= {"margin": margin, "tolerance": tolerance}
    result = Retraining(plan, notes)
    for line in [result.planned(), *(f"note: {note}" for note in notes)]:
        tell(line)
    if dry_run:
        return result

    with config.main_process_first(local=False):
        if main:
            with whole_parameters():
                _check_golden(str(old_model), config.trust_remote_code)
            _prepare(part, kept, rows, result, manifest, bool(config.resume_from_checkpoint))
    template = kept / _TEMPLATE
    if config.chat_template_path is None and template.exists():
        config.chat_template_path = str(template)
    pairs = type(given)(
        dataset_name=str(kept / "train.jsonl"),
        eval_dataset_name=str(kept / "held_out.jsonl"),
        calibration_fraction=given.calibration_fraction,
        split_seed=given.split_seed,
        margins="none" if given.margins == "none" else "given",  # made of ratings by now
    )
    made = {"": part}
    if also_continue and start == "base":
        made["continued_"] = part / "continued"
    for name, folder in made.items():
        own, from_old = copy.copy(config), start == "old" or name == "continued_"
        own.output_dir = str(folder)
        if name == "continued_":  # only to compare: it begins anew
            own.resume_from_checkpoint = None
        origin = str(old_model) if from_old else origin
        started = replace(model, model_name_or_path=origin, keep_head=from_old)
        train_pairwise(own, started, pairs, say=tell)
    if main:
        gc.collect()  # what the trainings held
        with whole_parameters():
            _compare(result, made, rows, config.trust_remote_code, target.name)
        on = result.comparisons
        result.published, result.reasons = is_better(on["old"], on["new"], margin, tolerance)
        result.folder = target if result.published else rejected
        _record(part, result)
        shutil.rmtree(part / "continued", ignore_errors=True)
        os.replace(part, result.folder)
        tell(result.table())
    return result


# ---------------------------------------------------------------------- before


def _manifest_of(old_model: str | os.PathLike[str]) -> RewardManifest:
    """The old model's manifest, if it is one of pairs."""
    from companion.models.checkpoint import find_file, resolve
    from companion.models.manifest import MANIFEST_FILE, RewardManifest

    path = find_file(resolve(old_model), MANIFEST_FILE, None)
    if path is None:
        raise ModelError(
            f"{old_model} has no {MANIFEST_FILE}, so nothing says how it was trained",
            "train the new one with companion train pairwise, and compare with companion compare",
        )
    manifest = RewardManifest.load(path)
    others = manifest.training and "train_pairs" not in manifest.training
    if manifest.kind != "scalar" or others:
        raise ModelError(
            f"{old_model} was not trained on pairs, and only such models are trained anew here",
            "train it with companion train kwise, outcome or process, on old and new rows together",
        )
    return manifest


def _base_of(manifest: RewardManifest, base: str | None, old_model: Any) -> str:
    """The base as named, or as the manifest names it."""
    from companion.data.sources import looks_like_path
    from companion.models.manifest import MANIFEST_FILE

    found, cure = base or manifest.base_model, "name it: --base ID, a folder or a hub id"
    if not found:
        raise ModelError(f"{old_model}: its manifest names no base", cure)
    folder = Path(found).expanduser()
    if looks_like_path(found) and not folder.is_dir():
        raise ModelError(f"the base of {old_model}, {found}, is not there", cure)
    if base is None and (folder / MANIFEST_FILE).is_file():
        raise ModelError(
            f"{old_model} went on from {found}, which is a reward model and no base",
            f"{cure}; or --base {found}, if that is meant",
        )
    return found


def _places(output: str | os.PathLike[str]) -> list[Path]:
    """The new model's folder, that of a rejected one, of one that is made, and of the rows."""
    target = Path(output)
    ends = ("", ".rejected", ".part", ".rows")
    places = [target.with_name(target.name + end) for end in ends]
    for path in places[:2]:
        if path.exists():
            raise ModelError(f"{path} exists", "name another --output, or move it away")
    part = places[2]
    if part.exists() and not (part / RECORD).is_file():
        raise ModelError(f"{part} exists, and no retraining made it", "move it away")
    return places


def _settings_of(manifest: RewardManifest) -> dict[str, Any]:
    """Settings of training that a new run takes over from the one that made a model.

    What an old run's machine or its length decided is left out.
    """
    from companion.training import PairwiseRewardConfig

    known = {own.name for own in fields(PairwiseRewardConfig) if own.init} - set(_NOT_TAKEN)
    found = {
        name: value
        for name, value in manifest.training.items()
        if name in known and value is not None
    }
    recipe = manifest.formatter
    found |= {
        name: recipe[name]
        for name in ("text", "split_special_tokens", "max_length", "overlong")
        if recipe.get(name) is not None
    }
    parts = [manifest.data.get(name, {}) for name in ("train", "held_out")]
    sizes = [part.get("rows", 0) for part in parts]
    if parts[0].get("source") == parts[1].get("source") and all(sizes):
        found["eval_fraction"] = sizes[1] / sum(sizes)  # and the same prompts are held out
    if lora := manifest.training.get("lora"):
        found |= {"use_peft": True, "use_rslora": lora["use_rslora"]}
        found |= {f"lora_{name}": lora[name] for name in ("r", "alpha", "dropout")}
        if isinstance(lora["target_modules"], list):
            found["lora_target_modules"] = lora["target_modules"]
    return found


def _arguments_of(settings: Mapping[str, Any]) -> Arguments:
    """What makes the three groups of training's settings of keyword arguments."""

    def make(defaults: dict[str, Any]) -> tuple[Any, Any, Any]:
        from companion.training import DataArguments, ModelArguments, PairwiseRewardConfig

        groups: Any = (DataArguments, ModelArguments, PairwiseRewardConfig)
        known = [{own.name for own in fields(group) if own.init} for group in groups]
        if unknown := [name for name in settings if not any(name in own for own in known)]:
            raise CompanionError(
                f"there is no setting {', '.join(unknown)}",
                "'companion train pairwise --help' lists every setting",
            )
        given = {**defaults, **settings}
        data, model, config = (
            group(**{name: given[name] for name in own & given.keys()})
            for group, own in zip(groups, known, strict=True)
        )
        return data, model, config

    return make


def _check(start: str, data: Any, model: Any, config: Any, fixed: Mapping[str, Any]) -> None:
    """Refuse settings that retraining decides itself."""
    if start not in ("base", "old"):
        raise CompanionError(f"start is {start!r}", "take base or old")
    for group in (data, model, config):
        for name, value in fixed.items():
            if getattr(group, name, value) != value:
                raise CompanionError(
                    f"--{name} is a setting of 'companion train'",
                    "name base, old pairs and folder by --base, --data and --output",
                )
    for name, why in (
        ("push_to_hub", "upload it when it is published: hf upload NAME FOLDER"),
        ("load_best_model_at_end", "it would choose by pairs that the comparison is made on"),
    ):
        if getattr(config, name):
            raise CompanionError(f"--{name} is not for retraining", f"leave it out: {why}")


# ---------------------------------------------------------------------- rows


def _rows(
    data: Any, new: Source, fraction: float, manifest: RewardManifest
) -> tuple[dict[str, Rows], dict[str, Any], list[str]]:
    """``train``, and held out ``old`` and ``new``; how many of each; what became of them."""
    from companion.data import dataset_fingerprint, prompt_key, split_by_prompt
    from companion.training.run import load_given, load_sets

    sets, _, notes = load_sets(data, "pairs")
    trained = manifest.data.get("train", {}).get("sha256") == dataset_fingerprint(sets["train"])
    apart = type(data)(
        dataset_name=os.fspath(new) if isinstance(new, os.PathLike) else new,  # type: ignore[arg-type]
        margins=data.margins,
        on_error=data.on_error,
    )
    given, _, said = load_given(apart, "pairs", margins=data.margins)
    notes += [f"new pairs: {note}" for note in said]

    old, held, fresh = ([dict(row) for row in part] for part in (*sets.values(), given))
    drawn = [row for row in fresh if row.get("sampling") in (None, "random")]
    if len(drawn) < len(fresh):
        notes.append(
            f"{len(fresh) - len(drawn):,} new pairs were chosen for labelling by another rule than "
            "chance: they are trained on, but not held out"
        )
    _, tested = split_by_prompt(drawn, fraction, seed=data.split_seed, exact=True)
    tested_keys = {prompt_key(row) for row in tested}
    out = tested_keys | {prompt_key(row) for row in held}
    parts = {
        "old": [row for row in old if prompt_key(row) not in out],
        "new": [row for row in fresh if prompt_key(row) not in out],
        "held_old": held,
        "held_new": [row for row in drawn if prompt_key(row) in out],
    }
    counts = {name: len(part) for name, part in parts.items()}
    for name in ("held_old", "held_new"):
        prompts = counts[f"{name}_prompts"] = len({prompt_key(row) for row in parts[name]})
        if prompts < FEWEST_PROMPTS:
            raise DataError(
                f"the held-out {name[5:]} pairs have {prompts} prompts: fewer than "
                f"{FEWEST_PROMPTS} say nothing",
                f"hold out more ({'--eval_fraction' if name == 'held_old' else '--new_fraction'}), "
                "or label more",
            )
    seen = len(old) - len(parts["old"])
    if seen:
        notes.append(
            f"{seen:,} old pairs are not trained on, since their prompts are held out; if OLD was "
            "trained on them, the figures flatter OLD"
        )
    if lost := len(fresh) - counts["new"] - counts["held_new"]:
        notes.append(f"{lost:,} new pairs are left out, since their prompts are held out")
    counts["old_held_out_is_clean"] = trained
    if not trained:
        notes.append(
            "by OLD's manifest it was trained on other rows than these old pairs without those "
            "held out: if it was trained on some of those, their figure flatters OLD (give "
            "--eval_fraction, --split_seed, --limit or --eval_dataset_name of its run; it held out "
            f"{manifest.data.get('held_out', {}).get('source', 'nobody knows what')})"
        )
    _same_form(parts, manifest.formatter.get("text"))
    kept = {
        name: [
            {key: row[key] for key in _KEPT if row.get(key) is not None} | {"subset": name[-3:]}
            for row in part
        ]
        for name, part in parts.items()
    }
    train = kept.pop("old") + kept.pop("new")
    return {"train": train, **kept}, counts, notes


def _same_form(parts: Mapping[str, Rows], text: str | None) -> None:
    """Make messages of all pairs if some are messages; refuse what no file of pairs can hold."""
    firsts = [part[0] for part in parts.values() if part]
    for name, cure in (
        ("prompt", "give both sets prompts"),
        ("margin", "leave margins out: --margins none"),
    ):
        if len({row.get(name) is None for row in firsts}) > 1:
            raise DataError(f"only the old or only the new pairs have the field {name!r}", cure)
    if len({isinstance(row["chosen"], str) for row in firsts}) == 1:
        return
    if isinstance(parts["held_old"][0]["chosen"], str) and text != "chat":
        raise DataError(
            "the old pairs are text that is read as it is, the new ones are messages",
            "give the new pairs as text",
        )
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    for row in chain.from_iterable(parts.values()):
        for name, role in roles.items():
            if isinstance(row[name], str):
                row[name] = [{"role": role, "content": row[name]}]


def _differences(manifest: RewardManifest, config: Any) -> list[str]:
    """In what else the two runs differ than in their pairs and their start."""
    old, notes = manifest.training, []
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    was = [old[name] for name in names if name in old]
    now = math.prod(getattr(config, name) for name in names)
    if len(was) == len(names) and math.prod(was) != now:
        notes.append(f"a step has {now} pairs; in OLD's run it had {math.prod(was)}")
    if old.get("num_train_epochs", 1) != config.num_train_epochs or old.get("max_steps", -1) > 0:
        notes.append(
            f"OLD was trained for {old.get('num_train_epochs')} epochs (max_steps "
            f"{old.get('max_steps')}), NEW for {config.num_train_epochs:g}"
        )
    return notes


def _too_few(prompts: int, tolerance: float) -> list[str]:
    """Before the training: can so few old pairs show that nothing is lost?"""
    half = 1.96 * math.sqrt(_PART / prompts)
    if half <= tolerance:
        return []
    needed = "" if tolerance <= 0 else f"hold out {math.ceil(_PART * (1.96 / tolerance) ** 2):,}, "
    return [
        f"on {prompts:,} held-out old prompts an interval ends about {half:.1%} off, if models "
        f"part on {_PART:.0%} of the pairs: even an equal model may not be published "
        f"({needed}or allow more: --tolerance)"
    ]


# ---------------------------------------------------------------------- after


def _check_golden(old_model: str, trust_remote_code: bool) -> None:
    """Before the training, not after it: is the old model as it was saved?"""
    from companion.scoring import RewardScorer, check_golden

    scorer = RewardScorer.from_pretrained(old_model, trust_remote_code=trust_remote_code)
    report = check_golden(scorer)
    if report is not None and not report.ok:
        raise ModelError(
            f"{old_model} is not as it was saved: {'; '.join(report.lines())}",
            "take the model that is in use, with its own tokenizer and manifest",
        )


def _prepare(
    part: Path,
    kept: Path,
    rows: Mapping[str, Rows],
    result: Retraining,
    manifest: RewardManifest,
    resumes: bool,
) -> None:
    """Write the rows, and a folder that is known to be ours."""
    from companion.data import write_rows

    if not resumes:
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, exist_ok=True)
    _record(part, result)
    write_rows(rows["train"], kept / "train.jsonl")
    write_rows([*rows["held_old"], *rows["held_new"]], kept / "held_out.jsonl")
    template = manifest.formatter.get("chat_template")  # NEW reads texts as OLD does
    (kept / _TEMPLATE).unlink(missing_ok=True)
    if isinstance(template, str):
        write_text(kept / _TEMPLATE, template)


def _record(folder: Path, result: Retraining) -> None:
    text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / RECORD, text + "\n")


def _compare(
    result: Retraining, made: Mapping[str, Path], rows: Mapping[str, Rows], trust: bool, name: str
) -> None:
    """Old against new on both held-out sets; the new model's reference is of the old pairs' texts.

    The models are read back from their folders, and their golden texts are checked.
    """
    from companion.evaluation import compare_scorers
    from companion.models import RewardManifest
    from companion.models.card import write_card
    from companion.scoring import RewardScorer

    old = RewardScorer.from_pretrained(result.plan["old_model"], trust_remote_code=trust)
    for prefix, folder in made.items():
        scorer = RewardScorer.from_pretrained(folder, trust_remote_code=trust)
        for part in ("old", "new"):
            found = compare_scorers(old, scorer, rows[f"held_{part}"], info={"pairs": part})
            result.comparisons[prefix + part] = found
        if prefix:
            continue
        manifest, found = RewardManifest.load(folder), result.comparisons["old"]
        source = f"{found.metrics['n_texts']:,} texts of held-out old pairs"
        manifest.reference = found.reference_of("new", source)
        manifest.notes += result.notes
        manifest.save(folder)
        write_card(folder, manifest, scorer.formatter, model_id=name)


def is_better(
    old_pairs: Comparison, new_pairs: Comparison, margin: float = 0.0, tolerance: float = 0.02
) -> tuple[bool, list[str]]:
    """Whether a new model takes the old one's place, and why or why not.

    Parameters
    ----------
    old_pairs, new_pairs : Comparison
        The old model against the new one on held-out old pairs and on held-out new pairs.
    margin, tolerance : float
        The paired 95% interval of the difference in accuracy must lie above `margin` on new pairs,
        and not below ``-tolerance`` on old ones.
    """
    found, reasons = [], []
    for name, one, bound in (("new", new_pairs, margin), ("old", old_pairs, -tolerance)):
        accuracy = one.metrics["pairs"]["accuracy"]
        low, difference = accuracy["interval"][0], accuracy["difference"]
        holds = low > bound if name == "new" else low >= bound
        wish = f"above {bound:.1%}" if name == "new" else f"at least {bound:.1%}"
        reason = f"{'holds' if holds else 'fails'}: on {name} pairs the interval begins {wish}: "
        reason += f"{low:+.1%}"
        if not holds and difference > bound:
            prompts = len(set(one.groups)) * ((difference - low) / (difference - bound)) ** 2
            reason += f" (if the difference stays, about {math.ceil(prompts):,} prompts show it)"
        found.append(bool(holds))
        reasons.append(reason)
    return all(found), reasons
