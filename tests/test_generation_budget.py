"""What sampling and log-probabilities take of a GPU's memory, by hand and by counting."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MambaConfig, Qwen3Config

from companion import Policy
from companion.engine import generation_budget, kv_cache_bytes, logprob_budget

GIB = 1024**3


def qwen3_06b() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )


def llama3_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def test_the_cache_of_known_models_by_hand() -> None:
    # 28 layers × (keys and values) × 8 heads × 128 × 2 bytes: 112 KiB a token
    assert kv_cache_bytes(qwen3_06b(), 2) == 28 * 2 * 8 * 128 * 2 == 114_688
    assert kv_cache_bytes(qwen3_06b(), 4) == 229_376
    # 4,096 / 32 heads = 128 wide; 128 KiB a token
    assert kv_cache_bytes(llama3_8b(), 2) == 32 * 2 * 8 * 128 * 2 == 131_072
    # the batch of 65,536 tokens that was the default
    assert 7 * GIB == 65_536 * 114_688
    assert 8 * GIB == 65_536 * 131_072
    # a wrapped configuration, a head_dim of None, and no grouped heads
    inner = SimpleNamespace(
        num_hidden_layers=3, num_attention_heads=4, head_dim=None, hidden_size=40
    )
    wrapped: Any = SimpleNamespace(get_text_config=lambda: inner)
    assert kv_cache_bytes(wrapped, 2) == 3 * 2 * 40 * 2


def test_the_budget_to_generate_by_hand() -> None:
    # one layer of the 0.6B in bf16, a token: 2 × 1,024 values of the stream; 3 × 3,072 of the MLP
    # (queries, their results, and keys and values twice are 128 × (4 × 16 + 2 × 8) = 10,240: more);
    # and two copies of the stream in float32
    layer = 2 * (2 * 1024 + 10_240) + 8 * 1024
    assert layer == 32_768
    # a mask of 512 bools, and twice as bf16
    per_token = 114_688 + layer + 512 * 5
    tokens, row = generation_budget(8 * GIB, qwen3_06b(), 2, 512)
    assert tokens == int(8 * GIB * 0.6) // per_token == 34_356
    # 151,936 × 40 bytes a row are as much as 41 tokens
    assert row == -(-151_936 * 40 // per_token) == 41
    # Llama-3-8B on 24 GiB, 15 of them weights
    layer = 2 * (2 * 4096 + 3 * 14_336) + 8 * 4096
    per_token = 131_072 + layer + 512 * 5
    assert generation_budget(8 * GIB, llama3_8b(), 2, 512) == (
        int(8 * GIB * 0.6) // per_token,
        -(-128_256 * 40 // per_token),
    )
    # longer rows have a wider mask; more memory has a limit, and none a floor
    assert generation_budget(8 * GIB, qwen3_06b(), 2, 8192)[0] < tokens
    assert generation_budget(80 * GIB, qwen3_06b(), 2, 512)[0] == 65_536
    assert generation_budget(0, qwen3_06b(), 2, 512)[0] == 1024
    assert generation_budget(8 * GIB, MambaConfig(), 2, 512)[0] > 1024


def test_the_budget_of_log_probabilities_by_hand() -> None:
    # 151,936 logits in bf16 and two float32 copies of them: 1.5 MB a token
    per_token = 151_936 * (2 + 8) + 32_768
    assert logprob_budget(8 * GIB, qwen3_06b(), 2) == int(8 * GIB * 0.6) // per_token == 3320
    assert logprob_budget(8 * GIB, qwen3_06b(), 4) < 3320
    assert logprob_budget(10**15, qwen3_06b(), 2) == 65_536
    assert logprob_budget(0, qwen3_06b(), 2) == 1024


# ---------------------------------------------------------------------- against what is there


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_as_large_as_it_is_said_to_be(
    kind: str, dtype: torch.dtype, tiny_bases: Any
) -> None:
    model = Policy.from_pretrained(tiny_bases(kind), device="cpu", dtype=dtype).model
    with torch.no_grad():
        cache = model(torch.ones(3, 7, dtype=torch.int64), use_cache=True).past_key_values
    there = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert there == 3 * 7 * kv_cache_bytes(model.config, dtype.itemsize)


class Alive(TorchDispatchMode):
    """Follows the bytes of the tensors that are alive, those made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in given:
                continue
            self._known.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


#: what decides: the cache, or the logits
SHAPES: dict[str, dict[str, int]] = {
    "cache": {"num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 32},
    "logits": {"num_hidden_layers": 2, "vocab_size": 20_000},
}


@pytest.fixture(
    scope="module",
    params=[(shape, size) for shape in sorted(SHAPES) for size in (torch.float32, torch.bfloat16)],
    ids=lambda given: f"{given[0]}-{given[1]}",
)
def shaped(request: Any, tmp_path_factory: Any, make_causal: Any, make_tokenizer: Any) -> Policy:
    shape, dtype = request.param
    folder = tmp_path_factory.mktemp(shape)
    make_causal("qwen3", make_tokenizer(), folder, **SHAPES[shape])
    return Policy.from_pretrained(folder, device="cpu", dtype=dtype)


PROMPTS = ["Ana has 3 boxes and", "Ben gives 4 pens to Ana , how many is it now"]


def planned(policy: Policy, lengths: list[int], use: str) -> float:
    """Bytes that a batch of such rows is planned to take, weights aside."""
    config, size = policy.model.config, policy.model.dtype.itemsize
    for free in (10**8, 10**9):
        if use == "logprobs":
            tokens, row = logprob_budget(free, config, size), 0
        else:
            tokens, row = generation_budget(free, config, size, max(lengths))
        if 1024 < tokens < 65_536:
            break
    assert 1024 < tokens < 65_536  # neither bound decided
    return len(lengths) * (max(lengths) + row) * free * 0.6 / tokens


@pytest.mark.parametrize(("n", "top_p"), [(1, 1.0), (16, 0.9)])
def test_a_batch_takes_what_the_budget_says(
    shaped: Policy, n: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most what is planned, and not much less, or the plan would waste the GPU."""
    monkeypatch.setattr(Policy, "eos_token_ids", property(lambda self: [10**6]))
    prompts, new = PROMPTS * (16 // n), 12
    shaped.sample(prompts, n, max_new_tokens=2, top_p=top_p)  # what is made once
    with Alive() as alive:
        shaped.sample(prompts, n, max_new_tokens=new, top_p=top_p)
    lengths = [new + len(ids) for ids in shaped._encoded(prompts) for _ in range(n)]
    said = planned(shaped, lengths, "generate")
    print(f"{alive.most:,} bytes alive, {said:,.0f} planned")
    assert said / 3 < alive.most <= said


@pytest.mark.parametrize("rows", [1, 6])
def test_log_probabilities_take_what_the_budget_says(shaped: Policy, rows: int) -> None:
    given = PROMPTS[:1] * rows, [" ".join(["pens"] * 60)] * rows
    shaped.logprobs(*given)
    with Alive() as alive:
        shaped.logprobs(*given)
    said = planned(shaped, [len(ids) for ids, _ in shaped._whole(*given)], "logprobs")
    print(f"{alive.most:,} bytes alive, {said:,.0f} planned")
    assert said / 4 < alive.most <= said
