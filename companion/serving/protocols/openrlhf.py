"""OpenRLHF's route ``/get_reward``, as its 0.11.2 asks it.

Its ``query`` is the text that the policy saw and wrote, decoded with its special tokens: so nothing
is added in front, and the end is written only where the policy wrote it. Its client makes None of
any refusal after five tries, without a word: so what is too long is cut, the server's starter
having said so, and counted in ``extra_logs``. Chapter 6.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from companion.errors import CompanionError, DataError
from companion.serving.protocols.routes import NotFinite, Unsupported, call_of, post, service_of
from companion.serving.service import Service, cut_tokens

logger = logging.getLogger(__name__)
router = APIRouter(tags=["OpenRLHF"])


class GetReward(BaseModel):
    """What OpenRLHF sends."""

    model_config = ConfigDict(extra="forbid")

    query: list[str]
    prompts: list[str] | None = None
    labels: list[Any] | None = None


def error_body(
    status: int, kind: str, error: CompanionError, index: int | None, request_id: str
) -> dict[str, Any]:
    """A refusal; OpenRLHF's client prints it."""
    return {"detail": str(error), "type": kind, "index": index, "id": request_id}


def _rows(service: Service, body: GetReward) -> list[Any]:
    """Queries as rows: prompt and completion where the prompt is known, and whether it ended."""
    tokenizer = service.scorer.tokenizer
    ends = [tokenizer.decode([end]) for end in service.scorer.end_token_ids]
    rows = []
    for i, query in enumerate(body.query):
        text, terminated = query, False
        for end in ends:
            if end and text.rstrip("\n").endswith(end):
                text, terminated = text.rstrip("\n").removesuffix(end), True
                break
        prompt = body.prompts[i] if body.prompts is not None else ""
        row: dict[str, Any] = {"terminated": terminated, "drawn": True}
        if prompt and text.startswith(prompt) and len(text) > len(prompt):
            row |= {"prompt": prompt, "completion": text[len(prompt) :]}
        else:
            row |= {"text": text}
        rows.append(row)
    return rows


async def get_reward(request: Request, body: GetReward) -> dict[str, Any]:
    """OpenRLHF's route: ``rewards`` and ``scores``, raw, in the order of ``query``.

    The server has to be started with ``--overlong``, which says what becomes of texts that are too
    long: this client takes a refusal for a missing reward.
    """
    service = service_of(request)
    if service.scorer.readout.kind != "scalar":
        raise Unsupported(
            "/get_reward carries one score a text, and the model has values of tokens",
            "ask /v1/steps",
        )
    if not request.app.state.overlong_chosen:
        raise Unsupported(
            "/get_reward is off: nobody said what becomes of texts that are too long",
            "start the server with --overlong truncate_prompt (cut, and counted) or error",
        )
    for name, given in (("prompts", body.prompts), ("labels", body.labels)):
        if given is not None and len(given) != len(body.query):
            raise DataError(f"{name} has {len(given)} entries, query has {len(body.query)}")
    call = call_of(request, "openrlhf")
    prepared, scores = await service.score(call, lambda: _rows(service, body), name="query")
    for i, reason in enumerate(scores.reasons):
        if reason is not None:
            raise NotFinite(f"query[{i}]: {reason}", "serve the model in float32")
    cut = [cut_tokens(text) for text in prepared.texts]
    service.metrics.cut(sum(cut))
    rewards = scores.raw.tolist()
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {"tokens_cut": [float(n) for n in cut]},
    }


post(
    router,
    "/get_reward",
    GetReward,
    get_reward,
    protocol="openrlhf",
    error_body=error_body,
    examples=[{"query": ["What is 2 + 3? The answer is 5."], "prompts": ["What is 2 + 3?"]}],
    answers={"rewards": [1.25], "scores": [1.25], "extra_logs": {"tokens_cut": [0.0]}},
)
