"""What the sampler and the searches give. Chapters 3 and 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion.

    Attributes
    ----------
    text : str
        Without special tokens.
    token_ids : list of int
        As the policy wrote them, with the EOS that ended it. With a prefix, the prefix too.
    terminated : bool
        Whether the policy ended it; False where it was cut off by the limit or a stop text.
    n_tokens : int
        Tokens that were generated (a prefix does not count), EOS included.
    logprob : float
        Log-probability of the generated tokens in nats, at the temperature that they were drawn
        with (at 1 for temperature 0), before top-p.
    stopped : bool
        Whether a stop text ended it.
    """

    text: str
    token_ids: list[int]
    terminated: bool
    n_tokens: int
    logprob: float
    stopped: bool = False


class Logprobs(NamedTuple):
    """Log-probabilities of completions, in nats.

    Attributes
    ----------
    sums : numpy.ndarray
        ``[N]`` float64.
    tokens : list of numpy.ndarray
        Of each completion, ``[its tokens]`` float64.
    """

    sums: np.ndarray
    tokens: list[np.ndarray]
