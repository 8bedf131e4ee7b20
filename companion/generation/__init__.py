"""Completions from a causal language model. Chapter 5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.generation.causal import load_causal as load_causal
    from companion.generation.policy import Logprobs as Logprobs, Policy as Policy, Sample as Sample
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
