"""A verdict as a text file for Prometheus, by way of node_exporter's textfile collector. Chapter 7.

A monitor runs once a week and ends; nobody could scrape it. So it leaves a file, which
node_exporter hands out (``--collector.textfile.directory``), with the time of the run in it: that a
monitor has *not* run is an alarm too. Rules and a dashboard are in ``recipes/monitor/``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.errors import CompanionError, DataError

if TYPE_CHECKING:
    from prometheus_client import Metric


def write_prometheus(
    verdict: Mapping[str, Any], path: str | os.PathLike[str], *, monitor: str | None = None
) -> None:
    """Write a verdict in Prometheus' exposition format, whole or not at all.

    Each series has a label ``monitor``: node_exporter refuses all files of its folder if two of
    them hold the same series.

    Parameters
    ----------
    verdict : mapping
        ``code`` and ``time`` (ISO 8601), and what there is of ``model_version``, ``looks``,
        ``labels`` (counts by name), ``tests`` (``name``, ``e_value_log``, ``threshold_log``,
        ``alarm``), ``golden`` (with ``ok``), ``traffic`` (a list of warnings), ``figures``
        (``accuracy``, ``ece``). What is missing or no finite number has no series.
    path : path
        Must end in ``.prom``: node_exporter reads no other file.
    monitor : str, optional
        Its name; default: the file's, without the ending.

    Raises
    ------
    DataError
        For another ending, a folder that cannot be written, or a verdict without code and time.
    CompanionError
        Without the package prometheus_client.
    """
    try:
        from prometheus_client import CollectorRegistry, write_to_textfile
    except ImportError as error:
        raise CompanionError(
            "the file for Prometheus needs the package prometheus_client",
            "pip install 'reward-model-companion[serve]'",
        ) from error
    file = Path(path)
    if file.suffix != ".prom":
        raise DataError(f"{file}: node_exporter reads files that end in .prom", "name it so")
    found = list(_metrics(verdict, file.stem if monitor is None else monitor))
    registry = CollectorRegistry()
    registry.register(_Fixed(found))
    try:
        write_to_textfile(str(file), registry)  # beside it, and then renamed
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from error


class _Fixed:
    """Metrics that were made already, as a registry asks for them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> list[Metric]:
        """All of them."""
        return self._metrics


def _metrics(verdict: Mapping[str, Any], monitor: str) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    def gauge(
        name: str, text: str, values: Iterable[tuple[Any, Any]], label: str | None = None
    ) -> Iterator[Metric]:
        labels = ["monitor"] if label is None else ["monitor", label]
        kind: Any = GaugeMetricFamily
        if name.endswith("_total"):
            kind = CounterMetricFamily
        metric = kind(f"companion_monitor_{name}", text, labels=labels)
        for own, value in values:
            if _is_number(value):
                metric.add_metric([monitor] if label is None else [monitor, str(own)], float(value))
        if metric.samples:
            yield metric

    if not _is_number(verdict.get("code")):
        raise DataError(f"the verdict has no code: {verdict.get('code')!r}")
    yield from gauge("verdict", "0 fine, 10 warning, 20 retrain, 30 fault", [("", verdict["code"])])
    when = [("", _seconds(verdict.get("time")))]
    yield from gauge("last_run_timestamp_seconds", "When the monitor last ran", when)
    if verdict.get("model_version") is not None:
        version = [(verdict["model_version"], 1)]
        yield from gauge("model_info", "The model that is watched", version, "version")
    yield from gauge("looks_total", "Runs of the monitor", [("", verdict.get("looks"))])
    labels = (verdict.get("labels") or {}).items()
    yield from gauge("labels_total", "Labelled pairs, by what became of them", labels, "outcome")
    tests = verdict.get("tests") or []
    for key, name, text in (
        ("e_value_log", "log_e_value", "Evidence that a test has, the logarithm of its e-value"),
        ("threshold_log", "threshold", "The log_e_value from which the test alarms"),
        ("alarm", "alarm", "1 once the test has alarmed"),
    ):
        yield from gauge(name, text, [(one["name"], one.get(key)) for one in tests], "test")
    golden = verdict.get("golden")
    if golden is not None:
        ok = [("", bool(golden.get("ok")))]
        yield from gauge("golden_ok", "1 if the golden texts have their scores", ok)
    if verdict.get("traffic") is not None:
        count = [("", len(verdict["traffic"]))]
        yield from gauge("traffic_warnings", "Warnings about texts without labels", count)
    figures = verdict.get("figures") or {}
    for name, text in (
        ("accuracy", "Pairwise accuracy on fresh labels"),
        ("ece", "Debiased calibration error on fresh labels"),
    ):
        yield from gauge(name, text, [("", figures.get(name))])


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def _seconds(time: Any) -> float:
    """Unix seconds of a time in ISO 8601."""
    try:
        found = datetime.fromisoformat(str(time))
    except ValueError as error:
        raise DataError(f"the verdict's time is {time!r}", "give it in ISO 8601") from error
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
