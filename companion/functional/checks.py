"""Checks that every formula makes on what it is given.

PyTorch broadcasts ``[B, 1] - [B]`` to ``[B, B]`` in silence; in place, that has turned a batch of
rewards into a matrix (ms-swift #9927). Here such shapes raise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.errors import DataError, DtypeError, ShapeError

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


def as_pair(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides of pairs by :func:`as_float`, of one shape."""
    chosen, rejected = as_float("chosen", chosen), as_float("rejected", rejected)
    same_shape(chosen=chosen, rejected=rejected)
    return chosen, rejected


def as_lists(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores ``[B, K]`` by :func:`as_float`, and which of them count (all without a mask)."""
    scores = as_float("scores", scores)
    has_dims("scores", scores, 2, "[B, K]")
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else as_mask("mask", mask)
    same_shape(scores=scores, mask=valid)
    return scores, valid


def as_rankings(
    scores: Tensor, ranks: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`as_lists`, with their ranks.

    Raises
    ------
    DataError
        If a rank that counts is NaN; the message names the row.
    """
    scores, valid = as_lists(scores, mask)
    same_shape(scores=scores, ranks=ranks)
    if ranks.is_floating_point() and bool((bad := (ranks.isnan() & valid).any(dim=1)).any()):
        raise DataError(
            f"ranks of row {int(bad.int().argmax())} hold NaN",
            "mask the completion or give it a rank",
        )
    return scores, ranks, valid


def has_dims(name: str, value: Tensor, dims: int, layout: str) -> None:
    """Raise :class:`ShapeError` unless `value` has `dims` axes; `layout` names them."""
    if value.dim() != dims:
        raise ShapeError(f"{name} must be {layout}, not of shape {list(value.shape)}")
