"""The one way from a row to token ids. Chapter 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.formatting.encoded import (
        REMARKS as REMARKS,
        Encoded as Encoded,
        FormatCounts as FormatCounts,
    )
    from companion.formatting.formatter import (
        Overlong as Overlong,
        RewardFormatter as RewardFormatter,
        Row as Row,
        Text as Text,
        TextMode as TextMode,
    )
    from companion.formatting.prompts import encode_prompts as encode_prompts
    from companion.formatting.recipe import (
        RECIPE_FILE as RECIPE_FILE,
        recipe_fingerprint as recipe_fingerprint,
    )
    from companion.formatting.steps import (
        EncodedSteps as EncodedSteps,
        as_conversation as as_conversation,
        encode_steps as encode_steps,
        split_steps as split_steps,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
