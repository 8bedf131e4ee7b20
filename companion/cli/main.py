"""Entry point of ``companion``: finds the command, runs it, turns errors into exit codes.

A command is a module of this package: ``add_arguments(parser)`` declares its flags, ``run(args)``
returns the exit code. Its line of help stands in the table below, so that ``companion --help``
imports nothing heavy. A command whose flags belong to another parser (``train``, whose fields come
from dataclasses) takes what follows its name as it is: ``run_argv(argv)``.

Exit codes: 0 success; 1 a run that ended without reaching its goal; 2 wrong use, bad input, a full
disk or a folder that cannot be written; 130 Ctrl-C; 143 a training that was asked to end (SIGTERM)
and saved a checkpoint to go on from. The help of a command names those of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from companion.errors import CompanionError, RunEnded, system_fault

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
    try:
        code = _run(args.command, args.rest)
        sys.stdout.flush()  # (what cannot be written shows here, not when the interpreter ends)
        return code
    except RunEnded as end:
        if not end.said:
            print(f"{end.what}; {end.cure}", file=sys.stderr, flush=True)
        code = end.exit_code
    except BrokenPipeError:  # `companion score … | head`
        _drop_stdout()
        return 0
    except KeyboardInterrupt:
        print(f"stopped: companion {args.command} did not come to its end", file=sys.stderr)
        return 130
    except Exception as error:
        # (no name for the error that is said: with its traceback it would hold this frame, and all
        # below it, until garbage is collected: models, and DeepSpeed's setting for the next ones)
        said = str(error if isinstance(error, CompanionError) else system_fault(error) or "")
        if not said:
            raise
        print(f"error: {said}", file=sys.stderr)
        if isinstance(error, OSError):
            _drop_stdout()
        return 2
    # (outside of the handler, whose traceback holds the group of ranks)
    from companion.cli.shared import leave_process_group

    leave_process_group()
    return code


def _run(command: str, rest: Sequence[str]) -> int:
    """Run a command with what follows its name."""
    module = importlib.import_module(COMMANDS[command][0])
    started = 1 if command in _TRAIN else int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not hasattr(module, "SHARES_WORK"):
        raise CompanionError(
            f"a launcher started {started} processes of 'companion {command}', which works in one",
            "start it without torchrun or accelerate launch",
        )
    if command in _VERBATIM:
        return int(module.run_argv(rest))
    sub = argparse.ArgumentParser(
        prog=f"companion {command}",
        description=COMMANDS[command][1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    module.add_arguments(sub)
    # (a command that starts itself again needs its words too)
    own = {"words": rest} if hasattr(module, "KEEPS_WORDS") else {}
    given, left = sub.parse_known_args(rest, argparse.Namespace(**own))
    if hasattr(module, "TAKES_SETTINGS"):
        given.settings = left
    elif left:
        sub.error(f"unrecognized arguments: {' '.join(left)}")
    _refuse_nonsense(given)
    if hasattr(module, "SHARES_WORK"):
        given.processes = None
    if started == 1:
        return int(module.run(given))
    from companion.cli.shared import launched

    with launched() as given.processes:
        return int(module.run(given))


def _refuse_nonsense(given: argparse.Namespace) -> None:
    """No flag of any command takes NaN, an infinity, or a number that no machine counts to."""
    for name, value in vars(given).items():
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise CompanionError(f"--{name} is {value}", "give a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise CompanionError(f"--{name} is {value}", "give a number below 2**63")


def _drop_stdout() -> None:
    """Let nothing be written when the interpreter ends: it would say so, and exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
