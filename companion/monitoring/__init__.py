"""Watch a reward model age, with alarms that do not cry wolf. Chapter 7.

Nothing here imports torch when it is imported: a look at labels costs a second, not ten. Only what
scores texts loads it, inside its functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.monitoring.retraining import (
        Retraining as Retraining,
        is_better as is_better,
        retrain as retrain,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
