"""What makes the gradient exact: every row once, weighted, counted over the whole step.

The gradient of a step has to be that of the mean over all items of the global batch, whatever the
number of ranks, the accumulation and the size of the last batch. Stock trainers give the mean of
local means, and accelerate's ``even_batches`` repeats rows to fill the last batch, so that some
pairs count more than others (cosine with the exact gradient on 9 pairs, batch 4, 2 ranks: 0.41).
Here the last batch is filled with *padding rows* of weight 0, which keep the ranks in step and
count nowhere. Chapter 8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset as TorchDataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from companion.engine import pack, pad_batch, plan_trees
from companion.engine.forward import check_texts
from companion.engine.packing import PackedBatch
from companion.errors import DataError
from companion.models.guards import check_batch

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

#: the index that stands for a padding row
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
        Rows of a micro-batch, and number of processes.
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


class PaddedRows(TorchDataset[dict[str, Any]]):
    """Tokenised rows; the index :data:`PADDING` gives the `padding` row, of weight 0."""

    def __init__(self, rows: Any, padding: Mapping[str, Any]) -> None:
        #: the rows without the padding
        self.rows = rows
        self._padding = {**padding, "weight": 0.0}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._padding) if index == PADDING else self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Fetch many at once, which `datasets` does far faster than one by one."""
        wanted = [index for index in indices if index != PADDING]
        if not hasattr(self.rows, "__getitems__"):
            return [self[index] for index in indices]
        found = iter(self.rows.__getitems__(wanted) if wanted else [])
        return [dict(self._padding) if index == PADDING else next(found) for index in indices]


@dataclass
class Collator:
    """Rows of token ids to a batch, its texts padded at the right or packed; no text is ever cut.

    Gives, of N texts, ``input_ids`` and ``attention_mask`` ``[N, T]``. Packed, ``input_ids`` is
    ``[1, T]`` without padding, a prompt stands there once for all texts of the batch that begin
    with it, and in place of the mask there are ``packed`` (a
    :class:`companion.engine.PackedBatch`, its rows in the order of the texts) and ``lengths``
    ``[N]``. Besides, of B rows, ``real`` ``[B]``, 0 for padding, ``row`` ``[B]`` (the row of the
    source, -1 if unknown), and what the kind gives, at least ``weight`` ``[B]``.

    Parameters
    ----------
    pad_token_id : int
        What the padding is filled with.
    pad_to_multiple_of : int, optional
        Round the width up.
    config : transformers.PretrainedConfig, optional
        With it, every batch passes the guards (:func:`companion.models.check_batch`), so
        stock transformers would read the same tokens.
    packing : bool
        Pack; only for models that :func:`companion.engine.packing_obstacle` lets pass.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    config: Any = None
    packing: bool = False

    def texts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The token ids of all texts of the rows."""
        raise NotImplementedError

    def labels(
        self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """What the kind needs of the rows, beside the texts of the `batch`."""
        raise NotImplementedError

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make the batch.

        Raises
        ------
        ReadoutError
            If a guard refuses it.
        """
        batch = self._batch(self.texts(examples))
        batch["real"] = torch.tensor([float(e.get("weight", 1.0) > 0) for e in examples])
        batch["row"] = torch.tensor([int(e.get("row", -1)) for e in examples])
        return {**batch, **self.labels(examples, batch)}

    def _batch(self, ids: Sequence[list[int]]) -> dict[str, Any]:
        if self.packing:
            if self.config is not None:
                check_texts(ids, self.config)
            packed = pack(ids, plan_trees(ids))
            lengths = torch.tensor([len(text) for text in ids])
            return {"input_ids": packed.input_ids, "packed": packed, "lengths": lengths}
        padded = pad_batch(ids, self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
        if self.config is not None:
            check_batch(padded["input_ids"], padded["attention_mask"], self.config)
        return dict(padded)


@dataclass
class CutByTokens:
    """Makes a micro-batch as several parts, each of at most so many tokens.

    Memory is a matter of tokens and not of rows, and the parts' gradients add up to that of the
    whole (:meth:`companion.training.trainer.ExactTrainer.training_step` runs them). The longest
    rows come first.

    Parameters
    ----------
    collator : callable
        Makes a batch of rows.
    own : Collator
        Knows the texts of a row, and whether they are packed.
    max_tokens : int
        Most tokens of a part: all those of its texts, or with padding texts × longest. A single row
        that has more is a part by itself.
    padding : mapping
        The padding row: a rank that has fewer parts than the others makes up for it by these.
    """

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    own: Collator
    max_tokens: int
    padding: Mapping[str, Any]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``parts``, a list of batches, the ``weight`` of all rows, and ``input_ids`` ``[T]``."""
        lengths = [list(map(len, self.own.texts([example]))) for example in examples]
        order = sorted(range(len(examples)), key=lambda row: -sum(lengths[row]))
        groups: list[list[int]] = []
        texts: list[int] = []
        for row in order:
            texts = [*texts, *lengths[row]]
            size = sum(texts) if self.own.packing else len(texts) * max(texts)
            if not groups or size > self.max_tokens:
                groups.append([])
                texts = lengths[row]
            groups[-1].append(row)
        parts = [self.collator([examples[row] for row in group]) for group in groups]
        return {
            "parts": parts,
            "weight": torch.cat([part["weight"] for part in parts]),
            # transformers counts these
            "input_ids": torch.cat([part["input_ids"].flatten() for part in parts]),
        }

    def filler(self) -> dict[str, Any]:
        """A part that counts nowhere."""
        return self.collator([{**self.padding, "weight": 0.0}])


def text_lengths(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of each text of a batch, ``[N]``."""
    lengths: Tensor = inputs["lengths"] if "packed" in inputs else inputs["attention_mask"].sum(1)
    return lengths


def forward_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward is given of a batch."""
    name = "packed" if "packed" in inputs else "attention_mask"
    return {"input_ids": inputs["input_ids"], name: inputs[name]}


class ItemTables:
    """Figures of many items, kept one by one until they are asked for.

    Batches are added as tables ``[B, columns]`` on their device, without a copy to the host; rows
    whose first column is 0 are padding, and left out. Means are taken of the whole (trl #7010: the
    mean of batch means of 5 pairs in batches of 4 was 0.75 where 0.60 is true).
    """

    def __init__(self) -> None:
        self._tables: list[Tensor] = []

    @property
    def used(self) -> bool:
        """Whether anything was added since the last :meth:`pop`."""
        return bool(self._tables)

    def add(self, table: Tensor) -> None:
        """Add a table ``[B, columns]``."""
        self._tables.append(table.detach())

    def table(self) -> Tensor:
        """All real items so far, ``[n, columns]`` float64 on the CPU."""
        if not self._tables:
            return torch.zeros(0, 0, dtype=torch.float64)
        table = torch.cat(self._tables).to("cpu").to(torch.float64)
        return table[table[:, 0] > 0]

    def pop(self) -> Tensor:
        """The :meth:`table`; begins anew."""
        table = self.table()
        self._tables = []
        return table


class ExactBatches(_Base):
    """The part of the trainer that makes batches and counts what they hold."""

    #: columns by which rows are known to hold token ids already
    ids: ClassVar[tuple[str, ...]]
    #: what else the collator looks at
    extras: ClassVar[tuple[str, ...]] = ()
    #: what an item of the loss is called in logs ("pairs")
    items: ClassVar[str]
    #: makes the batches, if no other was given
    own_collator: Collator
    #: see :func:`epoch_order`
    shuffle_steps: ClassVar[bool] = False
    _order: PaddedSampler | None = None
    #: what cuts the micro-batches of training, if anything, and how many parts the next ones have
    _cut: CutByTokens | None = None
    _n_parts: Sequence[int] = ()

    def padding_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row that counts nowhere, made in the likeness of a real one.

        Any real token does for its text; it must not look like padding to the guards.
        """
        raise NotImplementedError

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = [*self.ids, *self.extras, "row", "weight"]

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """As in transformers, over rows that include padding."""
        args, ranks = self.args, self.accelerator.num_processes
        most: int | None = getattr(args, "micro_batch_tokens", None)
        strategy = args.train_sampling_strategy if is_training else "sequential"
        lengths: list[int] | None = None
        if strategy == "group_by_length":
            name = args.length_column_name
            lengths = (
                list(dataset[name])
                if name in dataset.column_names
                else [max(map(len, self.own_collator.texts([row]))) for row in dataset]
            )
        rows = self._remove_unused_columns(dataset, description=description)
        order = epoch_order(
            len(rows),
            strategy,
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=lengths,
            step=batch_size * ranks * args.gradient_accumulation_steps,
            shuffle_steps=self.shuffle_steps,
        )
        drop_last = is_training and args.dataloader_drop_last
        sampler = PaddedSampler(
            order, len(rows), batch_size=batch_size, ranks=ranks, drop_last=drop_last
        )
        if len(sampler) < len(rows):
            left_out = len(rows) - len(sampler)
            logger.warning(
                f"dataloader_drop_last leaves {left_out} of {len(rows):,} rows out of an epoch"
            )
        padding = self.padding_row(rows[0])
        collator: Any = self.data_collator
        if is_training:
            self._order = sampler
            if most is not None:
                self._cut = self.data_collator = CutByTokens(
                    collator, self.own_collator, most, padding
                )
        try:
            return super()._get_dataloader(  # type: ignore[no-any-return]
                PaddedRows(rows, padding),  # type: ignore[arg-type]
                description,
                batch_size,
                sampler_fn=lambda _: sampler,
                is_training=is_training,
                dataloader_key=dataloader_key,
            )
        finally:
            self.data_collator = collator

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate's `set_epoch` does not reach a sampler below `skip_first_batches`, so a run
        # resumed in its second epoch would see the first epoch's order.
        if self._order is not None:
            self._order.set_epoch(int(kwargs["epoch"]))
        return super()._run_epoch(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        # transformers would cast margins and weights to DeepSpeed's half precision
        if isinstance(data, (Tensor, PackedBatch)):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Tensor | None:
        """Weight of the whole step: all its micro-batches, on all ranks."""
        if not batch_samples:
            return None
        weight = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum()
        if self._cut is not None:
            counts = [len(batch["parts"]) for batch in batch_samples]
            if self.accelerator.num_processes > 1:
                # each part is an exchange under ZeRO and FSDP, so ranks need as many as the others
                own = torch.tensor([counts], device=device)
                counts = self.accelerator.gather(own).amax(dim=0).tolist()
            self._n_parts = counts
        return self.accelerator.gather(weight.to(device)).sum()  # type: ignore[no-any-return]
