"""Score a corpus of many files on many machines, as a step of a datatrove pipeline.

datatrove deals the files out to tasks, starts them here, on SLURM or on Ray, marks those that are
complete, and starts only the others again. What a task does is :func:`score_file`, file by file.
Chapter 8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from companion.errors import CompanionError, DataError
from companion.scoring.files import score_file
from companion.scoring.scorer import load_scorer

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise CompanionError(
        "scoring a corpus needs datatrove", "pip install 'reward-model-companion[corpus]'"
    ) from error


class ScoreRewards(PipelineStep):
    """Score the JSONL files of a folder, each in one task, with the lines of ``companion score``.

    The first step of a pipeline. ``a/b.jsonl.gz`` of the input becomes ``a/b.jsonl`` of the output,
    which appears when it is whole. A task that was killed goes on in the middle of its file.

    Parameters
    ----------
    model : str or path
        Folder or hub id of a reward model of any kind. Each task loads it.
    input_folder, output_folder : str or path
        On a disk that all machines share. All ``*.jsonl`` and ``*.jsonl.gz`` are read.
    loading : mapping, optional
        Settings of :func:`companion.scoring.load_scorer`: ``dtype``, ``max_length``, ….
    **settings
        Those of :func:`companion.scoring.score_file`: ``fields``, ``on_error``, ….

    Raises
    ------
    DataError
        For a folder without such files, two files of one output, or as :func:`score_file` does.
    CompanionError
        If datatrove is not installed.
    """

    type = "SCORER"
    name = "rewards"

    def __init__(
        self,
        model: str | os.PathLike[str],
        input_folder: str | os.PathLike[str],
        output_folder: str | os.PathLike[str],
        *,
        loading: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.model = str(model)
        self.input_folder, self.output_folder = str(input_folder), str(output_folder)
        self.loading, self.settings = dict(loading or {}), settings

    def files(self) -> dict[Path, Path]:
        """Every file of the input and where its scores go, in order."""
        source, target = Path(self.input_folder), Path(self.output_folder)
        found = sorted([*source.rglob("*.jsonl"), *source.rglob("*.jsonl.gz")])
        names = [str(file.relative_to(source)).removesuffix(".gz") for file in found]
        if not found or len(set(names)) < len(names):
            why = "a file stands there packed and plain" if found else "no .jsonl and no .jsonl.gz"
            raise DataError(f"{source}: {why}", "give a folder of such files, each once")
        return {file: target / name for file, name in zip(found, names, strict=True)}

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Score every `world_size`-th file from `rank` on; documents of other steps pass by."""
        yield from data or ()
        own = list(self.files().items())[rank::world_size]
        if not own:
            return
        scorer = load_scorer(self.model, **self.loading)
        for source, target in own:
            with self.track_time("file"):
                report = score_file(
                    scorer, source, target, whole=True, allow_empty=True, **self.settings
                )
            self.stat_update("rows", value=report.rows, unit="file")
            self.stat_update("without_score", value=report.without_score, unit="file")
