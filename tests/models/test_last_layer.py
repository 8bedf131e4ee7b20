"""The last layer computes only what is read, and gives what the whole layer gives.

That scores and gradients are those of single texts is in test_packed_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from companion import load_base
from companion.engine import (
    PackedBatch,
    forward,
    last_layer,
    pack,
    packed_scores,
    plan_trees,
)
from companion.engine.attention import PROVED, restore_attention
from companion.engine.last_layer import PRUNABLE, LastLayer, prunable

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    # the last of two layers has the window
    "qwen3": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
}


def rows() -> list[list[int]]:
    """Texts of 1 to 40 tokens; two prompts with three completions, and two texts alone."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(9, 60, (n,), generator=generator).tolist()

    prompts = [[1, *draw(12)], [1, *draw(7)]]
    texts = [[*p, *draw(3 + 8 * k), 2] for p in prompts for k in range(3)]
    return [texts[i] for i in (3, 0, 5, 1, 4, 2)] + [[1, *draw(40), 2], [2]]


def packed() -> PackedBatch:
    return pack(rows(), plan_trees(rows()))


@pytest.fixture
def make(
    tmp_path: Path, make_causal: Callable[..., Path], make_tokenizer: Callable[..., Any]
) -> Callable[..., Any]:
    def build(kind: str, **overrides: Any) -> Any:
        return load_base(make_causal(kind, make_tokenizer(), tmp_path, **overrides)).model.eval()

    return build


def whole(model: Any, batch: PackedBatch, places: torch.Tensor) -> torch.Tensor:
    """What all tokens give at these places."""
    return forward.packed_hidden(model, batch)[:, places]


def test_which_architectures() -> None:
    assert {"gpt2"} == PROVED - PRUNABLE


def test_layers_on_several_devices_are_computed_whole(make: Callable[..., Any]) -> None:
    model = make("llama")
    model.hf_device_map = {"": "cpu"}
    assert prunable(model)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk"}
    assert not prunable(model)


@pytest.mark.parametrize(
    ("kind", "windowed"),
    [(kind, False) for kind in sorted(PRUNABLE)] + [(kind, True) for kind in WINDOWED],
)
def test_any_token_reads_as_from_the_whole_layer(
    kind: str, windowed: bool, make: Callable[..., Any]
) -> None:
    """Not the ends of the texts alone: tokens of a prefix, of a branch, in any order."""
    model = make(kind, **(WINDOWED[kind] if windowed else {})).double()
    assert prunable(model)
    batch = packed()
    places = torch.randperm(batch.computed, generator=torch.Generator().manual_seed(1))[:25]
    gradients = []
    hidden = []
    for read in (
        lambda: whole(model, batch, places),
        lambda: forward.packed_hidden(model, batch, LastLayer(batch.segments, places)),
    ):
        model.zero_grad()
        hidden.append(read())
        (hidden[-1] * torch.linspace(-1, 1, 25)[:, None]).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(hidden[1], hidden[0], atol=1e-10, rtol=1e-10)
    for name, want in gradients[0].items():
        # norms compute in float32, whatever the model
        torch.testing.assert_close(gradients[1][name], want, atol=1e-6, rtol=1e-5)


def test_one_row_can_be_asked_for_other_tokens(make: Callable[..., Any]) -> None:
    """What was made for the first question must not answer the second."""
    model, batch = make("llama"), packed()
    with torch.no_grad():
        for places in (batch.readout, batch.readout - 1, batch.readout[:2]):
            found = forward.packed_hidden(model, batch, LastLayer(batch.segments, places))
            torch.testing.assert_close(found, whole(model, batch, places), atol=1e-5, rtol=1e-5)


def test_nothing_else_is_computed(make: Callable[..., Any]) -> None:
    model, batch = make("qwen3"), packed()
    tokens: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "o_proj", "down_proj"):
            module.register_forward_hook(
                lambda _, __, out, name=name: tokens.setdefault(name, []).append(out.shape[1])
            )
    with torch.no_grad():
        packed_scores(model, batch)
    n, total = len(batch.rows), batch.computed
    assert tokens["model.layers.0.mlp.down_proj"] == [total]
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert tokens[f"model.layers.1.{part}"] == [n], part
    assert tokens["model.layers.1.self_attn.k_proj"] == [total, n]


@pytest.mark.parametrize(
    "wrong",
    ["the window", "the prefix", "one token less", "positions"],
)
def test_wrong_ways_give_wrong_scores(
    wrong: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make("mistral", sliding_window=5), packed()
    with torch.no_grad():
        want = packed_scores(model, batch)
    right = last_layer._seen
    if wrong == "the window":
        monkeypatch.setattr(last_layer, "_seen", lambda w, _, device: right(w, None, device))
    elif wrong == "the prefix":
        model.config.sliding_window = None
        with torch.no_grad():
            want = packed_scores(model, batch)

        def without(wanted: LastLayer, window: Any, device: Any) -> Any:
            items = tuple(i._replace(prefix=0, prefix_start=0) for i in batch.segments.items)
            return right(LastLayer(type(batch.segments)(items), wanted.places), window, device)

        monkeypatch.setattr(last_layer, "_seen", without)
    elif wrong == "one token less":
        monkeypatch.setattr(
            last_layer, "_seen", lambda w, window, device: right(w, window - 1, device)
        )
    else:
        keys = last_layer._keys_and_values
        monkeypatch.setattr(
            last_layer,
            "_keys_and_values",
            lambda layer, hidden, cos, sin: keys(layer, hidden, cos.roll(1, 1), sin.roll(1, 1)),
        )
    batch.segments._made.clear()
    with torch.no_grad():
        assert (packed_scores(model, batch) - want).abs().max() > 1e-3


def test_what_is_no_number_stays_in_its_text(make: Callable[..., Any]) -> None:
    """One call with a mask over the whole row would carry it into all texts: 0 times NaN is NaN."""
    model, batch = make("llama"), packed()
    with torch.no_grad():
        want = packed_scores(model, batch)
        model.model.embed_tokens.weight[rows()[6][5]] = float("nan")
        bad = torch.tensor([rows()[6][5] in row for row in rows()])
        assert 0 < bad.sum() < len(bad)
        found = packed_scores(model, batch)
    assert found[bad].isnan().all()
    torch.testing.assert_close(found[~bad], want[~bad])


def test_the_hook_goes_when_the_forward_has_ended(make: Callable[..., Any]) -> None:
    model, batch = make("llama"), packed()
    layer = model.model.layers[-1]
    packed_scores(model, batch)
    assert not layer._forward_pre_hooks
    with pytest.raises(IndexError):
        forward.packed_hidden(model, batch, LastLayer(batch.segments, torch.tensor([10_000])))
    assert not layer._forward_pre_hooks


def test_with_activation_checkpointing_it_stays_for_the_backward(make: Callable[..., Any]) -> None:
    model, batch = make("llama").train(), packed()
    model.activation_checkpointing_enable()
    layer = model.model.layers[-1]
    for _ in range(2):  # once only, however many forwards
        scores = packed_scores(model, batch)
        assert len(layer._forward_pre_hooks) == 1
    scores.sum().backward()
    # the whole layer can still be asked for
    hidden = forward.packed_hidden(model, batch)
    assert hidden.shape[1] == batch.computed
    restore_attention(model)
    assert not layer._forward_pre_hooks


def test_like_length() -> None:
    counts = [1, 1, 2, 3, 3, 100, 140, 151, 300]
    runs = last_layer._of_like_length(counts)
    assert [i for run in runs for i in range(len(counts))[run]] == list(range(len(counts)))
    assert all(counts[run][-1] <= 1.5 * counts[run][0] for run in runs)
    assert len(runs) == 5
