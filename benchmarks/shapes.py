"""Models and texts: random weights and token ids, since only shapes and lengths cost time."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from companion.models import install_head

VOCABULARY = 1000
PAD, EOS = 0, 1
#: hidden size, layers, heads, heads of keys, size of a head; "0.6b" is Qwen3-0.6B's
SHAPES = {"tiny": (128, 4, 4, 2, 32), "small": (512, 8, 8, 4, 64), "0.6b": (1024, 28, 16, 8, 128)}
#: What a program measures unless it is told otherwise; a CPU takes hours for the other one.
USUAL = ("tiny", "small")
#: Where it is not :data:`VOCABULARY`; the texts keep to the ids below that.
_VOCABULARIES = {"0.6b": 151_936}
TokenIds = list[list[int]]


def make_config(shape: str, vocabulary: int | None = None) -> Any:
    """Of a Qwen3 of that shape."""
    from transformers import Qwen3Config

    hidden, layers, heads, key_heads, size = SHAPES[shape]
    return Qwen3Config(
        vocab_size=vocabulary or _VOCABULARIES.get(shape, VOCABULARY),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=size,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )


def make_model(
    shape: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    vocabulary: int | None = None,
) -> Any:
    """A random Qwen3 reward model with a head in float32."""
    from transformers import Qwen3ForSequenceClassification

    torch.manual_seed(0)
    config = make_config(shape, vocabulary)
    config.num_labels = 1
    with device:  # drawn where it will be: a CPU takes its time for 600 million numbers
        model: Any = Qwen3ForSequenceClassification(config)
    model.to(device, dtype)
    install_head(model).to(torch.float32)
    return model


def draw(rng: random.Random, length: int) -> list[int]:
    """So many token ids, none of them special."""
    return rng.choices(range(2, VOCABULARY), k=length)


def log_normal(rng: random.Random, median: int, sigma: float, least: int, most: int) -> int:
    """A length as texts have them."""
    return max(least, min(most, round(math.exp(rng.gauss(math.log(median), sigma)))))


def mixed_lengths(n: int, seed: int = 0) -> TokenIds:
    """Texts without anything in common; a fixed batch of 16 of them is mostly padding."""
    rng = random.Random(seed)
    return [[*draw(rng, log_normal(rng, 120, 1.0, 8, 1024)), EOS] for _ in range(n)]


def candidates(prompts: int, each: int, seed: int = 0) -> TokenIds:
    """`each` completions of every prompt, prompt after prompt."""
    rng = random.Random(seed)
    texts = []
    for _ in range(prompts):
        prompt = draw(rng, log_normal(rng, 300, 0.3, 100, 600))
        texts += [[*prompt, *draw(rng, log_normal(rng, 80, 0.5, 8, 300)), EOS] for _ in range(each)]
    return texts


def pairs(n: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs with a prompt in common; no two pairs share one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt = draw(rng, log_normal(rng, 150, 0.6, 20, 500))
        chosen, rejected = (
            [*prompt, *draw(rng, log_normal(rng, 80, 0.6, 8, 300)), EOS] for _ in range(2)
        )
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def useful_flops(model: Any, ids: TokenIds, *, backward: bool = False) -> float:
    """FLOPs that scoring these texts needs, each common prefix once; a backward counts twice.

    Matrix products of the layers and of causal attention; of the last layer keys and values of all
    tokens, and the rest of each text's last token. Embeddings, norms and the head are left out.
    """
    from companion.engine import plan_trees

    config = model.config
    matrices = [
        (name, p.numel())
        for name, p in model.named_parameters()
        if p.dim() == 2 and "embed" not in name and "score" not in name
    ]
    last = f"layers.{config.num_hidden_layers - 1}."
    kept = (last + "self_attn.k_", last + "self_attn.v_")
    read = sum(n for name, n in matrices if last in name and not any(k in name for k in kept))
    weights = sum(n for _, n in matrices) - read
    seen = 0
    tokens = 0
    for tree in plan_trees(ids):
        tokens += tree.size
        seen += tree.shared * (tree.shared + 1) // 2
        for row in tree.rows:
            length = len(ids[row])
            seen += length * (length + 1) // 2 - tree.shared * (tree.shared + 1) // 2
    width = config.num_attention_heads * config.head_dim
    products = seen * (config.num_hidden_layers - 1) + sum(map(len, ids))
    forward = 2.0 * (weights * tokens + read * len(ids)) + 4.0 * width * products
    return forward * (3 if backward else 1)


def needed_tokens(ids: TokenIds) -> int:
    """Tokens that have to be computed, each common prefix once."""
    from companion.engine import plan_trees

    return sum(tree.size for tree in plan_trees(ids))
