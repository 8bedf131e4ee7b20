"""Shared fixtures: a tiny tokenizer, tiny random models of several architectures, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import gc

gc.disable()  # while everything is imported; `pytest_collection_finish` switches it on again

import functools
import importlib.metadata

# accelerate asks at each step of a training whether DeepSpeed and PEFT are there, and each time the
# answer is parsed anew (3,100 times in the trainings alone). What is installed stays as it is.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
importlib.metadata.version = functools.cache(importlib.metadata.version)

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forking import end_stem, start_stem
from hypothesis import settings

torch.set_num_threads(1)
# A busy machine is no failure: the time that an example takes is not what is tested.
settings.register_profile("companion", deadline=None)
settings.load_profile("companion")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: a collection need not walk it.

    accelerate collects before each training (`clear_device_cache`), which took 0.6 s of a training
    of 0.7 s, with torch, transformers and TRL in the heap.
    """
    gc.collect()
    gc.freeze()
    if any(item.get_closest_marker("distributed") for item in session.items):
        start_stem()
    gc.enable()


def pytest_sessionfinish() -> None:
    """No process is left behind."""
    end_stem()


_TEXT = (
    "Ana Ben has buys gives boxes pens each and with how many now the answer is so yes no good bad "
    "right wrong thanks hello a an of to in it more less User Assistant . , ? ! : = + - *"
)
WORDS = [*_TEXT.split(), *map(str, range(21))]
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if tools %}<|system|> tools {{ tools | tojson }} <|end|>{% endif %}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] }}"
    "{{- eos_token if message['role'] == 'assistant' else '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")


def build_tokenizer(
    *, chat_template: str | None = CHAT_TEMPLATE, pad: bool = True, adds_eos: bool = False
) -> Any:
    """A word-level tokenizer with distinct BOS, EOS and pad that puts BOS before plain text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    special += ["<|tool|>"] + (["<pad>"] if pad else [])
    vocab = {token: i for i, token in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A" + (" </s>" if adds_eos else ""),
        special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        additional_special_tokens=[
            "<|end|>",
            "<|user|>",
            "<|assistant|>",
            "<|system|>",
            "<|tool|>",
        ],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_config(kind: str, tokenizer: Any, **overrides: Any) -> Any:
    """A configuration of two layers and 32 dimensions."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # large weights: a wrong read-out then moves the score by far more than rounding does
        "initializer_range": 0.3,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
        }
    return AutoConfig.for_model(kind, **{**common, **sizes, **overrides})


def save_causal(kind: str, tokenizer: Any, folder: Path, **overrides: Any) -> Path:
    """A random causal LM with its tokenizer, as a checkpoint of a base."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(kind, tokenizer, **overrides))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test use the global state)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """``build_tokenizer``: a new tokenizer with every call."""
    return build_tokenizer


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A word-level tokenizer with a chat template; BOS, EOS and pad differ."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """``build_config(kind, tokenizer, **overrides)``."""
    return build_config


@pytest.fixture(scope="session")
def make_causal() -> Callable[..., Path]:
    """``save_causal(kind, tokenizer, folder, **overrides)``."""
    return save_causal


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_bases("qwen3")``: folder of a random causal LM of that kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str = "qwen3") -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"base_{kind}")
            made[kind] = save_causal(kind, build_tokenizer(), folder)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tiny_base(tiny_bases: Callable[[str], Path]) -> Path:
    """Folder of a tiny random Qwen3 causal LM."""
    return tiny_bases("qwen3")


@pytest.fixture(scope="session")
def tiny_rewards(
    tmp_path_factory: pytest.TempPathFactory, tiny_bases: Callable[[str], Path]
) -> Callable[[str], Path]:
    """``tiny_rewards("llama")``: folder of a saved (random) reward model of that kind."""
    from companion import load_base, save_reward_model

    made: dict[str, Path] = {}

    def get(kind: str = "qwen3") -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"reward_{kind}")
            save_reward_model(load_base(tiny_bases(kind)), folder)
            made[kind] = folder
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tiny_reward(tiny_rewards: Callable[[str], Path]) -> Path:
    """Folder of a saved (random) Qwen3 reward model."""
    return tiny_rewards("qwen3")


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Forty texts of 1 to 40 words of the tiny vocabulary."""
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 40))) for _ in range(40)]
