"""Scoring from text, tokenising included: ``python -m benchmarks.from_text``.

Each method is given the same prompts and completions as strings, and does all the rest. Against
transformers' text-classification pipeline and, where sentence-transformers is installed (``pip
install "reward-model-companion[benchmarks]"``), its ``CrossEncoder``.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from benchmarks.comparing import arguments, timed_case
from benchmarks.measuring import Outcome, table
from benchmarks.methods import BATCH, Method
from benchmarks.results import save
from benchmarks.shapes import EOS, PAD, VOCABULARY, TokenIds, candidates, make_model, mixed_lengths
from companion import RewardScorer

_EOS = "<eos>"
#: Shape -> texts of mixed lengths, prompts with 16 candidates.
_SIZES: dict[str, tuple[int, int]] = {"tiny": (96, 4), "small": (16, 1), "0.6b": (96, 4)}
#: Name of the work -> from shape and ``--quick`` to the token ids that the texts are made of.
_TEXTS: dict[str, Callable[[str, bool], TokenIds]] = {
    "mixed lengths": lambda shape, quick: mixed_lengths(32 if quick else _SIZES[shape][0]),
    "16 candidates": lambda shape, quick: candidates(1 if quick else _SIZES[shape][1], 16),
}


def make_tokenizer() -> Any:
    """Words ``w2``, ``w3``, …; the id of each is its number. No word begins another."""
    words = {"<pad>": PAD, _EOS: EOS, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    core = Tokenizer(models.WordLevel({**words, "<unk>": VOCABULARY}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=_EOS, unk_token="<unk>"
    )


def as_texts(ids: TokenIds) -> list[tuple[str, str]]:
    """Prompt and completion of each, without the EOS; where one ends is of no account."""
    texts = []
    for item in ids:
        words = [f"w{i}" for i in item[:-1]]
        half = len(words) // 2
        texts.append((" ".join(words[:half]) + " ", " ".join(words[half:])))
    return texts


def from_text_methods(
    model: Any, folder: Path, texts: list[tuple[str, str]], device: torch.device
) -> dict[str, Method | None]:
    """Name to method, None for what is not installed; ``check`` is the mean score.

    The stock ways are given the EOS in the text, without which they would score other texts, and
    told to leave out the sigmoid.
    """
    finished = [(prompt, completion + _EOS) for prompt, completion in texts]
    classify = pipeline(
        "text-classification",
        model=model,
        tokenizer=make_tokenizer(),
        function_to_apply="none",
        batch_size=BATCH,
        device=device,
    )
    joined = [prompt + completion for prompt, completion in finished]
    scorer = RewardScorer.from_pretrained(folder, device=device, dtype=model.dtype)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]

    def companion() -> Outcome:
        scores = scorer.score(rows).raw
        return Outcome(scorer.tokens[1], float(scores.mean()))

    methods: dict[str, Method | None] = {
        f"transformers' pipeline, {BATCH} a batch": lambda: (
            lambda: _counted(model, lambda: [found["score"] for found in classify(joined)])
        )
    }
    batch_sizes = {"CrossEncoder as shipped": 32, "CrossEncoder, 4 a batch": 4}
    if importlib.util.find_spec("sentence_transformers") is None:
        methods |= dict.fromkeys(batch_sizes)
    else:
        encoder = _cross_encoder(folder, device, model.dtype)
        for name, size in batch_sizes.items():
            score = functools.partial(encoder.predict, finished, batch_size=size)
            methods[name] = functools.partial(functools.partial, _counted, encoder.model, score)
    methods["companion"] = lambda: companion
    return methods


def _cross_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(
        str(folder),
        activation_fn=torch.nn.Identity(),
        device=str(device),
        model_kwargs={"dtype": dtype},
    )


def _counted(model: Any, score: Any) -> Outcome:
    """The mean score, and the tokens that went through the model meanwhile."""
    computed = 0

    def count(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal computed
        computed += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

    # on the backbone: sentence-transformers calls the model's `forward`, which passes hooks by
    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        mean = float(np.mean(score()))
    finally:
        hook.remove()
    return Outcome(computed, mean)


def main() -> None:
    """Run it."""
    args = arguments(__doc__)
    device = torch.device(args.device)
    cases = []
    for shape in args.shapes:
        for dtype_name in args.dtypes:
            dtype = getattr(torch, dtype_name)
            with tempfile.TemporaryDirectory() as folder:
                model = make_model(shape, device, dtype, vocabulary=VOCABULARY + 1).eval()
                model.save_pretrained(folder)
                make_tokenizer().save_pretrained(folder)
                for work, texts in _TEXTS.items():
                    ids = texts(shape, args.quick)
                    methods = from_text_methods(model, Path(folder), as_texts(ids), device)
                    case = timed_case(methods, model, ids, args, device, dtype)
                    cases.append({"shape": shape, "dtype": dtype_name, "work": work, **case})
                    print(f"\nfrom text, {shape}, {dtype_name}, {work}, {case['texts']} texts")
                    print(table(case["methods"]), "\n")
    print(f"written: {save('from_text', {'cases': cases}, args)}")


if __name__ == "__main__":
    main()
