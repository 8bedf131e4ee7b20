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

from companion.errors import DataError
from companion.formatting.prompts import encode_prompts
from companion.generation.policy import Policy
from companion.judge.backend import Answer, Question
from companion.judge.probabilities import verdict_probabilities
from companion.judge.templates import JudgeTemplate
from companion.models.checkpoint import model_fingerprint

#: Likeliest tokens that are kept at each place, as many as servers give.
TOP = 20


class LocalBackend:
    """A causal language model of this process. Chapter 3.

    Parameters
    ----------
    policy : Policy
        The model; its budget is for questions × (longest prompt + ``max_tokens``), and is halved
        where a GPU's memory ends.
    name : str
        For reports.
    chat_template_kwargs : mapping, optional
        For the chat template, such as ``{"enable_thinking": False}``.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        name: str = "model",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy, self.name = policy, name
        self.retries = 0
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LocalBackend:
        """Load the model; options, and what is refused, as in :meth:`Policy.from_pretrained`."""
        policy = Policy.from_pretrained(path_or_id, **options)
        return cls(policy, name=os.fspath(path_or_id), chat_template_kwargs=chat_template_kwargs)

    @property
    def notes(self) -> list[str]:
        """As :attr:`companion.generation.Policy.notes`."""
        return self.policy.notes

    def identity(self) -> dict[str, Any]:
        """The weights and the configuration, not the folder's name: trained on, it is another."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.policy.model)
        return {
            "weights": self._fingerprint,
            "end_tokens": self.policy.eos_token_ids,
            "dtype": str(next(self.policy.model.parameters()).dtype),
            "formatter": self.policy.formatter.fingerprint(),
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """See :class:`companion.judge.Backend`. A prompt that is too long is refused.

        Raises
        ------
        DataError
            If the chat template refuses a question.
        ModelError
            If the GPU's memory does not hold a single question.
        """
        ids = self._encode(questions)
        limit = self.policy.max_positions
        fitting = []
        # the longest answer is the same for all questions of a call but in odd uses
        lengths = [len(i) + q.max_tokens for i, q in zip(ids, questions, strict=True)]
        for place, question in enumerate(questions):
            if limit is not None and lengths[place] > limit:
                why = (
                    f"{len(ids[place])} tokens and {question.max_tokens} for the answer are more "
                    f"than the model takes ({limit})"
                )
                yield place, Answer("", False, refused=why)
            else:
                fitting.append(place)

        def compute(batch: list[int]) -> list[Answer]:
            places = [fitting[i] for i in batch]
            return self._batch([ids[i] for i in places], [questions[i] for i in places])

        for batch, answers in self.policy.in_batches([lengths[i] for i in fitting], compute):
            yield from zip([fitting[i] for i in batch], answers, strict=True)

    def _encode(self, questions: Sequence[Question]) -> list[list[int]]:
        try:
            return encode_prompts(
                self.policy.formatter,
                [question.messages for question in questions],
                chat_template_kwargs=self.chat_template_kwargs,
            )
        except DataError as error:
            raise DataError(
                f"the model's chat template refuses the question: {error.what}",
                "some models take no system message: use a template without one",
            ) from error

    def _batch(self, prompts: Sequence[list[int]], questions: Sequence[Question]) -> list[Answer]:
        ends, likeliest = self.policy.eos_token_ids, _Likeliest()
        limits = [question.max_tokens for question in questions]
        with self.policy.ready():
            batch = self.policy.padded(prompts)
            new = self.policy.generate(batch, max(limits), likeliest, eos_token_ids=ends).tolist()
        logprobs, tokens = likeliest.table()
        answers = []
        for row, question in enumerate(questions):
            ids = new[row][: limits[row]]
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            finished = end is not None
            answers.append(
                self._answer(question.template, ids[:end], finished, logprobs[row], tokens[row])
            )
        return answers

    def _answer(
        self,
        template: JudgeTemplate,
        ids: list[int],
        finished: bool,
        logprobs: list[list[float]],
        tokens: list[list[int]],
    ) -> Answer:
        def decode(part: list[int]) -> str:
            return str(self.policy.tokenizer.decode(part, skip_special_tokens=True))

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
    """Keeps the likeliest tokens of each step; a full distribution would fill the memory.

    They stay on the device until the end: a copy to the host would wait for each step.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values, tokens = scores.float().log_softmax(dim=-1).topk(min(TOP, scores.shape[-1]))
        self.steps.append((values, tokens))
        return scores

    def table(self) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
        """Log-probabilities and token ids, ``[rows, steps, TOP]`` each."""
        values, tokens = zip(*self.steps, strict=True)
        return torch.stack(values, dim=1).tolist(), torch.stack(tokens, dim=1).tolist()
