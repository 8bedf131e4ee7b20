"""The end of a run of a token-level model: the manifest, the saved folder, the table of figures.

Chapter 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from companion.data.splits import prompt_key
from companion.models.loading import load_base
from companion.models.manifest import RewardManifest
from companion.models.readout import TokenReadout
from companion.models.reward_model import RewardModel
from companion.training.config import ModelArguments, PairwiseRewardConfig, describe_settings
from companion.training.result import save_trained, whole_parameters
from companion.training.rows import FormatReport
from companion.training.stages import Run, fit_positions, numbers, read_template, with_lora


@dataclass
class TokenTrainingResult:
    """What ``train_outcome`` and ``train_process`` return.

    Attributes
    ----------
    output_dir : Path
        Folder of the model.
    readout : TokenReadout
        How its values are read, as in the manifest.
    metrics : dict
        Held-out figures (:mod:`companion.token_metrics`); empty on ranks other than 0.
    log_history : list of dict
        All that was logged.
    train_metrics : dict
        Run time, mean loss, and the like.
    reports : dict of str to FormatReport
        What became of the rows of each set.
    reward_model : RewardModel
        The trained model, in eval mode.
    manifest : RewardManifest
        As saved.
    notes : list of str
        What was repaired, assumed or dropped.
    """

    output_dir: Path
    readout: TokenReadout
    metrics: dict[str, Any]
    log_history: list[dict[str, Any]]
    train_metrics: dict[str, float]
    reports: dict[str, FormatReport]
    reward_model: RewardModel
    manifest: RewardManifest
    notes: list[str] = field(default_factory=list)


def load_start(config: PairwiseRewardConfig, model: ModelArguments, labels: int) -> RewardModel:
    """The base with a fresh head for every token, and an adapter if one is asked for."""
    with whole_parameters():
        loaded = load_base(
            str(model.model_name_or_path),
            labels=labels,
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
        fit_positions(loaded, config)
        return with_lora(loaded, model)


def prompts_of(run: Run, places: Sequence[int]) -> list[str]:
    """The prompt of each of some tokenised held-out rows, for the bootstrap."""
    rows, given = run.formatted["held_out"], run.sets.held_out
    return [prompt_key(given[int(rows[int(place)]["row"])]) for place in places]


def finish_token(
    run: Run,
    trainer: Any,
    train_metrics: dict[str, Any],
    readout: TokenReadout,
    metrics: dict[str, Any],
) -> TokenTrainingResult:
    """Save a token-level model with its manifest; every rank must call."""
    notes = run.sets.notes
    manifest = RewardManifest(
        readout=readout.to_dict(),
        base_model=run.model.model_name_or_path,
        training={**describe_settings(run.config, run.model), **numbers(train_metrics)},
        notes=list(notes),
    )
    if run.config.process_index == 0:
        manifest.metrics = metrics
        manifest.data = run.manifest_data(len(run.calibration_rows), len(run.test_rows))
    before = run.reward_model
    before.readout = readout

    def load(folder: str) -> RewardModel:
        found = load_base(folder, labels=readout.labels, keep_head=True)
        return replace(found, formatter=before.formatter, readout=readout)

    reward_model = save_trained(trainer, before, manifest, load=load)
    return TokenTrainingResult(
        output_dir=Path(str(run.config.output_dir)),
        readout=readout,
        metrics=manifest.metrics,
        log_history=trainer.state.log_history,
        train_metrics=dict(train_metrics),
        reports=run.reports,
        reward_model=reward_model,
        manifest=manifest,
        notes=[*notes, *reward_model.notes],
    )
