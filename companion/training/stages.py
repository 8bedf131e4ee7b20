"""The stages of a run that all kinds of training share: rows, base, tokens, figures, saving.

Chapter 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from companion.data.loading import load_rows_with_report
from companion.data.splits import overlap_report, prompt_key, split_by_prompt
from companion.errors import CompanionError, DataError
from companion.models.loading import load_base
from companion.models.lora import apply_lora
from companion.models.manifest import RewardManifest
from companion.models.reward_model import RewardModel
from companion.training.arguments import SourceArguments
from companion.training.config import (
    DataArguments,
    ModelArguments,
    PairwiseRewardConfig,
    RowArguments,
    describe_settings,
)
from companion.training.result import (
    ScoredSet,
    TrainingResult,
    describe_data,
    save_trained,
    temperature_and_reference,
    whole_parameters,
)
from companion.training.rows import FormatReport

Say = Callable[[str], None]


class Selectable(Protocol):
    """Scored rows, of which some can be taken as scored pairs."""

    def select(self, places: Sequence[int]) -> ScoredSet:
        """The pairs of some of the rows."""


@dataclass
class RowSets:
    """Rows to train on, rows to hold out, and where they came from."""

    train: Dataset
    held_out: Dataset
    train_source: str
    held_out_source: str
    notes: list[str]


@dataclass(frozen=True)
class RowKind:
    """What the start of a run has to know of its rows: their name, and how to tokenise them.

    ``format(dataset, formatter, source=…, num_proc=…)`` gives rows of token ids and a report;
    ``load(config, model)`` gives the base with a fresh head.
    """

    name: str
    format: Callable[..., tuple[Dataset, FormatReport]]
    load: Callable[[PairwiseRewardConfig, ModelArguments], RewardModel]


@dataclass
class Run:
    """A run before its training: all that was loaded, checked and tokenised."""

    config: PairwiseRewardConfig
    model: ModelArguments
    tell: Say
    resume: str | None
    sets: RowSets
    reward_model: RewardModel
    formatted: dict[str, Dataset]
    reports: dict[str, FormatReport]
    calibration_rows: list[int]
    test_rows: list[int]

    def manifest_data(self, calibration: int, test: int) -> dict[str, Any]:
        """Where the rows came from and what became of them."""
        sources = {"train": self.sets.train_source, "held_out": self.sets.held_out_source}
        parts = {"train": self.sets.train, "held_out": self.sets.held_out}
        described = {
            name: describe_data(sources[name], part, self.reports[name])
            for name, part in parts.items()
        }
        described["held_out"] |= {"calibration": calibration, "test": test}
        return described


def start_run(
    kind: RowKind,
    config: PairwiseRewardConfig,
    model: ModelArguments,
    data: RowArguments,
    *,
    say: Say | None = None,
) -> Run:
    """Load and check the rows, hold out whole prompts, load the base, tokenise.

    Raises
    ------
    CompanionError
        For settings, rows or a base that cannot be used, with the cure.
    """
    main = config.process_index == 0
    tell: Say = (say or print) if main else (lambda line: None)
    if not main:
        disable_progress_bars()
    _check_arguments(model, data)
    resume = checkpoint_of(config)
    sets = load_sets(data, kind.name)
    if main and sets.train_source != sets.held_out_source:
        overlap = overlap_report(sets.train, sets.held_out)
        if not overlap.clean:
            sets.notes.append(
                f"held-out prompts stand in the training rows: {overlap.shared_prompts:,} prompts, "
                f"{overlap.test_rows_affected:,} held-out rows; the figures flatter the model"
            )
    reward_model = kind.load(config, model)
    for note in [*sets.notes, *reward_model.notes]:
        tell(f"note: {note}")

    formatted: dict[str, Dataset] = {}
    reports: dict[str, FormatReport] = {}
    for name, part in {"train": sets.train, "held_out": sets.held_out}.items():
        formatted[name], reports[name] = kind.format(
            part,
            reward_model.formatter,
            source=name.replace("_", " "),
            num_proc=config.dataset_num_proc,
        )
        tell(str(reports[name]))
    calibration_rows, test_rows = halves(sets.held_out, formatted["held_out"], data)
    if calibration_rows is test_rows:
        note = (
            f"temperature and figures come from the same held-out {kind.name}, which flatters the "
            "calibration a little"
        )
        sets.notes.append(note)
        tell(f"note: {note}")
    return Run(
        config,
        model,
        tell,
        resume,
        sets,
        reward_model,
        formatted,
        reports,
        calibration_rows,
        test_rows,
    )


def train_and_score(
    run: Run, trainer_class: Callable[..., Any], callbacks: list[TrainerCallback] | None
) -> tuple[Any, dict[str, float], Any]:
    """Train, and score all held-out rows; every rank must call.

    Returns
    -------
    tuple
        The trainer; what its ``train()`` reports; the predictions in the order of the tokenised
        held-out rows.
    """
    rows = run.formatted["held_out"]
    trainer = trainer_class(
        run.reward_model.model,
        run.config,
        train_dataset=run.formatted["train"],
        eval_dataset=rows.select(run.calibration_rows),
        formatter=run.reward_model.formatter,
        processing_class=run.reward_model.tokenizer,
        callbacks=callbacks,
    )
    output = trainer.train(resume_from_checkpoint=run.resume)
    predictions = trainer.predict(rows, metric_key_prefix="held_out").predictions
    return trainer, output.metrics, predictions


def finish_scalar(
    run: Run, trainer: Any, train_metrics: dict[str, Any], scored: Selectable
) -> TrainingResult:
    """Calibrate, measure and save a model of one scalar; every rank must call."""
    calibration, test = scored.select(run.calibration_rows), scored.select(run.test_rows)
    notes = run.sets.notes
    told = len(notes)
    temperature, reference = temperature_and_reference(
        calibration, f"{len(calibration):,} held-out pairs of {run.sets.held_out_source}", notes
    )
    for note in notes[told:]:
        run.tell(f"note: {note}")
    manifest = RewardManifest(
        reference=reference,
        temperature=temperature,
        base_model=run.model.model_name_or_path,
        training={**describe_settings(run.config, run.model), **numbers(train_metrics)},
        notes=list(notes),
    )
    if run.config.process_index == 0:
        manifest.metrics = test.figures(temperature)
        manifest.data = run.manifest_data(len(calibration), len(test))
    reward_model = save_trained(trainer, run.reward_model, manifest)
    return TrainingResult(
        output_dir=Path(str(run.config.output_dir)),
        metrics=manifest.metrics,
        temperature=temperature,
        log_history=trainer.state.log_history,
        train_metrics=dict(train_metrics),
        calibration=calibration,
        test=test,
        reports=run.reports,
        reward_model=reward_model,
        manifest=manifest,
        notes=[*notes, *reward_model.notes],
    )


def load_sets(data: RowArguments, kind: str = "pairs") -> RowSets:
    """Load rows of a kind and split them by prompt.

    Raises
    ------
    DataError
        For rows that cannot be used, or too few prompts to hold any out.
    """
    margins = {"margins": data.margins} if isinstance(data, DataArguments) else {}
    rows, held, notes = load_given(data, kind, **margins)
    train_source = held_source = str(data.dataset_name)
    if held is None:
        train, held = split_by_prompt(rows, data.eval_fraction, seed=data.split_seed, exact=True)
        return RowSets(train, held, train_source, held_source, notes)
    held_source = f"{data.eval_dataset_name or data.dataset_name}"
    if data.eval_dataset_name is None:
        held_source += f" [{data.dataset_test_split}]"
    return RowSets(rows, held, train_source, held_source, notes)


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
    rows, report = load_rows_with_report(
        data.dataset_name,
        split=data.dataset_train_split,
        name=data.dataset_config,
        revision=data.dataset_revision,
        limit=data.limit,
        **settings,
    )
    notes = [f"{text} ({count:,} rows)" for text, count in report.notes.items()]
    for word, counter in (("skipped", report.skipped), ("left out", report.left_out)):
        notes += [f"{count:,} rows {word}: {why}" for why, count in counter.items()]
    if data.eval_dataset_name is None and data.dataset_test_split is None:
        return rows, None, notes
    other = data.eval_dataset_name is not None
    held, _ = load_rows_with_report(
        data.eval_dataset_name if other else data.dataset_name,
        split=data.dataset_test_split or "train",
        name=None if other else data.dataset_config,
        revision=None if other else data.dataset_revision,
        **settings,
    )
    return rows, held, notes


def halves(given: Dataset, rows: Dataset, data: RowArguments) -> tuple[list[int], list[int]]:
    """Split the formatted held-out rows by prompt: places for calibration, places for the figures.

    They are the same list if ``calibration_fraction`` is 1, or there is but one prompt.
    """
    keys: list[dict[str, Any]] = [
        {"place": i, "key": prompt_key(given[row])} for i, row in enumerate(rows["row"][:])
    ]
    everything = list(range(len(rows)))
    if data.calibration_fraction >= 1:
        return everything, everything
    try:
        test, calibration = split_by_prompt(
            keys, data.calibration_fraction, seed=data.split_seed + 1, key="key", exact=True
        )
    except DataError:
        return everything, everything
    places = [[row["place"] for row in part] for part in (calibration, test)]
    return places[0], places[1]


def _check_arguments(model: ModelArguments, data: RowArguments) -> None:
    for flag, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset_name", data.dataset_name),
    ):
        if not value:
            raise CompanionError(f"--{flag} is missing", "give it as a flag or in the YAML file")
    for flag, share, top in (
        ("eval_fraction", data.eval_fraction, False),
        ("calibration_fraction", data.calibration_fraction, True),
    ):
        if not (0 < share < 1 or (top and share == 1)):
            raise CompanionError(f"--{flag} is {share}", "give a share between 0 and 1")


def checkpoint_of(config: TrainingArguments) -> str | None:
    """The checkpoint to go on from: a path as given, or the last one for 'true' and 'last'."""
    asked = config.resume_from_checkpoint
    if asked is None or str(asked).lower() in ("false", "none", "no"):
        return None
    if str(asked).lower() in ("true", "last", "yes"):
        folder = str(config.output_dir)
        found = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if found is None:
            raise CompanionError(
                f"{folder}: there is no checkpoint to go on from",
                "leave out --resume_from_checkpoint, or check --output_dir",
            )
        return str(found)
    if not (Path(str(asked)) / "trainer_state.json").is_file():
        raise CompanionError(
            f"{asked}: is no training checkpoint (it has no trainer_state.json)",
            "give a folder checkpoint-N, or 'last'",
        )
    return str(asked)


def load_scalar(config: PairwiseRewardConfig, model: ModelArguments) -> RewardModel:
    """The base with a fresh head of one score, and an adapter if one is asked for."""
    with whole_parameters():
        reward_model = load_base(
            str(model.model_name_or_path),
            head_seed=config.seed,
            keep_head=model.keep_head,
            dtype=model.dtype,
            max_length=config.max_length,
            overlong=config.overlong,  # type: ignore[arg-type]
            chat_template=read_template(config),
            attn_implementation=model.attn_implementation,
            revision=model.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        fit_positions(reward_model, config)
        return with_lora(reward_model, model)


def read_template(config: PairwiseRewardConfig) -> str | None:
    """The chat template of ``--chat_template_path``, if one is given."""
    if config.chat_template_path is None:
        return None
    path = Path(config.chat_template_path)
    if not path.is_file():
        raise CompanionError(f"{path}: no such file", "give a Jinja file")
    return path.read_text(encoding="utf-8")


def with_lora(reward_model: RewardModel, model: ModelArguments) -> RewardModel:
    """The same model, wrapped for LoRA if ``--use_peft`` asks for it."""
    if model.use_peft:
        apply_lora(
            reward_model,
            r=model.lora_r,
            alpha=model.lora_alpha,
            dropout=model.lora_dropout,
            target_modules=model.lora_target_modules or "all-linear",
            use_rslora=model.use_rslora,
        )
    return reward_model


def fit_positions(reward_model: RewardModel, config: PairwiseRewardConfig) -> None:
    """A model cannot read beyond the positions that it was made for."""
    most = getattr(reward_model.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    if config.max_length is None or config.max_length > most:
        reward_model.notes.append(
            f"max_length set to {most} tokens (was {config.max_length}): the base has no more "
            "positions"
        )
        config.max_length = most
        reward_model.formatter.max_length = most


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The figures among what a trainer returns."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
