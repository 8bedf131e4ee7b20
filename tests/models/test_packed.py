"""Packed rows: nothing is computed twice, no padding, and every score as if the text were alone."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from companion.errors import DataError, ModelError
from companion.models import load_reward_model, reward_scores
from companion.models.packed import (
    PROVED,
    _loop,
    packed_attention,
    packed_scores,
    packing_obstacle,
    varlen_indices,
)
from companion.models.trees import Tree, lay_out, shared_prefix_trees, tree_batches
from companion.scoring import RewardScorer


def _texts(seed=0, groups=4):
    """Rows of a few prompts with one to four continuations each, shuffled."""
    rng = random.Random(seed)
    rows = []
    for _ in range(groups):
        prompt = [rng.randrange(9, 40) for _ in range(rng.randint(8, 20))]
        for _ in range(rng.randint(1, 4)):
            rows.append(prompt + [rng.randrange(9, 40) for _ in range(rng.randint(1, 15))])
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def model_of(make_config, make_tokenizer):
    """A random model of an architecture; Mistral's window is shorter than the texts."""

    def make(kind, **overrides):
        if kind == "mistral":
            overrides = {"sliding_window": 7, **overrides}
        torch.manual_seed(0)
        config = make_config(kind, make_tokenizer(), num_labels=1, **overrides)
        return AutoModelForSequenceClassification.from_config(config).eval()

    return make


def _alone(model, rows):
    return torch.cat([reward_scores(model, torch.tensor([row])) for row in rows])


def _gradient(model, scores):
    model.zero_grad()
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Trees


_ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=12)


@given(_ROWS, st.integers(1, 6))
def test_every_row_stands_in_one_tree_and_keeps_a_token_of_its_own(rows, min_prefix):
    trees = shared_prefix_trees(rows, min_prefix=min_prefix)
    assert sorted(row for tree in trees for row in tree.rows) == list(range(len(rows)))
    for tree in trees:
        assert len({tuple(rows[row][: tree.prefix]) for row in tree.rows}) == 1
        assert all(len(rows[row]) > tree.prefix for row in tree.rows)
        assert tree.prefix == 0 if len(tree.rows) == 1 else tree.prefix >= min_prefix


@given(_ROWS, st.integers(1, 40), st.none() | st.integers(1, 5))
def test_batches_keep_to_the_budget_and_lose_no_row(rows, budget, most):
    lengths = [len(row) for row in rows]
    batches = tree_batches(shared_prefix_trees(rows, min_prefix=2), lengths, budget, most)
    assert sorted(r for b in batches for tree in b for r in tree.rows) == list(range(len(rows)))
    for batch in batches:
        n_rows = sum(len(tree.rows) for tree in batch)
        assert n_rows <= (most or len(rows))
        assert sum(tree.tokens(lengths) for tree in batch) <= budget or n_rows == 1


@given(_ROWS)
def test_a_layout_can_be_read_back(rows):
    trees = shared_prefix_trees(rows, min_prefix=2)
    layout = lay_out(rows, trees) if trees else None
    if layout is None:
        return
    ids, positions = layout.input_ids[0].tolist(), layout.position_ids[0].tolist()
    place, found = 0, []
    for prefix, branches in layout.segments:
        head = ids[place : place + prefix]
        assert positions[place : place + prefix] == list(range(prefix))
        place += prefix
        for branch in branches:
            found.append(head + ids[place : place + branch])
            assert positions[place : place + branch] == list(range(prefix, prefix + branch))
            place += branch
    assert found == [rows[row] for tree in trees for row in tree.rows]
    assert [ids[last] for last in layout.last] == [row[-1] for row in found]
    assert layout.needed == sum(map(len, rows)) >= layout.computed == len(ids)


def test_a_prompt_of_many_completions_is_computed_once():
    prompt = list(range(50))
    rows = [[*prompt, 100 + i, 7] for i in range(16)]
    (tree,) = shared_prefix_trees(rows)
    assert tree.prefix == 50
    assert lay_out(rows, [tree]).computed == 50 + 16 * 2


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="sequence 1 is empty"):
        shared_prefix_trees([[1], []])
    with pytest.raises(DataError, match="max_tokens=0"):
        tree_batches([Tree((0,), 0)], [3], 0)
    with pytest.raises(DataError, match="row 1 does not begin"):
        lay_out([[1, 2, 3], [1, 9, 3]], [Tree((0, 1), 2)])


# Scores and gradients


@pytest.mark.parametrize("kind", PROVED)
def test_packed_scores_and_gradients_are_those_of_single_texts(kind, model_of):
    model = model_of(kind)
    rows = _texts()
    assert packing_obstacle(model) is None
    assert any(tree.prefix for tree in shared_prefix_trees(rows))
    packed, single = packed_scores(model, rows), _alone(model, rows)
    assert (packed - single).abs().max() < 1e-5 < single.std()
    there, here = _gradient(model, packed), _gradient(model, _alone(model, rows))
    assert (there - here).norm() < 1e-5 * here.norm()


def test_a_branch_sees_its_prefix_and_not_its_siblings(model_of):
    model = model_of("qwen3")
    prompt = list(range(9, 21))
    rows = [[*prompt, 30, 31, 32], [*prompt, 33, 34], [*prompt, 35]]
    trees = [Tree((0, 1, 2), 12)]
    before = packed_scores(model, rows, trees)
    for changed in range(3):
        others = [[*row[:-1], 39] if i == changed else row for i, row in enumerate(rows)]
        moved = (packed_scores(model, others, trees) - before).abs() > 1e-6
        assert moved.tolist() == [i == changed for i in range(3)]
    other_prompt = [[39, *row[1:]] for row in rows]
    assert ((packed_scores(model, other_prompt, trees) - before).abs() > 1e-4).all()


@pytest.mark.parametrize("wrong", ["positions run on", "siblings are seen", "plain causal"])
def test_wrong_implementations_are_seen(wrong, model_of):
    """What a hand-made packing gets wrong moves the scores by far more than rounding."""
    model = model_of("llama")
    rows = _texts()
    layout = lay_out(rows, shared_prefix_trees(rows))
    positions, segments = layout.position_ids, layout.segments
    if wrong == "positions run on":
        positions = torch.arange(layout.computed)[None]
    elif wrong == "siblings are seen":
        segments = tuple((0, (prefix + sum(branches),)) for prefix, branches in segments)
    else:
        segments = ((0, (layout.computed,)),)
    model.config._attn_implementation = "companion_packed"
    hidden = model.model(
        input_ids=layout.input_ids, position_ids=positions, use_cache=False, segments=segments,
        attention_mask=torch.zeros(1, 1, 1, 1),
    ).last_hidden_state[0, layout.last]  # fmt: skip
    order = [row for tree in shared_prefix_trees(rows) for row in tree.rows]
    model.config._attn_implementation = "sdpa"
    right = _alone(model, [rows[i] for i in order])
    assert (model.score(hidden)[:, 0] - right).abs().max() > 1e-2


def test_another_attention_function_gives_no_number(model_of, monkeypatch):
    """If something sets the attention back while the packed row runs, the scores are NaN."""
    from contextlib import nullcontext

    from companion.models import packed

    model = model_of("llama")
    monkeypatch.setattr(packed, "_attention", lambda _: nullcontext())
    assert packed_scores(model, _texts()).isnan().all()


def test_the_attention_function_is_put_back(model_of):
    model = model_of("qwen3")
    before = model.config._attn_implementation
    packed_scores(model, _texts())
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        packed_scores(model, [[10_000, 3]])
    assert model.config._attn_implementation == before


def test_it_refuses_to_run_without_its_segments():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ModelError, match="without the segments"):
        packed_attention(torch.nn.Identity(), q, q, q, None)
    with pytest.raises(ModelError, match="knows no dropout"):
        packed_attention(torch.nn.Identity(), q, q, q, None, segments=[(0, [4])], dropout=0.1)
    with pytest.raises(ModelError, match="knows no softcap"):
        packed_attention(torch.nn.Identity(), q, q, q, None, segments=[(0, [4])], softcap=30.0)


# The index of the kernel for GPUs, emulated


@pytest.mark.parametrize("window", [None, 3])
def test_the_variable_length_index_gives_the_same_attention(window):
    """varlen_attn itself needs a GPU; what it is given is tried with a loop in its place."""
    generator = torch.Generator().manual_seed(0)
    segments = ((4, (3, 1, 5)), (0, (6,)), (2, (2, 2)))
    total = sum(prefix + sum(branches) for prefix, branches in segments)
    q, k, v = (torch.randn(1, 2, total, 8, generator=generator) for _ in range(3))
    queries, keys, index = varlen_indices(segments)
    parts = []
    for i in range(len(queries) - 1):
        n_q, places = queries[i + 1] - queries[i], index[keys[i] : keys[i + 1]]
        distance = torch.arange(len(places) - n_q, len(places))[:, None] - torch.arange(len(places))
        mask = (distance >= 0) & (distance < (window or total))
        rows = slice(queries[i], queries[i + 1])
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, places], v[:, :, places], attn_mask=mask
            )
        )
    emulated = torch.cat(parts, dim=2).transpose(1, 2)
    torch.testing.assert_close(_loop(q, k, v, segments, None, window), emulated)


# Which models are packed


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"attn_logit_softcapping": 30.0}, "soft-capped"),
        ({"use_bidirectional_attention": True}, "behind them"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "mamba"}, "not proved"),
    ],
)
def test_what_is_not_exact_is_recognised(overrides, word, model_of):
    model = model_of("qwen3")
    for name, value in overrides.items():
        setattr(model.config, name, value) if name != "model_type" else setattr(
            type(model.config), name, value
        )
    try:
        assert word in packing_obstacle(model)
    finally:
        type(model.config).model_type = "qwen3"


def test_dropout_and_checkpointing_stand_in_the_way_of_training_alone(model_of):
    model = model_of("qwen3", attention_dropout=0.1)
    assert packing_obstacle(model) is None
    assert "dropout" in packing_obstacle(model.train())
    model = model_of("qwen3").train()
    assert packing_obstacle(model) is None
    model.gradient_checkpointing_enable()
    assert "checkpointing" in packing_obstacle(model)


# The scorer


@pytest.mark.parametrize("kind", PROVED)
def test_the_scorer_gives_one_score_to_a_text(kind, tiny_rewards):
    reward_model = load_reward_model(tiny_rewards(kind))
    rows = _texts(seed=3)
    packed = RewardScorer(reward_model, max_tokens_per_batch=64)
    padded = RewardScorer(reward_model, packing="off")
    assert packed.packing_obstacle is None
    assert padded.packing_obstacle == "packing='off'"
    alone = [packed.score_encoded([row])[0] for row in rows]
    for scores in (packed.score_encoded(rows), padded.score_encoded(rows)):
        assert abs(scores - alone).max() < 1e-5


def test_an_unknown_way_of_packing_is_refused(tiny_reward):
    with pytest.raises(DataError, match="packing is 'on'"):
        RewardScorer(load_reward_model(tiny_reward), packing="on")
