"""Golden texts: what a model must say of some fixed texts, wherever it runs. Chapter 6.

A score that moves on the same text is a fault of the infrastructure (template, tokenizer, head,
dtype, weights), never a matter of taste, and is seen at once. The texts are built in and the same
for all models: rows of the training data would be published with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from companion.errors import ModelError

#: The rows: short and long, finished and not, with characters beyond ASCII, in several steps.
ROWS: Final[tuple[dict[str, Any], ...]] = (
    {"prompt": "What is 2 + 3?", "completion": "2 + 3 = 5\nThe answer is 5."},
    {"prompt": "What is 2 + 3?", "completion": "2 + 3 = 6\nThe answer is 6."},
    {"prompt": "What is 2 + 3?", "completion": "2 + 3 =", "terminated": False},
    {"prompt": "Say hello.", "completion": "Hello."},
    {"prompt": "Grüße auf Deutsch, bitte.", "completion": "Schöne Grüße, и привет! 你好 🙂"},
    {
        "prompt": "Ana has 3 boxes with 4 pens each and buys 5. How many pens has she now?",
        "completion": "Ana begins with 3 * 4 = 12 pens.\nShe buys 5, so 12 + 5 = 17.\n"
        "The answer is 17.",
    },
    {
        "prompt": "Tell me about the sea. " * 4,
        "completion": "The sea is wide and salt. " * 12,
    },
    {"prompt": "Write a line of Python.", "completion": "print({'a': [1, 2]})  # <b>&amp;</b>"},
)

#: Most that a score may move in float32. Another machine sums in another order, which is below
#: this for every model that was tried; another template, end token or head is far above.
TOLERANCE: Final = 1e-4
#: The same where the model runs in half precision, whose scores also move with their batch.
HALF_TOLERANCE: Final = {"bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class GoldenTexts:
    """Texts with their token ids and their values, as they were when the model was saved.

    Attributes
    ----------
    rows : list of dict
        ``prompt``, ``completion`` and, where it was cut off, ``terminated``.
    input_ids : list of list of int
        Of each.
    places : list of list of int, or None
        Of a model with a value for each token or step: the tokens that are read.
    values : list
        Of each text its raw score; with places, its logits there, ``[places][labels]``.
    dtype : str
        In which the model ran.
    tolerance : float
        Most that a value may move in that dtype.
    hashes : dict of str to str
        :class:`companion.models.Identity` of the model.
    """

    rows: list[dict[str, Any]]
    input_ids: list[list[int]]
    places: list[list[int]] | None
    values: list[Any]
    dtype: str
    tolerance: float
    hashes: dict[str, str]

    def validate(self, where: str) -> None:
        """Raise :class:`ModelError` for texts that no model was saved with."""
        n = len(self.rows)
        lengths = {len(self.input_ids), len(self.values)}
        if self.places is not None:
            lengths.add(len(self.places))
        finite = all(math.isfinite(x) for value in self.values for x in _numbers(value))
        if not n or lengths != {n} or not finite or not self.tolerance > 0:
            raise ModelError(
                f"{where}: the golden texts are damaged ({n} rows, other lists of {lengths})",
                "restore the file, or save the model anew",
            )

    @classmethod
    def from_dict(cls, data: Any, where: str) -> GoldenTexts:
        """Read what a manifest holds.

        Raises
        ------
        ModelError
            For fields that are missing, unknown or of another kind.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise ModelError(f"{where}: the field 'golden_texts' is malformed")
        found = cls(**data)
        try:
            found.validate(where)
        except (TypeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{where}: the field 'golden_texts' is malformed: {error}") from error
        return found


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in _numbers(part)]
    return [float(value)]
