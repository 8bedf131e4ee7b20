"""A tokenizer and a reward model that remember how they were used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from companion.course.exercises.ch02._toys import by_mask, read, states

BOS, EOS = 1, 2
WORDS = ["how", "many", "pens", "the", "answer", "is", "7", "8", "no", "idea", "user", "assistant"]
#: words for which the model gives no number
ENDLESS, BROKEN = "aleph", "naught"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def reward_tokenizer() -> Any:
    """Words with the space before them as one token; a BOS before text; a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, ENDLESS, BROKEN]
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *words, *(f" {word}" for word in words)]
    pieces += [":", "?", ".", " "]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class RecordingModel(nn.Module):
    """Scores texts at their last real token, and keeps what it was given and in which mode.

    On the device ``meta`` there are no numbers to compute with: it records where its inputs lie and
    gives zeros. So a wrong device shows without a GPU.
    """

    def __init__(self, tokenizer: Any, device: str = "cpu") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64, device=device))
        self.strange = {
            tokenizer.convert_tokens_to_ids(space + word): value
            for word, value in ((ENDLESS, float("inf")), (BROKEN, float("nan")))
            for space in ("", " ")
        }
        self.rows: list[list[int]] = []
        self.gradients: set[bool] = set()
        self.modes: set[bool] = set()
        self.devices: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the weights lie, as transformers' models say it."""
        return self.scale.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SimpleNamespace:
        """Return ``.logits``, ``[B, 1]``."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.devices |= {input_ids.device.type, mask.device.type}
        self.gradients.add(torch.is_grad_enabled())
        self.modes.add(self.training)
        if self.device.type == "meta":
            return SimpleNamespace(logits=torch.zeros(len(input_ids), 1))
        self.rows += [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        scores = read(states(input_ids, mask), by_mask(mask))
        for token, value in self.strange.items():
            held = ((input_ids == token) & mask.bool()).any(dim=1)
            scores = scores.masked_fill(held, value)
        if self.training:  # what dropout does, without its chance
            scores = 0.8 * scores + 0.3
        return SimpleNamespace(logits=(self.scale * scores).float()[:, None])
