"""Find eight bugs in a reward function for TRL."""

from __future__ import annotations

from typing import Any

import torch

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, kind, show
from companion.course.exercises.ch05 import _wiring as wiring
from companion.course.exercises.ch05._toys import (
    BOS,
    BROKEN,
    ENDLESS,
    EOS,
    RecordingModel,
    reward_tokenizer,
)
from companion.course.exercises.ch05._wiring import body

Rewards = list[float | None]
#: a prompt, a completion, and whether it was finished
Item = tuple[Any, Any, bool]

JOINED = (
    "`prompt + completion` of a conversation is a longer list of messages, and `str` of it a text "
    "with brackets, quotes and 'role': nothing that the model has ever seen. Messages become text "
    "by the chat template."
)
TWO_BOS = (
    "There are two BOS: one is written into the text, by hand or by the chat template, and the "
    "tokenizer adds another. The model was trained with one."
)
CUT = (
    "Every completion gets an EOS, also one that was cut off at the length limit. The EOS says 'I "
    "am done here': the reward model cannot see that the text breaks off, and the policy learns "
    "that rambling costs nothing. Whether it was finished stands in `completion_ids`."
)
PIECES = (
    "Prompt and completion are tokenised one by one. At the border a tokenizer may join what "
    "stands on both sides ('is ' and '7' are ' 7' in one text), so the ids are not those of "
    "training. Tokenise the whole text."
)
DEVICE = (
    "The inputs stay on the CPU. On a machine with a GPU that is an error in the first step, in "
    "the middle of a run of many processes: move them to `model.device`."
)
GRADIENT = (
    "TRL calls reward functions with gradients switched on. The graph of a whole scoring pass is "
    "built and kept, for nothing: use `torch.inference_mode()`."
)
TRAINING = (
    "The model is in training mode, as whoever trained or loaded it left it. Dropout then gives "
    "the same text another reward each time: call `model.eval()`."
)
INFINITE = (
    "An infinite or NaN score goes out as a reward. TRL leaves a None out; an infinity goes into "
    "the mean and the deviation of its group, and all of that prompt's advantages are NaN."
)

TEXTS: list[Item] = [
    ("how many pens?", " the answer is 7.", True),
    ("how many?", " no idea", False),
    ("the answer is ", "8.", True),
]


def _chat(question: str, answer: str, finished: bool) -> Item:
    ask, reply = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return [ask], [reply], finished


CHATS: list[Item] = [
    _chat("how many pens?", "the answer is 7.", True),
    _chat("how many?", "no idea", False),
]


def _arguments(items: list[Item], device: str = "cpu") -> tuple[Any, ...]:
    """Prompts, completions, their ids, a new model, and its tokenizer."""
    tokenizer = reward_tokenizer()
    ids = []
    for _, completion, finished in items:
        text = completion if isinstance(completion, str) else completion[0]["content"]
        body = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append([*body, EOS] if finished else body)
    prompts, completions = [item[0] for item in items], [item[1] for item in items]
    return prompts, completions, ids, RecordingModel(tokenizer, device), tokenizer


def _ids(tokenizer: Any, item: Item) -> list[int]:
    """The ids that training had for this text."""
    prompt, completion, finished = item
    if isinstance(prompt, str):
        ids = [*tokenizer(prompt + completion)["input_ids"], EOS]
    else:
        ids = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=False)
    return list(ids) if finished else list(ids[:-1])


def _seen(attempt: Attempt, item: Item) -> tuple[list[int], list[int], Any]:
    """The ids that the model was given for one text, those of training, and the tokenizer."""
    arguments = _arguments([item])
    attempt(*arguments)
    rows, tokenizer = arguments[3].rows, arguments[4]
    expect(len(rows) == 1, f"one completion, but the model was given {len(rows)} texts")
    return rows[0], _ids(tokenizer, item), tokenizer


def _rewards(attempt: Attempt, items: list[Item]) -> Rewards:
    got = attempt(*_arguments(items))
    kind(got, (list, tuple), "a list of rewards")
    expect(len(got) == len(items), f"{len(got)} rewards for {len(items)} completions")
    for value in got:
        simple = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
        expect(simple or scalar, f"a reward is {show(value)}; it should be a float or None")
    return [None if value is None else float(value) for value in got]


def _list(attempt: Attempt) -> None:
    for items in (TEXTS[:1], TEXTS[:2], TEXTS):
        _rewards(attempt, items)


def _template(attempt: Attempt) -> None:
    for item in CHATS:
        got, want, tokenizer = _seen(attempt, item)
        expect(
            body(got) == body(want),
            f"{item[0] + item[1]}: the model is given {tokenizer.decode(got)!r}; in training it "
            f"was {tokenizer.decode(want)!r}",
        )


def _bos(attempt: Attempt) -> None:
    for item in (*TEXTS, *CHATS):
        got, _, tokenizer = _seen(attempt, item)
        kind = "text" if isinstance(item[0], str) else "messages"
        expect(
            got.count(BOS) == 1 and got[:1] == [BOS],
            f"{kind}: {got.count(BOS)} BOS in {tokenizer.decode(got[:6])!r} …",
        )


def _eos(attempt: Attempt) -> None:
    for item in (*TEXTS, *CHATS):
        got, _, tokenizer = _seen(attempt, item)
        count = next((i for i, token in enumerate(reversed(got)) if token != EOS), len(got))
        kind = "text" if isinstance(item[0], str) else "messages"
        state = "finished" if item[2] else "cut off"
        expect(count == int(item[2]), f"{kind}, a completion that was {state}: it ends in "
               f"{tokenizer.decode(got[-3:])!r}")  # fmt: skip


def _border(attempt: Attempt) -> None:
    for item in TEXTS:
        got, want, tokenizer = _seen(attempt, item)
        mine, right = (tokenizer.convert_ids_to_tokens(body(ids)) for ids in (got, want))
        expect(mine == right, f"the prompt {item[0]!r} with the completion {item[1]!r}: the tokens "
               f"are {mine}; those of the whole text are {right}")  # fmt: skip


def _device(attempt: Attempt) -> None:
    arguments = _arguments(TEXTS[:2], "meta")
    model = arguments[3]
    try:
        attempt(*arguments)
    except Exception:
        if not model.devices:
            raise
    expect(
        model.devices == {"meta"},
        f"a model on the device 'meta' is given tensors on {sorted(model.devices)}",
    )


def _no_gradient(attempt: Attempt) -> None:
    arguments = _arguments(TEXTS[:2])
    with torch.enable_grad():
        attempt(*arguments)
    expect(arguments[3].gradients == {False}, "gradients are on when the model is called")


def _eval_mode(attempt: Attempt) -> None:
    arguments = _arguments(TEXTS[:2])
    arguments[3].train()
    attempt(*arguments)
    expect(arguments[3].modes == {False}, "`model.training` is true when the model is called")


def _finite(attempt: Attempt) -> None:
    for word, value in ((ENDLESS, "inf"), (BROKEN, "NaN")):
        items = [TEXTS[0], ("how many?", f" {word}.", True), TEXTS[1]]
        got = _rewards(attempt, items)
        expect(got[1] is None, f"a score of {value} becomes the reward {got[1]}, not None")
        expect(None not in (got[0], got[2]), "a finite score has become None")


def _alone(attempt: Attempt) -> None:
    for items in (TEXTS, TEXTS[::-1], [CHATS[1], CHATS[0], CHATS[1]]):
        arguments = _arguments(items)
        model = arguments[3].eval()
        tokenizer = arguments[4]
        with torch.inference_mode():
            want = [
                float(model(torch.tensor([_ids(tokenizer, item)])).logits[0, 0]) for item in items
            ]
        got = _rewards(attempt, items)
        numbers = [float("nan") if x is None else x for x in got]
        close(numbers, want, f"a batch of {len(items)}, against each text alone", 1e-4, 1e-5)


def _probes() -> list[tuple[Any, ...]]:
    return [
        (TEXTS, "cpu"),
        (CHATS, "cpu"),
        ([TEXTS[0], ("how many?", f" {ENDLESS}.", True)], "cpu"),
        (TEXTS[:2], "meta"),
    ]


def _look(attempt: Attempt, arguments: tuple[Any, ...]) -> Any:
    """The rewards, and in which state the model was called."""
    call = _arguments(*arguments)
    model = call[3]
    with torch.enable_grad():
        rewards = attempt(*call)
    state = [sorted(model.gradients), sorted(model.modes), sorted(model.devices)]
    return rewards, repr(state)


EXERCISE = Exercise(
    id="ch05.reward_function",
    parameters=("prompts", "completions", "completion_ids", "model", "tokenizer"),
    broken=wiring.broken,
    properties=(
        Property(
            "a list with a float or None for each completion",
            "TRL wants a list with one float, or None, for each completion, in their order.",
            _list,
        ),
        Property(
            "messages become text by the chat template",
            "Messages should become text by the chat template, as in training.",
            _template,
        ),
        Property(
            "one BOS",
            "The model was trained with one BOS before each text.",
            _bos,
        ),
        Property(
            "one EOS behind what was finished, none behind what was cut off",
            "What was finished should end in one EOS, and what was cut off in none; "
            "`completion_ids` tells them apart.",
            _eos,
        ),
        Property(
            "the ids of the whole text, also at the border",
            "The ids should be those of the whole text, also at the border of prompt and "
            "completion.",
            _border,
        ),
        Property(
            "inputs on the model's device", "The inputs should lie on `model.device`.", _device
        ),
        Property(
            "no gradient",
            "The model should be called without gradients: TRL calls reward functions with them "
            "switched on.",
            _no_gradient,
        ),
        Property(
            "eval mode", "The model should be called in eval mode, however it was left.", _eval_mode
        ),
        Property(
            "what is not finite becomes None",
            "A score that is not finite should become None, which TRL leaves out.",
            _finite,
        ),
        Property(
            "a text has the same reward in any batch",
            "A text should have the same reward in any batch.",
            _alone,
        ),
    ),
    mutants=(
        Mutant("All eight bugs are still there. One of them: " + JOINED, wiring.broken),
        Mutant(JOINED, wiring.messages_joined, "slime #2120"),
        Mutant(TWO_BOS, wiring.two_bos, "reward-bench #164", also=(wiring.template_bos,)),
        Mutant(
            "Plain text is tokenised without special tokens, so it begins with no BOS. In training "
            "the tokenizer added one.",
            wiring.no_bos,
            "RLHF-Reward-Modeling #16",
        ),
        Mutant(CUT, wiring.always_eos),
        Mutant(
            "The EOS that the chat template writes stays behind a completion that was cut off, and "
            "hides that it was. Take it off, or use `continue_final_message=True`.",
            wiring.template_eos,
        ),
        Mutant(
            "No text ends with EOS. The score is read at the last token, and in training that was "
            "the EOS of every finished text.",
            wiring.never_eos,
            "reward-bench #94",
        ),
        Mutant(
            "The chat template writes an EOS behind the last turn, and another one is added. The "
            "score is then read at a token that training never had.",
            wiring.second_eos,
        ),
        Mutant(PIECES, wiring.in_pieces, "trl #5224"),
        Mutant(DEVICE, wiring.left_on_cpu, "OpenRLHF #938"),
        Mutant(GRADIENT, wiring.with_gradient),
        Mutant(TRAINING, wiring.in_training_mode, "trl #2685"),
        Mutant(INFINITE, wiring.infinite, "UniRL #335"),
        Mutant(
            "What is not finite becomes 0, which is a reward like any other: among negative ones "
            "it is the best. None means 'no reward'.",
            wiring.zero_for_infinite,
        ),
        Mutant(
            "The attention mask is not passed, so the model takes the padding for text.",
            wiring.without_mask,
            "reward-bench #137",
        ),
        Mutant(
            "Each reward is a list of one number: the logits are [B, 1]. Take `[:, 0]`.",
            wiring.lists_of_one,
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "Four of the bugs are in the ids, three in how the model is called, one in what goes out. "
        "Decode the ids that the model is given, for each of four cases: text or messages, "
        "finished or cut off.",
        "The tokenizer adds a BOS to plain text, and no EOS; the chat template writes both. "
        "Whether a completion was finished: `ids[-1:] == [tokenizer.eos_token_id]`.",
        "Text: `tokenizer(prompt + completion)`, plus EOS if finished. Messages: "
        "`apply_chat_template(prompt + completion, tokenize=True, return_dict=False)`, less its "
        "last token if cut off. Then `.to(model.device)`, `model.eval()`, `inference_mode()`, "
        "`math.isfinite`.",
    ),
    right="None of the eight stops a run on one CPU; together they train a policy on numbers that "
    "the reward model never meant. `RewardScorer.as_reward_func` does all of this, and counts.",
)
