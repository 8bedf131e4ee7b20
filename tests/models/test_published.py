"""Published shapes of reward models: each against a forward written from its description.

The checkpoints are random and tiny, with the names of tensors and the fields of configurations that
are published. What is expected is computed here: backbone from transformers' own class, and the
head's arithmetic, in plain torch, from the stored tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from companion import RewardScorer
from companion.cli.main import main
from companion.errors import CompanionError, ModelError
from companion.models import load_base, load_reward_model, save_reward_model
from companion.models.readout import ReadAs
from companion.rl.rewards import open_reward
from companion.scoring import TokenScorer, load_scorer

CHAT = [
    {"prompt": "Ana has 3 boxes", "completion": "the answer is 3"},
    {"prompt": "Ana has 3 boxes", "completion": "the answer is 5 . the answer is 3"},
    {"prompt": "How many", "completion": "3"},
    {"prompt": "How many boxes has Ana", "completion": "5 boxes"},
]
Tensors = dict[str, torch.Tensor]


class Published:
    """A folder with a random checkpoint whose head is to be replaced."""

    def __init__(self, folder: Path, tokenizer: Any, config: Any, auto_class: str) -> None:
        import transformers

        torch.manual_seed(5)
        self.folder = folder
        getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # (that of Qwen2 is another class when it is read back)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.tensors: Tensors = load_file(folder / "model.safetensors")

    def store(self, head: Tensors, prefix: str = "model.", **config: Any) -> Path:
        """The backbone under another name, the head under its published one."""
        tensors = {k: v for k, v in self.tensors.items() if k.startswith("model.")}
        tensors = {prefix + k.removeprefix("model."): v for k, v in tensors.items()}
        save_file({**tensors, **head}, self.folder / "model.safetensors", {"format": "pt"})
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return self.folder

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """``[T, D]`` of one text alone, by the backbone's own class."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(self.folder)
        backbone = AutoModel.from_config(config).eval()
        body = {k.removeprefix("model."): v for k, v in self.tensors.items() if "model." in k[:6]}
        backbone.load_state_dict(body)
        with torch.no_grad():
            return backbone(torch.tensor([ids])).last_hidden_state[0]

    def chat(self, row: dict[str, Any]) -> list[int]:
        """Ids of a row by the chat template, as a model card shows it."""
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return list(self.tokenizer.apply_chat_template(messages, return_dict=False))


@pytest.fixture
def publish(make_tokenizer: Callable[..., Any], make_config: Any, tmp_path: Path) -> Any:
    def make(
        kind: str = "llama",
        auto_class: str = "AutoModelForSequenceClassification",
        extra: tuple[str, ...] = (),
        **config: Any,
    ) -> Published:
        tokenizer = make_tokenizer()
        if extra:
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [*tokenizer.all_special_tokens, *extra]}
            )
        made = make_config(kind, tokenizer, **config)
        return Published(tmp_path / "published", tokenizer, made, auto_class)

    return make


def everywhere(
    folder: Path, rows: list[dict[str, Any]], want: np.ndarray, tmp_path: Path, *flags: str
) -> None:
    """Scoring, `evaluate`, `rank` and the reward function of RL give what is wanted."""
    assert want.std() > 1e-3
    data = tmp_path / "rows.jsonl"

    def write(lines: list[dict[str, Any]]) -> str:
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(data)

    shared = ["--model", str(folder), "--device", "cpu", "--text", "chat", *flags]
    out = tmp_path / "out.jsonl"
    assert main(["score", *shared, "--input", write(rows), "--output", str(out)]) == 0
    found = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    np.testing.assert_allclose(found, want, atol=1e-5)

    pairs = [
        {"prompt": rows[0]["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in ((rows[0], rows[1]), (rows[1], rows[0]))
    ]
    figures = tmp_path / "figures.json"
    evaluate = ["evaluate", *shared, "--dataset_name", write(pairs), "--json", str(figures)]
    assert main(evaluate) == 0
    metrics = json.loads(figures.read_text())
    assert metrics["metrics"]["accuracy"] == 0.5

    candidates = [row["completion"] for row in rows[:2]]
    write([{"prompt": rows[0]["prompt"], "completions": candidates}])
    ranks = tmp_path / "ranks.jsonl"
    rank = ["rank", *shared, "--input", str(data), "--output", str(tmp_path / "best.jsonl")]
    assert main([*rank, "--ranks", str(ranks), "--overwrite"]) == 0
    (ranked,) = [json.loads(line) for line in ranks.read_text().splitlines()]
    given = {c["completion"]: c["score"] for c in ranked["completions"]}
    np.testing.assert_allclose([given[c] for c in candidates], want[:2], atol=1e-5)


def rewards(folder: Path, rows: list[dict[str, Any]], read_as: ReadAs | None = None) -> np.ndarray:
    """What RL gets of them."""
    reward = open_reward(str(folder), text="chat", dtype="float32", read_as=read_as)
    eos = load_scorer(folder, read_as=read_as, device="cpu").tokenizer.eos_token_id
    return np.array(
        reward(
            prompts=[row["prompt"] for row in rows],
            completions=[row["completion"] for row in rows],
            completion_ids=[[5, eos]] * len(rows),
        )
    )


# ---------------------------------------------------------------------- one linear layer


@pytest.mark.parametrize(
    ("head", "prefix", "bias"),
    [
        ("value_head", "model.", False),  # OpenRLHF
        ("v_head", "transformer.", False),  # Starling-RM
        ("score_head", "model.", True),  # PKU-Alignment's beaver
    ],
)
def test_a_linear_head_by_another_name(
    head: str, prefix: str, bias: bool, publish: Any, tmp_path: Path
) -> None:
    made = publish(architectures=["LlamaForCausalLM"])
    weight, own_bias = torch.randn(1, 32), torch.randn(1)
    stored = {f"{head}.weight": weight} | ({f"{head}.bias": own_bias} if bias else {})
    folder = made.store(stored, prefix, architectures=["LlamaModel"])
    want = np.array(
        [float(made.hidden(made.chat(row))[-1] @ weight[0] + bias * own_bias) for row in CHAT]
    )
    everywhere(folder, CHAT, want, tmp_path)
    np.testing.assert_allclose(rewards(folder, CHAT), want, atol=1e-5)
    loaded = load_reward_model(folder)
    assert any(f"{head!r}" in note for note in loaded.notes)
    if not bias:  # as a plain checkpoint, it is one of transformers
        save_reward_model(loaded, tmp_path / "plain")
        again = RewardScorer.from_pretrained(tmp_path / "plain", text="chat", device="cpu")
        np.testing.assert_allclose(again.score(CHAT).raw, want, atol=1e-5)


def test_two_layers(publish: Any, tmp_path: Path) -> None:
    made = publish("qwen2")
    torch.manual_seed(1)
    w0, b0, w2, b2 = torch.randn(32, 32) / 4, torch.randn(32), torch.randn(1, 32), torch.randn(1)
    folder = made.store(
        {"score.0.weight": w0, "score.0.bias": b0, "score.2.weight": w2, "score.2.bias": b2},
        architectures=["Qwen2ForRewardModel"],
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"},
    )

    def score(row: dict[str, Any]) -> float:
        last = made.hidden(made.chat(row))[-1]
        return float(w2[0] @ torch.relu(w0 @ last + b0) + b2)

    want = np.array([score(row) for row in CHAT])
    everywhere(folder, CHAT, want, tmp_path)
    np.testing.assert_allclose(rewards(folder, CHAT), want, atol=1e-5)
    with pytest.raises(ModelError, match="TwoLayerHead: stock classes"):
        save_reward_model(load_reward_model(folder), tmp_path / "saved")


def test_attributes_by_name_by_number_and_weighed(publish: Any, tmp_path: Path) -> None:
    names = {0: "helpfulness", 1: "correctness", 2: "verbosity"}
    made = publish("mistral", num_labels=3, id2label=names)
    torch.manual_seed(2)
    weight = torch.randn(3, 32)
    folder = made.store({"score.weight": weight})
    each = np.array([(weight @ made.hidden(made.chat(row))[-1]).numpy() for row in CHAT])
    with pytest.raises(ModelError, match="helpfulness, correctness, verbosity") as caught:
        load_reward_model(folder)
    assert "--attribute" in str(caught.value)
    everywhere(folder, CHAT, each[:, 1], tmp_path, "--attribute", "correctness")
    weights = (0.5, -2.0, 1.0)
    for read_as, want in (
        (ReadAs(attribute="2"), each[:, 2]),
        (ReadAs(attribute_weights=weights), each @ np.array(weights)),
    ):
        scorer = load_scorer(folder, read_as=read_as, text="chat", device="cpu")
        np.testing.assert_allclose(scorer.score(CHAT).raw, want, atol=1e-5)
    np.testing.assert_allclose(rewards(folder, CHAT, ReadAs(attribute="2")), each[:, 2], atol=1e-5)
    for wrong in (ReadAs(attribute="honesty"), ReadAs(attribute_weights=(1.0,))):
        with pytest.raises(ModelError, match="verbosity"):
            load_reward_model(folder, read_as=wrong)


def test_weights_of_before_safetensors(publish: Any) -> None:
    made = publish()
    weight = torch.randn(1, 32)
    folder = made.store({"v_head.weight": weight}, "transformer.")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    want = [float(made.hidden(made.chat(row))[-1] @ weight[0]) for row in CHAT]
    scorer = load_scorer(folder, text="chat", device="cpu")
    np.testing.assert_allclose(scorer.score(CHAT).raw, want, atol=1e-5)


# ---------------------------------------------------------------------- the next token


@pytest.mark.parametrize("value", ["logit", "probability"])
@pytest.mark.parametrize("tokens", [("Yes",), ("Yes", "No"), ("id:9",)])
def test_the_next_token_of_a_causal_lm(
    value: Any, tokens: tuple[str, ...], publish: Any, tmp_path: Path
) -> None:
    made = publish("qwen3", "AutoModelForCausalLM", extra=("Yes", "No"), tie_word_embeddings=False)
    lm_head = made.tensors["lm_head.weight"]
    ids = [9 if t == "id:9" else made.tokenizer.convert_tokens_to_ids(t) for t in tokens]

    def score(row: dict[str, Any]) -> float:
        prompt = made.chat(row) + made.tokenizer.encode("<|assistant|>", add_special_tokens=False)
        logits = lm_head @ made.hidden(prompt)[-1]
        if len(ids) == 1:
            return float(logits[ids[0]] if value == "logit" else logits.softmax(0)[ids[0]])
        apart = logits[ids[0]] - logits[ids[1]]
        return float(apart if value == "logit" else torch.sigmoid(apart))

    assert "<|assistant|>" in made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    want = np.array([score(row) for row in CHAT])
    read_as = ReadAs(reward_token=tokens, reward_value=value)
    if len(tokens) == 2:
        flags = ("--reward_token", *tokens, "--reward_value", value)
        everywhere(made.folder, CHAT, want, tmp_path, *flags)
        np.testing.assert_allclose(rewards(made.folder, CHAT, read_as), want, atol=1e-5)
    scorer = load_scorer(made.folder, read_as=read_as, text="chat", device="cpu")
    np.testing.assert_allclose(scorer.score(CHAT).raw, want, atol=1e-5)


def test_the_next_token_of_plain_text_is_that_of_no_end(publish: Any) -> None:
    made = publish("llama", "AutoModelForCausalLM", extra=("Yes",), tie_word_embeddings=True)
    yes = made.tokenizer.convert_tokens_to_ids("Yes")
    embeddings = made.tensors["model.embed_tokens.weight"]
    texts = ["the answer is 3", "the answer is 5 . the answer"]
    want = [
        float(embeddings[yes] @ made.hidden(made.tokenizer(text)["input_ids"])[-1])
        for text in texts
    ]
    read_as = ReadAs(reward_token=("Yes",))
    scorer = load_scorer(made.folder, read_as=read_as, text="plain", device="cpu")
    np.testing.assert_allclose(scorer.score(texts).raw, want, atol=1e-5)
    with pytest.raises(ModelError, match="tokens of this model"):
        load_reward_model(made.folder, read_as=ReadAs(reward_token=("the answer",)))


# ---------------------------------------------------------------------- steps

STEPS = [
    {"prompt": "Ana has 3 boxes", "completions": ["Ana has 3", "the answer is 3"]},
    {"prompt": "How many", "completions": ["5 boxes", "Ana has 5", "3"]},
]


def test_a_process_model_of_two_layers(publish: Any, tmp_path: Path) -> None:
    made = publish("qwen2", extra=("<extra_0>",), num_labels=2)
    torch.manual_seed(1)
    w0, b0, w2, b2 = torch.randn(32, 32) / 4, torch.randn(32), torch.randn(2, 32), torch.randn(2)
    folder = made.store(
        {"score.0.weight": w0, "score.0.bias": b0, "score.2.weight": w2, "score.2.bias": b2},
        architectures=["Qwen2ForProcessRewardModel"],
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    )
    extra = made.tokenizer.convert_tokens_to_ids("<extra_0>")
    want = []
    for row in STEPS:
        text = "<extra_0>".join(row["completions"]) + "<extra_0>"
        ids = made.chat({"prompt": row["prompt"], "completion": text})
        logits = torch.relu(made.hidden(ids) @ w0.T + b0) @ w2.T + b2
        want.append(logits.softmax(-1)[torch.tensor(ids) == extra, 1].numpy())
    scorer = load_scorer(folder, device="cpu")
    assert isinstance(scorer, TokenScorer)
    check_steps(scorer, folder, want, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_two_tokens_at_the_separator_of_a_causal_lm(
    kind: str, publish: Any, tmp_path: Path
) -> None:
    made = publish(kind, "AutoModelForCausalLM", extra=("ки", "+", "-"), tie_word_embeddings=False)
    good, bad, marker = (made.tokenizer.convert_tokens_to_ids(t) for t in ("+", "-", "ки"))
    rows = [{**row, "prompt": row["prompt"] + " "} for row in STEPS]
    want = []
    for row in rows:
        text = row["prompt"] + "".join(f"{step} ки\n" for step in row["completions"])
        ids = made.tokenizer(text)["input_ids"]
        logits = made.hidden(ids) @ made.tensors["lm_head.weight"][[good, bad]].T
        want.append(logits.softmax(-1)[torch.tensor(ids) == marker, 0].numpy())
    read_as = ReadAs(reward_token=("+", "-"), step_separator=" ки\n")
    scorer = load_scorer(made.folder, read_as=read_as, device="cpu")
    flags = ("--reward_token", "+", "-", "--step_separator", " ки\n")
    check_steps(scorer, made.folder, want, tmp_path, *flags, rows=rows)


def test_a_token_classifier_as_trl_saves_it(publish: Any, tmp_path: Path) -> None:
    made = publish("qwen3", "AutoModelForTokenClassification", extra=("|",), num_labels=2)
    weight, bias = made.tensors["score.weight"], torch.randn(2)
    made.store({"score.weight": weight, "score.bias": bias})
    mark = made.tokenizer.convert_tokens_to_ids("|")
    rows = [{**row, "prompt": row["prompt"] + " "} for row in STEPS]
    want = []
    for row in rows:
        ids = made.tokenizer(row["prompt"] + "|".join(row["completions"]) + "|")["input_ids"]
        logits = made.hidden(ids) @ weight.T + bias
        want.append(logits.softmax(-1)[torch.tensor(ids) == mark, 1].numpy())
    with pytest.raises(ModelError, match="--step_separator"):
        load_scorer(made.folder, device="cpu")
    scorer = load_scorer(made.folder, read_as=ReadAs(step_separator="|"), device="cpu")
    check_steps(scorer, made.folder, want, tmp_path, "--step_separator", "|", rows=rows)


def check_steps(
    scorer: Any,
    folder: Path,
    want: list[np.ndarray],
    tmp_path: Path,
    *flags: str,
    rows: list[dict[str, Any]] = STEPS,
) -> None:
    """Values of steps, their least as the score, and first errors by `evaluate`."""
    found = scorer.score(rows)
    assert np.concatenate(want).std() > 1e-3
    for own, values, wrong in zip(want, found.values, found.wrong, strict=True):
        np.testing.assert_allclose(values, own, atol=1e-5)
        np.testing.assert_allclose(wrong, 1 - own, atol=1e-5)
    np.testing.assert_allclose(found.raw, [own.min() for own in want], atol=1e-5)
    data, figures = tmp_path / "steps.jsonl", tmp_path / "figures.json"
    labelled = [
        {**row, "labels": [bool(value > 0.5) for value in own]}
        for row, own in zip(rows, want, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    evaluate = ["evaluate", "--model", str(folder), "--dataset_name", str(data), "--device", "cpu"]
    assert main([*evaluate, "--json", str(figures), *flags]) == 0
    metrics = json.loads(figures.read_text())["metrics"]
    accuracy = metrics["step_accuracy"]
    assert (accuracy["value"] if isinstance(accuracy, dict) else accuracy) == 1.0


# ---------------------------------------------------------------------- encoders


def save_encoder(kind: str, folder: Path) -> Any:
    """A one-label judge as transformers saves it, its tokenizer with pairs and without EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        AutoConfig,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = ["Ana", "has", "3", "boxes", "the", "answer", "is", "5", ".", "How", "many"]
    vocab = {t: i for i, t in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 1}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if kind == "modernbert":
        special |= {"cls_token_id": 1, "sep_token_id": 2}
    if kind == "deberta-v2":
        sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.0}
        sizes |= {"pooler_hidden_size": 16, "position_buckets": 8, "type_vocab_size": 0}
    torch.manual_seed(4)
    config = AutoConfig.for_model(
        kind, vocab_size=len(vocab), initializer_range=0.5, **sizes, **special
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert"])
def test_an_encoder_by_its_own_forward(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    stock, tokenizer = save_encoder(kind, folder)

    def score(row: dict[str, Any]) -> float:
        given = tokenizer(row["prompt"], row["completion"], return_tensors="pt")
        if kind != "bert":
            given.pop("token_type_ids")
        with torch.no_grad():
            return float(stock(**given).logits[0, 0])

    rows = [*CHAT, {"prompt": "Ana", "completion": "has 3", "terminated": False}]
    want = np.array([score(row) for row in rows])
    everywhere(folder, rows, want, tmp_path)
    np.testing.assert_allclose(rewards(folder, CHAT), want[:4], atol=1e-5)
    scorer = load_scorer(folder, device="cpu")
    assert not scorer.packs
    np.testing.assert_allclose(scorer.score(rows).raw, want, atol=1e-5)
    alone = [float(scorer.score([row]).raw[0]) for row in rows]
    np.testing.assert_allclose(alone, want, atol=1e-5)
    save_reward_model(scorer.reward_model, tmp_path / "saved")
    again = load_scorer(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(again.score(rows).raw, want, atol=1e-5)
    with pytest.raises(CompanionError):
        load_base(folder)  # nothing trains it


# ---------------------------------------------------------------------- what is none


def test_a_head_that_is_not_known_is_named(publish: Any) -> None:
    made = publish()
    folder = made.store({"gating.layers.0.weight": torch.randn(2, 32)})
    with pytest.raises(ModelError, match=r"gating\.layers\.0\.weight"):
        load_reward_model(folder)
    bare = made.store({})
    with pytest.raises(ModelError, match="has no head"):
        load_reward_model(bare)


def test_a_backbone_with_holes_is_refused(publish: Any) -> None:
    made = publish()
    del made.tensors["model.layers.1.mlp.up_proj.weight"]
    folder = made.store({"value_head.weight": torch.randn(1, 32)})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model\.layers\.1\.mlp\.up_proj"):
        load_reward_model(folder)


def test_code_that_is_not_known_is_not_passed_over(publish: Any) -> None:
    made = publish("qwen2")
    folder = made.store(
        {"value_head.weight": torch.randn(1, 32)},
        auto_map={"AutoModelForSequenceClassification": "modeling_own.CappedRewardModel"},
    )
    with pytest.raises(ModelError, match=r"modeling_own\.CappedRewardModel"):
        load_reward_model(folder)


# ---------------------------------------------------------------------- adopted


def adopted_by(tmp_path: Path, folder: Path, rows: list[dict[str, Any]], *flags: str) -> Path:
    reference = tmp_path / "reference.jsonl"
    reference.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "adopted"
    command = ["adopt", str(folder), "--reference", str(reference), "--device", "cpu", *flags]
    assert main([*command, "--output_dir", str(target)]) == 0
    return target


@pytest.mark.parametrize(
    "shape", ["value_head", "two layers", "next token", "encoder", "pad is eos"]
)
def test_an_adopted_model_is_one_of_the_companion(
    shape: str, publish: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from companion.audit import audit
    from companion.monitoring.golden import check_target
    from companion.scoring import check_golden
    from companion.serving import open_service

    flags: tuple[str, ...] = ()
    if shape == "encoder":
        folder = tmp_path / "encoder"
        save_encoder("bert", folder)
        read_as = ReadAs()
    elif shape == "next token":
        folder = publish("qwen3", "AutoModelForCausalLM", extra=("Yes", "No")).folder
        read_as, flags = ReadAs(reward_token=("Yes", "No")), ("--reward_token", "Yes", "No")
    else:
        made = publish()
        head = {"value_head.weight": torch.randn(1, 32)}
        read_as = ReadAs()
        if shape == "two layers":
            head = {"score.0.weight": torch.randn(32, 32), "score.2.weight": torch.randn(1, 32)}
        if shape == "pad is eos":
            made.tokenizer.pad_token = made.tokenizer.eos_token
            made.tokenizer.save_pretrained(made.folder)
            read_as, flags = ReadAs(readout="transformers"), ("--readout", "transformers")
        folder = made.store(head)
    plain = load_scorer(folder, read_as=read_as, device="cpu", text="chat")
    want = plain.score(CHAT)
    assert want.z is None
    before = sorted(path.name for path in folder.iterdir())
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in CHAT
    ]
    target = adopted_by(tmp_path, folder, messages, *flags)
    assert sorted(path.name for path in folder.iterdir()) == before
    scorer = load_scorer(target, device="cpu")  # no flags any more
    found = scorer.score(CHAT)
    np.testing.assert_allclose(found.raw, want.raw, atol=1e-5)
    np.testing.assert_allclose(found.z, (want.raw - want.raw.mean()) / want.raw.std(ddof=1))
    report = check_golden(scorer)
    assert report is not None
    assert report.ok, report.lines()
    assert not report.differs
    assert open_service(scorer).identity.version  # it scores the golden texts, or refuses
    checked = check_target(target)
    assert checked.state == "ok", checked.changed
    found_by_audit = audit(target)
    assert not found_by_audit.faults, found_by_audit.table()
    if shape != "encoder":
        with pytest.raises(ModelError, match="says how it is read"):
            load_scorer(target, read_as=ReadAs(readout="mask"))


def test_adopted_in_place_and_never_twice(publish: Any, tmp_path: Path, tiny_reward: Path) -> None:
    from companion.scoring import adopt

    folder = publish().store({"value_head.weight": torch.randn(1, 32)})
    pairs = [{"prompt": "How many", "chosen": "3 boxes", "rejected": "5"}]
    done = adopt(folder, pairs, source="one pair", device="cpu")
    assert done.path.parent == folder
    assert done.manifest.reference is not None
    assert done.manifest.reference.n == 2
    with pytest.raises(ModelError, match="was adopted before"):
        adopt(folder, pairs, device="cpu")
    with pytest.raises(ModelError, match="the companion saved it"):
        adopt(tiny_reward, pairs, device="cpu")


def test_an_adopted_process_model(publish: Any, tmp_path: Path) -> None:
    made = publish("mistral", "AutoModelForCausalLM", extra=("ки", "+", "-"))
    rows = [{**row, "prompt": row["prompt"] + " "} for row in STEPS]
    read_as = ReadAs(reward_token=("+", "-"), step_separator=" ки\n")
    want = load_scorer(made.folder, read_as=read_as, device="cpu").score(rows)
    flags = ("--reward_token", "+", "-", "--step_separator", " ки\n")
    target = adopted_by(tmp_path, made.folder, rows, *flags)
    found = load_scorer(target, device="cpu").score(rows)
    np.testing.assert_allclose(found.raw, want.raw, atol=1e-5)
    assert found.z is not None
