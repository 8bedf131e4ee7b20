"""Attention over packed trees, through transformers' interface for attention functions.

The models of transformers look their attention function up by name and hand extra arguments of the
forward on to it. Here a function is registered that takes :class:`companion.engine.Segments` in
that way: the queries of a segment see the prefix of its tree and, causally, the segment itself.
Packing by position ids alone (what transformers offers with sdpa) shares no prefix, and mixes the
texts without a word once a mask or a cache is passed. Chapter 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from companion.engine.devices import acts_as_cuda, fits_varlen
from companion.engine.grouping import AttentionGroups, attention_groups
from companion.engine.last_layer import LastLayer, last_layer_attention, restore_last_layer
from companion.engine.packing import Segments
from companion.engine.positions import length_borders
from companion.engine.sdpa import HALF, attend as sdpa_attend, compute_dtype
from companion.errors import ModelError
from companion.models.head import without_adapter
from companion.models.locking import lock_of

#: The name under which the function is registered.
PACKED = "companion_packed"
#: Where a model keeps the name of the attention that it had.
_PLAIN = "_companion_plain_attention"
#: What a call of attention costs, in query-key products times the width of all heads. Estimates: on
#: a CPU from a profile (about 0.2 ms, forward and backward), on CUDA from a launch of 0.1 ms.
_CALL_COST = {"cpu": 3e5, "cuda": 1e8}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed_segments: Segments | LastLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in which each segment sees its prefix and itself.

    On CUDA in half precision one kernel for texts of unequal lengths, where the device has it;
    otherwise a segment at a time, which is faster on a CPU than any mask over the whole row.

    Parameters
    ----------
    module : nn.Module
        The layer that calls.
    query, key, value : Tensor
        ``[1, H, T, D]`` and ``[1, H_kv, T, D]``, positions applied.
    attention_mask : None
        There is none: the segments say it all.
    scaling : float, optional
        Default 1/sqrt(D).
    dropout : float
        Must be 0: what branches share would be dropped for all of them alike.
    sliding_window : int, optional
        A token sees itself and the ``sliding_window - 1`` tokens before it.
    packed_segments : Segments or LastLayer
        A ``LastLayer`` goes through all layers; in the last one, it holds the keys and values, and
        the queries are those of the tokens that are read.

    Returns
    -------
    tuple
        ``[1, T, H, D]``, and None in place of the weights.

    Raises
    ------
    ModelError
        Without segments, or with anything that this function does not compute: a mask, dropout,
        soft-capping, sinks, more than one row.
    """
    if packed_segments is None:
        raise ModelError(
            "the packed attention was called without its segments",
            "score packed batches by companion.engine.packed_scores, padded ones by reward_scores",
        )
    last_layer = None
    if isinstance(packed_segments, LastLayer):
        last_layer, packed_segments = packed_segments, packed_segments.segments
        if last_layer.key is None:  # not there yet
            last_layer = None
    packed_segments.callers.add(id(module))
    total = packed_segments.total if last_layer is None else len(last_layer.places)
    if total != query.shape[2] or query.shape[0] != 1:
        raise ModelError(
            f"the segments hold {total} tokens, the queries are "
            f"{list(query.shape)} (want [1, H, T, D])"
        )
    for what, given in (
        ("an attention mask", attention_mask),
        ("dropout", dropout or None),
        ("soft-capping", kwargs.get("softcap")),
        ("attention sinks", kwargs.get("s_aux")),
        ("a position bias", kwargs.get("position_bias")),
    ):
        if given is not None:
            raise ModelError(f"{type(module).__name__}: packed attention knows no {what}")
    half = _half_dtype(query)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (query, key, value)
        if last_layer is not None:
            return last_layer_attention(*heads, last_layer, scaling, sliding_window, half)
        if half is not None and fits_varlen(query):
            return _by_varlen(*heads, packed_segments, scaling, sliding_window, half)
        return _by_segment(*heads, packed_segments, scaling, sliding_window)

    if half is None or not _half_is_slow(query.device.type):
        return attend(query, key, value), None
    with torch.autocast(query.device.type, enabled=False):
        return attend(query.float(), key.float(), value.float()).to(half), None


def _half_is_slow(device: str) -> bool:
    """Whether attention in half precision takes longer than in float32.

    So it is on a CPU without matrix units: PyTorch's kernel computes the softmax in float32 and
    converts to and fro (measured: 2 to 4 times slower).
    """
    return device == "cpu" and not acts_as_cuda() and not torch.cpu._is_amx_tile_supported()


def _half_dtype(query: Tensor) -> torch.dtype | None:
    """The half precision to compute in, if any."""
    dtype = compute_dtype(query)
    return dtype if dtype in HALF else None


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    call_cost = _CALL_COST.get(query.device.type, 1e8) / (query.shape[1] * query.shape[3])
    groups = attention_groups(segments, call_cost, window, query.dtype, query.device)
    if groups is not None:
        return _by_group(query, key, value, groups, scaling)
    lengths = segments.lengths
    # `split` has one backward for all its parts; a slice each would fill a whole gradient each
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    place = {item.start: i for i, item in enumerate(segments.items)}
    outputs = []
    for i, item in enumerate(segments.items):
        own_key, own_value = keys[i], values[i]
        if item.prefix:
            trunk = place[item.prefix_start]
            own_key = torch.cat([keys[trunk], own_key], dim=2)
            own_value = torch.cat([values[trunk], own_value], dim=2)
        mask = segments.mask(item, window, query.device)
        outputs.append(sdpa_attend(queries[i], own_key, own_value, mask, scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: AttentionGroups,
    scaling: float | None,
) -> Tensor:
    """Segments of like size in one call each; see :mod:`companion.engine.grouping`."""

    def gather(x: Tensor, places: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        # [1, H, T, D] to [T, H, D]: a token is then one run of memory. All groups at once, then
        # split: a gather for each would fill a whole gradient each.
        return x[0].transpose(0, 1).index_select(0, places).split(counts)

    queries = [group.rows * group.queries for group in groups.groups]
    keys = [group.rows * group.keys for group in groups.groups]
    parts = zip(
        groups.groups,
        gather(query, groups.queries, queries),
        gather(key, groups.keys, keys),
        gather(value, groups.keys, keys),
        strict=True,
    )
    outputs = []
    for group, *gathered in parts:
        own_query, own_key, own_value = (
            x.view(group.rows, -1, *x.shape[1:]).transpose(1, 2) for x in gathered
        )
        output = sdpa_attend(own_query, own_key, own_value, group.mask, scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, groups.order)[None]


def _by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    index = segments.varlen_index(query.device)
    # [1, H, T, D] to [T, H, D]; norms may have left queries and keys in float32
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    if index.gather is None:
        key, value = key.contiguous(), value.contiguous()
    else:
        key, value = key[index.gather], value[index.gather]
    output = varlen_attn(
        query.contiguous(),
        key,
        value,
        index.query_offsets,
        index.key_offsets,
        index.max_query,
        index.max_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(PACKED, packed_attention)


# ---------------------------------------------------------------------- switching


@contextlib.contextmanager
def packed_mode(model: Any, *, keep: bool = False) -> Iterator[None]:
    """Let a model (without its LoRA wrapper) use the packed attention inside the block.

    Parameters
    ----------
    keep : bool
        Leave it in use. Activation checkpointing computes the forward again during the backward,
        after the block has ended; with the plain attention it would mix the texts.
    """
    with lock_of(model):
        before = model.config._attn_implementation
        if before != PACKED:
            setattr(model, _PLAIN, before)
            model.set_attn_implementation(PACKED)
        try:
            yield
        finally:
            if before != PACKED and not keep:
                model.set_attn_implementation(before)


@contextlib.contextmanager
def plain_mode(model: Any) -> Iterator[None]:
    """Let a model that was left with the packed attention use its own inside the block."""
    with lock_of(model):
        packed = model.config._attn_implementation == PACKED
        if packed:
            restore_attention(model)
        try:
            yield
        finally:
            if packed:
                model.set_attn_implementation(PACKED)


def restore_attention(model: Any) -> None:
    """Give a model that was left with the packed attention its own back."""
    restore_last_layer(model)
    if model.config._attn_implementation == PACKED:
        model.set_attn_implementation(getattr(model, _PLAIN, "sdpa"))


# ---------------------------------------------------------------------- where it is exact

#: Architectures whose packed scores and gradients the tests compare with texts one by one.
PROVED = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2"})
#: Whose modules may stand in such a model. (A folder's own code is in `transformers_modules`.)
_LIBRARIES = frozenset(
    {"torch", "transformers", "peft", "companion", "accelerate", "deepspeed", "bitsandbytes"}
)
#: Attention that this one may stand in for; any other was chosen for a reason.
_REPLACES = frozenset({"sdpa", "flash_attention_2", "flash_attention_3", PACKED})
#: Fields of configurations that soften or shift the attention's logits.
_SOFT_CAPS = ("attn_logit_softcapping", "attn_logit_soft_cap", "attention_logit_cap")


def packing_obstacle(model: Any, *, training: bool | None = None) -> str | None:
    """Why a model's texts cannot be packed exactly; None if they can.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    training : bool, optional
        Whether dropout will be active; default: as the model is now.

    Returns
    -------
    str or None
        A reason, to be said in a log line by whoever then pads.
    """
    inner = without_adapter(model)
    text = inner.config.get_text_config()
    if any(getattr(text, name, None) is not None for name in _SOFT_CAPS):
        return "its attention soft-caps the logits"
    if any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in inner.named_parameters()):
        return "its attention has sinks"
    mixing = sorted(
        set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    )
    if mixing:
        return f"it has layers of the kind {', '.join(mixing)}, which mix along the whole row"
    if any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.RNNBase)) for m in inner.modules()):
        return "it has convolutions or recurrent layers, which mix along the whole row"
    if length_borders(text):
        kinds = {"dynamic" if each else "longrope" for _, each in length_borders(text)}
        names = ", ".join(sorted(kinds))
        return f"its positions (rope_type {names}) depend on the longest text of a batch"
    if getattr(text, "is_causal", True) is False or getattr(
        text, "use_bidirectional_attention", False
    ):
        return "it attends both ways"
    if not is_proved(inner):
        return f"packing has not been proved for {class_name(inner)}"
    if inner.config._attn_implementation not in _REPLACES:
        return f"the attention {inner.config._attn_implementation!r} was asked for"
    adapters = getattr(model, "peft_config", {})
    if any(getattr(c, "is_prompt_learning", False) for c in adapters.values()):
        return "its adapter puts tokens of its own before each text"
    training = model.training if training is None else training
    if training and _has_dropout(inner, text):
        return "dropout is active, and would drop for all branches what they share"
    return None


def class_name(model: Any) -> str:
    """The class of a model with the module that it is of."""
    return f"{type(model).__module__}.{type(model).__name__}"


def is_proved(inner: nn.Module) -> bool:
    """Whether it is one of the classes that the tests prove, with nothing foreign in it.

    The ``model_type`` says nothing: a folder's own code, or a subclass, may have that of Llama and
    compute something else.
    """
    known = {f"transformers.models.{kind}.modeling_{kind}" for kind in PROVED}
    return type(inner).__module__ in known and is_stock(inner)


def is_stock(inner: nn.Module) -> bool:
    """Whether a model is of transformers' classes, down to its last module."""
    if not type(inner).__module__.startswith("transformers.models."):
        return False
    return all(type(m).__module__.split(".")[0] in _LIBRARIES for m in inner.modules())


def _has_dropout(model: nn.Module, config: Any) -> bool:
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    return bool(getattr(config, "attention_dropout", 0.0))
