"""Guards: what would make a score silently wrong is refused, with the fix.

Stock sequence classification scores the rightmost token whose id is not ``config.pad_token_id`` and
never looks at the attention mask (transformers #35352, #35909, #29419). Each guard here stands
where that rule, or a head that was never trained, gives a number that looks like a score.
(Chapter 2.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import ModelError, ReadoutError, ShapeError
from companion.functional.readout import last_token_index, pad_id_readout_index
from companion.models.head import ScoreHead, find_head, install_head, without_adapter

#: Names under which decoders keep a table of absolute positions.
_ABSOLUTE = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def check_tokenizer_and_config(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer and a configuration with which a score would be read at the wrong place.

    Raises
    ------
    ReadoutError
        If there is no EOS or no pad token, the pad token is the EOS (the EOS is then skipped: a
        finished text and one that was cut off get one score), or the configuration has another pad
        id than the tokenizer.
    ModelError
        If the tokenizer has ids for which the model has no embedding.
    """
    text = config.get_text_config()
    if tokenizer.eos_token_id is None:
        raise ReadoutError(
            "the tokenizer has no EOS token, so the end of a completion cannot be marked",
            "set tokenizer.eos_token to the token that ends a text in the model's training data, "
            "and save the tokenizer",
        )
    if tokenizer.pad_token_id is None:
        raise ReadoutError(
            "the tokenizer has no pad token: a batch has no padding to tell from text",
            "train from the base with companion.models.load_base, which adds one and saves it",
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ReadoutError(
            f"the pad token is the EOS ({tokenizer.pad_token!r}): stock tools skip the EOS when "
            "they read the score, so a finished and a cut-off text get the same one",
            "train from the base with companion.models.load_base, which takes a pad token of its "
            "own; a model that somebody else trained this way is loaded with its read-out named "
            "(--readout mask or transformers)",
        )
    if text.pad_token_id != tokenizer.pad_token_id:
        raise ReadoutError(
            f"config.pad_token_id is {text.pad_token_id}, the tokenizer pads with "
            f"{tokenizer.pad_token_id} ({tokenizer.pad_token!r}): stock tools would read the "
            "score of a pad token",
            f"set config.pad_token_id = {tokenizer.pad_token_id} and save the configuration",
        )
    highest = max(tokenizer.get_vocab().values())
    rows = getattr(text, "vocab_size", None)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, the model has embeddings for {rows}",
            "use the tokenizer that belongs to the model, or resize the embeddings and train them",
        )


def check_head(model: Any) -> None:
    """Refuse a head that is none: missing, of several labels, not finite, or all zeros.

    Raises
    ------
    ModelError
    """
    labels = getattr(model.config, "num_labels", None)
    head = find_head(model)
    weight = getattr(head, "weight", None)
    if labels != 1 or (isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] != 1):
        shape = "" if weight is None else f" and a head of shape {list(weight.shape)}"
        raise ModelError(
            f"the model has num_labels={labels}{shape}: a reward model has one scalar",
            "use a checkpoint with num_labels=1; a classifier of several labels is no reward model",
        )
    _check_head_weights(weight, "every text would get the same score")


def prepare_token_head(model: Any, labels: int) -> None:
    """Check a token-level model's head, put it in fp32 and take its dropout off.

    Raises
    ------
    ModelError
        If the head has another number of labels, or is not finite or all zero.
    """
    inner = without_adapter(model)
    if not type(inner).__name__.endswith("ForTokenClassification"):
        raise ModelError(
            f"{type(inner).__name__} gives one value a text",
            f"load the base with companion.models.load_base(…, labels={labels}), which gives one "
            "a token",
        )
    if not hasattr(model, "peft_config") and isinstance(find_head(model), nn.Linear):
        install_head(model)
    if inner.config.num_labels != labels:
        raise ModelError(
            f"the model has {inner.config.num_labels} labels, this training needs {labels}",
            f"load the base with companion.models.load_base(…, labels={labels})",
        )
    _check_head_weights(
        getattr(find_head(model), "weight", None), "every token would get the same value"
    )
    inner.config.classifier_dropout = 0.0
    if hasattr(inner, "dropout"):
        inner.dropout.p = 0.0


def _check_head_weights(weight: Any, if_zero: str) -> None:
    if not isinstance(weight, Tensor) or weight.numel() == 0 or weight.is_meta:
        return  # partitioned (ZeRO-3) or not materialised: nothing to look at here
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            "the head's weights are not all finite", "training diverged; take a lower learning rate"
        )
    if not bool(weight.any()):
        raise ModelError(
            f"the head's weights are all zero: {if_zero}",
            "train the model first, or load the base with companion.models.load_base",
        )


def check_batch(
    input_ids: Tensor,
    attention_mask: Tensor,
    config: Any,
    *,
    position_ids: Tensor | None = None,
) -> None:
    """Refuse a batch for which stock transformers and the mask would read different tokens.

    Parameters
    ----------
    input_ids, attention_mask : Tensor
        ``[B, T]`` integers; the mask holds 1 at real tokens, padding on either side.
    config : transformers.PretrainedConfig
        Of the model.
    position_ids : Tensor, optional
        ``[B, T]``; only looked at for positions that start again within a row.

    Raises
    ------
    ShapeError
        If the shapes differ.
    ReadoutError
        For a missing pad id, an all-pad row, a packed row, a mask with holes, masked trailing
        tokens that are no pad ids, a text that ends with the pad id, or two BOS.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ShapeError(
            f"input_ids {list(input_ids.shape)} and attention_mask {list(attention_mask.shape)} "
            "must both be [B, T]"
        )
    text = config.get_text_config()
    pad = text.pad_token_id
    if pad is None:
        raise ReadoutError(
            "config.pad_token_id is None: with one row stock transformers scores the last column, "
            "padding or not; with several it raises",
            "set config.pad_token_id to the id that the tokenizer pads with",
        )
    if bool((attention_mask.long() > 1).any()):
        raise ReadoutError(
            "the attention mask numbers several texts in a row (values above 1): a packed row "
            "gets one score for all of them",
            "give each text a row of its own",
        )
    last = last_token_index(attention_mask)  # raises for a row of nothing but padding
    mask = attention_mask.bool()
    first = mask.int().argmax(dim=1)
    holes = (last - first + 1) != mask.sum(dim=1)
    if bool(holes.any()):
        raise ReadoutError(
            f"row {int(holes.int().argmax())}: the attention mask has a hole between real tokens",
            "pad on one side only, and give each text a row of its own",
        )
    if position_ids is not None:
        steps = position_ids[:, 1:] - position_ids[:, :-1]
        again = ((steps <= 0) & mask[:, 1:] & mask[:, :-1]).any(dim=1)
        if bool(again.any()):
            raise ReadoutError(
                f"row {int(again.int().argmax())}: the positions start again within the row: "
                "a packed row gets one score for several texts",
                "give each text a row of its own",
            )
    rows = torch.arange(input_ids.shape[0], device=input_ids.device)
    ends_with_pad = input_ids[rows, last] == pad
    if bool(ends_with_pad.any()):
        why = (
            "the pad id is the EOS id" if pad == text.eos_token_id else "the text ends with padding"
        )
        raise ReadoutError(
            f"row {int(ends_with_pad.int().argmax())}: its last real token is the pad id {pad} "
            f"({why}): stock transformers would skip it and score an earlier token",
            "use a pad token of its own, and mask the padding",
        )
    differs = pad_id_readout_index(input_ids, pad) != last
    if bool(differs.any()):
        row = int(differs.int().argmax())
        raise ReadoutError(
            f"row {row}: the masked tokens after its end are not the pad id {pad}: stock "
            "transformers, which does not look at the mask, would score one of them",
            f"fill the padding with {pad} (config.pad_token_id), or correct the configuration",
        )
    bos = text.bos_token_id
    if isinstance(bos, int) and bos not in (pad, text.eos_token_id):
        second = (first + 1).clamp(max=input_ids.shape[1] - 1)
        twice = (
            (input_ids[rows, first] == bos) & (input_ids[rows, second] == bos) & (second <= last)
        )
        twice &= second != first
        if bool(twice.any()):
            raise ReadoutError(
                f"row {int(twice.int().argmax())} begins with two BOS (reward-bench #164): "
                "the model was trained with one",
                "tokenise through RewardFormatter, or with add_special_tokens=False after a chat "
                "template",
            )


def has_absolute_positions(model: Any) -> bool:
    """Whether the model looks positions up in a table (GPT-2, OPT), in place of RoPE or ALiBi."""
    inner = without_adapter(model)
    return any(
        name.rsplit(".", 1)[-1] in _ABSOLUTE and isinstance(module, nn.Embedding)
        for name, module in inner.named_modules()
    )


def check_positions(model: Any, attention_mask: Tensor, position_ids: Tensor | None) -> None:
    """Refuse left padding without position ids on a model with absolute positions.

    Raises
    ------
    ReadoutError
        Stock GPT-2 counts the padding as positions and scores the row wrongly, without a word.
    """
    if (
        position_ids is None
        and not bool(attention_mask[:, 0].all())
        and has_absolute_positions(model)
    ):
        raise ReadoutError(
            "left-padded rows on a model with absolute positions: the padding is counted",
            "pad right, or pass position_ids=companion.functional.position_ids_from_mask(mask)",
        )


def precision_notes(model: Any) -> list[str]:
    """What to know about the model's number format: a line if scores depend on the batch.

    Half precision rounds differently with every batch shape: on a random model the score of a text
    alone and in a batch differed by 0.1 to 0.2 where the scores' std was 2 (reward-bench #137);
    float32 differs by 6e-6.
    """
    notes = []
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dim() > 1}
    half = sorted(str(k).removeprefix("torch.") for k in kinds & {torch.bfloat16, torch.float16})
    if half:
        notes.append(
            f"weights in {'/'.join(half)}: the score of a text moves with its batch, by up to a "
            "tenth of the scores' std; use float32 where scores are compared closely"
        )
    head = find_head(model)
    if type(head) is nn.Linear and not isinstance(head, ScoreHead):
        notes.append(
            "the head is a plain nn.Linear: under autocast it runs in half precision, which makes "
            "distinct scores equal; load the model with the companion to keep it in float32"
        )
    return notes
