"""Mistakes of a stock ``Trainer`` on token classification: each shown wrong, beside what is right.

Chapter 3. The gradient that is several times too long is in tests/distributed/, where there are
ranks and accumulation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification

from companion import load_base
from companion.functional import (
    IGNORE_INDEX,
    aggregate,
    mean_of_means,
    outcome_labels,
    outcome_loss,
    process_loss,
    step_labels,
    weighted_mean_of_means,
)
from companion.training.process import StepCollator

IDS = torch.tensor([[9, 10, 11, 12, 13, 2], [9, 14, 15, 2, 0, 0]])
MASK = (IDS != 0).long()


def stock(base: Path, labels: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_pretrained(
        base, num_labels=labels, dtype=torch.float32
    )


def head_gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return model.score.weight.grad.clone()


@pytest.mark.parametrize("outcome", [0, 1])
def test_one_label_makes_loss_and_gradient_zero(tiny_base: Path, outcome: int) -> None:
    """A cross-entropy over one class is 0 for the class 0, and has no class 1."""
    model = stock(tiny_base, 1).eval()
    labels = outcome_labels(MASK, torch.tensor([2, 1]), torch.tensor([outcome, outcome]))
    if outcome == 0:
        loss = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
        assert float(loss) == 0.0
        assert not head_gradient(model, loss).any()
    else:
        with pytest.raises(IndexError):
            model(input_ids=IDS, attention_mask=MASK, labels=labels)
    logits = model(input_ids=IDS, attention_mask=MASK).logits.squeeze(-1)
    ours = outcome_loss(logits, labels).sum() / (labels != IGNORE_INDEX).sum()
    expected = F.binary_cross_entropy_with_logits(
        logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX].float()
    )
    torch.testing.assert_close(ours, expected)
    assert head_gradient(model, ours).any()


def test_a_raw_rating_of_minus_one_has_no_class(tiny_base: Path) -> None:
    model = stock(tiny_base, 3).eval()
    ratings, ends = [[1, -1], [-1]], [[3, 5], [3]]
    raw = torch.full(IDS.shape, IGNORE_INDEX)
    for row, (places, values) in enumerate(zip(ends, ratings, strict=True)):
        raw[row, places] = torch.tensor(values)
    with pytest.raises(IndexError):
        model(input_ids=IDS, attention_mask=MASK, labels=raw)
    labels = step_labels(MASK, ends, ratings)
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    assert bool(torch.isfinite(process_loss(logits, labels)).all())
    assert labels[labels != IGNORE_INDEX].tolist() == [2, 0, 0]


def test_a_batch_without_labels_is_nan(tiny_base: Path) -> None:
    model = stock(tiny_base, 3).eval()
    row = {"input_ids": [9, 10, 2], "ends": [2], "targets": [float(IGNORE_INDEX)]}
    batch = StepCollator(0)([row, row])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert bool(torch.isnan(model(**inputs).loss))
    logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
    assert not process_loss(logits, batch["labels"]).any()  # 0 each, and the weight is 0
    assert batch["weight"].tolist() == [0, 0]


def test_the_token_head_drops_a_tenth_while_it_trains(tiny_base: Path) -> None:
    model, ours = stock(tiny_base, 1).train(), load_base(tiny_base, labels=1).model.train()
    assert model.dropout.p == 0.1
    with torch.no_grad():
        drawn = [net(input_ids=IDS, attention_mask=MASK).logits for net in (model, model)]
        same = [net(input_ids=IDS, attention_mask=MASK).logits for net in (ours, ours)]
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(same[0], same[1])


def test_a_product_shrinks_with_length_and_the_last_value_does_not() -> None:
    """A text as good as another one, only longer, falls by the product alone."""
    short, long = torch.full((1, 5), 0.9), torch.full((1, 60), 0.9)
    products, others = [], []
    for values in (short, long):
        mask = torch.ones_like(values, dtype=torch.bool)
        products.append(float(aggregate(values, mask, "product")))
        others.append([float(aggregate(values, mask, how)) for how in ("mean", "min", "last")])
    assert products[1] < 0.01 < 0.5 < products[0]
    assert others[0] == pytest.approx(others[1])


def test_a_mean_of_means_is_another_mean() -> None:
    """Texts of 1 and of 9 tokens: a token of the short one would weigh nine times as much."""
    short, long = torch.zeros(1), torch.ones(9)
    means, counts = [float(short.mean()), float(long.mean())], [1, 9]
    assert mean_of_means(means) == 0.5
    assert weighted_mean_of_means(means, counts) == pytest.approx(
        float(torch.cat([short, long]).mean())
    )


def test_a_forgotten_prompt_mask_changes_every_aggregate_but_the_last() -> None:
    values = torch.tensor([[0.3, 0.2, 0.1, 0.9, 0.8, 0.95, 0.6]])
    everything = torch.ones_like(values, dtype=torch.bool)
    completion = everything.clone()
    completion[:, :3] = False
    for how in ("mean", "min", "product"):
        right, wrong = (float(aggregate(values, m, how)) for m in (completion, everything))  # type: ignore[arg-type]
        assert wrong < right
    assert float(aggregate(values, everything, "last")) == float(
        aggregate(values, completion, "last")
    )
