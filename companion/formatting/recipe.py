"""The recipe of a formatter: all that decides the ids of a text, as plain JSON, and its hash.

Chapter 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

RECIPE_FILE = "reward_formatter.json"
RECIPE_VERSION = 1
# Digits, case, runs of spaces, newlines, an accent, another script: two tokenizers with the same
# vocabulary that split text differently disagree on some of it.
_PROBE = "Ana has 3 boxes,  and 1204.5 pens.\n\n\tTotal:café — 数学 (x_1+y)^2 I'll DON'T"


def tokenizer_recipe(tokenizer: Any, adds_bos: bool, adds_eos: bool) -> dict[str, Any]:
    """The tokenizer's part of the recipe: special tokens, vocabulary, and how it splits a probe."""
    vocabulary = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        vocabulary.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    probe = json.dumps(tokenizer(_PROBE)["input_ids"]).encode()
    special = {
        name: {
            "token": getattr(tokenizer, f"{name}_token"),
            "id": getattr(tokenizer, f"{name}_token_id"),
        }
        for name in ("bos", "eos", "pad", "unk")
    }
    return {
        "version": RECIPE_VERSION,
        "special_tokens": special,
        "adds_bos": adds_bos,
        "adds_eos": adds_eos,
        "vocabulary_sha256": vocabulary.hexdigest(),
        "probe_sha256": hashlib.sha256(probe).hexdigest(),
    }


def recipe_fingerprint(recipe: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of a recipe in canonical JSON."""
    text = json.dumps(recipe, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
