"""What every evaluation is: scored rows, their figures, a table of them, a file. Chapter 4."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from companion.data.writing import write_text

if TYPE_CHECKING:
    from companion.models.manifest import RewardManifest

#: what was fitted on fewer held-out items says more of these than of the model
FEWEST_TO_FIT = 50


class Evaluation:
    """Scored rows and, once :meth:`measure` was called, their figures.

    What training reports of its held-out rows and what ``companion evaluate`` prints are objects
    of the same classes. ``len`` is the number of rows that count.

    Attributes
    ----------
    metrics : dict
        The figures; empty before :meth:`measure`.
    info : dict
        What was evaluated on what.
    """

    metrics: dict[str, Any]
    info: dict[str, Any]

    def __len__(self) -> int:
        raise NotImplementedError

    def measure(self) -> Self:
        """Compute :attr:`metrics`; return itself.

        Raises
        ------
        DataError
            If no row has a score.
        """
        raise NotImplementedError

    def calibrate(self, manifest: RewardManifest, source: str) -> list[str]:
        """Fit what a manifest says of a model's scores on these rows, which come from `source`.

        Returns
        -------
        list of str
            What the fit warns of.
        """
        return []

    def table(self) -> str:
        """Return the figures as text."""
        raise NotImplementedError

    def closing(self, calibration: Evaluation) -> str:
        """The text that ends a run of training, which was calibrated on other rows."""
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return metrics and info as plain JSON values; what is not finite becomes None."""
        return _plain({"info": self.info, "metrics": self.metrics})

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON; folders are made."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        return write_text(path, text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
