"""The last layer computes only the tokens that are read out.

A scalar reward model reads one token of each text. The layers below need every token, for the keys
and values of those that follow; of the last layer nobody asks for more than keys and values of all
tokens, and the rest (queries, output projection, MLP) of the tokens that are read. On four layers
that leaves out a fifth of all matrix products, on 28 layers a thirtieth, with the same scores and
gradients. The models of transformers compute it all; sglang #38153 proposes the same for the
prefill of a generation. Chapter 2.

It is done by a hook on the last decoder layer, so that the layer's own code goes on to compute it,
and FSDP, ZeRO, LoRA and activation checkpointing do their work around it as always.
"""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from companion.engine.devices import fits_varlen, to_device
from companion.engine.packing import Segments
from companion.engine.sdpa import attend

#: Architectures whose layers have the parts that :func:`_keys_and_values` takes.
PRUNABLE = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma"})
#: Where a model keeps a hook that has to outlive the forward.
_KEPT = "_companion_last_layer_hook"


@dataclass
class LastLayer:
    """Goes through the layers in the place of the segments; the last one finds what to compute.

    Attributes
    ----------
    segments : Segments
        Of the packed row.
    places : Tensor
        ``[N]`` int64: the tokens that are read out.
    ends : tuple of int, optional
        The same for the host; without them they are read from `places`.
    key, value : Tensor, optional
        ``[1, H_kv, T, D]``, of all tokens; the hook of the last layer fills them in.
    """

    segments: Segments
    places: Tensor
    ends: tuple[int, ...] | None = None
    key: Tensor | None = None
    value: Tensor | None = None


def prunable(model: Any) -> bool:
    """Whether the last layer of a model (without its LoRA wrapper) can leave tokens out.

    Not if accelerate has spread its layers over devices or the disk: what brings weights and inputs
    together runs after a hook. Not under reentrant checkpointing either, whose backward takes the
    graph of what is handed on outside a layer's arguments for its own (TRL asks for it with LoRA
    and ZeRO-3).
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or model.config.get_text_config().model_type not in PRUNABLE:
        return False
    layer = getattr(model, model.base_model_prefix).layers[-1]
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    again = torch.is_grad_enabled() and bool(model.is_activation_checkpointing)
    return not (again and getattr(checkpoint, "keywords", {}).get("use_reentrant") is True)


@contextlib.contextmanager
def pruned_last_layer(model: Any, *, keep: bool = False) -> Iterator[None]:
    """Inside the block a forward that is given a :class:`LastLayer` computes what that asks for.

    Parameters
    ----------
    model : PreTrainedModel
        Without its LoRA wrapper; one that is :func:`prunable`.
    keep : bool
        Leave the hook there, until :func:`restore_last_layer`: activation checkpointing computes
        the layer again after the block has ended.
    """
    if hasattr(model, _KEPT):
        yield
        return
    layer = getattr(model, model.base_model_prefix).layers[-1]
    # FSDP 1 and PyTorch's checkpointing wrap a layer; weights are whole only inside the wrapper
    for wrapper in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        layer = getattr(layer, wrapper, layer)
    hook = layer.register_forward_pre_hook(_prune, with_kwargs=True)
    if keep:
        setattr(model, _KEPT, hook)
    try:
        yield
    finally:
        if not keep:
            hook.remove()


def restore_last_layer(model: Any) -> None:
    """Take off a hook that was kept."""
    if hasattr(model, _KEPT):
        getattr(model, _KEPT).remove()
        delattr(model, _KEPT)


def _prune(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keys and values of all tokens; then the layer goes on with the tokens that are read."""
    wanted = kwargs.get("packed_segments")
    if not isinstance(wanted, LastLayer) or wanted.key is not None:  # a copied hook was here
        return None
    hidden: Tensor = args[0]
    cos, sin = kwargs["position_embeddings"]
    key, value = _keys_and_values(layer, hidden, cos, sin)
    places = wanted.places
    kwargs = kwargs | {
        "packed_segments": replace(wanted, key=key, value=value),
        "position_embeddings": (cos[:, places], sin[:, places]),
    }
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"][:, places]
    return (hidden.index_select(1, places), *args[1:]), kwargs


def _keys_and_values(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, H_kv, T, D]`` each, positions applied, as the layer's own attention makes them."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    key = attention.k_proj(normed).view(shape)
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    key = key.transpose(1, 2)
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    _, key = rotate(key[:, :0], key, cos, sin)  # queries are none of our business: zero heads
    return key, value


# ---------------------------------------------------------------------- attention


def last_layer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    wanted: LastLayer,
    scaling: float | None,
    window: int | None,
    half: torch.dtype | None = None,
) -> Tensor:
    """Attention of the tokens that are read, each to its own text.

    Parameters
    ----------
    query : Tensor
        ``[1, H, N, D]``.
    key, value : Tensor
        ``[1, H_kv, N, D]``, of the tokens that are read. They stand in for their own among those of
        all tokens, so that whatever makes them has its gradient (ZeRO-3 waits for one).
    wanted : LastLayer
        With keys and values of all tokens.
    scaling : float, optional
    window : int, optional
        A token sees itself and the ``window - 1`` tokens before it.
    half : torch.dtype, optional
        Compute in it, where the device is CUDA.

    Returns
    -------
    Tensor
        ``[1, N, H, D]``.

    Notes
    -----
    Each text's keys are gathered. One call with a mask over the whole row would be simpler, but
    what is not a number in one text would get into the others: 0 times NaN is NaN.
    """
    assert wanted.key is not None
    assert wanted.value is not None
    by_kernel = half is not None and fits_varlen(query)
    dtype = half if half is not None and (by_kernel or query.is_cuda) else query.dtype
    query = query.to(dtype)
    keys = wanted.key.to(dtype).index_copy(2, wanted.places, key.to(dtype))
    values = wanted.value.to(dtype).index_copy(2, wanted.places, value.to(dtype))
    # [1, H, T, D] to [T, H, D]: a token is then one run of memory
    query, keys, values = (x[0].transpose(0, 1) for x in (query, keys, values))
    by = _by_varlen if by_kernel else _by_group
    return by(query, keys, values, _seen(wanted, window, query.device), scaling)[None]


def _by_varlen(
    query: Tensor, keys: Tensor, values: Tensor, seen: _Seen, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if seen.keys is None:
        keys, values = keys.contiguous(), values.contiguous()
    else:
        keys, values = keys[seen.keys], values[seen.keys]
    output = varlen_attn(
        query.contiguous(),
        keys,
        values,
        torch.arange(len(query) + 1, dtype=torch.int32, device=query.device),
        seen.offsets,
        1,
        seen.longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _by_group(
    query: Tensor, keys: Tensor, values: Tensor, seen: _Seen, scaling: float | None
) -> Tensor:
    sizes = [mask.numel() for mask in seen.masks]
    parts = zip(
        seen.masks,
        query.index_select(0, seen.order).split([len(mask) for mask in seen.masks]),
        keys.index_select(0, seen.padded).split(sizes),
        values.index_select(0, seen.padded).split(sizes),
        strict=True,
    )
    outputs = []
    for mask, own_query, own_keys, own_values in parts:
        shape = (len(mask), mask.shape[-1], *keys.shape[1:])
        output = attend(
            own_query[:, :, None],
            own_keys.view(shape).transpose(1, 2),
            own_values.view(shape).transpose(1, 2),
            mask,
            scaling,
        )
        outputs.append(output[:, :, 0])
    return torch.cat(outputs).index_select(0, seen.order.argsort())


class _Seen(NamedTuple):
    """What each token that is read sees: its text, up to itself.

    ``keys`` are their places in the row, token after token (``offsets`` ``[N + 1]`` int32 says
    which are whose); None for all of the row, as they lie. ``padded`` are the same for calls of
    texts of like length: in ``order``, each of ``masks`` ``[n, 1, 1, longest]`` is a call.
    """

    keys: Tensor | None
    offsets: Tensor
    longest: int
    order: Tensor
    padded: Tensor
    masks: list[Tensor]


def _seen(wanted: LastLayer, window: int | None, device: torch.device) -> _Seen:
    items = wanted.segments.items
    starts = [item.start for item in items]
    places = wanted.places.tolist() if wanted.ends is None else list(wanted.ends)
    start, _, prefix_start, prefix = torch.tensor(
        [items[bisect_right(starts, place) - 1] for place in places]
    ).T[:, :, None]
    place = torch.tensor(places)[:, None]
    whole = prefix + place + 1 - start
    count = whole if window is None else whole.clamp(max=window)
    key = torch.arange(int(count.max()))
    at = key + whole - count  # a window leaves out what comes first
    keys = torch.where(at < prefix, prefix_start + at, (start + at - prefix).minimum(place))
    real = key < count
    order = count.flatten().argsort()
    padded, masks = [], []
    for rows in _of_like_length(count.flatten()[order].tolist()):
        members = order[rows]
        longest = int(count[members].max())
        padded.append(keys[members, :longest].flatten())
        masks.append(to_device(real[members, None, None, :longest], device))
    seen = keys[real]
    all_of_them = len(seen) == wanted.segments.total and torch.equal(seen, torch.arange(len(seen)))
    offsets = nn.functional.pad(count.flatten().cumsum(0), (1, 0))
    return _Seen(
        None if all_of_them else to_device(seen, device),
        to_device(offsets.to(torch.int32), device),
        len(key),
        to_device(order, device),
        to_device(torch.cat(padded), device),
        masks,
    )


def _of_like_length(counts: Sequence[int]) -> list[slice]:
    """Runs of ascending counts of which the greatest is at most half as much again as the least."""
    runs, begin = [], 0
    for i, count in enumerate(counts):
        if count > 1.5 * counts[begin]:
            runs.append(slice(begin, i))
            begin = i
    return [*runs, slice(begin, len(counts))]
