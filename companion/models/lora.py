"""LoRA with the head kept: trained, saved, and merged into a plain checkpoint.

Without ``modules_to_save=["score"]`` a LoRA run neither trains nor saves the head, and the adapter
loads later on a random one. Chapter 4.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from companion.errors import ModelError
from companion.models.checkpoint import (
    OLD_HEADS,
    add_rows,
    disable_dropout,
    find_file,
    is_quantized,
    listed,
    load_config,
    load_tokenizer,
    load_weights,
    read_json,
    refuse_missing,
    resolve,
    set_pad,
)
from companion.models.head import find_head, head_name, install_head
from companion.models.locking import lock_of
from companion.models.reward_model import RewardModel

_CURE = "pip install 'reward-model-companion[peft]'"


def apply_lora(
    reward_model: RewardModel,
    *,
    r: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
) -> RewardModel:
    """Wrap the model for LoRA; the head is trained and saved in full.

    Parameters
    ----------
    reward_model : RewardModel
        From :func:`companion.models.load_base`; its ``model`` is replaced.
    r, alpha, dropout : int, int, float
        Rank, scale, and dropout of the adapter (0: a score has no randomness).
    target_modules : str or list of str
        Which linear layers; default: all of the backbone.

    Returns
    -------
    RewardModel
        The same object.

    Raises
    ------
    ModelError
        If peft is missing, or the head would not be trained.
    """
    try:
        from peft import (
            LoraConfig,
            TaskType,
            get_peft_model,
            prepare_model_for_kbit_training,
        )
    except ImportError as error:
        raise ModelError("LoRA needs the package peft", _CURE) from error

    if is_quantized(reward_model.model):  # norms in float32, and gradients for what is below LoRA
        reward_model.model = prepare_model_for_kbit_training(
            reward_model.model, use_gradient_checkpointing=False
        )
    by_token = type(reward_model.model).__name__.endswith("ForTokenClassification")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        task_type=TaskType.TOKEN_CLS if by_token else TaskType.SEQ_CLS,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=[head_name(reward_model.model)],
        use_rslora=use_rslora,
    )
    try:
        reward_model.model = get_peft_model(reward_model.model, config)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be applied: {error}", "name other target_modules") from error
    if not any(p.requires_grad for p in find_head(reward_model.model).parameters()):
        raise ModelError("LoRA would leave the head untrained", 'keep modules_to_save=["score"]')
    trained = sum(p.numel() for p in reward_model.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in reward_model.model.parameters())
    reward_model.notes.append(f"LoRA of rank {r}: {trained:,} of {total:,} weights are trained")
    return reward_model


def is_lora(model: Any) -> bool:
    """Whether the model is wrapped by peft."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def merged(model: Any) -> Any:
    """A plain model with the adapter merged into a copy; a plain model as it is."""
    if not is_lora(model):
        return model
    with lock_of(model):  # a copy of a model that is scoring would keep how it was switched
        twin = copy.deepcopy(model)
    return _in_full(twin) if is_quantized(twin) else twin.merge_and_unload(safe_merge=True)


def _in_full(model: Any) -> Any:
    """The adapter of a base in 4 bits merged into that base in full precision.

    Merged into the 4 bits it would be rounded to them: other scores than those of the training.
    """
    inside = "base_model.model."
    changes = {
        name.removeprefix(inside): module.get_delta_weight(module.active_adapters[0])
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    model.state_dict()  # what bitsandbytes packed at the first forward on a CPU is unpacked by it
    plain = model.unload().dequantize()
    with torch.no_grad():
        for name, change in changes.items():
            weight = plain.get_submodule(name).weight
            weight.add_(change.to(weight))
    return plain


def load_adapter(
    name: str,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    *,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """Load a LoRA adapter with its base and merge them; returns model and tokenizer.

    Raises
    ------
    ModelError
        If the adapter has no head or one for every token, its base is not found or lacks weights,
        a weight of the adapter is missing or fits no layer, or peft is missing.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError("the folder holds a LoRA adapter, which needs peft", _CURE) from error
    from safetensors import safe_open

    described = find_file(name, "adapter_config.json", revision)
    weights = find_file(name, "adapter_model.safetensors", revision)
    if described is None or weights is None:
        raise ModelError(f"{name}: the adapter lacks adapter_model.safetensors")
    with safe_open(weights, framework="pt") as file:
        keys = list(file.keys())
    if not any(key.endswith("score.weight") for key in keys):
        raise ModelError(
            f"{name}: the adapter does not hold the head, so it would load with a random one",
            'train it with modules_to_save=["score"] (companion.models.apply_lora does)',
        )
    adapter = read_json(described)
    if adapter.get("task_type") == "TOKEN_CLS":  # its head may fit, and would be read as a score
        raise ModelError(
            f"{name}: holds a LoRA adapter of an outcome or process model",
            "save the merged model, and load that",
        )
    base = adapter.get("base_model_name_or_path")
    if isinstance(base, str) and not Path(base).is_dir():  # saved relative to where it lies
        beside = [place / base for place in (Path(name), Path(name).parent)]
        base = next((str(place) for place in beside if base and place.is_dir()), base)
    if (
        not isinstance(base, str)
        or not base
        or (Path(base).is_absolute() and not Path(base).is_dir())
    ):
        raise ModelError(
            f"{name}: the adapter's base {base!r} is not found",
            "set base_model_name_or_path in adapter_config.json to the base",
        )
    base_name = resolve(base)
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_config(base_name, **shared)
    config.num_labels = 1
    config.problem_type = "regression"
    disable_dropout(config)
    has_own = find_file(name, "tokenizer_config.json", revision) is not None
    tokenizer = load_tokenizer(name if has_own else base_name, **shared)
    model, missing = load_weights(
        base_name,
        config,
        dtype,
        auto_class="AutoModelForSequenceClassification",
        attn_implementation=attn_implementation,
        left_out=OLD_HEADS,
        **shared,
    )
    refuse_missing(
        base_name, {key for key in missing if not key.startswith(f"{head_name(model)}.")}
    )
    pad = tokenizer.pad_token_id
    if pad is not None:
        if pad >= model.get_input_embeddings().weight.shape[0]:
            add_rows(model, pad + 1)
        set_pad(model, pad)
    install_head(model).to(torch.float32)
    try:
        with warnings.catch_warnings():  # of missing keys, which are an error below
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, name)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name}: the adapter does not fit its base {base!r}: {error}",
            "set base_model_name_or_path in adapter_config.json to the base it was trained from",
        ) from error
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    lacking, surplus = wanted - set(keys), set(keys) - wanted - set(wrapped.state_dict())
    for found, what in ((lacking, "lacks"), (surplus, "has, for layers that its base has not,")):
        if found:
            raise ModelError(
                f"{name}: the adapter {what} {listed(found)}; peft would go on without a word",
                "fetch or save the adapter again, and check base_model_name_or_path and "
                "target_modules in its adapter_config.json",
            )
    return wrapped.merge_and_unload(safe_merge=True), tokenizer
