"""When the memory of a GPU is at its end: how that shows, and what to say of it."""

from __future__ import annotations

from typing import Any

import torch

from companion.errors import ModelError, first_line

_GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is at its end; cuBLAS has its own words for it."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for; the GPU, if there is one and nothing is asked.

    Raises
    ------
    ModelError
        If there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        if is_out_of_memory(error):
            return found
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ModelError(
            f"device {str(device)!r} cannot be used here: {first_line(error)}",
            f"there are: {', '.join(there)}; without one named, the GPU is taken if there is one",
        ) from error
    return found


def place(model: Any, device: str | torch.device) -> Any:
    """Put a model on a device.

    Raises
    ------
    ModelError
        If there is no such device, or it does not fit there: its size, the card's, and the cure.
    """
    if str(device) == "meta":  # to which a model can be put, and then holds no numbers
        chosen_device(device)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise does_not_fit(model, device) from error
        chosen_device(device)
        raise


def does_not_fit(model: Any, device: str | torch.device, what: str = "") -> ModelError:
    """The error that a model, or its training, is too large for a card.

    Parameters
    ----------
    model : nn.Module
    device : str or torch.device
    what : str
        What was going on, if the model is being trained.
    """
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.dim() > 1})
    held = sum(p.numel() * p.element_size() for p in parameters)
    said = f"{type(model).__name__} of {count / 1e9:.2g}B parameters in {'/'.join(dtypes)}"
    card = _card(device)
    if not what:
        return ModelError(
            f"{said} needs {held / _GIB:.1f} GiB for its weights, and {card}",
            "take half precision (dtype bfloat16), a smaller model, or a GPU that is free "
            "(CUDA_VISIBLE_DEVICES)",
        )
    trained = [p for p in parameters if p.requires_grad]
    more = sum(p.numel() * (p.element_size() + 8) for p in trained)  # gradient, and Adam's moments
    return ModelError(
        f"{what}: the GPU's memory is at its end. {said}: {held / _GIB:.1f} GiB for the weights, "
        f"{more / _GIB:.1f} GiB for the gradients and Adam's moments of what is trained, the rest "
        f"for activations; {card}",
        "fewer activations: micro_batch_tokens (the gradient stays the same), "
        "activation_checkpointing; fewer weights: use_peft (LoRA), DeepSpeed ZeRO-3 over several "
        "GPUs (recipes/accelerate/zero3.yaml)",
    )


def _card(device: str | torch.device) -> str:
    """What a card has, as a clause."""
    if torch.device(device).type != "cuda":
        return f"the device {device} has less"
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return f"the {name} has {total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB of them free"
