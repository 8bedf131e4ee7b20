"""Wrong answers that no mutant was made from: none passes, and none is told what it did not do.

Each has with it what its author is to read: a mutant's words where the answer does the same as the
mutant on all that was tried, else what is asked for and what was seen. They are what readers have
sent to the checks, and mistakes of the kinds that a check tends to get wrong: results of another
type, nearly right numbers, other exceptions, answers by luck, answers that another rule gives.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_rel

from companion.course import check, checking
from companion.course.catalogue import CATALOGUE
from companion.course.checking import IN_PLACE, load_exercise
from companion.course.exercise import Exercise
from companion.formatting.time_limit import TimeLimit, TooLong

KIND = "The result is not of the kind that was asked for."
RAISES = "The function raises an exception."

ENDLESS = "The function did not come to its end"
ROWS: list[tuple[str, Callable[..., Any], dict[str, str]]] = []


def wrong(exercise: str, **told: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrong answer, and what is told: a `mutant`'s words, what a property `asks`, or `says`."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__module__ = "a_notebook"  # it is sent to a second process as a notebook's is
        ROWS.append((exercise, function, told))
        return function

    return keep


# 1: pair_loss


@wrong("ch01.pair_loss", says=KIND)
def loss_list(chosen, rejected):
    pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
    return [math.log1p(math.exp(r - c)) for c, r in pairs]


@wrong("ch01.pair_loss", says=KIND)
def loss_numpy(chosen, rejected):
    return np.logaddexp(0.0, (rejected - chosen).detach().numpy())


@wrong("ch01.pair_loss", asks="it is −log σ(chosen − rejected), and ln 2 at a tie")
def loss_log2(chosen, rejected):
    return F.softplus(rejected - chosen) / math.log(2)


@wrong("ch01.pair_loss", asks="it is −log σ(chosen − rejected), and ln 2 at a tie")
def loss_half(chosen, rejected):
    return 0.5 * F.softplus(rejected - chosen)


@wrong("ch01.pair_loss", asks="one loss for each pair")
def loss_column(chosen, rejected):
    return F.softplus(rejected - chosen)[..., None]


@wrong("ch01.pair_loss", asks="it is −log σ(chosen − rejected), and ln 2 at a tie")
def loss_probability_gap(chosen, rejected):
    return 1 - torch.sigmoid(chosen - rejected)


# 1: choice_gradient


@wrong("ch01.choice_gradient", says=KIND)
def gradient_list(scores):
    p = torch.softmax(scores, dim=1)
    p[:, 0] -= 1
    return p.tolist()


@wrong("ch01.choice_gradient", mutant="by_autograd")
def gradient_backward(scores):
    leaf = scores.clone().requires_grad_(True)
    F.cross_entropy(leaf, torch.zeros(len(leaf), dtype=torch.int64), reduction="sum").backward()
    return leaf.grad


@wrong("ch01.choice_gradient", asks="by hand")
def gradient_func(scores):
    return torch.func.grad(lambda s: -F.log_softmax(s, dim=1)[:, 0].sum())(scores)


@wrong("ch01.choice_gradient", asks="what autograd finds")
def gradient_differences(scores, step=1e-3):
    def loss(s):
        return -F.log_softmax(s, dim=1)[:, 0]

    columns = []
    for k in range(scores.shape[1]):
        move = torch.zeros_like(scores)
        move[:, k] = step
        columns.append((loss(scores + move) - loss(scores - move)) / (2 * step))
    return torch.stack(columns, dim=1)


@wrong("ch01.choice_gradient", asks="what autograd finds")
def gradient_last_chosen(scores):
    p = torch.softmax(scores, dim=1)
    return p - torch.eye(scores.shape[1], dtype=p.dtype)[-1]


# 1: the others


@wrong("ch01.margin_loss", mutant="added")
def margin_added(head_chosen, head_rejected, margin):
    return -F.logsigmoid(head_chosen[:, 0] - head_rejected[:, 0] + margin)


@wrong("ch01.fit_strengths", mutant="share_logit")
def strengths_by_wins(winner, loser, n_items):
    wins = np.bincount(winner, minlength=n_items) / (
        np.bincount(winner, minlength=n_items) + np.bincount(loser, minlength=n_items)
    )
    scores = np.log(wins / (1 - wins))
    return scores - scores.mean()


@wrong("ch01.plackett_luce", says=ENDLESS)
def ranking_endless(scores, mask):
    place = 0
    while place < scores.shape[1]:
        pass
    return scores


@wrong("ch01.plackett_luce", asks="with two completions it is Bradley–Terry")
def ranking_of_probabilities(scores, mask):
    return torch.softmax(scores.masked_fill(~mask, -1e9), dim=1)[:, 0]


# 2


@wrong("ch02.last_content_index", asks="a row without content is refused")
def content_runtime_error(input_ids, attention_mask, eos_id):
    content = attention_mask.bool() & (input_ids != eos_id)
    if not content.any(dim=1).all():
        raise RuntimeError("no content")
    return (torch.arange(content.shape[1]) * content).amax(dim=1)


@wrong("ch02.last_content_index", asks="a row without content is refused")
def content_minus_one(input_ids, attention_mask, eos_id):
    content = attention_mask.bool() & (input_ids != eos_id)
    last = (torch.arange(content.shape[1]) * content).amax(dim=1)
    return torch.where(content.any(dim=1), last, -1)


@wrong("ch02.last_content_index", says=KIND)
def content_list(input_ids, attention_mask, eos_id):
    content = attention_mask.bool() & (input_ids != eos_id)
    return [max(i for i, real in enumerate(row) if real) for row in content.tolist()]


@wrong("ch02.last_content_index", asks="int64")
def content_float(input_ids, attention_mask, eos_id):
    content = attention_mask.bool() & (input_ids != eos_id)
    if not content.any(dim=1).all():
        raise ValueError("no content")
    return (torch.arange(content.shape[1]) * content).amax(dim=1).float()


@wrong("ch02.encode_chat", says=KIND)
def chat_text(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False)


@wrong("ch02.encode_chat", asks="one BOS, at the start, whatever the tokenizer adds")
def chat_without_template(tokenizer, messages):
    return tokenizer("\n".join(m["content"] for m in messages))["input_ids"]


@wrong("ch02.position_ids", mutant="from_one")
def positions_from_one(attention_mask):
    return (attention_mask.long().cumsum(dim=1)).clamp(max=attention_mask.shape[1] - 1)


@wrong("ch02.position_ids", mutant="as_float")
def positions_float(attention_mask):
    return (attention_mask.float().cumsum(dim=1) - 1).clamp(min=0)


@wrong("ch02.read_scores", mutant="mean_pooled")
def scores_mean(hidden, attention_mask, weight):
    kept = attention_mask[..., None].float()
    return (hidden.float() * kept).sum(1) / kept.sum(1) @ weight


@wrong("ch02.read_scores", says=KIND)
def scores_numpy(hidden, attention_mask, weight):
    index = (torch.arange(attention_mask.shape[1]) * attention_mask).amax(dim=1)
    return (hidden[torch.arange(len(hidden)), index].float() @ weight).numpy()


@wrong("ch02.is_padding_invariant", mutant="always_true")
def invariant_true(score, rows, pad_id):
    return True


@wrong("ch02.is_padding_invariant", mutant="always_true")
def invariant_none_ever(score, rows, pad_id):
    return False


@wrong("ch02.is_padding_invariant", says=KIND)
def invariant_number(score, rows, pad_id):
    return 1.0


# 3


@wrong("ch03.label_outcomes", asks="the outcome on every token of the completion")
def outcomes_minus_one(attention_mask, prompt_lengths, outcomes):
    inside = attention_mask.bool() & (attention_mask.cumsum(1) > prompt_lengths[:, None])
    return torch.where(inside, 2 * outcomes.long()[:, None] - 1, -100)


@wrong("ch03.label_outcomes", says=KIND)
def outcomes_numpy(attention_mask, prompt_lengths, outcomes):
    inside = attention_mask.bool() & (attention_mask.cumsum(1) > prompt_lengths[:, None])
    return torch.where(inside, outcomes.long()[:, None], -100).numpy()


@wrong("ch03.aggregates", asks="the logarithm of the product")
def aggregates_log2(probabilities, mask):
    place = (torch.arange(mask.shape[1]) * mask).amax(1)
    return {
        "log_product": probabilities.masked_fill(~mask, 1.0).log2().sum(1),
        "min": probabilities.masked_fill(~mask, torch.inf).amin(1),
        "mean": probabilities.masked_fill(~mask, 0.0).sum(1) / mask.sum(1),
        "last": probabilities.gather(1, place[:, None])[:, 0],
    }


@wrong("ch03.aggregates", says=KIND)
def aggregates_tuple(probabilities, mask):
    return tuple(aggregates_log2(probabilities, mask).values())


@wrong("ch03.first_error_f1", mutant="at_least")
def first_error_at_least(solutions, threshold):
    right = {True: [], False: []}
    for chance, wrong in solutions:
        named = next((i for i, p in enumerate(chance) if p >= threshold), None)
        truth = next((i for i, bad in enumerate(wrong) if bad), None)
        right[truth is not None].append(named == truth)
    a, b = (sum(hits) / len(hits) for hits in right.values())
    return 2 * a * b / (a + b) if a + b else 0.0


@wrong("ch03.first_error_f1", asks="the harmonic mean of two accuracies")
def first_error_geometric(solutions, threshold):
    right = {True: [], False: []}
    for chance, wrong in solutions:
        named = next((i for i, p in enumerate(chance) if p > threshold), None)
        truth = next((i for i, bad in enumerate(wrong) if bad), None)
        right[truth is not None].append(named == truth)
    a, b = (sum(hits) / len(hits) for hits in right.values())
    return math.sqrt(a * b)


@wrong("ch03.count_verdicts", says=KIND)
def verdicts_list(replies):
    return [("[[A]]" in one, "[[B]]" in other) for one, other in replies]


@wrong("ch03.count_verdicts", says=IN_PLACE)
def verdicts_pop(replies):
    counts = {"first": 0, "second": 0, "tie": 0, "unparsed": 0, "first_place": float("nan")}
    while replies:
        replies.pop()
        counts["tie"] += 1
    return counts


@wrong("ch03.label_steps", asks="a separator that is no token of its own raises")
def steps_runtime_error(tokenizer, prompt, steps):
    right = _steps_or_none(tokenizer, prompt, steps)
    if right is None:
        raise RuntimeError("joined")
    return right


def _steps_or_none(tokenizer, prompt, steps):
    text, ends = prompt + "\n", []
    for step, _ in steps:
        text += step + "\n"
        ends.append(len(text))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    labels = [-100] * len(offsets)
    for end, (_, rating) in zip(ends, steps, strict=True):
        token = next(i for i, (_, stop) in enumerate(offsets) if stop >= end)
        if offsets[token] != (end - 1, end):
            return None
        if rating is not None:
            labels[token] = rating + 1
        if rating == -1:
            break
    return labels


@wrong("ch03.label_steps", asks="a separator that is no token of its own raises")
def steps_assert(tokenizer, prompt, steps):
    right = _steps_or_none(tokenizer, prompt, steps)
    assert right is not None
    return right


# 4


@wrong("ch04.epoch_accuracy", asks="a tie is not a win")
def accuracy_constant(batches):
    return 0.4


@wrong("ch04.epoch_accuracy", asks="a tie is not a win")
def accuracy_at_least_once(batches):
    return float(any(bool((c > r).any()) for c, r in batches))


@wrong("ch04.epoch_accuracy", asks="a tie is not a win")
def accuracy_sign(batches):
    c, r = (torch.cat(side) for side in zip(*batches, strict=True))
    return float((c - r).sign().mean())


@wrong("ch04.weighted_shift", asks="no other shift is better")
def shift_numpy_search(chosen, rejected, weights, target, coefficient):
    grid = np.linspace(-10, 10, 201)
    sums = (chosen + rejected).numpy()[:, None] + 2 * grid - 2 * target
    return float(grid[(weights.numpy()[:, None] * sums**2).sum(0).argmin()])


@wrong("ch04.weighted_shift", says=KIND)
def shift_string(chosen, rejected, weights, target, coefficient):
    total = (weights * (chosen + rejected)).sum() / weights.sum()
    return f"{float(target - total / 2):.6f}"


@wrong("ch04.training_settings", mutant="two_epochs")
def settings_two_epochs():
    return {
        "num_train_epochs": 2,
        "learning_rate": 1e-4,
        "max_length": 1024,
        "pad_token": "<|endoftext|>",
        "center_rewards_coefficient": 0.01,
        "eval_strategy": "steps",
        "lora": {"r": 16, "target_modules": "all-linear", "modules_to_save": ["score"]},
    }


@wrong("ch04.training_settings", asks="a pad token of its own")
def settings_unknown_pad():
    return {**settings_two_epochs(), "num_train_epochs": 1, "pad_token": "<pad>"}


def _key(row):
    return " ".join(row["prompt"].casefold().split())


_key.__module__ = "a_notebook"


@wrong("ch04.split_rows", mutant="hash_order")
def split_by_hash(rows, test_fraction, seed):
    prompts = list({_key(row) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: round(test_fraction * len(prompts))])
    return [r for r in rows if _key(r) not in held], [r for r in rows if _key(r) in held]


@wrong("ch04.split_rows", says=IN_PLACE)
def split_sorts_the_list(rows, test_fraction, seed):
    rows.sort(key=_key)
    prompts = sorted({_key(row) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: round(test_fraction * len(prompts))])
    return [r for r in rows if _key(r) not in held], [r for r in rows if _key(r) in held]


@wrong("ch04.split_rows", says=IN_PLACE)
def split_writes_keys(rows, test_fraction, seed):
    for row in rows:
        row["key"] = _key(row)
    prompts = sorted({row["key"] for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: round(test_fraction * len(prompts))])
    return [r for r in rows if r["key"] not in held], [r for r in rows if r["key"] in held]


@wrong("ch04.split_rows", mutant="hash_order")
def split_global_seed(rows, test_fraction, seed):
    prompts = sorted({_key(row) for row in rows})
    random.shuffle(prompts)
    held = set(prompts[: round(test_fraction * len(prompts))])
    return [r for r in rows if _key(r) not in held], [r for r in rows if _key(r) in held]


@wrong("ch04.train_epoch", asks="one batch, one step")
def train_adds(weight, batches, rate, accumulation):
    weight = weight.clone()
    for start in range(0, len(batches), accumulation):
        pairs = torch.cat(batches[start : start + accumulation])
        weight -= rate * (torch.sigmoid(-(pairs @ weight))[:, None] * pairs).mean(0)
    return weight


@wrong("ch04.train_epoch", mutant="keeps_graph")
def train_keeps_graph(weight, batches, rate, accumulation):
    weight = weight.clone().requires_grad_(True)
    for start in range(0, len(batches), accumulation):
        loss = -F.logsigmoid(torch.cat(batches[start : start + accumulation]) @ weight).mean()
        weight = weight - rate * torch.autograd.grad(loss, weight)[0]
    return weight


# 5


@wrong("ch05.best_of_few_kl", mutant="bits")
def few_log2(probabilities, n):
    up_to = probabilities.double().cumsum(0) ** n
    kept = torch.diff(up_to, prepend=up_to.new_zeros(1))
    return float((kept[kept > 0] * (kept / probabilities)[kept > 0].log2()).sum())


@wrong("ch05.best_of_few_kl", asks="0 where nothing can be chosen")
def few_monte_carlo(probabilities, n):
    rng = np.random.default_rng(0)
    p = probabilities.double().numpy()
    drawn = rng.choice(len(p), size=(2000, min(n, 50)), p=p / p.sum()).max(axis=1)
    q = np.bincount(drawn, minlength=len(p)) / 2000
    seen = q > 0
    return float((q[seen] * np.log(q[seen] / p[seen])).sum())


@wrong("ch05.best_of_few_kl", asks="0 where nothing can be chosen")
def few_entropy(probabilities, n):
    kept = torch.diff(probabilities.cumsum(0) ** n, prepend=probabilities.new_zeros(1))
    return float(-(kept[kept > 0] * kept[kept > 0].log()).sum())


@wrong("ch05.best_of_few_kl", says=ENDLESS)
def few_all_ways(probabilities, n):
    q = torch.zeros_like(probabilities)
    for drawn in itertools.product(range(len(probabilities)), repeat=n):
        q[max(drawn)] += probabilities[list(drawn)].prod()
    return float((q[q > 0] * (q / probabilities)[q > 0].log()).sum())


@wrong("ch05.kl_estimate", mutant="rounds")
def kl_exp(policy_logps, reference_logps, mask):
    d = torch.where(mask, reference_logps - policy_logps, 0.0)
    return ((d.exp() - 1) - d).sum(1)


@wrong("ch05.kl_estimate", asks="unbiased: its mean over all texts is the KL divergence")
def kl_log2(policy_logps, reference_logps, mask):
    d = torch.where(mask, reference_logps - policy_logps, 0.0)
    return (torch.expm1(d) - d).sum(1) / math.log(2)


@wrong("ch05.kl_estimate", asks="unbiased: its mean over all texts is the KL divergence")
def kl_half(policy_logps, reference_logps, mask):
    d = torch.where(mask, reference_logps - policy_logps, 0.0)
    return (torch.expm1(d) - d).sum(1) / 2


@wrong("ch05.expected_best", asks="the best of 1 is the mean")
def best_monte_carlo(scores, values, n):
    generator = torch.Generator().manual_seed(0)
    kept = ~scores.isnan()
    scores, values = scores[kept], values[kept]
    total = 0.0
    for _ in range(200):
        drawn = torch.randperm(len(scores), generator=generator)[:n]
        total += float(values[drawn[scores[drawn].argmax()]])
    return total / 200


@wrong("ch05.expected_best", says=ENDLESS)
def best_all_subsets(scores, values, n):
    kept = ~scores.isnan()
    scores, values = scores[kept].tolist(), values[kept].tolist()
    total, ways = 0.0, 0
    for drawn in itertools.combinations(range(len(scores)), n):
        total, ways = total + values[max(drawn, key=scores.__getitem__)], ways + 1
    return total / ways


@wrong("ch05.when_to_stop", mutant="two_errors")
def stop_two_errors(proxy, gold, kl, budget, alpha):
    best = 0
    means, errors = gold.mean(1), gold.std(1, ddof=1) / math.sqrt(gold.shape[1])
    for step in range(1, len(gold)):
        if kl[step] > budget:
            return step, best
        if means[step] < means[best] - 2 * math.hypot(errors[step], errors[best]):
            return step, best
        if means[step] > means[best]:
            best = step
    return len(gold) - 1, best


@wrong("ch05.when_to_stop", mutant="uncorrected")
def stop_at_alpha(proxy, gold, kl, budget, alpha):
    best = 0
    for step in range(1, len(gold)):
        if kl[step] > budget:
            return step, best
        if ttest_rel(gold[step], gold[best], alternative="less").pvalue < alpha:
            return step, best
        if gold[step].mean() > gold[best].mean():
            best = step
    return len(gold) - 1, best


@wrong("ch05.when_to_stop", asks="a p-value is held against alpha over the pairs of looks")
def stop_seen_pairs(proxy, gold, kl, budget, alpha):
    best = 0
    for step in range(1, len(gold)):
        if kl[step] > budget:
            return step, best
        level = alpha / ((step + 1) * step / 2)  # only the pairs until now: it adds up to more
        if ttest_rel(gold[step], gold[best], alternative="less").pvalue < level:
            return step, best
        if gold[step].mean() > gold[best].mean():
            best = step
    return len(gold) - 1, best


@wrong("ch05.when_to_stop", asks="a KL budget that is spent stops the run")
def stop_budget_at_least(proxy, gold, kl, budget, alpha):
    best, looks = 0, len(gold)
    for step in range(1, looks):
        if kl[step] >= budget:
            return step, best
        p = ttest_rel(gold[step], gold[best], alternative="less").pvalue
        if p < alpha / (looks * (looks - 1) / 2):
            return step, best
        if gold[step].mean() > gold[best].mean():
            best = step
    return looks - 1, best


@wrong("ch05.reward_function", asks="messages become text by the chat template")
def reward_zeros(prompts, completions, completion_ids, model, tokenizer):
    return [0.0 for _ in completions]


@wrong("ch05.reward_function", says=KIND)
def reward_tensor(prompts, completions, completion_ids, model, tokenizer):
    return torch.zeros(len(completions))


@wrong("ch05.reward_function", says=KIND)
def reward_numpy(prompts, completions, completion_ids, model, tokenizer):
    return np.zeros(len(completions))


# 6


@wrong("ch06.percentile_of", mutant="counts_up_to")
def percentile_plain_interp(scores, quantiles):
    return np.interp(scores, quantiles, np.linspace(0, 100, len(quantiles)), left=0.0, right=100.0)


@wrong("ch06.percentile_of", says=KIND)
def percentile_list(scores, quantiles):
    return [50.0 for _ in scores]


@wrong("ch06.percentile_of", asks="between two quantiles it goes in a straight line")
def percentile_nearest(scores, quantiles):
    nearest = np.abs(scores[:, None] - quantiles[None, :]).argmin(1)
    return 100.0 * nearest / (len(quantiles) - 1)


@wrong("ch06.faulty_batches", mutant="close_by_numpy")
def faulty_allclose(served, alone, batch, tolerance):
    return [
        int(b)
        for b in np.unique(batch)
        if not np.allclose(served[batch == b], alone[batch == b], atol=tolerance, equal_nan=True)
    ]


@wrong("ch06.faulty_batches", asks="rounding is no fault")
def faulty_rounded(served, alone, batch, tolerance):
    places = round(-math.log10(tolerance))
    apart = np.round(served, places) != np.round(alone, places)
    apart &= ~(np.isnan(served) & np.isnan(alone))
    return [int(b) for b in np.unique(batch[apart])]


@wrong("ch06.faulty_batches", says=KIND)
def faulty_any(served, alone, batch, tolerance):
    return bool((np.abs(served - alone) > tolerance).any())


@wrong("ch06.new_threshold", asks="it lies in the middle of the gap")
def threshold_of_next(threshold, old, new):
    kept = int((old >= threshold).sum())
    ordered = np.sort(new)[::-1]
    if kept in (0, len(new)):
        return math.inf if kept == 0 else -math.inf
    return float(ordered[kept] + 1e-9)


@wrong("ch06.new_threshold", says=KIND)
def threshold_as_text(threshold, old, new):
    return str(float(np.median(new)))


@wrong("ch06.score_by_budget", asks="little padding")
def budget_sorted_backwards_in_halves(texts, score, budget):
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    mixed = [i for pair in itertools.zip_longest(order, order[::-1]) for i in pair]
    found, batch = [0.0] * len(texts), []
    for i in dict.fromkeys(mixed):
        if batch and (len(batch) + 1) * max(len(texts[j]) for j in [*batch, i]) > budget:
            for j, one in zip(batch, score([texts[j] for j in batch]), strict=True):
                found[j] = one
            batch = []
        batch.append(i)
    if batch:
        for j, one in zip(batch, score([texts[j] for j in batch]), strict=True):
            found[j] = one
    return found


@wrong("ch06.score_by_budget", says=KIND)
def budget_array(texts, score, budget):
    return np.array(score(texts))  # all of them at once


@wrong("ch06.who_is_served", mutant="stays_busy")
def served_all_work_done(arrivals, tokens, patience, rate):
    served, free = {}, 0.0
    for i in np.argsort(arrivals):
        free = max(free, arrivals[i]) + tokens[i] / rate
        served[i] = bool(free <= arrivals[i] + patience[i])
    return [served[i] for i in range(len(arrivals))]


@wrong("ch06.who_is_served", mutant="from_start")
def served_if_work_fits(arrivals, tokens, patience, rate):
    return [count / rate <= wait for count, wait in zip(tokens, patience, strict=True)]


# 7


@wrong("ch07.overconfidence", mutant="always_one")
def overconfidence_by_sign(margin, outcome, bins):
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    right = np.where(margin == 0, 0.5, margin > 0)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    return np.array(
        [(sure - right)[place == b].mean() if (place == b).any() else np.nan for b in range(bins)]
    )


@wrong("ch07.overconfidence", says=KIND)
def overconfidence_list(margin, outcome, bins):
    return [0.0] * bins


@wrong("ch07.weekly_evidence", mutant="new_money")
def weekly_evidence_each_alone(right, a0, stake):
    return [sum(math.log(1 + stake * (a0 - x)) for x in week) for week in right]


@wrong("ch07.weekly_evidence", says=KIND)
def weekly_evidence_last(right, a0, stake):
    return 0.0


@wrong("ch07.rows_to_bet_on", mutant="each_look")
def rows_once_an_id(rows):
    ids, chosen = set(), []
    for i, row in enumerate(rows):
        if row.get("sampling") == "random" and row["id"] not in ids:
            ids.add(row["id"])
            chosen.append(i)
    return chosen


@wrong("ch07.rows_to_bet_on", says=KIND)
def rows_counted(rows):
    return len(rows)


@wrong("ch07.labels_to_alarm", mutant="straight")
def labels_by_the_mean(a0, a1, alpha):
    if a1 >= a0:
        return 0.0, math.inf
    stake = (a0 - a1) / (a0 * (1 - a0))
    return stake, -math.log(alpha) / (stake * (a0 - a1))


@wrong("ch07.labels_to_alarm", says=KIND)
def labels_alone(a0, a1, alpha):
    return 100.0


# 8


@wrong("ch08.pool_shards", mutant="within_only")
def pooled_variance_alone(counts, means, stds):
    used = counts > 0
    n, m, s = counts[used], means[used], stds[used]
    return np.average(m, weights=n), np.sqrt(np.average(s**2, weights=n))


@wrong("ch08.pool_shards", says=KIND)
def pooled_mean(counts, means, stds):
    return float(np.nansum(counts * means) / counts.sum())


@wrong("ch08.loss_scales", mutant="own_count")
def scales_of_a_rank(counts):
    return counts / np.maximum(counts.sum(axis=1), 1)[:, None]


@wrong("ch08.loss_scales", says=KIND)
def scales_of_ranks(counts):
    return len(counts) * counts.sum(axis=1) / max(counts.sum(), 1)


@wrong("ch08.deal_rows", mutant="at_the_end")
def rows_padded_at_the_end(n_rows, batch, ranks):
    steps = -(-n_rows // (batch * ranks))
    flat = np.full(steps * ranks * batch, -1)
    flat[:n_rows] = np.arange(n_rows)
    return flat.reshape(steps, ranks, batch).swapaxes(0, 1).tolist()


@wrong("ch08.deal_rows", says=KIND)
def rows_of_no_rank(n_rows, batch, ranks):
    return list(range(n_rows))


@wrong("ch08.bytes_a_rank", mutant="nothing_gathered")
def bytes_of_parts(parameters, ranks, stage, largest):
    part = -(-parameters // ranks)
    return sum(
        size * (part if stage >= first else parameters) for size, first in ((2, 3), (2, 2), (12, 1))
    )


@wrong("ch08.bytes_a_rank", says=KIND)
def bytes_true_division(parameters, ranks, stage, largest):
    return 16 * parameters / ranks


@wrong("ch08.agreed_step", mutant="every_flag")
def step_of_all(arrivals, n_steps, every):
    for step in range(every, n_steps, every):
        if all(a is not None and a <= step for a in arrivals):
            return [step] * len(arrivals)
    return [None] * len(arrivals)


@wrong("ch08.agreed_step", says=KIND)
def step_alone(arrivals, n_steps, every):
    return every


# 9


@wrong("ch09.visible_gap", mutant="all_texts")
def gap_of_all_texts(first, second, prompts):
    gap = first - second
    return max(gap) - min(gap)


@wrong("ch09.visible_gap", says=KIND)
def gap_of_each_prompt(first, second, prompts):
    return dict.fromkeys(prompts, 0.0)


@pytest.mark.parametrize(
    ("name", "function", "told"), ROWS, ids=[function.__name__ for _, function, _ in ROWS]
)
def test_a_wrong_answer_is_told_what_it_did_or_what_is_asked_for(name, function, told, monkeypatch):
    if told.get("says") == ENDLESS:
        monkeypatch.setattr(checking, "SECONDS", 1.0)
    result = check(name, function)
    assert result.outcome == "wrong", str(result)
    exercise = load_exercise(name)
    words = {mutant.name: mutant.misconception for mutant in exercise.mutants}
    asked = {rule.name: rule.requirement for rule in exercise.properties}
    if "mutant" in told:
        assert result.message == words[told["mutant"]]
    elif "asks" in told:
        assert result.message == asked[told["asks"]]
        assert (told["asks"], False) in result.properties
        assert result.evidence
    else:
        assert result.message.startswith(told["says"])
    if "mutant" not in told:
        assert result.message not in words.values()
        assert result.thread is None
    assert not all(good for _, good in result.properties)


def test_there_are_many_and_they_are_spread():
    assert len(ROWS) >= 40
    functions = [e.id for e in CATALOGUE if isinstance(load_exercise(e.id), Exercise)]
    assert {name for name, _, _ in ROWS} == set(functions)
    assert sum("mutant" not in told for _, _, told in ROWS) >= 40


def test_no_wrong_answer_here_is_a_mutant():
    answers = {
        answer
        for entry in CATALOGUE
        if isinstance(exercise := load_exercise(entry.id), Exercise)
        for mutant in exercise.mutants
        for answer in (mutant.answer, *mutant.also)
    }
    assert not answers & {function for _, function, _ in ROWS}


# what the check says of itself


def test_what_was_not_tested_is_not_reached():
    result = check("ch01.pair_loss", loss_list)
    assert [good for _, good in result.properties] == [False, None, None, None, None]
    assert "· its gradient is −(1 − p), however wrong the pair (not reached)" in str(result)
    assert "not reached" in result._repr_html_()
    assert str(result).count("✗") == 2  # the head, and the one property that was tested

    def crashes(chosen, rejected):
        raise KeyError("score")

    assert {good for _, good in check("ch01.pair_loss", crashes).properties} == {None}


def _endless(chosen, rejected):
    while True:
        with contextlib.suppress(Exception):
            rejected = rejected + 1


def _swallows(chosen, rejected):
    while True:
        try:
            rejected = rejected + 1
        except:  # noqa: E722
            break  # even so it has used up its time
    while True:
        pass


@pytest.mark.parametrize("function", [_endless, _swallows])
@pytest.mark.parametrize("in_thread", [False, True])
def test_an_endless_loop_ends(function, in_thread, monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.5)
    results = []
    if in_thread:
        thread = threading.Thread(target=lambda: results.append(check("ch01.pair_loss", function)))
        thread.start()
        thread.join(30)
    else:
        results.append(check("ch01.pair_loss", function))
    (result,) = results
    assert result.outcome == "wrong"
    assert result.message.startswith(ENDLESS)
    assert "loop" in result.message
    assert f"in {function.__name__}, line" in result.evidence
    assert {good for _, good in result.properties} == {None}
    assert check("ch01.pair_loss", lambda c, r: -F.logsigmoid(c - r))  # nothing is left behind


def test_a_limit_counts_calls_together_and_leaves_the_rest_alone():
    limit = TimeLimit(0.3)
    with limit.running(), limit.running():
        time.sleep(0.05)
    assert 0.04 < limit.used < 0.3
    time.sleep(0.4)  # between two calls nothing is counted
    with pytest.raises(TooLong), limit.running():  # noqa: PT012
        while True:
            pass
    with pytest.raises(TooLong), limit.running():
        pytest.fail("there is no time left")


def test_the_companions_own_functions_are_no_attempts():
    import companion

    own = companion.bradley_terry_loss
    for attempt in (
        own,
        functools.partial(own, label_smoothing=0.0),
        functools.wraps(own)(lambda chosen, rejected: own(chosen, rejected)),
    ):
        result = check("ch01.pair_loss", attempt)
        assert result.outcome == "not attempted"
        assert "bradley_terry_loss` of the companion, not yours" in result.message
    assert check("ch03.label_outcomes", companion.functional.outcome_labels).outcome == (
        "not attempted"
    )
    # whoever calls it in a function of their own has written one
    assert check("ch01.pair_loss", lambda chosen, rejected: own(chosen, rejected))


def test_a_function_of_a_notebook_runs_in_the_second_process():
    """As one that is defined in a cell, with a helper and an import of its own."""
    cell = """
import random, re
def key(row):
    return re.sub(r"\\s+", " ", row["prompt"].casefold().strip())
def split(rows, test_fraction, seed):
    prompts = sorted({key(row) for row in rows})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: round(test_fraction * len(prompts))])
    return [r for r in rows if key(r) not in held], [r for r in rows if key(r) in held]
from companion.course import check
right = check("ch04.split_rows", split)
print(right)
assert right
"""
    done = subprocess.run(
        [sys.executable, "-c", cell], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
