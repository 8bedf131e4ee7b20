"""``companion make-base``: train the tutor base again, as the one that ships was made."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from companion.cli.shared import add_fields, picked
from companion.errors import CompanionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; those of the recipe are the fields of ``BaseConfig``."""
    # A flag a field, read from the dataclass: importing it costs torch and transformers, which this
    # command needs anyway.
    from companion.tutor.base import BaseConfig

    parser.add_argument(
        "--output_dir", default="tutor-base", help="folder to write; must be new or empty"
    )
    parser.add_argument("--log_every", type=int, default=500, help="steps between two measurements")
    add_fields(parser, BaseConfig, lambda name: " ")


def run(args: argparse.Namespace) -> int:
    """Train and save the base; print what it knows."""
    from companion.tutor.base import BaseConfig, train_base

    output = Path(args.output_dir)
    if output.exists() and any(output.iterdir()):
        raise CompanionError(f"{output} is not empty", "name another --output_dir, or empty it")
    config = BaseConfig(**picked(args, *(item.name for item in dataclasses.fields(BaseConfig))))
    figures = train_base(config, output, log_every=args.log_every)
    print(f"\nsaved to {output}")
    for name in ("greedy", "sampled", "verdict", "judge"):
        print(f"  {name:<8} {figures[name]:.3f}")
    return 0
