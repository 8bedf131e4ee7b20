"""Load a base for training, or a reward model for use; refuse what is neither.

``AutoModelForSequenceClassification`` draws a random head for a checkpoint that has none, and TRL
suppresses the warning: such a model scores, and its scores mean nothing. Here that is an error.
Chapter 2.
"""

from __future__ import annotations

from typing import Any

import torch

from companion.errors import ModelError, ReadoutError
from companion.formatting import RECIPE_FILE, Overlong, RewardFormatter, TextMode
from companion.models.checkpoint import (
    LANGUAGE_HEAD,
    OLD_HEADS,
    PathLike,
    add_rows,
    checkpoint_keys,
    disable_dropout,
    find_file,
    is_adapter,
    load_config,
    load_tokenizer,
    load_weights,
    read_json,
    read_tensor,
    refuse_missing,
    resolve,
    set_pad,
)
from companion.models.guards import (
    check_head,
    check_tokenizer_and_config,
    precision_notes,
    prepare_token_head,
)
from companion.models.head import ScoreHead, head_name, initialise_head, install_head
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.memory import place
from companion.models.readout import LABEL_NAMES, ScalarReadout, readout_from_dict
from companion.models.reward_model import RewardModel

_HEAD = "score.weight"
_SCALAR = "AutoModelForSequenceClassification"
_BY_TOKEN = "AutoModelForTokenClassification"
#: Tokens that exist to pad, or to be reserved, in the vocabularies of known models; best first.
_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",  # Llama 3
    "<|fim_pad|>",  # Qwen 2.5 and 3
    "<|vision_pad|>",
    "<|reserved_special_token_0|>",  # Llama 3
    "<|endoftext|>",  # Qwen instruct models, whose EOS is <|im_end|>
)
NEW_PAD = "<|pad|>"
#: What else heads are called, which nothing here reads.
_OTHER_HEADS = frozenset(
    {"classifier", "v_head", "value_head", "reward_head", "regression_head", "rm_head"}
)


def load_base(
    path_or_id: PathLike,
    *,
    labels: int | None = None,
    head_seed: int = 0,
    head_std: float | None = None,
    keep_head: bool = False,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = None,
    max_length: int | None = None,
    overlong: Overlong = "drop",
    chat_template: str | None = None,
    text: TextMode | None = None,
    split_special_tokens: bool = False,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load any decoder as the start of a reward model: fresh head, no dropout.

    Parameters
    ----------
    path_or_id : str or path
        A folder or a hub id of a causal LM (or of an earlier reward model).
    labels : int, optional
        Default: a head that gives one score a text. 1 or 3: a head for every token, of an outcome
        model and of steps that are right or wrong (1), or bad, neutral or good (3).
    head_seed, head_std : int, float
        The fresh head is drawn from N(0, head_std²), by default std = 1/sqrt(D + 1); see
        :func:`companion.models.initialise_head`.
    keep_head : bool
        Keep the head of an earlier reward model in place of a fresh one.
    dtype : torch.dtype or str
        Of the weights. The head stays in float32.
    device : str, optional
        Where to put the model; default: it stays on the CPU (a trainer moves it).
    max_length, overlong, chat_template, text, split_special_tokens
        For :class:`companion.formatting.RewardFormatter`.
    attn_implementation, revision, trust_remote_code
        For transformers.

    Returns
    -------
    RewardModel
        Its ``notes`` say, a line each, what was repaired (the pad token, above all). With `labels`
        its ``readout`` is None: the training says how the tokens' values are read.

    Raises
    ------
    ModelError
        For a wrong folder, a model that is no decoder, weights that are missing, or other labels.
    ReadoutError
        For a tokenizer without EOS, with the cure.
    """
    if labels is not None and labels not in LABEL_NAMES:
        raise ModelError(f"labels is {labels}", "use 1 or 3")
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_adapter(name, revision):
        raise ModelError(
            f"{name}: holds a LoRA adapter, not a base",
            "give the base, or merge the adapter: save_reward_model(load_reward_model(folder), …)",
        )
    config = load_config(name, **shared)
    tokenizer = load_tokenizer(name, **shared)
    notes: list[str] = []
    had = config.num_labels
    keys = checkpoint_keys(name, revision)
    has_head = keys is not None and _HEAD in keys
    by_token = labels is not None
    config.num_labels = labels or 1
    config.problem_type = None if by_token else "regression"
    dropout = disable_dropout(config)
    if by_token:
        config.classifier_dropout = 0.0  # without the entry, stock token heads drop 0.1
    if dropout:
        notes.append(f"dropout switched off ({', '.join(dropout)}): a score has no randomness")

    decoder = config.get_text_config()
    pad = choose_pad_token(tokenizer, decoder.pad_token_id, notes)  # refuses one without EOS
    rows = int(decoder.vocab_size)
    decoder.pad_token_id = pad if pad < rows else None
    if has_head and had != config.num_labels:
        raise ModelError(
            f"{name}: is a classifier of {had} labels",
            f"give a causal LM, or a reward model with num_labels={config.num_labels}",
        )
    model, missing = load_weights(
        name,
        config,
        dtype,
        auto_class=_BY_TOKEN if by_token else _SCALAR,
        attn_implementation=attn_implementation,
        left_out=LANGUAGE_HEAD if keep_head else OLD_HEADS,
        **shared,
    )
    own = f"{head_name(model)}.weight"
    gaps = missing - {own, own.replace("weight", "bias")}
    refuse_missing(name, gaps, "weights of the backbone")
    if pad >= rows:
        add_rows(model, pad + 1)
        notes.append(f"embeddings grown from {rows} to {pad + 1} rows for the pad token")
    set_pad(model, pad)
    head = install_head(model)
    head.to(torch.float32)
    if keep_head and own not in missing:
        _copy_stored(head, name, own, revision)
        notes.append("went on with the head of the checkpoint")
    else:
        if keep_head:
            raise ModelError(f"{name}: keep_head=True, but the checkpoint has no head")
        std = initialise_head(head, head_seed, head_std)
        had_one = "in place of the checkpoint's own, " if own not in missing else ""
        notes.append(f"fresh head, {had_one}seed {head_seed}, std {std:.4g}")
    if device is not None:
        place(model, device)
    check_tokenizer_and_config(tokenizer, model.config)
    formatter = RewardFormatter(
        tokenizer,
        max_length=max_length,
        overlong=overlong,
        chat_template=chat_template,
        text=text,
        split_special_tokens=split_special_tokens,
    )
    notes.extend(formatter.notes)
    notes.extend(precision_notes(model))
    if labels is None:
        return RewardModel(model, tokenizer, formatter, notes=notes)
    model.config.id2label = dict(LABEL_NAMES[labels])
    model.config.label2id = {name: index for index, name in LABEL_NAMES[labels].items()}
    return RewardModel(model, tokenizer, formatter, notes=notes, readout=None)


def load_reward_model(
    path_or_id: PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load a trained reward model of any kind in eval mode, or say why the checkpoint is none.

    Takes a folder (or hub id) with a plain sequence- or token-classification checkpoint, or with a
    LoRA adapter whose base can be found; the adapter is merged. A checkpoint that the companion did
    not save has no manifest: allowed for a model of one score a text, with a note; its formatter is
    built from the tokenizer.

    Raises
    ------
    ModelError
        For a wrong folder, a checkpoint without its head, other labels than its read-out needs,
        missing weights, a damaged manifest, a tokenizer that is not the one of the manifest, or a
        value for each token without the manifest that says what they mean.
    ReadoutError
        For a pad token that is missing, is the EOS, or differs from the configuration's.
    """
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    described = find_file(name, MANIFEST_FILE, revision)
    manifest = None if described is None else RewardManifest.load(described)
    readout = (
        ScalarReadout() if manifest is None else readout_from_dict(manifest.readout, str(described))
    )
    notes: list[str] = []
    adapter = is_adapter(name, revision)
    if adapter:
        from companion.models.lora import load_adapter

        model, tokenizer = load_adapter(name, dtype, attn_implementation, **shared)
    else:
        model, tokenizer = _load_checkpoint(
            name, readout.kind, dtype, attn_implementation, notes, **shared
        )
    if readout.kind == "scalar":
        if model.config.problem_type != "regression":
            notes.append(
                f"config.problem_type was {model.config.problem_type!r}: vLLM and others would "
                "apply a sigmoid to the score; set to 'regression', save the model to keep it"
            )
            model.config.problem_type = "regression"
        check_head(model)
    else:
        prepare_token_head(model, readout.labels)
    check_tokenizer_and_config(tokenizer, model.config)
    formatter = _formatter(name, tokenizer, manifest, revision, notes)
    notes.extend(formatter.notes)
    notes.extend(precision_notes(model))
    model.eval()
    if device is not None:
        place(model, device)
    source = None if adapter else (name, revision)
    return RewardModel(model, tokenizer, formatter, manifest, notes, readout, source)


def load_formatter(
    path_or_id: PathLike,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
) -> tuple[RewardFormatter, RewardManifest | None]:
    """The formatter and the manifest of a reward model, without its weights.

    For a client whose reward model runs on a server: the token ids are made here, by the recipe
    that was saved with the model. What had to be assumed is added to `notes`.

    Raises
    ------
    ModelError
        For a folder without a tokenizer, a damaged manifest, or a tokenizer that is not the one of
        the manifest.
    """
    name = resolve(path_or_id)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    described = find_file(name, MANIFEST_FILE, revision)
    manifest = None if described is None else RewardManifest.load(described)
    return _formatter(name, tokenizer, manifest, revision, [] if notes is None else notes), manifest


def choose_pad_token(tokenizer: Any, config_pad_id: int | None, notes: list[str]) -> int:
    """Give the tokenizer a pad token of its own, changing it in place if it must; its id.

    It is neither the EOS nor the unknown token (transformers #35352, trl #2778). Order: the
    tokenizer's own; a token of the vocabulary that is meant for it; a new ``<|pad|>``. What was
    repaired is added to `notes`.

    Raises
    ------
    ReadoutError
        If the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ReadoutError(
            "the tokenizer has no EOS token, so the end of a completion cannot be marked",
            "set tokenizer.eos_token to the token that ends a text in the model's training data "
            "(tokenizer.eos_token = '…'; tokenizer.save_pretrained(folder))",
        )
    taken = {tokenizer.eos_token_id, tokenizer.unk_token_id}
    own: int | None = tokenizer.pad_token_id
    if own is not None and own not in taken:
        if config_pad_id != own:
            notes.append(
                f"config.pad_token_id was {config_pad_id}: set to the tokenizer's, {own} "
                f"({tokenizer.pad_token!r})"
            )
        return own
    if own is None:
        why = "the tokenizer has no pad token"
    elif own == tokenizer.eos_token_id:
        why = f"the tokenizer's pad token is its EOS ({tokenizer.pad_token!r})"
    else:
        why = f"the tokenizer's pad token is its unknown token ({tokenizer.pad_token!r})"
    known = tokenizer.added_tokens_encoder
    for candidate in _CANDIDATES:
        index: int | None = known.get(candidate)
        if index is not None and index not in taken and index != tokenizer.bos_token_id:
            tokenizer.pad_token = candidate
            notes.append(f"{why}: {candidate!r} ({index}) of its vocabulary is used")
            return index
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    notes.append(f"{why}: {NEW_PAD!r} ({tokenizer.pad_token_id}) was added")
    return int(tokenizer.pad_token_id)


# ---------------------------------------------------------------------- inside


def _load_checkpoint(
    name: str,
    kind: str,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    notes: list[str],
    **shared: Any,
) -> tuple[Any, Any]:
    """Model and tokenizer of a plain checkpoint, its head whole and in fp32."""
    config = load_config(name, **shared)
    if kind == "scalar":
        _refuse_token_level(name, config)
        keys = checkpoint_keys(name, shared["revision"])
        if keys is not None and _HEAD not in keys:
            _refuse_headless(name, config, keys)
        if config.num_labels != 1:
            raise ModelError(
                f"{name}: num_labels is {config.num_labels}; a reward model has one scalar",
                "use a checkpoint that was trained with num_labels=1",
            )
    tokenizer = load_tokenizer(name, **shared)
    disable_dropout(config)
    model, missing = load_weights(
        name,
        config,
        dtype,
        auto_class=_SCALAR if kind == "scalar" else _BY_TOKEN,
        attn_implementation=attn_implementation,
        left_out=LANGUAGE_HEAD,
        notes=notes,
        **shared,
    )
    if _HEAD in missing:
        _refuse_headless(name, config)
    refuse_missing(name, missing)
    head = install_head(model)
    if head.weight.dtype != torch.float32:  # as it was saved, not rounded to half precision
        head.to(torch.float32)
        _copy_stored(head, name, f"{head_name(model)}.weight", shared["revision"])
    return model, tokenizer


def _copy_stored(head: ScoreHead, name: str, key: str, revision: str | None) -> None:
    stored = read_tensor(name, key, revision)
    if stored is not None:
        with torch.no_grad():
            head.weight.copy_(stored)


def _refuse_token_level(name: str, config: Any) -> None:
    """Its ``score.weight`` fits, so it would load, and read a token's value as a text's."""
    kinds = [kind for kind in config.architectures or [] if kind.endswith("ForTokenClassification")]
    if kinds:
        raise ModelError(
            f"{name}: holds a model with a value for each token ({kinds[0]}), and no "
            f"{MANIFEST_FILE} for it: nothing says what the values of its tokens mean",
            "give a folder that 'companion train outcome' or 'companion train process' wrote",
        )


def _refuse_headless(name: str, config: Any, keys: set[str] | None = None) -> None:
    own = (getattr(config, "auto_map", None) or {}).get(_SCALAR)
    if own is not None:
        raise ModelError(
            f"{name}: the head of its own class {own} is not the one linear layer {_HEAD!r}",
            "rename the layer to 'score' in its code and its weights, if it is one linear layer; "
            "another kind of head cannot be scored with the companion",
        )
    kind = ", ".join(config.architectures or ["unknown"])
    others = sorted({key.split(".")[0] for key in keys or ()} & _OTHER_HEADS)
    if others:
        raise ModelError(
            f"{name}: its head is called {others[0]!r}, not 'score' (architecture {kind})",
            "take a model whose head is one linear layer 'score', as those of Llama, Qwen, "
            "Mistral, Gemma and GPT-2 have it, or train one: 'companion train pairwise'",
        )
    raise ModelError(
        f"{name}: the checkpoint has no head ({_HEAD} is missing; architecture {kind}). "
        "transformers would load it with a random head and score without a word",
        "train it: 'companion train pairwise --model_name_or_path …'. If this should be a trained "
        'model: a LoRA run without modules_to_save=["score"] does not save the head',
    )


def _formatter(
    name: str,
    tokenizer: Any,
    manifest: RewardManifest | None,
    revision: str | None,
    notes: list[str],
) -> RewardFormatter:
    """By the recipe that was saved with the model, if there is one."""
    if manifest is not None:
        return RewardFormatter.from_recipe(tokenizer, manifest.formatter)
    recipe = find_file(name, RECIPE_FILE, revision)
    if recipe is not None:
        notes.append(
            f"no {MANIFEST_FILE}: scores have no reference set; the formatter's recipe was found"
        )
        return RewardFormatter.from_recipe(tokenizer, read_json(recipe))
    notes.append(
        f"no {MANIFEST_FILE}: not saved by the companion; the formatter is built from the "
        "tokenizer, without a maximal length, and scores have no reference set"
    )
    return RewardFormatter(tokenizer)
