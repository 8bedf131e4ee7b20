"""``companion progress``: which exercises are solved, and what comes next."""

from __future__ import annotations

import argparse

from companion.course import progress
from companion.course.catalogue import CHAPTERS
from companion.errors import CompanionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--all", action="store_true", help="list every exercise")
    add("--path", action="store_true", help="print where progress is kept")
    add("--reset", action="store_true", help="forget what was solved")
    add("--chapter", type=int, choices=sorted(CHAPTERS), help="with --reset: this chapter alone")


def run(args: argparse.Namespace) -> int:
    path = progress.progress_path()
    if args.chapter is not None and not args.reset:
        raise CompanionError("--chapter goes with --reset", "leave it out to see all chapters")
    if args.path:
        print(path if path is not None else f"nowhere ({progress.VARIABLE} switches it off)")
        return 0
    if args.reset:
        try:
            gone = progress.reset(args.chapter)
        except OSError as error:
            raise CompanionError(f"the progress file cannot be changed: {error}") from error
        print(f"{gone} exercise{'' if gone == 1 else 's'} forgotten.")
        return 0
    print(progress.table(progress.load(), details=args.all))
    if path is None:
        print(f"Nothing is kept: {progress.VARIABLE} is empty or the null device.")
    return 0
