"""Load a base for training, or a reward model for use; refuse what is neither.

``AutoModelForSequenceClassification`` draws a random head for a checkpoint that has none, and TRL
suppresses the warning: such a model scores, and its scores mean nothing. Here that is an error.
Chapter 2.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState

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
    listed,
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
from companion.models.head import (
    ScoreHead,
    find_head,
    has_own_readout,
    head_name,
    initialise_head,
    install_head,
)
from companion.models.manifest import MANIFEST_FILE, RewardManifest
from companion.models.memory import place
from companion.models.published import (
    SEQUENCE as _SCALAR,
    TOKEN as _BY_TOKEN,
    Family,
    head_keys,
    key_mapping,
    recognise,
    several_attributes,
)
from companion.models.readout import (
    LABEL_NAMES,
    ReadAs,
    Readout,
    ScalarReadout,
    readout_from_dict,
)
from companion.models.reward_model import RewardModel

_HEAD = "score.weight"
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
    load_in_4bit: bool = False,
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
    load_in_4bit : bool
        For QLoRA: weights in 4 bits (NF4, bitsandbytes), on the GPU of this process if there is
        one; :func:`companion.models.apply_lora` then gives it what is trained.

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
        device_map={"": PartialState().device} if load_in_4bit else None,
        load_in_4bit=load_in_4bit,
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
    read_as: ReadAs | None = None,
    device_map: Any = None,
    load_in_4bit: bool = False,
) -> RewardModel:
    """Load a trained reward model of any kind in eval mode, or say why the checkpoint is none.

    Takes a folder (or hub id) with a plain sequence- or token-classification checkpoint, one in a
    shape of :mod:`companion.models.published`, or a LoRA adapter whose base can be found; the
    adapter is merged. A checkpoint that the companion did not save has no manifest: its formatter
    is built from the tokenizer, and a pad token that is missing is repaired, with notes.

    Parameters
    ----------
    read_as : ReadAs, optional
        How it is read where its files do not say so; what a manifest says stays.
    device_map : str or dict, optional
        For transformers, in place of `device`: ``auto`` spreads a large model over all GPUs.
    load_in_4bit : bool
        Weights in 4 bits (NF4, bitsandbytes), the head in float32: other scores, with a note.

    Raises
    ------
    ModelError
        For a wrong folder, a checkpoint without its head, other labels than its read-out needs,
        missing weights, a damaged manifest, a tokenizer that is not the one of the manifest, a
        value for each token and nothing that says what they mean, or a `read_as` that is not that
        of the manifest.
    ReadoutError
        For a pad token that is the EOS where the read-out is not named, or differs from the
        configuration's.
    """
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    manifest = manifest_of(name, revision)
    notes: list[str] = []
    asked = _reading(name, manifest, read_as)
    family: Family | None = None
    adapter = is_adapter(name, revision)
    if adapter and (device_map is not None or load_in_4bit):
        raise ModelError(
            f"{name}: holds a LoRA adapter, which is merged in memory",
            "save the merged model first, then load that with device_map or in 4 bits",
        )
    if adapter:
        from companion.models.lora import load_adapter

        model, tokenizer = load_adapter(name, dtype, attn_implementation, **shared)
    else:
        config = load_config(name, **shared)
        tokenizer = load_tokenizer(name, **shared)
        own = trust_remote_code and _SCALAR in (getattr(config, "auto_map", None) or {})
        if not own:  # (a class of the folder's own brings its head)
            family = _family(name, config, tokenizer, manifest, asked, notes, revision)
        model = _load_checkpoint(
            name,
            config,
            family,
            manifest,
            dtype,
            attn_implementation,
            notes,
            device_map=device_map,
            load_in_4bit=load_in_4bit,
            **shared,
        )
    if load_in_4bit:
        notes.append("weights in 4 bits: scores are not those of the model as it was saved")
    readout = _readout(manifest, family)
    if manifest is None or asked is not None:
        readout = settle_pad(tokenizer, model.config, readout, asked or ReadAs(), notes)
        _take_pad(model, tokenizer, notes)
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
    formatter = _formatter(name, tokenizer, manifest, family, revision, notes)
    notes.extend(formatter.notes)
    notes.extend(precision_notes(model))
    model.eval()
    if device is not None and device_map is None:
        place(model, device)
    source = None if adapter or load_in_4bit else (name, revision)
    return RewardModel(model, tokenizer, formatter, manifest, notes, readout, source)


def load_formatter(
    path_or_id: PathLike,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    notes: list[str] | None = None,
    read_as: ReadAs | None = None,
) -> tuple[RewardFormatter, RewardManifest | None, Readout]:
    """The formatter, the manifest and the read-out of a reward model, without its weights.

    For a client whose reward model runs on a server: the token ids are made here, by the recipe
    that was saved with the model. What had to be assumed is added to `notes`.

    Raises
    ------
    ModelError
        For a folder without a tokenizer, a damaged manifest, or a tokenizer that is not the one of
        the manifest.
    ReadoutError
        As :func:`load_reward_model`.
    """
    name = resolve(path_or_id)
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    notes = [] if notes is None else notes
    tokenizer = load_tokenizer(name, **shared)
    manifest = manifest_of(name, revision)
    asked = _reading(name, manifest, read_as)
    family: Family | None = None
    config = None if is_adapter(name, revision) else load_config(name, **shared)
    own = trust_remote_code and _SCALAR in (getattr(config, "auto_map", None) or {})
    if config is not None and not own:
        family = _family(name, config, tokenizer, manifest, asked, notes, revision)
    readout = _readout(manifest, family)
    if config is not None and (manifest is None or asked is not None):
        readout = settle_pad(tokenizer, config, readout, asked or ReadAs(), notes)
    return _formatter(name, tokenizer, manifest, family, revision, notes), manifest, readout


def manifest_of(name: str, revision: str | None = None) -> RewardManifest | None:
    """The manifest of a folder or hub id; None if there is none."""
    described = find_file(name, MANIFEST_FILE, revision)
    return None if described is None else RewardManifest.load(described)


def settle_pad(
    tokenizer: Any, config: Any, readout: Readout, read_as: ReadAs, notes: list[str]
) -> Readout:
    """Give a published model's tokenizer a pad token of its own; where its score is read.

    The read-out goes by the mask, so any token that ends no text can fill the padding. Only where
    the pad token is the EOS is there a choice: what trained such a model either read the EOS, or
    (transformers, TRL) took it for padding and read the token before it.

    Raises
    ------
    ReadoutError
        If the pad token is the EOS, and `read_as` does not say which of both.
    """
    text = config.get_text_config()
    if tokenizer.eos_token_id is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
        notes.append(f"the tokenizer has no EOS: {tokenizer.sep_token!r} ends a text")
        if text.eos_token_id is None:
            text.eos_token_id = tokenizer.sep_token_id
    own, known, eos = tokenizer.pad_token_id, text.pad_token_id, tokenizer.eos_token_id
    if eos is None:
        return readout  # the guards say it
    is_eos = eos in (own, known)
    if isinstance(readout, ScalarReadout) and readout.skipped is None and not readout.finished:
        if is_eos and read_as.readout is None:
            raise ReadoutError(
                f"the pad token is the EOS ({tokenizer.eos_token!r}), and nothing says at which "
                "token this model is read: stock tools skip the EOS as padding, so that a finished "
                "and a cut-off text get the same score; others read at the EOS",
                "name it: --readout transformers if its card scores it with transformers' or TRL's "
                "own classes, --readout mask if it was trained to be read at the EOS (OpenRLHF). "
                "'companion adopt' keeps the choice; a model of your own is better trained anew, "
                "from companion.models.load_base, which takes a pad token of its own",
            )
        if is_eos and read_as.readout == "transformers":
            readout = replace(readout, skipped=eos)
        elif read_as.readout is not None and not is_eos:
            notes.append("the pad token is not the EOS: both read-outs are the same")
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if own is None and known is not None and known != eos and known in special:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
        notes.append(
            f"the tokenizer has no pad token: that of the configuration, {tokenizer.pad_token!r} "
            f"({known}), is used"
        )
    elif own is None or own == eos:
        choose_pad_token(tokenizer, known, notes)
    elif known is None or known == eos:
        notes.append(
            f"config.pad_token_id was {known}: the tokenizer's, {own} ({tokenizer.pad_token!r}), "
            "is used"
        )
    elif known != own:
        return readout  # the guards say it
    for part in {id(c): c for c in (config, text)}.values():
        part.pad_token_id = tokenizer.pad_token_id
    return readout


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


def _reading(name: str, manifest: RewardManifest | None, read_as: ReadAs | None) -> ReadAs | None:
    """How a checkpoint is to be read; None for one that the companion saved.

    Raises
    ------
    ModelError
        If the manifest says otherwise.
    """
    if manifest is None:
        return read_as
    stored = readout_from_dict(manifest.readout, MANIFEST_FILE).read_as
    if read_as not in (None, ReadAs(), stored):
        raise ModelError(
            f"{name}: its {MANIFEST_FILE} says how it is read, and its reference scores were read "
            f"so ({manifest.readout['rule']})",
            "leave the flags of reading out, or adopt the model into another folder with them "
            "(companion adopt … --output_dir DIR)",
        )
    return stored


def _readout(manifest: RewardManifest | None, family: Family | None) -> Readout:
    if manifest is not None:
        return readout_from_dict(manifest.readout, MANIFEST_FILE)
    return ScalarReadout() if family is None else family.readout


def _family(
    name: str,
    config: Any,
    tokenizer: Any,
    manifest: RewardManifest | None,
    asked: ReadAs | None,
    notes: list[str],
    revision: str | None,
) -> Family | None:
    """The shape of a checkpoint that the companion did not save; None if it is a plain one."""
    if manifest is not None and asked is None:
        return None
    keys = checkpoint_keys(name, revision)
    family = recognise(name, config, keys, tokenizer, asked or ReadAs())
    if family is not None:
        notes.append(f"read as {family.name}")
        if getattr(config, "normalize_reward", None):
            notes.append(
                "config.normalize_reward is set: OpenRLHF would give (score - mean) / std; here "
                "scores are as the head gives them"
            )
    return family


def _load_checkpoint(
    name: str,
    config: Any,
    family: Family | None,
    manifest: RewardManifest | None,
    dtype: torch.dtype | str,
    attn_implementation: str | None,
    notes: list[str],
    **shared: Any,
) -> Any:
    """The model of a checkpoint, its head whole and in fp32."""
    revision = shared["revision"]
    left_out, auto_class = LANGUAGE_HEAD, _SCALAR
    if family is not None:
        auto_class = family.auto_class
        config.num_labels = family.stored_labels or family.labels
        left_out = "|".join([LANGUAGE_HEAD, *(f"{re.escape(key)}$" for key in family.stored)])
        if family.own_code_is_known:
            config.auto_map = {}
        mapping = key_mapping(config, auto_class, checkpoint_keys(name, revision))
        if mapping is not None:
            shared["key_mapping"] = mapping
    elif manifest is None or manifest.kind == "scalar":
        keys = checkpoint_keys(name, revision)
        if manifest is None:
            _refuse_token_level(name, config)
        if keys is not None and _HEAD not in keys and not _has_classifier(keys):
            _refuse_headless(name, config, keys)
        if config.num_labels != 1:
            labels = [str(label) for label in (config.id2label or {}).values()]
            raise several_attributes(name, config.num_labels, labels)
    else:
        auto_class = _BY_TOKEN
    disable_dropout(config)
    said: list[str] = []
    model, missing = load_weights(
        name,
        config,
        dtype,
        auto_class=auto_class,
        attn_implementation=attn_implementation,
        left_out=left_out,
        encoder=True,
        notes=said if family is not None and family.stored else notes,
        **shared,
    )
    if family is not None and family.make is not None:
        refuse_missing(name, {k for k in missing if not k.startswith(f"{head_name(model)}.")})
        stored = {key: read_tensor(name, key, revision) for key in family.stored}
        head = family.make({key: value for key, value in stored.items() if value is not None})
        device = next(find_head(model).parameters()).device
        setattr(model, head_name(model), head.to(device).train(model.training))
        if "key_mapping" in shared:  # transformers would save it under the former names
            model._weight_conversions = None
        model.config.num_labels = family.labels
        return model
    if _HEAD in missing:
        _refuse_headless(name, config)
    refuse_missing(name, missing)
    if has_own_readout(model) and not isinstance(find_head(model), torch.nn.Linear):
        return model
    head = install_head(model)
    if head.weight.dtype != torch.float32:  # as it was saved, not rounded to half precision
        head.to(torch.float32)
        _copy_stored(head, name, f"{head_name(model)}.weight", revision)
    return model


def _has_classifier(keys: set[str]) -> bool:
    return any(key.startswith("classifier.") for key in keys)


def _take_pad(model: Any, tokenizer: Any, notes: list[str]) -> None:
    """Let the model have the pad token that its tokenizer was given."""
    pad = tokenizer.pad_token_id
    if pad is None or model.config.get_text_config().pad_token_id != pad:
        return  # the guards say it
    rows = int(model.get_input_embeddings().weight.shape[0])
    if pad >= rows:
        add_rows(model, pad + 1)
        notes.append(f"embeddings grown from {rows} to {pad + 1} rows for the pad token")
    set_pad(model, pad)


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
            "give a folder that 'companion train outcome' or 'companion train process' wrote; of a "
            "process model of two labels (TRL's), name what ends a step: --step_separator",
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
    others = head_keys(keys or ())
    if others:
        raise ModelError(
            f"{name}: its head is none that is known here (architecture {kind}): it stores "
            f"{listed(others)} beside the backbone",
            "known are one linear layer (score, value_head, v_head, …), two layers (score.0, ReLU, "
            "score.2), the classifier of encoders, and a causal LM's own tokens (--reward_token); "
            "or train one: 'companion train pairwise'",
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
    family: Family | None,
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
    return RewardFormatter(tokenizer, **({} if family is None else family.formatter))
