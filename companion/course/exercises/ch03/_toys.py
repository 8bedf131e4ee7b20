"""A tokenizer whose separator may be joined with the full stop before it."""

from __future__ import annotations

from typing import Any


def step_tokenizer(merges: bool) -> Any:
    """Words, numbers and signs as tokens, and the line break; or ``.`` and line break as one."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pattern = r"\.\n|\n|\w+|[^\w\s]" if merges else r"\n|\w+|[^\w\s]"
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # keep a space out of every token, and each match of the pattern as one
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(pattern), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
