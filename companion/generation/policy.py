"""Completions from a policy, each by its own dice; log-probabilities of given ones.

transformers' ``generate`` runs the model. Three things it leaves to be desired are mended here: a
completion depends on its prompt, its number and the seed, and not on the rest of the batch; the
prompt is computed once for all of its completions; and what a hub checkpoint sets in its
``generation_config.json`` (a repetition penalty, top-k) is not applied behind your back, which has
made policies sample from one distribution and train on another (verl #7270). Chapters 3 and 5.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer

from companion.engine import pad_batch
from companion.engine.budget import generation_budget, logprob_budget
from companion.engine.devices import device_notes, free_memory
from companion.errors import DataError
from companion.formatting import RewardFormatter, Text
from companion.formatting.prompts import encode_prompts
from companion.generation.causal import load_causal
from companion.generation.dice import AllDone, Dice, check_settings, uniforms
from companion.generation.halving import halving_batches
from companion.models.ends import end_token_ids

Use = Literal["generate", "logprobs"]
T = TypeVar("T")

#: Tokens of a batch where nobody tells the free memory, on a CPU and on another accelerator: to
#: generate (prompts, and completions at their longest), and of log-probabilities, whose logits are
#: as wide as the vocabulary.
_TOKENS: dict[Use, tuple[int, int]] = {"generate": (8192, 16_384), "logprobs": (2048, 4096)}


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


class Policy:
    """A causal language model that completions are drawn from. Chapters 3 and 5.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Put into eval mode while it samples, and back.
    tokenizer : PreTrainedTokenizerBase
    max_tokens_per_batch : int, optional
        Budget for completions × (longest prompt + ``max_new_tokens``), and for the padded tokens
        of log-probabilities. Default: 8,192 and 2,048 on a CPU; on CUDA what the free memory
        holds, of the cache and of the logits (:func:`companion.engine.generation_budget`,
        :func:`companion.engine.logprob_budget`). A budget that a GPU's memory does not hold, given
        or not, is halved, with a warning.
    chat_template_kwargs : mapping, optional
        Handed to the chat template with every prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_tokens_per_batch: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.formatter = RewardFormatter(tokenizer)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.chat_template_kwargs = chat_template_kwargs

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        max_tokens_per_batch: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Policy:
        """Load a policy from a folder or the hub.

        Parameters
        ----------
        device : str, optional
            Default: the GPU if there is one.
        dtype : torch.dtype or str
            In half precision a completion may change with its batch.

        Raises
        ------
        ModelError
            For a folder that is no causal language model; see
            :func:`companion.generation.load_causal`.
        """
        model, tokenizer = load_causal(
            path_or_id,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(model, tokenizer, max_tokens_per_batch=max_tokens_per_batch)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def notes(self) -> list[str]:
        """What was chosen for the GPU, and why; empty on a CPU."""
        return device_notes(self.model, packed=False)

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a completion: the tokenizer's EOS and those of the checkpoint."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        return end_token_ids(self.tokenizer, said)

    @property
    def pad_token_id(self) -> int:
        """Fills places that the mask hides, so even the EOS will do."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def max_positions(self) -> int | None:
        """Longest text that the model has positions for."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        prompts: Sequence[Text],
        n: int = 1,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int | Sequence[int] = 0,
        prefixes: Sequence[Sequence[int]] | None = None,
        stop: str | None = None,
    ) -> list[list[Sample]]:
        """Draw completions.

        Parameters
        ----------
        prompts : sequence
            Each a text, which is gone on with as it is, or a list of messages, which the chat
            template writes with its generation prompt.
        n : int
            Completions of each prompt.
        temperature : float
            0 takes the likeliest token each time.
        top_p : float
            In (0, 1]. 1 draws from the whole distribution.
        max_new_tokens : int
            A completion that has not ended by then is cut off (``terminated`` False).
        seed : int or sequence of int
            One for all prompts, or one for each; see the notes.
        prefixes : sequence of sequences of int, optional
            Token ids that each prompt's completions begin with, such as steps that stand already.
        stop : str, optional
            A completion also ends with the token in which this text is complete.

        Returns
        -------
        list of list of Sample
            ``n`` for each prompt, in order.

        Raises
        ------
        DataError
            For a bad prompt or setting, or a prompt for which the model has too few positions.
        ModelError
            If the memory does not hold a single completion.

        Notes
        -----
        Sample i of a prompt depends on the model, the prompt (with its prefix), the seed and i: the
        first 4 of n=8 are those of n=4, and other prompts, the order and the size of batches make
        no difference. A prompt that is given twice gets samples n … 2n − 1 the second time. This
        holds up to rounding: in float32 another batch moves probabilities by about 1e-6, which
        changes a draw about as rarely; in half precision it is common.
        """
        check_settings(n, temperature, top_p, max_new_tokens, stop)
        begun = self._begun(self._encoded(prompts), prefixes, max_new_tokens)
        seeds = [seed] * len(begun) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(begun):
            raise DataError(f"{len(begun)} prompts, {len(seeds)} seeds")
        seen: Counter[tuple[int, ...]] = Counter()
        rows: list[tuple[int, int]] = []  # a prompt, and the number of its sample
        for place, (ids, _) in enumerate(begun):
            first = n * seen[(seeds[place], *ids)]
            seen[(seeds[place], *ids)] += 1
            rows += [(place, first + i) for i in range(n)]
        drawn: dict[int, Sample] = {}
        lengths = [len(begun[place][0]) + max_new_tokens for place, _ in rows]
        make_dice = partial(
            Dice,
            temperature=temperature,
            top_p=top_p,
            eos_token_ids=torch.tensor(self.eos_token_ids, device=self.device),
            stop=stop,
            tokenizer=self.tokenizer,
        )

        def compute(batch: list[int]) -> list[Sample]:
            part = [rows[i] for i in batch]
            streams = [uniforms(seeds[p], begun[p][0], i, max_new_tokens) for p, i in part]
            dice = make_dice(torch.from_numpy(np.stack(streams)).to(self.device))
            return self._draw(begun, part, dice, max_new_tokens)

        with self.ready():
            for batch, samples in self.in_batches(lengths, compute):
                drawn.update(zip(batch, samples, strict=True))
        return [[drawn[first + i] for i in range(n)] for first in range(0, len(rows), n)]

    def _encoded(self, prompts: Sequence[Text]) -> list[list[int]]:
        return encode_prompts(
            self.formatter, prompts, chat_template_kwargs=self.chat_template_kwargs
        )

    def _begun(
        self,
        prompts: list[list[int]],
        prefixes: Sequence[Sequence[int]] | None,
        max_new_tokens: int,
    ) -> list[tuple[list[int], int]]:
        """Ids to go on from, and how many of them are a prefix of the completion."""
        if prefixes is not None and len(prefixes) != len(prompts):
            raise DataError(f"{len(prompts)} prompts, {len(prefixes)} prefixes")
        limit = self.max_positions
        begun = []
        for place, ids in enumerate(prompts):
            prefix = list(prefixes[place]) if prefixes is not None else []
            if limit is not None and len(ids) + len(prefix) + max_new_tokens > limit:
                raise DataError(
                    f"prompt {place}: {len(ids) + len(prefix)} tokens and {max_new_tokens} new "
                    f"ones are more than the model has positions for ({limit})",
                    "shorten the prompt, or lower max_new_tokens",
                )
            begun.append((ids + prefix, len(prefix)))
        return begun

    def _draw(
        self,
        begun: Sequence[tuple[list[int], int]],
        rows: Sequence[tuple[int, int]],
        dice: Dice,
        max_new_tokens: int,
    ) -> list[Sample]:
        """One batch: completions of the given prompts and numbers."""
        places = list(dict.fromkeys(place for place, _ in rows))
        arguments = self.padded([begun[place][0] for place in places])
        index = torch.tensor([places.index(place) for place, _ in rows], device=self.device)
        repeated = {key: value[index] for key, value in arguments.items()}
        if len(rows) > len(places):
            cache = self._prefilled(**arguments)
            if cache is not None:
                cache.batch_select_indices(index)
                repeated["past_key_values"] = cache
        self.generate(repeated, max_new_tokens, dice, stopping=[AllDone(dice)])
        tokens = torch.stack(dice.tokens, dim=1).tolist()
        logprobs = torch.stack(dice.logprobs, dim=1).double().cpu().numpy()
        lengths, ended = dice.lengths.tolist(), dice.ended.tolist()
        whole = []
        for row, (place, _) in enumerate(rows):
            ids, prefix = begun[place]
            whole.append(ids[len(ids) - prefix :] + tokens[row][: lengths[row]])
        texts = self.tokenizer.batch_decode(whole, skip_special_tokens=True)
        return [
            Sample(
                texts[row],
                whole[row],
                ended[row],
                lengths[row],
                float(logprobs[row, : lengths[row]].sum()),
                stopped,
            )
            for row, stopped in enumerate(dice.stopped.tolist())
        ]

    def _prefilled(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """The prompts' keys and values up to the last token; None where they cannot be repeated.

        Layers that keep a window or a running state are left to ``generate``.
        """
        if input_ids.shape[1] < 2:
            return None
        mask = attention_mask[:, :-1]
        output = self.model(
            input_ids=input_ids[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        plain = type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)
        return cache if plain else None

    # ------------------------------------------------------------------ log-probabilities

    def logprobs(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sample | Text | Sequence[int]],
        *,
        temperature: float = 1.0,
    ) -> Logprobs:
        """Log-probabilities of completions given their prompts.

        Parameters
        ----------
        prompts : sequence
            As in :meth:`sample`.
        completions : sequence
            Of the same length. Each a sample or its token ids, taken as they are; or a text or
            messages, which the formatter encodes with the EOS that ends it.
        temperature : float
            Above 0.

        Returns
        -------
        Logprobs
            Equal to :attr:`Sample.logprob` for a sample without prefix, up to rounding.

        Raises
        ------
        DataError
            If the lengths differ, or a completion is empty.
        ModelError
            If the memory does not hold a single one.
        """
        if len(prompts) != len(completions):
            raise DataError(f"{len(prompts)} prompts, {len(completions)} completions")
        if not temperature > 0:
            raise DataError(f"temperature is {temperature}", "use a positive number")
        texts = self._whole(prompts, completions)
        out: list[np.ndarray] = [np.zeros(0)] * len(texts)

        def compute(batch: list[int]) -> list[np.ndarray]:
            ids = self.padded([texts[i][0] for i in batch], "right")["input_ids"]
            # right padding needs no mask in a causal model: no real token sees a pad
            logits = self.model(input_ids=ids, use_cache=False).logits
            found = []
            for row, i in enumerate(batch):
                whole, begin = texts[i]
                before = logits[row, begin - 1 : len(whole) - 1].float() / temperature
                target = ids[row, begin : len(whole), None]
                found.append(torch.log_softmax(before, dim=-1).gather(-1, target).squeeze(-1))
                del before  # as wide as the vocabulary
            values = torch.cat(found).double().cpu().numpy()  # one wait for the device
            return np.split(values, np.cumsum([len(each) for each in found])[:-1])

        with self.ready():
            lengths = [len(ids) for ids, _ in texts]
            for places, values in self.in_batches(lengths, compute, use="logprobs"):
                for place, value in zip(places, values, strict=True):
                    out[place] = value
        return Logprobs(np.array([float(item.sum()) for item in out]), out)

    def _whole(
        self, prompts: Sequence[Text], completions: Sequence[Sample | Text | Sequence[int]]
    ) -> list[tuple[list[int], int]]:
        """Ids of prompt and completion, and where the completion begins."""
        heads = self._encoded(prompts)
        eos = self.tokenizer.eos_token_id
        out = []
        for place, (head, completion) in enumerate(zip(heads, completions, strict=True)):
            if isinstance(completion, Sample):
                ids, begin = head + completion.token_ids, len(head)
            elif isinstance(completion, str) or any(isinstance(x, Mapping) for x in completion):
                encoded = self.formatter.encode(
                    prompts[place],
                    completion,  # type: ignore[arg-type]
                    chat_template_kwargs=self.chat_template_kwargs,
                )
                assert encoded is not None  # (no max_length)
                ids, begin = encoded.input_ids, encoded.prompt_length
                if eos in ids[begin:]:  # some templates write more behind it
                    ids = ids[: ids.index(eos, begin) + 1]
            else:
                ids, begin = head + [int(x) for x in completion], len(head)  # type: ignore[arg-type]
            if begin == len(ids) or begin == 0:
                raise DataError(f"completion {place}: no tokens, or no prompt before them")
            out.append((ids, begin))
        return out

    # ------------------------------------------------------------------ running the model

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, no gradients, and a generation config that sets nothing by itself."""
        before = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.model.generation_config = before[1]
            self.model.train(before[0])

    def in_batches(
        self,
        lengths: Sequence[int],
        compute: Callable[[list[int]], Sequence[T]],
        *,
        use: Use = "generate",
    ) -> Iterator[tuple[list[int], Sequence[T]]]:
        """Run texts of so many tokens, a batch at a time within the budget.

        The budget is halved where a GPU's memory ends, and the halved one remembered; see
        :func:`companion.generation.halving.halving_batches`, also for what is raised.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each text, at its longest.
        compute : callable
            Gets the places of the texts of a batch, and gives a value for each.
        use : {"generate", "logprobs"}
            What decides the memory: the cache of ``generate``, or the logits of all tokens.

        Yields
        ------
        tuple
            Places and their values, of one batch, the longest texts first.
        """
        budget, row = self._budget(use, max(lengths, default=0))
        costs = [length + row for length in lengths]
        key = use, self.max_tokens_per_batch
        return halving_batches(self.model, key, costs, budget, compute)

    def _budget(self, use: Use, longest: int) -> tuple[int, int]:
        """Tokens of a batch, and what a row costs beside its own, in tokens."""
        if self.max_tokens_per_batch is not None:
            return self.max_tokens_per_batch, 0
        if self.device.type != "cuda":
            return _TOKENS[use][self.device.type != "cpu"], 0
        free, size = free_memory(self.device), self.model.dtype.itemsize
        if use == "logprobs":
            return logprob_budget(free, self.model.config, size), 0
        return generation_budget(free, self.model.config, size, longest)

    def padded(
        self, ids: Sequence[list[int]], side: Literal["left", "right"] = "left"
    ) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` where the model is."""
        batch = pad_batch(ids, self.pad_token_id, side)
        return {key: value.to(self.device) for key, value in batch.items()}

    def generate(
        self,
        batch: Mapping[str, Any],
        max_new_tokens: int,
        processor: Callable[[Tensor, Tensor], Tensor],
        *,
        eos_token_ids: list[int] | None = None,
        stopping: Sequence[Any] = (),
    ) -> Tensor:
        """transformers' ``generate`` within :meth:`ready`: the likeliest token of each step.

        Parameters
        ----------
        batch : mapping
            ``input_ids`` ``[R, L]``, padded left, the mask, and what else the model takes.
        processor : callable
            Sees, and may change, the scores of each step.
        eos_token_ids, stopping
            What ends a row, and criteria of transformers that end the batch.

        Returns
        -------
        Tensor
            ``[R, T]`` int64, the new ids; behind the end of a row the pad id.
        """
        written = self.model.generate(
            **batch,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_ids,
                pad_token_id=self.pad_token_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList(stopping),
        )
        return written[:, batch["input_ids"].shape[1] :]  # type: ignore[no-any-return]
