"""One thread at a time in a model: its attention and its mode are switched while it scores.

Two threads that switched at once would score with each other's settings, without a word. Chapter 6.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from companion.models.head import without_adapter

_LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def lock_of(model: Any) -> threading.RLock:
    """The lock of a model: whoever switches its attention or its mode holds it until it is back.

    All that score with one model share it, and the thread that has it may take it again. It is kept
    beside the model, not in it: a copy of the model, pickled or deep, has one of its own.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        With its LoRA wrapper or without: the lock is that of the model below.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(without_adapter(model), threading.RLock())


@contextlib.contextmanager
def inference_of(model: Any) -> Iterator[None]:
    """Let this thread alone run a model, in eval mode; each of its modules then is as it was."""
    with lock_of(model):
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
