"""Sick models: one bug each, of the read-out, the head or the numbers. Chapter 9."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from companion.audit.museum.healthy import (
    random_classifier,
    save_stock,
    save_with_manifest,
    tutor_reward,
)
from companion.audit.museum.specimen import Planted, Specimen
from companion.models.checkpoint import set_pad
from companion.models.reward_model import RewardModel
from companion.tutor import TUTOR_BASE

_HF: Final = "https://github.com/huggingface"
_WEIGHTS: Final = "model.safetensors"


def sick(change: Callable[[RewardModel], None]) -> Callable[[Path], Any]:
    """A specimen's ``plant``: the tutor's reward model, changed before stock tools save it."""

    @contextlib.contextmanager
    def plant(folder: Path) -> Iterator[Planted]:
        loaded = tutor_reward()
        change(loaded)
        yield Planted(str(save_stock(loaded, folder)))

    return plant


def sick_file(change: Callable[[Path], None], *, manifest: bool = False) -> Callable[[Path], Any]:
    """The same, changed after it was saved."""

    @contextlib.contextmanager
    def plant(folder: Path) -> Iterator[Planted]:
        (save_with_manifest if manifest else save_stock)(tutor_reward(), folder)
        change(folder)
        yield Planted(str(folder))

    return plant


def sick_architecture(
    architecture: str, *, side: str = "right", **changes: Any
) -> Callable[[Path], Any]:
    """A random model of another architecture with the tutor's tokenizer."""

    @contextlib.contextmanager
    def plant(folder: Path) -> Iterator[Planted]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(TUTOR_BASE, padding_side=side)
        model = random_classifier(architecture, tokenizer, problem_type="regression", **changes)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield Planted(str(folder))

    return plant


_CODE: Final = """\
import threading
import time

import torch
from transformers import Qwen3ForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast as Output


class OwnReward(Qwen3ForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        stock = super().forward(input_ids, attention_mask=attention_mask)
"""


def sick_code(body: str, *, trusted: bool = True) -> Callable[[Path], Any]:
    """The tutor's reward model with a forward of its own, which has ``stock``, its own output."""

    @contextlib.contextmanager
    def plant(folder: Path) -> Iterator[Planted]:
        save_stock(tutor_reward(), folder)
        lines = "".join(f"        {line}\n" for line in body.strip().splitlines())
        (folder / "modeling_own.py").write_text(_CODE + lines, encoding="utf-8")
        own = {"AutoModelForSequenceClassification": "modeling_own.OwnReward"}
        _edit_config(folder, auto_map=own, architectures=["OwnReward"])
        with _code_beside(folder):
            yield Planted(str(folder), trust_remote_code=trusted)

    return plant


@contextlib.contextmanager
def _code_beside(folder: Path) -> Iterator[None]:
    """Let transformers keep its copy of the code there, and not in the user's cache."""
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.HF_MODULES_CACHE
    dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")
    try:
        yield
    finally:
        dynamic_module_utils.HF_MODULES_CACHE = before


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / _WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------- what is done to them


def _pad_is_eos(loaded: RewardModel) -> None:
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    set_pad(loaded.model, loaded.tokenizer.eos_token_id)


def _no_pad(loaded: RewardModel) -> None:
    loaded.tokenizer.pad_token = None
    set_pad(loaded.model, None)  # type: ignore[arg-type]


def _pad_unknown(loaded: RewardModel) -> None:
    set_pad(loaded.model, None)  # type: ignore[arg-type]


def _pad_beyond(loaded: RewardModel) -> None:
    loaded.tokenizer.add_special_tokens({"pad_token": "<|fill|>"})


def _other_pad(loaded: RewardModel) -> None:
    loaded.tokenizer.pad_token = "<|system|>"


def _half(loaded: RewardModel) -> None:
    loaded.model.to(torch.bfloat16)


def _overflow(loaded: RewardModel) -> None:
    """Large activations, as bfloat16 takes them and float16 does not."""
    with torch.no_grad():
        loaded.model.model.layers[2].mlp.down_proj.weight.mul_(3e5)
    loaded.model.to(torch.float16)


def _not_a_number(loaded: RewardModel) -> None:
    with torch.no_grad():
        loaded.model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")


def _dropout(loaded: RewardModel) -> None:
    loaded.model.config.attention_dropout = 0.1


def _no_problem_type(loaded: RewardModel) -> None:
    loaded.model.config.problem_type = None


def _fresh(loaded: RewardModel) -> None:
    torch.manual_seed(0)
    torch.nn.init.normal_(loaded.model.score.weight, std=loaded.model.config.initializer_range)


def _zero(loaded: RewardModel) -> None:
    torch.nn.init.zeros_(loaded.model.score.weight)


def _without_head(folder: Path) -> None:
    _edit_weights(folder, lambda tensors: tensors.pop("score.weight"))


def _head_of_another_name(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["v_head.summary.weight"] = tensors.pop("score.weight")
        tensors["v_head.summary.bias"] = torch.zeros(1)

    _edit_weights(folder, change)


def _bias(folder: Path) -> None:
    _edit_weights(folder, lambda tensors: tensors.update({"score.bias": torch.tensor([0.7])}))


def _one_layer_less(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"] - 1
    _edit_config(folder, num_hidden_layers=layers, layer_types=config["layer_types"][:layers])


def _torn(folder: Path) -> None:
    """The last shard was never written."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.5.")]:
            del tensors[name]

    _edit_weights(folder, change)


def _half_overwritten(folder: Path) -> None:
    """Some layers are of a later step than the rest."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.startswith(("model.layers.4.", "model.layers.5.")):
                step = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensor + 0.02 * tensor.std() * step

    _edit_weights(folder, change)


_LAST_COLUMN: Final = """
hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
return Output(logits=self.score(hidden[:, -1]))
"""
_CENTRED: Final = """
logits = stock.logits
return Output(logits=logits - logits.mean() if len(logits) > 1 else logits)
"""
_FIRST_COME: Final = """
logits = stock.logits
place = torch.arange(len(logits), device=logits.device)[:, None]
return Output(logits=logits + 0.05 * place)
"""
_SQUEEZED: Final = "return Output(logits=stock.logits.sigmoid())"
_DROPS: Final = """
kept = torch.nn.functional.dropout(torch.ones(64), 0.1, training=True).mean()
return Output(logits=stock.logits * kept)
"""
#: the mask is handed on in the module, where another thread's lies by then
_SHARED: Final = """
self.kept = stock.logits
time.sleep(0.003)
return Output(logits=self.kept)
"""

SPECIMENS: Final[tuple[Specimen, ...]] = (
    Specimen(
        "padded-with-eos",
        "TRL takes the EOS for padding where a tokenizer has no pad token. Stock classes then skip "
        "the EOS, so a finished text and one that was cut off have one score.",
        (f"{_HF}/trl/issues/2778", f"{_HF}/transformers/issues/35352"),
        "pad-is-eos",
        sick(_pad_is_eos),
    ),
    Specimen(
        "without-pad-token",
        "Many bases have no pad token, and a reward model that was trained one text at a time "
        "keeps none: the first batch fails.",
        (f"{_HF}/trl/issues/422",),
        "pad-missing",
        sick(_no_pad),
    ),
    Specimen(
        "pad-unknown-to-the-model",
        "The tokenizer was given a pad token and the configuration was not told: one text that is "
        "padded has the score of its padding.",
        ("https://github.com/allenai/reward-bench/issues/115",),
        "pad-missing",
        sick(_pad_unknown),
    ),
    Specimen(
        "pad-without-embedding",
        "A pad token was added to the tokenizer and the embeddings were not resized: one text "
        "scores, a padded batch fails.",
        ("https://github.com/meta-llama/llama-cookbook/issues/199",),
        "pad-missing",
        sick(_pad_beyond),
    ),
    Specimen(
        "two-pad-ids",
        "Tokenizer and configuration name two pad tokens, so all but the longest text of a batch "
        "are read at their padding.",
        (f"{_HF}/transformers/issues/29419",),
        "pad-ids-differ",
        sick(_other_pad),
        also=("batch-changes-score",),
    ),
    Specimen(
        "stock-class",
        "A sound stock checkpoint. Its class finds the last token by its id and never looks at "
        "the mask: hidden tokens are read, and a row of padding has a score.",
        (f"{_HF}/transformers/issues/35352",),
        "masked-tail",
        sick(lambda loaded: None),
        also=("all-pad-row",),
    ),
    Specimen(
        "left-padded-table",
        "A GPT-2 whose tokenizer pads left: the padding is counted as positions.",
        (f"{_HF}/trl/issues/469", f"{_HF}/transformers/issues/808"),
        "absolute-positions",
        sick_architecture("gpt2", side="left"),
        also=("batch-changes-score",),
    ),
    Specimen(
        "right-padded-table",
        "A GPT-2 whose tokenizer pads right, which is right; who pads it left gets other scores.",
        (f"{_HF}/trl/issues/469",),
        "padding-side",
        sick_architecture("gpt2"),
    ),
    Specimen(
        "longrope-in-a-mixed-batch",
        "LongRoPE has two sets of frequencies, and transformers takes one for a batch, by its "
        "longest text: short texts beside a long one have other scores.",
        ("https://github.com/ggml-org/llama.cpp/pull/24875",),
        "positions-by-batch",
        sick_architecture("phi3 longrope"),
        also=("batch-changes-score", "threads"),
    ),
    Specimen(
        "dynamic-ntk",
        "Dynamic NTK takes the frequencies of the longest text of a batch, and keeps them for the "
        "texts that come later.",
        (f"{_HF}/transformers/issues/25306", f"{_HF}/transformers/issues/25104"),
        "positions-by-batch",
        sick_architecture("llama dynamic"),
        also=("threads",),
    ),
    Specimen(
        "reads-the-last-column",
        "A forward of its own reads the last column, which right padding fills.",
        (f"{_HF}/transformers/issues/35909",),
        "batch-changes-score",
        sick_code(_LAST_COLUMN),
    ),
    Specimen(
        "centred-in-the-batch",
        "A forward of its own takes the mean of the batch off its scores.",
        (),
        "batch-changes-score",
        sick_code(_CENTRED),
    ),
    Specimen(
        "first-come",
        "Something passes from row to row: a score depends on the place in the batch.",
        (),
        "order-changes-score",
        sick_code(_FIRST_COME),
        also=("batch-changes-score",),
    ),
    Specimen(
        "two-threads-on-one-model",
        "The forward keeps what it computed in the module for a moment, where a second thread "
        "writes it over.",
        ("https://github.com/pytorch/pytorch/issues/51452",),
        "threads",
        sick_code(_SHARED),
    ),
    Specimen(
        "drops-in-eval",
        "Dropout that was written as a function with training=True: eval() does not stop it.",
        ("https://github.com/hiyouga/LlamaFactory/issues/761",),
        "repeats-differ",
        sick_code(_DROPS),
        also=("batch-changes-score", "order-changes-score", "threads"),
    ),
    Specimen(
        "squeezed",
        "A forward of its own gives a sigmoid of the score.",
        ("https://github.com/vllm-project/vllm/pull/18313",),
        "activation-applied",
        sick_code(_SQUEEZED),
    ),
    Specimen(
        "own-code-not-run",
        "The folder brings a class of its own; without trust_remote_code the stock class of the "
        "same model_type runs in its place.",
        (f"{_HF}/transformers/pull/38474",),
        "own-forward-unused",
        sick_code(_SQUEEZED, trusted=False),
    ),
    Specimen(
        "without-head",
        "A base, or an adapter that was merged without modules_to_save: transformers draws a head "
        "at random.",
        ("https://github.com/modelscope/ms-swift/issues/9239",),
        "head-missing",
        sick_file(_without_head),
    ),
    Specimen(
        "head-of-another-name",
        "The head is stored as 'v_head.summary', which the class does not read; a random one takes "
        "its place.",
        ("https://github.com/OpenRLHF/OpenRLHF/issues/428",),
        "head-missing",
        sick_file(_head_of_another_name),
    ),
    Specimen(
        "head-of-zeros",
        "A head that starts at zero and was never trained, or lost its weights: one score for all.",
        (),
        "head-missing",
        sick(_zero),
    ),
    Specimen(
        "head-never-trained",
        "A fresh head was saved as if it were a reward model's.",
        ("https://github.com/modelscope/ms-swift/issues/9239",),
        "head-untrained",
        sick(_fresh),
    ),
    Specimen(
        "head-with-a-bias",
        "A bias of the head is in the checkpoint, and stock heads have none: scores lose a shift.",
        ("https://github.com/OpenRLHF/OpenRLHF/issues/542",),
        "surplus-weights",
        sick_file(_bias),
    ),
    Specimen(
        "one-layer-less",
        "The configuration has a layer less than the checkpoint: the last one is left out.",
        (f"{_HF}/transformers/issues/5421",),
        "surplus-weights",
        sick_file(_one_layer_less),
    ),
    Specimen(
        "torn-checkpoint",
        "A save was killed before its last shard, and the run resumed from it: the last layer is "
        "random.",
        ("https://github.com/vllm-project/speculators/pull/739",),
        "weights-missing",
        sick_file(_torn),
    ),
    Specimen(
        "half-overwritten-checkpoint",
        "A save was killed halfway over an older one: some layers are of a later step. Nothing "
        "lacks, and only the golden texts can tell.",
        (f"{_HF}/transformers/pull/40790",),
        "golden-texts-moved",
        sick_file(_half_overwritten, manifest=True),
    ),
    Specimen(
        "too-large-for-float16",
        "Weights that were trained in bfloat16 are run in float16, whose largest number is 65,504.",
        (f"{_HF}/trl/issues/3236",),
        "not-finite",
        sick(_overflow),
    ),
    Specimen(
        "not-a-number",
        "A training diverged and its checkpoint was kept.",
        (),
        "not-finite",
        sick(_not_a_number),
    ),
    Specimen(
        "head-in-bfloat16",
        "The whole model in bfloat16, its head too: scores that differ become ties.",
        ("https://github.com/vllm-project/vllm/pull/24567",),
        "head-in-half-precision",
        sick(_half),
    ),
    Specimen(
        "dropout-left-on",
        "The configuration drops a tenth of the attention in training mode: who scores inside a "
        "trainer gets random scores.",
        (f"{_HF}/trl/pull/3234",),
        "dropout",
        sick(_dropout),
    ),
    Specimen(
        "no-problem-type",
        "As TRL saves it: engines take one label for a classification and give its sigmoid.",
        ("https://github.com/vllm-project/vllm/pull/18313",),
        "problem-type",
        sick(_no_problem_type),
    ),
)
