"""Models whose positions depend on the longest text of a batch: LongRoPE and dynamic NTK.

transformers takes one set of frequencies for a whole batch, by its longest row
(``modeling_rope_utils.dynamic_rope_update``), and dynamic NTK keeps that of the batch before. So a
text's score would depend on its neighbours: of 1,036 texts, 95 were off by up to 4.6. Here rows
that run together have one set of frequencies, and nothing is kept. Chapter 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def length_classes(config: Any, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Of texts of these lengths, which may share a batch: those of equal classes.

    All classes are equal for a model whose positions depend on a text alone. LongRoPE has two sets
    of frequencies, below and above a border; dynamic NTK one for all lengths up to a border, and
    one for each length above.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    lengths : sequence of int
        Tokens of each text.
    """
    borders = length_borders(config)
    return [
        tuple(0 if length <= border else length if each else 1 for border, each in borders)
        for length in lengths
    ]


def length_borders(config: Any) -> list[tuple[int, bool]]:
    """Lengths up to which frequencies are one set; True if each length above has one of its own."""
    text = config.get_text_config()
    # a configuration of a folder's own code has the older name, and may have the older kinds
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    found = []
    for part in [rope, *(p for p in rope.values() if isinstance(p, dict))]:
        kind = str(part.get("rope_type") or part.get("type") or "")
        if kind in ("longrope", "su"):
            border = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", text.max_position_embeddings
            )
            found.append((int(border), False))
        elif "dynamic" in kind:
            found.append((int(text.max_position_embeddings), True))
    return sorted(set(found))


def forget_lengths(model: nn.Module) -> None:
    """Let dynamic NTK begin anew: it keeps the frequencies of the longest text so far."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            prefix = f"{layer}_" if layer else ""
            first = getattr(module, f"{prefix}original_inv_freq", None)
            if first is None or "dynamic" not in str(kind):
                continue
            setattr(module, f"{prefix}inv_freq", first.to(getattr(module, f"{prefix}inv_freq")))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
