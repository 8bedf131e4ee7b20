"""Packed scores and gradients against padded ones in float32: the first question of a GPU.

:mod:`benchmarks.probe` runs it over architectures, heads, windows, dtypes and checkpointing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import random
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.probing import Found, Piece, Probe
from benchmarks.shapes import EOS, PAD, TokenIds, draw
from benchmarks.varlen_on_cpu import take_cudas_path
from companion.engine import pack, packed_scores, pad_batch, plan_trees, reward_scores

#: dtype -> weights, and the dtype of autocast
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32 + bf16 autocast": (torch.float32, torch.bfloat16),
}
CHECKPOINTING = {"no checkpointing": None, "non-reentrant": False, "reentrant": True}


@contextlib.contextmanager
def counted_kernels(here: Probe) -> Iterator[Counter[str]]:
    """How often each attention was called; on a CPU CUDA's path is taken, by the stand-in."""
    ran: Counter[str] = Counter(varlen=0, sdpa=0)
    inside: list[int] = []
    with contextlib.ExitStack() as stack:

        def patch(where: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        def count(where: Any, name: str, label: str) -> None:
            real = getattr(where, name)

            def call(*given: Any, **options: Any) -> Any:
                ran[label] += not inside
                inside.append(1)  # the stand-in calls the other one
                try:
                    return real(*given, **options)
                finally:
                    inside.pop()

            patch(where, name, call)

        if not here.gpu:
            take_cudas_path(patch)
        count(import_module("torch.nn.attention.varlen"), "varlen_attn", "varlen")
        count(torch.nn.functional, "scaled_dot_product_attention", "sdpa")
        yield ran


def parity_cases(here: Probe) -> Iterator[tuple[str, str, dict[str, Any], str, str]]:
    """Name, architecture, what differs in its configuration, precision, checkpointing."""
    window = here.size(33, 5)  # shorter than the prefixes, and so that one key more would be seen
    mixed = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 1}
    mixed["num_hidden_layers"] = 3  # without one, with one, and the last, which reads few tokens
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        kind: (kind, {}) for kind in ("llama", "qwen2", "qwen3", "gemma", "gpt2")
    }
    kinds["mistral, window"] = ("mistral", {"sliding_window": window})
    kinds["qwen2, mixed windows"] = ("qwen2", mixed)
    for kind, (model_type, own) in kinds.items():
        for precision in PRECISIONS:
            for checkpointing in CHECKPOINTING:
                yield kind, model_type, own, precision, checkpointing
    for width in (64, 128, 256):
        for heads, keys in (("MQA", 1), ("GQA", 2), ("MHA", 4)):
            for kind in ("llama", "mistral, window"):
                if here.quick and (heads == "MHA") != (kind == "llama"):
                    continue
                model_type, own = kinds[kind]
                sizes = {"head_dim": width, "num_key_value_heads": keys}
                for precision in PRECISIONS:
                    name = f"{kind}, {heads} of {width}"
                    yield name, model_type, {**own, **sizes}, precision, "no checkpointing"


@functools.lru_cache(1)
def parity_model(model_type: str, own: str, hidden: int, device: torch.device) -> Any:
    """Random, of two layers unless it says otherwise, in float32."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from companion.models import install_head

    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64 if device.type == "cuda" else 32,
    }
    if model_type == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": 2, "n_head": 4, "n_positions": 1024}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    common = {"vocab_size": 1000, "pad_token_id": PAD, "eos_token_id": EOS, "num_labels": 1}
    # large weights: what is wrong then moves a score by far more than rounding does
    common["initializer_range"] = 1.2 * hidden**-0.5
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**common, **sizes, **json.loads(own)})
    model = AutoModelForSequenceClassification.from_config(config).to(device)
    install_head(model)
    return model.train()


def parity_texts(here: Probe) -> TokenIds:
    """Three prompts with 3, 2 and 1 completions, a text alone, a single token.

    On a GPU over several of the kernels' tiles of 64 to 128 tokens.
    """
    rng, scale = random.Random(0), here.size(16, 1)
    texts = [[*draw(rng, 20 * scale), EOS], [EOS]]
    for length, branches in ((14, 3), (9, 2), (11, 1)):
        prompt = draw(rng, length * scale)
        texts += [[*prompt, *draw(rng, (2 + 3 * k) * scale), EOS] for k in range(branches)]
    return texts


def bounds(dtype: torch.dtype, layers: int) -> tuple[float, float]:
    """Largest relative error of scores and of the gradient that rounding explains.

    About twelve results are rounded on the way through a layer, each by half an eps at most, and
    their errors add like the steps of a random walk; four times that, since softmax and norms make
    some of them larger, and sixteen in float32, where sums of hundreds of terms are rounded too.
    The backward is as long a way again.
    """
    room = 16 if dtype == torch.float32 else 4
    scores = room * torch.finfo(dtype).eps / 2 * (12 * layers) ** 0.5
    return scores, 2 * scores


def parity_case(
    here: Probe, model_type: str, own: dict[str, Any], precision: str, checkpointing: str
) -> Found:
    """Packed against padded in float32, from the same weights, rounded where they are rounded."""
    weights, autocast = PRECISIONS[precision]
    model = parity_model(model_type, json.dumps(own), here.size(256, 64), here.device)
    texts = parity_texts(here)
    rounded = copy.deepcopy(model).to(weights)
    rounded.score.float()
    exact = copy.deepcopy(rounded).float()
    pull = torch.linspace(-1, 1, len(texts), device=here.device)
    padding = {name: x.to(here.device) for name, x in pad_batch(texts, PAD).items()}
    tree = pack(texts, plan_trees(texts)).to(here.device)

    def result(model: Any, packed: bool, autocast: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(here.device.type, autocast, enabled=autocast is not None):
            if packed:
                scores = packed_scores(model, tree)
            else:
                scores = reward_scores(model, padding["input_ids"], padding["attention_mask"])
        (scores * pull).sum().backward()
        gradient = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        return scores.detach().float(), gradient

    want = result(exact, False, None)
    padded = result(copy.deepcopy(rounded), False, autocast)
    if CHECKPOINTING[checkpointing] is not None:
        rounded.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
        rounded.enable_input_require_grads()  # as TRL does: a reentrant layer needs one
    with counted_kernels(here) as ran:
        packed = result(rounded, True, autocast)
    bound = bounds(autocast or weights, model.config.num_hidden_layers)
    found: Found = {"kernels": dict(ran), "gradients": len(packed[1])}
    ok = packed[1].keys() == want[1].keys()
    for name, got in (("packed", packed), ("padded", padded)):
        scores = float((got[0] - want[0]).norm() / want[0].norm())
        norms = {n: (float((got[1][n] - g).norm()), float(g.norm())) for n, g in want[1].items()}
        whole = sum(g**2 for _, g in norms.values()) ** 0.5
        worst = max(norms, key=lambda n: norms[n][0])
        found[name] = {
            "scores": scores,
            "largest": float((got[0] - want[0]).abs().max()),
            "gradient": sum(e**2 for e, _ in norms.values()) ** 0.5 / whole,
            "worst_parameter": [worst, norms[worst][0] / max(norms[worst][1], 1e-3 * whole)],
        }
    found["bounds"] = dict(zip(("scores", "gradient"), bound, strict=True))
    found["ok"] = ok and all(
        found["packed"][name] <= found["bounds"][name] for name in found["bounds"]
    )
    return found


def parity_pieces(here: Probe) -> Iterator[tuple[str, Piece]]:
    """Every case; then the worst of each precision."""
    for name, model_type, own, precision, checkpointing in parity_cases(here):
        if here.half == torch.float16 and "bf16" in precision:
            continue  # emulated there
        run = functools.partial(parity_case, here, model_type, own, precision, checkpointing)
        yield f"{name}; {precision}; {checkpointing}", run

    def worst() -> Found:
        found: Found = {}
        for precision in PRECISIONS:
            cases = [c for n, c in here.found.items() if f"; {precision};" in n and "packed" in c]
            of = found[precision] = {"cases": len(cases)}
            of["by varlen"] = sum(c["kernels"]["varlen"] > 0 for c in cases)
            of["by both"] = sum(min(c["kernels"].values()) > 0 for c in cases)
            for way in ("packed", "padded"):
                for what in ("scores", "gradient"):
                    of[f"{way}, {what}"] = max((c[way][what] for c in cases), default=None)
        errors = ", ".join(f"{name} {of['packed, scores'] or 0:.1g}" for name, of in found.items())
        names = ("cases", "by varlen", "by both")
        cases, varlen, both = (sum(of[name] for of in found.values()) for name in names)
        line = f"largest error of scores: {errors}; {varlen} of {cases} cases by varlen"
        line += f", {both} of these by SDPA too" if both else ""
        return {"worst": found, "line": line}

    yield "worst", worst
