"""Load, guard, run and save reward models.

A reward model is a plain Hugging Face sequence-classification checkpoint with one label, plus
``reward_manifest.json``. Stock transformers, TRL and vLLM load it and give the same score.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS: dict[str, str] = {
    "RewardModel": "companion.models.reward_model",
    "ScoreHead": "companion.models.head",
    "find_head": "companion.models.head",
    "load_base": "companion.models.loading",
    "load_reward_model": "companion.models.loading",
    "save_reward_model": "companion.models.saving",
    "apply_lora": "companion.models.lora",
    "merged": "companion.models.lora",
    "reward_scores": "companion.models.forward",
    "token_logits": "companion.models.forward",
    "packed_token_logits": "companion.models.forward",
    "packed_scores": "companion.models.forward",
    "compile_parts": "companion.models.compiling",
    "packing_obstacle": "companion.models.packed_attention",
    "stock_scores": "companion.models.forward",
    "ScalarReadout": "companion.models.readout",
    "TokenReadout": "companion.models.readout",
    "RewardManifest": "companion.models.manifest",
    "ReferenceStats": "companion.models.manifest",
    "check_batch": "companion.models.guards",
    "check_head": "companion.models.guards",
    "check_positions": "companion.models.guards",
    "check_tokenizer_and_config": "companion.models.guards",
    "prepare_token_head": "companion.models.guards",
    "precision_notes": "companion.models.guards",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'companion.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
