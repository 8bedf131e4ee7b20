"""``check``: is this answer right, and if it is not, what does its author believe?

The attempt is held against properties on several shapes, dtypes and seeds. If one fails, the
attempt is compared with the exercise's known wrong answers. One that gives the same results on all
inputs that the check has tried names the misconception; if there is none, the check says what does
not hold, and guesses nothing. A check never raises on what an attempt does.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import importlib
import inspect
import io
import linecache
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from companion.course import progress
from companion.course.catalogue import BY_ID
from companion.course.exercise import (
    Exercise,
    Mutant,
    NotReached,
    Prediction,
    Unmet,
    Unusable,
    WrongShape,
)
from companion.course.result import CheckResult
from companion.errors import DataError
from companion.formatting.time_limit import TimeLimit, TooLong

_MISSING: Any = object()
_HERE = str(Path(__file__).resolve().parents[1])  # the package: frames in it are not the learner's
IN_PLACE = (
    "The function changes its argument in place (`+=`, `x[...] = ...`, `.sort()`, `.pop()`). Its "
    "caller still needs the old values: work on a new tensor, or a new list."
)
#: All calls of an attempt together may take that long; a right answer takes milliseconds.
SECONDS = 20.0
TOO_LONG = (
    "The function did not come to its end within {seconds:g} seconds, so it was stopped. Look for "
    "a loop whose condition never becomes false, and for work that grows with all subsets or "
    "orders of the input."
)
NOT_YOURS = (
    "This is `{name}` of the companion, not yours: the name was imported, or the cell with your "
    "function has not been run. "
)


class _Crash(Exception):
    """The attempt raised; `error` is what it raised."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Changed(Exception):
    """The attempt changed an argument in place."""


class _NoAnswer(Exception):
    """The attempt returned None or `...`."""

    def __init__(self, value: Any) -> None:
        super().__init__(repr(value))
        self.value = value


def load_exercise(exercise_id: str) -> Exercise | Prediction:
    """Import one exercise.

    Raises
    ------
    DataError
        If there is none of that name; the message says the nearest.
    """
    if exercise_id not in BY_ID:
        near = difflib.get_close_matches(str(exercise_id), BY_ID, n=3, cutoff=0.4)
        raise DataError(
            f"there is no exercise {exercise_id!r}",
            f"did you mean {' or '.join(map(repr, near))}?" if near else "see `companion progress`",
        )
    chapter, name = exercise_id.split(".")
    module = importlib.import_module(f"companion.course.exercises.{chapter}._{name}")
    exercise: Exercise | Prediction = module.EXERCISE
    return exercise


def check(exercise_id: str, attempt: Any = _MISSING, *, hint: int | None = None) -> CheckResult:
    """Check an answer, or ask for a hint.

    Parameters
    ----------
    exercise_id : str
        Such as ``"ch01.pair_loss"``.
    attempt : callable or dict, optional
        Your function itself (not its result), or the dict of your predictions.
    hint : {1, 2, 3}, optional
        Also show this hint, from a nudge to nearly the answer.

    Returns
    -------
    CheckResult
        Shows itself in a notebook; ``print`` it elsewhere. True if the answer is right.

    Raises
    ------
    DataError
        If there is no such exercise or hint. Never for anything that the attempt does.
    """
    exercise = load_exercise(exercise_id)
    if hint is not None and hint not in (1, 2, 3):
        raise DataError(f"there is no hint {hint!r}", "ask for hint=1, 2 or 3")
    if attempt is _MISSING and hint is not None:
        result = CheckResult(exercise_id, "hint", "")
    else:
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")  # an overflow is reported in our words
            judge = _judge_prediction if isinstance(exercise, Prediction) else _judge_function
            result = judge(exercise, attempt)  # type: ignore[arg-type]
        if printed.getvalue():
            result.notes.append("What it printed is left out: call it yourself to see that.")
    if hint is not None:
        result.hint = exercise.hints[hint - 1]
    elif result.outcome == "wrong":
        result.notes.append(f'Stuck? `check("{exercise_id}", hint=1)`')
    result.notes += progress.record(
        exercise_id,
        attempted=result.outcome in ("wrong", "right"),
        solved=result.outcome == "right",
        hint=hint or 0,
    )
    return result


def _judge_prediction(exercise: Prediction, attempt: Any) -> CheckResult:
    result = functools.partial(CheckResult, exercise.id)
    if _is_nothing(attempt):
        return result("not attempted", "Nothing is predicted yet.")
    keys = [question.key for question in exercise.questions]
    if not isinstance(attempt, Mapping):
        listing = ", ".join(f"`{key}`" for key in keys)
        what = f"A prediction is a dict with the keys {listing}."
        return result("wrong", what, f"a {type(attempt).__name__}")
    still_open = [key for key in keys if _is_nothing(attempt.get(key))]
    if still_open:
        listing = ", ".join(f"`{key}`" for key in still_open)
        return result("not attempted", f"Still without an answer: {listing}.")
    chosen = {}  # of each question, the option that is the answer
    for question in exercise.questions:
        answer = attempt[question.key]
        found = [option for option in question.options if _is(answer, option)]
        if not found:
            options = ", ".join(map(repr, question.options))
            what = f"`{question.key}` is answered by one of {options}."
            return result("wrong", what, repr(answer)[:200])
        chosen[question.key] = found[0]
    truth = exercise.run()
    marks: list[tuple[str, bool | None]] = [(key, _is(attempt[key], truth[key])) for key in keys]
    for question, (key, good) in zip(exercise.questions, marks, strict=True):
        if not good:
            what = question.misconceptions[chosen[key]]
            seen = f"you predicted {attempt[key]!r} for `{key}`; run the experiment and see"
            return result("wrong", what, seen, question.thread, marks)
    return result("right", exercise.right, properties=marks)


def _is_nothing(attempt: Any) -> bool:
    return attempt is _MISSING or attempt is None or attempt is Ellipsis


def _is(answer: Any, option: Any) -> bool:
    try:
        return type(answer) is type(option) and bool(answer == option)
    except Exception:
        return False


def _judge_function(exercise: Exercise, attempt: Any) -> CheckResult:
    result = functools.partial(CheckResult, exercise.id)
    todo = "Write the function, run its cell, then run this one again."
    if exercise.broken is not None:
        todo = "Find the bugs, mend them, and delete the line that raises NotImplementedError."
    if _is_nothing(attempt):
        return result("not attempted", todo)
    if not callable(attempt):
        name = exercise.id.split(".")[1]
        what = f"Pass the function itself, not what it returns: `check(…, {name})`."
        return result("wrong", what, f"a {type(attempt).__name__}")
    if _is_stub(attempt):
        return result("not attempted", todo)
    if owner := _of_the_companion(attempt):
        return result("not attempted", NOT_YOURS.format(name=owner) + todo)
    wrong_call = _signature_problem(exercise, attempt)
    if wrong_call:
        return result("wrong", wrong_call)

    limit = TimeLimit(SECONDS)
    seen: list[tuple[Any, ...]] = []  # arguments of all calls
    failures: dict[str, BaseException] = {}
    reached = []
    for rule in exercise.properties:
        reached.append(rule.name)
        try:
            rule.test(_guarded(attempt, limit, seen))
        except NotReached:
            reached.pop()
        except Exception as caught:
            failures[rule.name] = caught
        except TooLong as caught:
            failures[rule.name] = caught
            break
    for error in failures.values():
        raised_todo = isinstance(error, _Crash) and isinstance(error.error, NotImplementedError)
        if raised_todo or (
            isinstance(error, _NoAnswer) and (error.value is Ellipsis or not _source(attempt))
        ):
            return result("not attempted", todo)
    marks = _marks(exercise, reached, failures)
    if not failures:
        return result("right", exercise.right, properties=marks)

    rule, error = next((r, failures[r.name]) for r in exercise.properties if r.name in failures)
    timed_out = next((e for e in failures.values() if isinstance(e, TooLong)), None)
    if timed_out is not None:
        message = TOO_LONG.format(seconds=limit.seconds)
        return result("wrong", message, _place(timed_out, attempt), properties=marks)
    if isinstance(error, _NoAnswer):
        what = "The function returns None. Is a `return` missing?"
        return result("wrong", what, properties=marks)
    found = result("wrong", rule.requirement, str(error), properties=marks)
    if isinstance(error, _Crash):
        found.message = "The function raises an exception."
        found.evidence = _told(error.error, attempt)
    elif isinstance(error, Unusable) and not isinstance(error, WrongShape):
        found.message = "The result is not of the kind that was asked for."
    elif isinstance(error, _Changed):
        found.message, found.evidence = IN_PLACE, ""
    elif not isinstance(error, Unmet):
        found.message = "The result cannot be used."
        found.evidence = f"{type(error).__name__}: {error}"
    try:
        known = diagnose(exercise, attempt, seen, limit)
    except TooLong:
        known = None
    if known is not None:
        found.message, found.thread = known.misconception, known.thread
    return found


def _marks(
    exercise: Exercise, reached: list[str], failures: Mapping[str, BaseException]
) -> list[tuple[str, bool | None]]:
    """Of each property whether it holds; None where nothing was tested.

    A result that cannot be used (of another type or shape, an exception on every input) fails in
    one place, and leaves the other properties untested.
    """
    any_good = any(name not in failures for name in reached)
    first = next(iter(failures.values()), None)

    def held(name: str) -> bool | None:
        if name not in reached:
            return None
        if name not in failures:
            return True
        error = failures[name]
        if isinstance(error, (_Crash, _NoAnswer, TooLong)) and not any_good:
            return None
        again = error is not first and type(error) is type(first)
        return None if again and isinstance(error, (Unusable, _Changed)) else False

    return [(rule.name, held(rule.name)) for rule in exercise.properties]


def _of_the_companion(attempt: Any) -> str:
    """Name of the companion's function that the attempt is, or wraps; empty if it is another's."""
    while True:
        if isinstance(attempt, functools.partial):
            attempt = attempt.func
        elif hasattr(attempt, "__wrapped__"):
            attempt = attempt.__wrapped__
        else:
            break
    kind = attempt if hasattr(attempt, "__qualname__") else type(attempt)
    module = getattr(kind, "__module__", None) or ""
    # the exercises' own wrong answers are attempts in the tests
    if module.partition(".")[0] != "companion" or module.startswith("companion.course.exercises."):
        return ""
    return f"{module}.{kind.__qualname__}"


def diagnose(
    exercise: Exercise,
    attempt: Callable[..., Any],
    seen: list[tuple[Any, ...]] | None = None,
    limit: TimeLimit | None = None,
) -> Mutant | None:
    """The mutant that behaves like the attempt on all probes and on all that was `seen`."""
    inputs = [*exercise.probes(), *(seen if seen and exercise.replay else [])]
    looks = [_observe(exercise, attempt, arguments, limit) for arguments in inputs]
    if all(isinstance(one, _Raised) for one in looks):
        return None  # an exception says nothing about what its author believes
    for mutant in exercise.mutants:
        for answer in (mutant.answer, *mutant.also):
            if all(
                alike(one, _observe(exercise, answer, arguments))
                for one, arguments in zip(looks, inputs, strict=True)
            ):
                return mutant
    return None


class _Raised:
    """What an attempt raised, for comparison with what a mutant raises."""

    def __init__(self, error: BaseException) -> None:
        self.kind = type(error.error) if isinstance(error, _Crash) else type(error)


def _observe(
    exercise: Exercise,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    limit: TimeLimit | None = None,
) -> Any:
    try:
        return exercise.look(_guarded(function, limit), _copy(arguments))
    except Exception as error:
        return _Raised(error)


def alike(a: Any, b: Any) -> bool:
    """Whether two results are the same: kind, shape, dtype, and numbers up to rounding."""
    if isinstance(a, _Raised) or isinstance(b, _Raised):
        return isinstance(a, _Raised) and isinstance(b, _Raised) and a.kind is b.kind
    if isinstance(a, (str, bool, type(None))) or isinstance(b, (str, bool, type(None))):
        return type(a) is type(b) and bool(a == b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    try:
        import numpy as np

        if getattr(a, "dtype", None) != getattr(b, "dtype", None):
            return False
        x, y = (_array(value) for value in (a, b))
        return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True))
    except Exception:
        return False


def _array(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _guarded(
    function: Callable[..., Any],
    limit: TimeLimit | None = None,
    seen: list[tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """The attempt, with its exceptions marked as its own, and its arguments watched and kept."""

    def call(*arguments: Any, **named: Any) -> Any:
        before = _copy(arguments)
        if seen is not None and not named:
            seen.append(before)
        try:
            with limit.running() if limit else contextlib.nullcontext():
                result = function(*arguments, **named)
        except (Exception, SystemExit) as error:
            raise _Crash(error) from error
        if not _unchanged(before, arguments):
            raise _Changed(IN_PLACE)
        if result is None or result is Ellipsis:
            raise _NoAnswer(result)
        return result

    call.attempt = function  # type: ignore[attr-defined]  # for what runs it in another process
    return call


def raised(function: Callable[..., Any], *arguments: Any) -> BaseException | None:
    """What the attempt raises on these arguments; None if it returns. For properties."""
    try:
        function(*arguments)
    except _Crash as crash:
        if isinstance(crash.error, NotImplementedError):
            raise
        return crash.error
    return None


def _copy(value: Any) -> Any:
    """A copy of tensors and arrays, also within lists and dicts; any other object itself."""
    if isinstance(value, dict):
        return {key: _copy(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(one) for one in value)
    if hasattr(value, "detach") and hasattr(value, "requires_grad_") and hasattr(value, "clone"):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value.copy() if type(value).__module__ == "numpy" else value


def _unchanged(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(_unchanged(old[key], new[key]) for key in old)
    if isinstance(old, (list, tuple)):
        return len(old) == len(new) and all(map(_unchanged, old, new))
    if not hasattr(old, "shape"):
        return bool(old == new)
    if tuple(old.shape) != tuple(new.shape):
        return False
    old, new = (one.detach() if hasattr(one, "detach") else one for one in (old, new))
    return bool(((old == new) | ((old != old) & (new != new))).all())


def _source(function: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""


def _is_stub(function: Any) -> bool:
    """Whether the body holds nothing but a docstring, `...`, pass, or NotImplementedError."""
    try:
        tree = ast.parse(_source(function))
    except SyntaxError:
        return False
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if not definitions:
        return False

    def empty(node: ast.stmt) -> bool:
        if isinstance(node, ast.Pass):
            return True
        if isinstance(node, ast.Raise):
            return "NotImplemented" in ast.unparse(node)
        value = node.value if isinstance(node, (ast.Expr, ast.Return)) else node
        return value is None or (
            isinstance(value, ast.Constant)
            and (isinstance(node, ast.Expr) or value.value in (None, Ellipsis))
        )

    return all(empty(node) for node in definitions[0].body)


def _signature_problem(exercise: Exercise, attempt: Callable[..., Any]) -> str:
    try:
        inspect.signature(attempt).bind(*exercise.parameters)
    except ValueError:  # some built-ins have no signature
        return ""
    except TypeError as error:
        wanted = f"`{exercise.id.split('.')[1]}({', '.join(exercise.parameters)})`"
        return f"The function is to be called as {wanted}, which yours does not allow: {error}."
    return ""


def _told(error: BaseException, attempt: Any) -> str:
    """The exception, and the line of the learner's code that it came from."""
    text = f"{type(error).__name__}: {str(error).strip()[:300]}"
    where = "" if isinstance(error, SyntaxError) else _place(error, attempt)
    return f"{text}\n{where}" if where else text


def _place(error: BaseException, attempt: Any) -> str:
    """The learner's function and line that an exception went through; empty if there is none."""
    code = getattr(inspect.unwrap(attempt), "__code__", None)
    own = getattr(code, "co_filename", None)
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == own]
    if not mine:  # a callable object, or a helper that raised
        mine = [
            frame
            for frame in frames
            if not frame.filename.startswith(_HERE) and "site-packages" not in frame.filename
        ]
    if not mine:
        return ""
    line = (mine[-1].line or linecache.getline(mine[-1].filename, mine[-1].lineno or 0)).strip()
    where = f"line {mine[-1].lineno}" + (f": `{line}`" if line else "")
    return f"in {mine[-1].name}, {where}"
