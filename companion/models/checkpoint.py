"""Look into a checkpoint's files without loading it: names of weights, one tensor, an adapter.

Chapter 2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from companion.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def find_file(name: str, filename: str, revision: str | None = None) -> str | None:
    """Path of a file of a folder or hub repository; None if there is no such file."""
    if Path(name).is_dir():
        path = Path(name) / filename
        return str(path) if path.is_file() else None
    from transformers.utils import cached_file

    found: str | None = cached_file(
        name,
        filename,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return found


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    ModelError
        If it is malformed or something else than an object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether this is a LoRA adapter without the weights of a model."""
    if Path(name).is_dir() and (Path(name) / "config.json").is_file():
        return False
    return find_file(name, "adapter_config.json", revision) is not None


def checkpoint_keys(name: str, revision: str | None = None) -> set[str] | None:
    """Names of the stored tensors; None if the weights are not in safetensors files.

    Raises
    ------
    ModelError
        If a safetensors file is damaged.
    """
    index = find_file(name, _INDEX, revision)
    if index is not None:
        return set(read_json(index).get("weight_map", {}))
    single = find_file(name, _SINGLE, revision)
    if single is None:
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(single, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{single}: damaged: {error}", "save or fetch the file again") from error


def read_tensor(name: str, key: str, revision: str | None = None) -> Tensor | None:
    """One stored tensor in its stored dtype; None if it is not in a safetensors file."""
    from safetensors import safe_open

    index = find_file(name, _INDEX, revision)
    filename = read_json(index)["weight_map"].get(key) if index is not None else _SINGLE
    path = find_file(name, filename, revision) if filename else None
    if path is None:
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
