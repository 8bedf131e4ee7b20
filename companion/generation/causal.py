"""Load a causal language model: a policy to sample from, or a judge to ask. Chapter 5."""

from __future__ import annotations

from typing import Any

import torch

from companion.engine.devices import resolve_dtype
from companion.errors import ModelError
from companion.models.checkpoint import (
    PathLike,
    is_adapter,
    load_config,
    load_tokenizer,
    load_weights,
    refuse_missing,
    resolve,
)
from companion.models.memory import chosen_device, place


def load_causal(
    path_or_id: PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    path_or_id : str or path
        A folder or a hub id.
    device : str, optional
        Default: the GPU if there is one.
    dtype : torch.dtype or str
        Of the weights. 'auto': bfloat16 on a GPU that has it, else float32.
    attn_implementation, revision, trust_remote_code
        For transformers.

    Returns
    -------
    tuple
        The model, in eval mode, and the tokenizer.

    Raises
    ------
    ModelError
        For a wrong folder, an adapter, a tokenizer without EOS, weights that are missing, or a
        reward model: with tied embeddings transformers would load one as a language model without
        a word, and it would write noise.
    """
    device = chosen_device(device)
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_adapter(name, revision):
        raise ModelError(f"{name}: holds a LoRA adapter", "merge it into its base first")
    config = load_config(name, **shared)
    heads = [a for a in config.architectures or [] if "ForSequence" in a or "ForToken" in a]
    if heads:
        raise ModelError(
            f"{name}: is a reward model or classifier ({heads[0]}), which writes no text",
            "give a causal language model, such as the base that it was trained from",
        )
    tokenizer = load_tokenizer(name, **shared)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{name}: the tokenizer has no EOS token, so no completion would ever end",
            "set tokenizer.eos_token to the token that ends a text, and save the tokenizer",
        )
    model, missing = load_weights(
        name,
        config,
        resolve_dtype(dtype, device),
        auto_class="AutoModelForCausalLM",
        attn_implementation=attn_implementation,
        **shared,
    )
    refuse_missing(name, missing)
    return place(model, device).eval(), tokenizer
