"""A judge's model behind an OpenAI-compatible server: vLLM, SGLang, transformers, OpenAI.

The ``openai`` client sends the requests; it repeats what failed for a passing reason (no
connection, 408, 409, 429, 5xx) with growing pauses, and waits as long as the server asks. A reply
that is no chat completion is asked for again here. Chapter 3.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import accumulate
from typing import Any, Final

from companion.errors import JudgeError
from companion.judge.backend import Answer, Question
from companion.judge.probabilities import verdict_probabilities

_KEPT = "what was answered is in the cache: the same command goes on from there"


class ServerBackend:
    """A model behind ``POST {base_url}/chat/completions``. Chapter 3.

    Parameters
    ----------
    model : str
        The name that the server knows it by. Cached answers go by this name: a server that serves
        another model under the same name needs another cache.
    base_url : str
        Up to and with ``/v1``.
    api_key_env : str
        Environment variable with the key; a server on your own machine needs none.
    timeout : float
        Seconds to wait for one answer.
    max_retries : int
        How often a request is repeated.
    concurrency : int
        Requests on their way at one time.
    requests_per_minute : float, optional
        Upper bound on how often a request is begun.
    chat_template_kwargs : mapping, optional
        Sent along, for servers that apply a chat template: ``{"enable_thinking": False}``.
    request : mapping, optional
        Fields to put into each request's body; None takes a field out. Models that do not take
        ``temperature`` or ``logprobs`` need ``{"temperature": None, "logprobs": None,
        "top_logprobs": None}``; newer OpenAI models want ``max_completion_tokens``.

    Raises
    ------
    JudgeError
        If the ``openai`` package is missing.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        max_retries: int = 6,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise JudgeError(
                "a judge behind a server needs the package 'openai'",
                "pip install 'reward-model-companion[judge]'",
            ) from error
        if concurrency < 1 or max_retries < 0 or not 0 < timeout < math.inf:
            raise JudgeError(
                f"concurrency {concurrency}, max_retries {max_retries}, timeout {timeout}",
                "use at least 1, 0 and a positive number",
            )
        self.name, self.base_url, self.api_key_env = model, base_url, api_key_env
        self.max_retries, self.concurrency = max_retries, concurrency
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.request = dict(request or {})
        self.retries = 0
        self._pace = _Pace(requests_per_minute)
        self._lock = threading.Lock()
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get(api_key_env) or "none",
            timeout=timeout,
            max_retries=max_retries,
        )

    def identity(self) -> dict[str, Any]:
        """Name and settings. Not the address: a job that starts again may sit on another node."""
        return {
            "server_model": self.name,
            "chat_template_kwargs": self.chat_template_kwargs,
            "request": self.request,
        }

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """See :class:`companion.judge.Backend`. What the server rejects is refused."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = {pool.submit(self._ask, q): place for place, q in enumerate(questions)}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:  # an error, or a caller that stops: what has not begun never does
                pool.shutdown(wait=True, cancel_futures=True)

    #: of each request, beside model and messages
    _fields = ("temperature", "max_tokens", "logprobs", "top_logprobs", "chat_template_kwargs")

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "logprobs": True,
            "top_logprobs": 20,
        }
        if self.chat_template_kwargs:
            body["chat_template_kwargs"] = self.chat_template_kwargs
        body |= self.request
        return {key: value for key, value in body.items() if value is not None}

    def _ask(self, question: Question) -> Answer:
        import openai

        for attempt in range(self.max_retries + 1):
            self._pace.wait()
            try:
                raw = self._client.chat.completions.with_raw_response.create(
                    model=self.name,
                    messages=list(question.messages),  # type: ignore[arg-type]
                    extra_body=self._body(question),
                )
            except openai.APIStatusError as error:
                return self._rejected(error)
            except openai.APIConnectionError as error:  # timeouts too
                raise JudgeError(
                    f"{self.base_url}: no answer after {self.max_retries + 1} tries: "
                    f"{type(error.__cause__ or error).__name__}",
                    f"see whether the server is up; {_KEPT}",
                ) from error
            answer = _read(raw.text, question)
            again = answer is None and attempt < self.max_retries
            with self._lock:
                self.retries += raw.retries_taken + again
            if answer is not None:
                return answer
            if again:
                time.sleep(min(0.5 * 2**attempt, 8.0))
        raise JudgeError(
            f"{self.base_url}: the reply is no chat completion: {raw.text[:80]!r}",
            "does the address end in /v1, and is it a chat server?",
        )

    def _setting(self, error: Any) -> str | None:
        """The field of each request that the server does not take; None if a question is at fault.

        OpenAI names it (``param``, ``code``); others in words.
        """
        said, body = _message(error), error.body if isinstance(error.body, dict) else {}
        if _OF_TEXT.search(said) or not (_UNKNOWN.search(said) or body.get("code")):
            return None
        names = sorted({*self._fields, *self.request}, key=len, reverse=True)
        if body.get("param") in names:
            return str(body["param"])
        return next((name for name in names if re.search(rf"\b{re.escape(name)}\b", said)), None)

    def _rejected(self, error: Any) -> Answer:
        """A fault of the question is an answer; one of server, key or address is an error."""
        said = f"{error.status_code}: {_message(error)}"
        if error.status_code in (400, 422) and (name := self._setting(error)) is not None:
            raise JudgeError(
                f"{self.base_url}: does not take the setting {name!r} of each request, {said}",
                f"{_OTHER.get(name, _TAKE_OUT.format(name))} (null takes a field out); {_KEPT}",
            ) from error
        if error.status_code in (400, 413, 422):
            return Answer("", False, refused=f"the server rejects the request, {said}")
        cures = {
            401: f"set {self.api_key_env} to a key that this server knows",
            403: f"set {self.api_key_env} to a key that may use this model",
            404: "check the model's name, and that the address ends in /v1",
        }
        raise JudgeError(
            f"{self.base_url}: {said}",
            cures.get(error.status_code, f"tried {self.max_retries + 1} times; {_KEPT}"),
        ) from error


#: settings that models of today do not take: what to write in their place
_TAKE_OUT: Final = """--request '{{"{0}": null}}'"""
_OTHER: Final = {
    "max_tokens": """--request '{"max_tokens": null, "max_completion_tokens": 4096}'""",
    "max_completion_tokens": """--request '{"max_completion_tokens": null}' and --max_tokens""",
    "logprobs": """--request '{"logprobs": null, "top_logprobs": null}'""",
    "top_logprobs": """--request '{"logprobs": null, "top_logprobs": null}'""",
}
#: what a server says of a setting that it does not know, or not with this value; and of a text
_UNKNOWN: Final = re.compile(
    r"unsupported|not supported|does not support|unrecogni[sz]ed|unknown|unexpected|not permitted|"
    r"not allowed|extra (inputs|fields)|deprecated|invalid (value|parameter)|incompatible|"
    r"instead",
    re.IGNORECASE,
)
_OF_TEXT: Final = re.compile(r"context|too (long|large|many)|maximum|input tokens", re.IGNORECASE)


class _Pace:
    """Lets requests begin no faster than so many a minute, evenly spaced."""

    def __init__(self, per_minute: float | None) -> None:
        if per_minute is not None and not 0 < per_minute < math.inf:
            raise JudgeError(f"requests_per_minute is {per_minute}", "use a positive number")
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._gap
        if begin > now:
            time.sleep(begin - now)


def _message(error: Any) -> str:
    body = error.body
    said = body.get("message") or body.get("detail") if isinstance(body, dict) else body
    return str(said or error.message)[:300]


def _read(reply: str, question: Question) -> Answer | None:
    """The answer in a reply; None if it is no chat completion."""
    try:
        choice = json.loads(reply)["choices"][0]
        text = _text(choice["message"].get("content"))
        reason = choice.get("finish_reason")
        finished = isinstance(reason, str) and reason.lower() in _ENDED
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    kept = bool(text.strip()) and (finished or reason in _CUT)
    return Answer(
        text, finished, _probabilities(choice, text, question) if finished else None, kept=kept
    )


#: what servers say of an answer that the model ended; of one that ``max_tokens`` cut off, which it
#: would do again. Any other (abort, content_filter, error, tool_calls, none) is no end of an answer
_ENDED: Final = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
_CUT: Final = ("length", "max_tokens", "model_length")


def _text(content: Any) -> str:
    """The text of a message: of a list of parts those of text, joined; of null none."""
    if isinstance(content, (list, tuple)):
        content = "".join(p["text"] for p in content if p.get("type", "text") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(type(content).__name__)
    return content or ""


def _probabilities(choice: Mapping[str, Any], text: str, question: Question) -> Any:
    """From the likeliest tokens that the server sends along, if it does."""
    try:
        tokens = (choice.get("logprobs") or {}).get("content") or []
        pieces = [str(token["token"]) for token in tokens]
        begin = "".join(pieces).find(text)
        if not pieces or begin < 0:  # none were sent, or a parser took the text apart
            return None
        starts = list(accumulate(map(len, pieces), initial=-begin))
        return verdict_probabilities(
            question.template,
            text,
            len(pieces),
            starts.__getitem__,
            lambda place: [
                (str(other["token"]), float(other["logprob"]))
                for other in tokens[place].get("top_logprobs") or [tokens[place]]
            ],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # an answer without usable probabilities is an answer still
