"""The course's own helpers: exercises that know your mistake, and your progress.

>>> from companion.course import check
>>> check("ch01.pair_loss", hint=1)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.course.checking import check as check
    from companion.course.result import CheckResult as CheckResult
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
