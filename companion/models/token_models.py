"""Load, run and save token-level models: plain token-classification checkpoints with a manifest.

``AutoModelForTokenClassification`` loads them and gives the same logits. The head's dropout, which
is 0.1 in stock transformers, is switched off in the configuration, so that it stays off. Chapter 3.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor

from companion.batching.packing import PackedBatch
from companion.errors import ModelError
from companion.formatting import Overlong, RewardFormatter
from companion.models.checkpoint import checkpoint_keys, find_file, is_adapter
from companion.models.forward import is_causal, packed_hidden
from companion.models.guards import check_batch, check_tokenizer_and_config, precision_notes
from companion.models.head import find_head, head_name, install_head
from companion.models.loading import HeadLayout, load_with_fresh_head
from companion.models.manifest import MANIFEST_FILE, TOKEN_RULES, RewardManifest
from companion.models.pieces import (
    PathLike,
    as_dtype,
    disable_dropout,
    load_config,
    load_tokenizer,
    load_weights,
    resolve,
)
from companion.models.reward_model import RewardModel
from companion.models.saving import write_checkpoint
from companion.models.token_readout import LABEL_NAMES, TokenReadout
from companion.readout import position_ids_from_mask


def load_token_base(
    path_or_id: PathLike,
    *,
    labels: int,
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
    """Load any decoder as the start of a token-level model: fresh head, no dropout. Chapter 3.

    Parameters
    ----------
    labels : int
        Outputs of the head: 1 for outcomes and steps that are right or wrong, 3 for steps that are
        bad, neutral or good.
    path_or_id, head_seed, …
        As for :func:`companion.models.loading.load_base`.

    Raises
    ------
    ModelError, ReadoutError
        As :func:`companion.models.loading.load_base`.
    """
    if labels not in LABEL_NAMES:
        raise ModelError(f"labels is {labels}", "use 1 or 3")
    loaded = load_with_fresh_head(
        path_or_id,
        HeadLayout(labels, "AutoModelForTokenClassification", None),
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
    config = loaded.model.config
    config.id2label = dict(LABEL_NAMES[labels])
    config.label2id = {name: index for index, name in LABEL_NAMES[labels].items()}
    return loaded


def prepare_token_head(model: Any, labels: int) -> None:
    """Check a model's head, put it in fp32 and take its dropout off.

    Raises
    ------
    ModelError
        If the head has another number of labels, or is not finite or all zero.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(inner).__name__.endswith("ForTokenClassification"):
        raise ModelError(
            f"{type(inner).__name__} gives one value a text",
            "load the base with companion.models.load_token_base, which gives one a token",
        )
    if not hasattr(model, "peft_config"):
        install_head(model)
    head: Any = find_head(model)
    weight = getattr(head, "weight", None)
    if inner.config.num_labels != labels:
        raise ModelError(
            f"the model has {inner.config.num_labels} labels, this training needs {labels}",
            f"load the base with companion.models.load_token_base(…, labels={labels})",
        )
    if isinstance(weight, Tensor) and weight.numel() and not weight.is_meta:
        if not bool(torch.isfinite(weight).all()):
            raise ModelError("the head's weights are not all finite", "training diverged")
        if not bool(weight.any()):
            raise ModelError(
                "the head's weights are all zero: every token would get the same value",
                "load the base with companion.models.load_token_base",
            )
    inner.config.classifier_dropout = 0.0
    if hasattr(inner, "dropout"):
        inner.dropout.p = 0.0


def token_logits(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """Logits of every token, in fp32; gradients flow. Chapter 3.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder with a token-classification head.
    input_ids : Tensor
        ``[B, T]`` integers.
    attention_mask : Tensor, optional
        ``[B, T]``, 1 at real tokens; padding may stand left or right.
    check : bool
        Run :func:`companion.models.guards.check_batch` first.

    Returns
    -------
    Tensor
        ``[B, T, labels]`` float32 (float64 for a float64 model); what stands at padding has no
        meaning.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if check:
        check_batch(input_ids, attention_mask, model.config)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(inner, inner.base_model_prefix)
    arguments: dict[str, Any] = {"use_cache": False}
    # as in `reward_scores`: a causal model's real tokens cannot see right padding
    if not (is_causal(inner.config) and bool(attention_mask[:, 0].bool().all())):
        arguments["attention_mask"] = attention_mask
        if "position_ids" in inspect.signature(backbone.forward).parameters:
            arguments["position_ids"] = position_ids_from_mask(attention_mask)
    hidden = backbone(input_ids, **arguments).last_hidden_state
    logits: Tensor = find_head(inner)(hidden)
    return logits


def packed_token_logits(model: Any, batch: PackedBatch) -> Tensor:
    """Logits of every token of a packed batch, in fp32; gradients flow. Chapter 3.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A decoder with a token-classification head for which
        :func:`companion.models.packed_attention.packing_obstacle` finds none.
    batch : PackedBatch
        On the model's device.

    Returns
    -------
    Tensor
        ``[T, labels]`` float32 (float64 for a float64 model);
        :meth:`companion.batching.PackedBatch.text_places` says which belong to a text.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits: Tensor = find_head(inner)(packed_hidden(inner, batch)[0])
    return logits


def load_token_model(
    path_or_id: PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[RewardModel, TokenReadout]:
    """Load an outcome or process model that the companion saved, in eval mode. Chapter 3.

    Raises
    ------
    ModelError
        For a model of one score a text (with the class to take), a checkpoint without its manifest
        (nothing then says what its values mean) or head, missing weights, or a tokenizer that is
        not the one of the manifest.
    """
    name = resolve(path_or_id)
    if is_adapter(name, revision):
        raise ModelError(f"{name}: holds a LoRA adapter", "save the merged model, and load that")
    path = find_file(name, MANIFEST_FILE, revision)
    if path is None:
        raise ModelError(
            f"{name}: no {MANIFEST_FILE}: nothing says what the values of its tokens mean",
            "give a folder that 'companion train outcome' or 'companion train process' wrote",
        )
    manifest = RewardManifest.load(path)
    if manifest.kind not in TOKEN_RULES:
        raise ModelError(
            f"{name}: holds a reward model with one score a text, no outcome or process model",
            "load it with companion.scoring.RewardScorer",
        )
    readout = TokenReadout.from_dict(manifest.readout, path)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name, **shared)
    disable_dropout(config)
    tokenizer = load_tokenizer(name, **shared)
    keys = checkpoint_keys(name, revision)
    model, missing = load_weights(
        name,
        config,
        as_dtype(dtype),
        attn_implementation=attn_implementation,
        auto_class="AutoModelForTokenClassification",
        **shared,
    )
    if missing or (keys is not None and f"{head_name(model)}.weight" not in keys):
        raise ModelError(
            f"{name}: the checkpoint lacks weights ({', '.join(sorted(missing)[:3])}); "
            "transformers would fill them with random numbers",
            "save the model anew, or fetch the folder again",
        )
    prepare_token_head(model, readout.labels)
    find_head(model).to(torch.float32)
    check_tokenizer_and_config(tokenizer, model.config)
    formatter = RewardFormatter.from_recipe(tokenizer, manifest.formatter)
    model.eval()
    if device is not None:
        model.to(device)
    notes = [*formatter.notes, *precision_notes(model)]
    return RewardModel(model, tokenizer, formatter, manifest, notes), readout


def save_token_model(
    reward_model: RewardModel,
    directory: str | os.PathLike[str],
    manifest: RewardManifest,
) -> RewardManifest:
    """Write a token-level model so that stock transformers loads it and gives the same logits.

    Parameters
    ----------
    reward_model : RewardModel
        A LoRA model is merged (in a copy) first.
    manifest : RewardManifest
        Its ``readout`` is that of a :class:`companion.models.token_readout.TokenReadout`.

    Returns
    -------
    RewardManifest
        As written.

    Raises
    ------
    ModelError, ReadoutError
        If a guard refuses the model: nothing is written.
    """
    readout = TokenReadout.from_dict(manifest.readout, MANIFEST_FILE)

    def check(plain: Any) -> None:
        prepare_token_head(plain, readout.labels)

    return write_checkpoint(reward_model, directory, manifest, check=check)
