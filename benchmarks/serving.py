"""The server beside the offline scorer, and beside a route that computes nothing.

``python -m benchmarks.serving``. The client has one core and the server the other, so that neither
waits for the other's. Texts, tokenising included, 64 a request. What is timed:

- a number of requests, several in flight, against ``scorer.score`` of the same rows in the server's
  own process; with ``--exact`` too; and vLLM, if ``--vllm`` names the Python of an environment that
  has it (``make test-engines`` builds ``build/env-vllm``), by its route ``/classify``, which gets
  the token ids;
- one text a request, one request at a time: its median, minus the bare forward of that text (in the
  server's process), over the median of an echo, which reads the same body and answers in the same
  form, but asks no model. Also over a `rested` echo, before which the client sleeps as long as the
  forward takes: a processor that has waited is slower for a while (here by half a millisecond), and
  that is no part of the server. And beside it the same figure of the `simplest` route that there is
  with a model: words to ids in the event loop, the forward in a thread, an answer; no queue, no
  batches, no deadline, no reference, no log.

The former also in the processor's seconds of the server's process: on a machine that has other
work, those are what can be compared. The latter also with token ids in place of words, where no
tokenizer has a part in it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.from_text import as_texts, make_tokenizer
from benchmarks.measuring import Outcome, Timed, ratio, table, take_turns
from benchmarks.results import add_arguments, save
from benchmarks.shapes import EOS, VOCABULARY, TokenIds, draw, log_normal, make_model

#: texts of a request; requests of a round; how many of them are in flight
TEXTS, REQUESTS, FLYING = 64, 2, 2
Rows = list[dict[str, Any]]


def make_ids(n: int, seed: int) -> TokenIds:
    """Texts of a chat's length, nothing in common."""
    rng = random.Random(seed)
    return [[*draw(rng, log_normal(rng, 24, 0.6, 6, 120)), EOS] for _ in range(n)]


def make_rows(ids: TokenIds) -> Rows:
    """The same as prompts and completions."""
    return [{"prompt": prompt, "completion": words} for prompt, words in as_texts(ids)]


# ---------------------------------------------------------------------- the server's process


def _serve(pipe: Any, folder: str, exact: bool, cores: Sequence[int]) -> None:
    _stay_on(cores)
    torch.set_num_threads(1)
    from fastapi import APIRouter, Request

    from companion.scoring import load_scorer
    from companion.serving import address_of, listen, make_app, open_service, serve
    from companion.serving.protocols.native import Rewards, error_body, head
    from companion.serving.protocols.routes import post

    scorer: Any = load_scorer(folder, device="cpu")
    offline = type(scorer)(scorer.reward_model)  # with the same weights, in the same caches
    service = open_service(scorer, exact=exact, allow_unchecked=True)
    app = make_app(service)
    router = APIRouter()

    async def echo(request: Request, body: Rewards) -> dict[str, Any]:
        """What a request costs without a model."""
        text = {"raw": 0.5, "n_tokens": 40, "cut_tokens": 0, "warnings": [], "reason": None}
        items = [{"index": i, **text} for i in range(len(body.items))]
        answer = {**head(request), "rewards": items, "usage": {"tokens": 0}}
        return {**answer, "processor": time.process_time()}

    async def bare(request: Request, body: Rewards) -> dict[str, Any]:
        """Seconds of the forward."""
        texts = offline.prepare([item.row(i) for i, item in enumerate(body.items)]).texts

        def run() -> float:
            began = time.perf_counter()
            offline.values(texts)
            return time.perf_counter() - began

        return {"seconds": await asyncio.to_thread(run)}

    async def alone(request: Request, body: Rewards) -> dict[str, Any]:
        """Seconds of the offline scorer, from words to scores."""
        rows = [item.row(i) for i, item in enumerate(body.items)]

        def run() -> tuple[float, float, float]:
            began = time.perf_counter(), time.thread_time()
            mean = float(offline.score(rows).raw.mean())
            return time.perf_counter() - began[0], time.thread_time() - began[1], mean

        seconds, processor, mean = await asyncio.to_thread(run)
        return {"seconds": seconds, "processor": processor, "mean": mean}

    for path, route in (("/echo", echo), ("/bare", bare), ("/offline", alone)):
        post(
            router,
            path,
            Rewards,
            route,
            protocol="native",
            error_body=error_body,
            examples=[],
            answers={},
        )
    app.include_router(router)
    sock = listen("127.0.0.1", 0)
    pipe.send(address_of(sock))
    serve(app, sock)


@contextlib.contextmanager
def vllm_server(python: str, folder: str, cores: Sequence[int]) -> Iterator[str]:
    """vLLM with the same model, on these cores; gives ``host:port``."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
        *("--runner", "pooling", "--dtype", "float32", "--max-model-len", "2048"),
        *("--enforce-eager", "--host", "127.0.0.1", "--port", str(port)),
    ]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _stay_on(cores),
            start_new_session=True,
        )
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"vLLM ended: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.5)
            yield f"127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _stay_on(cores: Sequence[int]) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def server(folder: str, *, exact: bool, cores: Sequence[int]) -> Iterator[str]:
    """A server in a process of its own, on these cores; gives ``host:port``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, folder, exact, cores), daemon=True)
    process.start()
    theirs.close()
    try:
        url = ours.recv()
        yield url.removeprefix("http://")
    finally:
        process.terminate()
        process.join(30)


# ---------------------------------------------------------------------- the client


class Client:
    """One connection; as little as a client can do, so that the server is what is timed."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=600)

    def post(self, path: str, body: bytes) -> Any:
        """The answer."""
        self.connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}: {text[:500]!r}")
        return json.loads(text)

    def processor(self) -> float:
        """Seconds that the server's process has computed so far."""
        body = as_body([{"prompt": "w2", "completion": "w3"}])
        return self.post("/echo", body)["processor"]  # type: ignore[no-any-return]


def as_body(rows: Rows) -> bytes:
    """A request."""
    return json.dumps({"items": rows}).encode()


def throughput(
    normal: str, exact: str, vllm: str | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rows in requests of 64, several in flight; and the offline scorer."""
    requests = 1 if args.quick else REQUESTS
    ids = make_ids(requests * TEXTS, 0)
    rows = make_rows(ids)
    bodies = [as_body(rows[i : i + TEXTS]) for i in range(0, len(rows), TEXTS)]

    processor: dict[str, list[float]] = {}

    def asked(address: str, path: str, bodies: list[bytes], read: Any) -> float:
        """Mean of all scores."""

        def ask(own: list[bytes]) -> float:
            client = Client(address)
            return sum(sum(read(client.post(path, body))) for body in own)

        with ThreadPoolExecutor(FLYING) as threads:
            return sum(threads.map(ask, [bodies[i::FLYING] for i in range(FLYING)])) / len(rows)

    def served(name: str, address: str) -> Any:
        def run() -> Outcome:
            before = Client(address).processor()
            raw = lambda answer: [item["raw"] for item in answer["rewards"]]  # noqa: E731
            mean = asked(address, "/v1/rewards", bodies, raw)
            processor.setdefault(name, []).append(Client(address).processor() - before)
            return Outcome(0, mean)

        return lambda: run

    def by_vllm() -> Outcome:
        """(Its route takes an empty ``model``.)"""
        own = [
            json.dumps({"input": ids[i : i + TEXTS], "use_activation": False}).encode()
            for i in range(0, len(ids), TEXTS)
        ]
        probs = lambda answer: [item["probs"][0] for item in answer["data"]]  # noqa: E731
        return Outcome(0, asked(str(vllm), "/classify", own, probs))

    seconds: list[float] = []

    def offline() -> Outcome:
        found = Client(normal).post("/offline", as_body(rows))
        seconds.append(found["seconds"])
        processor.setdefault("offline scorer", []).append(found["processor"])
        return Outcome(0, found["mean"])

    methods = {
        "offline scorer": lambda: offline,
        "server": served("server", normal),
        "server --exact": served("server --exact", exact),
    }
    if vllm is not None:
        methods["vLLM"] = lambda: by_vllm
    timed = take_turns(methods, args.rounds, torch.device("cpu"))
    timed["offline scorer"].seconds = seconds[1:]  # as the server's process measured it
    means = {name: each.outcome.check for name, each in timed.items()}
    if max(means.values()) - min(means.values()) > 1e-5:
        raise SystemExit(f"the mean scores differ: {means}")
    computed = {name: Timed(own[1:]) for name, own in processor.items()}
    found = []
    for name, each in timed.items():
        of_offline = ratio(timed["offline scorer"], each)
        found.append(
            {
                "method": name,
                "texts a second": len(rows) / each.median,
                "of offline": of_offline.pop("median"),
                **of_offline,
                "by processor": ratio(computed["offline scorer"], computed[name])["median"]
                if name in computed
                else None,
            }
        )
    return found


#: what is asked in turn, and where
_WAYS = {"request": "/v1/rewards", "bare": "/bare", "echo": "/echo", "rested": "/echo"}


def latency(address: str, args: argparse.Namespace, rows: Rows) -> dict[str, Any]:
    """One text a request: request, bare forward and echoes in turn; medians of each round."""
    client = Client(address)
    bodies = [as_body([row]) for row in rows]
    found = []
    for turn in range(args.rounds + 1):
        times: dict[str, list[float]] = {way: [] for way in (*_WAYS, "simplest")}
        for i, body in enumerate(bodies):
            for way in list(_WAYS)[:: 1 if i % 2 else -1]:
                forward = client.post("/bare", body)  # leaves the caches as any model leaves them
                if way == "rested":
                    time.sleep(forward["seconds"])
                began = time.perf_counter()
                answer = client.post(_WAYS[way], body)
                took = time.perf_counter() - began
                times[way].append(answer["seconds"] if way == "bare" else took)
                if way == "bare":
                    times["simplest"].append(took - answer["seconds"])
        medians = {name: 1000 * statistics.median(own) for name, own in times.items()}
        # of the same text: the forward's time depends on its length
        over = [a - b for a, b in zip(times["request"], times["bare"], strict=True)]
        medians["overhead"] = 1000 * statistics.median(over)
        medians["ratio"] = medians["overhead"] / medians["echo"]
        medians["of rested"] = medians["overhead"] / medians["rested"]
        medians["of simplest"] = medians["overhead"] / medians["simplest"]
        if turn:  # the first one warms up
            found.append(medians)
    ratios = [one["ratio"] for one in found]
    median = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {**median, "least": min(ratios), "most": max(ratios), "rounds": found}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 5)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    engine, client = cores[-1:], cores[:1]
    torch.set_num_threads(1)
    shape = "tiny" if args.quick else "small"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = make_model(shape, torch.device("cpu"), vocabulary=VOCABULARY + 1).eval()
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        del model
        normal, exact = (
            stack.enter_context(server(folder, exact=exact, cores=engine))
            for exact in (False, True)
        )
        vllm = stack.enter_context(vllm_server(args.vllm, folder, engine)) if args.vllm else None
        _stay_on(client)
        try:
            rates = throughput(normal, exact, vllm, args)
            ids = make_ids(3 if args.quick else 40, 1)
            delays = {
                "words": latency(normal, args, make_rows(ids)),
                "token ids": latency(normal, args, [{"input_ids": own} for own in ids]),
            }
        finally:
            _stay_on(cores)
    print(table(rates))
    print("one text a request, ms; ratio: overhead over echo")
    shown = [*_WAYS, "simplest", "overhead", "ratio", "least", "most"]
    shown += ["of rested", "of simplest"]
    print(table([{"of": name, **{key: own[key] for key in shown}} for name, own in delays.items()]))
    figures = {"shape": shape, "texts_a_request": TEXTS, "requests_in_flight": FLYING}
    figures |= {"cores": {"client": client, "server": engine}, "throughput": rates}
    figures |= {"latency_ms": delays}
    print(f"written: {save('serving', figures, args)}")


if __name__ == "__main__":
    main()
