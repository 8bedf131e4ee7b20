"""Which model gave a score: a hash for each thing that a score depends on.

Six hashes and not one, so that two models that differ can say in what: other weights, another
``rope_theta``, another chat template, a tokenizer with another end token, another way to read the
values, another dtype. Chapter 6.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from companion.formatting import RewardFormatter
from companion.models.checkpoint import described, read_tensor, weight_parts
from companion.models.readout import Readout
from companion.models.reward_model import RewardModel

#: hexadecimal digits of each hash, and of the version
DIGITS = 16
#: parts of a recipe that say what the tokenizer is; the rest says how a row becomes a text
_OF_TOKENIZER = (
    *("version", "special_tokens", "adds_bos", "adds_eos"),
    *("vocabulary_sha256", "probe_sha256"),
)


@dataclass(frozen=True)
class Identity:
    """What a model's scores depend on; each a SHA-256, its first 16 hexadecimal digits.

    Attributes
    ----------
    weights : str
        Names, shapes and bytes of all weights, as they are stored: a model that runs in another
        dtype than it was saved in has the same.
    config : str
        Class and configuration, without the name of the folder and the version that saved it.
    tokenizer : str
        All that turns a text into ids.
    template : str
        How a row becomes a text: chat template, way to read text, date, limit of length.
    readout : str
        How the values are read.
    dtype : str
        Of the weights as they run.
    """

    weights: str
    config: str
    tokenizer: str
    template: str
    readout: str
    dtype: str

    @functools.cached_property  # a server says it in each answer
    def version(self) -> str:
        """One hash over all of them, 16 hexadecimal digits."""
        return short_hash(json.dumps(self.to_dict(), sort_keys=True).encode())

    def differs(self, other: Identity) -> list[str]:
        """Names of the hashes that are not the same."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]

    def to_dict(self) -> dict[str, str]:
        """The six hashes by name."""
        return asdict(self)


def identity_of(reward_model: RewardModel) -> Identity:
    """The identity of a model as it is now, in memory.

    The weights are read once (0.2 s for 0.6B); keep the result. Of a model with a LoRA adapter it
    is not that of the checkpoint that is saved of it, which is merged.

    Raises
    ------
    ModelError
        If nothing says how the model's values are read.
    """
    readout = reward_model.readout
    if readout is None:
        from companion.errors import ModelError

        raise ModelError(
            "the model has a value for each token, and nothing says how they are read",
            "set reward_model.readout to a TokenReadout",
        )
    model = reward_model.model
    return Identity(
        weights=short_hash(*weight_parts(model, _as_stored(reward_model))),
        # (saving writes the class into `architectures`; it is hashed by itself)
        config=short_hash(described(model, without=("architectures",))),
        **text_hashes(reward_model.formatter, readout),
        dtype=short_hash(" ".join(sorted(_dtypes(model))).encode()),
    )


def text_hashes(formatter: RewardFormatter, readout: Readout) -> dict[str, str]:
    """The hashes that need no weights: ``tokenizer``, ``template`` and ``readout``."""
    recipe = formatter.recipe()
    special = {name: recipe.pop(name) for name in _OF_TOKENIZER}
    tokenizer = formatter.tokenizer
    state: Any
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("padding", "truncation"):  # what the last call set, which changes no id
            state.pop(name, None)
    else:
        state = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]
    return {
        "tokenizer": short_hash(_canonical([state, special])),
        "template": short_hash(_canonical(recipe)),
        "readout": short_hash(_canonical(readout.to_dict())),
    }


def dtype_name(model: Any) -> str:
    """The dtype in which the body of a model runs, ``float32`` say."""
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).split(".")[-1]


def short_hash(*parts: bytes) -> str:
    """The first 16 hexadecimal digits of a SHA-256."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def _as_stored(reward_model: RewardModel) -> Any:
    """Gives of a weight what is stored of it, if what runs is that in another dtype."""
    if reward_model.source is None:
        return None
    name, revision = reward_model.source

    def stored(key: str, tensor: Tensor) -> Tensor | None:
        if not tensor.is_floating_point():
            return None
        found = read_tensor(name, key, revision, unless=tensor.dtype)
        if found is None or not torch.equal(found.to(tensor.dtype), tensor.detach().cpu()):
            return None  # stored as it runs, or changed since it was loaded
        return found

    return stored


def _dtypes(model: Any) -> Iterable[str]:
    return {str(p.dtype) for p in model.parameters() if p.is_floating_point()}


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
