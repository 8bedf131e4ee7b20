"""The course's own helpers: exercises that know your mistake, and your progress.

>>> from companion.course import check
>>> check("ch01.bradley_terry_loss", hint=1)  # doctest: +SKIP
"""

from companion.course.checking import check
from companion.course.result import CheckResult

__all__ = ["CheckResult", "check"]
