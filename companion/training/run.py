"""A run of training of any kind: from files of rows and a base to a saved reward model.

Load and check the rows; hold out whole prompts; tokenise; train; on a part of the held-out rows fit
what the manifest says of the scores; on the others, which nothing was chosen by, compute the
figures; save all of it as one checkpoint. Chapter 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypedDict

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from companion.data.loading import load_rows, load_rows_with_report
from companion.data.mixing import recipe_of
from companion.data.pages import release_pages, sparing
from companion.data.sources import source_name
from companion.data.splits import (
    dataset_fingerprint,
    duplicate_report,
    overlap_report,
    prompt_key,
    row_digests,
    split_by_prompt,
)
from companion.engine.devices import device_notes
from companion.errors import CompanionError, DataError
from companion.layouts import columns_of
from companion.models.card import write_card
from companion.models.hub import open_destination
from companion.models.loading import load_base, load_reward_model
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.readout import readout_from_dict
from companion.models.reward_model import RewardModel
from companion.models.saving import save_reward_model
from companion.scoring import add_golden_texts
from companion.training.checkpoints import (
    all_written,
    check_run,
    checkpoint_of,
    fingerprint_of,
    take_date,
)
from companion.training.config import (
    DataArguments,
    ModelArguments,
    PairwiseRewardConfig,
    RowArguments,
    SourceArguments,
    check_optimizer,
    describe_settings,
    require,
)
from companion.training.kind import E, Kind
from companion.training.launching import require_launcher
from companion.training.rows import FormatReport
from companion.training.trainer import decide_text, is_sharded, load_start, whole_parameters

Say = Callable[[str], None]


@dataclass
class TrainingResult(Generic[E]):
    """What :func:`train` returns.

    Attributes
    ----------
    output_dir : Path
        Folder of the model.
    calibration, test : Evaluation
        The held-out rows with their scores: those that the manifest was calibrated on, and those
        of the figures. The same rows if there were too few to split.
    log_history : list of dict
        All that was logged, as transformers keeps it.
    train_metrics : dict
        Run time, mean loss, weight of all items.
    reports : dict of str to FormatReport
        What became of the rows of each set.
    reward_model : RewardModel
        The trained model, in eval mode (on every rank; of no use there under ZeRO-3).
    manifest : RewardManifest
        As saved.
    notes : list of str
        What was repaired, assumed or dropped.
    """

    output_dir: Path
    calibration: E
    test: E
    log_history: list[dict[str, Any]]
    train_metrics: dict[str, float]
    reports: dict[str, FormatReport]
    reward_model: RewardModel
    manifest: RewardManifest
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, Any]:
        """The held-out figures, those of ``companion evaluate``; empty on ranks other than 0."""
        return self.test.metrics

    @property
    def temperature(self) -> float | None:
        """T that calibrates ``sigmoid(margin / T)``; None for token-level models."""
        return self.manifest.temperature

    def summary(self) -> str:
        """The table that ends a run."""
        return f"{self.test.closing(self.calibration)}\nsaved in {self.output_dir}"


class Options(TypedDict, total=False):
    """What :func:`train` may be given beside the settings."""

    say: Say | None
    callbacks: list[TrainerCallback] | None


def train(
    kind: Kind[E],
    config: PairwiseRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    *,
    say: Say | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainingResult[E]:
    """Train, calibrate, measure and save a reward model of any kind; every rank must call.

    Parameters
    ----------
    kind : Kind
    config : PairwiseRewardConfig
        Of the kind's own class. ``output_dir`` becomes a plain Hugging Face checkpoint with
        ``reward_manifest.json``; training checkpoints lie in it as ``checkpoint-N``. With
        ``push_to_hub`` it is uploaded when all is done.
    model : ModelArguments
        The base, and whether to train a LoRA adapter.
    data : RowArguments
        The rows, of the kind's own kind, and which to hold out.
    say : callable, optional
        Gets lines of text on rank 0; default: ``print``.
    callbacks : list of TrainerCallback, optional

    Raises
    ------
    CompanionError
        For settings, rows, a base or a hub that cannot be used, with the cure.
    """
    main = config.process_index == 0
    tell: Say = (say or print) if main else (lambda line: None)
    if not main:
        disable_progress_bars()
    _check_arguments(model, data)
    require_launcher(config)
    destination, config = open_destination(config)
    resume = checkpoint_of(config)
    sets, sources, notes = load_sets(data, kind.rows)
    held_out = sets["held_out"]
    if main:
        own = [part for name, part in sets.items() if sources[name] == sources["train"]]
        notes += duplicate_report(chain.from_iterable(map(sparing, own)), n_examples=0).notes(
            kind.rows
        )
    if main and sources["train"] != sources["held_out"]:
        overlap = overlap_report(sets["train"], held_out)
        if not overlap.clean:
            notes.append(
                f"held-out prompts stand in the training rows: {overlap.shared_prompts:,} prompts, "
                f"{overlap.test_rows_affected:,} held-out rows; the figures flatter the model"
            )
    release_pages(*sets.values())
    start = load_start(kind.trainer.labels(config), config, model)
    take_date(start.formatter, resume)
    said = decide_text(start.formatter, sets["train"], config)
    notes += [said] if said else []
    for note in [*notes, *start.notes]:
        tell(f"note: {note}")

    formatted: dict[str, Dataset] = {}
    reports: dict[str, FormatReport] = {}
    for name, part in sets.items():
        formatted[name], reports[name] = kind.trainer.format_rows(
            part, start.formatter, config, name.replace("_", " ")
        )
        tell(str(reports[name]))
    release_pages(*sets.values(), *formatted.values())
    rows = formatted["held_out"]
    calibration_rows, test_rows = _halves(held_out, rows, data)
    if calibration_rows == test_rows:
        notes.append(
            f"temperature and figures come from the same held-out {kind.rows}, which flatters the "
            "calibration a little"
        )
        tell(f"note: {notes[-1]}")

    check_optimizer(config, start.model)
    named, base = config.learning_rate, fingerprint_of(start.model, main)
    trainer: Any = kind.trainer(
        start,
        config,
        train_dataset=formatted["train"],
        eval_dataset=rows.select(calibration_rows),
        callbacks=callbacks,
    )
    for note in _device_notes(trainer):
        tell(note)
    if named is None:
        tell(f"learning rate {config.learning_rate:g}: the default of what is trained")
    release_pages(*formatted.values())  # (the trainer has looked at all of them)
    digests = {name: row_digests(part) for name, part in sets.items()}
    release_pages(*sets.values())
    trainer.run = _run_of(kind, config, model, start, digests, base)
    if other := check_run(resume, trainer.run, config.resume_other_run):
        notes.append(other)
        tell(f"note: {other}")
    reported = trainer.train(resume_from_checkpoint=resume).metrics
    predictions = trainer.predict(rows, metric_key_prefix="held_out").predictions

    manifest = RewardManifest(
        base_model=model.model_name_or_path,
        training={
            **describe_settings(config, model),
            **{name: value for name, value in reported.items() if isinstance(value, (int, float))},
        },
        readout=kind.trainer.readout(config).to_dict(),
    )

    def scored(places: list[int]) -> E:
        own = rows.select(places)
        given = [held_out[row] for row in own["row"][:]]
        return kind.scored(given, own, predictions[places], manifest)

    calibration = scored(calibration_rows)
    for warning in calibration.calibrate(manifest, sources["held_out"]):
        notes.append(warning)
        tell(f"note: {warning}")
    test = scored(test_rows)
    manifest.notes = list(notes)
    if main:
        manifest.metrics = test.measure().metrics
        manifest.data = {
            name: _describe(sources[name], own, reports[name], recipe_of(sets[name]))
            for name, own in digests.items()
        }
        manifest.data["held_out"] |= {"calibration": len(calibration), "test": len(test)}
    reward_model = _save(trainer, start, manifest)
    if destination is not None:
        folder, repo_id = str(config.output_dir), destination.repo_id
        write_card(folder, manifest, reward_model.formatter, model_id=repo_id)
        tell(f"uploaded to {destination.upload(folder)}")
    return TrainingResult(
        output_dir=Path(str(config.output_dir)),
        calibration=calibration,
        test=test,
        log_history=trainer.state.log_history,
        train_metrics=dict(reported),
        reports=reports,
        reward_model=reward_model,
        manifest=manifest,
        notes=[*notes, *reward_model.notes],
    )


def _device_notes(trainer: Any) -> list[str]:
    """What was chosen for this device, and why; empty on a CPU."""
    args = trainer.args
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    notes = device_notes(trainer.model, packed=trainer.own_collator.packing, autocast=autocast)
    if notes:
        size = f"micro-batches of {args.per_device_train_batch_size} {trainer.items}"
        most = args.micro_batch_tokens
        notes.append(
            f"{size}, in parts of up to {most:,} tokens"
            if most
            else f"{size}, however long (--micro_batch_tokens sets a limit)"
        )
    return notes


# ---------------------------------------------------------------------- rows


def load_sets(
    data: RowArguments, kind: str
) -> tuple[dict[str, Dataset], dict[str, str], list[str]]:
    """Rows of a kind, ``train`` and ``held_out``, split by prompt if need be.

    Returns
    -------
    sets, sources : dict of str to Dataset, dict of str to str
        The rows by name, and where they came from.
    notes : list of str
        What became of the rows.

    Raises
    ------
    DataError
        For rows that cannot be used, or too few prompts to hold any out.
    """
    margins = {"margins": data.margins} if isinstance(data, DataArguments) else {}
    rows, held, notes = load_given(data, kind, **margins)
    source = held_source = source_name(data.dataset_name)
    if held is None:
        rows, held = split_by_prompt(rows, data.eval_fraction, seed=data.split_seed, exact=True)
    elif data.eval_dataset_name is not None:
        held_source = data.eval_dataset_name
    else:
        held_source = f"{source} [{data.dataset_test_split}]"
    return {"train": rows, "held_out": held}, {"train": source, "held_out": held_source}, notes


def load_given(
    data: SourceArguments, kind: str, **settings: Any
) -> tuple[Dataset, Dataset | None, list[str]]:
    """The rows, the held-out rows if they are named, and notes of what became of the first.

    Raises
    ------
    DataError
        For rows that cannot be used.
    """
    settings |= {"kind": kind, "on_error": data.on_error}
    settings["columns"] = columns_of(data.columns or ())
    where: Any = {"name": data.dataset_config, "revision": data.dataset_revision}
    rows, report = load_rows_with_report(
        data.dataset_name,
        split=data.dataset_train_split,
        limit=data.limit,
        **where,
        **settings,
    )
    notes = [f"{text} ({count:,} rows)" for text, count in report.notes.items()]
    for word, counter in (("skipped", report.skipped), ("left out", report.left_out)):
        notes += [f"{count:,} rows {word}: {why}" for why, count in counter.items()]
    if data.eval_dataset_name is None and data.dataset_test_split is None:
        return rows, None, notes
    source = data.dataset_name
    if data.eval_dataset_name is not None:
        source, where = data.eval_dataset_name, {}
    split = data.dataset_test_split or "train"
    return rows, load_rows(source, split=split, **where, **settings), notes


def _halves(given: Dataset, rows: Dataset, data: RowArguments) -> tuple[list[int], list[int]]:
    """Split the formatted held-out rows by prompt: places for calibration, places for the figures.

    They are equal if ``calibration_fraction`` is 1, or there is but one prompt.
    """
    keys: list[dict[str, Any]] = [
        {"place": i, "key": prompt_key(given[row])} for i, row in enumerate(rows["row"][:])
    ]
    try:
        halves = split_by_prompt(
            keys, data.calibration_fraction, seed=data.split_seed + 1, key="key", exact=True
        )
    except DataError:  # one half would be empty
        halves = keys, keys
    test, calibration = ([row["place"] for row in half] for half in halves)
    return calibration, test


def _describe(
    source: str, rows: np.ndarray, report: FormatReport, mix: dict[str, Any] | None
) -> dict[str, Any]:
    """Where a set came from, its fingerprint, what became of its rows, the recipe of a mixture."""
    counts = {key: value for key, value in report.to_dict().items() if key != "source"}
    recipe = {} if mix is None else {"mix": mix}
    return {"source": source, "sha256": dataset_fingerprint(rows), **counts, **recipe}


def _check_arguments(model: ModelArguments, data: RowArguments) -> None:
    require(model_name_or_path=model.model_name_or_path, dataset_name=data.dataset_name)
    for flag, good in (
        ("eval_fraction", 0 < data.eval_fraction < 1),
        ("calibration_fraction", 0 < data.calibration_fraction <= 1),
    ):
        if not good:
            raise CompanionError(
                f"--{flag} is {getattr(data, flag)}", "give a share between 0 and 1"
            )


def _run_of(
    kind: Kind[Any],
    config: PairwiseRewardConfig,
    model: ModelArguments,
    start: RewardModel,
    digests: dict[str, np.ndarray],
    base: str,
) -> dict[str, Any]:
    """What decides the result of a run, for its checkpoints."""
    settings = describe_settings(config, model)
    parts = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    rows = math.prod(settings.pop(name) for name in parts)  # they may share it in another way
    del settings["activation_checkpointing"]
    return {
        "trainer": kind.trainer.__name__,
        "base and head": base,
        "rows": {name: dataset_fingerprint(part, ordered=True) for name, part in digests.items()},
        "formatter": start.formatter.fingerprint(),
        "rows a step": rows,
        **settings,
    }


# ---------------------------------------------------------------------- the model


def _save(trainer: Any, start: RewardModel, manifest: RewardManifest) -> RewardModel:
    """Save the trained model with its manifest; every rank must call.

    Under ZeRO-3 and FSDP no rank holds the whole model: the shards are gathered into a checkpoint
    first, which rank 0 then reads on the CPU (merging a LoRA adapter) and completes.
    """
    folder, rank = str(trainer.args.output_dir), trainer.args.process_index
    labels = trainer.labels(trainer.args)
    reward_model = start
    if not is_sharded(trainer):
        reward_model = trainer.reward_model()
    else:
        trainer.save_model(folder)
        trainer.accelerator.wait_for_everyone()
        if rank == 0:
            with whole_parameters():
                found = (
                    load_reward_model(folder)
                    if labels is None
                    else load_base(folder, labels=labels, keep_head=True)
                )
            reward_model = replace(found, formatter=start.formatter, notes=start.notes)
    reward_model.readout = readout_from_dict(manifest.readout, MANIFEST_FILE)
    if rank == 0:
        with all_written(Path(folder), "reward model"):
            save_reward_model(reward_model, folder, manifest, describe=add_golden_texts)
    reward_model.manifest = manifest
    trainer.accelerator.wait_for_everyone()
    return reward_model
