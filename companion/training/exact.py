"""Batches of pairs, and exact figures of many pairs. Chapters 4 and 8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from companion.batching import pack, pad_batch, plan_trees
from companion.models.forward import check_texts
from companion.models.guards import check_batch
from companion.reduction import SumCount, all_reduce_metrics
from companion.selection import margin as pair_margin
from companion.selection import pairwise_accuracy


def make_batch(
    ids: Sequence[list[int]],
    pad_token_id: int,
    *,
    packing: bool,
    pad_to_multiple_of: int | None = None,
    config: Any = None,
) -> dict[str, Any]:
    """Texts as one batch, checked by the guards if there is a `config`. Chapter 4.

    Returns
    -------
    dict
        Padded: ``input_ids`` and ``attention_mask`` ``[N, T]``. Packed: ``input_ids`` ``[1, T]``,
        ``packed`` (a :class:`companion.batching.PackedBatch`, its rows in the order of `ids`) and
        ``lengths`` ``[N]``.
    """
    if packing:
        if config is not None:
            check_texts(ids, config)
        packed = pack(ids, plan_trees(ids))
        lengths = torch.tensor([len(text) for text in ids])
        return {"input_ids": packed.input_ids, "packed": packed, "lengths": lengths}
    padded = pad_batch(ids, pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
    if config is not None:
        check_batch(padded["input_ids"], padded["attention_mask"], config)
    return dict(padded)


def text_lengths(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of each text of a batch of :func:`make_batch`, ``[N]``."""
    lengths: Tensor = inputs["lengths"] if "packed" in inputs else inputs["attention_mask"].sum(1)
    return lengths


def forward_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward is given of a batch of :func:`make_batch`."""
    name = "packed" if "packed" in inputs else "attention_mask"
    return {"input_ids": inputs["input_ids"], name: inputs[name]}


@dataclass
class PairCollator:
    """Pairs to a batch, padded at the right or packed: the chosen first, then the rejected.

    Gives ``input_ids`` and ``attention_mask`` ``[2B, T]``, ``weight`` ``[B]`` (0 for padding
    pairs), ``row`` ``[B]`` (the row of the source, -1 if unknown) and, if the rows have one,
    ``margin`` ``[B]``. It never cuts a sequence.

    Packed, ``input_ids`` is ``[1, T]`` without padding, a prompt stands there once for all texts
    of the batch that begin with it, and in place of the mask there are ``packed`` (a
    :class:`companion.batching.PackedBatch`, its rows in the order above) and ``lengths`` ``[2B]``.

    Parameters
    ----------
    pad_token_id : int
        What the padding is filled with.
    pad_to_multiple_of : int, optional
        Round the width up.
    config : transformers.PretrainedConfig, optional
        With it, every batch passes :func:`companion.models.guards.check_batch`, so stock
        transformers would read the same tokens.
    packing : bool
        Pack; only for models that :func:`companion.models.packing_obstacle` lets pass.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    config: Any = None
    packing: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch.

        Raises
        ------
        ReadoutError
            If a guard refuses it.
        """
        sides = [list(e["chosen_ids"]) for e in examples]
        sides += [list(e["rejected_ids"]) for e in examples]
        batch = make_batch(
            sides,
            self.pad_token_id,
            packing=self.packing,
            pad_to_multiple_of=self.pad_to_multiple_of,
            config=self.config,
        )
        batch["weight"] = torch.tensor([float(e.get("weight", 1.0)) for e in examples])
        batch["row"] = torch.tensor([int(e.get("row", -1)) for e in examples])
        if any("margin" in e for e in examples):
            batch["margin"] = torch.tensor([float(e.get("margin", 0.0)) for e in examples])
        return batch


#: columns of the table that :class:`PairMetrics` keeps of each batch
COLUMNS = ("weight", "loss", "nll", "chosen", "rejected", "tokens")


@dataclass
class PairMetrics:
    """Figures of many pairs, kept per pair until they are asked for.

    Batches are added as tables ``[B, 6]`` (see :data:`COLUMNS`) on their device, without a copy to
    the host; rows whose first column is 0 are left out. All means are sums over counts (trl #7010:
    the mean of batch means of 5 pairs in batches of 4 was 0.75 where 0.60 is true).
    """

    _tables: list[Tensor] = field(default_factory=list)

    @property
    def used(self) -> bool:
        """Whether anything was added since the last :meth:`pop`."""
        return bool(self._tables)

    def add(self, table: Tensor) -> None:
        """Add a table ``[B, 6]``."""
        self._tables.append(table.detach())

    def pop(self) -> Tensor:
        """All pairs of weight 1 so far, ``[n, 6]`` float64 on the CPU; begins anew."""
        if not self._tables:
            return torch.zeros(0, len(COLUMNS), dtype=torch.float64)
        table = torch.cat(self._tables).to("cpu").to(torch.float64)
        self._tables = []
        return table[table[:, 0] > 0]


def summarise(table: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Exact figures of a table of pairs, over all ranks if `gather` is given.

    Parameters
    ----------
    table : Tensor
        ``[n, 6]`` as :meth:`PairMetrics.pop` gives it; this rank's pairs.
    gather : callable, optional
        Stacks a ``[1, 2]`` tensor of each rank to ``[ranks, 2]``. Every rank must call.

    Returns
    -------
    dict of str to float
        ``loss`` (what is trained), ``nll`` (``-log sigmoid(margin)``, in nats), ``accuracy`` (a tie
        is no win), ``ties``, ``margin``, ``mean_reward``, ``min_reward``, ``max_reward``,
        ``num_pairs``; and ``tokens``, the number of tokens. Means of nothing are NaN.
    """
    columns = dict(zip(COLUMNS, table.T, strict=True))
    chosen, rejected = columns["chosen"], columns["rejected"]
    sums = {
        "loss": SumCount().add(columns["loss"]),
        "nll": SumCount().add(columns["nll"]),
        "accuracy": SumCount().add(pairwise_accuracy(chosen, rejected)),
        "ties": SumCount().add((chosen == rejected).double()),
        "margin": SumCount().add(pair_margin(chosen, rejected)),
        "mean_reward": SumCount().add(torch.cat([chosen, rejected])),
        "tokens": SumCount().add(columns["tokens"]),
    }
    both = torch.cat([chosen, rejected])
    low = both.min() if both.numel() else torch.tensor(float("inf"), dtype=both.dtype)
    high = both.max() if both.numel() else torch.tensor(float("-inf"), dtype=both.dtype)
    extremes = torch.stack([low, -high])[None]
    if gather is not None:
        figures = all_reduce_metrics(sums)
        extremes = gather(extremes)
    else:
        figures = {name: value.mean for name, value in sums.items()}
    low, high = extremes.amin(dim=0).cpu()
    figures["min_reward"], figures["max_reward"] = float(low), -float(high)
    figures["num_pairs"] = float(sums["loss"].count)
    figures["tokens"] = sums["tokens"].sum
    return figures
