"""Train an epoch under DeepSpeed ZeRO on CPU processes; write the figures and the final weights.

Usage: ``torchrun --nproc_per_node 2 deepspeed_worker.py STAGE|run OUTPUT [KIND]`` (environment:
``DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true``); stage 0 is plain PyTorch. KIND is one of
``gradient_worker.KINDS``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import gradient_worker as worker
import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import pre_tokenizers

N_PAIRS, STEP_MICRO, ACCUMULATION = 9, 4, 2


def settings(stage: int, ranks: int) -> dict[str, Any]:
    if stage == 0:
        return {"use_cpu": True}
    zero: dict[str, Any] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    if stage == 2:  # both abort over gloo
        zero |= {"overlap_comm": False, "reduce_scatter": False}
    return {
        "use_cpu": False,
        "accelerator_config": {"use_configured_state": True},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": STEP_MICRO // ranks,
            "gradient_accumulation_steps": ACCUMULATION,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        },
    }


def main(stage: int, output: str, name: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if stage:
        PartialState(backend="gloo")
    kind = worker.KINDS[name]()
    make_model, rows = kind.model, kind.rows(N_PAIRS)
    start = dict(make_model().state_dict())  # before DeepSpeed partitions every new module
    rows = Dataset.from_list(rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind.trainer(
            model=make_model(),
            args=kind.config(
                folder,
                per_device_train_batch_size=STEP_MICRO // ranks,
                per_device_eval_batch_size=2,
                gradient_accumulation_steps=ACCUMULATION,
                # each part is an exchange of weights: ranks must run as many as the others
                micro_batch_tokens=25 if stage else None,
                learning_rate=0.05,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                save_strategy="no",
                eval_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                **settings(stage, ranks),
                **kind.settings,
            ),
            train_dataset=rows,
            processing_class=worker.make_tokenizer(),
        )
        trainer.train()
        held_out = trainer.evaluate(rows.select(range(5)))
        predictions = trainer.predict(rows.select(range(5))).predictions.tolist()
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if int(os.environ.get("RANK", 0)) == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save(
            {
                "weights": {name: value.cpu().float() for name, value in state.items()},
                "start": start,
                "figures": json.dumps(
                    {"losses": losses, "eval": held_out, "predictions": predictions}
                ),
            },
            output,
        )


def whole_run(output: str) -> None:
    """``train_pairwise`` under ZeRO-3, from a base on disk to a saved reward model."""
    from transformers import Qwen3ForCausalLM

    from companion import (
        DataArguments,
        ModelArguments,
        PairwiseRewardConfig,
        train_pairwise,
    )

    state = PartialState(backend="gloo")
    base_dir, data = Path(f"{output}.base"), Path(f"{output}.jsonl")
    words = [f"w{i}" for i in range(40)]
    if state.is_main_process:
        tokenizer = worker.make_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.chat_template = (
            "{% for m in messages %}w0 {{ m['content'] }} {{ eos_token }}{% endfor %}"
        )
        tokenizer.save_pretrained(base_dir)
        Qwen3ForCausalLM(worker.make_model().config).save_pretrained(base_dir)
        rows = [
            {
                "prompt": [{"role": "user", "content": words[i % 40]}],
                "chosen": [{"role": "assistant", "content": f"{words[i % 7]} {words[i % 40]}"}],
                "rejected": [{"role": "assistant", "content": words[(i + 1) % 40]}],
            }
            for i in range(40)
        ]
        data.write_text("\n".join(map(json.dumps, rows)))
    state.wait_for_everyone()
    result = train_pairwise(
        PairwiseRewardConfig(
            output,
            per_device_train_batch_size=STEP_MICRO // 2,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=0.01,
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings(3, 2),
        ),
        ModelArguments(model_name_or_path=str(base_dir)),
        DataArguments(dataset_name=str(data), eval_fraction=0.3),
    )
    if state.is_main_process:
        test = result.test
        record = {"row": test.rows[0], "scores": [test.chosen[0], test.rejected[0]]}
        Path(f"{output}.scores.json").write_text(json.dumps(record))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        whole_run(sys.argv[2])
    else:
        main(int(sys.argv[1]), sys.argv[2], *sys.argv[3:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
