"""What the properties of exercises are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.course.exercise import Unmet, Unusable, WrongShape

Attempt = Callable[..., Any]


def expect(condition: Any, evidence: str) -> None:
    """Raise :class:`Unmet` with the evidence unless the condition holds."""
    if not bool(condition):
        raise Unmet(evidence)


def tensor(value: Any, shape: tuple[int, ...] | None = None, what: str = "the result") -> Tensor:
    """The value, which must be a tensor, and of that shape."""
    if not isinstance(value, Tensor):
        wanted = "a Tensor" if shape is None else f"a Tensor of shape {list(shape)}"
        raise Unusable(f"{what}: expected {wanted}, got {a_kind(value)}")
    if shape is not None:
        got = tuple(value.shape)
        if got != shape:
            raise WrongShape(f"{what} has shape {list(got)}; it should be {list(shape)}")
    result: Tensor = value
    return result


def kind(value: Any, kinds: type | tuple[type, ...], wanted: str, what: str = "the result") -> None:
    """Raise :class:`Unusable` unless the value is of these types; `wanted` names them."""
    if not isinstance(value, kinds):
        raise Unusable(f"{what}: expected {wanted}, got {a_kind(value)}")


def number(value: Any, what: str = "the result") -> float:
    """The value as one float."""
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Unusable(f"{what}: expected one number, got {a_kind(value)}") from None


def close(got: Any, want: Any, setting: str, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raise :class:`Unmet` unless the numbers agree; the evidence shows the worst place."""
    a = np.asarray(got.detach().double() if isinstance(got, Tensor) else got, dtype=np.float64)
    b = np.asarray(want.detach().double() if isinstance(want, Tensor) else want, dtype=np.float64)
    if a.shape != b.shape:
        raise WrongShape(f"{setting}: shape {list(a.shape)}; it should be {list(b.shape)}")
    bad = ~np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    if bad.any():
        place = int(np.flatnonzero(bad.ravel())[0])
        where = f" at place {place}" if a.size > 1 else ""
        raise Unmet(f"{setting}: {a.ravel()[place]:.6g}{where}; "
                    f"it should be {b.ravel()[place]:.6g}")  # fmt: skip


def a_kind(value: Any) -> str:
    """Type of a value with its article, and its shape if it has one."""
    module, name = type(value).__module__, type(value).__name__
    name = f"NumPy {name}" if module == "numpy" else name
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    shape = getattr(value, "shape", None)
    return f"{article} {name}" if shape is None else f"{article} {name} of shape {list(shape)}"


def show(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        value = value.tolist() if value.numel() <= 12 else f"tensor of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "…"


def normal(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0
) -> Tensor:
    """Normal draws, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
