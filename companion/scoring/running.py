"""From token ids to scores: batches by a budget of tokens, packed where that is exact. Chapter 2.

Packed, nothing is padded and a common prefix is computed once: the prompt of N candidates, or of a
chosen and a rejected completion. A model that cannot be packed exactly takes padded batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion.batching.budget import cuda_token_budget
from companion.batching.packing import PackedBatch, pack
from companion.batching.padded import pad_batch, token_budget_batches
from companion.batching.plan import plan_batches
from companion.errors import DataError, ModelError
from companion.models.forward import (
    check_texts,
    packed_scores,
    packed_token_logits,
    reward_scores,
    token_logits,
)
from companion.models.locking import inference_of
from companion.models.packed_attention import packing_obstacle

logger = logging.getLogger(__name__)

Packing = Literal["auto", "off"]

#: The budget that was fastest on a CPU; larger ones leave its caches.
CPU_TOKENS = 2048
#: A tree of up to so many tokens is not cut there: its prefix would be computed again.
CPU_TREE_TOKENS = 4096
#: For an accelerator whose free memory nobody tells.
OTHER_TOKENS = 16_384


def default_token_budget(model: Any) -> int:
    """Tokens of a batch: 2,048 on a CPU, on CUDA what the free memory holds."""
    parameter = next(model.parameters())
    if parameter.device.type == "cpu":
        return CPU_TOKENS
    if parameter.device.type != "cuda":
        return OTHER_TOKENS
    free, _ = torch.cuda.mem_get_info(parameter.device)
    unused = torch.cuda.memory_reserved(parameter.device) - torch.cuda.memory_allocated(
        parameter.device
    )
    return cuda_token_budget(free + unused, model.config, parameter.element_size())


class _Forwards(NamedTuple):
    """What runs a batch of some rows of the input: packed, or padded (ids and mask)."""

    packed: Callable[[PackedBatch, list[int]], Any]
    padded: Callable[[Tensor, Tensor, list[int]], Any]


class BatchRunner:
    """Runs rows of token ids through a model, in eval mode and without gradients.

    From several threads at once, too, and beside other runners of the same model: a batch holds the
    model's lock (:mod:`companion.models.locking`), and between batches others have their turn.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Put into eval mode while a batch runs, and back.
    pad_token_id : int
        For batches that are padded.
    max_tokens : int, optional
        Budget of a batch; default :func:`default_token_budget`, found anew for each call on CUDA.
    max_rows : int, optional
        Most rows of a batch.
    packing : {"auto", "off"}
        "auto" packs where :func:`companion.models.packed_attention.packing_obstacle` finds no
        obstacle, and pads elsewhere with a line in the log that says why.
    padding_side : {"right", "left"}
        Of padded batches.

    Attributes
    ----------
    tokens : tuple of (int, int)
        Of the call that ended last: tokens of all texts, and tokens that went through the model
        (less where prefixes are shared, more where there is padding).
    """

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        *,
        max_tokens: int | None = None,
        max_rows: int | None = None,
        packing: Packing = "auto",
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        if packing not in ("auto", "off"):
            raise DataError(f"packing is {packing!r}", "use 'auto' or 'off'")
        self.model = model
        self.pad_token_id = pad_token_id
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.packing = packing
        self.padding_side: Literal["right", "left"] = padding_side
        self.tokens = 0, 0
        self._said: str | None = None

    def run(
        self, ids: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Score rows of token ids; ``[N]`` float64 in input order.

        Equal rows are computed once: their scores are the same to the last bit, and tie. A batch
        that the GPU's memory does not hold is planned again with half the tokens.

        Parameters
        ----------
        ids : sequence of sequences of int
        progress : callable, optional
            Called with the number of texts of each batch done.

        Raises
        ------
        ModelError
            If the memory does not hold a single text.
        ReadoutError
            If a text ends with the pad id or begins with two BOS.
        """
        scores = np.full(len(ids), np.nan)

        def keep(rows: list[int], values: Tensor) -> None:
            scores[rows] = values.double().cpu().numpy()

        forwards = _Forwards(
            lambda batch, rows: packed_scores(self.model, batch),
            lambda input_ids, mask, rows: reward_scores(self.model, input_ids, mask),
        )
        for first, *copies in self._run(ids, ids, forwards, keep, progress):
            scores[copies] = scores[first]
        return scores

    def run_tokens(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> list[Tensor]:
        """Logits of a token-level model at some places of each text. Chapter 3.

        Parameters
        ----------
        ids : sequence of sequences of int
        places : sequence of sequences of int
            Of each text, which of its tokens to read.
        progress : callable, optional
            As for :meth:`run`, which also says what is raised.

        Returns
        -------
        list of Tensor
            ``[places, labels]`` float32 each, on the CPU, in input order.
        """
        found: list[Tensor] = [torch.zeros(0)] * len(ids)

        def keep(rows: list[int], values: list[Tensor]) -> None:
            for row, value in zip(rows, values, strict=True):
                found[row] = value

        def packed(batch: PackedBatch, rows: list[int]) -> list[Tensor]:
            logits = packed_token_logits(self.model, batch).cpu()
            texts = batch.text_places()
            return [logits[texts[i, list(places[row])]] for i, row in enumerate(rows)]

        def padded(input_ids: Tensor, mask: Tensor, rows: list[int]) -> list[Tensor]:
            logits = token_logits(self.model, input_ids, mask).cpu()
            first = mask.long().argmax(dim=1).tolist()  # 0 unless padding stands left
            return [logits[i, [first[i] + at for at in places[row]]] for i, row in enumerate(rows)]

        keys = [(*item, "read", *own) for item, own in zip(ids, places, strict=True)]
        for first, *copies in self._run(ids, keys, _Forwards(packed, padded), keep, progress):
            for copy in copies:
                found[copy] = found[first]
        return found

    def _run(
        self,
        ids: Sequence[Sequence[int]],
        keys: Sequence[Sequence[Any]],
        forwards: _Forwards,
        keep: Callable[[list[int], Any], None],
        progress: Callable[[int], None] | None,
    ) -> Iterable[list[int]]:
        """Run the first row of each key; the rows of each, of which `keep` got the first."""
        if not ids:
            self.tokens = 0, 0
            return []
        check_texts(ids, self.model.config)
        packed = self.packing == "auto" and self._can_pack()
        device = next(self.model.parameters()).device
        computed = 0
        budget = self.max_tokens or default_token_budget(self.model)
        by_speed = self.max_tokens is None and device.type == "cpu"
        tree_tokens = CPU_TREE_TOKENS if by_speed else None
        equal: dict[tuple[Any, ...], list[int]] = {}
        for row, key in enumerate(keys):
            equal.setdefault(tuple(key), []).append(row)
        copies = {rows[0]: rows for rows in equal.values()}
        waiting = list(copies)
        while waiting:
            done: set[int] = set()
            left = [ids[i] for i in waiting]
            plan = (
                self._packed(left, budget, tree_tokens, forwards)
                if packed
                else self._padded(left, budget, forwards)
            )
            for rows, tokens, call in plan:
                places = [waiting[row] for row in rows]
                try:
                    with (
                        torch.inference_mode(),
                        torch.autocast(device.type, enabled=False),
                        inference_of(self.model),
                    ):
                        values = call(device, places)
                    keep(places, values)
                except torch.OutOfMemoryError as error:
                    if len(rows) == 1:
                        raise ModelError(
                            f"a text of {len(ids[waiting[rows[0]]])} tokens does not fit into the "
                            "GPU's memory",
                            "set max_length, or use a smaller dtype",
                        ) from error
                    budget, tree_tokens = max(1, tokens // 2), None
                    logger.warning(f"out of memory with {tokens} tokens: going on with {budget}")
                    break
                done.update(places)
                computed += tokens
                if progress is not None:
                    progress(sum(len(copies[place]) for place in places))
            waiting = [i for i in waiting if i not in done]
            if waiting:  # outside the handler, whose traceback holds the tensors
                torch.cuda.empty_cache()
        self.tokens = sum(map(len, ids)), computed
        return copies.values()

    def _can_pack(self) -> bool:
        why = packing_obstacle(self.model, training=False)
        if why is not None and why != self._said:
            logger.warning(f"texts are padded, not packed: {why}")
            self._said = why
        return why is None

    def _packed(
        self,
        ids: Sequence[Sequence[int]],
        budget: int,
        tree_tokens: int | None,
        forwards: _Forwards,
    ) -> Iterator[tuple[Sequence[int], int, Any]]:
        for trees in plan_batches(ids, budget, self.max_rows, tree_tokens=tree_tokens):
            batch = pack(ids, trees)
            yield (
                batch.rows,
                batch.computed,
                lambda device, places, b=batch: forwards.packed(b.to(device), places),
            )

    def _padded(
        self, ids: Sequence[Sequence[int]], budget: int, forwards: _Forwards
    ) -> Iterator[tuple[Sequence[int], int, Any]]:
        for rows in token_budget_batches([len(item) for item in ids], budget, self.max_rows):
            batch = pad_batch([ids[i] for i in rows], self.pad_token_id, self.padding_side)
            yield (
                rows,
                batch["input_ids"].numel(),
                lambda device, places, b=batch: forwards.padded(
                    b["input_ids"].to(device), b["attention_mask"].to(device), places
                ),
            )
