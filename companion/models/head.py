"""The head: one linear row from the last token's hidden state to the score, always in fp32.

Under bf16 autocast a stock head runs in bf16, and 4,000 distinct rewards were measured to collapse
to 1,295. :class:`ScoreHead` keeps the product in fp32 in every forward, stock ones included, and
has the state of the ``nn.Linear`` that it replaces, so that the checkpoint stays a plain one.
Chapter 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import ModelError


class ScoreHead(nn.Linear):
    """``nn.Linear`` that computes in float32 (float64 if its weight is), autocast or not."""

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states ``[..., D]`` of any floating dtype to scores ``[..., 1]`` in fp32."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> ScoreHead:
        """Take over weight and bias (the same parameters, not copies)."""
        head = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        head.weight = linear.weight
        if linear.bias is not None:
            head.bias = linear.bias
        head.train(linear.training)
        return head


class TwoLayerHead(nn.Sequential):
    """Linear, ReLU, Linear in float32, as Qwen2.5-Math-RM and INF-ORM have it (``score.0/.2``)."""

    def __init__(self, first: ScoreHead, second: ScoreHead) -> None:
        super().__init__(first, nn.ReLU(), second)

    @property
    def weight(self) -> Tensor:
        """Of the last layer, ``[labels, D]``."""
        weight = self[-1].weight
        assert isinstance(weight, Tensor)
        return weight


class ProbabilityHead(nn.Module):
    """P(one token) in a softmax over the rows of a language head, in float32.

    Parameters
    ----------
    rows : ScoreHead
        Logits of all tokens, or of those that the probability is shared among.
    index : int
        Whose probability.
    """

    def __init__(self, rows: ScoreHead, index: int) -> None:
        super().__init__()
        self.rows = rows
        self.index = index

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[..., D]`` to probabilities ``[..., 1]``."""
        probabilities: Tensor = self.rows(hidden).softmax(dim=-1)
        return probabilities[..., self.index : self.index + 1]


def without_adapter(model: Any) -> Any:
    """The model below a LoRA wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_name(model: Any) -> str:
    """``score``, or ``classifier`` where a class calls its head so (GPT-2 by token, encoders)."""
    inner = without_adapter(model)
    other = isinstance(getattr(inner, "classifier", None), nn.Module)
    return "classifier" if other and not hasattr(inner, "score") else "score"


def has_own_readout(model: Any) -> bool:
    """Whether it gives a score a text by a pooler and a ``classifier`` of its own (encoders)."""
    inner = without_adapter(model)
    by_text = type(inner).__name__.endswith("ForSequenceClassification")
    return by_text and head_name(inner) == "classifier"


def find_head(model: Any) -> nn.Module:
    """The head of a model with a sequence- or token-classification head (LoRA-wrapped or not).

    Raises
    ------
    ModelError
        If there is none: a causal LM, or a model of another kind.
    """
    inner = without_adapter(model)
    head = getattr(inner, head_name(model), None)
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(inner).__name__} has no module 'score', so it is no decoder with a "
            "sequence-classification head",
            "use a decoder that AutoModelForSequenceClassification knows (Llama, Qwen, Mistral, "
            "Gemma, GPT-2, …)",
        )
    return head


def install_head(model: Any) -> ScoreHead:
    """Put a :class:`ScoreHead` in the place of the model's stock head; return it."""
    head = find_head(model)
    if isinstance(head, ScoreHead):
        return head
    if not isinstance(head, nn.Linear):
        raise ModelError(f"the head is a {type(head).__name__}, not one linear layer")
    fresh = ScoreHead.from_linear(head)
    setattr(model, head_name(model), fresh)
    return fresh


def initialise_head(head: nn.Linear, seed: int, std: float | None = None) -> float:
    """Draw a fresh head from N(0, std²), reproducibly; return the std.

    The default, 1/sqrt(D + 1), is that of Stiennon et al. 2020 (arXiv 2009.01325, appendix B.1),
    and keeps the first scores near unit size for normalised hidden states. It is not zero, since a
    zero head passes no gradient to the backbone at the first step.
    """
    if std is None:
        std = (head.in_features + 1) ** -0.5
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(head.weight.shape, generator=generator, dtype=torch.float32) * std
    with torch.no_grad():
        head.weight.copy_(fresh)
        if head.bias is not None:
            head.bias.zero_()
    return std
