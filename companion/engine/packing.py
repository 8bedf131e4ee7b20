"""The layout: trees laid end to end in one row of tokens, and who sees whom. Chapter 2.

The prefix of a tree comes first, its branches follow. A branch goes on counting positions where the
prefix ended, and sees the prefix and itself, never a sibling. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from companion.engine.devices import to_device
from companion.engine.plan import Tree
from companion.errors import DataError

_T = TypeVar("_T")


class Segment(NamedTuple):
    """A run of tokens that see each other causally, after a prefix that they all see.

    ``start`` and ``length`` say where it lies; its prefix is the ``prefix`` tokens from
    ``prefix_start`` on (0 for a prefix itself and for a row that shares nothing).
    """

    start: int
    length: int
    prefix_start: int
    prefix: int


class VarlenIndex(NamedTuple):
    """What a kernel for texts of unequal lengths is given; see :meth:`Segments.varlen_index`.

    ``query_offsets`` and ``key_offsets`` are ``[S + 1]`` int32, ``gather`` ``[K]`` int64: the keys
    of segment ``s`` are those at ``gather[key_offsets[s]:key_offsets[s + 1]]``. It is None where no
    prefix is shared, so that the keys stay where they are. ``max_query`` and ``max_key`` are the
    longest runs.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    gather: Tensor | None
    max_query: int
    max_key: int


@dataclass
class Segments:
    """All segments of a packed row, in its order and without gaps; what attention needs to know.

    Masks and index tensors are made at the first layer that asks for them and kept for the others.
    """

    items: tuple[Segment, ...]
    #: the modules that have called the attention with these segments, by id
    callers: set[int] = field(default_factory=set, repr=False, compare=False)
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [item.length for item in self.items]

    @property
    def total(self) -> int:
        """Tokens of the packed row."""
        return sum(self.lengths)

    def mask(self, segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
        """Which keys (prefix, then own) each token of a segment sees.

        Parameters
        ----------
        segment : Segment
        window : int, optional
            A token sees itself and the ``window - 1`` tokens before it.

        Returns
        -------
        Tensor or None
            ``[length, prefix + length]`` bool; None where plain causal attention says the same.
        """
        keys = segment.prefix + segment.length
        if window is not None and window >= keys:
            window = None
        if segment.prefix == 0 and window is None:
            return None

        def make() -> Tensor:
            key = torch.arange(keys, device=device)
            query = key[segment.prefix :, None]
            seen = key <= query
            if window is not None:
                seen &= query - key < window
            return seen

        return self.kept(("mask", segment.prefix, segment.length, window, device), make)

    def kept(self, name: Any, make: Callable[[], _T]) -> _T:
        """What `make` gives; made once for all layers."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]  # type: ignore[no-any-return]

    def varlen_index(self, device: torch.device | str = "cpu") -> VarlenIndex:
        """Offsets of queries and of keys, and where in the packed row each key lies.

        Queries stay where they are. Keys and values are gathered: for each segment its prefix, then
        its own tokens, so that causal attention aligned at the last query and key is the right one.
        """

        def make() -> VarlenIndex:
            runs = [item.prefix + item.length for item in self.items]
            query, key = (
                to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)
                for counts in (self.lengths, runs)
            )
            gather = None
            if any(item.prefix for item in self.items):
                start, _, prefix_start, prefix = to_device(torch.tensor(self.items), device).T
                count = sum(runs)
                own = torch.arange(len(runs), device=device)
                own = own.repeat_interleave(key.diff(), output_size=count)  # whose key it is
                at = torch.arange(count, device=device) - key[own]
                gather = torch.where(
                    at < prefix[own],
                    prefix_start[own] + at,
                    start[own] + at - prefix[own],
                )
            return VarlenIndex(query, key, gather, max(self.lengths), max(runs))

        return self.kept(("varlen", torch.device(device)), make)


@dataclass
class PackedBatch:
    """Trees as one row of tokens.

    Attributes
    ----------
    input_ids, position_ids : Tensor
        ``[1, T]`` int64.
    readout : Tensor
        ``[N]`` int64: where in the row the last token of each text lies.
    rows : tuple of int
        Which text each read-out belongs to, ascending.
    segments : Segments
    needed : int
        Tokens of the texts one by one; ``T`` is less by what is shared.
    ends : tuple of int
        ``readout`` once more, for the host: to read it back from a GPU would wait for the GPU.
    """

    input_ids: Tensor
    position_ids: Tensor
    readout: Tensor
    rows: tuple[int, ...]
    segments: Segments
    needed: int
    ends: tuple[int, ...]

    @property
    def computed(self) -> int:
        """Tokens that are computed, ``T``."""
        return self.input_ids.shape[1]

    def text_places(self) -> Tensor:
        """Where each text's tokens lie in the packed row, ``[N, longest]`` int64.

        In the order of ``rows``, the shared prefix first; what is beyond a text's own length
        repeats its last token.
        """
        starts = {item.start + item.length - 1: item for item in self.segments.items}
        places = []
        for end in self.ends:
            item = starts[end]
            trunk = range(item.prefix_start, item.prefix_start + item.prefix)
            places.append([*trunk, *range(item.start, item.start + item.length)])
        longest = max(map(len, places))
        return torch.tensor([each + each[-1:] * (longest - len(each)) for each in places])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on a device; data loaders call it as they would a tensor's."""
        return self._with(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; data loaders ask for it."""
        return self._with(Tensor.pin_memory)

    def _with(self, moved: Callable[[Tensor], Tensor]) -> PackedBatch:
        names = ("input_ids", "position_ids", "readout")
        moves: dict[str, Any] = {name: moved(getattr(self, name)) for name in names}
        return replace(self, **moves)


def pack(ids: Sequence[Sequence[int]], trees: Sequence[Tree]) -> PackedBatch:
    """Lay trees end to end.

    Parameters
    ----------
    ids : sequence of sequences of int
        Token ids of the rows that the trees name (and perhaps of others).
    trees : sequence of Tree
        From :func:`companion.engine.plan_trees`; at least one.

    Raises
    ------
    DataError
        For no tree, or rows of a tree that do not begin alike.
    """
    if not trees:
        raise DataError("there is nothing to pack")
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    last: dict[int, int] = {}
    needed = 0

    def lay(part: Sequence[int], first_position: int, prefix_start: int, prefix: int) -> None:
        segments.append(Segment(len(tokens), len(part), prefix_start, prefix))
        tokens.extend(part)
        positions.extend(range(first_position, first_position + len(part)))

    for tree in trees:
        trunk = list(ids[tree.rows[0]][: tree.shared])
        begin = len(tokens)
        if tree.shared:
            lay(trunk, 0, 0, 0)
        for row in tree.rows:
            if list(ids[row][: tree.shared]) != trunk or len(ids[row]) <= tree.shared:
                raise DataError(
                    f"row {row} does not begin with the {tree.shared} tokens of its tree",
                    "plan the trees from the same rows",
                )
            lay(ids[row][tree.shared :], tree.shared, begin if tree.shared else 0, tree.shared)
            last[row] = len(tokens) - 1
            needed += len(ids[row])
    rows = tuple(sorted(last))
    ends = tuple(last[row] for row in rows)
    return PackedBatch(
        torch.tensor([tokens], dtype=torch.int64),
        torch.tensor([positions], dtype=torch.int64),
        torch.tensor(ends, dtype=torch.int64),
        rows,
        Segments(tuple(segments)),
        needed,
        ends,
    )
