"""verl's reward, asked of ``companion serve``. Chapter 6.

Stock verl (0.9.1) has no setting for a reward model that runs elsewhere, and its own client of a
vLLM server strips the EOS and applies a chat template again, so that a finished and a cut-off
response arrive as one text; it also gives up at once on a 429. This class is the way in that verl
offers (``reward.reward_manager.source=importlib``): it sends the messages, the response and whether
it was ``terminated`` to ``/v1/rewards``, waits for a server that is busy or restarts, and raises
where there is no reward.

It runs in verl's environment, which has other versions of torch and transformers than the
companion: ``pip install --no-deps reward-model-companion`` there, or its folder on PYTHONPATH, is
enough.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from companion.errors import DataError, ServiceError
from companion.models.ends import policy_end_ids

try:  # what verl's base class may learn later is inherited
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
except ImportError:  # not in verl's environment: tests, pages, type checkers
    RewardManagerBase = object

logger = logging.getLogger(__name__)

#: Environment variables, for what verl's configuration does not say (a key does not belong there).
URL_VARIABLE: Final = "COMPANION_REWARD_URL"
KEY_VARIABLE: Final = "COMPANION_REWARD_API_KEY"
#: Answers after which a request is sent again: busy, and what a restart looks like.
RETRIED: Final = (429, 500, 502, 503, 504)
SCALES: Final = ("raw", "centered", "z", "percentile")
#: Longest pause between two tries, in seconds.
_LONGEST_PAUSE: Final = 30.0
#: Responses in a row without an end of turn after which it is said that something seems wrong.
_MANY: Final = 64
_SETTINGS: Final = (
    *("url", "return", "model_version", "eos_token_ids"),
    *("unscored", "timeout", "patience", "connections"),
)


class RewardManager(RewardManagerBase):  # type: ignore[misc, unused-ignore]
    """Rewards of verl's responses, from one or several servers of the companion.

    Its settings are those below ``reward.reward_kwargs`` of verl's configuration, each by
    ``+reward.reward_kwargs.NAME=VALUE``:

    url
        Of the server, ``http://host:8000``, or a list of them, which are asked in turn; default:
        the environment's ``COMPANION_REWARD_URL``, several separated by commas.
    return
        ``raw`` (default), ``centered``, ``z`` or ``percentile``.
    model_version
        The version that has to answer. Without it, a version that changes in the middle of the run
        is said in the log, once.
    eos_token_ids
        The policy's tokens that end a response; default: those of its tokenizer, its generation
        config and its chat template.
    unscored
        The reward of a response that the server has no score for (an empty one, one that is too
        long), which is counted. Without it (default) such a response ends the run.
    timeout
        Seconds without a byte after which a try is given up (600).
    patience
        Seconds that a response is tried for, while the server is busy, away or restarting (3,600).
    connections
        Most connections of one reward worker (256).

    The environment's ``COMPANION_REWARD_API_KEY`` is sent as a bearer token.

    Parameters
    ----------
    config : DictConfig
        verl's whole configuration.
    tokenizer : PreTrainedTokenizerBase
        The policy's.
    compute_score, reward_router_address, reward_model_tokenizer
        What verl hands to every manager. Not used.

    Attributes
    ----------
    counts : Counter
        ``rewards``, ``retries``, ``cut_off`` and ``unscored`` so far.

    Raises
    ------
    DataError
        Without a URL, or for a setting that does not exist or cannot be.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        if RewardManagerBase is not object:
            super().__init__(config, tokenizer, compute_score)
        self.tokenizer = tokenizer
        settings: Mapping[str, Any] = config.reward.get("reward_kwargs") or {}
        unknown = sorted(set(settings) - set(_SETTINGS))
        if unknown:
            raise DataError(
                f"reward.reward_kwargs: {', '.join(unknown)}: no such setting",
                f"use: {', '.join(_SETTINGS)}",
            )
        urls = settings.get("url") or os.environ.get(URL_VARIABLE, "")
        urls = urls.split(",") if isinstance(urls, str) else list(urls)
        self.urls = [url.strip().rstrip("/") for url in urls if url.strip()]
        if not self.urls or not all(url.startswith(("http://", "https://")) for url in self.urls):
            raise DataError(
                f"the reward server's URL is {', '.join(self.urls) or 'missing'}",
                f"+reward.reward_kwargs.url=http://host:8000, or set {URL_VARIABLE}",
            )
        self.scale = str(settings.get("return") or "raw")
        if self.scale not in SCALES:
            raise DataError(f"return is {self.scale!r}", f"use one of: {', '.join(SCALES)}")
        self.model_version = settings.get("model_version")
        self.unscored = None if settings.get("unscored") is None else _number(settings, "unscored")
        self.timeout = _number(settings, "timeout", 600.0)
        self.patience = _number(settings, "patience", 3600.0)
        self.connections = int(_number(settings, "connections", 256.0))
        ends = settings.get("eos_token_ids")
        self.eos_token_ids = frozenset(
            _ends_of(config, tokenizer) if ends is None else map(int, ends)
        )
        if not self.eos_token_ids:
            raise DataError(
                "no token is known that ends a response, so all would count as cut off",
                "+reward.reward_kwargs.eos_token_ids=[…] with the policy's",
            )
        self.counts: Counter[str] = Counter()
        self._turn = random.randrange(len(self.urls))  # workers do not all begin with one server
        self._cut_in_a_row = 0
        self._version = self.model_version
        self._session: tuple[Any, Any] = (None, None)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of a response.

        Parameters
        ----------
        data : DataProto
            One item; of several outputs of one rollout the last, as in verl's own managers.

        Returns
        -------
        dict
            ``reward_score`` (float), and in ``reward_extra_info``, which verl logs: ``raw``,
            ``n_tokens``, ``cut_tokens``, ``terminated`` and ``unscored``.

        Raises
        ------
        ServiceError
            If the server refuses the item, has no score for it, or cannot be reached within
            ``patience``. verl ends the run then; a missing reward would be trained on.
        DataError
            For a rollout of several turns, which is no single response.
        """
        item = data[-1:][0]
        completion, terminated = self._response(item)
        body: dict[str, Any] = {
            "items": [
                {
                    "prompt": [_message(turn) for turn in item.non_tensor_batch["raw_prompt"]],
                    "completion": [{"role": "assistant", "content": completion}],
                    "terminated": terminated,
                    "drawn": True,
                }
            ],
            "return": sorted({"raw", self.scale}),
        }
        if self.model_version is not None:
            body["model_version"] = self.model_version
        status, answer, url = await self._post(body)
        found, why = self._read(status, answer, url)
        extra: dict[str, float] = {
            "raw": math.nan,
            "n_tokens": 0,
            "cut_tokens": 0,
            "terminated": float(terminated),
            "unscored": float(found is None),
        }
        if found is None:
            if self.unscored is None:
                raise ServiceError(
                    f"{url}: no reward for a response of {len(completion)} characters: {why}",
                    "+reward.reward_kwargs.unscored=NUMBER gives such responses a fixed reward",
                )
            self._count("unscored", f"responses without a score get {self.unscored}: {why}")
            return {"reward_score": self.unscored, "reward_extra_info": extra}
        self._count("rewards")
        extra |= {name: found.get(name) or 0 for name in ("n_tokens", "cut_tokens")}
        extra["raw"] = float(found["raw"])
        return {"reward_score": float(found[self.scale]), "reward_extra_info": extra}

    # ------------------------------------------------------------------ verl's side

    def _response(self, item: Any) -> tuple[str, bool]:
        """The response's text, and whether it came to its end."""
        turns = item.non_tensor_batch.get("__num_turns__")
        if turns is not None and int(turns) > 2:
            raise DataError(
                f"a rollout of {int(turns)} turns: its responses hold what tools and users said",
                "score it with a manager of your own, on the messages of its agent loop",
            )
        ids = item.batch["responses"]
        # verl's managers read the last len(ids) entries of the mask, which is wrong for one of
        # several outputs: there each is padded on the right only (agent_loop.py, 0.9.1)
        n = item.non_tensor_batch.get("response_len")
        if n is None:
            n = item.batch["attention_mask"][-ids.shape[-1] :].sum()
        own = [int(token) for token in ids[: int(n)]]
        terminated = bool(own) and own[-1] in self.eos_token_ids
        self._cut_in_a_row = 0 if terminated else self._cut_in_a_row + 1
        if not terminated:
            self.counts["cut_off"] += 1
        if self._cut_in_a_row == _MANY:
            logger.warning(
                f"{_MANY} responses in a row end with none of the tokens "
                f"{sorted(self.eos_token_ids)}: if the policy ends its turns with another, give "
                "+reward.reward_kwargs.eos_token_ids=[…]; if they are cut off, raise "
                "data.max_response_length"
            )
        text = self.tokenizer.decode(own[:-1] if terminated else own, skip_special_tokens=True)
        return text, terminated

    # ------------------------------------------------------------------ the server's side

    def _read(self, status: int, answer: Any, url: str) -> tuple[dict[str, Any] | None, str | None]:
        """The item's rewards, or why there are none; an error for anything else."""
        if status != 200:
            error = answer.get("error") if isinstance(answer, dict) else None
            said = error if isinstance(error, dict) else {"message": str(answer)[:500]}
            if status == 400 and said.get("index") is not None:
                return None, str(said.get("message"))
            cure = said.get("cure") or "the server's log says why"
            raise ServiceError(f"{url}: answered {status}: {said.get('message')}", str(cure))
        try:
            (found,) = answer["rewards"]
            version = str(answer["model_version"])
            values = [found["raw"], found[self.scale]]
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceError(
                f"{url}: the answer does not fit /v1/rewards: {error!r}",
                "is this a server of the companion, of a version like this one?",
            ) from error
        if self._version is not None and version != self._version:
            self._count(
                "versions",
                f"{url}: rewards of the version {version}, after those of {self._version}: pin it "
                "by +reward.reward_kwargs.model_version",
            )
        self._version = version
        if any(value is None or not math.isfinite(value) for value in values):
            return None, str(found.get("reason") or "the score is not finite")
        return found, None

    async def _post(self, body: dict[str, Any]) -> tuple[int, Any, str]:
        """A status, what was answered, and by whom; tries again for ``patience`` seconds."""
        begin, tries = time.monotonic(), 0
        while True:
            url = self.urls[self._turn % len(self.urls)]
            self._turn += 1
            status, answer, wait = await self._ask(f"{url}/v1/rewards", body)
            if status is not None and status not in RETRIED:
                return status, answer, url
            tries += 1
            # several workers must not come back in step
            pause = 0.5 * 2 ** min(tries - 1, 10) * random.uniform(0.5, 1.0)
            pause = min(_LONGEST_PAUSE, max(pause, wait))
            spent = time.monotonic() - begin
            why = f"{status or 'no answer'}: {answer}"[:500]
            if spent + pause > self.patience:
                raise ServiceError(
                    f"{url}: no reward after {tries} tries in {spent:.0f} s (the last: {why})",
                    "check that the server runs and is large enough, or raise "
                    "+reward.reward_kwargs.patience",
                )
            self._count("retries", f"{url}: tried again, in {pause:.1f} s: {why}")
            await asyncio.sleep(pause)

    async def _ask(self, where: str, body: dict[str, Any]) -> tuple[int | None, Any, float]:
        """Status, answer and ``Retry-After`` of one try; no status if there was no answer."""
        import aiohttp  # verl has it

        try:
            async with self._connection().post(where, json=body) as response:
                text = await response.text()
                status, said = response.status, response.headers.get("Retry-After", "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return None, f"{type(error).__name__} {error}", 0.0
        wait = float(said) if said.isdecimal() else 0.0
        try:
            return status, json.loads(text), wait
        except ValueError:
            return status, text, wait

    def _connection(self) -> Any:
        """One session for each event loop: verl may run its batches by loops of their own."""
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session[0] is not loop:
            key = os.environ.get(KEY_VARIABLE)
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.connections),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=self.timeout),
                headers={"Authorization": f"Bearer {key}"} if key else None,
            )
            self._session = (loop, session)
        return self._session[1]

    def _count(self, name: str, said: str | None = None) -> None:
        self.counts[name] += 1
        if said is not None and self.counts[name] == 1:
            logger.warning(said)


def _ends_of(config: Any, tokenizer: Any) -> set[int]:
    """Tokens that end the policy's responses, by its tokenizer and, if it lies here, its folder."""
    path = config.actor_rollout_ref.model.path
    ends = set(policy_end_ids(tokenizer))
    return ends | set(policy_end_ids(path)) if os.path.isdir(path) else ends


def _message(turn: Any) -> dict[str, Any]:
    """A message as JSON can carry it: verl hands over arrays of NumPy's."""
    content = turn["content"]
    return {**turn, "content": content if isinstance(content, str) else list(content)}


def _number(settings: Mapping[str, Any], name: str, default: float = math.nan) -> float:
    given = settings.get(name)
    try:
        value = default if given is None else float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"reward.reward_kwargs.{name} is {given!r}", "give a number")
    return value
