"""Two ranks: packed scores and gradients of a model that FSDP has sharded, against the whole one.

The hook of the last layer calls parts of the layer from within, where the weights are whole.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # a collection would walk what is imported again and again

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from benchmarks.shapes import make_model, pairs
from companion.engine import pack, plan_trees
from companion.training.forward import install_forward


def main(output: Path) -> None:
    """Write the largest errors, without and with activation checkpointing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = make_model("tiny", torch.device("cpu")).train()
    whole = copy.deepcopy(model)
    rows = pairs(4)
    ids = [row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    batch = pack(ids, plan_trees(ids))
    install_forward(model)
    install_forward(whole)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        scores = []
        for each in (model, whole):
            each.zero_grad()
            scores.append(each(input_ids=batch.input_ids, packed=batch).logits)
            scores[-1].square().sum().backward()
        gradients = [
            (sharded.grad.full_tensor(), plain.grad)
            for sharded, plain in zip(model.parameters(), whole.parameters(), strict=True)
            if plain.grad is not None
        ]
        found.append(
            {
                "sharded": type(model.model.layers[-1].mlp.down_proj.weight).__name__,
                "gradients": len(gradients),
                "score": float((scores[0] - scores[1]).detach().abs().max()),
                "gradient": max(float((a - b).abs().max() / b.abs().max()) for a, b in gradients),
            }
        )
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    gc.enable()
    main(Path(sys.argv[1]))
