"""From token ids to scores: batches by a budget of tokens, packed where that is exact. Chapter 2.

Packed, nothing is padded and a common prefix is computed once: the prompt of N candidates, or of a
chosen and a rejected completion. A model that cannot be packed exactly takes padded batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from companion.engine.agreement import Forward, forward_of, packing_fault
from companion.engine.budget import cuda_token_budget, keys_a_token
from companion.engine.devices import device_notes, free_memory
from companion.engine.forward import (
    check_texts,
    own_logits,
    packed_scores,
    packed_token_logits,
    reward_scores,
    token_logits,
)
from companion.engine.packing import PackedBatch, pack
from companion.engine.padded import pad_batch, token_budget_batches
from companion.engine.plan import plan_batches
from companion.engine.positions import length_classes
from companion.errors import DataError, ModelError
from companion.models.locking import inference_of
from companion.models.memory import is_out_of_memory

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
    free = free_memory(parameter.device)
    return cuda_token_budget(free, model.config, parameter.element_size())


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
        "auto" packs where :func:`companion.engine.packing_obstacle` finds no
        obstacle, and pads elsewhere with a line in the log that says why. A class with code of its
        own is never packed, and scored by its own forward.
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
        #: what was left of the budget when the memory last ended; the next call begins with it
        self._most: int | None = None

    def run(
        self, ids: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Score rows of token ids; ``[N]`` float64 in input order.

        Equal rows are computed once: their scores are the same to the last bit, and tie. A batch
        that the GPU's memory does not hold is planned again with half the tokens, as are all later
        ones.

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
        return np.array(self._run(ids, None, progress), dtype=np.float64)

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
        return self._run(ids, places, progress)

    def _run(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None,
        progress: Callable[[int], None] | None,
    ) -> list[Any]:
        """Of each row its score, or with `places` its logits there."""
        found: list[Any] = [None] * len(ids)
        if not ids:
            self.tokens = 0, 0
            return found
        check_texts(ids, self.model.config)
        packed = self.packing == "auto" and self.packs
        way: Forward = "ours"
        if not packed:
            way = forward_of(self.model, self.pad_token_id, ids, self.padding_side)
        device = next(self.model.parameters()).device
        budget = self.max_tokens or default_token_budget(self.model)
        by_speed = self.max_tokens is None and device.type == "cpu" and self._most is None
        if self._most is not None:
            budget = min(budget, self._most)
        tree_tokens = CPU_TREE_TOKENS if by_speed else None
        computed = 0
        equal: dict[Any, list[int]] = {}
        for row, item in enumerate(ids):
            key = (tuple(item), None if places is None else tuple(places[row]))
            equal.setdefault(key, []).append(row)
        copies = {rows[0]: rows for rows in equal.values()}
        waiting = list(copies)
        while waiting:
            done: set[int] = set()
            most = 1 if way == "alone" else self.max_rows
            for rows, tokens, batch in self._plan(ids, waiting, packed, budget, tree_tokens, most):
                try:
                    with (
                        torch.inference_mode(),
                        torch.autocast(device.type, enabled=False),
                        inference_of(self.model),
                    ):
                        values = self._forward(batch, device, rows, places, way)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(rows) == 1:
                        raise ModelError(
                            f"a text of {len(ids[rows[0]])} tokens does not fit into the GPU's "
                            "memory",
                            "set max_length, or use a smaller dtype",
                        ) from error
                    budget, tree_tokens = max(1, tokens // 2), None
                    self._most = budget
                    logger.warning(f"out of memory with {tokens} tokens: going on with {budget}")
                    break
                for row, value in zip(rows, values, strict=True):
                    for copy in copies[row]:
                        found[copy] = value
                done.update(rows)
                computed += tokens
                if progress is not None:
                    progress(sum(len(copies[row]) for row in rows))
            waiting = [row for row in waiting if row not in done]
            if waiting:  # outside the handler, whose traceback holds the tensors
                torch.cuda.empty_cache()
        self.tokens = sum(map(len, ids)), computed
        return found

    def notes(self) -> list[str]:
        """What was chosen for this device, and why; empty on a CPU."""
        if next(self.model.parameters()).device.type != "cuda":
            return []
        packed = self.packing == "auto" and self.packs
        budget = None if self.max_tokens else default_token_budget(self.model)
        return device_notes(self.model, packed=packed, budget=budget)

    @property
    def packs(self) -> bool:
        """Whether batches are packed; if not, the log has said why."""
        why = packing_fault(self.model, self.pad_token_id, training=False)
        if why is not None and why != self._said:
            logger.warning(f"texts are padded, not packed: {why}")
            self._said = why
        return why is None

    def _plan(
        self,
        ids: Sequence[Sequence[int]],
        waiting: Sequence[int],
        packed: bool,
        budget: int,
        tree_tokens: int | None,
        max_rows: int | None,
    ) -> Iterator[tuple[list[int], int, PackedBatch | dict[str, Tensor]]]:
        """Batches of the waiting rows: which rows, tokens to compute, and what the model gets."""
        left = [ids[row] for row in waiting]
        if packed:
            keys = None
            if next(self.model.parameters()).device.type != "cpu":
                keys = budget * keys_a_token(self.model.config)
            for trees in plan_batches(
                left, budget, max_rows, tree_tokens=tree_tokens, max_keys=keys
            ):
                tree_batch = pack(left, trees)
                yield [waiting[i] for i in tree_batch.rows], tree_batch.computed, tree_batch
            return
        lengths = [len(item) for item in left]
        alike: dict[Any, list[int]] = {}  # whose positions do not depend on each other's lengths
        for i, each in enumerate(length_classes(self.model.config, lengths)):
            alike.setdefault(each, []).append(i)
        for members in alike.values():
            for chosen in token_budget_batches([lengths[i] for i in members], budget, max_rows):
                own = [members[i] for i in chosen]
                batch = pad_batch([left[i] for i in own], self.pad_token_id, self.padding_side)
                yield [waiting[i] for i in own], batch["input_ids"].numel(), batch

    def _forward(
        self,
        batch: PackedBatch | dict[str, Tensor],
        device: torch.device,
        rows: Sequence[int],
        places: Sequence[Sequence[int]] | None,
        way: Forward,
    ) -> Sequence[Any]:
        """Of each row of a batch its score, or its logits at its places; on the CPU."""
        if isinstance(batch, PackedBatch):
            batch = batch.to(device, non_blocking=True)
            if places is None:
                return packed_scores(self.model, batch).tolist()  # type: ignore[no-any-return]
            logits = packed_token_logits(self.model, batch).cpu()
            texts = batch.text_places()
            return [logits[texts[i, list(places[row])]] for i, row in enumerate(rows)]
        input_ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        if places is None:
            if way != "ours":
                return own_logits(self.model, input_ids, mask)[:, 0].tolist()  # type: ignore[no-any-return]
            return reward_scores(self.model, input_ids, mask).tolist()  # type: ignore[no-any-return]
        of_tokens = token_logits if way == "ours" else own_logits
        logits = of_tokens(self.model, input_ids, mask).cpu()
        first = mask.long().argmax(dim=1).tolist()  # 0 unless padding stands left
        return [logits[i, [first[i] + at for at in places[row]]] for i, row in enumerate(rows)]
