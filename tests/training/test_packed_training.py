"""Packed steps: the gradient of padded ones, each prompt once, and a word where they cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from companion import PairwiseRewardConfig, load_base
from companion.engine import reward_scores
from companion.engine.attention import PACKED
from companion.errors import CompanionError, ModelError, ReadoutError
from companion.training import PairCollator, PairwiseRewardTrainer
from companion.training.batches import PADDING, PaddedRows
from companion.training.trainer import OWN

disable_progress_bars()


def shared_rows(n: int = 7, *, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with a prompt of their own; the last has the first one's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(9, 60, (length,), generator=generator).tolist()

    prompts = [[1, *draw(10, 20)] for _ in range(n - 1)]
    return [
        {f"{side}_ids": [*prompt, *draw(2, 12), 2] for side in ("chosen", "rejected")}
        for prompt in [*prompts, prompts[0]]
    ]


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path) -> Callable[..., Any]:
    def go(rows: Any = None, **settings: Any) -> Any:
        recorder = Recorder()
        rows = Dataset.from_list(rows or shared_rows())
        plain = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = PairwiseRewardTrainer(
            load_base(tiny_base),
            PairwiseRewardConfig(
                str(tmp_path / "out"),
                max_grad_norm=0.0,
                logging_steps=1,
                **{**plain, **training, "learning_rate": 1e-3, **settings},
            ),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[recorder],
        )
        trainer.train()
        return trainer, recorder.steps

    return go


def test_grouped_by_length_a_step_has_the_gradient_of_the_mean_over_its_pairs(
    run: Callable[..., Any],
) -> None:
    """Against texts one by one, at weights that do not move; each pair in one step of the epoch."""
    rows = [{**row, "row": i} for i, row in enumerate(shared_rows(9))]
    taken: list[int] = []
    plain = PairwiseRewardTrainer.item_table

    def seen(self: Any, model: Any, inputs: Any) -> Any:
        taken.extend(inputs["row"][inputs["weight"] > 0].tolist() if model.training else [])
        return plain(self, model, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairwiseRewardTrainer, "item_table", seen)
        trainer, steps = run(
            rows=rows,
            train_sampling_strategy="group_by_length",
            learning_rate=0.0,
            center_rewards_coefficient=None,
        )
    assert sorted(taken) == list(range(9))
    assert taken != sorted(taken)
    model = trainer.model
    for found, part in zip(steps, (taken[:4], taken[4:8], taken[8:]), strict=True):
        model.zero_grad()
        losses = []
        for i in part:
            chosen, rejected = (
                reward_scores(model, torch.tensor([rows[i][f"{side}_ids"]]))[0]
                for side in ("chosen", "rejected")
            )
            losses.append(-torch.nn.functional.logsigmoid(chosen - rejected))
        torch.stack(losses).mean().backward()
        for name, parameter in model.named_parameters():
            if name in found:
                torch.testing.assert_close(found[name], parameter.grad, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("holds", [5, 1])
def test_evaluation_takes_smaller_batches_where_the_memory_ends(
    holds: int, run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = run(eval_strategy="no", per_device_eval_batch_size=8)
    rows = trainer.eval_dataset
    want, scores = trainer.evaluate(), trainer.predict(rows).predictions
    plain, sizes = trainer.item_table, []

    def limited(model: Any, inputs: Any) -> Any:
        sizes.append(len(inputs["weight"]))
        if sizes[-1] > holds:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(model, inputs)

    trainer.item_table = limited
    with caplog.at_level(logging.WARNING, "companion.training.evaluation_loop"):
        found = trainer.evaluate()
    last = {5: 4, 1: 1}[holds]
    assert f"going on with {last} rows a batch" in caplog.text
    assert sizes[: sizes.index(last)] == [8, 4, 2][: {5: 1, 1: 3}[holds]]
    for name in ("eval_loss", "eval_accuracy", "eval_num_pairs", "eval_mean_reward"):
        assert found[name] == pytest.approx(want[name], abs=1e-5)
    begun = len(sizes)
    torch.testing.assert_close(  # in the order of the rows, and small from the beginning
        torch.tensor(trainer.predict(rows).predictions), torch.tensor(scores), atol=1e-5, rtol=0
    )
    assert set(sizes[begun:]) == {last}


def test_a_row_that_the_memory_does_not_hold_ends_the_evaluation(run: Callable[..., Any]) -> None:
    trainer, _ = run(eval_strategy="no")

    def never(model: Any, inputs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    trainer.item_table = never
    with pytest.raises(ModelError, match="a single row does not fit"):
        trainer.evaluate()


def test_all_ranks_begin_anew_if_the_memory_of_one_ends(run: Callable[..., Any]) -> None:
    trainer, _ = run(eval_strategy="no")
    assert [trainer._on_any_rank(said) for said in (True, False)] == [True, False]
    for others in (True, False):
        two = SimpleNamespace(
            num_processes=2, gather=lambda flag, o=others: torch.cat([flag, torch.tensor([o])])
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "accelerator", two)
            assert trainer._on_any_rank(False) is others
            assert trainer._on_any_rank(True) is True


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_saving_does_not_change_the_gradient(
    checkpointing: bool, run: Callable[..., Any]
) -> None:
    packed, found = run(activation_checkpointing=checkpointing)
    _, want = run(packing="off")
    for a, b in zip(found, want, strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
    packed.reward_model()
    assert packed.model.config._attn_implementation == "sdpa"


def test_the_head_stays_in_float32_under_autocast(run: Callable[..., Any]) -> None:
    trainer, steps = run(bf16=True)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    seen = []
    trainer.model.score.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        table = trainer.item_table(trainer.model, batch)
    assert seen == [torch.float32]
    assert table.dtype == torch.float32
    assert not torch.equal(table[:, OWN], table[:, OWN].bfloat16().float())
    _, want = run(bf16=False)
    cosine = torch.nn.functional.cosine_similarity(
        torch.cat([g.flatten() for g in steps[0].values()]),
        torch.cat([g.flatten() for g in want[0].values()]),
        dim=0,
    )
    assert cosine > 0.99


def test_a_batch_holds_each_prompt_once() -> None:
    rows = PaddedRows(shared_rows(), {"chosen_ids": [9], "rejected_ids": [9]})
    pairs = [rows[0], rows[6], rows[PADDING], rows[3]]
    batch = PairCollator(0, packing=True)(pairs)
    sides = [p[f"{side}_ids"] for side in ("chosen", "rejected") for p in pairs]
    assert batch["lengths"].tolist() == [len(ids) for ids in sides]
    packed = batch["packed"]
    assert packed.rows == tuple(range(8))
    assert batch["input_ids"] is packed.input_ids
    assert packed.input_ids[0, packed.readout].tolist() == [ids[-1] for ids in sides]
    # a prompt has at least 11 tokens: one for four texts, one for two
    assert packed.computed <= packed.needed - 3 * 11 - 11
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0, 1.0]


def test_guards_look_at_packed_batches_too(make_config: Any, tiny_tokenizer: Any) -> None:
    collator = PairCollator(
        tiny_tokenizer.pad_token_id, config=make_config("qwen3", tiny_tokenizer), packing=True
    )
    with pytest.raises(ReadoutError, match="last real token is the pad id"):
        collator([{"chosen_ids": [9, tiny_tokenizer.pad_token_id], "rejected_ids": [9, 2]}])


def test_what_cannot_be_packed_is_padded_with_a_word(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base(tiny_base)
    base.model.config.attention_dropout = 0.1
    with caplog.at_level(logging.WARNING, "companion.training.trainer"):
        trainer = PairwiseRewardTrainer(
            base,
            PairwiseRewardConfig(str(tmp_path), report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list(shared_rows()),
        )
    assert not trainer.data_collator.packing
    assert any("padded, not packed: dropout is active" in r.getMessage() for r in caplog.records)
    with pytest.raises(CompanionError, match="packing is 'on'"):
        PairwiseRewardConfig(str(tmp_path), packing="on")


def test_lora_trains_packed(tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("peft")
    from companion import apply_lora

    base = apply_lora(load_base(tiny_base), r=2)
    trainer = PairwiseRewardTrainer(
        base,
        PairwiseRewardConfig(
            str(tmp_path), report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
        ),
        train_dataset=Dataset.from_list(shared_rows()),
    )
    assert trainer.data_collator.packing
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.model.config._attn_implementation != PACKED
