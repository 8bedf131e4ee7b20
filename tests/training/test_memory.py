"""What a step holds in memory: parts of a micro-batch, when the host looks, where it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars

from companion import PairwiseRewardConfig, load_base
from companion.errors import CompanionError, ModelError
from companion.training import PairCollator, PairwiseRewardTrainer
from companion.training.batches import CutByTokens

disable_progress_bars()


def pairs(n: int = 9) -> list[dict[str, Any]]:
    """Of unlike lengths; the first is the longest by far."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return [1, *torch.randint(9, 60, (length,), generator=generator).tolist(), 2]

    return [
        {"chosen_ids": draw(40 if i == 0 else 3 + i), "rejected_ids": draw(2 + i), "row": i}
        for i in range(n)
    ]


@pytest.fixture
def make(tmp_path: Path, tiny_base: Path) -> Callable[..., Any]:
    def build(**settings: Any) -> Any:
        fixed = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        return PairwiseRewardTrainer(
            load_base(tiny_base),
            PairwiseRewardConfig(
                str(tmp_path / "out"),
                **{**fixed, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **settings},
            ),
            train_dataset=Dataset.from_list(pairs()),
        )

    return build


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("most", [1, 30, 60])
def test_parts_hold_each_row_once_within_the_limit(packing: str, most: int) -> None:
    own = PairCollator(0, packing=packing == "auto")
    rows = pairs()
    cut = CutByTokens(own, own, most, rows[-1])
    batch = cut(rows)
    found = sorted(row for part in batch["parts"] for row in part["row"].tolist())
    assert found == list(range(len(rows)))
    assert torch.equal(batch["weight"], torch.ones(len(rows)))
    for part in batch["parts"]:
        tokens = part["lengths"].sum() if packing == "auto" else part["input_ids"].numel()
        assert tokens <= most or len(part["row"]) == 1
    if most > 1:
        assert len(batch["parts"]) < len(rows)
    assert int(batch["parts"][0]["row"][0]) == 0  # the longest, so that memory ends at once
    assert cut.filler()["weight"].tolist() == [0.0]


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_run_in_parts_ends_with_the_same_weights(packing: str, make: Callable[..., Any]) -> None:
    ends = []
    for most in (None, 30):
        trainer = make(micro_batch_tokens=most, packing=packing, gradient_accumulation_steps=2)
        sizes: list[int] = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, sizes=sizes: sizes.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        loss = trainer.train().training_loss
        ends.append((loss, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
        longest = sum(len(ids) for ids in list(pairs()[0].values())[:2])
        assert (max(sizes) <= max(30, longest if packing == "auto" else 84)) is (most is not None)
    (whole_loss, whole), (loss, parts) = ends
    assert loss == pytest.approx(whole_loss, abs=1e-6)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=0)


def test_a_limit_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompanionError, match="micro_batch_tokens is 0"):
        PairwiseRewardConfig(str(tmp_path), micro_batch_tokens=0)


def test_scores_are_looked_at_when_the_backward_is_queued(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of the device between forward and backward would leave the GPU idle."""
    trainer, order = make(), []
    backward = trainer.accelerator.backward
    any_of = torch.Tensor.any

    def spied(tensor: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        if not given and tensor.dtype is torch.bool and tensor.shape == (4,):
            order.append("look")
        return any_of(tensor, *given, **options)

    monkeypatch.setattr(torch.Tensor, "any", spied)
    monkeypatch.setattr(
        trainer.accelerator, "backward", lambda loss, **o: (order.append("back"), backward(loss))
    )
    trainer.train()
    assert order == ["back", "look"] * 3


def test_the_end_of_the_memory_is_one_error_with_the_cure(make: Callable[..., Any]) -> None:
    trainer = make()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 65.00 GiB")

    trainer.model.register_forward_pre_hook(full)
    with pytest.raises(ModelError, match="step 0: the GPU's memory is at its end") as caught:
        trainer.train()
    assert "micro_batch_tokens" in str(caught.value.cure)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_after_a_step_that_failed_scores_are_looked_at_again(make: Callable[..., Any]) -> None:
    trainer = make()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = trainer.model.register_forward_pre_hook(full)
    with pytest.raises(ModelError, match="memory is at its end"):
        trainer.train()
    hook.remove()
    with torch.no_grad():
        trainer.model.score.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        trainer.predict(Dataset.from_list(pairs()))
