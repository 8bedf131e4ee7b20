"""Every command that a page shows is parsed by the real command line; those of the companion run.

What would take a cluster, a download or hours runs in small: with a tiny random model, a few rows
and two steps in place of what the page names. What is started by a launcher is parsed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from book_pages import PAGES, ROOT, all_commands, commands_of, companion_arguments, inline_commands
from made_benchmarks import MADE
from transformers import AutoTokenizer

from companion import CompanionError
from companion.cli.main import _VERBATIM, COMMANDS, main
from companion.course.progress import VARIABLE
from companion.models import (
    ReferenceStats,
    RewardManifest,
    TokenReadout,
    load_base,
    save_reward_model,
)
from companion.scoring import add_golden_texts
from companion.tutor import TUTOR_BASE, make_rows

COMMANDS_ON_PAGES = all_commands()
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
#: the environment that `make` makes, which holds `companion`
VENV = re.findall(r"^VENV \?= (.*)$", MAKEFILE, re.MULTILINE)[0]
#: where readers start: what they type works in a shell that has just been opened
START_PAGES = [
    ROOT / name
    for name in ("README.md", "book/how_to_use.md", "exercises/README.md", "recipes/README.md")
]
#: what a page leaves to the reader, and what stands for it here
ELLIPSIS = "recipes/pairwise/tutor.yaml"


def check_companion(arguments: list[str], output_dir: Path) -> None:
    """Parse as ``companion`` does, without running anything; raises if it would be refused."""
    name, rest = arguments[0], arguments[1:]
    module = importlib.import_module(COMMANDS[name][0])
    if name in _VERBATIM:
        assert rest[0] in module.purposes()
        words = rest[1:]
        if "--output_dir" in words:  # the settings make the folder
            words[words.index("--output_dir") + 1] = str(output_dir)
        module.parse(words, rest[0])
        return
    parser = argparse.ArgumentParser(exit_on_error=True)
    module.add_arguments(parser)
    if hasattr(module, "TAKES_SETTINGS"):
        parser.parse_known_args(rest)
    else:
        parser.parse_args(rest)


def check_verl(words: list[str]) -> None:
    """The companion's class is where verl is told to look, and takes these settings."""
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    settings = {
        name.removeprefix("reward.reward_kwargs."): given.pop(name)
        for name in list(given)
        if name.startswith("reward.reward_kwargs.")
    }
    manager = "reward.reward_manager"
    module = importlib.import_module(given[f"{manager}.module.path"].removeprefix("pkg://"))
    assert given[f"{manager}.source"] == "importlib"
    config = SimpleNamespace(
        reward={"reward_kwargs": settings},
        actor_rollout_ref=SimpleNamespace(model=SimpleNamespace(path=str(TUTOR_BASE))),
    )
    tokenizer = AutoTokenizer.from_pretrained(TUTOR_BASE)
    getattr(module, given[f"{manager}.name"])(config, tokenizer)


def check_launcher(words: list[str]) -> None:
    """Parse the flags of ``accelerate launch`` or ``torchrun``; files that they name must exist."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words[2:])
        assert args.module
        assert args.config_file is None or Path(args.config_file).is_file()
    else:
        assert words[0] == "torchrun", f"nothing here knows how to check {words[0]!r}"
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words[1:])
        assert args.module
    assert args.training_script == "companion"


def check_curl(words: list[str]) -> None:
    """The route exists, and takes the body."""
    from companion.serving import BODIES

    url, body = (next(w for w in words if w.startswith("http")), words[words.index("-d") + 1])
    BODIES["/" + url.split("/", 3)[3]].model_validate_json(body)


@pytest.mark.parametrize("command", sorted(set(COMMANDS_ON_PAGES)), ids=str)
def test_command_of_a_page_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    words = [ELLIPSIS if word == "…" else word for word in words]
    arguments = companion_arguments(tuple(words))
    if arguments is not None:
        if words[0] == "torchrun":  # whose ranks are not here
            monkeypatch.setattr("companion.training.config.settle_on_cpu", lambda settings: None)
        check_companion(arguments, tmp_path)
        if Path(words[0]).name != "companion" and not words[0].startswith("python"):
            check_launcher(words)
    elif words[0] == "make":
        for target in words[1:]:
            assert target in TARGETS, target
    elif words[0] == "source":
        assert words[1:] == [f"{VENV}/bin/activate"]
    elif words[0] == "curl":
        check_curl(words)
    elif words[0] == "sbatch":
        files = [word for word in words[1:] if not word.startswith("--")]
        assert all(Path(word).is_file() for word in files)
        subprocess.run(["bash", "-n", files[0]], check=True)
    elif words[:3] == ["python", "-m", "verl.trainer.main_ppo"]:
        check_verl(words[3:])
    elif words[0] == "python" and words[1].startswith("recipes/"):
        runpy.run_path(words[1])["arguments"](words[2:])
    else:
        pytest.fail(f"nothing here knows how to check {words[0]!r}")


@pytest.mark.parametrize("page", START_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_activated_before_its_commands(page):
    commands = [command.words for command in commands_of(page.read_text(encoding="utf-8"))]
    ours = [n for n, words in enumerate(commands) if companion_arguments(words) is not None]
    assert ("source", f"{VENV}/bin/activate") in commands[: ours[0]]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_text_exist(page):
    """What stands in the running text is often a part of a command; its first words must exist."""
    for words in inline_commands(page.read_text(encoding="utf-8")):
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word]
            assert set(named) <= TARGETS, words
        elif (arguments := companion_arguments(words)) is not None and arguments:
            assert arguments[0] in COMMANDS or arguments[0] in ("COMMAND", "--help"), words
            if arguments[0] in _VERBATIM and len(arguments) > 1:
                assert arguments[1] in importlib.import_module(COMMANDS[arguments[0]][0]).purposes()
        elif words[:2] == ("python", "-m"):
            assert importlib.util.find_spec(words[2]) is not None
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words


# In small


def _set(words: list[str], flag: str, value: str) -> None:
    if flag in words:
        words[words.index(flag) + 1] = value


class _FirstPlace(BaseHTTPRequestHandler):
    """A judge behind an OpenAI-compatible address that always prefers what it sees first."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "The first. [[A]]"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = json.dumps({"id": "x", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def judge_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _FirstPlace)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def in_small(words: list[str], base: Path, reward: Path, server: str) -> list[str]:
    """The same command on a tiny model and a few rows. Local files that the page makes stay."""
    words = list(words)
    _set(words, "--n", "48")
    if "--benchmark" in words:
        _set(words, "--dataset_name", f"{words[words.index('--benchmark') + 1]}.jsonl")
    for flag, local in (("--dataset_name", "hub.jsonl"), ("--data", "hub.jsonl")):
        if flag in words and re.fullmatch(r"[\w.-]+/[\w.-]+", words[words.index(flag) + 1]):
            _set(words, flag, local)
    if "--base_url" in words:
        _set(words, "--base_url", server)
    elif "--model" in words and "/" in words[words.index("--model") + 1]:
        _set(words, "--model", str(TUTOR_BASE if words[0] == "judge" else reward))
    if words[0] == "rank":
        _set(words, "--model", str(reward))
        _set(words, "--policy", str(base))
        _set(words, "--n", "4")
        words += ["--max_new_tokens", "8"]
    if words[0] == "train":
        # the tiny base's tokenizer joins the separator of the steps with a full stop
        _set(words, "--model_name_or_path", str(TUTOR_BASE if words[1] == "process" else base))
        _set(words, "--per_device_train_batch_size", "4")
        words += ["--max_steps", "2", "--use_cpu", "true", "--bf16", "false"]
        words += ["--disable_tqdm", "true", "--report_to", "none"]
    return words


def _own_commands(path: Path) -> list[list[str]]:
    """Commands of a page that begin with ``companion`` and leave nothing to the reader."""
    found = commands_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    return [
        list(command.words[1:])
        for command in found
        if command.words[0] == "companion"
        and "…" not in command.words
        and "--config" not in command.words  # a recipe; tests/training reads them all
        and "--engine_url" not in command.words  # needs a vLLM server; tests/engines has one
    ]


def _serve_for_a_moment(words: list[str]) -> int:
    """What a command that serves ends with if it is told to as soon as it is ready."""
    words = [*words, "--port", "0"]
    command = [sys.executable, "-m", "companion", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        stop = threading.Timer(120, server.kill)
        stop.start()
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if line.startswith("ready: "):
                server.terminate()
        stop.cancel()
    assert any(line.startswith("ready: ") for line in said), "".join(said)
    return server.returncode


@pytest.fixture(scope="module")
def saved_model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as ``companion train`` leaves it: with a reference and golden texts."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    manifest = RewardManifest(reference=ReferenceStats.from_scores(range(9), "nine numbers"))
    save_reward_model(load_base(tiny_base), folder, manifest, describe=add_golden_texts)
    return folder


@pytest.fixture(scope="module")
def process_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A process model with a random head, whose tokenizer keeps the separator of steps."""
    folder = tmp_path_factory.mktemp("process") / "model"
    readout = TokenReadout("process", 1, "min", separator="\n")
    model = load_base(TUTOR_BASE, labels=1, head_std=1.0)
    save_reward_model(model, folder, RewardManifest(readout=readout.to_dict()))
    return folder


@pytest.mark.parametrize(
    "page", [p for p in PAGES if _own_commands(p)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_of_a_page_run_one_after_the_other(
    page, tmp_path, monkeypatch, tiny_base, tiny_reward, judge_server, saved_model, process_model
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "progress.json"))
    pairs = make_rows("pairs", 24, seed=1)
    Path("hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    # the reader's own files
    own = [{"prompt": "Ana has 3 pens.", "completion": f"So {n} pens."} for n in range(3)]
    for name in ("completions.jsonl", "texts.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in own))
    for name, n, seed in (("reference", 120, 2), ("week", 24, 3)):
        rows = make_rows("pairs", n, seed=seed)
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.jsonl").write_text(json.dumps({"prompt": own[0]["prompt"]}) + "\n")
    Path("token.txt").write_text("secret")
    for name in ("reward-model", "reward-model-v1", "reward-model-v2"):
        if not any("--output_dir" in words and name in words for words in _own_commands(page)):
            shutil.copytree(saved_model, name)
    for name, make in MADE.items():
        rows = make(random.Random(4))
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if any("--benchmark" in words for words in _own_commands(page)):
        shutil.copytree(process_model, "process-model", dirs_exist_ok=True)
    for words in _own_commands(page):
        small = in_small(words, tiny_base, tiny_reward, judge_server)
        run = _serve_for_a_moment if small[0] in ("serve", "label") else main
        assert run(small) == 0, small
        for flag in ("--output", "--output_dir", "--json"):
            if flag in small:
                assert Path(small[small.index(flag) + 1]).exists(), small


def test_pages_show_commands():
    shown = {arguments[0] for command in COMMANDS_ON_PAGES
             if (arguments := companion_arguments(command.words))}  # fmt: skip
    assert {"train", "evaluate", "score", "data"} <= shown
    assert {"quickstart", "test"} <= {
        command.words[1] for command in COMMANDS_ON_PAGES if command.words[0] == "make"
    }


@pytest.mark.parametrize(
    "line",
    [
        "companion train pairwise --dataset_nam x --output_dir y",
        "companion evaluate --model x",  # no data
        "companion score --model x --input a --output b --no_such_flag",
        "companion data tutor --kind no-such-kind --n 1 --output x",
    ],
)
def test_a_wrong_command_is_refused(line, tmp_path):
    (command,) = commands_of(f"```bash\n{line}\n```\n")
    with pytest.raises((CompanionError, SystemExit)):
        check_companion(companion_arguments(command.words), tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch --num_process_count 8 -m companion train pairwise",
        "accelerate launch --num_processes 8 companion train pairwise",  # no -m
        "torchrun --no_such_flag 2 -m companion train pairwise",
        "deepspeed -m companion train pairwise",
    ],
)
def test_a_wrong_launch_is_refused(line):
    with pytest.raises((AssertionError, SystemExit)):
        check_launcher(line.split())


def test_commands_are_found_in_blocks_and_in_the_text():
    text = (
        "```bash\n# a comment\n$ companion score \\\n  --model x\n```\n```python\ncompanion\n```\n"
        "Then `make test`, {func}`~companion.functional.x`, `companion/`, `companion progress`.\n"
    )
    assert [command.words for command in commands_of(text)] == [
        ("companion", "score", "--model", "x")
    ]
    assert inline_commands(text) == [("make", "test"), ("companion", "progress")]
    launched = ("accelerate", "launch", "-m", "companion", "train", "pairwise")
    assert companion_arguments(launched) == ["train", "pairwise"]
    assert companion_arguments(("make", "test")) is None
