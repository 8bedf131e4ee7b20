"""``companion serve``: a reward model over HTTP, for RL jobs, evaluations and people."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from companion.cli.shared import READING, HelpWithExamples, add_flags, loading, read_as, say_notes
from companion.errors import DataError

#: of a parent that has none; a worker gets the parent's
_EXAMPLE = """\
example:
  companion serve --model outputs/pairwise --port 8000
  curl -s http://127.0.0.1:8000/v1/rewards -d '{"items": [{"prompt": "2 + 3?", "completion": "5"}]}'

  A person opens http://127.0.0.1:8000/ in a browser. SIGHUP starts the server again without losing
  a request (the folder may hold a new version by then), SIGTERM ends it when all were answered.
"""


#: :attr:`words` of the arguments are those that a worker is started with
KEEPS_WORDS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = _EXAMPLE
    parser.formatter_class = HelpWithExamples
    add = parser.add_argument
    add("--model", help="folder or hub id of a reward model of any kind")
    add("--name", help="of the model, as clients see it (default: the folder's name)")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in: then set a token")
    add("--port", type=int, default=8000, help="0: a free one")
    add("--token_file", help="file that holds the bearer token that clients must send")
    add(
        "--exact",
        action="store_true",
        help="each text runs alone: a score is the same to the last bit whatever else is served, "
        "at a lower throughput",
    )
    add(
        "--allow_unchecked",
        action="store_true",
        help="serve a model without golden texts, whose scores nothing can be compared with",
    )
    add("--queue_tokens", type=int, default=1 << 20, help="tokens that the queue holds")
    add("--max_body", type=int, default=32 * 2**20, help="bytes of a request")
    add("--log_dir", help="write ids and scores of each request into this folder")
    add("--log_text", action="store_true", help="and the words that clients sent")
    add("--log_format", choices=("text", "json"), default="text", help="of the lines on stderr")
    add(
        "--log_level",
        choices=("info", "warning"),
        default="info",
        help="warning: no line for each request",
    )
    add(
        "--engine",
        choices=("companion", "vllm"),
        default="companion",
        help="what runs the model: this process, or a vLLM server, whose gateway this then is",
    )
    add("--engine_url", nargs="+", default=[], help="of the vLLM server, or of several alike")
    add("--fd", type=int, help="serve on this open socket, and without a parent (systemd, workers)")
    add("--config", help="YAML file with flags of this command; the command line comes before it")
    add_flags(
        parser,
        *("max_length", "text", "max_tokens_per_batch", "packing"),
        *("device", "dtype", "device_map", "load_in_4bit", "revision", "trust_remote_code"),
        *READING,
    )
    add(
        "--overlong",
        choices=("error", "truncate_prompt"),
        help="what to do with texts that are too long; error if nothing is said, but then "
        "OpenRLHF's route is off, whose client takes a refusal for a missing reward",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 if it ended by one."""
    args = _with_config(args)
    _begin_log(args)
    if args.model is None:
        raise DataError("no --model", "name a folder that 'companion train' wrote, or a hub id")
    if (args.engine == "vllm") != bool(args.engine_url):
        raise DataError("--engine vllm and --engine_url belong together", "give both or neither")
    token = _token(args.token_file)
    try:
        from companion import serving
        from companion.serving import listen
    except ImportError as error:
        raise DataError(
            f"serving needs packages that are not installed ({error.name})",
            "pip install 'reward-model-companion[serve]'",
        ) from error
    if args.fd is None:
        if token is None and args.host not in ("127.0.0.1", "::1", "localhost"):
            print(
                f"note: {args.host} is open to other machines, and no --token_file is given",
                file=sys.stderr,
            )
        sock = listen(args.host, args.port)
        return serving.keep_serving(serving.command_again(args.words), sock)
    sock = socket.socket(fileno=args.fd)
    scorer = _scorer(args)
    say_notes(scorer)
    service = serving.open_service(
        scorer,
        name=args.name or Path(args.model).resolve().name,
        aliases=[args.model],  # vLLM's default name, which verl sends
        exact=args.exact,
        allow_unchecked=args.allow_unchecked,
        queue_tokens=args.queue_tokens,
        log_dir=args.log_dir,
        log_text=args.log_text,
    )
    app = serving.make_app(
        service, token=token, max_body=args.max_body, overlong_chosen=args.overlong is not None
    )
    where = serving.address_of(sock)

    def ready() -> None:
        serving.tell_ready()
        version = service.identity.version
        print(
            f"ready: {where} (model {service.name}, version {version})", file=sys.stderr, flush=True
        )

    serving.serve(app, sock, ready)
    return 0


def _scorer(args: argparse.Namespace) -> Any:
    from companion.scoring import RemoteScorer, load_scorer

    if args.engine == "companion":
        return load_scorer(args.model, **{**loading(args), "overlong": args.overlong or "error"})
    for flag in ("device", "max_tokens_per_batch"):
        if getattr(args, flag) is not None:
            raise DataError(f"--{flag} belongs to a model of this process", "leave it out")
    scorer = RemoteScorer.from_pretrained(
        args.engine_url if len(args.engine_url) > 1 else args.engine_url[0],
        args.model,
        text=args.text,
        protocol="classify",
        read_as=read_as(args),
    )
    scorer.read_texts(args.max_length, args.overlong or "error")
    return scorer


def _token(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise DataError(f"--token_file {path}: {what}", "give a file of one line") from error
    if not token:
        raise DataError(f"--token_file {path} is empty", "write the token into it")
    return token


class _Json(logging.Formatter):
    """A line of JSON for each record, with the fields that it brings."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _begin_log(args: argparse.Namespace) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_Json() if args.log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("companion.serving.access").setLevel(args.log_level.upper())
    for chatty in ("httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _with_config(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with those of the file, which the command line comes before."""
    if args.config is None:
        return args
    try:
        given = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"--config {args.config}: {error}") from error
    if not isinstance(given, dict):
        raise DataError(f"--config {args.config}: no mapping of flags to values")
    parser = argparse.ArgumentParser(prog="companion serve")
    add_arguments(parser)
    known = {action.dest: action for action in parser._actions}
    for name in ("help", "config", "fd"):
        del known[name]
    for name, value in given.items():
        if name not in known:
            raise DataError(
                f"--config {args.config}: no flag {name!r}",
                f"there are: {', '.join(sorted(known))}",
            )
        action = known[name]
        switch = isinstance(action.default, bool)
        wanted = bool if switch else (action.type or str)
        values = value if isinstance(value, list) else [value]
        right = all(type(each) is wanted for each in values)
        if not right or (action.choices is not None and value not in action.choices):
            raise DataError(f"--config {args.config}: {name} is {value!r}", "see --help")
    parser.set_defaults(**given)
    return parser.parse_args(args.words, argparse.Namespace(words=args.words))
