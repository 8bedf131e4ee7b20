"""From labels to alarms: what counts, what does not, and that the simulation is the same thing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from companion.errors import DataError
from companion.functional.betting import bets_of, by_group, log_growth, mix, mix_starts
from companion.monitoring.evidence import Evidence, Labels, calibration_weights, measure, worst_of
from companion.monitoring.plan import (
    BINS,
    FEWEST,
    PARTS,
    Level,
    Plan,
    make_plan,
    rightness,
    shortfalls,
)
from companion.monitoring.planner import Change, Population, draw_plan, promise, simulate


def population(pairs: int = 1, slices: int = 0, atoms: int | None = None) -> Population:
    margins = 3 * np.abs(np.random.default_rng(0).standard_normal(4000))
    made = Population(margins, 0.6, pairs, slices)
    return made if atoms is None else made.coarse(atoms)


def labels_of(draws: list[tuple[np.ndarray, np.ndarray]], slices: int = 0) -> Labels:
    """Of each week margins and whether they are right, ``[prompts, pairs]``."""
    look, prompt, part = [], [], []
    for week, (margins, _) in enumerate(draws, 1):
        for i in range(margins.shape[0]):
            look += [week] * margins.shape[1]
            prompt += [f"{week} {i}"] * margins.shape[1]
            part += [f"s{i % slices}" if slices else None] * margins.shape[1]
    margins = np.concatenate([m.ravel() for m, _ in draws])
    right = np.concatenate([r.ravel() for _, r in draws])
    # half of them with the loser first, which must not matter
    turned = np.arange(margins.size) % 2 == 1
    margin = np.where(turned, -margins, margins)
    return Labels(np.array(look), margin, np.where(turned, 1 - right, right), prompt, part)


def some(
    seed: int = 0, weeks: int = 6, prompts: int = 60, pairs: int = 1, slices: int = 0
) -> Labels:
    """Labels of a model that has become overconfident."""
    rng = np.random.default_rng(seed)
    of, change = population(pairs), Change("temperature", 2.0)
    return labels_of([of.draw(rng, (prompts,), change) for _ in range(weeks)], slices)


def a_plan(seed: int = 1, prompts: int = 1000, pairs: int = 1, slices: int = 0) -> Plan:
    return draw_plan(population(pairs, slices), prompts, np.random.default_rng(seed))


def logs(found: Evidence) -> dict[str, list[float]]:
    return {test.name: test.log_e for test in found.tests}


def same(one: Evidence, other: Evidence) -> bool:
    a, b = logs(one), logs(other)
    return a.keys() == b.keys() and all(np.allclose(a[k], b[k], rtol=0, atol=1e-9) for k in a)


# --- by hand ----------------------------------------------------------------------------------


def test_accuracy_by_hand() -> None:
    """One bet is on a limit alone; a prompt of two pairs is one bet on its mean."""
    level = Level(500, 500, 0.8, 0.75, 0.05, 0.01)
    plan = Plan("m", "v", 0.01, level, None)
    labels = Labels(
        np.array([1, 1, 1, 2]),
        np.array([2.0, -1.0, 1.0, 0.5]),
        np.array([1.0, 1.0, 1.0, 0.0]),  # right, wrong, right; wrong
        ["a", "a", "b", "c"],
        [None] * 4,
    )
    (test,) = measure(plan, labels).tests
    bets = bets_of(0.3)
    first = (1 + bets * (0.7 - 0.5)) * (1 + bets * (0.7 - 1.0))
    second = 1 + bets * 0.7
    assert np.exp(test.log_e[0]) == pytest.approx((first / 2 + 1 / 2).mean())
    assert np.exp(test.log_e[1]) == pytest.approx((first * second / 2 + second / 6 + 1 / 3).mean())
    assert test.threshold == pytest.approx(np.log(100))
    assert test.alarm is None


def test_an_alarm_needs_all_that_the_reference_leaves_open() -> None:
    labels = some()
    right = rightness(labels.margin, labels.outcome)
    level = Level(9, 9, 0.8, 0.7, 0.0, 0.01, [0.7, 0.75], [1.5, -0.5])
    (test,) = measure(Plan("m", "v", 0.01, level, None), labels).tests
    each = []
    for null, said in zip(level.open, level.log_e, strict=True):
        growth = [
            log_growth(null - right[labels.look == k], bets_of(1 - null)) for k in range(1, 7)
        ]
        each.append(mix(mix_starts(np.stack(growth))) + said)
    assert test.log_e == pytest.approx(np.minimum(*each))


def test_a_calibration_by_hand() -> None:
    """One label, of which only the mixture over bets, bins and sides is left to compute."""
    plan = a_plan()
    calibration = plan.calibration
    assert calibration is not None
    one = replace(calibration, open=[[0.5], [0.7]], log_e=[[0.25], [-0.5]])
    labels = Labels(np.array([1]), np.array([-3.0]), np.array([1.0]), ["a"], [None])  # wrong
    test = measure(replace(plan, calibration=one), labels).tests[1]
    least, most = (1 / (1 + np.exp(-3 * inverse)) for inverse in one.open[0] + one.open[1])
    total = 0.0
    for short, worst, said in zip(
        (least - one.tolerance, -(most + one.tolerance)), worst_of(one.tolerance), (0.25, -0.5),
        strict=True,
    ):  # fmt: skip
        wealth = ((1 + bets_of(worst) * short) / 2 + 1 / 2).mean()
        # in all pairs and in its bin; two bins are empty
        total += np.exp(said) * (wealth / 2 + wealth / 6 + 1 / 3) / 2
    assert np.exp(test.log_e[0]) == pytest.approx(total)
    assert calibration_weights(BINS).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


# --- what must not matter, and what must --------------------------------------------------------


def test_the_order_within_a_look_does_not_matter() -> None:
    plan, labels = a_plan(slices=2), some(slices=2, pairs=3)
    order = np.random.default_rng(2).permutation(len(labels))
    assert same(measure(plan, labels), measure(plan, labels.part(order)))
    assert logs(measure(plan, labels)).keys() == {"accuracy", "calibration", "slice s0", "slice s1"}


def test_a_prompt_that_was_bet_on_is_left_out_and_counted() -> None:
    plan, labels = a_plan(), some()
    again = Labels(
        np.concatenate([labels.look, np.full(40, 6)]),
        np.concatenate([labels.margin, labels.margin[:40] + 1]),
        np.concatenate([labels.outcome, labels.outcome[:40]]),
        [*labels.prompt, *labels.prompt[:40]],
        [*labels.slice, *labels.slice[:40]],
    )
    found = measure(plan, again)
    assert (found.used, found.again) == (len(labels), 40)
    assert same(found, measure(plan, labels))
    # a second pair in the same look is no new prompt, but counts in its mean
    again.look[-40:] = 1
    found = measure(plan, again)
    assert (found.used, found.again) == (len(labels) + 40, 0)
    assert not same(found, measure(plan, labels))


def test_labels_of_later_looks_do_not_change_earlier_ones() -> None:
    plan, labels = a_plan(), some()
    short = measure(plan, labels.part(labels.look <= 4))
    for test, longer in zip(short.tests, measure(plan, labels).tests, strict=True):
        assert longer.log_e[:4] == pytest.approx(test.log_e)


def test_a_slice_bets_on_its_own_pairs_and_small_ones_do_not_bet() -> None:
    rng = np.random.default_rng(3)
    margins, right = population().draw(rng, (600,))
    signed = np.where(right == 1, margins, -margins).ravel()
    names = ["code"] * 200 + ["chat"] * 350 + ["rare"] * 50
    prompts = [str(i) for i in range(600)]
    made: dict[str, Any] = {"model": "m", "model_version": "v", "temperature": 1.7}
    plan = make_plan(signed, np.ones(600), prompts, slices=names, **made)
    assert set(plan.slices) == {"code", "chat"}
    assert any("rare: 50 prompts" in note for note in plan.notes)
    labels = some()
    labels = replace(labels, slice=["code" if i % 3 else "rare" for i in range(len(labels))])
    found = {test.name: test for test in measure(plan, labels).tests}
    own = labels.part(np.array([name == "code" for name in labels.slice]))
    alone = measure(Plan("m", "v", 0.01, plan.slices["code"], None), own).tests[0]
    assert found["slice code"].log_e == pytest.approx(alone.log_e)
    assert max(found["slice chat"].log_e) <= max(plan.slices["chat"].log_e)  # nothing to bet on
    # all alphas together, the limits' and the bettors', are the plan's
    levels = [plan.accuracy, *plan.slices.values(), plan.calibration]
    bettors = sum(level.alpha for level in levels if level is not None)
    assert bettors < plan.alpha
    with pytest.raises(DataError, match="least"):
        make_plan(signed[:50], np.ones(50), prompts[:50], **made)
    assert FEWEST == 100


def test_ties_count_half() -> None:
    margins, outcome = np.array([1.0, -1.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.5])
    assert rightness(margins, outcome).tolist() == [1, 0, 0.5, 0.5]
    plan = Plan("m", "v", 0.01, Level(9, 9, 0.8, 0.75, 0.0, 0.01), None)
    tie = Labels(np.array([1]), np.array([2.0]), np.array([0.5]), ["a"], [None])
    halves = Labels(
        np.array([1, 1]), np.array([2.0, 2.0]), np.array([1.0, 0.0]), ["a", "a"], [None] * 2
    )
    assert same(measure(plan, tie), measure(plan, halves))


def test_no_labels_are_no_looks() -> None:
    none = Labels(np.array([], dtype=int), np.array([]), np.array([]), [], [])
    found = measure(a_plan(), none)
    assert (found.tests, found.looks, found.used) == ([], [], 0)


def test_a_model_that_stays_is_left_alone_and_one_that_falls_is_not() -> None:
    plan = a_plan(prompts=2000, slices=2)
    rng = np.random.default_rng(5)
    of = population(slices=2)
    quiet = [of.draw(rng, (200,)) for _ in range(20)]
    found = measure(plan, labels_of(quiet, 2))
    assert all(test.alarm is None and test.since is None for test in found.tests)
    change = Change("accuracy", 0.2)
    fallen = [of.draw(rng, (200,), change) for _ in range(8)]
    found = measure(plan, labels_of(quiet + fallen, 2))
    for test in found.tests:
        print(test.name, test.alarm, test.since, test.side)
        assert test.alarm is not None
        assert test.since is not None
        assert 21 <= test.alarm <= 28
        assert abs(test.since - 21) <= 1  # counted from 1, the first week of the fall
    assert found.tests[1].side == "overconfident"
    # it stays, whatever comes
    well = [of.draw(rng, (400,)) for _ in range(60)]
    later = measure(plan, labels_of(quiet + fallen + well, 2))
    for before, after in zip(found.tests, later.tests, strict=True):
        assert after.alarm == before.alarm
        assert after.log_e[-1] < after.threshold


def test_underconfidence_is_called_so() -> None:
    rng = np.random.default_rng(6)
    change = Change("temperature", 0.5)
    labels = labels_of([population().draw(rng, (300,), change) for _ in range(12)])
    test = measure(a_plan(prompts=3000), labels).tests[1]
    assert test.alarm is not None
    assert test.side == "underconfident"


# --- the reference's own doubt ------------------------------------------------------------------


def test_what_the_reference_leaves_open_begins_at_the_limits() -> None:
    plan = a_plan(pairs=2)
    assert plan.calibration is not None
    for points, log_e in (
        (plan.accuracy.open, plan.accuracy.log_e),
        *zip(plan.calibration.open, plan.calibration.log_e, strict=True),
    ):
        assert len(points) == len(log_e) == PARTS
        assert np.all(np.diff(log_e) <= 0)  # the nearer to the estimate, the less speaks against it
        assert log_e[-1] == pytest.approx(-np.log(2))
        assert 0 < log_e[0] < 4
    best, low, high = plan.calibration.inverse
    over, under = plan.calibration.open
    assert (over[0], under[0]) == (low, high)
    assert np.all(np.diff([*over, best]) > 0)
    assert np.all(np.diff([*under, best]) < 0)
    assert plan.accuracy.open[0] == plan.accuracy.limit
    assert np.all(np.diff([*plan.accuracy.open, plan.accuracy.mean]) > 0)
    # and it is plain data
    again = Plan.from_dict(plan.to_dict())
    assert again == plan


@pytest.mark.parametrize("pairs", [1, 5])
def test_reference_and_labels_together_are_an_e_value(pairs: int) -> None:
    """Under the null, with the reference drawn anew: its mean is at most 1, for all true values.

    Where the limits hold; that they do not is paid for apart.
    """
    seed, runs = 40 + pairs, 300
    of = population(pairs)
    rng = np.random.default_rng(seed)
    true = float(of.right(of.margins).mean())
    e: dict[str, list[float]] = {"accuracy": [], "calibration": []}
    for _ in range(runs):
        plan = draw_plan(of, 120, rng)
        labels = labels_of([of.draw(rng, (20,)) for _ in range(3)])
        holds = {"accuracy": plan.accuracy.limit <= true, "calibration": False}
        if plan.calibration is not None:
            holds["calibration"] = plan.calibration.inverse[1] <= of.inverse
            holds["calibration"] &= of.inverse <= plan.calibration.inverse[2]
        for test in measure(plan, labels).tests:
            e[test.name].append(np.exp(test.log_e[-1]) if holds[test.name] else 0.0)
    for name, values in e.items():
        error = np.std(values) / np.sqrt(runs)
        print("seed", seed, name, np.mean(values), "+-", error)
        assert np.mean(values) <= 1 + 3 * error


# --- the simulation is the same -----------------------------------------------------------------


def alarms_of(plans: list[Plan], draws: list[list[tuple[Any, Any]]], slices: int) -> dict[str, Any]:
    """What measure() says, run by run."""
    found: dict[str, list[int]] = {"accuracy": [], "calibration": [], "slices": []}
    for plan, weeks in zip(plans, draws, strict=True):
        tests = measure(plan, labels_of(weeks, slices)).tests
        for name in ("accuracy", "calibration"):
            found[name] += [test.alarm or 0 for test in tests if test.name == name]
        own = [test.alarm for test in tests if test.name.startswith("slice") and test.alarm]
        found["slices"].append(min(own, default=0))
    return found


@pytest.mark.parametrize(("pairs", "slices"), [(1, 0), (1, 2), (3, 2)])
def test_what_is_simulated_is_what_is_measured(
    pairs: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws: the e-processes of all tests to 1e-9, and the weeks of the alarms."""
    from companion.monitoring import planner

    runs, weeks, prompts = 4, 8, 60
    of, change = population(pairs, slices), Change("temperature", 3.0, 2)
    plans = [draw_plan(of, 1200, np.random.default_rng(run)) for run in range(runs)]
    seen: list[np.ndarray] = []
    monkeypatch.setattr(
        planner, "mix_starts", lambda grown: seen.append(grown) or mix_starts(grown)
    )
    found = simulate(
        of, reference=0, a_week=prompts * pairs, weeks=weeks, runs=runs, seed=8, change=change,
        plans=plans,
    )  # fmt: skip
    (rng,) = np.random.default_rng(8).spawn(1)
    drawn = [of.draw(rng, (runs, prompts), change if week >= 2 else None) for week in range(weeks)]
    draws = [[(margins[run], right[run]) for margins, right in drawn] for run in range(runs)]
    expected = alarms_of(plans, draws, slices)
    print(expected)
    for name, own in found.items():
        assert own.tolist() == expected[name]
    assert set(found) == {"accuracy", "calibration", *(["slices"] if slices else [])}
    assert max(expected["calibration"]) > 0
    # the bets' growth of the accuracy, then of the slices, then of the calibration
    assert len(seen) == 2 + slices
    for run, plan in enumerate(plans):
        tests = measure(plan, labels_of(draws[run], slices)).tests
        log_e = (mix(mix_starts(seen[0][:, run])) + plan.accuracy.log_e).min(axis=-1)
        assert tests[0].log_e == pytest.approx(log_e, abs=1e-9)
        assert plan.calibration is not None
        grown = mix(mix(mix_starts(seen[-1][:, run])), calibration_weights(BINS))
        sides = (grown + plan.calibration.log_e).min(axis=-1)
        assert tests[1].log_e == pytest.approx(mix(sides), abs=1e-9)
        for s, test in enumerate(tests[2:]):
            level = plan.slices[f"s{s}"]
            log_e = (mix(mix_starts(seen[1 + s][:, run])) + level.log_e).min(axis=-1)
            assert test.log_e == pytest.approx(log_e, abs=1e-9)


@pytest.mark.parametrize("slices", [0, 2])
def test_what_is_counted_is_what_is_measured(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few margins: from the counts that are drawn the labels are made, one by one."""
    from companion.monitoring import planner

    runs, weeks, prompts = 3, 7, 80
    of, change = population(1, slices, atoms=16), Change("accuracy", 0.2, 1)
    plans = [draw_plan(of, 1000, np.random.default_rng(run)) for run in range(runs)]
    seen: list[np.ndarray] = []
    monkeypatch.setattr(
        planner, "mix_starts", lambda grown: seen.append(grown) or mix_starts(grown)
    )
    found = simulate(
        of, reference=0, a_week=prompts, weeks=weeks, runs=runs, seed=9, change=change, plans=plans
    )
    (rng,) = np.random.default_rng(9).spawn(1)
    atoms, parts = of.margins.size, max(slices, 1)
    draws: list[list[tuple[Any, Any]]] = [[] for _ in range(runs)]
    for week in range(weeks):
        p = of.right(of.margins, change if week >= 1 else None)
        each = np.concatenate([p, 1 - p]) / atoms
        counts = np.stack(
            [rng.multinomial(prompts // parts, each, size=runs) for _ in range(parts)]
        )
        for run in range(runs):
            # slice by slice in turn, as labels_of() names them
            cells = np.stack([np.repeat(np.arange(2 * atoms), own) for own in counts[:, run]], 1)
            cells = cells.reshape(-1, 1)
            draws[run].append((of.margins[cells % atoms], (cells < atoms).astype(float)))
    expected = alarms_of(plans, draws, slices)
    print(expected)
    for name, own in found.items():
        assert own.tolist() == expected[name]
    assert max(expected["accuracy"]) > 0
    for run, plan in enumerate(plans):
        tests = measure(plan, labels_of(draws[run], slices)).tests
        assert plan.calibration is not None
        grown = mix(mix(mix_starts(seen[-1][:, run])), calibration_weights(BINS))
        sides = (grown + plan.calibration.log_e).min(axis=-1)
        assert tests[1].log_e == pytest.approx(mix(sides), abs=1e-9)
        log_e = (mix(mix_starts(seen[0][:, run])) + plan.accuracy.log_e).min(axis=-1)
        assert tests[0].log_e == pytest.approx(log_e, abs=1e-9)


def test_a_fall_and_a_wrong_temperature_are_as_large_as_they_say() -> None:
    of = population()
    usual = of.right(of.margins).mean()
    fallen = of.right(of.margins, Change("accuracy", 0.05))
    assert fallen.mean() == pytest.approx(usual - 0.05)
    for inverse in (0.0, 0.02):  # a coin, and hardly more, can fall too
        poor = replace(of, inverse=inverse)
        low = poor.right(of.margins, Change("accuracy", 0.2))
        assert low.mean() == pytest.approx(poor.right(of.margins).mean() - 0.2, abs=1e-3)
        assert ((low >= 0) & (low <= 1)).all()
    hot = of.right(of.margins, Change("temperature", 2.0))
    assert hot == pytest.approx(1 / (1 + np.exp(-of.margins * 0.3)))
    # dependent pairs are as often right, each by itself
    many = replace(of, pairs=5)
    _, right = many.draw(np.random.default_rng(0), (20_000,))
    assert right.mean() == pytest.approx(usual, abs=0.01)
    alike = np.corrcoef(right[:, 0], right[:, 1])[0, 1]
    assert 0.2 < alike < 0.5
    assert by_group(right.ravel(), np.repeat(np.arange(20_000), 5)).std() > 1.3 * (
        np.sqrt(usual * (1 - usual) / 5)
    )


def test_a_null_is_a_null_for_both_sides() -> None:
    """Margins that mean what they say are no shortfall, on either side, in the mean."""
    of = population()
    p = of.right(of.margins)
    for side in range(2):
        mean = sum(
            share * shortfalls(of.margins, np.full(p.size, right), 0.6, 0.6, 0.01)[side]
            for share, right in ((p, 1.0), (1 - p, 0.0))
        )
        assert (mean <= 1e-12).all()


def test_the_planner_promises_more_labels_for_less() -> None:
    of = population()
    settings: dict[str, Any] = {"reference": 1500, "within": 8, "runs": 40}
    large = promise(of, Change("temperature", 2.0), **settings)
    small = promise(of, Change("temperature", 1.6), **settings)
    print(large, small)
    assert large["labels_a_week"] < small["labels_a_week"]
    assert large["caught"] >= 0.9
    none = promise(of, Change("accuracy", 0.005), **{**settings, "within": 2, "runs": 20})
    assert none["labels_a_week"] is None
    for change in (Change("accuracy", 0.0), Change("temperature", 1.0)):
        with pytest.raises(DataError):
            promise(of, change, **settings)
