"""Ask a language model which completion is better. Chapter 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from companion._exports import exports

if TYPE_CHECKING:
    from companion.judge.backend import Answer as Answer, Backend as Backend, Question as Question
    from companion.judge.cache import AnswerCache as AnswerCache
    from companion.judge.files import JudgeFileReport as JudgeFileReport, judge_file as judge_file
    from companion.judge.items import Item as Item, read_item as read_item
    from companion.judge.judge import (
        Grading as Grading,
        Judge as Judge,
        PairVerdict as PairVerdict,
        combine_orders as combine_orders,
    )
    from companion.judge.local import LocalBackend as LocalBackend
    from companion.judge.report import (
        JudgeReport as JudgeReport,
        annotator_report as annotator_report,
        cohen_kappa as cohen_kappa,
        judge_report as judge_report,
        load_annotations as load_annotations,
    )
    from companion.judge.server import ServerBackend as ServerBackend
    from companion.judge.templates import (
        JudgeTemplate as JudgeTemplate,
        load_template as load_template,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__, __file__)
