"""What was scored, a line of JSON for each text: ids and scores; the words only if asked.

A client's words may be private, and token ids are those words in another alphabet: so nothing is
written unless a folder was named. Chapter 6.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from companion.errors import DataError
from companion.formatting import Encoded, EncodedSteps
from companion.scoring import Prepared, ids_of


class RequestLog:
    """Writes ``requests-<process>.jsonl`` into a folder.

    Each line has ``time`` (Unix seconds), ``request``, ``protocol``, ``index``, ``input_ids``,
    ``raw`` (null for a text without a score), ``model_version``, ``warnings`` (of the text's form
    or template); of a text that came as words ``prompt_length``, ``cut_tokens`` and ``terminated``,
    which are null for token ids; with `text` also ``item``, what the client sent.
    :func:`companion.monitoring.summarise_traffic` reads them.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], version: str, *, text: bool = False) -> None:
        self.version = version
        self.text = text
        path = Path(folder) / f"requests-{os.getpid()}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            os.chmod(path, 0o600)
        except OSError as error:
            raise DataError(f"--log_dir: {path}: {error.strerror}") from error
        self._lock = threading.Lock()

    def write(
        self,
        request: str,
        protocol: str,
        items: Sequence[Any],
        prepared: Prepared,
        scores: Any,
        warnings: Sequence[Sequence[str]],
    ) -> None:
        """Lines for all texts of a request."""
        now = time.time()
        lines = []
        for index, text in enumerate(prepared.texts):
            raw = float(scores.raw[index])
            encoded = text if isinstance(text, Encoded) else text.encoded
            # (vLLM's route hands over ids, which it made of messages itself)
            words = encoded.prompt_length > 0 or not isinstance(
                items[index], (Encoded, EncodedSteps)
            )
            line: dict[str, Any] = {
                "time": round(now, 3),
                "request": request,
                "protocol": protocol,
                "index": index,
                "input_ids": list(ids_of(text)),
                "raw": raw if raw == raw else None,
                "model_version": self.version,
                "prompt_length": encoded.prompt_length if words else None,
                "cut_tokens": encoded.cut_tokens if words else None,
                "terminated": encoded.terminated if words else None,
                "warnings": list(warnings[index]),
            }
            if self.text:
                line["item"] = items[index]
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        with self._lock:
            self._file.write("".join(lines))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
