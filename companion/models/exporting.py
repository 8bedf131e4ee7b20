"""What makes another engine speak in z: the manifest's reference, in that engine's own words.

vLLM gives ``(logit - logit_mean) / logit_sigma`` of its pooler config. OpenRLHF's reward model
reads ``mean`` and ``std`` of ``config.json``. Chapter 6.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from companion.errors import DataError, ModelError
from companion.models.checkpoint import find_file, read_json, resolve
from companion.models.manifest import MANIFEST_FILE, ReferenceStats, RewardManifest

Engine = Literal["vllm", "openrlhf"]
ENGINES: Final[tuple[Engine, ...]] = get_args(Engine)
_REFERENCE: Final = (
    "make one: companion compare MODEL MODEL --data FILE --write_reference takes it from the texts "
    "of a file"
)


@dataclass(frozen=True)
class EngineExport:
    """What an engine needs to give the z of a model's manifest.

    Attributes
    ----------
    engine : str
        ``vllm`` or ``openrlhf``.
    settings : dict
        vLLM's pooler config, or the fields that OpenRLHF reads in ``config.json``.
    command : list of str
        The words of the command line that uses them.
    contents : dict
        What a file for the engine holds: the settings, or the whole patched ``config.json``.
    reference : ReferenceStats
        What z is measured against.
    notes : list of str
        What the engine does otherwise than the companion.
    own_config : str
        The model's own ``config.json``, which is not written to.
    """

    engine: Engine
    settings: dict[str, float]
    command: list[str]
    contents: dict[str, Any]
    reference: ReferenceStats
    notes: list[str] = field(default_factory=list)
    own_config: str = ""

    @property
    def command_line(self) -> str:
        """The command, quoted for a shell."""
        return shlex.join(self.command)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        one = self.reference
        return {
            "engine": self.engine,
            "settings": self.settings,
            "command": self.command,
            "reference": {"mean": one.mean, "std": one.std, "n": one.n, "source": one.source},
            "notes": self.notes,
        }

    def check_target(self, path: str | os.PathLike[str]) -> None:
        """Refuse to write over a file of the model's own.

        Raises
        ------
        DataError
            If the file is the model's ``config.json``, or another JSON file in its folder.
        """
        target, own = Path(path).resolve(), Path(self.own_config)
        # (a hub's file is a link: the name in the snapshot and what it points to are both its own)
        if target in {own.resolve(), own.absolute()} or (
            target.exists() and target.parent in {own.resolve().parent, own.absolute().parent}
        ):
            raise DataError(
                f"{target}: is a file of the model's own",
                "name another file: the model's version goes by its configuration",
            )


def export_for_engine(
    path_or_id: str | os.PathLike[str], engine: Engine, *, revision: str | None = None
) -> EngineExport:
    """What makes an engine give a model's z itself. Reads no weights.

    Parameters
    ----------
    path_or_id : str or path
        Folder or hub id of a model that the companion saved.
    engine : {"vllm", "openrlhf"}
        Which engine.
    revision : str, optional
        Of a hub id.

    Returns
    -------
    EngineExport

    Raises
    ------
    ModelError
        For a model without a manifest or a reference set, one whose reference has no spread, and
        one with a value for each token.
    DataError
        For an engine that is not known.
    """
    if engine not in ENGINES:
        raise DataError(f"engine is {engine!r}", f"use one of: {', '.join(ENGINES)}")
    name = resolve(path_or_id)
    stored = find_file(name, MANIFEST_FILE, revision)
    if stored is None:
        raise ModelError(
            f"{name}: no {MANIFEST_FILE}, so nothing says what z is measured against",
            "give a folder that 'companion train' wrote",
        )
    manifest = RewardManifest.load(stored)
    if manifest.kind != "scalar":
        raise ModelError(
            f"{name}: is a model of the kind {manifest.kind}, with a value for each token or step; "
            "these engines scale one logit a text",
            "serve it raw, and scale what 'companion score' makes of it",
        )
    if manifest.reference is None:
        raise ModelError(f"{name}: the manifest has no reference set, so there is no z", _REFERENCE)
    one = manifest.reference
    if not (one.std > 1e-12 * max(1.0, abs(one.mean))):
        raise ModelError(
            f"{name}: all {one.n} scores of the reference are the same, so an engine would divide "
            "by zero",
            "take a reference of texts that differ; if they do, the model has learnt nothing",
        )
    config_file = find_file(name, "config.json", revision)
    if config_file is None:
        raise ModelError(f"{name}: no config.json", "give a folder of a saved model")
    make = _EXPORTERS[engine]
    return make(name, manifest, one, read_json(config_file), config_file, revision)


def _vllm(
    name: str,
    manifest: RewardManifest,
    one: ReferenceStats,
    config: dict[str, Any],
    config_file: str,
    revision: str | None,
) -> EngineExport:
    settings = {"logit_mean": one.mean, "logit_sigma": one.std}
    command = ["vllm", "serve", name, *(["--revision", revision] if revision else [])]
    command += ["--runner", "pooling"]
    limit = manifest.formatter.get("max_length")
    if limit is not None:
        command += ["--max-model-len", str(limit)]
    golden = manifest.golden_texts
    dtype = golden.dtype if golden else config.get("dtype", config.get("torch_dtype"))
    if isinstance(dtype, str):  # vLLM's 'auto' runs float32 weights in half precision
        command += ["--dtype", dtype]
    command += ["--pooler-config", json.dumps(settings)]
    notes = [
        "send token ids that the model's formatter made: z is of those",
        "such a server gives z where a client expects raw scores: a client that takes z itself, as "
        "'companion score --url' does, must not be given it",
    ]
    if config.get("problem_type") != "regression":
        notes.append(
            "config.json does not say problem_type=regression: vLLM applies a sigmoid unless a "
            "request says use_activation=false"
        )
    return EngineExport("vllm", settings, command, dict(settings), one, notes, config_file)


def _openrlhf(
    name: str,
    manifest: RewardManifest,
    one: ReferenceStats,
    config: dict[str, Any],
    config_file: str,
    revision: str | None,
) -> EngineExport:
    settings = {"mean": one.mean, "std": one.std}
    command = ["python", "-m", "openrlhf.cli.serve_rm", "--reward.model_name_or_path", "DIR"]
    command += ["--reward.normalize_enable"]
    limit = manifest.formatter.get("max_length")
    if limit is not None:  # (it cuts at 2,048 unless told, without a word)
        command += ["--data.max_len", str(limit)]
    notes = [
        "DIR: a copy of the model's folder with the patched config.json; as it is another "
        "configuration, it has another version than the model's own",
        "older releases call the flag --normalize_reward; without it mean and std are not used",
        "it applies to a reward model that OpenRLHF loads itself; with --reward.remote_url it does "
        "nothing",
        "OpenRLHF runs the model, mean and std in bfloat16 by default: its z is that coarse",
    ]
    return EngineExport("openrlhf", settings, command, config | settings, one, notes, config_file)


_EXPORTERS: Final[dict[str, Callable[..., EngineExport]]] = {"vllm": _vllm, "openrlhf": _openrlhf}
