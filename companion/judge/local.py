"""A judge's model in this process, through transformers.

``generate`` runs the model, greedily. What a hub checkpoint sets in its ``generation_config.json``
(sampling, a repetition penalty) is not applied: a verdict is the model's likeliest text. Chapter 3.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from companion.batching import pad_batch, token_budget_batches
from companion.errors import DataError
from companion.formatting import RewardFormatter
from companion.formatting.prompts import encode_prompts
from companion.judge.asking import Answer, Question
from companion.judge.probabilities import verdict_probabilities
from companion.models.causal import load_causal
from companion.models.checkpoint import model_fingerprint

#: Tokens (prompts, and answers at their longest) of a batch: small on a CPU, large on a GPU.
_CPU_TOKENS, _GPU_TOKENS = 8192, 65_536
#: Likeliest tokens that are kept at each place, as many as servers give.
TOP = 20


class LocalBackend:
    """A causal language model of this process. Chapter 3.

    Parameters
    ----------
    model, tokenizer : PreTrainedModel, PreTrainedTokenizerBase
        The model in eval mode.
    name : str
        For reports.
    max_tokens_per_batch : int, optional
        Budget for questions × (longest prompt + ``max_tokens``); default 8,192 on a CPU, 65,536 on
        a GPU.
    chat_template_kwargs : mapping, optional
        For the chat template, such as ``{"enable_thinking": False}``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "model",
        max_tokens_per_batch: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.formatter = RewardFormatter(tokenizer)
        self.retries = 0
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        default = _GPU_TOKENS if self.device.type == "cuda" else _CPU_TOKENS
        self.max_tokens_per_batch = max_tokens_per_batch or default
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> LocalBackend:
        """Load the model; see :func:`companion.models.causal.load_causal` for what is refused."""
        model, tokenizer = load_causal(
            path_or_id,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(model, tokenizer, name=os.fspath(path_or_id), **options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def identity(self) -> dict[str, Any]:
        """The weights themselves, not the folder's name: a model that was trained on is another."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.model)
        return {
            "weights": self._fingerprint,
            "dtype": str(next(self.model.parameters()).dtype),
            "formatter": self.formatter.fingerprint(),
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """See :class:`companion.judge.asking.Backend`. A prompt that is too long is refused."""
        ids = self._encode(questions)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        fitting = []
        for place, question in enumerate(questions):
            size = len(ids[place]) + question.max_tokens
            if isinstance(limit, int) and size > limit:
                yield (
                    place,
                    Answer(
                        "",
                        False,
                        refused=f"{len(ids[place])} tokens and {question.max_tokens} for the "
                        f"answer are more than the model takes ({limit})",
                    ),
                )
            else:
                fitting.append(place)
        # the longest answer is the same for all questions of a call but in odd uses
        lengths = [len(ids[place]) + questions[place].max_tokens for place in fitting]
        for batch in token_budget_batches(lengths, self.max_tokens_per_batch):
            places = [fitting[i] for i in batch]
            yield from self._batch(places, [ids[i] for i in places], questions)

    def _encode(self, questions: Sequence[Question]) -> list[list[int]]:
        try:
            return encode_prompts(
                self.formatter,
                [question.messages for question in questions],
                chat_template_kwargs=self.chat_template_kwargs,
            )
        except DataError as error:
            raise DataError(
                f"the model's chat template refuses the question: {error.what}",
                "some models take no system message: use a template without one",
            ) from error

    @torch.no_grad()
    def _batch(
        self, places: Sequence[int], prompts: Sequence[list[int]], questions: Sequence[Question]
    ) -> Iterator[tuple[int, Answer]]:
        from transformers import GenerationConfig, LogitsProcessorList

        ends = self._ends()
        pad = self.tokenizer.pad_token_id
        pad = int(self.tokenizer.eos_token_id if pad is None else pad)  # the mask hides it
        batch = pad_batch(list(prompts), pad, "left")
        arguments = {key: value.to(self.device) for key, value in batch.items()}
        limits = [questions[place].max_tokens for place in places]
        likeliest = _Likeliest()
        before = self.model.generation_config
        # generate() fills what is None from the model's own; a fresh one has nothing to add
        self.model.generation_config = GenerationConfig()
        try:
            written = self.model.generate(
                **arguments,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(limits),
                    eos_token_id=ends,
                    pad_token_id=pad,
                    use_cache=True,
                ),
                logits_processor=LogitsProcessorList([likeliest]),
            )
        finally:
            self.model.generation_config = before
        new = written[:, arguments["input_ids"].shape[1] :].tolist()
        logprobs, tokens = likeliest.table()
        for row, place in enumerate(places):
            ids, finished = _until_end(new[row][: limits[row]], ends)
            yield (
                place,
                self._answer(questions[place].template, ids, finished, logprobs[row], tokens[row]),
            )

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's EOS and those of the checkpoint."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        more = said if isinstance(said, (list, tuple)) else [] if said is None else [said]
        return sorted({int(self.tokenizer.eos_token_id), *map(int, more)})

    def _answer(
        self,
        template: Any,
        ids: list[int],
        finished: bool,
        logprobs: list[list[float]],
        tokens: list[list[int]],
    ) -> Answer:
        def decode(part: list[int]) -> str:
            return str(self.tokenizer.decode(part, skip_special_tokens=True))

        def alternatives(place: int) -> Iterator[tuple[str, float]]:
            start = len(decode(ids[:place]))
            for token, logprob in zip(tokens[place], logprobs[place], strict=True):
                yield decode([*ids[:place], token])[start:], logprob

        text = decode(ids)
        probabilities = None
        if finished:
            probabilities = verdict_probabilities(
                template, text, len(ids), lambda place: len(decode(ids[:place])), alternatives
            )
        return Answer(text, finished, probabilities)


class _Likeliest:
    """Keeps the likeliest tokens of each step; a full distribution would fill the memory."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values, tokens = scores.float().log_softmax(dim=-1).topk(min(TOP, scores.shape[-1]))
        self.steps.append((values.cpu(), tokens.cpu()))
        return scores

    def table(self) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
        """Log-probabilities and token ids, ``[rows, steps, TOP]`` each."""
        values, tokens = zip(*self.steps, strict=True)
        return torch.stack(values, dim=1).tolist(), torch.stack(tokens, dim=1).tolist()


def _until_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """The ids before the first end token, and whether there was one."""
    place = next((i for i, token in enumerate(ids) if token in ends), None)
    return (ids, False) if place is None else (ids[:place], True)
