"""A pad token that is neither the EOS nor the unknown token (transformers #35352, trl #2778).

Chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from companion.errors import ReadoutError

#: Tokens that exist to pad, or to be reserved, in the vocabularies of known models; best first.
_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",  # Llama 3
    "<|fim_pad|>",  # Qwen 2.5 and 3
    "<|vision_pad|>",
    "<|reserved_special_token_0|>",  # Llama 3
    "<|endoftext|>",  # Qwen instruct models, whose EOS is <|im_end|>
)
NEW_PAD = "<|pad|>"


@dataclass
class PadChoice:
    """The pad token that was chosen, and what to tell the user about it."""

    token: str
    token_id: int
    notes: list[str] = field(default_factory=list)


def choose_pad_token(tokenizer: Any, config_pad_id: int | None) -> PadChoice:
    """Give the tokenizer a pad token of its own, changing it in place if it must.

    Order: the tokenizer's own, if it differs from EOS and from the unknown token; a token of the
    vocabulary that is meant for it; a new ``<|pad|>``.

    Raises
    ------
    ReadoutError
        If the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ReadoutError(
            "the tokenizer has no EOS token, so the end of a completion cannot be marked",
            "set tokenizer.eos_token to the token that ends a text in the model's training data "
            "(tokenizer.eos_token = '…'; tokenizer.save_pretrained(folder))",
        )
    taken = {tokenizer.eos_token_id, tokenizer.unk_token_id}
    own = tokenizer.pad_token_id
    if own is not None and own not in taken:
        choice = PadChoice(tokenizer.pad_token, own)
        if config_pad_id != own:
            choice.notes.append(
                f"config.pad_token_id was {config_pad_id}: set to the tokenizer's, {own} "
                f"({tokenizer.pad_token!r})"
            )
        return choice
    if own is None:
        why = "the tokenizer has no pad token"
    elif own == tokenizer.eos_token_id:
        why = f"the tokenizer's pad token is its EOS ({tokenizer.pad_token!r})"
    else:
        why = f"the tokenizer's pad token is its unknown token ({tokenizer.pad_token!r})"
    known = tokenizer.added_tokens_encoder
    for candidate in _CANDIDATES:
        index = known.get(candidate)
        if index is not None and index not in taken and index != tokenizer.bos_token_id:
            tokenizer.pad_token = candidate
            return PadChoice(
                candidate, index, [f"{why}: {candidate!r} ({index}) of its vocabulary is used"]
            )
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    index = int(tokenizer.pad_token_id)
    return PadChoice(NEW_PAD, index, [f"{why}: {NEW_PAD!r} ({index}) was added"])
