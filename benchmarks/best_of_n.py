"""Scoring 16 candidates of each prompt: ``python -m benchmarks.best_of_n``."""

from __future__ import annotations

from benchmarks.comparing import arguments, compare
from benchmarks.shapes import TokenIds, candidates


def main() -> None:
    """Run it."""
    args = arguments(__doc__)

    def texts(shape: str) -> TokenIds:
        full = {"tiny": 8, "small": 4, "0.6b": 4}[shape]
        return candidates(1 if args.quick else full, 16)

    compare("best_of_n", args, texts)


if __name__ == "__main__":
    main()
