"""Write the read-out and the head: right token, float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, tensor

HALF = (
    "The product with the head runs in half precision: the score has 8 significant bits, and texts "
    "that differ become ties. Convert hidden state and weight to float32 *before* the product."
)


def _inputs(seed: int, side: str = "right") -> tuple[Tensor, Tensor, Tensor]:
    hidden = normal(seed, 6, 7, 32, scale=1.0).to(torch.bfloat16)
    lengths = torch.tensor([7, 3, 1, 5, 2, 6])[:, None]
    column = torch.arange(7)[None, :]
    mask = (column < lengths) if side == "right" else (column >= 7 - lengths)
    return hidden, mask.long(), normal(seed + 50, 32, scale=1.0)


def _want(hidden: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    rows = [
        hidden[i, max(j for j, bit in enumerate(bits) if bit)]
        for i, bits in enumerate(mask.tolist())
    ]
    return torch.stack(rows).double() @ weight.double()


def _shape(read: Attempt) -> None:
    got = tensor(read(*_inputs(0)), (6,), "the scores")
    expect(got.dtype == torch.float32, f"the scores are {got.dtype}; float32 was asked for")


def _token(read: Attempt) -> None:
    for side in ("right", "left"):
        for seed in range(2):
            arguments = _inputs(seed, side)
            close(
                read(*arguments),
                _want(*arguments),
                f"{side} padding, against a loop",
                rtol=0.05,
                atol=0.2,
            )


def _junk(read: Attempt) -> None:
    hidden, mask, weight = _inputs(3)
    other = torch.where(mask.bool()[..., None], hidden, torch.full_like(hidden, 9.0))
    close(read(other, mask, weight), read(hidden, mask, weight), "other hidden states in padding")


def _exact(read: Attempt) -> None:
    for seed in range(2):
        arguments = _inputs(seed)
        close(read(*arguments), _want(*arguments), "against float64", rtol=1e-5, atol=1e-5)


def _distinct(read: Attempt) -> None:
    hidden = normal(8, 2000, 1, 32, scale=1.0).to(torch.bfloat16)
    scores = tensor(read(hidden, torch.ones(2000, 1, dtype=torch.int64), normal(9, 32, scale=1.0)))
    distinct = len(scores.unique())
    expect(distinct > 1950, f"2,000 different texts got {distinct:,} different scores")


def _index(mask: Tensor) -> Tensor:
    return (torch.arange(mask.shape[1]) * mask).amax(dim=1)


def _pick(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), _index(mask)]


def broken_head(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    return (_pick(hidden, attention_mask) @ weight.to(hidden.dtype)).float()


def stays_half(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    return _pick(hidden, attention_mask) @ weight.to(hidden.dtype)


def last_column(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    return hidden[:, -1].float() @ weight


def by_length(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    index = attention_mask.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden)), index].float() @ weight


def mean_pooled(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    weights = attention_mask[..., None].float()
    return ((hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)) @ weight


def column_of_scores(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    return _pick(hidden, attention_mask).float() @ weight[:, None]


def every_token(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    return (hidden.float() @ weight) * attention_mask


def squashed(hidden: Tensor, attention_mask: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(_pick(hidden, attention_mask).float() @ weight)


def _probes() -> list[tuple[Any, ...]]:
    return [_inputs(0), _inputs(1, "left")]


EXERCISE = Exercise(
    id="ch02.read_scores",
    parameters=("hidden", "attention_mask", "weight"),
    properties=(
        Property(
            "one float32 score for each text",
            "The result should be `[B]` in float32: one score for each text, in a dtype that can "
            "tell them apart.",
            _shape,
        ),
        Property(
            "read at the last real token, either side",
            "The score should be that of the hidden state at the last real token.",
            _token,
        ),
        Property(
            "what stands in the padding does not matter",
            "Hidden states of padding must not reach the score.",
            _junk,
        ),
        Property(
            "the head's product is taken in float32",
            "The scores should be exact to float32.",
            _exact,
        ),
        Property(
            "2,000 texts, 2,000 scores",
            "Texts whose hidden states differ should have scores that differ: float32 tells them "
            "apart.",
            _distinct,
        ),
    ),
    mutants=(
        Mutant(
            HALF + " (Here the conversion comes one line too late.)",
            broken_head,
            "reward-bench #137",
        ),
        Mutant(HALF, stays_half, "reward-bench #137"),
        Mutant(
            "The last column is read, which for right-padded texts is padding.",
            last_column,
            "reward-bench #137",
        ),
        Mutant(
            "length − 1 is the last token only with right padding.",
            by_length,
            "transformers #46782",
        ),
        Mutant(
            "The hidden states of all tokens are averaged. That is how sentence encoders pool; a "
            "causal model has only seen the whole text at its last token.",
            mean_pooled,
        ),
        Mutant(
            "The scores are a column `[B, 1]`. The next `[B]` that they meet will broadcast them "
            "to `[B, B]`: take the last axis off here.",
            column_of_scores,
            "ms-swift #9927",
        ),
        Mutant(
            "This gives a score for every token. A reward model of pairs has one for the text, at "
            "its last token.",
            every_token,
        ),
        Mutant(
            "A sigmoid squashes the score. Bradley–Terry takes σ of a *difference*; the score "
            "itself is any real number.",
            squashed,
        ),
    ),
    probes=_probes,
    hints=(
        "Three steps: which token, which hidden state, which product. Look at the dtype after "
        "each.",
        "`hidden[torch.arange(B), index]` picks one state for each row; `index` is that of your "
        "`last_token_index`.",
        "`hidden[torch.arange(len(hidden)), index].float() @ weight`.",
    ),
    right="bf16 has 8 significant bits: between 2 and 4 there are only 128 numbers. The hidden "
    "states may be rounded; the last product must not be.",
)
