"""Load a base for training, or a reward model for use; refuse what is neither.

``AutoModelForSequenceClassification`` draws a random head for a checkpoint that has none, and TRL
suppresses the warning: such a model scores, and its scores mean nothing. Here that is an error.
Chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from companion.errors import ModelError
from companion.formatting import RECIPE_FILE, Overlong, RewardFormatter
from companion.models.checkpoint import (
    checkpoint_keys,
    find_file,
    is_adapter,
    read_json,
    read_tensor,
)
from companion.models.guards import check_head, check_tokenizer_and_config, precision_notes
from companion.models.head import head_name, initialise_head, install_head
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.padding import choose_pad_token
from companion.models.pieces import (
    PathLike,
    add_rows,
    as_dtype,
    disable_dropout,
    load_config,
    load_tokenizer,
    load_weights,
    resolve,
    set_pad,
)
from companion.models.reward_model import RewardModel

_HEAD = "score.weight"


def load_base(
    path_or_id: PathLike,
    *,
    head_seed: int = 0,
    head_std: float | None = None,
    keep_head: bool = False,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    max_length: int | None = None,
    overlong: Overlong = "drop",
    chat_template: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load any decoder as the start of a reward model: one label, fresh head, no dropout.

    Parameters
    ----------
    path_or_id : str or path
        A folder or a hub id of a causal LM (or of an earlier reward model).
    head_seed, head_std : int, float
        The fresh head is drawn from N(0, head_std²), by default std = 1/sqrt(D + 1); see
        :func:`companion.models.head.initialise_head`.
    keep_head : bool
        Keep the head of an earlier reward model in place of a fresh one.
    dtype : torch.dtype or str
        Of the weights. The head stays in float32.
    device : str, optional
        Where to put the model; default: it stays on the CPU (a trainer moves it).
    max_length, overlong, chat_template
        For :class:`companion.formatting.RewardFormatter`.
    attn_implementation, revision, trust_remote_code
        For transformers.

    Returns
    -------
    RewardModel
        Its ``notes`` say, a line each, what was repaired (the pad token, above all).

    Raises
    ------
    ModelError
        For a wrong folder, a model that is no decoder, or weights that are missing.
    ReadoutError
        For a tokenizer without EOS, with the cure.
    """
    return load_with_fresh_head(
        path_or_id,
        SCALAR,
        head_seed=head_seed,
        head_std=head_std,
        keep_head=keep_head,
        dtype=dtype,
        device=device,
        max_length=max_length,
        overlong=overlong,
        chat_template=chat_template,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


@dataclass(frozen=True)
class HeadLayout:
    """A head that a base is given: how many labels, and which of transformers' classes has it."""

    labels: int
    auto_class: str
    problem_type: str | None


#: one score a text
SCALAR = HeadLayout(1, "AutoModelForSequenceClassification", "regression")


def load_with_fresh_head(
    path_or_id: PathLike,
    layout: HeadLayout,
    *,
    head_seed: int,
    head_std: float | None,
    keep_head: bool,
    dtype: torch.dtype | str,
    device: str | torch.device | None,
    max_length: int | None,
    overlong: Overlong,
    chat_template: str | None,
    attn_implementation: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> RewardModel:
    """What :func:`load_base` does, for any head; see there for the parameters and errors."""
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_adapter(name, revision):
        raise ModelError(
            f"{name}: holds a LoRA adapter, not a base",
            "give the base, or merge the adapter: save_reward_model(load_reward_model(folder), …)",
        )
    config = load_config(name, **shared)
    tokenizer = load_tokenizer(name, **shared)
    notes: list[str] = []
    had = config.num_labels
    keys = checkpoint_keys(name, revision)
    has_head = keys is not None and _HEAD in keys
    config.num_labels = layout.labels
    config.problem_type = layout.problem_type
    dropout = disable_dropout(config)
    if layout is not SCALAR:
        config.classifier_dropout = 0.0  # without the entry, stock token heads drop 0.1
    if dropout:
        notes.append(f"dropout switched off ({', '.join(dropout)}): a score has no randomness")

    text = config.get_text_config()
    pad = choose_pad_token(tokenizer, text.pad_token_id)  # refuses a tokenizer without EOS
    notes.extend(pad.notes)
    rows = int(text.vocab_size)
    text.pad_token_id = pad.token_id if pad.token_id < rows else None
    if has_head and had != layout.labels:
        raise ModelError(
            f"{name}: is a classifier of {had} labels",
            f"give a causal LM, or a reward model with num_labels={layout.labels}",
        )
    model, missing = load_weights(
        name,
        config,
        as_dtype(dtype),
        attn_implementation=attn_implementation,
        auto_class=layout.auto_class,
        **shared,
    )
    own = f"{head_name(model)}.weight"
    unexpected_gaps = sorted(missing - {own, own.replace("weight", "bias")})
    if unexpected_gaps:
        raise ModelError(
            f"{name}: the checkpoint lacks {len(unexpected_gaps)} weights of the backbone "
            f"({', '.join(unexpected_gaps[:3])}, …)",
            "the download or the folder is incomplete; fetch it again",
        )
    if pad.token_id >= rows:
        add_rows(model, pad.token_id + 1)
        notes.append(f"embeddings grown from {rows} to {pad.token_id + 1} rows for the pad token")
    set_pad(model, pad.token_id)
    head = install_head(model)
    head.to(torch.float32)
    if keep_head and own not in missing:
        stored = read_tensor(name, own, revision)
        if stored is not None:
            with torch.no_grad():
                head.weight.copy_(stored)
        notes.append("went on with the head of the checkpoint")
    else:
        if keep_head:
            raise ModelError(f"{name}: keep_head=True, but the checkpoint has no head")
        std = initialise_head(head, head_seed, head_std)
        had_one = "in place of the checkpoint's own, " if own not in missing else ""
        notes.append(f"fresh head, {had_one}seed {head_seed}, std {std:.4g}")
    if device is not None:
        model.to(device)
    check_tokenizer_and_config(tokenizer, model.config)
    formatter = RewardFormatter(
        tokenizer, max_length=max_length, overlong=overlong, chat_template=chat_template
    )
    notes.extend(formatter.notes)
    notes.extend(precision_notes(model))
    return RewardModel(model, tokenizer, formatter, None, notes)


def load_reward_model(
    path_or_id: PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load a trained reward model in eval mode, or say why the checkpoint is none.

    Takes a folder (or hub id) with a plain sequence-classification checkpoint, or with a LoRA
    adapter whose base can be found; the adapter is merged. A checkpoint that the companion did not
    save has no manifest: allowed, with a note; its formatter is built from the tokenizer.

    Raises
    ------
    ModelError
        For a wrong folder, a checkpoint without ``score.weight``, several labels, missing weights,
        a damaged manifest, or a tokenizer that is not the one of the manifest.
    ReadoutError
        For a pad token that is missing, is the EOS, or differs from the configuration's.
    """
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    kind = as_dtype(dtype)
    if is_adapter(name, revision):
        from companion.models.lora import load_adapter

        model, tokenizer = load_adapter(
            name,
            kind,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    else:
        config = load_config(name, **shared)
        _refuse_token_level(name, config)
        keys = checkpoint_keys(name, revision)
        if keys is not None and _HEAD not in keys:
            _refuse_headless(name, config)
        if config.num_labels != 1:
            raise ModelError(
                f"{name}: num_labels is {config.num_labels}; a reward model has one scalar",
                "use a checkpoint that was trained with num_labels=1",
            )
        tokenizer = load_tokenizer(name, **shared)
        disable_dropout(config)
        model, missing = load_weights(
            name, config, kind, attn_implementation=attn_implementation, **shared
        )
        if _HEAD in missing:
            _refuse_headless(name, config)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise ModelError(
                f"{name}: the checkpoint lacks {len(missing)} weights ({some}, …); transformers "
                "would fill them with random numbers",
                "save the model anew, or fetch the folder again",
            )
        head = install_head(model)
        head.to(torch.float32)
        stored = read_tensor(name, _HEAD, revision) if kind != torch.float32 else None
        if stored is not None:  # the head as it was saved, not rounded to half precision
            with torch.no_grad():
                head.weight.copy_(stored)
    notes: list[str] = []
    if model.config.problem_type != "regression":
        notes.append(
            f"config.problem_type was {model.config.problem_type!r}: vLLM and others would apply a "
            "sigmoid to the score; set to 'regression', save the model to keep it"
        )
        model.config.problem_type = "regression"
    check_head(model)
    check_tokenizer_and_config(tokenizer, model.config)
    manifest, formatter = _load_manifest(name, tokenizer, revision, notes)
    notes.extend(formatter.notes)
    notes.extend(precision_notes(model))
    model.eval()
    if device is not None:
        model.to(device)
    return RewardModel(model, tokenizer, formatter, manifest, notes)


def load_formatter(
    path_or_id: PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[RewardFormatter, RewardManifest | None]:
    """The formatter and the manifest of a reward model, without its weights.

    For a client whose reward model runs on a server: the token ids are made here, by the recipe
    that was saved with the model.

    Raises
    ------
    ModelError
        For a folder without a tokenizer, a damaged manifest, or a tokenizer that is not the one of
        the manifest.
    """
    name = resolve(path_or_id)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    manifest, formatter = _load_manifest(name, tokenizer, revision, [])
    return formatter, manifest


# ---------------------------------------------------------------------- inside


def _refuse_token_level(name: str, config: Any) -> None:
    """Its ``score.weight`` fits, so it would load, and read a token's value as a text's."""
    kinds = [kind for kind in config.architectures or [] if kind.endswith("ForTokenClassification")]
    if kinds:
        raise ModelError(
            f"{name}: holds a model with a value for each token ({kinds[0]}), not one for a text",
            "load it with companion.scoring.TokenScorer",
        )


def _refuse_headless(name: str, config: Any) -> None:
    kind = ", ".join(config.architectures or ["unknown"])
    raise ModelError(
        f"{name}: the checkpoint has no head ({_HEAD} is missing; architecture {kind}). "
        "transformers would load it with a random head and score without a word",
        "train it: 'companion train pairwise --model_name_or_path …'. If this should be a trained "
        'model: a LoRA run without modules_to_save=["score"] does not save the head',
    )


def _load_manifest(
    name: str, tokenizer: Any, revision: str | None, notes: list[str]
) -> tuple[RewardManifest | None, RewardFormatter]:
    path = find_file(name, MANIFEST_FILE, revision)
    if path is not None:
        manifest = RewardManifest.load(path)
        return manifest, RewardFormatter.from_recipe(tokenizer, manifest.formatter)
    recipe = find_file(name, RECIPE_FILE, revision)
    if recipe is not None:
        notes.append(
            f"no {MANIFEST_FILE}: scores have no reference set; the formatter's recipe was found"
        )
        return None, RewardFormatter.from_recipe(tokenizer, read_json(recipe))
    notes.append(
        f"no {MANIFEST_FILE}: not saved by the companion; the formatter is built from the "
        "tokenizer, without a maximal length, and scores have no reference set"
    )
    return None, RewardFormatter(tokenizer)
