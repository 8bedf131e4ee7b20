"""A tokenizer and scorers that are small enough to see through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scorer = Callable[[Tensor, Tensor], Tensor]
WORDS = ["how", "many", "pens", "now", "the", "answer", "is", "7", "thanks", "user"]
WORDS += ["assistant", ":", "."]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} "
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT = [
    {"role": "user", "content": "how many pens now"},
    {"role": "assistant", "content": "the answer is 7 ."},
]


def chat_tokenizer(adds_bos: bool) -> Any:
    """A word-level tokenizer whose template writes BOS, and which may add one to plain text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def token_values(width: int = 64) -> Tensor:
    """One value for each token id, float64."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def states(input_ids: Tensor, counted: Tensor) -> Tensor:
    """``[B, T]``: a causal running sum, each token weighted by its place in the text."""
    place = counted.long().cumsum(dim=1)
    values = token_values()[input_ids] * counted * torch.cos(place.double())
    return values.cumsum(dim=1)


def read(hidden: Tensor, index: Tensor) -> Tensor:
    """Value at one place of each row."""
    return hidden.gather(1, index[:, None]).squeeze(1)


def by_mask(mask: Tensor) -> Tensor:
    """Index of the last real token."""
    return (torch.arange(mask.shape[1]) * mask).amax(dim=1)


def good(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Read by the mask; rounding moves with the width, as matrix products do."""
    score = read(states(input_ids, attention_mask), by_mask(attention_mask))
    return (score + 2e-6 * (input_ids.shape[1] % 3)).float()


def last_column(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Read the last column; with right padding that is the padding's state."""
    padding = 0.5 * (1 - attention_mask).cumsum(dim=1) * (1 - attention_mask)
    return (states(input_ids, attention_mask) + padding)[:, -1].float()


def length_minus_one(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Right for right padding only."""
    return read(states(input_ids, attention_mask), attention_mask.sum(dim=1) - 1).float()


def absolute_positions(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Counts padding on the left as positions, as GPT-2 does without position ids."""
    place = torch.arange(1, input_ids.shape[1] + 1).double()
    values = token_values()[input_ids] * attention_mask * torch.cos(place)
    return read(values.cumsum(dim=1), by_mask(attention_mask)).float()


def half_precision(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """As good as the first, but rounded to a grid that moves with the width of the batch."""
    grid = 0.06 + 0.02 * (input_ids.shape[1] % 5)
    score = read(states(input_ids, attention_mask), by_mask(attention_mask))
    return (torch.round(score / grid) * grid).float()


def neighbours(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Centred on the batch: a score says something of its neighbours."""
    score = good(input_ids, attention_mask)
    return score - score.mean() if len(score) > 1 else score


def longest_right(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Right for the first row, whose length it takes for all."""
    index = by_mask(attention_mask)[:1].expand(len(input_ids))
    return read(states(input_ids, torch.ones_like(attention_mask)), index).float()
