"""A subject of a model here, as small as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from companion.audit import Batch, Subject
from companion.audit.subject import BudgetSpent
from companion.formatting import Row


class StandIn(Subject):
    """A stock model and its tokenizer; a manifest's formatter where one is given."""

    def __init__(self, name: str, model: Any, tokenizer: Any, formatter: Any = None) -> None:
        self.name, self.what = name, "folder"
        self.abilities = frozenset({"ids", "tokenizer", "config", "weights", "padding"})
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.formatter = formatter
        self.manifest = object() if formatter is not None else None  # type: ignore[assignment]
        self.max_tokens = 30_000
        self._memo: dict[tuple[int, ...], float] = {}

    def call(self, batch: Batch) -> np.ndarray:
        return self.alone(batch.ids)

    def call_rows(self, rows: Sequence[Row]) -> np.ndarray:
        return self.alone([self.encode(row) for row in rows])

    def alone(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        for own in map(tuple, ids):
            if own not in self._memo:
                if self.max_tokens is not None and self.tokens + len(own) > self.max_tokens:
                    raise BudgetSpent("spent")
                self.tokens += len(own)
                with torch.no_grad():
                    self._memo[own] = self.model(torch.tensor([own])).logits.item()
        return np.array([self._memo[tuple(own)] for own in ids])

    def tolerance(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        return np.full(len(ids), 1e-5)

    def encode(self, row: Row) -> list[int]:
        if self.formatter is not None:
            return list(self.formatter.encode_row(row).input_ids)
        assert isinstance(row, dict)
        prompt, completion = row["prompt"], row["completion"]
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(prompt + completion)["input_ids"])
        talk = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        return list(self.tokenizer.apply_chat_template(talk, return_dict=False))
