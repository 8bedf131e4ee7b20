"""Right answers in other words than the solutions' pass: results are checked, not code."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from companion.course import check
from companion.functional import FallTest

ROWS = []


def right(name):
    def keep(function):
        ROWS.append((name, function))
        return function

    return keep


@right("ch01.pair_loss")
def loss_logaddexp(chosen, rejected):
    return torch.logaddexp(torch.zeros_like(chosen), rejected - chosen)


@right("ch01.choice_gradient")
def gradient_one_hot(scores):
    chosen = F.one_hot(torch.zeros(len(scores), dtype=torch.int64), scores.shape[1])
    return (scores - scores.logsumexp(dim=1, keepdim=True)).exp() - chosen


@right("ch02.last_content_index")
def content_from_behind(input_ids, attention_mask, eos_id):
    rows = []
    for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        places = [i for i in range(len(ids)) if mask[i] and ids[i] != eos_id]
        if not places:
            raise ValueError("nothing to read")
        rows.append(places[-1])
    return torch.tensor(rows)


@right("ch02.last_content_index")
def content_flipped(input_ids, attention_mask, eos_id):
    inside = (attention_mask != 0) & (input_ids != eos_id)
    if (inside.sum(1) == 0).any():
        raise ValueError("nothing to read")
    return inside.shape[1] - 1 - inside.int().flip(1).argmax(1)


@right("ch04.weighted_shift")
def shift_average(chosen, rejected, weights, target, coefficient):
    middle = np.average(((chosen + rejected) / 2).numpy(), weights=weights.numpy())
    return target - float(middle)


@right("ch04.split_rows")
def split_by_digest(rows, test_fraction, seed):
    train, test = [], []
    for row in rows:
        key = " ".join(row["prompt"].lower().split())
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        (test if share < test_fraction else train).append(row)
    return train, test


@right("ch04.split_rows")
def split_groups(rows, test_fraction, seed):
    groups = defaultdict(list)
    for row in rows:
        groups["".join(row["prompt"].upper().split())].append(row)
    order = np.random.default_rng(seed).permutation(len(groups))
    cut = int(test_fraction * len(groups))
    parts = [groups[key] for key in sorted(groups)]
    return (
        [row for i in order[cut:] for row in parts[i]],
        [row for i in order[:cut] for row in parts[i]],
    )


@right("ch05.best_of_few_kl")
def few_in_a_loop(probabilities, n):
    total = below = 0.0
    for p in probabilities.tolist():
        kept = (below + p) ** n - below**n
        below += p
        if kept > 0:
            total += kept * math.log(kept / p)
    return total


@right("ch05.kl_estimate")
def kl_of_the_ratio(policy_logps, reference_logps, mask):
    ratio = torch.where(mask, reference_logps - policy_logps, 0.0).exp()
    return (ratio - 1 - ratio.log()).sum(1)  # the same rounded ratio twice: that is exact


@right("ch05.when_to_stop")
def stop_with_the_companion(proxy, gold, kl, budget, alpha):
    rule = FallTest(len(gold), alpha)
    best = 0
    for step, seen in enumerate(gold):
        if kl[step] > budget:
            return step, best
        look = rule.add(seen)
        if look.fallen:
            return step, look.best
        best = look.best
    return len(gold) - 1, best


@right("ch05.when_to_stop")
def stop_by_hand(proxy, gold, kl, budget, alpha):
    looks, prompts = gold.shape
    pairs = math.comb(looks, 2)
    best = 0
    for step in range(looks):
        change = gold[step] - gold[best]
        if kl[step] > budget:
            return step, best
        if change.mean() < 0:
            t = change.mean() / (change.std(ddof=1) / math.sqrt(prompts))
            if stats.t.cdf(t, prompts - 1) * pairs < alpha:
                return step, best
        elif step:
            best = step
    return looks - 1, best


@right("ch06.percentile_of")
def percentile_of_groups(scores, quantiles):
    step = 100 / (len(quantiles) - 1)
    found = []
    for s in scores.tolist():
        equal = [k for k, q in enumerate(quantiles) if q == s]
        if math.isnan(s):
            found.append(math.nan)
        elif equal:
            found.append(step * (equal[0] + equal[-1]) / 2)
        elif s < quantiles[0] or s > quantiles[-1]:
            found.append(0.0 if s < quantiles[0] else 100.0)
        else:
            k = int(np.searchsorted(quantiles, s))
            part = (s - quantiles[k - 1]) / (quantiles[k] - quantiles[k - 1])
            found.append(step * (k - 1 + part))
    return np.array(found)


@right("ch06.faulty_batches")
def faulty_in_a_loop(served, alone, batch, tolerance):
    found = set()
    for one, other, number in zip(served, alone, batch, strict=True):
        if math.isnan(one) and math.isnan(other):
            continue
        if not abs(one - other) <= tolerance:
            found.add(int(number))
    return sorted(found)


@right("ch06.new_threshold")
def threshold_by_sorting(threshold, old, new):
    wanted = int((old >= threshold).sum())
    ordered = np.sort(new)[::-1]
    for more in range(len(new) + 1):
        for count in (wanted - more, wanted + more):
            if count == 0:
                return math.inf
            if count == len(new):
                return -math.inf
            if 0 < count < len(new) and ordered[count - 1] > ordered[count]:
                return float(ordered[count - 1] + ordered[count]) / 2
    raise AssertionError


@right("ch06.score_by_budget")
def budget_from_short_to_long(texts, score, budget):
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batches = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * len(texts[i]) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    found = {}
    for batch in batches:
        found |= dict(zip(batch, score([texts[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(texts))]


@right("ch06.who_is_served")
def served_event_by_event(arrivals, tokens, patience, rate):
    waiting = sorted(zip(arrivals, range(len(arrivals)), strict=True))
    rewarded, now = set(), 0.0
    while waiting:
        arrival, i = waiting.pop(0)
        now = max(now, arrival)
        if now <= arrival + patience[i]:
            now += tokens[i] / rate
            if now <= arrival + patience[i]:
                rewarded.add(i)
    return [i in rewarded for i in range(len(arrivals))]


@right("ch07.overconfidence")
def overconfidence_in_a_loop(margin, outcome, bins):
    held = [[] for _ in range(bins)]
    for m, won in zip(margin.tolist(), outcome.tolist(), strict=True):
        sure = 1 / (1 + math.exp(-abs(m)))
        right_one = 0.5 if m == 0 else won if m > 0 else 1 - won
        held[min(int((sure - 0.5) * 2 * bins), bins - 1)].append(sure - right_one)
    return np.array([np.mean(gaps) if gaps else np.nan for gaps in held])


@right("ch07.weekly_evidence")
def weekly_evidence_by_product(right, a0, stake):
    wealth, out = 1.0, []
    for week in right:
        wealth *= math.prod(1 + stake * (a0 - x) for x in week)
        out.append(math.log(wealth))
    return np.array(out)


@right("ch07.rows_to_bet_on")
def rows_by_looks_back(rows):
    chosen = []
    for i, row in enumerate(rows):
        before = [r for r in rows[:i] if r.get("sampling") == "random"]
        if row.get("sampling") != "random" or any(r["id"] == row["id"] for r in before):
            continue
        if not any(r["prompt_id"] == row["prompt_id"] and r["look"] != row["look"] for r in before):
            chosen.append(i)
    return chosen


@right("ch07.labels_to_alarm")
def labels_by_search(a0, a1, alpha):
    if a1 >= a0:
        return [0.0, math.inf]
    stake = (a0 - a1) / (a0 * (1 - a0))
    growth = (1 - a1) * math.log(1 + stake * a0) + a1 * math.log(1 - stake * (1 - a0))
    return [stake, -math.log(alpha) / growth]


@right("ch08.pool_shards")
def pooled_two_by_two(counts, means, stds):
    total, mean, squares = 0, 0.0, 0.0
    for n, m, s in zip(counts.tolist(), means.tolist(), stds.tolist(), strict=True):
        if n:
            gap, both = m - mean, total + n
            squares += n * s**2 + gap**2 * total * n / both
            mean += gap * n / both
            total = both
    return [mean, math.sqrt(squares / total)]


@right("ch08.loss_scales")
def scales_in_loops(counts):
    pairs = sum(int(n) for row in counts for n in row)
    out = np.zeros(counts.shape)
    for place in np.argwhere(counts):
        out[tuple(place)] = counts[tuple(place)] / pairs * counts.shape[0]
    return out


@right("ch08.deal_rows")
def rows_in_turn(n_rows, batch, ranks):
    """Within a step the rows go round the ranks."""
    steps = -(-n_rows // (batch * ranks))
    out = np.full((ranks, steps, batch), -1)
    for row in range(n_rows):
        step, place = divmod(row, batch * ranks)
        out[place % ranks, step, place // ranks] = row
    return out


@right("ch08.bytes_a_rank")
def bytes_by_cases(parameters, ranks, stage, largest):
    if ranks == 1 or stage == 0:
        return 16 * parameters
    part = math.ceil(parameters / ranks)
    bare = {1: 4 * parameters + 12 * part, 2: 2 * parameters + 14 * part, 3: 16 * part}
    return bare[stage] + (4 * largest if stage == 3 else 0)


@right("ch08.agreed_step")
def step_by_arithmetic(arrivals, n_steps, every):
    first = min((a for a in arrivals if a is not None), default=math.inf)
    if first == math.inf:
        return [None for _ in arrivals]
    step = max(math.ceil(first / every), 1) * every
    return [step if step < n_steps else None for _ in arrivals]


@right("ch09.visible_gap")
def gap_over_pairs(first, second, prompts):
    found = [0.0]
    for i, j in itertools.combinations(range(len(prompts)), 2):
        if prompts[i] == prompts[j]:
            found.append(abs((first[i] - first[j]) - (second[i] - second[j])))
    return np.float64(max(found))


@pytest.mark.parametrize(("name", "function"), ROWS, ids=[f.__name__ for _, f in ROWS])
def test_it_passes(name, function):
    result = check(name, function)
    assert result.outcome == "right", str(result)
