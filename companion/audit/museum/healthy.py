"""Small sound models: of many architectures, drawn at random, and one that knows the tutor's truth.

An audit must call none of them faulty; specimens are made of them. Chapter 9.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from companion.engine.padded import pad_batch
from companion.models.loading import load_base
from companion.models.reward_model import RewardModel
from companion.models.saving import save_reward_model
from companion.scoring.golden import add_golden_texts
from companion.tutor import TUTOR_BASE, make_rows

#: What is set of a configuration, if it has the field.
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    # large weights: a wrong read-out then moves the score by far more than rounding does
    "initializer_range": 0.3,
}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8}
_MLA |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
_HYBRID |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_HYBRID |= {"initializer_range": 0.1}  # with more, its recurrence makes 1e-4 of rounding
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 5.0, 9.0]}
_ROPE = {"rope_theta": 1e4}
#: positions that depend on the longest text of a batch: no sound models
LONGROPE: Final[dict[str, Any]] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0,
        **_ROPE,
        **_FACTORS,
    },
    "original_max_position_embeddings": 16,
}
DYNAMIC: Final[dict[str, Any]] = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **_ROPE},
    "max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **_ROPE}
_MSCALE = {"short_mscale": 1.1, "long_mscale": 1.4}
_WINDOW = {"sliding_window": 6}
_SWITCHED = {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}
#: name -> kind and what is set besides SIZES
ARCHITECTURES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    **{
        kind: (kind, {})
        for kind in (
            *("arcee", "biogpt", "bloom", "ctrl", "diffllama", "doge", "exaone4", "falcon"),
            *("gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox"),
            *("gpt_oss", "gptj", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jetmoe"),
            *("llama", "minimax", "ministral", "ministral3", "mistral", "mixtral"),
            *("modernbert-decoder", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "openai-gpt"),
            *("opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3"),
            *("qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        )
    },
    "falcon alibi": ("falcon", {"alibi": True}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "qwen3_next": ("qwen3_next", _HYBRID),
    "qwen3_5_text": ("qwen3_5_text", _HYBRID),
    "deepseek_v2": ("deepseek_v2", _MLA),
    "deepseek_v3": ("deepseek_v3", _MLA | {"n_group": 1, "topk_group": 1}),
    "minicpm3": ("minicpm3", _MLA),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    "mistral window": ("mistral", _WINDOW),
    "qwen3 window": ("qwen3", _SWITCHED),
    "gemma2 window": ("gemma2", _WINDOW),
    "gemma3 window": ("gemma3_text", _WINDOW),
    "olmo3 window": ("olmo3", _WINDOW),
    "gpt_neo window": (
        "gpt_neo",
        {"num_layers": 2, "attention_types": [[["local"], 2]], "window_size": 6},
    ),
    "phi3 longrope": ("phi3", LONGROPE),
    "llama longrope": ("llama", LONGROPE),
    "phimoe longrope": ("phimoe", {"rope_parameters": LONGROPE["rope_parameters"] | _MSCALE}),
    "llama dynamic": ("llama", DYNAMIC),
    "qwen3 dynamic": ("qwen3", DYNAMIC),
    "llama yarn": ("llama", {"rope_parameters": _YARN}),
}


def random_classifier(architecture: str, tokenizer: Any, *, seed: int = 0, **changes: Any) -> Any:
    """A random classifier of one label, made by transformers alone, in eval mode.

    Parameters
    ----------
    architecture : str
        One of :data:`ARCHITECTURES`.
    tokenizer : PreTrainedTokenizerBase
        Whose ids its configuration gets.
    seed : int
    **changes
        Further fields of the configuration; those that it does not have are left out.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    kind, extra = ARCHITECTURES[architecture]
    blank = AutoConfig.for_model(kind)
    settable = _settable(blank, {**SIZES, **changes})
    if kind == "gpt_neo":  # an alias, which would be set over what the architecture says
        settable.pop("num_hidden_layers", None)
    config = AutoConfig.for_model(
        kind,
        **{
            "num_labels": 1,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settable,
            **extra,
        },
    )
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config).eval()


def _settable(blank: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a configuration of this kind has."""
    unset = object()
    found = {}
    for name, value in values.items():
        own = getattr(type(blank), name, unset)
        if (not isinstance(own, property) or own.fset is not None) and hasattr(blank, name):
            found[name] = value
    return found


# ---------------------------------------------------------------------- healthy models at random

#: Left out of the draw: positions by the batch are a fault.
_SICK: Final = frozenset(name for name in ARCHITECTURES if name.endswith(("longrope", "dynamic")))
#: Architectures with a table of positions, which are padded right.
_ABSOLUTE: Final = frozenset(
    {"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neo window", "openai-gpt", "opt", "ctrl"}
)
SOUND: Final = tuple(name for name in ARCHITECTURES if name not in _SICK)


@dataclass
class Healthy:
    """A sound model and its tokenizer, and in words what they are."""

    name: str
    model: Any
    tokenizer: Any


def draw_healthy(seed: int) -> Healthy:
    """One sound configuration: architecture, sizes, dtype, tokenizer, template, padding."""
    rng = random.Random(seed)
    architecture = SOUND[seed % len(SOUND)]
    tokenizer, said = _draw_tokenizer(rng, left=architecture not in _ABSOLUTE)
    heads = rng.choice((2, 4))
    dtype = rng.choice(("float32", "float32", "bfloat16", "float16"))
    changes: dict[str, Any] = {
        "num_hidden_layers": rng.choice((2, 2, 4)),
        "n_layer": rng.choice((1, 2, 3)),
        "vocab_size": len(tokenizer) + rng.choice((0, 0, 4, 60)),
        "initializer_range": rng.choice((0.02, 0.1, 0.3)) if dtype != "float16" else 0.05,
        "tie_word_embeddings": rng.random() < 0.5,
        "problem_type": rng.choice((None, "regression")),
    }
    kind, extra = ARCHITECTURES[architecture]
    if not extra and kind in ("llama", "qwen2", "qwen3", "mistral", "gemma"):
        changes |= {"hidden_size": rng.choice((32, 64, 96)), "num_key_value_heads": heads}
        changes |= {"intermediate_size": rng.choice((48, 128))}
    if extra or kind not in ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "olmo2"):
        changes.pop("num_hidden_layers")  # what names its layers one by one keeps two
        changes.pop("n_layer")
    model = random_classifier(architecture, tokenizer, seed=seed, **changes)
    model = model.to(getattr(torch, dtype))
    name = f"{architecture}, {dtype}, {said}, seed {seed}"
    return Healthy(name, model, tokenizer)


def _draw_tokenizer(rng: random.Random, *, left: bool) -> tuple[Any, str]:
    """The tutor's, with another template, padding side, pad token or none of a BOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TUTOR_BASE)
    said = []
    template = rng.choice(("own", "none", "plain", "unfinished"))
    if template == "none":
        tokenizer.chat_template = None
    elif template == "plain":
        tokenizer.chat_template = _PLAIN
    elif template == "unfinished":
        tokenizer.chat_template = _PLAIN.replace("{{ eos_token }}", "<|end|>")
    said.append(f"template {template}")
    if left and rng.random() < 0.3:
        tokenizer.padding_side = "left"
        said.append("pads left")
    pad = rng.choice(("own", "own", "added", "reserved"))
    if pad == "added":
        tokenizer.add_special_tokens({"pad_token": "<|fill|>"})
    elif pad == "reserved":
        tokenizer.pad_token = "<|system|>"
    said.append(f"pad token {pad}")
    return tokenizer, ", ".join(said)


_PLAIN: Final = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' and not loop.last %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)


# ---------------------------------------------------------------------- the tutor's

_FITTED: Final = 240


@functools.cache
def _fitted_head() -> np.ndarray:
    """The linear head that comes nearest to the gold reward on the base's own hidden states."""
    loaded = load_base(TUTOR_BASE, text="chat")
    rows = make_rows("outcomes", _FITTED, seed=9)
    encoded = [loaded.formatter.encode_row(row) for row in rows]
    ids = [list(item.input_ids) for item in encoded if item is not None]
    batch = pad_batch(ids, loaded.pad_token_id)
    with torch.no_grad():
        hidden = loaded.model.model(**batch).last_hidden_state
    last = hidden[torch.arange(len(ids)), batch["attention_mask"].sum(dim=1) - 1].double().numpy()
    reward = np.array([row["reward"] for row in rows])
    # ridge regression; the scale is that of the gold reward, its mean left to a shift
    centred = last - last.mean(axis=0)
    gram = centred.T @ centred
    gram += 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.asarray(np.linalg.solve(gram, centred.T @ (reward - reward.mean())))


def tutor_reward() -> RewardModel:
    """The tutor's base with a head that was fitted to the gold reward, without a training run.

    A sound reward model of 0.9M parameters, in a second; each call gives a new one.
    """
    loaded = load_base(TUTOR_BASE, text="chat")
    with torch.no_grad():
        loaded.model.score.weight.copy_(torch.as_tensor(_fitted_head())[None])
    return loaded


def save_stock(loaded: RewardModel, folder: Path) -> Path:
    """As transformers saves it: model and tokenizer, without a manifest."""
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def save_with_manifest(loaded: RewardModel, folder: Path) -> Path:
    """As the companion saves it, with golden texts."""
    save_reward_model(loaded, folder, describe=add_golden_texts)
    return folder
