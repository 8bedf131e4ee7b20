"""Reward functions for TRL, wired right and in every wrong way."""

from __future__ import annotations

import math
from typing import Any

import torch

from companion.course.exercises.ch05._toys import BOS, EOS


def body(ids: list[int]) -> list[int]:
    """Ids without the BOS before and the EOS behind."""
    start = next((i for i, token in enumerate(ids) if token != BOS), len(ids))
    stop = len(ids)
    while stop > start and ids[stop - 1] == EOS:
        stop -= 1
    return ids[start:stop]


def wire(
    prompts: Any,
    completions: Any,
    completion_ids: Any,
    model: Any,
    tokenizer: Any,
    *,
    joined: bool = False,
    bos: int = 1,
    eos: str = "finished",
    pieces: bool = False,
    move: bool = True,
    gradient: bool = False,
    training: bool = False,
    strange: str = "none",
    mask: bool = True,
    nested: bool = False,
) -> Any:
    """The right function, with switches for what can go wrong."""
    rows = []
    for prompt, completion, policy_ids in zip(prompts, completions, completion_ids, strict=True):
        text = isinstance(prompt, str)
        if text and pieces:
            ids = tokenizer(prompt)["input_ids"]
            ids = ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
        elif text:
            ids = tokenizer(prompt + completion)["input_ids"]
        elif joined:
            ids = tokenizer(str(prompt + completion))["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(
                prompt + completion, tokenize=True, return_dict=False
            )
        ids = body(list(ids))
        finished = policy_ids[-1:] == [EOS]
        ends = {"finished": finished, "always": True, "never": False,
                "chat": finished or not text, "twice": finished}[eos]  # fmt: skip
        tail = [EOS] * (2 if eos == "twice" and ends and not text else int(ends))
        rows.append([BOS] * (bos if bos != -1 else int(not text)) + ids + tail)
    if training is False:
        model.eval()
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    if move:
        batch = batch.to(model.device)
    if not mask:
        batch.pop("attention_mask")
    with torch.set_grad_enabled(gradient):
        logits = model(**batch).logits
    if nested:
        return logits.tolist()
    scores = logits[:, 0].tolist()
    if strange == "pass":
        return scores
    stand_in = 0.0 if strange == "zero" else None
    return [score if math.isfinite(score) else stand_in for score in scores]


def broken(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    model: Any,
    tokenizer: Any,
) -> list[float | None]:
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if isinstance(prompt, str):
            ids = tokenizer(tokenizer.bos_token + prompt)["input_ids"]
            ids += tokenizer(completion, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(str(prompt + completion))["input_ids"]
        rows.append([*ids, tokenizer.eos_token_id])
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    return model(**batch).logits[:, 0].tolist()


def messages_joined(*arguments: Any) -> Any:
    return wire(*arguments, joined=True)


def two_bos(*arguments: Any) -> Any:
    return wire(*arguments, bos=2)


def template_bos(*arguments: Any) -> Any:
    """Two BOS on conversations alone: the template's text, tokenised as any text."""
    if isinstance(arguments[0][0], str):
        return wire(*arguments)
    return wire(*arguments, bos=2)


def no_bos(*arguments: Any) -> Any:
    return wire(*arguments, bos=-1)


def always_eos(*arguments: Any) -> Any:
    return wire(*arguments, eos="always")


def template_eos(*arguments: Any) -> Any:
    return wire(*arguments, eos="chat")


def never_eos(*arguments: Any) -> Any:
    return wire(*arguments, eos="never")


def second_eos(*arguments: Any) -> Any:
    return wire(*arguments, eos="twice")


def in_pieces(*arguments: Any) -> Any:
    return wire(*arguments, pieces=True)


def left_on_cpu(*arguments: Any) -> Any:
    return wire(*arguments, move=False)


def with_gradient(*arguments: Any) -> Any:
    return wire(*arguments, gradient=True)


def in_training_mode(*arguments: Any) -> Any:
    return wire(*arguments, training=True)


def infinite(*arguments: Any) -> Any:
    return wire(*arguments, strange="pass")


def zero_for_infinite(*arguments: Any) -> Any:
    return wire(*arguments, strange="zero")


def without_mask(*arguments: Any) -> Any:
    return wire(*arguments, mask=False)


def lists_of_one(*arguments: Any) -> Any:
    return wire(*arguments, nested=True)
