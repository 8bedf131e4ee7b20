"""Write the four ways from token probabilities to the score of a text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.course.exercise import Exercise, Mutant, Property
from companion.course.exercises._tools import Attempt, close, expect, kind

KEYS = ("log_product", "min", "mean", "last")
PROMPT = (
    "Tokens that the mask leaves out go into the {}. What the model says at the prompt is about "
    "the problem, not about this answer."
)


def _case(seed: int, *, prompt: int = 2, side: str = "right") -> tuple[Tensor, Tensor]:
    """Probabilities ``[4, 9]`` and the mask of the completions; the prompt comes before."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4, 9, generator=generator) * 0.9 + 0.05
    lengths = torch.randint(2, 6, (4,), generator=generator)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        start = prompt if side == "right" else 9 - length
        mask[row, start : start + length] = True
    return values, mask


def _by_hand(values: Tensor, mask: Tensor) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {key: [] for key in KEYS}
    for row, inside in zip(values.tolist(), mask.tolist(), strict=True):
        kept = [p for p, real in zip(row, inside, strict=True) if real]
        out["log_product"].append(sum(math.log(p) if p > 0 else -math.inf for p in kept))
        out["min"].append(min(kept))
        out["mean"].append(sum(kept) / len(kept))
        out["last"].append(kept[-1])
    return out


def _get(attempt: Attempt, values: Tensor, mask: Tensor, key: str) -> Any:
    got = attempt(values, mask)
    kind(got, Mapping, "a dict of four tensors")
    missing = [name for name in KEYS if name not in got]
    expect(not missing, f"these keys are missing: {', '.join(missing)}")
    size = tuple(np.shape(got[key]))
    expect(size == (len(values),), f"`{key}` has shape {list(size)}, not [{len(values)}]")
    return got[key]


def _keys(attempt: Attempt) -> None:
    values, mask = _case(0)
    for key in KEYS:
        _get(attempt, values, mask, key)


def _one(key: str) -> Callable[[Attempt], None]:
    def test(attempt: Attempt) -> None:
        for seed in range(3):
            for side in ("right", "left"):
                values, mask = _case(seed, side=side)
                want = _by_hand(values, mask)[key]
                close(_get(attempt, values, mask, key), want, f"`{key}`, padding on the {side}")

    return test


def _order(attempt: Attempt) -> None:
    for seed in range(3, 6):
        values, mask = _case(seed)
        product = torch.as_tensor(_get(attempt, values, mask, "log_product")).exp().tolist()
        low = torch.as_tensor(_get(attempt, values, mask, "min")).tolist()
        mean = torch.as_tensor(_get(attempt, values, mask, "mean")).tolist()
        high = values.masked_fill(~mask, 0.0).amax(1).tolist()
        for chain in zip(product, low, mean, high, strict=True):
            expect(
                all(a <= b + 1e-6 for a, b in itertools.pairwise(chain)),
                "product, min, mean, max are " + ", ".join(f"{x:.4f}" for x in chain),
            )


def _long(attempt: Attempt) -> None:
    values = torch.full((1, 4000), 0.9)
    got = _get(attempt, values, torch.ones(1, 4000, dtype=torch.bool), "log_product")
    close(got, [4000 * math.log(0.9)], "`log_product` of 4,000 tokens of 0.9", rtol=1e-3)


def _junk(attempt: Attempt) -> None:
    values, mask = _case(7)
    dirty = values.masked_fill(~mask, float("nan"))
    for key in KEYS:
        want = _by_hand(values, mask)[key]
        close(_get(attempt, dirty, mask, key), want, f"`{key}` with NaN outside of the mask")


def _all(
    values: Tensor,
    mask: Tensor,
    *,
    product: Tensor | None = None,
    low: Tensor | None = None,
    mean: Tensor | None = None,
    last: Tensor | None = None,
) -> dict[str, Tensor]:
    """The right answers, but for those that are given."""
    place = (torch.arange(mask.shape[1]) * mask).amax(1)
    right = {
        "log_product": values.masked_fill(~mask, 1.0).log().sum(1),
        "min": values.masked_fill(~mask, math.inf).amin(1),
        "mean": values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1),
        "last": values.gather(1, place[:, None])[:, 0],
    }
    given = {"log_product": product, "min": low, "mean": mean, "last": last}
    return {key: right[key] if given[key] is None else given[key] for key in KEYS}  # type: ignore[misc]


def product_then_log(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inside = probabilities.masked_fill(~mask, 1.0)
    return _all(probabilities, mask, product=inside.prod(1).log())


def plain_product(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inside = probabilities.masked_fill(~mask, 1.0)
    return _all(probabilities, mask, product=inside.log().sum(1).exp())


def mean_log(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    total = probabilities.masked_fill(~mask, 1.0).log().sum(1)
    return _all(probabilities, mask, product=total / mask.sum(1))


def no_mask(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "log_product": probabilities.log().sum(1),
        "min": probabilities.amin(1),
        "mean": probabilities.mean(1),
        "last": probabilities[:, -1],
    }


def zeros_in_min(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return _all(probabilities, mask, low=probabilities.masked_fill(~mask, 0.0).amin(1))


def mean_of_all(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inside = probabilities.masked_fill(~mask, 0.0)
    return _all(probabilities, mask, mean=inside.mean(1))


def last_column(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return _all(probabilities, mask, last=probabilities[:, -1])


def count_minus_one(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    place = mask.sum(1) - 1
    return _all(probabilities, mask, last=probabilities.gather(1, place[:, None])[:, 0])


def times_mask(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    right = _all(probabilities, mask)
    return right | {
        "log_product": ((probabilities + ~mask).log() * mask).sum(1),
        "mean": (probabilities * mask).sum(1) / mask.sum(1),
        "min": (probabilities + 2.0 * ~mask).amin(1),
    }


def one_for_all(probabilities: Tensor, mask: Tensor) -> dict[str, Tensor]:
    right = _all(probabilities, mask)
    return {key: value.mean() for key, value in right.items()}


def _probes() -> list[tuple[Any, ...]]:
    values, mask = _case(1)
    dirty = values.masked_fill(~mask, float("nan"))
    long = torch.full((1, 4000), 0.9)
    return [
        (values, mask),
        _case(2, side="left"),
        (dirty, mask),
        (long, torch.ones(1, 4000, dtype=torch.bool)),
    ]


EXERCISE = Exercise(
    id="ch03.aggregates",
    parameters=("probabilities", "mask"),
    properties=(
        Property(
            "a dict of four, one value for each row",
            "The result should be a dict with the keys log_product, min, mean and last, each of "
            "shape [B].",
            _keys,
        ),
        Property(
            "the mean over the mask",
            "`mean` should be the mean over the tokens where the mask is true.",
            _one("mean"),
        ),
        Property(
            "the least within the mask",
            "`min` should be the least value where the mask is true.",
            _one("min"),
        ),
        Property(
            "the value at the last token of the mask",
            "`last` should be the value at the last place where the mask is true, wherever that "
            "is.",
            _one("last"),
        ),
        Property(
            "the logarithm of the product",
            "`log_product` should be the sum of the logarithms over the mask.",
            _one("log_product"),
        ),
        Property(
            "product ≤ min ≤ mean ≤ max",
            "A product of probabilities is at most the least of them, and the least at most the "
            "mean.",
            _order,
        ),
        Property(
            "a product of 4,000 tokens does not vanish",
            "The product of 4,000 values of 0.9 is about 10⁻¹⁸³, which float32 rounds to 0; its "
            "logarithm is a plain number.",
            _long,
        ),
        Property(
            "what stands outside of the mask does not matter, NaN included",
            "What stands outside of the mask must not reach the scores, NaN included.",
            _junk,
        ),
    ),
    mutants=(
        Mutant(
            "The product is taken first and then its logarithm. In float32 it has become 0 after "
            "some hundred tokens, and log 0 is −∞: all long texts tie.",
            product_then_log,
        ),
        Mutant(
            "The sum of logarithms is turned back into a product. Keep the logarithm: the order is "
            "the same, and it does not vanish.",
            plain_product,
        ),
        Mutant(
            "The mean of the logarithms is taken (the geometric mean). That does not shrink with "
            "the length, which may well be better, but it is not the product.",
            mean_log,
        ),
        Mutant(
            "The mask is not used: prompt and padding go into all four. An unmasked prompt alone "
            "changes every one of them.",
            no_mask,
        ),
        Mutant(
            "What is masked is set to 0 before the minimum, so the least is always 0. Fill with "
            "something large for a minimum.",
            zeros_in_min,
        ),
        Mutant(
            "The sum is right, but it is divided by the width of the batch. Divide by the number "
            "of tokens in the mask, or a text's mean depends on its neighbours.",
            mean_of_all,
        ),
        Mutant(
            "`last` is read in the last column, which is padding for all but the longest row.",
            last_column,
            "reward-bench #137",
        ),
        Mutant(
            "`last` is read at count − 1. The mask begins behind the prompt, so that is a token in "
            "the middle: ask for the last *place* where the mask is true.",
            count_minus_one,
        ),
        Mutant(
            "What is outside of the mask is multiplied by 0 or shifted. NaN survives both; "
            "replace it.",
            times_mask,
        ),
        Mutant(
            "There is one number for the whole batch. Each text has its own score.",
            one_for_all,
        ),
    ),
    probes=_probes,
    hints=(
        "Each of the four wants another filling for what is outside: what changes no sum of "
        "logarithms, what changes no minimum, what changes no sum?",
        "Fill with 1 (log 1 = 0), with ∞, with 0. For `last`, find the largest place where the "
        "mask is true.",
        "`place = (torch.arange(T) * mask).amax(1)`; `p.gather(1, place[:, None])[:, 0]`; "
        "`p.masked_fill(~mask, 1.0).log().sum(1)`.",
    ),
    right="Which of the four ranks answers best is a question to the held-out set: the companion's "
    "`aggregate` has all of them.",
)
