"""Find six traps in the settings of a reward model run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, expect, kind, show

#: what the exercise says of the data and the base
LONGEST, EOS, FREE = 900, "<|im_end|>", "<|endoftext|>"
KEYS = (
    "num_train_epochs",
    "learning_rate",
    "max_length",
    "pad_token",
    "center_rewards_coefficient",
    "eval_strategy",
    "lora",
)
EPOCHS = (
    "Three epochs are the default of `Trainer`, not one of reward models: the training loss goes "
    "on falling with every pass, whatever the held-out loss does. One is the safe default."
)
SECOND = (
    "A second epoch can help where the first leaves the held-out loss still falling. Nobody has "
    "looked yet: begin with the safe default, one, and watch that loss."
)
LENGTH = (
    "The longest text has 900 tokens, and TRL drops a pair of which one side is longer than "
    "`max_length`, without a word. The long pairs never train: the model meets them first in use."
)
PAD = (
    "The pad token is the EOS. Stock transformers reads the last token that is no pad token, so it "
    "skips the EOS: a finished and a cut-off text get one score. Take a token that is free."
)
CENTRE = (
    "Without centring the scores may drift anywhere: the loss sees differences only. 0.01 is what "
    "TRL's documentation recommends."
)
BLIND = (
    "Nothing is evaluated during the run. The one figure that says whether a reward model gets "
    "better is the accuracy on held-out pairs; the training loss is not."
)
HEAD = (
    "LoRA trains adapters in the layers and nothing else. The head is new and random, and it is "
    'neither trained nor saved unless `modules_to_save` names it: `["score"]`.'
)
RATE = (
    "1e-4 is a rate of LoRA's scale, and LoRA is used: this field was right. A tenth of it or less "
    "hardly moves an adapter in one epoch."
)


def _settings(attempt: Attempt) -> dict[str, Any]:
    got = attempt()
    kind(got, Mapping, "a dict of settings")
    missing = [key for key in KEYS if key not in got]
    expect(not missing, f"these keys are gone: {', '.join(missing)}")
    return dict(got)


def _is_dict(attempt: Attempt) -> None:
    _settings(attempt)


def _epochs(attempt: Attempt) -> None:
    epochs = _settings(attempt)["num_train_epochs"]
    expect(0 < epochs <= 1, f"num_train_epochs is {epochs}")


def _length(attempt: Attempt) -> None:
    limit = _settings(attempt)["max_length"]
    expect(limit is None or limit >= LONGEST, f"max_length is {limit}, the longest text {LONGEST}")


def _pad(attempt: Attempt) -> None:
    pad = _settings(attempt)["pad_token"]
    expect(pad == FREE, f"pad_token is {pad!r}; {EOS!r} is the EOS, {FREE!r} is free")


def _centre(attempt: Attempt) -> None:
    weight = _settings(attempt)["center_rewards_coefficient"]
    expect(weight is not None and 0 < weight <= 0.1, f"center_rewards_coefficient is {weight}")


def _evaluated(attempt: Attempt) -> None:
    strategy = _settings(attempt)["eval_strategy"]
    expect(strategy in ("steps", "epoch"), f"eval_strategy is {strategy!r}")


def _head(attempt: Attempt) -> None:
    lora = _settings(attempt)["lora"]
    if lora is not None:
        expect(isinstance(lora, Mapping), f"lora is {show(lora)}")
        saved = lora.get("modules_to_save") or []
        expect("score" in saved, f"lora has modules_to_save={lora.get('modules_to_save')!r}")


def _rate(attempt: Attempt) -> None:
    settings = _settings(attempt)
    rate, lora = settings["learning_rate"], settings["lora"]
    low, high = (3e-5, 1e-3) if lora is not None else (1e-6, 1e-4)
    what = "with LoRA" if lora is not None else "with all weights in training"
    expect(low <= rate <= high, f"learning_rate is {rate:g} {what}")


def _good() -> dict[str, Any]:
    return {
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "max_length": 1024,
        "pad_token": FREE,
        "center_rewards_coefficient": 0.01,
        "eval_strategy": "steps",
        "lora": {"r": 16, "target_modules": "all-linear", "modules_to_save": ["score"]},
    }


def broken() -> dict[str, Any]:
    return {
        "num_train_epochs": 3,
        "learning_rate": 1e-4,
        "max_length": 512,
        "pad_token": "<|im_end|>",
        "center_rewards_coefficient": None,
        "eval_strategy": "no",
        "lora": {"r": 16, "target_modules": "all-linear", "modules_to_save": None},
    }


def many_epochs() -> dict[str, Any]:
    return {**_good(), "num_train_epochs": 3}


def two_epochs() -> dict[str, Any]:
    return {**_good(), "num_train_epochs": 2}


def long_dropped() -> dict[str, Any]:
    return {**_good(), "max_length": 512}


def pad_is_eos() -> dict[str, Any]:
    return {**_good(), "pad_token": EOS}


def not_centred() -> dict[str, Any]:
    return {**_good(), "center_rewards_coefficient": None}


def not_evaluated() -> dict[str, Any]:
    return {**_good(), "eval_strategy": "no"}


def random_head() -> dict[str, Any]:
    return {**_good(), "lora": {"r": 16, "target_modules": "all-linear", "modules_to_save": None}}


def too_slow() -> dict[str, Any]:
    return {**_good(), "learning_rate": 1e-5}


def only_changes() -> dict[str, Any]:
    good = _good()
    return {key: good[key] for key in KEYS if key != "learning_rate"}


def _look(attempt: Attempt, arguments: tuple[Any, ...]) -> Any:
    """Which of the rules hold, where other numbers are right too, and what breaks the others."""
    out: dict[str, Any] = {}
    for rule in (_is_dict, _epochs, _length, _pad, _centre, _evaluated, _head, _rate):
        try:
            rule(attempt)
            out[rule.__name__] = True
        except AssertionError as error:
            out[rule.__name__] = str(error)
    return out


EXERCISE = Exercise(
    id="ch04.training_settings",
    parameters=(),
    broken=broken,
    properties=(
        Property("a dict with the same keys", "The settings should keep their keys.", _is_dict),
        Property(
            "not longer than one epoch",
            "`num_train_epochs`: one is the safe default, and on a first run nothing speaks for a "
            "second yet.",
            _epochs,
        ),
        Property(
            "no pair is dropped for its length",
            "`max_length` should leave room for the longest text, of 900 tokens: TRL drops longer "
            "pairs.",
            _length,
        ),
        Property(
            "a pad token of its own",
            "`pad_token` should be a token that the texts do not use, here `<|endoftext|>`.",
            _pad,
        ),
        Property(
            "scores that are tied to 0",
            "`center_rewards_coefficient` should be positive and small: TRL's documentation "
            "recommends 0.01.",
            _centre,
        ),
        Property(
            "a look at held-out pairs",
            "`eval_strategy` should have the held-out pairs looked at during the run.",
            _evaluated,
        ),
        Property(
            "a head that is trained and saved",
            "The new head, `score`, should be trained and saved too: `modules_to_save`.",
            _head,
        ),
        Property(
            "a learning rate that fits what is trained",
            "`learning_rate`: 1e-4 suits LoRA, so this field was right.",
            _rate,
        ),
    ),
    mutants=(
        Mutant("All six traps are still there. One of them: " + EPOCHS, broken),
        Mutant(EPOCHS, many_epochs),
        Mutant(SECOND, two_epochs),
        Mutant(LENGTH, long_dropped),
        Mutant(PAD, pad_is_eos, "transformers #35352"),
        Mutant(CENTRE, not_centred),
        Mutant(BLIND, not_evaluated),
        Mutant(HEAD, random_head),
        Mutant(RATE, too_slow),
        Mutant(
            "A field is left out. What is not said takes the library's default, which is a trap of "
            "its own: keep all seven.",
            only_changes,
        ),
    ),
    probes=lambda: [()],
    look=_look,
    hints=(
        "Go through the fields one by one: what does each do to *these* data, to *this* base? One "
        "of the seven is right as it is.",
        "Compare with the facts above the cell: the longest text, the special tokens, that LoRA is "
        "used. The learning rate is the one that is right.",
        'Epochs 1; max_length of at least 900; pad "<|endoftext|>"; centring 0.01; eval_strategy '
        '"steps"; modules_to_save ["score"].',
    ),
    right="None of the six raises an error, and five of them cost accuracy that nobody will miss, "
    "since nobody knows what it would have been.",
)
