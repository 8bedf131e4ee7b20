"""The scorer that a saved model needs, by what its manifest says of its kind. Chapter 3."""

from __future__ import annotations

import os
from typing import Any

from companion.models.checkpoint import find_file
from companion.models.manifest import MANIFEST_FILE, TOKEN_RULES, RewardManifest
from companion.models.pieces import resolve
from companion.scoring.scorer import RewardScorer
from companion.scoring.token_scorer import TokenScorer


def model_kind(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> str:
    """``outcome`` or ``process`` for such a model, ``scalar`` for any other; reads no weights.

    Raises
    ------
    ModelError
        For a folder that holds no model, or a damaged manifest.
    """
    path = find_file(resolve(path_or_id), MANIFEST_FILE, revision)
    return "scalar" if path is None else RewardManifest.load(path).kind


def load_scorer(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None, **settings: Any
) -> RewardScorer | TokenScorer:
    """Load a reward model of any kind for scoring. Chapter 3.

    Parameters
    ----------
    path_or_id : str or path
        Folder or hub id.
    revision : str, optional
        Branch, tag or commit of a hub id.
    **settings
        Those of ``from_pretrained`` of the class: ``device``, ``dtype``, ``max_tokens_per_batch``,
        ``max_length``, ``overlong``, ``trust_remote_code`` are known to both.

    Returns
    -------
    RewardScorer or TokenScorer
        The second for outcome and process models.

    Raises
    ------
    ModelError
        For a folder that holds no reward model, or a damaged one.
    """
    kind = model_kind(path_or_id, revision=revision)
    scorer: Any = TokenScorer if kind in TOKEN_RULES else RewardScorer
    found: RewardScorer | TokenScorer = scorer.from_pretrained(
        path_or_id, revision=revision, **settings
    )
    return found
