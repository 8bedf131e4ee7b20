"""Packed scores and gradients are those of texts one by one; what is not exact is refused."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.varlen_on_cpu import take_cudas_path
from companion import load_base
from companion.engine import (
    PackedBatch,
    Segment,
    Segments,
    attention as packing,
    last_layer,
    pack,
    packed_scores,
    packing_obstacle,
    pad_batch,
    plan_trees,
    reward_scores,
)
from companion.engine.attention import PACKED, restore_attention
from companion.errors import ModelError

KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")
#: a window shorter than the texts; Qwen's needs to be switched on, for the layers it is meant for
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    # the second of three: in the last, the window is in what is gathered and not in the kernel
    "qwen2": {
        **{"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
        "num_hidden_layers": 3,
    },
    "qwen3": {
        **{"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
        "num_hidden_layers": 3,
    },
}
CASES = [(kind, False) for kind in KINDS] + [(kind, True) for kind in WINDOWS]


def rows(seed: int = 0) -> list[list[int]]:
    """Three prompts with 3, 2 and 1 completions, a row that shares nothing, and one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(9, 60, (n,), generator=generator).tolist()

    prompts = [[1, *draw(n)] for n in (14, 9, 11)]
    texts = [
        [*p, *draw(2 + 3 * k), 2] for p, n in zip(prompts, (3, 2, 1), strict=True) for k in range(n)
    ]
    return [texts[i] for i in (3, 0, 5, 1, 4, 2)] + [[1, *draw(20), 2], [2]]


def alone(model: Any, ids: list[list[int]]) -> torch.Tensor:
    return torch.cat([reward_scores(model, torch.tensor([row]), check=False) for row in ids])


def packed(ids: list[list[int]]) -> PackedBatch:
    batch = pack(ids, plan_trees(ids))
    assert batch.computed < batch.needed
    return batch


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory,
    make_causal: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
) -> Callable[..., Any]:
    made: dict[Any, Path] = {}

    def build(kind: str, windowed: bool = False, **overrides: Any) -> Any:
        extra = {**(WINDOWS[kind] if windowed else {}), **overrides}
        key = (kind, json.dumps(extra, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"packed_{kind}")
            made[key] = make_causal(kind, make_tokenizer(), folder, **extra)
        return load_base(made[key]).model.eval()

    return build


@pytest.mark.parametrize(("kind", "windowed"), CASES)
def test_scores_and_gradients_are_those_of_single_texts(
    kind: str, windowed: bool, make: Callable[..., Any]
) -> None:
    model = make(kind, windowed)
    ids = rows()
    assert packing_obstacle(model) is None
    weights = torch.linspace(-1, 1, len(ids))
    want = alone(model, ids)
    (want * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = packed_scores(model, packed(ids))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert want.std() > 0.05
    (found * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            scale = gradients[name].abs().max().clamp(min=1.0)
            torch.testing.assert_close(
                parameter.grad / scale, gradients[name] / scale, atol=2e-5, rtol=0
            )
    if windowed:  # the window bites: without it the scores are others
        model.config.sliding_window = None
        for module in model.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = None
        assert (packed_scores(model, packed(ids)) - want).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_sees_its_prefix_and_no_sibling(kind: str, make: Callable[..., Any]) -> None:
    model = make(kind)
    prompt, branches = [1, *range(20, 32)], [[40, 41, 2], [42, 43, 44, 2], [45, 2]]
    with torch.no_grad():
        before = packed_scores(model, packed([prompt + b for b in branches]))
        siblings = [branches[0], [50, 51, 52, 53, 54, 2], [55, 2]]
        after = packed_scores(model, packed([prompt + b for b in siblings]))
        torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=0)
        assert ((after - before)[1:].abs() > 1e-3).all()
        other = [*prompt[:5], 33, *prompt[6:]]
        changed = packed_scores(model, packed([other + b for b in branches]))
        assert ((changed - before).abs() > 1e-3).all()


def positions_that_do_not_restart(batch: PackedBatch) -> PackedBatch:
    batch.position_ids = torch.arange(batch.computed)[None]
    return batch


def branches_that_start_at_zero(batch: PackedBatch) -> PackedBatch:
    for item in batch.segments.items:
        batch.position_ids[0, item.start : item.start + item.length] = torch.arange(item.length)
    return batch


def prefix_that_is_not_seen(batch: PackedBatch) -> PackedBatch:
    items = tuple(item._replace(prefix_start=0, prefix=0) for item in batch.segments.items)
    batch.segments = Segments(items)
    return batch


def readout_one_early(batch: PackedBatch) -> PackedBatch:
    batch.readout = batch.readout - 1
    return batch


@pytest.mark.parametrize(
    "wrong",
    [
        positions_that_do_not_restart,
        branches_that_start_at_zero,
        prefix_that_is_not_seen,
        readout_one_early,
    ],
)
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_wrong_layouts_give_wrong_scores(
    kind: str, wrong: Callable[[PackedBatch], PackedBatch], make: Callable[..., Any]
) -> None:
    """What the other tests would let through if they compared too loosely."""
    model, ids = make(kind), rows()[:6]
    with torch.no_grad():
        assert (packed_scores(model, wrong(packed(ids))) - alone(model, ids)).abs().max() > 1e-3


def test_seeing_a_sibling_gives_wrong_scores(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain causal attention along the tree: each branch sees those before it."""

    def along_the_tree(
        query: Any, key: Any, value: Any, segments: Segments, scaling: Any, window: Any
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        begin = torch.zeros(query.shape[2], 1, dtype=torch.long)
        for item in segments.items:
            first = item.prefix_start if item.prefix else item.start
            begin[item.start : item.start + item.length] = first
        at = torch.arange(query.shape[2])
        seen = (at <= at[:, None]) & (at >= begin)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling
        ).transpose(1, 2)

    model, ids = make("qwen3"), rows()[:6]
    monkeypatch.setattr(packing, "_by_segment", along_the_tree)
    with torch.no_grad():
        difference = (packed_scores(model, packed(ids)) - alone(model, ids)).abs()
    assert difference.max() > 1e-3


# ---------------------------------------------------------------------- refusals


def test_it_refuses_to_run_without_segments(make: Callable[..., Any]) -> None:
    model = make("qwen3")
    model.set_attn_implementation(PACKED)
    with pytest.raises(ModelError, match="without its segments"):
        model.model(torch.tensor([[1, 9, 2]]), use_cache=False)
    query = torch.randn(1, 2, 5, 4)
    five = Segments((Segment(0, 5, 0, 0),))
    with pytest.raises(ModelError, match="hold 5 tokens"):
        packing.packed_attention(model, query[:, :, :4], query, query, None, packed_segments=five)
    with pytest.raises(ModelError, match="no an attention mask"):
        packing.packed_attention(model, query, query, query, torch.ones(1), packed_segments=five)
    for name, value in (("dropout", 0.1), ("softcap", 30.0), ("s_aux", query)):
        with pytest.raises(ModelError, match="knows no"):
            packing.packed_attention(
                model, query, query, query, None, packed_segments=five, **{name: value}
            )


def test_the_models_own_attention_comes_back(make: Callable[..., Any], tmp_path: Path) -> None:
    model, ids = make("llama"), rows()
    before = model.config._attn_implementation
    with torch.no_grad():
        packed_scores(model, packed(ids))
        assert model.config._attn_implementation == before
        with pytest.raises(IndexError):
            packed_scores(
                model,
                packed([[1, 9, 999_999, *range(9, 20), 3], [1, 9, 999_999, *range(9, 20), 2]]),
            )
        assert model.config._attn_implementation == before
    model.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_the_same_again(
    reentrant: bool, make: Callable[..., Any]
) -> None:
    """The second forward comes after the first has ended: it must not fall back to plain sdpa."""
    model, ids = make("qwen3").train(), rows()
    packed_scores(model, packed(ids)).square().sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # as TRL does: a reentrant layer needs an input with one
    packed_scores(model, packed(ids)).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-5, rtol=1e-4)
    assert model.config._attn_implementation == PACKED
    with torch.no_grad():  # a padded batch in between takes the model's own
        alone(model, ids)
    assert model.config._attn_implementation == PACKED
    restore_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("gemma2", {}, "soft-caps"),
        ("gpt_oss", {}, "sinks"),
        ("qwen3_next", {}, "linear_attention"),
        ("mamba", {}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "of the kind conv"),
        ("bloom", {}, "not been proved"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type dynamic",
        ),
        ("gemma", {"use_bidirectional_attention": True}, "both ways"),
        ("llama", {"attn_implementation": "eager"}, "'eager' was asked for"),
    ],
)
def test_models_that_cannot_be_packed_are_recognised(
    kind: str, overrides: dict[str, Any], reason: str, make_config: Any, tiny_tokenizer: Any
) -> None:
    from transformers import AutoModel

    if kind in ("mamba", "bloom"):
        from transformers import AutoConfig

        config = AutoConfig.for_model(
            kind, hidden_size=32, num_hidden_layers=1, n_layer=1, n_head=4, vocab_size=80
        )
    else:
        extra = (
            {"num_local_experts": 2, "num_experts": 2} if kind in ("gpt_oss", "qwen3_next") else {}
        )
        config = make_config(kind, tiny_tokenizer, **extra, **overrides)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert reason in (packing_obstacle(model) or "none")


def test_dropout_is_an_obstacle_to_training_alone(make: Callable[..., Any]) -> None:
    model = make("llama")
    assert packing_obstacle(model, training=True) is None
    model.config.attention_dropout = 0.1
    assert packing_obstacle(model) is None
    assert "dropout" in (packing_obstacle(model.train()) or "")
    gpt2 = make("gpt2")
    assert packing_obstacle(gpt2, training=True) is None
    gpt2.transformer.drop.p = 0.1
    assert "dropout" in (packing_obstacle(gpt2, training=True) or "")


@pytest.mark.parametrize("matrix_units", [False, True])
@pytest.mark.parametrize("by_autocast", [False, True])
def test_attention_in_half_precision_on_a_cpu(
    matrix_units: bool,
    by_autocast: bool,
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without matrix units it is computed in float32, which is faster there; the rest is not."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    seen = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Any, *given: Any, **options: Any) -> torch.Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if autocast else query.dtype)
        return attention(query, *given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, ids = make("llama"), rows()
    with torch.no_grad():
        want = packed_scores(model, packed(ids))
        assert seen == {torch.float32}
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=by_autocast):
            found = packed_scores(model if by_autocast else model.bfloat16(), packed(ids))
    assert seen == {torch.bfloat16 if matrix_units else torch.float32}
    assert found.dtype == torch.float32
    error = (found - want).abs().max()
    assert 0 < error < 0.1 * want.std()


# ---------------------------------------------------------------------- CUDA's path, emulated


@pytest.mark.parametrize(("kind", "windowed"), CASES)
def test_the_path_of_cuda_with_its_kernel_emulated(
    kind: str, windowed: bool, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, in float32; then in half precision no further off than padded batches are."""
    model, ids = make(kind, windowed).train(), rows()
    weights = torch.linspace(-1, 1, len(ids))
    padding = pad_batch(ids, model.config.pad_token_id)

    def padded(model: Any) -> torch.Tensor:
        return reward_scores(model, padding["input_ids"], padding["attention_mask"])

    def result(model: Any, score: Any, dtype: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
        model.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            scores = score(model)
        (scores * weights).sum().backward()
        found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        return scores.detach(), found

    def off(found: Any) -> tuple[float, float]:
        norms = [(float((found[1][n] - g).norm()), float(g.norm())) for n, g in want[1].items()]
        error = sum(e**2 for e, _ in norms) ** 0.5 / sum(n**2 for _, n in norms) ** 0.5
        return float((found[0] - want[0]).norm() / want[0].norm()), error

    want = result(model, lambda model: alone(model, ids))
    seen = take_cudas_path(monkeypatch.setattr)
    by_tree = lambda model: packed_scores(model, packed(ids))  # noqa: E731
    with monkeypatch.context() as exact:
        exact.setattr(packing, "_half_dtype", lambda query: query.dtype)
        assert max(off(result(model, by_tree))) < 2e-5
    assert set(seen) == {torch.float32}
    seen.clear()
    mixed = [result(model, by_tree, torch.bfloat16)]
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        mixed.append(result(model, by_tree, torch.bfloat16))
    model.activation_checkpointing_disable()
    restore_attention(model)
    reference = result(model, padded, torch.bfloat16)
    cases = [(found, reference) for found in mixed]
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype)
        half.score.float()
        cases.append((result(half, by_tree), result(half, padded)))
    assert set(seen) == {torch.bfloat16, torch.float16}
    for found, reference in cases:
        for ours, theirs in zip(off(found), off(reference), strict=True):
            assert ours < 3 * theirs + 1e-3


# (transformers' GPT-2 reads the ids back itself, to warn of padding)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("half", [True, False])
def test_nothing_is_read_back_from_the_device(
    kind: str, half: bool, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ``meta``, in the place of the GPU, whatever reads a value raises."""
    from torch.nn.attention import varlen

    model = make(kind).to("meta")
    batch = packed(rows())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(packing, "_half_dtype", lambda query: query.dtype if half else None)
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *_, **__: query * 1)
    for module in (packing, last_layer):
        monkeypatch.setattr(module, "fits_varlen", lambda query: True)
    scores = packed_scores(model, batch.to("meta"))
    assert (scores.shape, scores.device.type) == ((len(rows()),), "meta")
    scores.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        scores.tolist()


def test_the_kernel_takes_what_it_is_given() -> None:
    """Names and places of its arguments; it does not run without CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = list(inspect.signature(varlen_attn).parameters)
    assert parameters[:7] == [
        *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
    ]
    assert {"scale", "window_size", "enable_gqa"} <= set(parameters[7:])


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "path"),
    [
        ("cuda", torch.bfloat16, None, "varlen"),
        ("cuda", torch.float16, None, "varlen"),
        ("cuda", torch.float32, torch.bfloat16, "varlen"),
        ("cuda", torch.float32, None, "segment"),
        ("T4", torch.float16, None, "segment"),
        ("cpu", torch.bfloat16, None, "segment"),
    ],
)
def test_the_kernel_of_cuda_is_used_in_half_precision(
    device: str, dtype: Any, autocast: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: autocast)
    monkeypatch.setattr(packing, "_half_is_slow", lambda _: False)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda _: (7, 5) if device == "T4" else (8, 0)
    )
    taken = []
    monkeypatch.setattr(packing, "_by_varlen", lambda *given: taken.append(("varlen", given[-1])))
    monkeypatch.setattr(packing, "_by_segment", lambda *given: taken.append(("segment", None)))
    query: Any = SimpleNamespace(
        shape=(1, 2, 5, 8),
        is_cuda=device != "cpu",
        dtype=dtype,
        device=torch.device("cpu" if device == "cpu" else "cuda"),
    )
    five = Segments((Segment(0, 5, 0, 0),))
    packing.packed_attention(torch.nn.Identity(), query, query, query, None, packed_segments=five)
    assert taken == [(path, (autocast or dtype) if path == "varlen" else None)]
