"""``reward_manifest.json``: what a checkpoint does not say and a score needs.

The formatter's recipe, the read-out rule, the statistics of a reference set that make scores of one
version comparable with those of the next (Chapter 6), the temperature that calibrates margins
(Chapter 7), held-out metrics, the data's fingerprint and the versions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from companion.errors import DataError, ModelError
from companion.formatting import RewardFormatter, recipe_fingerprint
from companion.models.golden import GoldenTexts
from companion.models.readout import RULES, ScalarReadout, kind_of_rule

MANIFEST_FILE = "reward_manifest.json"
FORMAT_VERSION = 1
_QUANTILES = 101
_AGAIN = "fetch the file again, or save the model anew"


@dataclass(frozen=True)
class ReferenceStats:
    """Scores of a reference set: what a raw score is compared with.

    Attributes
    ----------
    mean, std : float
        Of the raw scores; ``std`` is the sample standard deviation (n − 1).
    quantiles : list of float
        The 101 percentiles 0, 1, …, 100.
    n : int
        Number of scores.
    source : str
        Which texts, in words.
    """

    mean: float
    std: float
    quantiles: list[float]
    n: int
    source: str

    @classmethod
    def from_scores(cls, scores: Any, source: str) -> ReferenceStats:
        """Statistics of an array of raw scores.

        Raises
        ------
        DataError
            For fewer than two scores, or any that is not finite.
        """
        values = np.asarray(scores, dtype=np.float64).ravel()
        if values.size < 2:
            raise DataError(
                f"the reference set has {values.size} scores", "score at least two texts"
            )
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise DataError(
                f"{bad} of the {values.size} reference scores are not finite",
                "leave out the rows that were dropped before taking the statistics",
            )
        return cls(
            mean=float(values.mean()),
            std=float(values.std(ddof=1)),
            quantiles=[float(q) for q in np.quantile(values, np.linspace(0, 1, _QUANTILES))],
            n=int(values.size),
            source=source,
        )

    def centered(self, scores: Any) -> np.ndarray:
        """Raw scores minus the reference mean."""
        return np.asarray(scores, dtype=np.float64) - self.mean

    def z(self, scores: Any) -> np.ndarray:
        """Centred scores in reference standard deviations; zeros if the reference has none."""
        centred = self.centered(scores)
        if self.std <= 1e-12 * max(1.0, abs(self.mean)):
            return np.where(np.isnan(centred), np.nan, 0.0)
        return centred / self.std

    def percentile(self, scores: Any) -> np.ndarray:
        """Share of the reference below each score, in percent (0 to 100, ties in the middle)."""
        values = np.asarray(scores, dtype=np.float64)
        grid = np.asarray(self.quantiles)
        percent = np.linspace(0.0, 100.0, grid.size)
        # several equal quantiles (a discrete score): the middle of their range
        unique, first = np.unique(grid, return_index=True)
        last = grid.size - 1 - np.unique(grid[::-1], return_index=True)[1]
        if unique.size == 1:
            out = np.where(values < unique[0], 0.0, np.where(values > unique[0], 100.0, 50.0))
        else:
            out = (
                np.interp(values, unique, percent[first]) + np.interp(values, unique, percent[last])
            ) / 2
            out = np.where(values < unique[0], 0.0, np.where(values > unique[-1], 100.0, out))
        return np.where(np.isnan(values), np.nan, out)

    def validate(self, where: str) -> None:
        """Raise :class:`ModelError` for statistics that no set of scores has."""
        numbers = [self.mean, self.std, *self.quantiles]
        if not all(_is_number(x) and math.isfinite(x) for x in numbers):
            raise ModelError(f"{where}: the reference statistics hold a value that is not finite")
        if self.std < 0 or not isinstance(self.n, int) or self.n < 2:
            raise ModelError(f"{where}: the reference has std={self.std} and n={self.n}")
        steps = zip(self.quantiles, self.quantiles[1:], strict=False)
        if len(self.quantiles) != _QUANTILES or any(b < a for a, b in steps):
            raise ModelError(
                f"{where}: the reference needs {_QUANTILES} quantiles in ascending order, "
                f"it has {len(self.quantiles)}"
            )


@dataclass
class RewardManifest:
    """The contents of ``reward_manifest.json``; see the module's text.

    Attributes
    ----------
    formatter : dict
        :meth:`RewardFormatter.recipe`.
    formatter_fingerprint : str
        Its SHA-256.
    readout : dict
        The rule (``last_token_by_attention_mask``) and the head's dtype; for a token-level model
        its kind, aggregation and the like (:class:`companion.models.TokenReadout`).
    reference : ReferenceStats or None
        Without it, scores have no centred, z and percentile form.
    temperature : float or None
        T for which σ(Δ/T) is calibrated; None if it was not fitted.
    golden_texts : GoldenTexts or None
        What the model must say of some fixed texts, wherever it runs.
    metrics : dict
        Held-out metrics.
    data : dict
        Name and fingerprint of the training data, and counts of rows used, dropped and cut.
    training : dict
        Settings of the run.
    versions : dict
        Package versions.
    base_model, created : str or None
        Name of the base; time of saving (ISO 8601, UTC).
    notes : list of str
        What was repaired or assumed.
    """

    formatter: dict[str, Any] = field(default_factory=dict)
    formatter_fingerprint: str = ""
    readout: dict[str, Any] = field(default_factory=ScalarReadout().to_dict)
    reference: ReferenceStats | None = None
    temperature: float | None = None
    golden_texts: GoldenTexts | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    created: str | None = None
    notes: list[str] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @property
    def kind(self) -> str:
        """``scalar`` for one score a text, else ``outcome`` or ``process``."""
        kind = kind_of_rule(self.readout["rule"])
        assert kind is not None  # :meth:`validate` has seen to it
        return kind

    def describe(self, formatter: RewardFormatter) -> None:
        """Take over the recipe and the fingerprint of a formatter."""
        self.formatter = formatter.recipe()
        self.formatter_fingerprint = recipe_fingerprint(self.formatter)

    def validate(self, where: str = MANIFEST_FILE) -> None:
        """Check every field that a score depends on.

        Raises
        ------
        ModelError
            With the field and, where there is one, the cure.
        """
        if self.format_version != FORMAT_VERSION:
            raise ModelError(
                f"{where}: format_version is {self.format_version!r}, this companion reads "
                f"{FORMAT_VERSION}",
                "use the companion that saved the model",
            )
        scalar, *by_token = RULES.values()
        if kind_of_rule(self.readout.get("rule")) is None:
            raise ModelError(
                f"{where}: the read-out rule is {self.readout.get('rule')!r}; "
                f"the companion knows {scalar!r}, and for token-level models "
                f"{' and '.join(map(repr, by_token))}"
            )
        if recipe_fingerprint(self.formatter) != self.formatter_fingerprint:
            raise ModelError(
                f"{where}: the formatter's recipe does not have the fingerprint that stands beside "
                "it; the file was edited",
                "restore the file, or save the model anew",
            )
        if self.temperature is not None and not (
            _is_number(self.temperature)
            and math.isfinite(self.temperature)
            and self.temperature > 0
        ):
            raise ModelError(
                f"{where}: the temperature is {self.temperature!r}, not a positive number"
            )
        if self.reference is not None:
            self.reference.validate(where)
        if self.golden_texts is not None:
            self.golden_texts.validate(where)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the version first."""
        data = asdict(self)
        if self.golden_texts is None:  # an older companion reads the file, then
            del data["golden_texts"]
        return {"format_version": data.pop("format_version"), **data}

    def to_json(self) -> str:
        """JSON text. A NaN or an infinity in a metric becomes null: JSON has neither."""
        return json.dumps(_finite(self.to_dict()), ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_FILE) -> RewardManifest:
        """Read and validate.

        Raises
        ------
        ModelError
            For malformed JSON, unknown or missing fields, and all that :meth:`validate` refuses.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where}: no valid JSON: {error}", _AGAIN) from error
        if not isinstance(data, dict):
            raise ModelError(f"{where}: holds a {type(data).__name__}, not an object")
        if data.get("format_version") != FORMAT_VERSION:  # before its fields are judged
            cls(format_version=data.get("format_version", 0)).validate(where)
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(data) - set(known))
        missing = [k for k in ("formatter", "formatter_fingerprint", "readout") if k not in data]
        if unknown or missing:
            raise ModelError(
                f"{where}: "
                + "; ".join(
                    f"{word} field {', '.join(names)}"
                    for word, names in (("unknown", unknown), ("missing", missing))
                    if names
                )
            )
        for name in ("formatter", "readout", "metrics", "data", "training", "versions"):
            if not isinstance(data.get(name, {}), Mapping):
                raise ModelError(f"{where}: the field {name!r} is no object")
        notes = data.get("notes", [])
        if not isinstance(notes, Sequence) or isinstance(notes, str):
            raise ModelError(f"{where}: the field 'notes' is no list")
        reference = data.get("reference")
        if reference is not None:
            try:
                data["reference"] = ReferenceStats(**reference)
                data["reference"].validate(where)
            except TypeError as error:
                raise ModelError(f"{where}: the field 'reference' is malformed: {error}") from error
        if data.get("golden_texts") is not None:
            data["golden_texts"] = GoldenTexts.from_dict(data["golden_texts"], where)
        manifest = cls(**data)
        manifest.validate(where)
        return manifest

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``reward_manifest.json`` into a folder, whole or not at all."""
        self.validate()
        path = Path(directory) / MANIFEST_FILE
        temporary = path.with_suffix(".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RewardManifest:
        """Read a manifest from a file, or from a folder that holds one."""
        file = Path(path)
        if file.is_dir():
            file = file / MANIFEST_FILE
        if not file.is_file():
            raise ModelError(f"{file}: no such file")
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: cannot be read as UTF-8: {error}", _AGAIN) from error
        return cls.from_json(text, str(file))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
