"""The plan: which rows share a prefix, and which trees go into which batch. Chapter 2.

A *tree* is a prefix of token ids, stored once, and the rows that begin with it as its branches: a
prompt with chosen and rejected, or with N candidates. A row that shares nothing is a tree of one
branch. Nobody has to say what the prompt is: the longest common prefix of the token ids is found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from companion.errors import DataError

#: A shorter common prefix (a BOS, the opening of a template) costs more to share than it saves.
MIN_SHARED = 8


@dataclass(frozen=True)
class Tree:
    """Rows with a common prefix.

    Attributes
    ----------
    rows : tuple of int
        Indices of the rows.
    shared : int
        Tokens of the prefix; 0 for a single row. Each row is longer.
    size : int
        Tokens to compute: the prefix once, then the rest of each row.
    """

    rows: tuple[int, ...]
    shared: int
    size: int

    @property
    def keys(self) -> int:
        """Keys that attention gathers: each row's own, and the prefix again for each row."""
        return self.size + self.shared * len(self.rows)


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix that leaves each row a token of its own.

    Parameters
    ----------
    first, second : sequence of int
        Token ids, at least one each. Lists are fastest.
    """
    low, high = 0, min(len(first), len(second)) - 1
    while low < high:  # slices are compared in C, so halving beats a loop over tokens
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def plan_trees(
    ids: Sequence[Sequence[int]],
    *,
    min_shared: int = MIN_SHARED,
    max_tokens: int | None = None,
    max_keys: int | None = None,
) -> list[Tree]:
    """Group rows into the trees that leave few tokens to compute.

    Rows are sorted by their token ids, so that rows with a common prefix are neighbours. From the
    longest common prefixes to the shortest, groups are joined where that saves more than what they
    share among themselves.

    Parameters
    ----------
    ids : sequence of sequences of int
        Token ids of each row, at least one.
    min_shared : int
        Prefixes below this length are not shared.
    max_tokens : int, optional
        Budget of a batch. A tree above it is cut, and its prefix computed once for each part; the
        trees returned are all within it, but for single rows that are longer.
    max_keys : int, optional
        The same for :attr:`Tree.keys`.

    Returns
    -------
    list of Tree
        Every row in exactly one.

    Raises
    ------
    DataError
        For a row without tokens, or a budget or `min_shared` below 1.
    """
    most_tokens, most_keys = (math.inf if most is None else most for most in (max_tokens, max_keys))
    if min(min_shared, most_tokens, most_keys) < 1:
        raise DataError(
            f"min_shared={min_shared}, max_tokens={max_tokens}, max_keys={max_keys}",
            "use positive numbers",
        )
    rows = [list(item) for item in ids]
    for index, item in enumerate(rows):
        if not item:
            raise DataError(f"row {index} has no token", "drop empty texts")
    order = sorted(range(len(rows)), key=rows.__getitem__)
    trees: list[Tree] = []
    # Ranges of sorted rows whose neighbours share enough; only within them is there a choice.
    begin = 0
    common: list[int] = []
    for place in range(1, len(order) + 1):
        here = (
            shared_length(rows[order[place - 1]], rows[order[place]]) if place < len(order) else 0
        )
        if here >= min_shared:
            common.append(here)
            continue
        members = order[begin:place]
        for cluster, shared in _cut(common):
            group = [members[i] for i in cluster]
            trees.extend(_parts(rows, group, shared, most_tokens, most_keys))
        begin, common = place, []
    return trees


@dataclass
class _Range:
    """Neighbouring rows, and the best that was found for them: clusters, with what each shares."""

    size: int
    saved: int
    clusters: list[tuple[list[int], int]]


def _cut(common: list[int]) -> list[tuple[list[int], int]]:
    """Cluster ``len(common) + 1`` sorted rows; each cluster's places and shared length.

    `common` holds what neighbours share. The rows form a hierarchy: a range that shares `m` tokens
    consists of parts that share more. A cluster of ``n`` rows that share `m` saves ``(n - 1) * m``
    tokens.
    """
    opened: list[tuple[int, list[_Range]]] = []
    last = _Range(1, 0, [([0], 0)])
    for place, shared in enumerate([*common, 0], start=1):
        while opened and opened[-1][0] > shared:
            depth, parts = opened.pop()
            last = _joined(depth, [*parts, last])
        if place > len(common):
            break
        if opened and opened[-1][0] == shared:
            opened[-1][1].append(last)
        else:
            opened.append((shared, [last]))
        last = _Range(1, 0, [([place], 0)])
    return last.clusters


def _joined(shared: int, parts: list[_Range]) -> _Range:
    """The parts that gain by it as one cluster, the others as they are."""
    inside = [part for part in parts if part.size * shared > part.saved]
    gain = sum(part.size * shared - part.saved for part in inside) - shared
    size, saved = sum(part.size for part in parts), sum(part.saved for part in parts)
    if gain <= 0:
        return _Range(size, saved, [c for part in parts for c in part.clusters])
    places = [place for part in inside for rows, _ in part.clusters for place in rows]
    outside = [c for part in parts if part.size * shared <= part.saved for c in part.clusters]
    return _Range(size, saved + gain, [(places, shared), *outside])


def _parts(
    rows: Sequence[Sequence[int]],
    group: list[int],
    shared: int,
    max_tokens: float,
    max_keys: float,
) -> list[Tree]:
    """A tree, or several with the same prefix if one is above the budget."""
    parts: list[Tree] = []
    held: list[int] = []
    size = 0
    for index in group:
        rest = len(rows[index]) - shared
        keys = size + rest + shared * (len(held) + 1)
        if held and (size + rest > max_tokens or keys > max_keys):
            parts.append(_tree(rows, held, shared))
            held = []
        size = size + rest if held else len(rows[index])
        held.append(index)
    parts.append(_tree(rows, held, shared))
    return parts


def _tree(rows: Sequence[Sequence[int]], held: list[int], shared: int) -> Tree:
    if len(held) == 1:
        return Tree((held[0],), 0, len(rows[held[0]]))
    return Tree(tuple(held), shared, shared + sum(len(rows[i]) - shared for i in held))


def plan_batches(
    ids: Sequence[Sequence[int]],
    max_tokens: int,
    max_rows: int | None = None,
    *,
    min_shared: int = MIN_SHARED,
    tree_tokens: int | None = None,
    max_keys: int | None = None,
) -> list[list[Tree]]:
    """Batches of trees, each within a budget of tokens that are all computed and all needed.

    Parameters
    ----------
    ids : sequence of sequences of int
        Token ids of each row.
    max_tokens : int
        Budget for the sum of the trees' sizes. A single row that is longer gets a batch of its own.
    max_rows : int, optional
        Most rows of a batch.
    min_shared : int
        As in :func:`plan_trees`.
    tree_tokens : int, optional
        Where the budget is one of speed and not of memory: a tree of up to so many tokens stays
        whole, in a batch of its own, since cutting it computes its prefix again.
    max_keys : int, optional
        Budget for the sum of the trees' keys, which are copies where prefixes are shared: 64
        candidates of a long prompt have ten times as many keys as tokens.

    Returns
    -------
    list of list of Tree
        Largest trees first, so that a lack of memory shows at once; every row exactly once.

    Raises
    ------
    DataError
        For a row without tokens, or a budget below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"max_rows is {max_rows}", "use a positive number")
    largest = max(max_tokens, tree_tokens or 0) if max_tokens > 0 else max_tokens
    trees = plan_trees(ids, min_shared=min_shared, max_tokens=largest, max_keys=max_keys)
    if max_rows is not None:
        trees = [
            _tree(ids, list(tree.rows[i : i + max_rows]), tree.shared)
            for tree in trees
            for i in range(0, len(tree.rows), max_rows)
        ]
    batches: list[list[Tree]] = []
    tokens = rows = keys = 0
    for tree in sorted(trees, key=lambda t: -t.size):
        full = tokens + tree.size > max_tokens
        full = full or (max_rows is not None and rows + len(tree.rows) > max_rows)
        full = full or (max_keys is not None and keys + tree.keys > max_keys)
        if not batches or full:
            batches.append([])
            tokens = rows = keys = 0
        batches[-1].append(tree)
        tokens, rows, keys = tokens + tree.size, rows + len(tree.rows), keys + tree.keys
    return batches
