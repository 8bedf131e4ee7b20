"""The dice of the sampler, as a part of transformers' ``generate``: each row has its own.

``generate`` draws from torch's global generator, one draw for the whole batch, so a completion
would change with its neighbours. Here each row has a stream of uniform numbers by which its
tokens are chosen (the inverse of the cumulated distribution), and ``generate`` is left the argmax
of what was chosen. Chapter 5.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from companion.errors import DataError


def uniforms(seed: int, ids: Sequence[int], sample: int, n: int) -> np.ndarray:
    """``[n]`` float64 in [0, 1): the stream of one sample of one prompt.

    It depends on the seed, the prompt's ids and the sample's number alone; a longer stream begins
    with the shorter one.
    """
    digest = hashlib.sha256(f"{seed}/{sample}/".encode() + np.asarray(ids, np.int64).tobytes())
    return np.random.default_rng(np.frombuffer(digest.digest(), np.uint32)).random(n)


class Dice(LogitsProcessor):
    """Choose each row's next token by its own stream, and keep what was chosen.

    All stays on the device until the end: a copy to the host waits for each step. Only a stop text
    needs one, of the newest tokens, since the tokenizer is not on the device.

    Parameters
    ----------
    streams : Tensor
        ``[R, T]`` float64 in [0, 1), a row for each completion.
    temperature : float
        0 takes the likeliest token.
    top_p : float
        In (0, 1]: the smallest set of likeliest tokens that holds so much probability.
    eos_token_ids : Tensor
        Tokens that end a completion.
    stop : str, optional
        A text that ends it too.
    tokenizer
        To read `stop` with.
    """

    def __init__(
        self,
        streams: Tensor,
        *,
        temperature: float,
        top_p: float,
        eos_token_ids: Tensor,
        stop: str | None,
        tokenizer: Any,
    ) -> None:
        self.streams = streams
        self.temperature = temperature
        self.warp = TopPLogitsWarper(top_p) if top_p < 1.0 else None
        self.eos_token_ids = eos_token_ids
        self.stop = stop
        self.tokenizer = tokenizer
        rows = len(streams)
        #: tokens that each row has so far, and how it ended
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=streams.device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=streams.device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=streams.device)
        #: as the host knows them, of as many steps as a stop text may take: it ends in the newest
        #: token, and a token has a byte at least
        self._newest: deque[list[int]] = deque(maxlen=len((stop or "").encode()) + 1)
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    @property
    def done(self) -> Tensor:
        """``[R]`` bool: rows that need no further token."""
        return self.ended | self.stopped

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores in which the chosen token alone is possible, ``[R, V]``."""
        step = len(self.tokens)
        if step == self.streams.shape[1]:  # generate may look one token ahead on a GPU
            return scores
        logprobs = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0.0:
            chosen = logprobs.argmax(dim=-1)
        else:
            kept = logprobs if self.warp is None else self.warp(input_ids, logprobs)
            cumulated = kept.double().exp().cumsum(dim=-1)
            point = self.streams[:, step, None] * cumulated[:, -1:]
            chosen = torch.searchsorted(cumulated, point, right=True).squeeze(-1)
            chosen.clamp_(max=scores.shape[-1] - 1)
        self.tokens.append(chosen)
        self.logprobs.append(logprobs.gather(-1, chosen[:, None]).squeeze(-1))
        going = ~self.done
        self.lengths += going
        self.ended |= going & torch.isin(chosen, self.eos_token_ids)
        if self.stop is not None:
            self._look_for_stop(going & ~self.ended)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(-1, chosen[:, None], 0.0)

    def _look_for_stop(self, going: Tensor) -> None:
        assert self.stop is not None
        newest = torch.where(going, self.tokens[-1], -1).tolist()  # the one read of this step
        self._newest.append(newest)
        rows = [row for row, token in enumerate(newest) if token >= 0]
        if not rows:
            return
        tails = [[tokens[row] for tokens in self._newest] for row in rows]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [False] * len(newest)
        for row, text in zip(rows, texts, strict=True):
            found[row] = self.stop in text
        if any(found):
            self.stopped |= torch.tensor(found, device=going.device)


class AllDone(StoppingCriteria):
    """Stops ``generate`` when each row has ended."""

    def __init__(self, dice: Dice) -> None:
        self.dice = dice

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """``[R]`` bool."""
        return self.dice.done


def check_settings(
    n: int, temperature: float, top_p: float, max_new_tokens: int, stop: str | None
) -> None:
    """Refuse settings of the sampler that mean nothing, with the cure."""
    if n < 1 or max_new_tokens < 1:
        raise DataError(f"n={n}, max_new_tokens={max_new_tokens}", "both must be at least 1")
    if not temperature >= 0:
        raise DataError(f"temperature is {temperature}", "use 0 or a positive number")
    if temperature == 0 and n > 1:
        raise DataError(f"{n} samples at temperature 0 would all be the same", "use n=1")
    if not 0 < top_p <= 1:
        raise DataError(f"top_p is {top_p}", "use a number in (0, 1]")
    if stop is not None and not stop:
        raise DataError("stop is an empty text", "use None")
