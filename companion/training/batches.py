"""What makes the gradient exact: every pair once, weighted, counted over the whole step.

The gradient of a step has to be that of the mean over all pairs of the global batch, whatever the
number of ranks, the accumulation and the size of the last batch. Stock trainers give the mean of
local means, and accelerate's ``even_batches`` repeats rows to fill the last batch, so that some
pairs count more than others (cosine with the exact gradient on 9 pairs, batch 4, 2 ranks: 0.41).
Here the last batch is filled with *padding pairs* of weight 0, which keep the ranks in step and
count nowhere. Chapter 8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from companion.batching.packing import PackedBatch
from companion.errors import DataError

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

#: the index that stands for a padding pair
PADDING = -1


class PaddedSampler(Sampler[int]):
    """An order of the rows, filled up so that every rank gets as many batches as the others.

    Accelerate deals the stream out in blocks of ``batch_size``, one block to a rank in turn. The
    rows of the last, short round are spread evenly over its blocks, and :data:`PADDING` fills the
    rest. So every batch is full, and no wrapper of accelerate's has a reason to repeat rows.

    Parameters
    ----------
    order : callable
        Epoch number to a sequence of row indices; the same on every rank.
    n_rows : int
        Length of that sequence.
    batch_size, ranks : int
        Pairs of a micro-batch, and number of processes.
    drop_last : bool
        Leave the short round out in place of filling it.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        n_rows: int,
        *,
        batch_size: int,
        ranks: int = 1,
        drop_last: bool = False,
    ) -> None:
        self._order = order
        self._n_rows = n_rows
        self._batch_size = batch_size
        self._ranks = ranks
        self._drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; a resumed run must see the order that it left."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole = self._batch_size * self._ranks
        if self._drop_last:
            return self._n_rows // whole * whole
        return -(-self._n_rows // whole) * whole

    def __iter__(self) -> Iterator[int]:
        rows = list(self._order(self.epoch))
        if len(rows) != self._n_rows:
            raise DataError(f"the order holds {len(rows)} rows of {self._n_rows}")
        whole = self._batch_size * self._ranks
        rest = len(rows) % whole
        yield from rows[: len(rows) - rest]
        if self._drop_last or rest == 0:
            return
        last = rows[len(rows) - rest :]
        begin = 0
        for rank in range(self._ranks):
            size = rest // self._ranks + (rank < rest % self._ranks)
            yield from last[begin : begin + size]
            yield from [PADDING] * (self._batch_size - size)
            begin += size


def epoch_order(
    n_rows: int,
    strategy: str,
    *,
    seed: int,
    lengths: Sequence[int] | None = None,
    step: int = 1,
    shuffle_steps: bool = False,
) -> Callable[[int], Sequence[int]]:
    """Epoch number to an order of the rows, the same on every rank and for a resumed run.

    Parameters
    ----------
    n_rows : int
    strategy : {"random", "sequential", "group_by_length"}
        ``group_by_length`` puts rows of like length into a step (`lengths` and the rows of a
        `step` are needed); within each stretch of 50 steps the long ones come first.
    seed : int
        Epoch ``e`` is shuffled by ``seed + e``.
    shuffle_steps : bool
        Whether the steps of like length come at random, but for the first: it holds the longest
        row, so that memory runs out at once if it does.
    """

    def order(epoch: int) -> Sequence[int]:
        generator = torch.Generator().manual_seed(seed + epoch)
        if strategy == "group_by_length":
            rows = list(
                LengthGroupedSampler(step, lengths=list(lengths or ()), generator=generator)
            )
            return _shuffled(rows, step, generator) if shuffle_steps else rows
        if strategy == "random":
            return torch.randperm(n_rows, generator=generator).tolist()
        return range(n_rows)

    return order


def _shuffled(rows: Sequence[int], step: int, generator: torch.Generator) -> list[int]:
    """The same steps in random order; the first stays, and so does a short one at the end."""
    steps = [list(rows[begin : begin + step]) for begin in range(0, len(rows), step)]
    last = steps.pop() if len(steps[-1]) < step else []
    order = torch.randperm(max(len(steps) - 1, 0), generator=generator).tolist()
    shuffled = [*steps[:1], *(steps[1 + place] for place in order), last]
    return [row for rows_of_step in shuffled for row in rows_of_step]


class PairRows(TorchDataset[dict[str, Any]]):
    """Tokenised pairs; the index :data:`PADDING` gives a padding pair of one token a side."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        # any real token does: the pair has weight 0, but must not look like padding to the guards
        token = int(rows[0]["chosen_ids"][-1])
        self._padding = {"chosen_ids": [token], "rejected_ids": [token], "weight": 0.0}

    @property
    def rows(self) -> Any:
        """The rows without the padding."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._padding) if index == PADDING else self._rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Fetch many at once, which `datasets` does far faster than one by one."""
        wanted = [index for index in indices if index != PADDING]
        if not hasattr(self._rows, "__getitems__"):
            return [self[index] for index in indices]
        found = iter(self._rows.__getitems__(wanted) if wanted else [])
        return [dict(self._padding) if index == PADDING else next(found) for index in indices]


class ExactBatches(_Base):
    """The part of the trainer that makes batches and counts their pairs."""

    _order: PaddedSampler | None = None
    #: see :func:`epoch_order`
    _shuffle_steps = False
    #: what the collator looks at
    _columns: tuple[str, ...] = ("chosen_ids", "rejected_ids", "margin", "row", "weight")

    def _with_padding(self, rows: Any) -> PairRows:
        """The rows, with a row of weight 0 at the index :data:`PADDING`."""
        return PairRows(rows)

    def _row_lengths(self, dataset: Any) -> list[int]:
        """Tokens of each row's longest text, to group rows by."""
        return [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = list(self._columns)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """As in transformers, over rows that include padding pairs."""
        name = self.args.length_column_name
        lengths = None
        if is_training and self.args.train_sampling_strategy == "group_by_length":
            lengths = (
                list(dataset[name]) if name in dataset.column_names else self._row_lengths(dataset)
            )
        rows = self._with_padding(self._remove_unused_columns(dataset, description=description))

        def sampler(_: Any) -> Sampler[int]:
            return self._sampler(len(rows), batch_size, is_training, lengths)

        loader = super()._get_dataloader(
            rows,  # type: ignore[arg-type]
            description,
            batch_size,
            sampler_fn=sampler,
            is_training=is_training,
            dataloader_key=dataloader_key,
        )
        return loader  # type: ignore[no-any-return]

    def _sampler(
        self, n_rows: int, batch_size: int, is_training: bool, lengths: list[int] | None
    ) -> PaddedSampler:
        args = self.args
        ranks = self.accelerator.num_processes
        order = epoch_order(
            n_rows,
            args.train_sampling_strategy if is_training else "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=lengths,
            step=batch_size * ranks * args.gradient_accumulation_steps,
            shuffle_steps=self._shuffle_steps,
        )
        drop_last = is_training and args.dataloader_drop_last
        left_out = n_rows % (batch_size * ranks) if drop_last else 0
        if left_out:
            logger.warning(
                f"dataloader_drop_last leaves {left_out} of {n_rows:,} pairs out of an epoch"
            )
        sampler = PaddedSampler(
            order, n_rows, batch_size=batch_size, ranks=ranks, drop_last=drop_last
        )
        if is_training:
            self._order = sampler
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate's `set_epoch` does not reach a sampler below `skip_first_batches`, so a run
        # resumed in its second epoch would see the first epoch's order.
        if self._order is not None:
            self._order.set_epoch(int(kwargs["epoch"]))
        return super()._run_epoch(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        # transformers would cast margins and weights to DeepSpeed's half precision
        if isinstance(data, (Tensor, PackedBatch)):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        """Pairs of the whole step: all its micro-batches, on all ranks."""
        if not batch_samples:
            return None
        weight = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum()
        return self.accelerator.gather(weight.to(device)).sum()  # type: ignore[no-any-return]
