"""What a run leaves behind: scores of held-out pairs, figures, the manifest, the saved model.

Chapter 4.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from companion.calibration import fit_temperature
from companion.data.splits import dataset_fingerprint, prompt_key
from companion.errors import DataError
from companion.evaluation import gold_probability
from companion.metrics import pairwise_metrics
from companion.models.loading import load_reward_model
from companion.models.manifest import ReferenceStats, RewardManifest
from companion.models.reward_model import RewardModel
from companion.models.saving import save_reward_model
from companion.training.forward import remove_forward
from companion.training.rows import FormatReport


@dataclass
class ScoredSet:
    """Held-out pairs with their scores.

    Attributes
    ----------
    rows : list of dict
        The pairs that were scored.
    chosen, rejected : ndarray ``[n]``
        Raw scores.
    chosen_lengths, rejected_lengths : ndarray ``[n]``
        Tokens of the whole texts.
    """

    rows: list[dict[str, Any]]
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, places: Sequence[int]) -> ScoredSet:
        """Some of the pairs."""
        arrays = (self.chosen, self.rejected, self.chosen_lengths, self.rejected_lengths)
        index = np.asarray(places, dtype=np.int64)
        return ScoredSet([self.rows[i] for i in places], *(array[index] for array in arrays))

    def figures(self, temperature: float | None) -> dict[str, Any]:
        """All figures of :func:`companion.metrics.pairwise_metrics`."""
        subsets = None
        if any(row.get("subset") is not None for row in self.rows):
            subsets = [str(row.get("subset") or "(none)") for row in self.rows]
        try:
            groups = [prompt_key(row) for row in self.rows]
        except DataError:  # no prompts: the bootstrap then draws rows
            groups = None
        return pairwise_metrics(
            self.chosen,
            self.rejected,
            chosen_lengths=self.chosen_lengths,
            rejected_lengths=self.rejected_lengths,
            subsets=subsets,
            groups=groups,
            probability=gold_probability(self.rows)[0],
            temperature=temperature,
        )


@dataclass
class TrainingResult:
    """What :func:`companion.training.run.train_pairwise` returns.

    Attributes
    ----------
    output_dir : Path
        Folder of the model.
    metrics : dict
        Held-out figures (:func:`companion.metrics.pairwise_metrics`); empty on ranks other than 0.
    temperature : float
        T that calibrates ``sigmoid(margin / T)``.
    log_history : list of dict
        All that was logged, as transformers keeps it.
    train_metrics : dict
        Run time, mean loss, number of pairs.
    calibration, test : ScoredSet
        The held-out pairs with their scores; the same pairs if there were too few to split.
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
    metrics: dict[str, Any]
    temperature: float
    log_history: list[dict[str, Any]]
    train_metrics: dict[str, float]
    calibration: ScoredSet
    test: ScoredSet
    reports: dict[str, FormatReport]
    reward_model: RewardModel
    manifest: RewardManifest
    notes: list[str] = field(default_factory=list)


def scored_set(given: Dataset, rows: Dataset, predictions: np.ndarray) -> ScoredSet:
    """The `given` pairs with the scores ``[n, 2]`` of their tokenised `rows`."""
    sizes = [np.array([len(ids) for ids in rows[side]]) for side in ("chosen_ids", "rejected_ids")]
    return ScoredSet(
        [given[i] for i in rows["row"][:]],
        predictions[:, 0].astype(np.float64),
        predictions[:, 1].astype(np.float64),
        sizes[0],
        sizes[1],
    )


def temperature_and_reference(
    scored: ScoredSet, source: str, notes: list[str]
) -> tuple[float, ReferenceStats]:
    """Temperature of the margins, and statistics of all scores, of the calibration pairs.

    What the fit warns of (margins no better than a coin) is added to `notes`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        temperature = float(fit_temperature(scored.chosen - scored.rejected))
    notes += [str(warning.message) for warning in caught]
    both = np.concatenate([scored.chosen, scored.rejected])
    return temperature, ReferenceStats.from_scores(both, source)


def describe_data(source: str, rows: Dataset, report: FormatReport) -> dict[str, Any]:
    """Where a set came from, its fingerprint, and what became of its rows."""
    counts = {key: value for key, value in report.to_dict().items() if key != "source"}
    return {"source": source, "sha256": dataset_fingerprint(rows), **counts}


def save_trained(
    trainer: Any,
    reward_model: RewardModel,
    manifest: RewardManifest,
    *,
    load: Callable[[str], RewardModel] = load_reward_model,
    save: Callable[[RewardModel, str, RewardManifest], Any] = save_reward_model,
) -> RewardModel:
    """Save the trained model with its manifest; every rank must call.

    `load` reads a checkpoint of the model's kind, `save` writes it.

    Under ZeRO-3 and FSDP no rank holds the whole model: the shards are gathered into a checkpoint
    first, which rank 0 then reads on the CPU (merging a LoRA adapter) and completes.
    """
    folder = str(trainer.args.output_dir)
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
    if sharded:
        trainer.save_model(folder)
        accelerator.wait_for_everyone()
        if trainer.args.process_index == 0:
            notes = reward_model.notes
            with whole_parameters():
                reward_model = load(folder)
            reward_model.notes = notes
            save(reward_model, folder, manifest)
    else:
        model = accelerator.unwrap_model(trainer.model)
        remove_forward(model)
        model.eval()
        reward_model.model = model
        if trainer.args.process_index == 0:
            save(reward_model, folder, manifest)
    reward_model.manifest = manifest
    accelerator.wait_for_everyone()
    return reward_model


@contextlib.contextmanager
def whole_parameters() -> Iterator[None]:
    """Load a model in full on the CPU although ZeRO-3 is on.

    transformers would partition each parameter as it is made: the fresh head could not be drawn
    from a seed, and a load on one rank alone would wait for the others for ever. DeepSpeed
    partitions the model when it is prepared, a moment later.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and reference() is not None:
            deepspeed.set_hf_deepspeed_config(reference())
