"""Checkpoints in the shapes in which reward models are published: what is stored, and how it reads.

A :class:`Family` says of one shape which class of transformers holds the backbone, which stored
tensors are the head, what module they make, and how its values are read. No code of a folder is
run: the backbone goes by ``model_type``, whatever class the configuration names. Chapter 2.

What is read, and after whose description:

* one linear layer, under the names of OpenRLHF, Starling, PKU-Alignment and others;
* ``score.0``, ReLU, ``score.2`` (Qwen2.5-Math-RM, Qwen2.5-Math-PRM, INF-ORM);
* several attributes, of which one is named, or all are weighed (RLHFlow's DPA model);
* encoders with a ``classifier`` (DeBERTa, BERT, ModernBERT), by their own forward;
* causal LMs by the next token (Nemotron-Reward-HF; P(Yes)), or by two tokens at the separator of
  each step (Math-Shepherd);
* token classifiers of two labels with a separator (TRL's ``PRMTrainer``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import ModelError
from companion.models.checkpoint import LANGUAGE_HEAD, checkpoint_keys, find_file, read_json
from companion.models.head import ProbabilityHead, ScoreHead, TwoLayerHead
from companion.models.readout import ReadAs, Readout, ScalarReadout, TokenReadout

SEQUENCE = "AutoModelForSequenceClassification"
TOKEN = "AutoModelForTokenClassification"
#: names of a head that is one linear layer; the first is that of transformers
LINEAR_HEADS = (
    *("score", "value_head", "v_head", "reward_head", "score_head", "regression_head", "rm_head"),
)
#: ends each step of what Qwen2.5-Math-PRM scores
_QWEN_STEP = "<extra_0>"
#: classes of checkpoints' own code whose forward is backbone, head of two layers, read-out
_KNOWN_CODE = frozenset(
    {"Qwen2ForRewardModel", "Qwen2ForProcessRewardModel", "INFORMForSequenceClassification"}
)
#: first parts of names of weights that are a backbone's, or a language head's
_BODY = re.compile(
    rf"{LANGUAGE_HEAD}|(model|transformer|base_model|backbone|gpt_neox|layers|h|blocks|encoder|"
    r"embed\w*|wte|wpe|ln_f|norm|final_layer_norm|bert|deberta|roberta|electra|distilbert|albert)\."
)
#: what a configuration may do to the logits of a causal LM, which is not done here
_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One shape of a published reward model.

    Attributes
    ----------
    name : str
        In words.
    readout : ScalarReadout or TokenReadout
    auto_class : str
        Class of transformers for the backbone; its own head is replaced.
    stored : tuple of str
        Names of the head's tensors in the checkpoint.
    labels : int
        Outputs of the head.
    make : callable, optional
        From the stored tensors to the head; None: the class's own head is the one.
    formatter : mapping
        Arguments of :class:`companion.formatting.RewardFormatter` where no recipe was saved.
    own_code_is_known : bool
        Code that comes with the checkpoint was read, and is what is done here.
    stored_labels : int, optional
        Outputs of the stored head, if it has the name of the class's own; default: `labels`.
    """

    name: str
    readout: Readout
    auto_class: str = SEQUENCE
    stored: tuple[str, ...] = ()
    labels: int = 1
    make: Callable[[Tensors], nn.Module] | None = None
    formatter: Mapping[str, Any] = field(default_factory=dict)
    own_code_is_known: bool = False
    stored_labels: int | None = None


def kind_of(name: str, revision: str | None, read_as: ReadAs) -> str:
    """``scalar`` or ``process``, of a checkpoint without a manifest; reads no weights."""
    if read_as.step_separator is not None:
        return "process"
    keys = checkpoint_keys(name, revision) or set()
    described = find_file(name, "config.json", revision)
    names = (read_json(described).get("architectures") if described else None) or [""]
    return "process" if _is_process(str(names[0]), keys) else "scalar"


def _is_process(architecture: str, keys: Collection[str]) -> bool:
    return "ProcessReward" in architecture and "score.2.weight" in keys


def recognise(
    name: str, config: Any, keys: set[str] | None, tokenizer: Any, read_as: ReadAs
) -> Family | None:
    """The family of a checkpoint; None for a plain one, or one that is none of them.

    Parameters
    ----------
    name : str
        Of the folder, for errors.
    config : transformers.PretrainedConfig
    keys : set of str or None
        Names of the stored tensors.
    tokenizer : PreTrainedTokenizerBase
    read_as : ReadAs

    Raises
    ------
    ModelError
        If `read_as` says something that the checkpoint is not.
    """
    keys = keys or set()
    if read_as.reward_token:
        return _by_next_token(name, config, keys, tokenizer, read_as)
    architecture = (config.architectures or [""])[0]
    if {"score.0.weight", "score.2.weight"} <= keys:
        return _two_layers(architecture, keys, read_as)
    if read_as.step_separator is not None:
        return _token_classifier(name, architecture, config, read_as)
    linear = next((own for own in LINEAR_HEADS if f"{own}.weight" in keys), None)
    if linear is not None and not architecture.endswith("ForTokenClassification"):
        return _one_layer(name, linear, config, keys, read_as)
    if any(key.startswith("classifier.") for key in keys) and architecture.endswith(
        "ForSequenceClassification"
    ):
        return _encoder(config, tokenizer)
    return None


# ---------------------------------------------------------------------- the families


def _one_layer(
    name: str, linear: str, config: Any, keys: set[str], read_as: ReadAs
) -> Family | None:
    several = bool(read_as.attribute_weights) or read_as.attribute is not None
    bias = f"{linear}.bias" in keys
    if linear == "score" and not several and not bias:
        return None  # as transformers has it
    stored = (f"{linear}.weight", *([f"{linear}.bias"] if bias else []))
    labels = {int(i): str(label) for i, label in (config.id2label or {}).items()}

    def make(tensors: Tensors) -> nn.Module:
        head = linear_head(tensors[stored[0]], tensors[stored[1]] if bias else None)
        return one_attribute(head, name, labels, read_as)

    what = "a linear head" + (f" {linear!r}" if linear != "score" else "")
    if several:
        what = f"a head of several attributes, {_said(read_as)}"
    as_stored = config.num_labels if linear == "score" else None
    return Family(what, ScalarReadout(), stored=stored, make=make, stored_labels=as_stored)


def _two_layers(architecture: str, keys: set[str], read_as: ReadAs) -> Family:
    stored = tuple(
        key
        for key in ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")
        if key in keys
    )

    def make(tensors: Tensors) -> nn.Module:
        first, second = (
            linear_head(tensors[f"score.{i}.weight"], tensors.get(f"score.{i}.bias"))
            for i in (0, 2)
        )
        return TwoLayerHead(first, second)

    what = "a head of two layers (score.0, ReLU, score.2)"
    known = architecture in _KNOWN_CODE
    if not _is_process(architecture, keys) and read_as.step_separator is None:
        return Family(what, ScalarReadout(), stored=stored, make=make, own_code_is_known=known)
    readout = TokenReadout(
        "process",
        2,
        "min",
        separator=read_as.step_separator or _QWEN_STEP,
        step_score="good",
        closed=True,
    )
    return Family(what, readout, TOKEN, stored, 2, make, own_code_is_known=known)


def _token_classifier(name: str, architecture: str, config: Any, read_as: ReadAs) -> Family:
    if not architecture.endswith("ForTokenClassification") or config.num_labels != 2:
        raise ModelError(
            f"{name}: is no process model: {architecture or 'unknown'} of {config.num_labels} "
            "labels",
            "--step_separator is for token classifiers of two labels, heads of two layers, and, "
            "with two --reward_token, causal LMs",
        )
    readout = TokenReadout(
        "process",
        2,
        "min",
        separator=read_as.step_separator,
        step_score="good",
        chat=False,
        closed=True,
    )
    return Family("a token classifier of two labels", readout, TOKEN, labels=2)


def _encoder(config: Any, tokenizer: Any) -> Family:
    formatter: dict[str, Any] = {}
    readout = ScalarReadout()
    if tokenizer.chat_template is None and tokenizer.sep_token is not None:
        formatter = {"chat_template": pair_template(tokenizer), "text": "chat"}
        readout = ScalarReadout(finished=True)
    return Family(
        f"{config.model_type}'s own classifier, by its own forward",
        readout,
        formatter=formatter,
    )


def _by_next_token(
    name: str, config: Any, keys: set[str], tokenizer: Any, read_as: ReadAs
) -> Family:
    text = config.get_text_config()
    for own in _OF_LOGITS:
        if getattr(text, own, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{name}: {own}={getattr(text, own)} changes the logits of its tokens, which is "
                "not done here",
                "take a model without it",
            )
    tied = r"(embed_tokens|wte|embed_in)\.weight$"  # the language head's too, if it has none
    found = [key for key in keys if re.fullmatch(rf"{LANGUAGE_HEAD}weight", key)]
    found += [key for key in keys if re.search(tied, key)]
    stored = next(iter(found), None)
    if stored is None:
        raise ModelError(
            f"{name}: holds no language head, so no token has a logit",
            "--reward_token is for causal LMs whose weights are in safetensors files",
        )
    bias = stored.replace("weight", "bias")
    names = (stored, *([bias] if bias in keys else []))
    ids = [token_id(tokenizer, token) for token in read_as.reward_token]
    process = read_as.step_separator is not None
    if process and len(ids) != 2:
        raise ModelError(
            f"{name}: one reward_token at each separator", "name two: the good and the bad, as + -"
        )

    def make(tensors: Tensors) -> nn.Module:
        rows, own_bias = tensors[stored], tensors.get(bias)
        if len(ids) == 1 and read_as.reward_value == "probability":
            return ProbabilityHead(linear_head(rows, own_bias), ids[0])
        chosen = linear_head(rows[ids], None if own_bias is None else own_bias[ids])
        if process:  # bad, good
            return linear_head(
                chosen.weight.flip(0), None if chosen.bias is None else chosen.bias.flip(0)
            )
        if len(ids) == 1:
            return chosen
        if read_as.reward_value == "probability":
            return ProbabilityHead(chosen, 0)
        return weighed(chosen, (1.0, -1.0))

    tokens = " against ".join(map(repr, read_as.reward_token))
    if process:
        readout = TokenReadout(
            "process",
            2,
            "min",
            separator=read_as.step_separator,
            step_score="good",
            chat=False,
            closed=True,
            read_token=_marker(tokenizer, str(read_as.step_separator)),
        )
        what = f"a causal LM, by {tokens} at the end of each step"
        return Family(what, readout, TOKEN, names, 2, make, {"text": "plain"})
    # an EOS would end what the token is to continue; a template writes the answer's header
    formatter = {}
    if isinstance(tokenizer.chat_template, str):
        template = "{%- set add_generation_prompt = true -%}" + tokenizer.chat_template
        formatter = {"chat_template": template}
    return Family(
        f"a causal LM, by the {read_as.reward_value} of {tokens} as the next token",
        ScalarReadout(skipped=tokenizer.eos_token_id, finished=True),
        stored=names,
        make=make,
        formatter=formatter,
    )


# ---------------------------------------------------------------------- their parts


def linear_head(weight: Tensor, bias: Tensor | None) -> ScoreHead:
    """A layer with its own copies of stored tensors, in float32 (float64 stays)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    head = ScoreHead(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight.detach().to(dtype).clone())
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().to(dtype).clone())
    return head


def weighed(head: nn.Linear, weights: Collection[float]) -> ScoreHead:
    """The head of one score that is a weighed sum of a head's scores."""
    each = torch.tensor(list(weights), dtype=head.weight.dtype)
    bias = None if head.bias is None else (each @ head.bias)[None]
    return linear_head((each @ head.weight)[None], bias)


def one_attribute(
    head: ScoreHead, name: str, labels: Mapping[int, str], read_as: ReadAs
) -> ScoreHead:
    """The head of the attribute that was asked for, or of the weighed sum.

    Raises
    ------
    ModelError
        If there are several and nothing was asked for, or something else than there is.
    """
    several = head.out_features
    known = [labels.get(i, str(i)) for i in range(several)]
    if read_as.attribute_weights:
        if len(read_as.attribute_weights) != several:
            raise ModelError(
                f"{name}: {len(read_as.attribute_weights)} attribute_weights for {several} "
                f"attributes ({', '.join(known)})",
                "give one for each, in their order",
            )
        return weighed(head, read_as.attribute_weights)
    if read_as.attribute is None:
        if several > 1:
            raise several_attributes(name, several, known)
        return head
    numbers = [str(i) for i in range(several)]
    names = known if read_as.attribute in known else numbers
    if read_as.attribute not in names:
        raise ModelError(
            f"{name}: has no attribute {read_as.attribute!r}",
            f"name one of: {', '.join(known)}, or its number, 0 to {several - 1}",
        )
    at = names.index(read_as.attribute)
    return weighed(head, [float(i == at) for i in range(several)])


def several_attributes(name: str, several: int, known: Collection[str]) -> ModelError:
    """The error that a head gives several scores, and nobody said which."""
    return ModelError(
        f"{name}: num_labels is {several} ({', '.join(known)}); a reward model has one scalar",
        "if these are attributes of a reward, name one (--attribute NAME), or weigh them all "
        "(--attribute_weights W …); a classifier of kinds of text is no reward model",
    )


def token_id(tokenizer: Any, token: str) -> int:
    """The id of one token, by its name in the vocabulary, its text, or ``id:N``.

    Raises
    ------
    ModelError
        If the text is no single token.
    """
    if re.fullmatch(r"id:\d+", token):
        return int(token[3:])
    known = tokenizer.get_vocab()
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) == 1:
        return int(ids[0])
    if token in known:
        return int(known[token])
    parts = tokenizer.convert_ids_to_tokens(ids)
    raise ModelError(
        f"{token!r} is {len(ids)} tokens of this model ({', '.join(map(repr, parts))})",
        "name one token, as its vocabulary has it, or by its id: id:123",
    )


def _marker(tokenizer: Any, separator: str) -> int | None:
    """The token of a separator that is read: that of its word, not the line break behind it."""
    word = separator.strip()
    ids = tokenizer.encode(word, add_special_tokens=False) if word else []
    return int(ids[-1]) if ids and word != separator else None


def pair_template(tokenizer: Any) -> str:
    """A chat template that writes a question and its answer as the tokenizer writes a pair.

    ``[CLS] question [SEP] answer [SEP]`` of BERT, say. What stands before the last message is
    joined by line breaks.
    """
    first = tokenizer("a", add_special_tokens=False)["input_ids"]
    second = tokenizer("b", add_special_tokens=False)["input_ids"]
    pair = tokenizer("a", "b")["input_ids"]

    def place(part: list[int], start: int) -> int:
        return next(
            (i for i in range(start, len(pair)) if pair[i : i + len(part)] == part), len(pair)
        )

    i = place(first, 0)
    j = place(second, i + len(first))
    parts = pair[:i], pair[i + len(first) : j], pair[j + len(second) :]
    head, middle, tail = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in parts)
    template = (
        "{{ HEAD }}{% for message in messages %}{% if not loop.first %}"
        "{{ MIDDLE if loop.last else '\\n' }}{% endif %}{{ message['content'] }}"
        "{% endfor %}{{ TAIL }}"
    )
    for part, text in (("HEAD", head), ("MIDDLE", middle), ("TAIL", tail)):
        template = template.replace(part, json.dumps(text), 1)
    return template


def key_mapping(
    config: Any, auto_class: str, keys: Collection[str] | None
) -> dict[str, str] | None:
    """Where the backbone's weights are stored under another name than the class's; None: nowhere.

    (Starling-RM stores a Llama under ``transformer.``, whose class calls it ``model``.)
    """
    import transformers

    mapping = getattr(transformers, auto_class)._model_mapping
    try:
        prefix = mapping[type(config)].base_model_prefix
    except KeyError:
        return None
    inner = [key for key in keys or () if re.search(r"\.(layers|h)\.0\.", key)]
    stored = {re.split(r"\.(layers|h)\.0\.", key)[0] for key in inner}
    if len(stored) != 1 or stored == {prefix}:
        return None
    (own,) = stored
    if own.startswith(f"{prefix}."):
        return None
    return {rf"^{re.escape(own)}\.": f"{prefix}."}


def head_keys(keys: Collection[str]) -> list[str]:
    """Names of stored tensors that are no backbone's: a head's, of whatever kind."""
    return sorted(key for key in keys if not _BODY.match(key))


def _said(read_as: ReadAs) -> str:
    if read_as.attribute is not None:
        return f"of which {read_as.attribute!r} is the score"
    return f"weighed by {', '.join(f'{w:g}' for w in read_as.attribute_weights)}"


def with_reading(readout: Readout, read_as: ReadAs) -> Readout:
    """A read-out that says how its checkpoint is read."""
    return replace(readout, read_as=read_as)
