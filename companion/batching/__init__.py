"""Batches by a budget of tokens: padded, or packed without padding and with shared prefixes."""

from companion.batching.budget import cuda_token_budget
from companion.batching.packing import PackedBatch, Segment, Segments, VarlenIndex, pack
from companion.batching.padded import pad_batch, token_budget_batches
from companion.batching.plan import Tree, plan_batches, plan_trees, shared_length

__all__ = [
    "PackedBatch",
    "Segment",
    "Segments",
    "Tree",
    "VarlenIndex",
    "cuda_token_budget",
    "pack",
    "pad_batch",
    "plan_batches",
    "plan_trees",
    "shared_length",
    "token_budget_batches",
]
