"""Token ids in, values out, exact: batches without waste, and one forward. Chapter 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.engine.attention import (
        packed_attention as packed_attention,
        packing_obstacle as packing_obstacle,
    )
    from companion.engine.budget import (
        cuda_token_budget as cuda_token_budget,
        generation_budget as generation_budget,
        kv_cache_bytes as kv_cache_bytes,
        logprob_budget as logprob_budget,
    )
    from companion.engine.compiling import compile_parts as compile_parts
    from companion.engine.forward import (
        packed_scores as packed_scores,
        packed_token_logits as packed_token_logits,
        reward_scores as reward_scores,
        stock_scores as stock_scores,
        token_logits as token_logits,
    )
    from companion.engine.packing import (
        PackedBatch as PackedBatch,
        Segment as Segment,
        Segments as Segments,
        VarlenIndex as VarlenIndex,
        pack as pack,
    )
    from companion.engine.padded import (
        pad_batch as pad_batch,
        token_budget_batches as token_budget_batches,
    )
    from companion.engine.plan import (
        Tree as Tree,
        plan_batches as plan_batches,
        plan_trees as plan_trees,
        shared_length as shared_length,
    )
    from companion.engine.runner import BatchRunner as BatchRunner, Packing as Packing
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
