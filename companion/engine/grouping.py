"""Which segments attend in one call: alike ones together, where a call costs more than padding.

A kernel call has a fixed price, and short segments pay little else. So segments of like size are
laid side by side in one call, padded to the largest of them. That padding is in the attention
alone: the layers' matrix products, norms and MLPs see none of it. Chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.engine.devices import to_device
from companion.engine.packing import Segment, Segments


@dataclass(frozen=True)
class AttentionGroup:
    """Segments of one call, side by side.

    Attributes
    ----------
    rows, queries, keys : int
        Number of segments; ``Lq`` and ``Lk``, queries and keys of each, padding included.
    mask : Tensor or None
        ``[rows, 1, Lq, Lk]``, 0 where a query sees a key and -inf elsewhere; None where plain
        causal attention says the same.
    """

    rows: int
    queries: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionGroups:
    """All calls of a packed row.

    Attributes
    ----------
    groups : tuple of AttentionGroup
    queries, keys : Tensor
        ``[Σ rows × Lq]`` and ``[Σ rows × Lk]`` int64: where the queries and the keys of all groups,
        end to end, lie in the packed row. Padding repeats a token of its segment.
    order : Tensor
        ``[T]`` int64: the way back, where each token of the packed row lies in ``queries``.
    """

    groups: tuple[AttentionGroup, ...]
    queries: Tensor
    keys: Tensor
    order: Tensor


def group_places(items: Sequence[Segment], call_cost: float) -> list[list[int]]:
    """Places of the segments that attend together.

    Parameters
    ----------
    items : sequence of Segment
    call_cost : float
        Price of a call, in query–key products: a segment joins others if the padding that this
        adds is cheaper.

    Returns
    -------
    list of list of int
        Every segment exactly once. Those with a prefix and those without stand apart, since the
        latter need no mask.
    """
    order = sorted(
        range(len(items)),
        key=lambda i: (items[i].prefix > 0, items[i].prefix + items[i].length, items[i].length),
    )
    found: list[list[int]] = []
    queries = keys = 0
    for place in order:
        item = items[place]
        own_queries, own_keys = item.length, item.prefix + item.length
        alike = bool(found) and (items[found[-1][0]].prefix > 0) == (item.prefix > 0)
        if alike:
            held = len(found[-1])
            wide, long = max(queries, own_queries), max(keys, own_keys)
            padded = (held + 1) * wide * long - held * queries * keys - own_queries * own_keys
            if padded <= call_cost:
                found[-1].append(place)
                queries, keys = wide, long
                continue
        found.append([place])
        queries, keys = own_queries, own_keys
    return found


def attention_groups(
    segments: Segments,
    call_cost: float,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AttentionGroups | None:
    """The calls of a packed row, made at the first layer and kept for the others.

    Parameters
    ----------
    segments : Segments
    call_cost : float
        As for :func:`group_places`.
    window : int, optional
        A token sees itself and the ``window - 1`` tokens before it.
    dtype : torch.dtype
        Of the masks.

    Returns
    -------
    AttentionGroups or None
        None if no two segments attend together.
    """

    def make() -> AttentionGroups | None:
        places = group_places(segments.items, call_cost)
        if len(places) == len(segments.items):
            return None
        groups, queries, keys = [], [], []
        first, begin = [0] * len(segments.items), 0  # where a segment's queries lie
        for members in places:
            items = [segments.items[i] for i in members]
            own_queries, own_keys, mask = _group(items, window, dtype, device)
            wide = own_queries.shape[1]
            for row, i in enumerate(members):
                first[i] = begin + row * wide
            begin += own_queries.numel()
            queries.append(own_queries.flatten())
            keys.append(own_keys.flatten())
            groups.append(AttentionGroup(len(items), wide, own_keys.shape[1], mask))
        start, length, *_ = torch.tensor(segments.items).T
        moved = (torch.tensor(first) - start).repeat_interleave(length)
        order = torch.arange(segments.total, device=device) + to_device(moved, device)
        return AttentionGroups(tuple(groups), torch.cat(queries), torch.cat(keys), order)

    return segments.kept(("groups", call_cost, window, dtype, torch.device(device)), make)


def _group(
    items: Sequence[Segment],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places of the queries ``[rows, Lq]`` and of the keys ``[rows, Lk]``, and the mask.

    They are made on the device: the mask of a batch can be gigabytes, which took 0.2 to 1.8 seconds
    to make on the host and to copy.
    """
    start, length, prefix_start, prefix = to_device(torch.tensor(items), device).T[:, :, None]
    query = torch.arange(max(item.length for item in items), device=device)
    key = torch.arange(max(item.prefix + item.length for item in items), device=device)
    own = query.minimum(length - 1)  # padding stands where the last token does
    queries = start + own
    # the prefix, then the segment itself, then its last token over and over
    keys = torch.where(key < prefix, prefix_start + key, start + (key - prefix).minimum(length - 1))
    mask = None
    if any(item.prefix for item in items) or (window is not None and window < len(key)):
        distance = (prefix + own)[:, :, None] - key
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(~seen, -torch.inf)[:, None]
    return queries, keys, mask
