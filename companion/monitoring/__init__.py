"""Watch a reward model age, with alarms that do not cry wolf. Chapter 7.

Nothing here imports torch when it is imported: a look at labels costs a second, not ten. Only what
scores texts loads it, inside its functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.monitoring.label_page import LabelServer as LabelServer
    from companion.monitoring.labelling import (
        Labelling as Labelling,
        LabelPair as LabelPair,
        label_figures as label_figures,
        read_pairs as read_pairs,
        shown_first as shown_first,
    )
    from companion.monitoring.sampling import (
        PromptCompletions as PromptCompletions,
        Sample as Sample,
        read_completions as read_completions,
        sample_pairs as sample_pairs,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
