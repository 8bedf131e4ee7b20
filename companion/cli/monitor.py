"""``companion monitor``: watch a reward model age, with alarms that do not cry wolf."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from companion.cli.shared import (
    REMOTE,
    HelpWithExamples,
    add_flags,
    check_target,
    open_scorer,
    picked,
    progress_bar,
)
from companion.data.writing import write_text

_EPILOG = """\
exit codes of run:
  0 fine · 10 warning (look at it) · 20 retrain (accuracy, calibration or a slice has fallen)
  30 fault (a golden text moved: the serving of the model) · 2 bad input

example:
  companion monitor init watch.sqlite --model reward-model --reference held-out.jsonl
  companion monitor run watch.sqlite --labels labels.jsonl --traffic log_dir
  companion monitor report watch.sqlite --output report.html

Rows of --labels: id, prompt, chosen, rejected (or a, b, label), and where they are known prompt_id,
time, annotator, slice, sampling ("random" alone may raise an alarm), scores and model_version. A
label counts once, in the look that sees it first; each prompt is bet on once.
"""
_RUN_EPILOG = """\
exit codes: 0 fine, 10 warning, 20 retrain, 30 fault, 2 bad input

example:
  companion monitor run watch.sqlite --labels labels.jsonl --url http://127.0.0.1:8000 \\
    --protocol companion --json verdict.json --prometheus node/companion.prom
"""
_INIT_EPILOG = """\
example:
  companion monitor init watch.sqlite --model reward-model --reference held-out.jsonl --within 4
"""
_REPORT_EPILOG = """\
example: companion monitor report watch.sqlite --output report.html
"""
_RESTART_EPILOG = """\
example:
  companion monitor restart watch.sqlite --model reward-model-2 --reference held-out-2.jsonl \\
    --reason "retrained in March"
"""
_LOADING = (
    *("text", "max_tokens_per_batch", "packing", "device", "dtype", "revision"),
    *("trust_remote_code", *REMOTE),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str, epilog: str) -> Any:
        sub = actions.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=HelpWithExamples,
        )
        sub.add_argument("state", metavar="STATE", type=Path, help="the monitor's file (SQLite)")
        return sub

    begin = action(
        "init", "begin to watch a model, and plan how many labels a week that takes", _INIT_EPILOG
    )
    _plan_flags(begin)
    run = action("run", "take new labels and traffic, look, and judge", _RUN_EPILOG)
    run.add_argument("--labels", metavar="FILE", help="judgements of pairs; may grow between looks")
    run.add_argument(
        "--traffic",
        metavar="PATH",
        help="texts without labels: a JSONL file, or the folder of the server's --log_dir",
    )
    run.add_argument(
        "--sampling", metavar="RULE", help="by which rule rows that do not say theirs were chosen"
    )
    run.add_argument("--no_golden", action="store_true", help="do not check the golden texts")
    run.add_argument(
        "--served_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="in which the server is meant to run, where that is not how the model was saved: the "
        "golden texts may move by as much as its rounding",
    )
    run.add_argument("--model", help="where the model is now, if no longer where it was")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the verdict here")
    run.add_argument(
        "--prometheus",
        type=Path,
        metavar="FILE",
        help="write metrics here, for node_exporter's textfile collector; ends in .prom",
    )
    add_flags(run, *_LOADING)
    report = action("report", "all looks as one HTML file that needs no network", _REPORT_EPILOG)
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the file")
    again = action(
        "restart",
        "after an alarm was dealt with: a new reference (and model), and a new alpha",
        _RESTART_EPILOG,
    )
    again.add_argument("--reason", required=True, help="what was done, for the history")
    _plan_flags(again)


def _plan_flags(parser: Any) -> None:
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add(
        "--reference",
        metavar="FILE",
        help="labelled pairs, chosen at random, on prompts that the model did not train on: what "
        "later labels are held against; the more, the smaller the change that can be seen",
    )
    add(
        "--alpha",
        type=float,
        default=0.01,
        help="chance that a model that has not changed is ever called worse, however many looks",
    )
    add("--accuracy_tolerance", type=float, default=0.0, help="a fall that is not worth an alarm")
    add(
        "--calibration_tolerance",
        type=float,
        default=0.01,
        help="an error of a probability that is not worth an alarm",
    )
    add("--sampling", default="random", metavar="RULE", help="of labels that may raise an alarm")
    add("--catch_accuracy", type=float, default=0.05, help="plan for a fall of this size")
    add(
        "--catch_temperature",
        type=float,
        default=1.5,
        help="plan for overconfidence by this factor",
    )
    add("--within", type=int, default=8, metavar="WEEKS", help="in which it is to be caught")
    add("--power", type=float, default=0.9, help="the chance that it is")
    add("--json", type=Path, metavar="FILE", help="write the plan here")
    add_flags(parser, *_LOADING)


def run(args: argparse.Namespace) -> int:
    """Do it; of ``run`` the exit code is the verdict."""
    return {"init": _init, "run": _run, "report": _report, "restart": _restart}[args.action](args)


def _plan(args: argparse.Namespace) -> Any:
    from companion.monitoring.monitor import plan_of
    from companion.monitoring.planner import Change

    scorer = open_scorer(args)
    with progress_bar("scoring", "texts") as moved:
        return plan_of(
            scorer,
            args.reference,
            catch=[
                Change("accuracy", args.catch_accuracy),
                Change("temperature", args.catch_temperature),
            ],
            progress=moved["progress"],
            **picked(args, "model", "alpha", "accuracy_tolerance", "calibration_tolerance"),
            **picked(args, "sampling", "within", "power"),
        )


def _init(args: argparse.Namespace) -> int:
    from companion.errors import DataError
    from companion.monitoring.store import Store

    check_target(args.json, args.reference, args.state)
    if args.state.exists():
        raise DataError(
            f"{args.state}: is there already", "name another file, or: companion monitor restart"
        )
    plan = _plan(args)
    with Store.create(args.state, plan):
        pass
    _say_plan(args, plan)
    return 0


def _restart(args: argparse.Namespace) -> int:
    from companion.monitoring.store import Store

    check_target(args.json, args.reference, args.state)
    with Store(args.state) as store, store.alone():
        plan = _plan(args)
        number = store.restart(plan, args.reason)
    print(f"phase {number}: {args.reason}")
    _say_plan(args, plan)
    return 0


def _say_plan(args: argparse.Namespace, plan: Any) -> None:
    print(f"{args.state}: watches {plan.model}, version {plan.model_version or 'unknown'}")
    if plan.accuracy is not None:
        own = plan.accuracy
        print(
            f"reference: {plan.source}, {own.prompts:,} prompts, {100 * own.mean:.1f}% ordered "
            f"rightly (held against {100 * own.null:.1f}%)"
        )
    if plan.calibration is not None:
        best, low, high = (1 / one if one else float("inf") for one in plan.calibration.inverse)
        print(
            f"temperature: {plan.calibration.temperature:.2f} fitted, the reference asks for "
            f"{best:.2f} (held against {high:.2f} to {low:.2f})"
        )
    for name, own in plan.slices.items():
        print(f"slice {name}: {100 * own.mean:.1f}% (held against {100 * own.null:.1f}%)")
    print(f"chance of a false alarm, ever: {plan.alpha:g}")
    for one in plan.promise:
        what = (
            f"a fall of {100 * one['size']:g} points"
            if one["change"] == "accuracy"
            else f"overconfidence by a factor of {one['size']:g}"
        )
        if one["labels_a_week"] is None:
            print(
                f"{what}: cannot be promised within {one['within']} weeks with this reference "
                f"(caught in {100 * one['caught']:.0f}% of simulations with 20,000 labels a week); "
                "label a larger one"
            )
        else:
            print(
                f"{what}: about {one['labels_a_week']:,} labels a week, one a prompt, catch it "
                f"within {one['within']} weeks in {100 * one['power']:.0f}% of simulations (half "
                f"of them by week {one['median_weeks']})"
            )
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json is not None:
        write_text(args.json, json.dumps(plan.to_dict(), indent=1) + "\n")


def _run(args: argparse.Namespace) -> int:
    from companion.errors import DataError
    from companion.monitoring.monitor import look, write_json
    from companion.monitoring.store import Store

    for file in (args.json, args.prometheus):
        check_target(file, args.labels, args.traffic, args.state)
    for name in REMOTE:
        if name != "url" and getattr(args, name) is not None and not args.url:
            raise DataError(f"--{name} says something of a server", "give its --url too")
    with Store(args.state) as store, progress_bar("labels", "rows") as moved:
        model = args.model or store.plan().model
        args.model = model
        target: dict[str, Any] = {"model": model, **picked(args, "revision", "trust_remote_code")}
        if args.served_dtype is not None:
            target["dtype"] = args.served_dtype
        if args.url:
            target |= {"url": args.url[0], "protocol": args.protocol or "classify"}
            if args.api_key_env is not None:
                target["api_key"] = os.environ.get(args.api_key_env)
        verdict = look(
            store,
            labels=args.labels,
            traffic=args.traffic,
            open_scorer=lambda: open_scorer(args),
            sampling=args.sampling,
            golden=not args.no_golden,
            target=target,
            progress=moved["progress"],
        )
    if args.json is not None:
        write_json(args.json, verdict)
    if args.prometheus is not None:
        from companion.monitoring.prometheus import write_prometheus

        write_prometheus(verdict, args.prometheus)
    _say(verdict)
    return int(verdict["code"])


def _say(verdict: dict[str, Any]) -> None:
    labels, own = verdict["labels"], verdict["figures"]
    print(f"{verdict['verdict']} (look {verdict['look']})")
    for name in ("reasons", "warnings"):
        for line in verdict[name]:
            print(f"  {line}")
    for line in verdict["advice"]:
        print(f"  what to do: {line}")
    for test in verdict["tests"]:
        print(
            f"  {test['name']}: evidence {test['e_value_log']:.2f} of {test['threshold_log']:.2f} "
            f"nats{', alarm at look ' + str(test['alarm_look']) if test['alarm'] else ''}"
        )
    if "accuracy" in own:
        low, high = own["accuracy_interval"]
        print(
            f"  {labels['used']:,} labels used; accuracy {100 * own['accuracy']:.1f}% "
            f"[{100 * low:.1f}, {100 * high:.1f}]"
        )
    for reason, count in labels["refused"].items():
        print(f"  {count:,} rows skipped: {reason}", file=sys.stderr)
    for line in verdict["bad_rows"]:
        print(f"  {line}", file=sys.stderr)
    for note in verdict["notes"]:
        print(f"note: {note}", file=sys.stderr)


def _report(args: argparse.Namespace) -> int:
    from companion.monitoring.report import write_monitor_report
    from companion.monitoring.store import Store

    check_target(args.output, args.state)
    with Store(args.state) as store:
        print(f"report: {write_monitor_report(store, args.output)}")
    return 0
