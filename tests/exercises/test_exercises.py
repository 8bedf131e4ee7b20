"""Every stub is 'not attempted', every solution right, every mutant caught by its own name."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import build
import companion.course.exercises as package
from companion.course import CheckResult, check
from companion.course.catalogue import BY_ID, CATALOGUE, CHAPTERS, entries_of
from companion.course.checking import diagnose, load_exercise
from companion.course.exercise import THREADS, Exercise, Prediction
from companion.errors import DataError

sys.path.insert(0, str(Path(__file__).parent))
from notebooks import IDS, ROOT, answer, path_of, run_notebook

FUNCTIONS = [name for name in IDS if isinstance(load_exercise(name), Exercise)]
MUTANTS = [(name, number) for name in IDS for number in range(len(load_exercise(name).mutants))]


@pytest.mark.parametrize("name", IDS)
def test_stub_is_not_attempted(name, progress_file):
    result = check(name, answer("exercises", name))
    assert result.outcome == "not attempted", str(result)
    assert result.message
    assert not result
    assert not progress_file.exists()


@pytest.mark.parametrize("name", IDS)
def test_solution_is_right(name):
    result = check(name, answer("solutions", name))
    assert result.outcome == "right", str(result)
    assert result
    assert all(good for _, good in result.properties)
    assert result.message


@functools.cache
def results_of(name: str, number: int) -> list[CheckResult]:
    """What a check says to a mutant and to each of its variants."""
    mutant = load_exercise(name).mutants[number]
    return [check(name, wrong) for wrong in (mutant.answer, *mutant.also)]


@pytest.mark.parametrize(("name", "number"), MUTANTS)
def test_mutant_is_told_its_own_misconception(name, number):
    mutant = load_exercise(name).mutants[number]
    for wrong, result in zip((mutant.answer, *mutant.also), results_of(name, number), strict=True):
        assert result.outcome == "wrong", f"{wrong} passed"
        assert result.message == mutant.misconception
        if mutant.thread:
            assert result.thread == mutant.thread
        assert not all(good for _, good in result.properties)


def test_there_are_many_mutants():
    assert len(MUTANTS) > 150


@pytest.mark.parametrize("name", IDS)
def test_misconceptions_of_an_exercise_differ(name):
    exercise = load_exercise(name)
    texts = [mutant.misconception for mutant in exercise.mutants]
    assert len(texts) >= 5
    assert len(texts) == len(set(texts))
    threads = [mutant.thread for mutant in exercise.mutants]
    # what a mutant believes is said to nobody else
    assert not set(texts) & {rule.requirement for rule in getattr(exercise, "properties", ())}
    assert set(threads) - {None} <= set(THREADS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_right_answer_is_like_no_mutant(name):
    exercise = load_exercise(name)
    assert diagnose(exercise, answer("solutions", name)) is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_property_is_broken_by_something(name):
    """A property that no wrong answer breaks is not shown to test anything."""
    exercise = load_exercise(name)
    broken = {
        rule
        for number in range(len(exercise.mutants))
        for rule, good in results_of(name, number)[0].properties
        if good is False
    }
    assert broken == {rule.name for rule in exercise.properties}


@pytest.mark.parametrize("name", IDS)
def test_there_are_three_hints(name):
    hints = [check(name, hint=number) for number in (1, 2, 3)]
    texts = [result.hint for result in hints]
    assert len(set(texts)) == 3
    assert all(len(text) > 20 for text in texts)
    assert all(result.outcome == "hint" and text in re.sub(r"\s+", " ", str(result))
               for result, text in zip(hints, texts, strict=True))  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_of_stub_and_solution_are_equal(name):
    stub, solution = answer("exercises", name), answer("solutions", name)
    assert inspect.signature(stub) == inspect.signature(solution)
    assert tuple(inspect.signature(stub).parameters) == load_exercise(name).parameters
    assert stub.__doc__ == solution.__doc__
    annotations = inspect.signature(stub)
    assert annotations.return_annotation is not inspect.Signature.empty
    assert "Returns" in stub.__doc__
    if load_exercise(name).parameters:
        assert "Parameters" in stub.__doc__


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if load_exercise(n).broken])
def test_the_script_with_bugs_is_in_the_notebook_and_is_caught(name):
    exercise = load_exercise(name)
    text = path_of("exercises", BY_ID[name].chapter).read_text(encoding="utf-8")
    for line in build.stub_of(name).splitlines():
        assert line.strip() in text
    assert check(name, exercise.broken).outcome == "wrong"
    assert any(exercise.broken in (mutant.answer, *mutant.also) for mutant in exercise.mutants)


def test_exercises_are_up_to_date():
    for path, text in build.exercises().items():
        assert path.read_text(encoding="utf-8") == text, "run: python book/_tools/build.py"


def test_catalogue_and_modules_are_one_to_one():
    modules = {
        f"{chapter.name}.{module.name.removeprefix('_')}"
        for chapter in pkgutil.iter_modules(package.__path__)
        if chapter.ispkg
        for module in pkgutil.iter_modules([str(Path(package.__path__[0]) / chapter.name)])
    }
    helpers = {"ch02.toys", "ch03.toys", "ch05.toys", "ch05.wiring", "ch09.wards"}
    assert modules - helpers == set(IDS)
    assert all(load_exercise(name).id == name for name in IDS)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_its_mix(chapter):
    entries = entries_of(chapter)
    assert 4 <= len(entries) <= 6
    assert all(5 <= entry.minutes <= 30 and 1 <= entry.difficulty <= 3 for entry in entries)
    assert {"write it", "find the bug", "predict, then run"} <= {entry.kind for entry in entries}
    minutes = sum(entry.minutes for entry in entries)
    text = path_of("exercises", chapter).read_text(encoding="utf-8")
    assert f"about {minutes} minutes" in text
    assert f"about {minutes} minutes" in (ROOT / "exercises" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize("folder", ["exercises", "solutions"])
def test_notebook_has_each_exercise_in_order(folder, chapter):
    text = path_of(folder, chapter).read_text(encoding="utf-8")
    places = []
    for entry in entries_of(chapter):
        places.append(text.index(f"## {entry.title}\n\n*{entry.line}* · ["))
        name = entry.id.split(".")[1]
        places.append(text.index(f'check("{entry.id}", {name})'))
    assert places == sorted(places)
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == len(entries_of(chapter))
    assert set(run_notebook(folder, chapter).checked) == {e.id for e in entries_of(chapter)}


def test_nothing_of_a_solution_is_left_in_the_exercises():
    for chapter in CHAPTERS:
        text = path_of("exercises", chapter).read_text(encoding="utf-8")
        assert not re.search(r"</?solution>|</?only>|<!--|-->|COMPANION_PROGRESS_FILE", text)
        solved = path_of("solutions", chapter).read_text(encoding="utf-8")
        for block in re.findall(r"# <solution>\n(.*?)# </solution>", solved, re.DOTALL):
            assert block.strip() not in text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_links_lead_to_sections_that_exist(chapter):
    text = path_of("solutions", chapter).read_text(encoding="utf-8")
    links = re.findall(r"\[Chapter \d, '(.+?)'\]\(\.\./(book/\w+\.md)#([\w-]+)\)", text)
    assert len(links) == len(entries_of(chapter))
    for title, page, anchor in links:
        assert re.search(
            rf"^##+ {re.escape(title)}$", (ROOT / page).read_text("utf-8"), re.MULTILINE
        ), f"{page} has no section {title!r}"
        assert anchor == re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_generator_makes_stubs():
    cell = (
        "```{code-cell} ipython3\nimport x\n\n# <only>\nsecret = 1\n# </only>\n"
        "def choice_gradient(a):\n    # <solution>\n    return 1\n    # </solution>\n```\n"
    )
    made = build.to_exercise("<!-- solution -->\nshown only solved\n<!-- /solution -->\n" + cell, 1)
    assert made == (
        "```{code-cell} ipython3\nimport x\n"
        "def choice_gradient(a):\n    raise NotImplementedError  # your code here\n```\n"
    )
    with pytest.raises(DataError):
        build.to_exercise("```{code-cell} ipython3\n# <solution>\n1\n# </solution>\n```\n", 1)


def test_generator_leaves_the_lines_around_alone():
    cell = (
        "```{code-cell} ipython3\n# <only>\na\n# </only>\n\n\nb\n# <only>\nc\n# </only>\nd\n```\n"
    )
    assert build.to_exercise(cell, 1) == "```{code-cell} ipython3\nb\nd\n```\n"
    assert (
        build.to_exercise("<!-- exercise\n# Title\n/exercise -->\ntext\n", 1) == "# Title\ntext\n"
    )


def test_predictions_have_a_word_for_every_wrong_option():
    for entry in CATALOGUE:
        exercise = load_exercise(entry.id)
        if isinstance(exercise, Prediction):
            truth = exercise.run()
            assert set(truth) == {question.key for question in exercise.questions}
            for question in exercise.questions:
                assert truth[question.key] in question.options
                assert set(question.misconceptions) == set(question.options) - {truth[question.key]}


def test_settings_are_fields_of_trl():
    from dataclasses import fields

    trl = pytest.importorskip("trl")
    settings = load_exercise("ch04.training_settings").broken()
    settings.pop("lora")
    assert set(settings) <= {field.name for field in fields(trl.RewardConfig)}
