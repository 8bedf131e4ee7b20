"""Models of many architectures, folders with code of their own among them.

The score of a text is what the model's own forward gives it alone, in whatever batch it is scored;
or the model is refused. Nothing is silently wrong.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from companion import (
    PairwiseRewardConfig,
    PairwiseRewardTrainer,
    RewardScorer,
    load_base,
    load_reward_model,
    save_reward_model,
)
from companion.audit.museum.healthy import (
    ARCHITECTURES,
    DYNAMIC,
    LONGROPE,
    random_classifier,
)
from companion.engine import BatchRunner, packed_scores, reward_scores
from companion.engine.agreement import check_trainable, forward_of, packing_fault
from companion.engine.forward import own_logits
from companion.engine.padded import pad_batch
from companion.engine.positions import length_classes
from companion.errors import ModelError

SEED = 11
LENGTHS = (5, 40, 3, 17, 25, 9, 60, 33, 4, 16)
#: those of `make test`; two with code of their own are below
FAST = ("llama", "gpt2", "gemma2", "phi3 longrope", "llama dynamic", "jamba")


def texts(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randint(9, vocabulary, (n,), generator=generator) for n in lengths]
    return [[*ids.tolist(), 2] for ids in drawn]


def save_stock(case: str, folder: Path, tokenizer: Any) -> Any:
    """A random classifier of one label, made by transformers alone; the model, too."""
    model = random_classifier(case, tokenizer, seed=SEED)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def one_by_one(model: Any, ids: list[list[int]]) -> np.ndarray:
    """Each text alone, through a copy of the model that has seen no other."""
    with torch.no_grad():
        return np.array(
            [float(copy.deepcopy(model)(torch.tensor([row])).logits.flatten()[0]) for row in ids]
        )


def check_runs(model: Any, pad: int, ids: list[list[int]], want: np.ndarray) -> None:
    assert want.std() > 1e-3
    for settings in (
        {},
        {"packing": "off"},
        {"packing": "off", "padding_side": "left"},
        {"max_tokens": 64},
        {"max_rows": 2},
    ):
        runner = BatchRunner(model, pad, **settings)
        for order in (range(len(ids)), range(len(ids) - 1, -1, -1)):
            found = runner.run([ids[i] for i in order])
            np.testing.assert_allclose(found, want[list(order)], atol=1e-5, err_msg=str(settings))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in FAST else [pytest.mark.slow])
        for case in ARCHITECTURES
    ],
)
def test_a_text_in_any_batch_has_the_score_that_stock_gives_it_alone(
    case: str, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    stock = save_stock(case, tmp_path, tokenizer)
    ids = texts(len(tokenizer))
    want = one_by_one(stock, ids)
    loaded = load_reward_model(tmp_path)
    check_runs(loaded.model, loaded.pad_token_id, ids, want)
    if case in ("ctrl", "modernbert-decoder"):  # scored by their own forward, as encoders are
        with pytest.raises(ModelError, match="no decoder with a sequence-classification head"):
            load_base(tmp_path)
        return
    check_trainable(loaded.model, loaded.pad_token_id)


def test_enough_architectures_are_swept() -> None:
    assert len({kind for kind, _ in ARCHITECTURES.values()}) >= 40


# ---------------------------------------------------------------------- positions and lengths


@pytest.mark.parametrize("case", ["phi3 longrope", "llama dynamic"])
def test_lengths_are_not_mixed_across_the_border(
    case: str, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    stock = save_stock(case, tmp_path, tokenizer)
    ids = texts(len(tokenizer), (15, 16, 3, 30, 17, 16, 30))  # and EOS: 16 is the border
    want = one_by_one(stock, ids)
    model = load_reward_model(tmp_path).model
    batch = pad_batch(ids, tokenizer.pad_token_id)
    with torch.no_grad():
        mixed = stock(**batch).logits[:, 0].numpy()  # as transformers would
        for side in ("right", "left"):
            padded = pad_batch(ids, tokenizer.pad_token_id, side)  # type: ignore[arg-type]
            found = reward_scores(model, **padded).numpy()
            np.testing.assert_allclose(found, want, atol=1e-5)
    assert np.abs(mixed - want).max() > 1e-2
    # gradients, too: a training batch is the sum of its texts
    reward_scores(model, **batch).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in ids:
        reward_scores(model, torch.tensor([row])).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "case",
    ["phi3 longrope", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gemma2", "jamba"))],
)
def test_training_computes_what_stock_gives_each_text_alone(
    case: str, tmp_path: Path, make_tokenizer: Callable[..., Any], tiny_texts: list[str]
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = save_stock(case, tmp_path, make_tokenizer()).config
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pairs = zip(tiny_texts[::2], tiny_texts[1::2], strict=True)
    rows = [{"prompt": "Ana buys", "chosen": f" {a}", "rejected": f" {b}"} for a, b in pairs]
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "disable_tqdm": True}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    trainer = PairwiseRewardTrainer(
        model=load_base(tmp_path),
        args=PairwiseRewardConfig(str(tmp_path / "run"), use_cpu=True, **settings),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    found = np.asarray(trainer.predict(Dataset.from_list(rows)).predictions).reshape(-1)
    save_reward_model(trainer.reward_model(), tmp_path / "out")
    scorer = RewardScorer.from_pretrained(tmp_path / "out")
    encoded = [
        scorer.formatter.encode_row({"prompt": row["prompt"], "completion": row[side]})
        for row in rows
        for side in ("chosen", "rejected")
    ]
    ids = [item.input_ids for item in encoded if item is not None]
    assert min(map(len, ids)) < 16 < max(map(len, ids))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(found, one_by_one(stock, ids), atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "phi3 longrope",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in ("llama", "gpt2", "gemma2", "qwen3_next")
        ),
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("bloom", "falcon", "llama dynamic")),
    ],
)
def test_values_of_tokens(case: str, tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    """Of token classifiers, every value in every batch is that of the text alone."""
    from transformers import AutoModelForTokenClassification

    tokenizer = make_tokenizer()
    config = save_stock(case, tmp_path, tokenizer).config
    config.num_labels, config.classifier_dropout = 3, 0.0
    stock = AutoModelForTokenClassification.from_config(config).eval()
    ids = texts(len(tokenizer))
    for settings in ({}, {"packing": "off", "padding_side": "left"}, {"max_tokens": 64}):
        runner = BatchRunner(copy.deepcopy(stock), tokenizer.pad_token_id, **settings)
        found = runner.run_tokens(ids, [range(len(row)) for row in ids])
        for row, values in zip(ids, found, strict=True):
            with torch.no_grad():
                want = copy.deepcopy(stock)(torch.tensor([row])).logits[0]
            torch.testing.assert_close(values, want, atol=1e-5, rtol=0)


def test_frequencies_that_a_folders_own_code_keeps_are_refused(
    make_config: Any, tiny_tokenizer: Any
) -> None:
    from transformers import LlamaForSequenceClassification
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    class OwnRotary(LlamaRotaryEmbedding):
        pass

    config = make_config("llama", tiny_tokenizer, num_labels=1, **DYNAMIC)
    model = LlamaForSequenceClassification(config).eval()
    model.model.rotary_emb = OwnRotary(config)
    with pytest.raises(ModelError, match=r"OwnRotary .* keeps the frequencies"):
        BatchRunner(model, tiny_tokenizer.pad_token_id).run([[1, 9, 2]])


def test_classes_of_lengths(make_config: Any, tiny_tokenizer: Any) -> None:
    lengths = [3, 16, 17, 30]
    plain = make_config("llama", tiny_tokenizer)
    assert len(set(length_classes(plain, lengths))) == 1
    dynamic = make_config("llama", tiny_tokenizer, **DYNAMIC)
    assert [len(set(length_classes(dynamic, lengths[:n]))) for n in (2, 3, 4)] == [1, 2, 3]
    longrope = make_config("llama", tiny_tokenizer, **LONGROPE)
    assert [len(set(length_classes(longrope, lengths[:n]))) for n in (2, 3, 4)] == [1, 2, 2]
    both = make_config("gemma3_text", tiny_tokenizer)
    both.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": DYNAMIC["rope_parameters"],
    }
    both.max_position_embeddings = 16
    assert len(set(length_classes(both, lengths))) == 3


# ---------------------------------------------------------------------- a folder's own code

HEADER = """
import torch
from transformers import LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast as Output
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb


def last(input_ids, pad):
    return ((input_ids != pad) * torch.arange(input_ids.shape[1])).argmax(-1)

"""
OWN_CODE = {
    "as stock": """
class Own(LlamaForSequenceClassification):
    pass
""",
    "mean of the text": """
class Own(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return Output(logits=self.score(mean))
""",
    "capped head": """
class Own(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = super().forward(input_ids, attention_mask=attention_mask).logits
        return Output(logits=torch.tanh(logits / 2) * 2)
""",
    "own attention": """
class OwnAttention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            part(hidden_states).view(shape).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=2 * self.scaling
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Own(LlamaForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = OwnAttention(config, i)
""",
    "looks at the width": """
class Own(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = super().forward(input_ids, attention_mask=attention_mask).logits
        return Output(logits=logits + 0.1 * input_ids.shape[1])
""",
    "positions of its own": """
class Own(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        width = input_ids.shape[1]
        at = torch.arange(width, 0, -1, device=input_ids.device)[None]
        hidden = self.model(input_ids, position_ids=at).last_hidden_state
        rows = torch.arange(len(input_ids))
        places = last(input_ids, self.config.pad_token_id)
        return Output(logits=self.score(hidden[rows, places] * at[0, places][:, None] / 9 ))
""",
}


@pytest.fixture
def own_folder(
    tmp_path: Path, tiny_rewards: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """``own_folder(case)``: a Llama reward model with the code of a case beside it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))

    def make(case: str, key: str = "AutoModelForSequenceClassification") -> Path:
        name = f"own_{abs(hash(case)) % 10**8}"
        folder = Path(shutil.copytree(tiny_rewards("llama"), tmp_path / name))
        (folder / "modeling_own.py").write_text(HEADER + OWN_CODE[case], encoding="utf-8")
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {key: "modeling_own.Own"}, "architectures": ["Own"]}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in ("as stock", "capped head") else [])
        for case in OWN_CODE
    ],
)
def test_a_folders_own_code_scores_by_its_own_forward(
    case: str, own_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = own_folder(case)
    with pytest.raises(ModelError, match=r"(?s)code of its own .*modeling_own.Own.*--trust_remote"):
        load_reward_model(folder)
    scorer = RewardScorer.from_pretrained(folder, trust_remote_code=True)
    model, pad = scorer.reward_model.model, scorer.reward_model.pad_token_id
    assert type(model).__name__ == "Own"
    ids = texts(70)
    want = one_by_one(model, ids)
    with caplog.at_level(logging.WARNING):
        check_runs(model, pad, ids, want)
    np.testing.assert_allclose(scorer.score_encoded(ids), want, atol=1e-5)
    assert "not packed" in caplog.text
    if case in ("as stock", "own attention"):
        check_trainable(model, pad)
    else:
        with pytest.raises(ModelError, match="its own forward gives other scores"):
            check_trainable(model, pad)
    batch = pad_batch(ids, pad)
    with torch.no_grad():  # what would come out if nobody asked the model itself
        if case not in ("as stock", "own attention"):
            assert np.abs(reward_scores(model, **batch).numpy() - want).max() > 1e-2
        else:
            np.testing.assert_allclose(own_logits(model, **batch)[:, 0], want, atol=1e-5)
    alone = case in ("looks at the width", "positions of its own")
    assert forward_of(model, pad) == ("alone" if alone else "own")


def test_code_for_another_class_is_no_licence_to_take_the_stock_one(
    own_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = own_folder("own attention", key="AutoModelForCausalLM")
    with pytest.raises(ModelError, match="code of its own"):
        load_base(folder)
    with pytest.raises(ModelError, match="none for AutoModelForSequenceClassification"):
        load_base(folder, trust_remote_code=True)
    # a model that was merged into transformers under the same name: the stock class is it
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        load_base(folder)
    assert "is not run: transformers' classes of the same names" in caplog.text


def test_a_class_that_scores_otherwise_is_not_trained(
    own_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from datasets import Dataset

    loaded = load_base(own_folder("capped head"), trust_remote_code=True)
    row = {"prompt": "Ana buys", "chosen": " 3 pens", "rejected": " 4 pens"}
    args = PairwiseRewardConfig(str(tmp_path / "run"), report_to="none", use_cpu=True)
    with pytest.raises(ModelError, match="its own forward gives other scores"):
        PairwiseRewardTrainer(model=loaded, args=args, train_dataset=Dataset.from_list([row] * 4))


def test_layers_that_do_not_call_the_packed_attention_are_found(
    tiny_rewards: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A layer whose forward was put in its place by hand: the class says nothing of it."""
    from companion.engine import pack, plan_trees

    model = load_reward_model(tiny_rewards("llama")).model
    ids = texts(70)
    assert packing_fault(model, 8) is None
    own = copy.deepcopy(model)
    layer = own.model.layers[0].self_attn
    plain = type(layer).forward

    def forward(*given: Any, **named: Any) -> Any:
        layer.config._attn_implementation, before = "sdpa", layer.config._attn_implementation
        try:
            return plain(layer, *given, **{**named, "is_causal": True})
        finally:
            layer.config._attn_implementation = before

    layer.forward = forward
    with torch.no_grad(), pytest.raises(ModelError, match="1 of the 2 layers"):
        packed_scores(own, pack(ids, plan_trees(ids)))
    with caplog.at_level(logging.WARNING):
        check_runs(own, 8, ids, one_by_one(model, ids))
    assert "1 of the 2 layers" in caplog.text
