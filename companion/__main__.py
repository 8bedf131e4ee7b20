"""``python -m companion``; also what ``accelerate launch -m`` and ``torchrun -m`` start."""

import sys

from companion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
