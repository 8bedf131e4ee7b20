"""Save a reward model: a plain Hugging Face checkpoint, its tokenizer, and the manifest.

Chapter 2.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from companion import __version__
from companion.errors import ModelError
from companion.models.card import write_card
from companion.models.guards import check_head, check_tokenizer_and_config, prepare_token_head
from companion.models.head import ProbabilityHead, TwoLayerHead, find_head
from companion.models.identity import identity_of
from companion.models.lora import is_lora, merged
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.readout import readout_from_dict
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
    describe: Callable[[RewardModel, RewardManifest], None] | None = None,
) -> RewardManifest:
    """Write a model of any kind so that stock transformers loads it and gives the same values.

    TRL and vLLM load one of the kind that gives a text one score. ``README.md`` becomes the model's
    card, unless one that was written by hand stands there.

    Parameters
    ----------
    reward_model : RewardModel
        A LoRA model is merged (in a copy) first.
    directory : path
        Made if it does not exist.
    manifest : RewardManifest, optional
        Default: the one that the model came with, or a bare one. The formatter's recipe, the
        read-out, the versions, the date and the notes are filled in here. A model that has no
        read-out yet takes the manifest's.
    save_adapter : bool
        Also keep the LoRA adapter, in ``adapter/``, with its tokenizer.
    describe : callable, optional
        Called with the model as it is written (merged) and its manifest, before that is written:
        :func:`companion.scoring.add_golden_texts`. Without it, golden texts of other weights are
        left out, with a note.

    Returns
    -------
    RewardManifest
        As written; ``reward_model.manifest`` and ``readout`` are set to it.

    Raises
    ------
    ModelError, ReadoutError
        If a guard refuses the model: nothing is written.
    """
    model, tokenizer = reward_model.model, reward_model.tokenizer
    manifest = manifest or reward_model.manifest or RewardManifest()
    readout = reward_model.readout or readout_from_dict(manifest.readout, MANIFEST_FILE)
    if reward_model.readout is None and readout.kind == "scalar":
        raise ModelError(
            "the model has a value for each token, and nothing says how they are read",
            "set reward_model.readout to a TokenReadout",
        )
    plain = merged(model)
    head = find_head(plain)
    if isinstance(head, (TwoLayerHead, ProbabilityHead)):
        raise ModelError(
            f"the head is a {type(head).__name__}: stock classes would load the saved checkpoint "
            "with a random one, without a word",
            "leave the checkpoint as it is, and write the manifest for it: companion adopt",
        )
    readout = replace(readout, read_as=None)  # what is written is a plain checkpoint
    if readout.kind == "scalar":
        plain.config.problem_type = "regression"
        # CrossEncoder, and vLLM's /score, would take the sigmoid of one label
        plain.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        check_head(plain)
    else:
        prepare_token_head(plain, readout.labels)
    check_tokenizer_and_config(tokenizer, plain.config)
    manifest.readout = readout.to_dict()
    manifest.describe(reward_model.formatter)
    manifest.versions = package_versions()
    manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest.notes = list(dict.fromkeys([*manifest.notes, *reward_model.notes]))
    manifest.base_model = manifest.base_model or plain.config.name_or_path or None
    written = replace(reward_model, model=plain, readout=readout, source=None)
    if describe is not None:
        describe(written, manifest)
    elif manifest.golden_texts is not None:
        weights = identity_of(written).weights
        if manifest.golden_texts.hashes.get("weights") != weights:
            manifest.golden_texts = None
            manifest.notes.append("golden texts of other weights were left out")
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
    write_card(folder, manifest, reward_model.formatter)
    reward_model.manifest, reward_model.readout = manifest, readout
    return manifest
