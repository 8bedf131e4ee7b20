"""Errors that name the place and the cure.

Every error that a user can cause is a :class:`CompanionError`. Its text says what is wrong, where
(file, row, field), and what to do. The command line prints it without a traceback and exits with
code 2; anything else that escapes is a bug in the companion and keeps its traceback.

.. code-block:: text

    CompanionError
    ├── DataError     (ValueError)    a row, a file or a dataset
    ├── ShapeError    (ValueError)    tensors whose shapes do not fit
    ├── DtypeError    (TypeError)     a tensor of the wrong kind of number
    ├── ReadoutError  (ValueError)    a model or a batch whose score would be silently wrong
    ├── ModelError    (ValueError)    a folder or a checkpoint
    ├── RunEnded      (RuntimeError)  a training run that ended before its last step
    ├── ServiceError  (RuntimeError)  a server that scores
    └── JudgeError    (RuntimeError)  a judge that cannot be asked
"""

from __future__ import annotations


class CompanionError(Exception):
    """Base of all errors that the companion raises on purpose.

    Parameters
    ----------
    what : str
        What is wrong, with the place (file, row, field) where there is one.
    cure : str, optional
        What the user can do about it. Printed on a line of its own.
    """

    def __init__(self, what: str, cure: str | None = None) -> None:
        self.what = what
        self.cure = cure
        super().__init__(what if cure is None else f"{what}\n  Cure: {cure}")


class DataError(CompanionError, ValueError):
    """A row, a file or a dataset that cannot be used as it is."""


class ShapeError(CompanionError, ValueError):
    """Tensors whose shapes do not fit; raised where PyTorch would broadcast in silence."""


class DtypeError(CompanionError, TypeError):
    """A tensor of the wrong kind of number, such as integer scores."""


class ReadoutError(CompanionError, ValueError):
    """A model or a batch whose score would be silently wrong (contract 3)."""


class ModelError(CompanionError, ValueError):
    """A folder or a checkpoint that is no usable reward model."""


class RunEnded(CompanionError, RuntimeError):
    """A training run that ended before its last step.

    Parameters
    ----------
    what, cure : str
    exit_code : int
        What the command ends with: 143 (128 + SIGTERM) if it was asked to end and has saved, 2 if
        something could not be written, 1 if another rank is gone.
    said : bool
        Another rank says it.
    """

    def __init__(self, what: str, cure: str, *, exit_code: int = 2, said: bool = False) -> None:
        super().__init__(what, cure)
        self.exit_code = exit_code
        self.said = said


class ServiceError(CompanionError, RuntimeError):
    """A server that cannot be reached, or whose answer is not what its protocol says."""


class JudgeError(CompanionError, RuntimeError):
    """A judge that cannot be asked: a server is away, a key is refused, a cache is in use."""
