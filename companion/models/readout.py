"""How a model's values are read: what its manifest says under ``readout``.

A scalar model has one score, at the last token of a text. An outcome model has a value at every
token of the completion, a process model one at the end of each step. Which values count, what a
value means and how they become one score is part of the model: another aggregate of the same
probabilities is another score. Chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
#: of a model of one score a text whose score is never read at its pad token, which is its EOS
SKIPPING = "last_token_that_is_not_the_pad"
AGGREGATIONS: tuple[How, ...] = ("mean", "min", "product", "log_product", "last")
STEP_SCORES = ("good", "expected")
LABEL_NAMES = {1: {0: "right"}, 3: {0: "bad", 1: "neutral", 2: "good"}}


def kind_of_rule(rule: Any) -> str | None:
    """``scalar``, ``outcome`` or ``process``; None for a rule that is not known."""
    known = {value: kind for kind, value in RULES.items()} | {SKIPPING: "scalar"}
    return known.get(rule)


@dataclass(frozen=True)
class ReadAs:
    """How to read a checkpoint that others published, where its files do not say so.

    Given when it is loaded, or kept in the manifest that ``companion adopt`` writes.

    Attributes
    ----------
    readout : {"mask", "transformers"}, optional
        Where the score stands if the pad token is the EOS. ``mask``: at the last token of the text,
        the EOS if it has one. ``transformers``: at the last token that is not the pad id, so never
        at the EOS, as the classes of transformers and TRL do.
    attribute : str, optional
        Of a head with several scores, the name (in ``config.id2label``) or number of one.
    attribute_weights : tuple of float
        Or what each of them counts in the score.
    reward_token : tuple of str
        Of a causal LM: the token whose logit or probability as the next one is the score; with a
        second, the first against that one. ``id:N`` names a token by its id.
    reward_value : {"logit", "probability"}
        Of two tokens the logit is the difference, and the probability shared among them.
    step_separator : str, optional
        Of a process model: what ends each step.
    """

    readout: Literal["mask", "transformers"] | None = None
    attribute: str | None = None
    attribute_weights: tuple[float, ...] = ()
    reward_token: tuple[str, ...] = ()
    reward_value: Literal["logit", "probability"] = "logit"
    step_separator: str | None = None

    def __post_init__(self) -> None:
        for name in ("attribute_weights", "reward_token"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.readout not in (None, "mask", "transformers"):
            raise ModelError(f"readout is {self.readout!r}", "use 'mask' or 'transformers'")
        if self.reward_value not in ("logit", "probability"):
            raise ModelError(
                f"reward_value is {self.reward_value!r}", "use 'logit' or 'probability'"
            )
        if len(self.reward_token) > 2:
            raise ModelError(
                f"reward_token names {len(self.reward_token)} tokens",
                "give one, or two: the good and the bad",
            )
        if self.attribute is not None and self.attribute_weights:
            raise ModelError(
                "attribute and attribute_weights are both given",
                "name one attribute, or weigh them all",
            )

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data."""
        default = ReadAs()
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value != getattr(default, name)
        }


@dataclass(frozen=True)
class ScalarReadout:
    """One score a text, read at its last token by the attention mask.

    Attributes
    ----------
    skipped : int or None
        Id of a token that is taken off the end of a text before it is read (``transformers`` of
        :class:`ReadAs`; the EOS behind a prompt that a causal LM goes on from).
    finished : bool
        A text that was cut off is read as a finished one is: an encoder's always has its end.
    read_as : ReadAs or None
        Of a checkpoint in a shape of its own, which is read so each time it is loaded.
    """

    kind: ClassVar[str] = "scalar"
    labels: ClassVar[int] = 1
    skipped: int | None = None
    finished: bool = False
    read_as: ReadAs | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        rule = RULES[self.kind] if self.skipped is None else SKIPPING
        return {"rule": rule, "head_dtype": "float32", **_given(self, *_ADDED)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> ScalarReadout:
        """The read-out of a manifest's field ``readout``.

        Raises
        ------
        ModelError
            If fields are missing or unknown.
        """
        return cls(**_fields_of(cls, data, where))


@dataclass(frozen=True)
class TokenReadout:
    """How to read a token-level model.

    Attributes
    ----------
    kind : str
        ``outcome`` or ``process``.
    labels : int
        Outputs of the head: 1 (a logit of 'right' or 'good'), 2 (bad, good; of published process
        models) or 3 (bad, neutral, good).
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
    closed : bool
        The last step too ends with the separator, and is read there, not at the end of the text.
    read_token : int or None
        Id of the token within the separator that is read; default: its last one.
    read_as : ReadAs or None
        As in :class:`ScalarReadout`.
    """

    kind: str
    labels: int = 1
    aggregation: How = "last"
    separator: str | None = None
    step_score: str = "expected"
    chat: bool = True
    threshold: float = 0.5
    closed: bool = False
    read_token: int | None = None
    read_as: ReadAs | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, ("outcome", "process")),
            ("labels", self.labels, (1, 2, 3)),
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
        old = {key: value for key, value in asdict(self).items() if key not in _ADDED}
        given = _given(self, *_ADDED)
        return {"rule": RULES[self.kind], "head_dtype": "float32", **old, **given}

    def values(self, logits: Tensor) -> Tensor:
        """Logits ``[..., labels]`` to the values in [0, 1] that are aggregated, ``[...]``."""
        if self.labels == 1:
            return logits.squeeze(-1).sigmoid()
        if self.labels == 2:
            return logits.softmax(dim=-1)[..., 1]
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
        return cls(**_fields_of(cls, data, where))


Readout = ScalarReadout | TokenReadout

#: fields that manifests of before have not, and that are written only where they say something
_ADDED = ("skipped", "finished", "closed", "read_token", "read_as")


def readout_from_dict(data: Mapping[str, Any], where: str) -> Readout:
    """The read-out of any kind; see :meth:`TokenReadout.from_dict`."""
    if kind_of_rule(data.get("rule")) == "scalar":
        return ScalarReadout.from_dict(data, where)
    return TokenReadout.from_dict(data, where)


def _given(readout: Readout, *names: str) -> dict[str, Any]:
    """Those of some fields that say something, as plain data."""
    values = {name: getattr(readout, name, None) for name in names}
    return {
        name: value.to_dict() if isinstance(value, ReadAs) else value
        for name, value in values.items()
        if value is not None and value is not False
    }


def _fields_of(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = {key: value for key, value in data.items() if key not in ("rule", "head_dtype")}
    known = {f.name for f in fields(cls)}
    missing = [] if cls is ScalarReadout or "kind" in given else ["kind"]
    unknown = sorted(set(given) - known)
    try:
        if unknown or missing:
            raise TypeError(f"unknown {unknown}, missing {missing}")
        if given.get("read_as") is not None:
            given["read_as"] = ReadAs(**given["read_as"])
    except TypeError as error:
        raise ModelError(f"{where}: the field 'readout' is malformed: {error}") from error
    return given
