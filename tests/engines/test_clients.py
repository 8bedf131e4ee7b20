"""OpenRLHF's and verl's own clients against a running server that is restarted under them."""

from __future__ import annotations

import json
import os
import signal
import socket
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
#: Posts at once; as many more follow as are answered, so that a restarted server has work too.
AT_ONCE = 4096
JOBS = AT_ONCE + 1024
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
    """SIGTERM to the worker when few posts were answered, SIGHUP once another has its place.

    The first answers what it has accepted, which is nearly all; what is posted meanwhile waits in
    the kernel for the second.
    """

    def __init__(self, server: Any, folder: Path) -> None:
        super().__init__(daemon=True)
        self.server, self.folder = server, folder
        self.sent: dict[str, int] = {}

    def run(self) -> None:
        end = time.monotonic() + 300
        while count(self.folder) < AT_ONCE // 8 and time.monotonic() < end:
            time.sleep(0.005)
        (worker,) = self.server.workers()
        self._send(worker, signal.SIGTERM)
        self.server.wait_for("ready: ", 300, times=2)
        self._send(self.server.process.pid, signal.SIGHUP)

    def _send(self, pid: int, number: signal.Signals) -> None:
        os.kill(pid, number)
        self.sent[number.name] = count(self.folder)


def begin_client(python: Path, *words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, HERE / "client_of_others.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "RAY_USAGE_STATS_ENABLED": "0"},
    )


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
    restarts = Restarts(server, log)
    restarts.start()
    client = begin_client(clients_python, name, server.url, reward_model, source, out)
    stdout, stderr = client.communicate(timeout=600)
    told = "\n".join(server.lines[-30:])
    assert client.returncode == 0, stderr[-4000:] + told
    restarts.join(60)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    lines = written(log)
    said = json.loads(stdout.splitlines()[-1])
    times = [line["time"] for line in lines]
    workers = sorted(Counter(file.name for file in log.iterdir()))
    print(
        f"{name}: {len(answers)} answers in {max(times) - min(times):.0f} s by {len(workers)} "
        f"workers; answered when a signal was sent: {restarts.sent}; the client said {said[:3]}"
    )
    assert list(restarts.sent) == ["SIGTERM", "SIGHUP"], told
    assert max(restarts.sent.values()) < JOBS, "the restarts came after the last answer"
    assert len(workers) > 1
    server.wait_for("ready: ", 120, times=3)  # the first, SIGTERM's and SIGHUP's

    rewards = [answer["reward"] for answer in answers]
    assert len(rewards) == JOBS
    assert None not in rewards, f"{rewards.count(None)} rewards are missing: {said}\n{told}"
    if name == "openrlhf":  # a list of one, as the server gave it
        assert [answer["scores"] for answer in answers] == rewards
        assert all(answer["extra_logs"] for answer in answers)
        rewards = [reward for (reward,) in rewards]
    # what was scored: each job's ids, once
    ids = expected_ids(name, jobs, offline, tokenizer)
    assert Counter(tuple(line["input_ids"]) for line in lines) == Counter(map(tuple, ids)), said
    # and each score is the offline scorer's of those ids
    want = offline.score_encoded(ids)
    logged = offline.score_encoded([line["input_ids"] for line in lines])
    np.testing.assert_allclose([line["raw"] for line in lines], logged, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rewards, want, rtol=0, atol=1e-5)
    assert len(set(np.round(want, 4))) > JOBS // 4, "scores too much alike to tell jobs apart"
    if name != "openrlhf":  # what verl trains on
        np.testing.assert_allclose([a["at_end"] for a in answers], want, rtol=0, atol=1e-5)
    if name == "verl":
        ended = [bool(answer["reward_extra_info"]["terminated"]) for answer in answers]
        assert ended == [job["terminated"] for job in jobs]
        n_tokens = [answer["reward_extra_info"]["n_tokens"] for answer in answers]
        assert n_tokens == list(map(len, ids))
    versions = {line["model_version"] for line in lines}
    assert len(versions) == 1


def test_verl_waits_for_a_server_that_is_not_there_yet(
    clients_python: Path,
    serve: Callable[..., Any],
    reward_model: Path,
    offline: RewardScorer,
    tokenizer: Any,
    jobs: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Refused connections are tried again: the server is started when the client has failed."""
    source, out = tmp_path / "jobs.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(job) + "\n" for job in jobs[:64]))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    client = begin_client(clients_python, "verl", url, reward_model, source, out)
    assert client.stderr is not None
    said = []
    for line in client.stderr:  # (it logs its first failure)
        said.append(line)
        if "tried again" in line:
            break
    assert client.poll() is None, "".join(said[-20:])
    serve("--port", port)
    _, stderr = client.communicate(timeout=300)
    assert client.returncode == 0, stderr[-4000:]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    want = offline.score_encoded(expected_ids("verl", jobs[:64], offline, tokenizer))
    np.testing.assert_allclose([a["reward"] for a in answers], want, rtol=0, atol=1e-5)
    assert answers[0]["counts"]["retries"] >= 64
    assert answers[0]["counts"]["rewards"] == 64
