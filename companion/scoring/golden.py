"""Make and check a model's golden texts. Chapter 6."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from companion.errors import CompanionError
from companion.formatting import Encoded, EncodedSteps
from companion.models.golden import HALF_TOLERANCE, ROWS, TOLERANCE, GoldenTexts
from companion.models.identity import dtype_name, identity_of, text_hashes
from companion.models.manifest import RewardManifest
from companion.models.reward_model import RewardModel
from companion.scoring.reading import Text, ids_of
from companion.scoring.scorer import LocalScorer, RewardScorer, Scorer, TokenScorer


@dataclass
class GoldenReport:
    """What became of a model's golden texts.

    Attributes
    ----------
    tolerance : float
        Most that a value may move.
    moved : list of (int, str, float)
        Texts whose value moved by more: which, ``alone`` or ``batch``, by how much.
    other_ids : list of int
        Texts that have other token ids than at saving.
    differs : list of str
        Names of the hashes that are not those at saving; empty where the target has none.
    most : float
        The largest move of all.
    values : list
        What was said of each text, alone.
    """

    tolerance: float
    moved: list[tuple[int, str, float]] = field(default_factory=list)
    other_ids: list[int] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    most: float = 0.0
    values: list[Any] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all texts have the ids and the values that they had."""
        return not self.moved and not self.other_ids

    def lines(self) -> list[str]:
        """For people: what is wrong, and what differs."""
        said = []
        if self.other_ids:
            said.append(f"{len(self.other_ids)} texts have other token ids: {self.other_ids}")
        for i, way, by in sorted(self.moved, key=lambda one: -one[2])[:3]:
            said.append(f"text {i} ({way}) moved by {by:.3g}, more than {self.tolerance:g}")
        if len(self.moved) > 3:
            said.append(f"{len(self.moved)} moved in all")
        if not self.ok:
            known = ", ".join(self.differs) or "nothing that has a hash"
            said.append(f"what differs from the model as it was saved: {known}")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"ok": self.ok, **vars(self)}


def golden_texts(reward_model: RewardModel) -> GoldenTexts | None:
    """The golden texts of a model as it is now; None if it cannot read them.

    (A template that demands other messages, a limit of length below all of them.)
    """
    kind: Any = RewardScorer if reward_model.readout is None else None
    if kind is None:
        scalar = reward_model.readout is not None and reward_model.readout.kind == "scalar"
        kind = RewardScorer if scalar else TokenScorer
    scorer = kind(reward_model)
    rows = []
    for row in ROWS:
        prepared = scorer.prepare([row])
        if prepared.texts:
            rows.append(dict(row))
    if not rows:
        return None
    texts = scorer.prepare(rows).texts
    values = [_plain(scorer.values([text])[0]) for text in texts]
    if not all(np.isfinite(np.asarray(value)).all() for value in values):
        return None
    dtype = dtype_name(reward_model.model)
    return GoldenTexts(
        rows=rows,
        input_ids=[list(ids_of(text)) for text in texts],
        places=None if scorer.readout.kind == "scalar" else [list(t.ends) for t in texts],
        values=values,
        dtype=dtype,
        tolerance=HALF_TOLERANCE.get(dtype, TOLERANCE),
        hashes=identity_of(reward_model).to_dict(),
    )


def add_golden_texts(reward_model: RewardModel, manifest: RewardManifest) -> None:
    """Write the golden texts of a model into its manifest; a note if it cannot read them."""
    try:
        manifest.golden_texts = golden_texts(reward_model)
    except CompanionError as error:
        manifest.golden_texts = None
        manifest.notes.append(f"no golden texts: {error.what}")
        return
    if manifest.golden_texts is None:
        manifest.notes.append("no golden texts: the model cannot read them")


def check_golden(
    scorer: Scorer[Any], *, tolerance: float | None = None, golden: GoldenTexts | None = None
) -> GoldenReport | None:
    """Compare what a scorer says of its model's golden texts with what was saved.

    The rows are formatted anew, for their ids; the ids are scored, each text alone and all in one
    batch.

    Parameters
    ----------
    scorer : Scorer
        Here or on a server.
    tolerance : float, optional
        Most that a value may move; default: the manifest's, or that of the dtype in which the
        model runs, if that is coarser.
    golden : GoldenTexts, optional
        Those that were recorded elsewhere; default: the manifest's.

    Returns
    -------
    GoldenReport or None
        None if there are no golden texts.

    Raises
    ------
    CompanionError
        If the scorer cannot score.
    """
    if golden is None and scorer.manifest is not None:
        golden = scorer.manifest.golden_texts
    if golden is None:
        return None
    report = GoldenReport(tolerance or golden.tolerance)
    hashes = text_hashes(scorer.formatter, scorer.readout)
    if isinstance(scorer, LocalScorer):
        hashes = identity_of(scorer.reward_model).to_dict()
        if tolerance is None:
            half = HALF_TOLERANCE.get(dtype_name(scorer.reward_model.model), 0.0)
            report.tolerance = max(golden.tolerance, half)
    report.differs = [name for name, own in hashes.items() if golden.hashes.get(name) != own]
    prepared = scorer.prepare(golden.rows)
    kept = dict(zip(prepared.kept, prepared.texts, strict=True))
    for i, ids in enumerate(golden.input_ids):
        same = i in kept and ids_of(kept[i]) == ids
        if same and golden.places is not None:
            text = kept[i]
            same = isinstance(text, EncodedSteps) and list(text.ends) == golden.places[i]
        if not same:
            report.other_ids.append(i)
    # the values are of the ids as they were saved: what reads texts another way is found above
    texts = _texts(golden)
    scorer.check(texts)  # of other weights the vocabulary may be smaller
    alone = [scorer.values([text])[0] for text in texts]
    report.values = [_plain(value) for value in alone]
    for way, values in (("alone", alone), ("batch", scorer.values(texts))):
        for i, value in enumerate(values):
            by = _distance(_plain(value), golden.values[i])
            report.most = max(report.most, by)
            if not by <= report.tolerance:
                report.moved.append((i, way, by))
    return report


def _texts(golden: GoldenTexts) -> Sequence[Text]:
    encoded = [Encoded(list(ids), 0, True) for ids in golden.input_ids]
    if golden.places is None:
        return encoded
    pairs = zip(encoded, golden.places, strict=True)
    return [EncodedSteps(item, list(places)) for item, places in pairs]


def _plain(value: Any) -> Any:
    return value if isinstance(value, float) else np.asarray(value).tolist()


def _distance(a: Any, b: Any) -> float:
    """The largest difference; infinite for other shapes and for what is no number."""
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or not np.isfinite(left).all():
        return float("inf")
    return float(np.abs(left - right).max(initial=0.0))
