"""From many values to one: tokens to a score, items to a metric, shards to a whole.

Chapters 3 (aggregation over tokens and steps) and 8 (exact means over ranks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from companion.errors import DataError, ShapeError
from companion.functional.checks import as_float, as_mask, has_dims, same_shape
from companion.functional.readout import last_token_index

How = Literal["mean", "min", "product", "log_product", "last"]


def aggregate(probabilities: Tensor, mask: Tensor, how: How = "mean") -> Tensor:
    """One score for each row from the probabilities of its tokens or steps.

    Always ``product <= min <= mean``. A product of per-token probabilities shrinks with length and
    is no probability of being right; the value at the last token is the natural baseline for an
    outcome model. Chapter 3.

    Parameters
    ----------
    probabilities : Tensor
        ``[B, T]``, in [0, 1] where the mask is true.
    mask : Tensor
        ``[B, T]`` booleans (or 0 and 1), true at the completion's tokens or at step boundaries.
        A prompt that is left unmasked changes every aggregate but the last.
    how : {"mean", "min", "product", "log_product", "last"}
        The product is summed in log space in float64. Over a long text even the right product
        underflows to 0; ``"log_product"`` returns its logarithm, which still ranks.

    Returns
    -------
    Tensor
        ``[B]``.

    Raises
    ------
    ShapeError
        If the shapes differ.
    DataError
        If a row has nothing to aggregate, or a value lies outside [0, 1] (logits, perhaps).
    """
    values = as_float("probabilities", probabilities)
    has_dims("probabilities", values, 2, "[B, T]")
    valid = as_mask("mask", mask)
    same_shape(probabilities=values, mask=valid)
    empty = ~valid.any(dim=1)
    if bool(empty.any()):
        raise DataError(f"row {int(empty.int().argmax())} of the mask selects nothing")
    outside = (valid & ~((values >= 0) & (values <= 1))).any(dim=1)
    if bool(outside.any()):
        raise DataError(
            f"row {int(outside.int().argmax())} holds a value outside [0, 1]",
            "pass probabilities: torch.sigmoid(logits)",
        )
    if how == "mean":
        return values.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1)
    if how == "min":
        return values.masked_fill(~valid, float("inf")).amin(dim=1)
    if how == "last":
        return values.gather(1, last_token_index(valid)[:, None]).squeeze(1)
    if how in ("product", "log_product"):
        wide = values.double() if values.device.type != "mps" else values
        total = wide.masked_fill(~valid, 1.0).log().sum(dim=1)
        return (total.exp() if how == "product" else total).to(values.dtype)
    raise DataError(
        f"unknown aggregation {how!r}", "there are mean, min, product, log_product and last"
    )


def mean_of_means(means: Sequence[float] | Tensor) -> float:
    """Plain mean of the means of shards: WRONG unless the shards are equally large.

    Here to be compared with :func:`weighted_mean_of_means`. Averaging rank-local means this way is
    how 5 pairs in batches of 4 came to report 0.75 where 0.60 is true (trl #7010). Chapter 8.
    """
    values = torch.as_tensor(means, dtype=torch.float64)
    if values.numel() == 0:
        raise ShapeError("there is no mean to average")
    return float(values.mean())


def weighted_mean_of_means(
    means: Sequence[float] | Tensor, counts: Sequence[int] | Tensor
) -> float:
    """Mean over all items, from the means of shards and their sizes. Chapter 8.

    Parameters
    ----------
    means : sequence of float
        Mean of each shard. That of an empty shard is ignored, NaN included.
    counts : sequence of int
        Items of each shard.

    Raises
    ------
    ShapeError
        If the lengths differ, or all shards are empty.
    DataError
        If a count is negative.
    """
    values = torch.as_tensor(means, dtype=torch.float64)
    sizes = torch.as_tensor(counts, dtype=torch.float64)
    same_shape(means=values, counts=sizes)
    if bool((sizes < 0).any()):
        raise DataError("a shard's count is negative")
    if not bool(sizes.sum() > 0):
        raise ShapeError("all shards are empty: there is no mean")
    used = sizes > 0
    return float((values[used] * sizes[used]).sum() / sizes.sum())


@dataclass
class SumCount:
    """A mean under construction: a sum and a count, so that any split gives the same result.

    Add items batch by batch, merge what workers counted, :meth:`all_reduce` over ranks, and only
    then divide. Sums are Python floats (float64). Chapter 8.

    >>> left, right = SumCount(), SumCount()
    >>> left.add(torch.tensor([1.0, 0.0])).mean
    0.5
    >>> right.add(torch.tensor([1.0])).merge(left).mean
    0.6666666666666666
    """

    sum: float = 0.0
    count: int = 0

    def add(self, values: Tensor, mask: Tensor | None = None) -> SumCount:
        """Add one value per item; with a mask, only where it is true. Returns itself.

        Raises
        ------
        ShapeError
            If the mask's shape differs from that of the values.
        """
        values = values.detach()
        if mask is not None:
            valid = as_mask("mask", mask)
            same_shape(values=values, mask=valid)
            values = values[valid]
        self.sum += float(values.to("cpu", torch.float64).sum())
        self.count += values.numel()
        return self

    def merge(self, other: SumCount) -> SumCount:
        """Add what another one counted. Returns itself."""
        self.sum += other.sum
        self.count += other.count
        return self

    @property
    def mean(self) -> float:
        """Sum over count; NaN if nothing was counted."""
        return self.sum / self.count if self.count else float("nan")

    def all_reduce(self) -> SumCount:
        """Sum over all ranks, in place; a no-op without a process group. Returns itself."""
        all_reduce_metrics({"": self})
        return self


def all_reduce_metrics(metrics: Mapping[str, SumCount]) -> dict[str, float]:
    """Sum all metrics over the ranks in one message, in place; return their means.

    Every rank must call it with the same names, also a rank that counted nothing. Without an
    initialised process group only the means are taken.

    Parameters
    ----------
    metrics : mapping of str to SumCount
        What this rank counted.

    Returns
    -------
    dict of str to float
        Global means, NaN where no rank counted anything.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # sorted: ranks may have met their metrics in different orders
        names = sorted(metrics)
        # Counts travel as float64, exact up to 2**53.
        packed = torch.tensor(
            [[metrics[name].sum, float(metrics[name].count)] for name in names],
            dtype=torch.float64,
            device="cuda" if dist.get_backend() == "nccl" else "cpu",
        )
        dist.all_reduce(packed)
        for name, (total, count) in zip(names, packed.tolist(), strict=True):
            metrics[name].sum, metrics[name].count = total, round(count)
    return {name: metric.mean for name, metric in metrics.items()}
