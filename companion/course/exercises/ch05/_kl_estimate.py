"""Write an estimate of the KL divergence that is unbiased and never negative."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, normal, tensor


def _models(seed: int, words: int = 5, places: int = 2) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[places, words]`` of a policy and its reference."""
    policy = F.log_softmax(normal(seed, places, words, scale=1.0, dtype=torch.float64), dim=1)
    reference = F.log_softmax(normal(seed + 9, places, words, scale=1.0, dtype=torch.float64), 1)
    return policy, reference


def _texts(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All texts: their log-probabilities under both models, and their probability."""
    places, words = policy.shape
    texts = torch.tensor(list(itertools.product(range(words), repeat=places)))
    at = torch.arange(places)
    chosen = policy[at, texts]
    return chosen, reference[at, texts], chosen.sum(1).exp()


def _pair(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch ``[4, 7]`` with a prompt of two tokens that is masked out."""
    policy = -normal(seed, 4, 7).abs() - 0.1
    reference = policy + 0.5 * normal(seed + 3, 4, 7, scale=1.0)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    for row, length in enumerate((5, 3, 1, 4)):
        mask[row, 2 : 2 + length] = True
    return policy, reference, mask


def _ones(like: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=torch.bool)


def _shape(kl: Attempt) -> None:
    policy, reference, mask = _pair(0)
    tensor(kl(policy, reference, mask), (4,), "the estimate of four completions")


def _equal(kl: Attempt) -> None:
    policy, _, mask = _pair(1)
    close(kl(policy, policy.clone(), mask), torch.zeros(4), "policy and reference are the same")


def _unbiased(kl: Attempt) -> None:
    for seed in range(3):
        for places in (1, 2):
            policy, reference = _models(seed, places=places)
            chosen, other, chance = _texts(policy, reference)
            got = tensor(kl(chosen, other, _ones(chosen)), tuple(chance.shape)).double()
            want = (policy.exp() * (policy - reference)).sum()
            close((chance * got).sum(), want,
                  f"texts of {places} out of 5 words: the mean estimate over all texts, each with "
                  "its probability under the policy", rtol=1e-4)  # fmt: skip


def _positive(kl: Attempt) -> None:
    for seed in range(3):
        policy, reference, mask = _pair(seed)
        got = tensor(kl(policy, reference, mask), (4,))
        worst = float(got.min())
        expect(worst >= 0, f"a completion has an estimate of {worst:.4f}")


def _tokens(kl: Attempt) -> None:
    for seed in range(2):
        policy, reference, mask = _pair(seed)
        whole = tensor(kl(policy, reference, mask), (4,))
        parts = torch.stack([
            tensor(kl(policy[:, i : i + 1], reference[:, i : i + 1], _ones(policy[:, :1])), (4,))
            for i in range(7)
        ], dim=1)  # fmt: skip
        close(
            whole, (parts * mask).sum(1), "a completion against the sum of its tokens, one by one"
        )


def _masked(kl: Attempt) -> None:
    policy, reference, mask = _pair(2)
    want = kl(policy, reference, mask)
    for junk in (-50.0, float("nan"), float("-inf")):
        dirty = policy.masked_fill(~mask, junk)
        close(kl(dirty, reference.masked_fill(~mask, 0.0), mask), want,
              f"{junk} at prompt and padding")  # fmt: skip


def _small(kl: Attempt) -> None:
    policy = -normal(4, 1, 64).abs() - 0.1
    reference = policy + 3e-4 * normal(5, 1, 64, scale=1.0)
    gap = (reference.double() - policy.double()).flatten()
    want = (torch.expm1(gap) - gap)[:, None]
    got = tensor(kl(policy.T, reference.T, _ones(policy.T)), (64,))[:, None]
    low = float(got.min())
    expect(
        low >= 0, f"float32, log-probabilities that differ by about 3e-4: an estimate of {low:.1e}"
    )
    close(got.sum(), want.sum(), "float32, 64 tokens that differ by about 3e-4: the sum", rtol=0.02,
          atol=1e-9)  # fmt: skip


def _total(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(1)


def _gap(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, reference, 0.0) - torch.where(mask, policy, 0.0)


def k1(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    return -_gap(policy_logps, reference_logps, mask).sum(1)


def k2(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    return _gap(policy_logps, reference_logps, mask).square().sum(1) / 2


def absolute(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    return _gap(policy_logps, reference_logps, mask).abs().sum(1)


def clamped(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    return k1(policy_logps, reference_logps, mask).clamp(min=0)


def upside_down(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = -_gap(policy_logps, reference_logps, mask)
    return (torch.expm1(gap) - gap).sum(1)


def whole_ratio(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = _gap(policy_logps, reference_logps, mask).sum(1)
    return torch.expm1(gap) - gap


def mean_of_tokens(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = _gap(policy_logps, reference_logps, mask)
    return (torch.expm1(gap) - gap).sum(1) / mask.sum(1)


def no_mask(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = reference_logps - policy_logps
    return (torch.expm1(gap) - gap).sum(1)


def times_mask(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = reference_logps - policy_logps
    return ((torch.expm1(gap) - gap) * mask).sum(1)


def rounds(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = _gap(policy_logps, reference_logps, mask)
    return (torch.exp(gap) - gap - 1.0).sum(1)


def rounds_below(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = _gap(policy_logps, reference_logps, mask)
    return ((torch.exp(gap) - 1.0) - gap).sum(1)


def forgets_one(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = _gap(policy_logps, reference_logps, mask)
    return _total(gap.exp() - gap, mask)


def one_number(policy_logps: Tensor, reference_logps: Tensor, mask: Tensor) -> Tensor:
    gap = _gap(policy_logps, reference_logps, mask)
    return (torch.expm1(gap) - gap).sum(1).mean()


def _probes() -> list[tuple[Any, ...]]:
    policy, reference, mask = _pair(0)
    return [
        (policy, reference, mask),
        (policy.masked_fill(~mask, float("nan")), reference, mask),
    ]


def _look(kl: Attempt, arguments: tuple[Any, ...]) -> Any:
    """The estimates, and for nearly equal models their size in the units of rounding."""
    policy, _, mask = _pair(6)
    near = policy + 1e-4 * normal(5, 4, 7, scale=1.0)
    return kl(*arguments), 1e8 * kl(policy, near, mask)


EXERCISE = Exercise(
    id="ch05.kl_estimate",
    parameters=("policy_logps", "reference_logps", "mask"),
    properties=(
        Property(
            "one estimate for each completion",
            "The result should be [B]: one number for each completion.",
            _shape,
        ),
        Property(
            "0 if both models are the same",
            "Where policy and reference agree on every token the estimate should be 0.",
            _equal,
        ),
        Property(
            "unbiased: its mean over all texts is the KL divergence",
            "Weighted by the policy's probabilities, the estimates should give KL(policy ‖ "
            "reference).",
            _unbiased,
        ),
        Property(
            "never negative",
            "Each completion's estimate should be 0 or more.",
            _positive,
        ),
        Property(
            "the sum over the tokens",
            "Each token is a draw of its own: the completion's estimate is the sum of theirs.",
            _tokens,
        ),
        Property(
            "prompt and padding do not matter, NaN included",
            "What stands outside of the mask should not reach the estimate.",
            _masked,
        ),
        Property(
            "not lost in rounding where the models nearly agree",
            "At the start of a run the models differ by very little, and float32 rounds at 6e-8 "
            "of what is computed with: the sum should still be right to a few percent.",
            _small,
        ),
    ),
    mutants=(
        Mutant(
            "This is the log-ratio itself (k1). Its mean is right as well, and far from the "
            "reference it spreads less, which is why the companion's budget goes by it. But it may "
            "be negative, and asked for is an estimate that never is. Add e^d − 1, with "
            "d = reference − policy: it has the mean 0 and takes the sign away.",
            k1,
            "trl #3240",
        ),
        Mutant(
            "This is half of the squared log-ratio (k2). It is never negative, but its mean is not "
            "the KL divergence: it is biased, the more so the further the policy has moved.",
            k2,
        ),
        Mutant(
            "The absolute value of the log-ratio makes every number positive, and every mean too "
            "large: there is noise in it even where the divergence is 0.",
            absolute,
        ),
        Mutant(
            "Negative estimates are cut off at 0. What was cut was needed for the mean to be "
            "right.",
            clamped,
        ),
        Mutant(
            "The ratio is upside down: with tokens drawn from the policy it must be reference over "
            "policy, d = reference − policy. As it stands, the mean is no KL divergence.",
            upside_down,
            "rocket-learn #12",
        ),
        Mutant(
            "The ratio of whole texts is taken. That is unbiased too, but a product of many "
            "ratios: its variance grows without bound with the length. Estimate token by token.",
            whole_ratio,
        ),
        Mutant(
            "The mean over the tokens is taken. A divergence between texts is the sum: as a mean, "
            "a long text would count no more than a short one.",
            mean_of_tokens,
        ),
        Mutant(
            "The mask is not used: the prompt, which nobody sampled, and the padding are counted.",
            no_mask,
        ),
        Mutant(
            "What is masked is multiplied by 0. NaN times 0 is NaN: replace it first.",
            times_mask,
        ),
        Mutant(
            "e^d − d − 1 is computed as it stands. With d of 1e-4 the answer is 5e-9, and float32 "
            "rounds at 6e-8: what comes out is noise, and may be negative. `torch.expm1(d) - d`.",
            rounds,
            also=(rounds_below,),
        ),
        Mutant(
            "The −1 is missing: e^d has the mean 1 under the policy, so each token adds 1 too "
            "much.",
            forgets_one,
        ),
        Mutant(
            "There is one number for the batch. Return one for each completion; the mean over them "
            "is the trainer's business.",
            one_number,
        ),
    ),
    probes=_probes,
    look=_look,
    hints=(
        "Start from log(policy / reference), which is unbiased. What has the mean 0 under the "
        "policy and can be added without a bias?",
        "reference/policy − 1 has the mean Σ reference − Σ policy = 0. And e^d − 1 ≥ d for every "
        "d.",
        "`d = torch.where(mask, reference - policy, 0.0)`, then `(torch.expm1(d) - d).sum(1)`.",
    ),
    right="This is Schulman's k3, which TRL's GRPO uses for its penalty. Its *value* is unbiased; "
    "its gradient is not that of the divergence. For a budget take k1: far from the reference k3's "
    "few huge ratios make it spread more, as the chapter shows.",
)
