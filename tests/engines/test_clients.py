"""OpenRLHF's and verl's own clients against a running server that is restarted under them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from companion import RewardScorer
from companion.tutor import make_rows

pytestmark = [pytest.mark.engines, pytest.mark.serving]

HERE = Path(__file__).resolve().parent
JOBS = 4096
#: An eighth of the responses is cut off.
CUT = 8


@pytest.fixture(scope="module")
def tokenizer(reward_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(reward_model)


@pytest.fixture(scope="module")
def offline(reward_model: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(reward_model, device="cpu")


@pytest.fixture(scope="module")
def jobs(tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts of the tutor's, no two alike, with responses as a policy writes them."""
    made: dict[str, dict[str, Any]] = {}
    for row in make_rows("pairs", 4 * JOBS, seed=23):
        messages, answer = row["prompt"], row["chosen"]
        words = answer if isinstance(answer, str) else answer[-1]["content"]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        cut = len(made) % CUT == 0
        response_ids = response_ids[:-2] if cut else [*response_ids, tokenizer.eos_token_id]
        made.setdefault(
            text,
            {
                "messages": messages,
                "prompt_ids": prompt_ids,
                "response_ids": response_ids,
                "terminated": not cut,
                "text": tokenizer.decode(response_ids, skip_special_tokens=True),
            },
        )
    assert len(made) >= JOBS
    return list(made.values())[:JOBS]


def written(folder: Path) -> list[dict[str, Any]]:
    """The request log of all workers."""
    lines = []
    for file in sorted(folder.glob("*.jsonl")):
        whole = file.read_text().rpartition("\n")[0]
        lines += [json.loads(line) for line in whole.splitlines()]
    return lines


def count(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("*.jsonl"))


class Restarts(threading.Thread):
    """SIGTERM to the worker after an eighth of the scores, SIGHUP to its parent after a half."""

    def __init__(self, server: Any, folder: Path, total: int) -> None:
        super().__init__(daemon=True)
        self.server, self.folder, self.total = server, folder, total
        self.done: list[str] = []

    def run(self) -> None:
        end = time.monotonic() + 300
        while count(self.folder) < self.total // 8 and time.monotonic() < end:
            time.sleep(0.005)
        (worker,) = self.server.workers()
        os.kill(worker, signal.SIGTERM)
        self.done.append(f"SIGTERM after {count(self.folder)}")
        self.server.wait_for("ready: ", 120, times=2)
        while count(self.folder) < self.total // 2 and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(self.server.process.pid, signal.SIGHUP)
        self.done.append(f"SIGHUP after {count(self.folder)}")


def expected_ids(
    name: str, jobs: list[dict[str, Any]], offline: RewardScorer, tokenizer: Any
) -> list[list[int]]:
    """What has to be scored for each job."""
    if name == "openrlhf":
        return [job["prompt_ids"] + job["response_ids"] for job in jobs]
    if name == "verl":
        rows = [
            {
                "prompt": job["messages"],
                "completion": [{"role": "assistant", "content": job["text"]}],
                "terminated": job["terminated"],
            }
            for job in jobs
        ]
        return [list(offline.formatter.encode_row(row).input_ids) for row in rows]
    made = []
    for job in jobs:  # verl's own client of a vLLM server: a cut-off response looks finished
        content = tokenizer.decode(job["response_ids"]).replace(tokenizer.eos_token, "")
        chat = [*job["messages"], {"role": "assistant", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        text = text.removeprefix(tokenizer.bos_token or "")
        made.append(tokenizer(text)["input_ids"])
    return made


@pytest.mark.parametrize("name", ["openrlhf", "verl", "verl_classify"])
def test_no_reward_is_lost_doubled_or_anothers_while_the_server_restarts(
    name: str,
    clients_python: Path,
    serve: Callable[..., Any],
    reward_model: Path,
    offline: RewardScorer,
    tokenizer: Any,
    jobs: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    server = serve(
        *("--log_dir", log, "--overlong", "truncate_prompt", "--name", reward_model),
    )
    source, out = tmp_path / "jobs.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    restarts = Restarts(server, log, len(jobs))
    restarts.start()
    begin = time.monotonic()
    client = subprocess.run(
        [clients_python, HERE / "client_of_others.py", name, server.url, reward_model, source, out],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    spent = time.monotonic() - begin
    told = "\n".join(server.lines[-30:])
    assert client.returncode == 0, client.stderr[-4000:] + told
    restarts.join(60)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    lines = written(log)
    said = json.loads(client.stdout.splitlines()[-1])
    print(f"{name}: {len(answers)} in {spent:.0f} s; {restarts.done}; the client said {said[:3]}")
    assert [word.split()[0] for word in restarts.done] == ["SIGTERM", "SIGHUP"], told

    rewards = [answer["reward"] for answer in answers]
    assert len(rewards) == JOBS
    assert None not in rewards, f"{rewards.count(None)} rewards are missing: {said}\n{told}"
    # what was scored: each job's ids, once
    ids = expected_ids(name, jobs, offline, tokenizer)
    assert Counter(tuple(line["input_ids"]) for line in lines) == Counter(map(tuple, ids)), said
    # and each score is the offline scorer's of those ids
    want = offline.score_encoded(ids)
    logged = offline.score_encoded([line["input_ids"] for line in lines])
    np.testing.assert_allclose([line["raw"] for line in lines], logged, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rewards, want, rtol=0, atol=1e-5)
    assert len(set(np.round(want, 4))) > JOBS // 4, "scores too much alike to tell jobs apart"
    if name == "openrlhf":
        assert [answer["scores"] for answer in answers] == rewards
        assert all(answer["extra_logs"] for answer in answers)
    else:
        # (one of the batch's tensors is float32)
        np.testing.assert_allclose([a["at_end"] for a in answers], want, rtol=0, atol=1e-5)
    if name == "verl":
        ended = [bool(answer["reward_extra_info"]["terminated"]) for answer in answers]
        assert ended == [job["terminated"] for job in jobs]
        n_tokens = [answer["reward_extra_info"]["n_tokens"] for answer in answers]
        assert n_tokens == list(map(len, ids))
    versions = {line["model_version"] for line in lines}
    assert len(versions) == 1
