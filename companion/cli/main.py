"""Entry point of ``companion``: finds the command, runs it, turns errors into exit codes.

A command is a module of this package: ``add_arguments(parser)`` declares its flags, ``run(args)``
returns the exit code. Its line of help stands in the table below, so that ``companion --help``
imports nothing heavy. A command whose flags belong to another parser (``train``, whose fields come
from dataclasses) takes what follows its name as it is: ``run_argv(argv)``.

Exit codes: 0 success; 1 a run that ended without reaching its goal; 2 wrong use, bad input or a
full disk; 143 a training that was asked to end (SIGTERM) and saved a checkpoint to go on from. The
help of a command names those of its own.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from companion.errors import CompanionError, RunEnded

#: command -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("companion.cli.quickstart", "train a reward model and judge it, in minutes"),
    "data": ("companion.cli.data", "make the tutor's data; check, describe and split your own"),
    "train": (
        "companion.cli.train",
        "train a reward model (pairwise, kwise, outcome, process) or a policy (grpo)",
    ),
    "plan": ("companion.cli.plan", "what a run takes of memory, time and money, before it starts"),
    "evaluate": ("companion.cli.evaluate", "measure a reward model of any kind on held-out rows"),
    "score": ("companion.cli.score", "score a JSONL file of texts, messages or completions"),
    "adopt": ("companion.cli.adopt", "write the manifest that a published model lacks"),
    "serve": ("companion.cli.serve", "serve a reward model over HTTP, for RL jobs and people"),
    "audit": ("companion.cli.audit", "find the silent bugs in a reward model or an endpoint"),
    "compare": ("companion.cli.compare", "how scores, ranks and decisions move between two models"),
    "retrain": (
        "companion.cli.retrain",
        "train anew on old and new pairs, and publish the model if it is better",
    ),
    "export": ("companion.cli.export", "what makes vLLM or OpenRLHF give a model's z itself"),
    "rank": ("companion.cli.rank", "choose the best of N completions; data for fine-tuning"),
    "judge": ("companion.cli.judge", "ask a language model which completion is better"),
    "judge-report": ("companion.cli.judge_report", "a judge's biases; who agrees with whom"),
    "sample": ("companion.cli.sample", "which completions of your policy to label next, as pairs"),
    "label": ("companion.cli.label", "judge pairs on a page of this machine, by keyboard"),
    "monitor": ("companion.cli.monitor", "watch a reward model age; alarms that do not cry wolf"),
    "progress": ("companion.cli.progress", "which of the course's exercises you have solved"),
    "make-base": ("companion.cli.make_base", "train the tutor base that ships with the companion"),
}

#: commands that hand their arguments over as they are
_VERBATIM = {"train"}
#: commands that make a group of processes of what a launcher starts
_TRAIN = {"train", "retrain"}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="companion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, use, serve and monitor reward models.",
        epilog=f"commands:\n{listing}\n\n'companion COMMAND --help' says more of each.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those listed below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        from companion import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    if args.command not in COMMANDS:
        parser.error(f"no command {args.command!r}; there are: {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[args.command][0])
    started = 1 if args.command in _TRAIN else int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if started > 1 and not hasattr(module, "SHARES_WORK"):
            raise CompanionError(
                f"a launcher started {started} processes of 'companion {args.command}', which "
                "works in one",
                "start it without torchrun or accelerate launch",
            )
        if args.command in _VERBATIM:
            return int(module.run_argv(args.rest))
        sub = argparse.ArgumentParser(
            prog=f"companion {args.command}",
            description=COMMANDS[args.command][1],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(sub)
        # (a command that starts itself again needs its words too)
        own = {"words": args.rest} if hasattr(module, "KEEPS_WORDS") else {}
        given, rest = sub.parse_known_args(args.rest, argparse.Namespace(**own))
        if hasattr(module, "TAKES_SETTINGS"):
            given.settings = rest
        elif rest:
            sub.error(f"unrecognized arguments: {' '.join(rest)}")
        if hasattr(module, "SHARES_WORK"):
            given.processes = None
        if started == 1:
            return int(module.run(given))
        from companion.cli.shared import launched

        with launched() as given.processes:
            return int(module.run(given))
    except RunEnded as end:
        if not end.said:
            print(f"{end.what}; {end.cure}", file=sys.stderr, flush=True)
        code = end.exit_code
    except CompanionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `companion score … | head`
        return 0
    # (outside of the handler, whose traceback holds the group of ranks)
    from companion.cli.shared import leave_process_group

    leave_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
