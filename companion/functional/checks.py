"""Checks that every formula makes on what it is given.

PyTorch broadcasts ``[B, 1] - [B]`` to ``[B, B]`` in silence; in place, that has turned a batch of
rewards into a matrix (ms-swift #9927). Here such shapes raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.errors import DtypeError, ShapeError

_HALF = (torch.float16, torch.bfloat16)


def as_float(name: str, value: Tensor) -> Tensor:
    """Return `value` in float32 or float64; half precision is upcast to float32.

    Raises
    ------
    DtypeError
        If `value` is no tensor or not of floating point.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(
            f"{name} must be a torch tensor, not {type(value).__name__}",
            f"pass torch.as_tensor({name})",
        )
    if not value.is_floating_point():
        raise DtypeError(
            f"{name} must be of floating point, not {value.dtype}",
            f"pass {name}.float(), and see that no score was rounded on the way",
        )
    return value.float() if value.dtype in _HALF else value


def as_mask(name: str, value: Tensor) -> Tensor:
    """Return a boolean mask from a tensor of booleans, or of zeros and ones.

    Raises
    ------
    DtypeError
        If `value` is of floating point (an additive mask of 0 and -inf would be read upside down).
    ShapeError
        If an integer mask holds anything but 0 and 1.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
    if value.dtype == torch.bool:
        return value
    if value.is_floating_point() or value.is_complex():
        raise DtypeError(
            f"{name} must hold booleans or integers 0 and 1, not {value.dtype}",
            "an additive mask (0 and -inf) is not accepted: pass `mask == 0` instead",
        )
    if bool(((value != 0) & (value != 1)).any()):
        raise ShapeError(f"{name} must hold only 0 and 1", f"pass {name} != 0")
    return value.bool()


def same_shape(**tensors: Tensor) -> None:
    """Raise :class:`ShapeError` unless all named tensors have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ShapeError(
            f"shapes differ: {listing}",
            "nothing is broadcast here; a trailing axis of length 1 goes with .squeeze(-1)",
        )


def has_dims(name: str, value: Tensor, dims: int, layout: str) -> None:
    """Raise :class:`ShapeError` unless `value` has `dims` axes; `layout` names them."""
    if value.dim() != dims:
        raise ShapeError(f"{name} must be {layout}, not of shape {list(value.shape)}")
