"""Write the manifest that a model which somebody else published lacks. Chapter 6.

From then on it is a model of the companion: how it is read stands beside it, its scores have a
reference, and golden texts say whether it still gives them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from companion.errors import DataError, ModelError
from companion.formatting import Overlong, TextMode
from companion.models.card import CARD_FILE, write_card
from companion.models.checkpoint import find_file, is_adapter, resolve
from companion.models.loading import manifest_of
from companion.models.manifest import MANIFEST_FILE, ReferenceStats, RewardManifest
from companion.models.published import with_reading
from companion.models.readout import ReadAs
from companion.models.saving import package_versions
from companion.scoring.golden import add_golden_texts
from companion.scoring.scorer import OnError, Progress, load_scorer


@dataclass(frozen=True)
class Adopted:
    """What :func:`adopt` wrote.

    Attributes
    ----------
    path : Path
        Of the manifest.
    manifest : RewardManifest
    dropped : int
        Reference texts without a score.
    notes : list of str
        What was repaired or assumed.
    """

    path: Path
    manifest: RewardManifest
    dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return {
            "manifest": str(self.path),
            "kind": self.manifest.kind,
            "readout": self.manifest.readout,
            "reference": None if self.manifest.reference is None else vars(self.manifest.reference),
            "golden_texts": 0
            if self.manifest.golden_texts is None
            else len(self.manifest.golden_texts.rows),
            "dropped": self.dropped,
            "notes": self.notes,
        }


def adopt(
    path_or_id: str | os.PathLike[str],
    reference: Sequence[Any],
    *,
    output_dir: str | os.PathLike[str] | None = None,
    source: str = "",
    names: Sequence[str] | None = None,
    read_as: ReadAs | None = None,
    max_length: int | None = None,
    overlong: Overlong | None = None,
    text: TextMode | None = None,
    on_error: OnError = "raise",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Adopted:
    """Score reference texts with a published model, and write ``reward_manifest.json`` for it.

    Parameters
    ----------
    path_or_id : str or path
        Folder or hub id of a reward model that the companion did not save.
    reference : sequence
        Rows as :meth:`Scorer.score` takes them; pairs give two texts each.
    output_dir : path, optional
        Where the manifest goes, with links to the model's files (by absolute paths, so that
        nothing is copied); default: into the model's folder. A hub id needs one.
    source : str
        What the reference is, in words.
    names : sequence of str, optional
        How to call its rows in errors.
    read_as : ReadAs, optional
        How the model is read, where its files do not say so. It is kept.
    max_length, overlong, text
        Of the recipe. How text is read is else taken from the form of the rows.
    on_error : {"raise", "skip"}
        What becomes of a row that cannot be scored.
    device, dtype, revision, trust_remote_code
        As in :meth:`RewardScorer.from_pretrained`.
    progress : callable, optional
        Called with the number of texts of each batch done.

    Returns
    -------
    Adopted

    Raises
    ------
    ModelError
        For a model that has a manifest already, an adapter, or one that cannot be loaded.
    DataError
        For fewer than two texts with a score, or a folder that cannot be written to.
    """
    name = resolve(path_or_id)
    former = manifest_of(name, revision)
    if former is not None and "read_as" not in former.readout:
        raise ModelError(
            f"{name}: has a {MANIFEST_FILE} of its own: the companion saved it",
            "it needs no adoption; companion compare … --write_reference gives it another "
            "reference",
        )
    if is_adapter(name, revision):
        raise ModelError(
            f"{name}: holds a LoRA adapter, not a whole model",
            "merge it first: save_reward_model(load_reward_model(folder), …), which writes a "
            "manifest too",
        )
    folder = _target(name, output_dir)
    if former is not None and folder == Path(name):
        raise ModelError(
            f"{name}: was adopted before", f"take {MANIFEST_FILE} away, or name an --output_dir"
        )
    read_as = read_as or ReadAs()
    scorer = load_scorer(
        name,
        read_as=read_as,
        device=device,
        dtype=dtype,
        max_length=max_length,
        overlong=overlong,
        text=text,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    rows, names = _texts(reference, names)
    about = scorer.reward_model
    if scorer.readout.kind == "scalar" and scorer.formatter.text is None:
        about.read_texts(text=about.formatter.decide_text([r for r in rows if _is_row(r)]))
        about.notes.append(f"rows of text are read as {about.formatter.text!r}: as the reference")
    scores = scorer.score(rows, names=names, on_error=on_error, progress=progress)
    finite = np.isfinite(scores.raw)
    manifest = RewardManifest(
        reference=ReferenceStats.from_scores(
            scores.raw[finite], f"{int(finite.sum()):,} texts of {source or 'the reference'}"
        ),
        versions=package_versions(),
        base_model=os.fspath(path_or_id),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    about.readout = with_reading(scorer.readout, read_as)
    manifest.readout = about.readout.to_dict()
    manifest.describe(about.formatter)
    add_golden_texts(replace(about, manifest=manifest), manifest)
    manifest.notes = list(dict.fromkeys([*manifest.notes, *scorer.notes]))
    manifest.validate()
    if folder != Path(name):
        _link(name, folder, revision)
    try:
        path = manifest.save(folder)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written to: {error.strerror}", "name an --output_dir"
        ) from error
    if folder != Path(name):
        write_card(folder, manifest, about.formatter)
    return Adopted(path, manifest, int((~finite).sum()), scorer.notes)


def _target(name: str, output_dir: str | os.PathLike[str] | None) -> Path:
    if output_dir is None:
        if not Path(name).is_dir():
            raise DataError(f"{name}: is no local folder", "name an --output_dir for its manifest")
        return Path(name)
    folder = Path(output_dir)
    if folder.resolve() == Path(name).resolve():
        return Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is not an empty folder", "name a new one")
    return folder


def _link(name: str, folder: Path, revision: str | None) -> None:
    """Every file of the model, but for its card, by a link; a copy where there are none."""
    config = find_file(name, "config.json", revision)
    assert config is not None  # it was loaded
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(config).parent.iterdir()):
            if not file.is_file() or file.name in (MANIFEST_FILE, CARD_FILE):
                continue
            try:
                (folder / file.name).symlink_to(file.resolve())
            except (OSError, NotImplementedError):
                shutil.copy2(file, folder / file.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to: {error.strerror}") from error


def _is_row(row: Any) -> bool:
    return isinstance(row, Mapping)


def _texts(reference: Sequence[Any], names: Sequence[str] | None) -> tuple[list[Any], list[str]]:
    """The rows one by one: of a pair both sides."""
    rows: list[Any] = []
    said: list[str] = []
    for number, row in enumerate(reference):
        name = names[number] if names is not None else f"row {number}"
        if not isinstance(row, Mapping) or not {"chosen", "rejected"} <= set(row):
            rows.append(row)
            said.append(name)
            continue
        shared = {k: v for k, v in row.items() if not k.startswith(("chosen", "rejected"))}
        for side in ("chosen", "rejected"):
            own = {"completion": row[side]}
            if f"{side}_terminated" in row:
                own["terminated"] = row[f"{side}_terminated"]
            rows.append({**shared, **own})
            said.append(f"{name}, {side!r}")
    return rows, said
