"""What loading returns and everything else takes: model, tokenizer, formatter, manifest.

Chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from companion.formatting import Overlong, RewardFormatter, TextMode
from companion.models.manifest import RewardManifest
from companion.models.readout import Readout, ScalarReadout


@dataclass
class RewardModel:
    """A reward model with all that decides its scores.

    Attributes
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A sequence-classification model with one label, or a token-classification model, its head in
        fp32.
    tokenizer : transformers.PreTrainedTokenizerBase
        With a pad token that differs from its EOS.
    formatter : RewardFormatter
        The only way from a row to token ids.
    manifest : RewardManifest or None
        None for a model that was not saved by the companion, or was not trained yet.
    notes : list of str
        What was repaired or assumed on the way, a line each; show them to the user.
    readout : ScalarReadout, TokenReadout or None
        How its values are read. None for a token-level model before training has said so.
    source : tuple of str and (str or None), or None
        Folder or hub id, and its revision, whose weights these are, perhaps in another dtype; None
        for weights that were changed since, or merged with those of an adapter.
    """

    model: Any
    tokenizer: Any
    formatter: RewardFormatter
    manifest: RewardManifest | None = None
    notes: list[str] = field(default_factory=list)
    readout: Readout | None = field(default_factory=ScalarReadout)
    source: tuple[str, str | None] | None = None

    @property
    def pad_token_id(self) -> int:
        """The id that batches are padded with."""
        return int(self.tokenizer.pad_token_id)

    def read_texts(
        self,
        max_length: int | None = None,
        overlong: Overlong | None = None,
        text: TextMode | None = None,
    ) -> None:
        """Take another limit of length, way with what is longer, or way to read text, if given."""
        if max_length is not None or overlong is not None or text is not None:
            self.formatter = self.formatter.changed(
                max_length=max_length, overlong=overlong, text=text
            )
