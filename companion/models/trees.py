"""Texts that begin alike, laid out so that the common beginning is computed once (Chapter 6).

The two completions of a pair, the K of a ranking and the N of a best-of-N share their prompt. A
:class:`Tree` holds such rows: the prefix once, then the rest of each row. Trees are laid end to end
without padding, so the tokens that are computed are the tokens that are needed. Prior art: prefix
sharing for DPO (Wang and Hegde 2024, arXiv 2410.20305).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion.errors import DataError

#: A shorter common beginning is not worth a branch: chat templates begin all texts alike.
MIN_PREFIX = 8


@dataclass(frozen=True)
class Tree:
    """Rows that share their first ``prefix`` tokens; a row of its own has ``prefix`` 0."""

    rows: tuple[int, ...]
    prefix: int

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that are computed: the prefix once, and the rest of each row."""
        return self.prefix + sum(lengths[row] - self.prefix for row in self.rows)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the longest common prefix."""
    width = min(len(first), len(second))
    different = np.flatnonzero(first[:width] != second[:width])
    return int(different[0]) if different.size else width


def shared_prefix_trees(
    sequences: Sequence[Sequence[int]], *, min_prefix: int = MIN_PREFIX
) -> list[Tree]:
    """Find the rows that begin alike.

    The rows are sorted, so that those with a common beginning stand together; a row joins the tree
    before it if that saves tokens. Every row keeps a token of its own at least, since its score is
    read there.

    Parameters
    ----------
    sequences : sequence of sequences of int
        Token ids, none of them empty.
    min_prefix : int
        Shortest prefix that is shared.

    Returns
    -------
    list of Tree
        Every row in exactly one.

    Raises
    ------
    DataError
        If a sequence is empty.
    """
    arrays = [np.asarray(ids, dtype=">u4") for ids in sequences]
    for row, ids in enumerate(arrays):
        if not ids.size:
            raise DataError(f"sequence {row} is empty", "drop empty texts before the batch is made")
    # big-endian bytes sort as the numbers do
    order = sorted(range(len(arrays)), key=lambda row: arrays[row].tobytes())
    trees: list[Tree] = []
    rows: list[int] = []
    prefix = 0
    for row in order:
        if rows:
            shared = min(_common(arrays[rows[-1]], arrays[row]), len(arrays[row]) - 1)
            shared = min(shared, prefix if len(rows) > 1 else len(arrays[rows[0]]) - 1)
            # what is saved with this row, and without it
            if shared >= min_prefix and len(rows) * shared >= (len(rows) - 1) * prefix:
                rows.append(row)
                prefix = shared
                continue
            trees.append(Tree(tuple(rows), prefix if len(rows) > 1 else 0))
        rows, prefix = [row], 0
    if rows:
        trees.append(Tree(tuple(rows), prefix if len(rows) > 1 else 0))
    return trees


def tree_batches(
    trees: Sequence[Tree], lengths: Sequence[int], max_tokens: int, max_rows: int | None = None
) -> list[list[Tree]]:
    """Fill a budget of computed tokens, the largest trees first.

    A tree that exceeds the budget is cut into several, each with the prefix; a row that does so
    alone gets a batch of its own.

    Parameters
    ----------
    trees : sequence of Tree
    lengths : sequence of int
        Tokens of each row.
    max_tokens : int
        Budget for the computed tokens of a batch.
    max_rows : int, optional
        Most rows of a batch.

    Raises
    ------
    DataError
        For a budget below 1.
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise DataError(
            f"the budget is max_tokens={max_tokens}, max_rows={max_rows}", "use positive numbers"
        )
    most = max_rows or sum(len(tree.rows) for tree in trees) + 1
    pieces: list[Tree] = []
    for tree in trees:
        rows: list[int] = []
        used = tree.prefix
        for row in tree.rows:
            own = lengths[row] - tree.prefix
            if rows and (used + own > max_tokens or len(rows) == most):
                pieces.append(_piece(rows, tree.prefix))
                rows, used = [], tree.prefix
            rows.append(row)
            used += own
        pieces.append(_piece(rows, tree.prefix))
    batches: list[list[Tree]] = []
    used = n_rows = 0
    for piece in sorted(pieces, key=lambda piece: -piece.tokens(lengths)):
        tokens = piece.tokens(lengths)
        if not batches or used + tokens > max_tokens or n_rows + len(piece.rows) > most:
            batches.append([])
            used = n_rows = 0
        batches[-1].append(piece)
        used += tokens
        n_rows += len(piece.rows)
    return batches


def _piece(rows: Sequence[int], prefix: int) -> Tree:
    return Tree(tuple(rows), prefix if len(rows) > 1 else 0)


@dataclass(frozen=True)
class Layout:
    """Trees laid end to end: one row of tokens without padding.

    Attributes
    ----------
    input_ids, position_ids : Tensor
        ``[1, P]`` int64. A branch's positions go on from its prefix.
    segments : tuple of (int, tuple of int)
        A tree each: length of its prefix, and the lengths of its branches.
    last : Tensor
        ``[B]`` int64: where the last token of each row lies, in the order of the rows.
    needed : int
        Tokens of all rows, as if each were computed alone.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[tuple[int, tuple[int, ...]], ...]
    last: Tensor
    needed: int

    @property
    def computed(self) -> int:
        """Tokens that are computed."""
        return self.input_ids.shape[1]


def lay_out(sequences: Sequence[Sequence[int]], trees: Sequence[Tree]) -> Layout:
    """Lay the rows of some trees end to end.

    Parameters
    ----------
    sequences : sequence of sequences of int
        Token ids; the rows of `trees` are indices into it.
    trees : sequence of Tree

    Returns
    -------
    Layout
        With the rows in the order in which the trees name them.

    Raises
    ------
    DataError
        If rows of a tree do not begin with the same tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, tuple[int, ...]]] = []
    last: list[int] = []
    for tree in trees:
        head = list(sequences[tree.rows[0]][: tree.prefix])
        ids += head
        positions += range(tree.prefix)
        branches: list[int] = []
        for row in tree.rows:
            sequence = sequences[row]
            if tree.prefix and list(sequence[: tree.prefix]) != head:
                raise DataError(f"row {row} does not begin with the prefix of its tree")
            ids += sequence[tree.prefix :]
            positions += range(tree.prefix, len(sequence))
            branches.append(len(sequence) - tree.prefix)
            last.append(len(ids) - 1)
        segments.append((tree.prefix, tuple(branches)))
    return Layout(
        input_ids=torch.tensor([ids], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        segments=tuple(segments),
        last=torch.tensor(last, dtype=torch.int64),
        needed=sum(len(sequences[row]) for tree in trees for row in tree.rows),
    )
