"""Watch a reward model age, with alarms that do not cry wolf. Chapter 7.

Nothing here imports torch when it is imported: a look at labels costs a second, not ten. Only what
scores texts loads it, inside its functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.monitoring.evidence import (
        Evidence as Evidence,
        Labels as Labels,
        Test as Test,
        measure as measure,
    )
    from companion.monitoring.golden import (
        GoldenCheck as GoldenCheck,
        check_target as check_target,
        read_golden as read_golden,
    )
    from companion.monitoring.label_page import LabelServer as LabelServer
    from companion.monitoring.labelling import (
        Labelling as Labelling,
        LabelPair as LabelPair,
        label_figures as label_figures,
        read_pairs as read_pairs,
        shown_first as shown_first,
    )
    from companion.monitoring.monitor import look as look, plan_of as plan_of
    from companion.monitoring.plan import (
        Calibration as Calibration,
        Level as Level,
        Plan as Plan,
        make_plan as make_plan,
        rightness as rightness,
    )
    from companion.monitoring.planner import (
        Change as Change,
        Population as Population,
        draw_plan as draw_plan,
        promise as promise,
        simulate as simulate,
    )
    from companion.monitoring.prometheus import write_prometheus as write_prometheus
    from companion.monitoring.report import write_monitor_report as write_monitor_report
    from companion.monitoring.retraining import (
        Retraining as Retraining,
        is_better as is_better,
        retrain as retrain,
    )
    from companion.monitoring.rows import LabelRow as LabelRow, read_labels as read_labels
    from companion.monitoring.sampling import (
        PromptCompletions as PromptCompletions,
        Sample as Sample,
        read_completions as read_completions,
        sample_pairs as sample_pairs,
    )
    from companion.monitoring.store import Look as Look, Store as Store
    from companion.monitoring.traffic import (
        TrafficSummary as TrafficSummary,
        TrafficWarning as TrafficWarning,
        compare_traffic as compare_traffic,
        merge_summaries as merge_summaries,
        population_stability as population_stability,
        read_traffic as read_traffic,
        summarise_traffic as summarise_traffic,
    )
    from companion.monitoring.verdict import judge as judge
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
