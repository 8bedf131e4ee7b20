"""Scoring texts of mixed lengths: ``python -m benchmarks.scoring``."""

from __future__ import annotations

from benchmarks.comparing import arguments, compare
from benchmarks.shapes import TokenIds, mixed_lengths


def main() -> None:
    """Run it."""
    args = arguments(__doc__)

    def texts(shape: str) -> TokenIds:
        full = {"tiny": 256, "small": 96, "0.6b": 96}[shape]
        return mixed_lengths(32 if args.quick else full)

    compare("scoring", args, texts)


if __name__ == "__main__":
    main()
