"""How a model's values are read: what its manifest says under ``readout``.

A scalar model has one score, at the last token of a text. An outcome model has a value at every
token of the completion, a process model one at the end of each step. Which values count, what a
value means and how they become one score is part of the model: another aggregate of the same
probabilities is another score. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from companion.errors import ModelError

if TYPE_CHECKING:  # a manifest is read where torch is not loaded: by the monitor
    from torch import Tensor

    from companion.functional.reduction import How

#: kind of a model -> the rule by which its values are read
RULES = {
    "scalar": "last_token_by_attention_mask",
    "outcome": "every_completion_token",
    "process": "step_ends",
}
AGGREGATIONS: tuple[How, ...] = ("mean", "min", "product", "log_product", "last")
STEP_SCORES = ("good", "expected")
LABEL_NAMES = {1: {0: "right"}, 3: {0: "bad", 1: "neutral", 2: "good"}}


@dataclass(frozen=True)
class ScalarReadout:
    """One score a text, read at its last token by the attention mask."""

    kind: ClassVar[str] = "scalar"
    labels: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"rule": RULES[self.kind], "head_dtype": "float32"}


@dataclass(frozen=True)
class TokenReadout:
    """How to read a token-level model.

    Attributes
    ----------
    kind : str
        ``outcome`` or ``process``.
    labels : int
        Outputs of the head: 1 (a logit of 'right' or 'good') or 3 (bad, neutral, good).
    aggregation : str
        From the values of a text to its score; see :func:`companion.functional.aggregate`.
    separator : str or None
        What stands between the steps of a text (process models).
    step_score : str
        With three classes, ``good``: P(+1), or ``expected``: the expected label, moved from
        [−1, 1] to [0, 1], which is P(+1) + P(0)/2. (With P(+1) a neutral step scores as low as a
        bad one.)
    chat : bool
        Rows of text are written as a user's question and the assistant's answer.
    threshold : float
        A step is taken to be wrong if P(wrong) is above it (process models).
    """

    kind: str
    labels: int = 1
    aggregation: How = "last"
    separator: str | None = None
    step_score: str = "expected"
    chat: bool = True
    threshold: float = 0.5

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, ("outcome", "process")),
            ("labels", self.labels, (1, 3)),
            ("aggregation", self.aggregation, AGGREGATIONS),
            ("step_score", self.step_score, STEP_SCORES),
        ):
            if value not in known:
                raise ModelError(
                    f"the read-out's {name} is {value!r}",
                    f"take one of: {', '.join(map(str, known))}",
                )
        if self.kind == "process" and not self.separator:
            raise ModelError("a process model needs the separator of its steps")

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"rule": RULES[self.kind], "head_dtype": "float32", **asdict(self)}

    def values(self, logits: Tensor) -> Tensor:
        """Logits ``[..., labels]`` to the values in [0, 1] that are aggregated, ``[...]``."""
        if self.labels == 1:
            return logits.squeeze(-1).sigmoid()
        bad_neutral_good = logits.softmax(dim=-1)
        if self.step_score == "good":
            return bad_neutral_good[..., 2]
        return bad_neutral_good[..., 2] + bad_neutral_good[..., 1] / 2

    def wrong(self, logits: Tensor) -> Tensor:
        """Logits ``[..., labels]`` to P(wrong), ``[...]``."""
        if self.labels == 1:
            return (-logits.squeeze(-1)).sigmoid()
        return logits.softmax(dim=-1)[..., 0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> TokenReadout:
        """The read-out of a manifest's field ``readout``.

        Raises
        ------
        ModelError
            If fields are missing or unknown.
        """
        fields = {key: value for key, value in data.items() if key not in ("rule", "head_dtype")}
        try:
            return cls(**fields)
        except TypeError as error:
            raise ModelError(f"{where}: the field 'readout' is malformed: {error}") from error


Readout = ScalarReadout | TokenReadout


def readout_from_dict(data: Mapping[str, Any], where: str) -> Readout:
    """The read-out of any kind; see :meth:`TokenReadout.from_dict`."""
    if data.get("rule") == RULES["scalar"]:
        return ScalarReadout()
    return TokenReadout.from_dict(data, where)
