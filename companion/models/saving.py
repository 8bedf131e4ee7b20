"""Save a reward model: a plain Hugging Face checkpoint, its tokenizer, and the manifest.

Chapter 2.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from companion import __version__
from companion.errors import ModelError
from companion.models.guards import check_head, check_tokenizer_and_config
from companion.models.lora import is_lora, merged
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.reward_model import RewardModel

_PACKAGES = ("torch", "transformers", "tokenizers", "trl", "accelerate", "peft", "deepspeed")


def package_versions() -> dict[str, str]:
    """Versions of the companion and of the packages that decide a score."""
    versions = {"companion": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def save_reward_model(
    reward_model: RewardModel,
    directory: str | os.PathLike[str],
    manifest: RewardManifest | None = None,
    *,
    save_adapter: bool = False,
) -> RewardManifest:
    """Write the model so that stock transformers, TRL and vLLM load it and give the same score.

    Parameters
    ----------
    reward_model : RewardModel
        A LoRA model is merged (in a copy) first.
    directory : path
        Made if it does not exist.
    manifest : RewardManifest, optional
        Default: the one that the model came with, or a bare one. The formatter's recipe, the
        versions, the date and the notes are filled in here.
    save_adapter : bool
        Also keep the LoRA adapter, in ``adapter/``, with its tokenizer.

    Returns
    -------
    RewardManifest
        As written; ``reward_model.manifest`` is set to it.

    Raises
    ------
    ModelError, ReadoutError
        If a guard refuses the model: nothing is written.
    """

    def check(plain: Any) -> None:
        plain.config.problem_type = "regression"
        check_head(plain)

    manifest = manifest or reward_model.manifest or RewardManifest()
    return write_checkpoint(
        reward_model, directory, manifest, check=check, save_adapter=save_adapter
    )


def write_checkpoint(
    reward_model: RewardModel,
    directory: str | os.PathLike[str],
    manifest: RewardManifest,
    *,
    check: Callable[[Any], None],
    save_adapter: bool = False,
) -> RewardManifest:
    """Write model, tokenizer, recipe and manifest of any kind of reward model.

    Parameters
    ----------
    reward_model, directory, manifest, save_adapter
        As for :func:`save_reward_model`.
    check : callable
        Gets the plain (merged) model first; raises if it must not be saved.
    """
    model, tokenizer = reward_model.model, reward_model.tokenizer
    plain = merged(model)
    check(plain)
    check_tokenizer_and_config(tokenizer, plain.config)
    manifest.describe(reward_model.formatter)
    manifest.versions = package_versions()
    manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest.notes = list(dict.fromkeys([*manifest.notes, *reward_model.notes]))
    manifest.base_model = manifest.base_model or plain.config.name_or_path or None
    manifest.validate()

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # a manifest that stood here belongs to other weights: without it, a save that is interrupted
    # leaves no folder that claims to be whole
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    plain.save_pretrained(folder)
    reward_model.formatter.save_pretrained(folder)
    if save_adapter:
        if not is_lora(model):
            raise ModelError("save_adapter=True, but the model has no LoRA adapter")
        model.save_pretrained(folder / "adapter")
        reward_model.formatter.save_pretrained(folder / "adapter")
    manifest.save(folder)
    reward_model.manifest = manifest
    return manifest
