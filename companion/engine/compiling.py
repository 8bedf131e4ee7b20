"""``torch.compile`` for the parts of a model that look at one token at a time. Chapter 2.

A packed batch has another layout each time, and a whole model would be compiled anew for each.
Norms and MLPs know nothing of texts: compiled once, for any number of tokens, they serve all.
Whether it pays is measured by ``benchmarks/compile.py``; the seconds to compile are lost on every
run whose work is smaller than what they save.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from companion.errors import ModelError


def compile_parts(model: Any) -> int:
    """Compile a model's norms and MLPs in place; its weights, and what is saved, stay as they are.

    The first batches take seconds longer. Scores change by rounding.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel

    Returns
    -------
    int
        How many modules are compiled.

    Raises
    ------
    ModelError
        If the model has no such modules.
    """
    parts = [
        module
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "MLP"))
    ]
    if not parts:
        raise ModelError(
            f"{type(model).__name__} has no norms and MLPs that can be told by their names",
            "leave compiling off",
        )
    for module in parts:
        module.compile(dynamic=True)
    return len(parts)
