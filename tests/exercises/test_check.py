"""What a check says to crashes, odd answers and wrong use; it never raises on an attempt."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from companion.course import CheckResult, check
from companion.course.checking import IN_PLACE, alike
from companion.errors import DataError

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import IDS

LOSS = "ch01.pair_loss"


def right(chosen, rejected):
    return -F.logsigmoid(chosen - rejected)


def test_any_callable_that_is_right_passes():
    class Callable_:
        def __call__(self, a, b):
            return F.softplus(b.double() - a.double(), threshold=500).to(a.dtype)

    assert check(LOSS, lambda c, r: F.logsigmoid(c - r).neg())
    assert check(LOSS, Callable_())


def test_a_crash_is_told_with_its_line():
    def crashes(chosen, rejected):
        shifted = chosen - rejected
        return shifted / undefined_name  # noqa: F821

    result = check(LOSS, crashes)
    assert result.outcome == "wrong"
    assert "NameError: name 'undefined_name' is not defined" in result.evidence
    assert "`return shifted / undefined_name" in result.evidence
    assert re.search(rf"in crashes, line {crashes.__code__.co_firstlineno + 2}\b", result.evidence)
    assert result.thread is None


def test_a_crash_inside_of_a_library_is_told_with_the_learners_line():
    def crashes(chosen, rejected):
        return torch.cat([chosen, torch.zeros(3, 3, 3)])

    result = check(LOSS, crashes)
    assert "`return torch.cat([chosen, torch.zeros(3, 3, 3)])`" in result.evidence


@pytest.mark.parametrize("error", [SystemExit(3), RecursionError("deep"), MemoryError()])
def test_even_exits_are_caught(error):
    def leaves(chosen, rejected):
        raise error

    result = check(LOSS, leaves)
    assert result.outcome == "wrong"
    assert type(error).__name__ in result.evidence


def test_an_interrupt_is_not_swallowed():
    def stop(chosen, rejected):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(LOSS, stop)


def test_a_forgotten_return_is_named():
    def forgets(chosen, rejected):
        value = -F.logsigmoid(chosen - rejected)  # noqa: F841

    result = check(LOSS, forgets)
    assert result.outcome == "wrong"
    assert "`return`" in result.message


def _dots(chosen, rejected):
    """Only a docstring."""
    ...


def _pass(chosen, rejected):
    pass


def _none(chosen, rejected):
    return None


def _raises(chosen, rejected):
    raise NotImplementedError("later")


def _half_done(chosen, rejected):
    gap = chosen - rejected
    raise NotImplementedError(gap)


def _ellipsis(chosen, rejected):
    gap = ...
    return gap


@pytest.mark.parametrize(
    "attempt",
    [_dots, _pass, _none, _raises, _half_done, _ellipsis, None, ...],
    ids=lambda attempt: getattr(attempt, "__name__", str(attempt)),  # the same in every process
)
def test_all_ways_not_to_attempt(attempt, progress_file):
    assert check(LOSS, attempt).outcome == "not attempted"
    assert check(LOSS).outcome == "not attempted"
    assert not progress_file.exists()


def test_a_function_without_source_that_returns_none_is_not_attempted():
    namespace: dict = {}
    exec("def later(a, b):\n    return None", namespace)
    assert check(LOSS, namespace["later"]).outcome == "not attempted"


def test_a_changed_argument_is_named():
    def in_place(chosen, rejected):
        chosen -= rejected
        return -F.logsigmoid(chosen)

    assert check(LOSS, in_place).message == IN_PLACE


def test_the_result_in_place_of_the_function():
    result = check(LOSS, right(torch.zeros(2), torch.zeros(2)))
    assert result.outcome == "wrong"
    assert "function itself" in result.message


def test_another_signature_is_named():
    result = check(LOSS, lambda chosen: chosen)
    assert result.outcome == "wrong"
    assert "pair_loss(chosen, rejected)" in result.message


def test_an_unknown_mistake_gets_the_propertys_words():
    result = check(LOSS, lambda c, r: right(c, r) * 3)
    assert result.outcome == "wrong"
    assert result.message == "The values are not those of −log σ(chosen − rejected)."
    assert "it should be" in result.evidence
    assert ("it is −log σ(chosen − rejected), and ln 2 at a tie", False) in result.properties


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(
    "value",
    ["text", 3, 2.5, True, [], {}, (1, 2), object(), torch.zeros(0), torch.ones(2, 3, 4), [None]],
    ids=lambda value: repr(value)[:12],
)
def test_no_answer_is_too_odd(name, value):
    assert check(name, lambda *_: value).outcome == "wrong"
    assert check(name, value).outcome in ("wrong", "not attempted")


@pytest.mark.parametrize("name", IDS)
def test_odd_callables(name):
    def raises(*_):
        raise ValueError("<b>no</b>")

    result = check(name, raises)
    assert result.outcome == "wrong"
    assert "<b>" not in result._repr_html_()
    assert check(name, torch.nn.Linear(2, 2)).outcome == "wrong"
    assert check(name, print).outcome in ("wrong", "not attempted")
    assert check(name, int).outcome == "wrong"


def test_wrong_use_is_an_error_with_a_cure():
    with pytest.raises(DataError, match="pair_loss"):
        check("ch01.pair_los", right)
    with pytest.raises(DataError, match="no hint 4"):
        check(LOSS, hint=4)


def test_predictions():
    name = "ch01.predict_shift"
    assert check(name, {}).outcome == "not attempted"
    assert check(name, {"add 7.3 to all scores": "same"}).outcome == "not attempted"
    truth = {
        "add 7.3 to all scores": "same",
        "add another number for each prompt": "same",
        "double the scores of a pair that is wrong": "higher",
        "accuracy when all scores double": "same",
        "add 1 to the chosen scores alone": "lower",
    }
    assert check(name, truth)
    odd = check(name, {**truth, "add 7.3 to all scores": "sideways"})
    assert odd.outcome == "wrong"
    assert "'lower', 'same', 'higher'" in odd.message
    wrong = check(name, {**truth, "add 7.3 to all scores": "lower"})
    assert ("add 7.3 to all scores", False) in wrong.properties
    assert [good for _, good in wrong.properties].count(False) == 1
    # 1 and True are equal in Python, and not the same answer
    reads = {"finished, pad = EOS, stock": 2.0}
    assert check("ch02.pad_is_eos", reads).outcome == "not attempted"


def test_a_hint_comes_with_a_check():
    result = check(LOSS, lambda c, r: c, hint=2)
    assert result.outcome == "wrong"
    assert result.hint
    assert "Hint:" in str(result)


class _Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_shows_itself_in_notebook_and_terminal():
    result = check(LOSS, lambda c, r: -torch.log(torch.sigmoid(c - r)), hint=1)
    parser = _Balanced()
    page = result._repr_html_()
    parser.feed(page)
    assert parser.open == []
    assert {"div", "strong", "code", "a", "ul", "li"} <= set(parser.seen)
    assert "DeepSpeedExamples/issues/423" in page
    text = str(result)
    assert repr(result) == text
    assert "DeepSpeedExamples #423" in text
    assert "✗ finite at margins of ±1000" in text
    assert "(a reward model's training loss of inf)" in re.sub(r"\s+", " ", text)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert not re.search(r"<\w+>|\x1b", text)


def test_what_an_attempt_says_is_escaped():
    result = CheckResult(LOSS, "wrong", "`<script>`", "<img src=x onerror=alert(1)>")
    page = result._repr_html_()
    assert "<script>" not in page
    assert "<img" not in page
    assert "<code>&lt;script&gt;</code>" in page
    marked = CheckResult(LOSS, "wrong", "the *mean* of `a * b * c`, 2 * 3 * 4 and a ` left")
    assert "the <em>mean</em> of <code>a * b * c</code>, 2 * 3 * 4 and a  left" in (
        marked._repr_html_()
    )


def test_warnings_of_an_attempt_are_not_shown(recwarn):
    import numpy as np

    def warns(chosen, rejected):
        np.log(np.zeros(1))
        return right(chosen, rejected)

    assert check(LOSS, warns)
    assert len(recwarn) == 0


def test_what_an_attempt_prints_is_left_out(capsys):
    def prints(chosen, rejected):
        print("shape", chosen.shape)
        return right(chosen, rejected)

    result = check(LOSS, prints)
    assert result
    assert "left out" in result.notes[0]
    assert capsys.readouterr().out == ""


def test_results_are_compared_by_kind_shape_and_number():
    assert alike(torch.ones(2), torch.ones(2) + 1e-7)
    assert not alike(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not alike(torch.ones(2), torch.ones(2, 1))
    assert alike(float("nan"), float("nan"))
    assert alike({"a": [1.0, "x"]}, {"a": (1.0, "x")})
    assert not alike({"a": 1.0}, {"b": 1.0})
    assert not alike(True, 1.0)
    assert not alike("a", torch.ones(1))


def test_the_import_is_cheap():
    code = (
        "import sys, companion.course, companion.cli.progress; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
