"""Ways to wire a reward model into RL that run and are wrong, each caught by a check.

The checks hold for the companion's reward function, and each mutant fails the one of its bug.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from companion import RewardFunction, RewardScorer, load_reward_model

USER = [{"role": "user", "content": "how many pens"}]
CHAT = [[{"role": "assistant", "content": text}] for text in ("Ana has 3 pens", "so it is 7")]
PLAIN = "how many pens"
Function = Callable[..., list[Any]]


@pytest.fixture
def scorer(tiny_reward: Any) -> RewardScorer:
    return RewardScorer(load_reward_model(tiny_reward))


def raw_score(scorer: RewardScorer, ids: list[int]) -> torch.Tensor:
    """The model's score of ids, without any of the scorer's care."""
    model = scorer.reward_model.model
    return model(input_ids=torch.tensor([ids])).logits[0, 0]


def rendered(scorer: RewardScorer, prompt: Any, completion: Any, cut: bool = False) -> list[int]:
    """Right ids, made independently of the formatter."""
    tokenizer = scorer.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer(prompt + completion)["input_ids"]
        return ids if cut else [*ids, tokenizer.eos_token_id]
    text = tokenizer.apply_chat_template(
        [*prompt, *completion], tokenize=False, continue_final_message=cut
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def by_ids(make_ids: Callable[[Any, Any, Any, bool], list[int]]) -> Callable[[Any], Function]:
    """A wrong function that differs in the ids that it scores."""

    def build(scorer: RewardScorer) -> Function:
        def function(prompts: Any, completions: Any, completion_ids: Any = None, **_: Any) -> Any:
            eos = scorer.tokenizer.eos_token_id
            cuts = [ids[-1] != eos for ids in completion_ids or [[eos]] * len(prompts)]
            with torch.inference_mode():
                return [
                    float(raw_score(scorer, make_ids(scorer, p, c, cut)))
                    for p, c, cut in zip(prompts, completions, cuts, strict=True)
                ]

        return function

    return build


# The checks: each raises AssertionError for a function with its bug.


def gradient(function: Function, scorer: RewardScorer) -> None:
    seen = []
    hook = scorer.reward_model.model.score.register_forward_hook(
        lambda *_: seen.append(torch.is_grad_enabled())
    )
    try:
        with torch.enable_grad():
            rewards = function(prompts=[USER] * 2, completions=CHAT)
    finally:
        hook.remove()
    assert not any(seen), "the reward was computed with gradients on"
    assert not any(isinstance(r, torch.Tensor) and r.requires_grad for r in rewards)


def eval_mode(function: Function, scorer: RewardScorer) -> None:
    model = scorer.reward_model.model
    layer = torch.nn.Dropout(0.5)
    hook = model.score.register_forward_pre_hook(lambda _, args: (layer(args[0]), *args[1:]))
    model.dropout_of_the_test = layer
    model.train()
    try:
        first, second = (function(prompts=[USER] * 2, completions=CHAT) for _ in range(2))
    finally:
        hook.remove()
        model.eval()
    np.testing.assert_allclose(first, second, err_msg="dropout was on")


def conversation(function: Function, scorer: RewardScorer) -> None:
    expect(function, scorer, USER, CHAT[0])


def one_bos(function: Function, scorer: RewardScorer) -> None:
    expect(function, scorer, PLAIN, " Ana has 3 pens")
    expect(function, scorer, USER, CHAT[1])


def cut_off(function: Function, scorer: RewardScorer) -> None:
    for prompt, completion in ((USER, CHAT[0]), (PLAIN, " Ana has")):
        expect(function, scorer, prompt, completion, cut=True)


def finite(function: Function, scorer: RewardScorer) -> None:
    weight = scorer.reward_model.model.score.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.inf)
    try:
        rewards = function(prompts=[USER] * 2, completions=CHAT)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert rewards == [None, None], "a reward that is not finite reached the trainer"


def boundary(function: Function, scorer: RewardScorer) -> None:
    """'pen' + 's': where the two meet inside a word, the whole is tokenised, as in training."""
    expect(function, scorer, "how many pen", "s Ana has")


def device(function: Function, scorer: RewardScorer) -> None:
    """On ``meta`` nothing is computed; where the inputs lie when they reach the model is seen."""
    model = scorer.reward_model.model.to("meta")
    seen: set[str] = set()

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(
            value.device.type
            for value in (*args, *kwargs.values())
            if isinstance(value, torch.Tensor)
        )
        raise Reached

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        # autocast knows no meta device
        with mock.patch("torch.autocast", return_value=nullcontext()), pytest.raises(Reached):
            function(prompts=[USER] * 2, completions=CHAT)
    finally:
        hook.remove()
    assert seen == {"meta"}, f"inputs lie on {seen}, the model on meta"


class Reached(Exception):
    """The inputs have reached the model."""


def expect(
    function: Function, scorer: RewardScorer, prompt: Any, completion: Any, cut: bool = False
) -> None:
    eos = scorer.tokenizer.eos_token_id
    got = function(
        prompts=[prompt], completions=[completion], completion_ids=[[20, 21 if cut else eos]]
    )
    with torch.inference_mode():
        right = float(raw_score(scorer, rendered(scorer, prompt, completion, cut)))
    np.testing.assert_allclose(got, [right], atol=1e-5)


# The mutants


def without(what: str) -> Callable[[RewardScorer], Function]:
    """The right ids, scored with one precaution left out."""

    def build(scorer: RewardScorer) -> Function:
        def function(prompts: Any, completions: Any, **_: Any) -> list[Any]:
            model = scorer.reward_model.model
            if what != "eval":
                model.eval()
            with torch.enable_grad() if what == "no_grad" else torch.inference_mode():
                scores = [
                    raw_score(scorer, rendered(scorer, p, c))
                    for p, c in zip(prompts, completions, strict=True)
                ]
            return scores if what == "no_grad" else [float(score) for score in scores]

        return function

    return build


def joined_messages(scorer: Any, prompt: Any, completion: Any, cut: bool) -> list[int]:
    if isinstance(prompt, str):
        return rendered(scorer, prompt, completion, cut)
    return list(scorer.tokenizer(str(prompt + completion))["input_ids"])


def two_bos(scorer: Any, prompt: Any, completion: Any, cut: bool) -> list[int]:
    return [scorer.tokenizer.bos_token_id, *rendered(scorer, prompt, completion, cut)]


def no_bos(scorer: Any, prompt: Any, completion: Any, cut: bool) -> list[int]:
    return rendered(scorer, prompt, completion, cut)[1:]


def always_eos(scorer: Any, prompt: Any, completion: Any, cut: bool) -> list[int]:
    return rendered(scorer, prompt, completion)


def in_two_parts(scorer: Any, prompt: Any, completion: Any, cut: bool) -> list[int]:
    if not isinstance(prompt, str):
        return rendered(scorer, prompt, completion, cut)
    head = scorer.tokenizer(prompt)["input_ids"]
    tail = scorer.tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*head, *tail, *([] if cut else [scorer.tokenizer.eos_token_id])]


BUGS: dict[str, tuple[Callable[..., None], Callable[[RewardScorer], Function]]] = {
    "gradient on": (gradient, without("no_grad")),
    "no eval mode": (eval_mode, without("eval")),
    "message lists joined with +": (conversation, by_ids(joined_messages)),
    "two BOS": (one_bos, by_ids(two_bos)),
    "no BOS": (one_bos, by_ids(no_bos)),
    "EOS put on texts that were cut off": (cut_off, by_ids(always_eos)),
    "infinite rewards": (finite, without("nothing")),
    "wrong device": (device, without("nothing")),
    "boundary re-tokenisation": (boundary, by_ids(in_two_parts)),
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_the_reward_function_has_no_such_bug_and_the_mutant_is_caught(
    bug: str, scorer: RewardScorer
) -> None:
    check, mutant = BUGS[bug]
    check(RewardFunction(scorer), scorer)
    with pytest.raises(AssertionError):
        check(mutant(scorer), scorer)
