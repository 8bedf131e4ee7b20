"""The one way from a row to token ids; see :mod:`companion.formatting.formatter`."""

from companion.formatting.encoded import Encoded, FormatCounts
from companion.formatting.formatter import Overlong, RewardFormatter, Row, Text
from companion.formatting.recipe import RECIPE_FILE, recipe_fingerprint

__all__ = [
    "RECIPE_FILE",
    "Encoded",
    "FormatCounts",
    "Overlong",
    "RewardFormatter",
    "Row",
    "Text",
    "recipe_fingerprint",
]
