"""An audit as an assertion, for a team's own tests. Chapter 9."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from companion.audit.auditing import audit
from companion.audit.report import AuditReport

if TYPE_CHECKING:
    import torch


def assert_sound(
    target: str | os.PathLike[str] | torch.nn.Module, tokenizer: Any = None, **settings: Any
) -> AuditReport:
    """Fail with the audit's table unless the model is sound.

    .. code-block:: python

        def test_the_reward_model_is_sound():
            assert_sound(model, tokenizer, waivers={"pad-is-eos": "trained so, see #12"})

    Parameters
    ----------
    target : str, path or PreTrainedModel
        A model in memory, a folder, a hub id, or the URL of an endpoint.
    tokenizer : PreTrainedTokenizerBase, optional
        Of a model in memory.
    **settings
        Those of :func:`companion.audit.audit`: ``level``, ``checks``, ``waivers``, limits of
        biases (``at_most``, ``at_least``), and how the target is opened.

    Returns
    -------
    AuditReport

    Raises
    ------
    AssertionError
        For a fault that is not waived, or a bias beyond its limit.
    """
    __tracebackhide__ = True  # pytest then shows the caller's line
    report = audit(target, tokenizer, **settings)
    if not report.sound:
        raise AssertionError(f"{report.headline()}\n{report.table()}")
    return report
