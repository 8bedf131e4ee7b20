"""Run in build/env-clients: OpenRLHF's and verl's own client code, for all jobs of a file at once.

    python client_of_others.py openrlhf|verl|verl_classify URL MODEL JOBS OUT

A line of JOBS has ``messages``, ``prompt_ids`` and ``response_ids``; a line of OUT is what the
client made of that job. Nothing of the companion is used but, for ``verl``, its reward manager.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
#: posts at once
AT_ONCE = 4096
#: what the clients said while they worked: their only trace of tries that failed
SAID: Counter[str] = Counter()


class Listener(logging.Handler):
    """Counts what a client logs, and shows it once."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()[:300]
        SAID[message] += 1
        if SAID[message] == 1:
            print(message, file=sys.stderr, flush=True)


def openrlhf(url: str, model: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Its executor of single turns, with an engine that answers what the job says."""
    from openrlhf.utils import agent
    from transformers import AutoTokenizer

    agent.logger.addHandler(Listener())
    tokenizer = AutoTokenizer.from_pretrained(model)
    executor = agent.SingleTurnAgentExecutor(f"{url}/get_reward")

    class Engine:
        def __init__(self, job: dict[str, Any]) -> None:
            self.job = job

        async def generate(self, ids: list[int], params: Any, **more: Any) -> Any:
            if ids != self.job["prompt_ids"]:
                raise SystemExit(f"the client made other ids of the prompt: {ids}")
            made = SimpleNamespace(token_ids=self.job["response_ids"], finish_reason="stop")
            return SimpleNamespace(outputs=[made])

    async def one(job: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer.apply_chat_template(
            job["messages"], tokenize=False, add_generation_prompt=True
        )
        params = SimpleNamespace(max_tokens=256, logprobs=None)
        got = await executor.execute(prompt, "label", params, 2048, tokenizer, Engine(job))
        return {name: got[name] for name in ("reward", "scores", "extra_logs")}

    async def every() -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def next_one(job: dict[str, Any]) -> dict[str, Any]:
            async with gate:
                return await one(job)

        return await asyncio.gather(*map(next_one, jobs))

    return asyncio.run(every())


def verl(url: str, model: str, jobs: list[dict[str, Any]], *overrides: str) -> list[dict[str, Any]]:
    """Its reward worker, set up by the flags that a user gives, on one batch of all jobs."""
    import numpy as np
    import torch
    import verl as package
    from hydra import compose, initialize_config_dir
    from tensordict import TensorDict
    from verl.experimental.reward_loop import reward_loop
    from verl.protocol import DataProto

    reward_loop.logger.addHandler(Listener())
    logging.getLogger("companion").addHandler(Listener())
    folder = os.path.join(os.path.dirname(package.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        config = compose("ppo_trainer", [f"actor_rollout_ref.model.path={model}", *overrides])
    worker = reward_loop.RewardLoopWorker(config, url.removeprefix("http://"))

    async def scored(worker: Any, data: Any) -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(i: int) -> dict[str, Any]:
            async with gate:
                return await worker.compute_score(data[i : i + 1])

        return await asyncio.gather(*map(one, range(len(jobs))))

    def padded(name: str, left: bool) -> tuple[Any, Any]:
        rows = [job[name] for job in jobs]
        width = max(map(len, rows))
        pads = [[0] * (width - len(row)) for row in rows]
        ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
        ones = [[1] * len(row) for row in rows]
        mask = [pad + one if left else one + pad for one, pad in zip(ones, pads, strict=True)]
        return torch.tensor(ids), torch.tensor(mask)

    prompts, before = padded("prompt_ids", True)
    responses, behind = padded("response_ids", False)
    raw_prompts = np.empty(len(jobs), dtype=object)
    raw_prompts[:] = [job["messages"] for job in jobs]
    batch = TensorDict(
        {
            "prompts": prompts,
            "responses": responses,
            "attention_mask": torch.cat([before, behind], dim=1),
        },
        batch_size=len(jobs),
    )
    data = DataProto(batch=batch, non_tensor_batch={"raw_prompt": raw_prompts})
    found = worker.loop.run_until_complete(scored(worker, data))
    cls = reward_loop.resolve_reward_manager_cls(config)
    tensor = cls.assemble_rm_scores(data, [item["reward_score"] for item in found])
    last = torch.tensor([len(job["response_ids"]) - 1 for job in jobs])
    at_end = tensor[torch.arange(len(jobs)), last].tolist()
    counts = dict(getattr(worker.reward_manager, "counts", {}))
    return [
        {"reward": item["reward_score"], "at_end": end, "counts": counts, **item}
        for item, end in zip(found, at_end, strict=True)
    ]


if __name__ == "__main__":
    name, url, model, source, out = sys.argv[1:]
    jobs = [json.loads(line) for line in Path(source).read_text().splitlines()]
    if name == "openrlhf":
        answers = openrlhf(url, model, jobs)
    elif name == "verl":
        manager = "reward.reward_manager"
        answers = verl(
            url, model, jobs,
            f"{manager}.source=importlib", f"{manager}.module.path=pkg://companion.rl",
            f"{manager}.name=RewardManager", f"+reward.reward_kwargs.url={url}",
            f"+reward.reward_kwargs.connections={AT_ONCE}",
        )  # fmt: skip
    else:
        answers = verl(
            url, model, jobs,
            "reward.reward_model.enable=true", f"reward.reward_model.model_path={model}",
            "reward.reward_model.rollout.name=vllm",
        )  # fmt: skip
    with open(out, "w") as file:
        file.writelines(json.dumps(answer, default=float) + "\n" for answer in answers)
    print(json.dumps(SAID.most_common(20)))
