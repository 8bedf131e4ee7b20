"""How long a request may wait for room, by the client that its route has: a refusal harms them.

A server that is full and says so at once does no good to these clients: they count their tries, not
the seconds. So a request waits, and is refused only where waiting longer would end in the client's
own timeout. Chapter 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Patience:
    """What a route's clients bear.

    Attributes
    ----------
    room : float
        Seconds that a request may wait until the queue has room for it.
    answer : float
        Seconds from its arrival until its answer, waiting included; then 504.
    full : int
        The status of a refusal.
    source : str
        Where that is known from.
    """

    room: float
    answer: float
    full: int
    source: str


#: protocol -> its clients' patience
PATIENCE: Final[dict[str, Patience]] = {
    "native": Patience(
        60.0,
        110.0,
        429,
        "our own RemoteScorer: 120 s a try, repeats 429 and 503 with pauses, six times",
    ),
    "vllm": Patience(
        240.0,
        280.0,
        503,
        "verl 0.9.1, experimental/reward_loop: aiohttp's total timeout of 300 s; 4xx is fatal to "
        "the run, 5xx is repeated 16 times over 331 s",
    ),
    "openrlhf": Patience(
        150.0,
        175.0,
        503,
        "OpenRLHF 0.11.2, utils/remote_rm_utils.py: 180 s a try, five tries a second apart "
        "whatever the status, then the reward is None",
    ),
}
