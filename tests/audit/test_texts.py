"""The audit's checks of texts: each sick text is caught by its name, and a sound one by none."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.utils.chat_template_utils as chat_utils

from companion.audit import LocalSubject, Outcome, Subject, run_checks
from companion.audit.checks.text import CHECKS
from companion.audit.museum import texts
from companion.audit.museum.healthy import save_stock, save_with_manifest, tutor_reward
from companion.errors import DataError
from companion.formatting import Row

#: beside those that all stock models have
ALWAYS = {"special-tokens-in-text", "empty-input", "very-long-input", "template-drops-fields"}


def seen(subject: Subject, *left_out: str) -> dict[str, Outcome]:
    checks = [check for check in CHECKS if check.name not in left_out]
    return {check.name: outcome for check, outcome in run_checks(subject, checks)}


def faults(outcomes: dict[str, Outcome]) -> set[str]:
    kinds = {check.name: check.kind for check in CHECKS}
    return {n for n, o in outcomes.items() if o.status == "found" and kinds[n] == "fault"}


def code_of(script: str) -> int:
    """Exit code of a script that is run here."""
    for module in re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE):
        assert module in {"sys", "torch", "transformers", "datetime", "json", "urllib"}
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    assert said.getvalue().strip()
    return int(ended.value.code or 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_manifest(tutor_reward(), tmp_path_factory.mktemp("sound"))


def test_a_sound_model_has_no_fault(sound: Path, tmp_path: Path) -> None:
    with_manifest = seen(LocalSubject(sound, max_tokens=30_000))
    assert not faults(with_manifest)
    assert with_manifest["empty-input"].status == "sound"
    subject = LocalSubject(save_stock(tutor_reward(), tmp_path), max_tokens=30_000)
    stock = seen(subject)
    assert not faults(stock)
    found = {name for name, outcome in stock.items() if outcome.status == "found"}
    assert found == ALWAYS | {"bos-doubled-in-text"}
    assert subject.tokens <= 5_000


@pytest.mark.parametrize("specimen", texts.SPECIMENS, ids=lambda specimen: specimen.name)
def test_each_sick_text_is_caught_by_its_name(
    specimen: Any, tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_utils, "datetime", chat_utils.datetime)  # a script sets another one
    with specimen.plant(tmp_path) as planted:
        others = [check.name for check in CHECKS if check.kind == "hazard"]
        outcomes = seen(
            LocalSubject(planted.target, max_tokens=30_000),
            *(name for name in others if name != specimen.caught_by),
        )
        outcome = outcomes[specimen.caught_by]
        assert outcome.status == "found", outcome.seen
        assert faults(outcomes) <= {specimen.caught_by, *specimen.also}
        if specimen.caught_by not in faults(outcomes):
            return
        assert outcome.script is not None
        assert code_of(outcome.script) == 1
        if specimen.name != "two-templates":  # (there the other template is what it compares with)
            assert code_of(outcome.script.replace(planted.target, str(sound))) == 0


class Formats(Subject):
    """A target that formats rows itself; a text's score is a hash of what it makes of them."""

    name, what, abilities = "http://here", "endpoint", frozenset({"rows"})

    def __init__(self, form: Any) -> None:
        self.form = form

    def call(self, batch: Any) -> np.ndarray:
        raise NotImplementedError

    def alone(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        raise NotImplementedError

    def call_rows(self, rows: Sequence[Row]) -> np.ndarray:
        made = [str(self.form(row)).encode() for row in rows]
        return np.array([int.from_bytes(text[::-1], "big") % 999_983 for text in made]) / 1e3

    def tolerance(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        return np.full(len(ids), 1e-6)


def whole(row: Any) -> str:
    return f"{row['prompt']}|{row['completion']}" + ("$" if row.get("terminated", True) else "")


def test_a_target_that_formats_rows_is_asked_by_rows() -> None:
    outcomes = seen(Formats(whole))
    asked = {name for name, outcome in outcomes.items() if outcome.status != "not asked"}
    assert asked == {
        "eos-ignored",
        "template-drops-content",
        "unicode-and-control-characters",
    }
    assert {outcomes[name].status for name in asked} == {"sound"}


@pytest.mark.parametrize(
    ("name", "form", "word"),
    [
        ("eos-ignored", lambda row: whole({**row, "terminated": True}), "finished"),
        (
            "template-drops-content",
            lambda row: whole({**row, "completion": row["completion"].split("</think>")[-1]}),
            "reasoning",
        ),
        ("template-drops-content", lambda row: whole({**row, "prompt": ""}), "question"),
        (
            "unicode-and-control-characters",
            lambda row: whole(row).encode("ascii", "ignore"),
            "Cyrillic",
        ),
    ],
)
def test_what_such_a_target_loses_is_found(name: str, form: Any, word: str) -> None:
    outcomes = seen(Formats(form))
    assert outcomes[name].status == "found"
    assert word in outcomes[name].seen
    assert faults(outcomes) <= {name}


def test_one_score_for_all_is_not_taken_for_a_loss() -> None:
    outcomes = seen(Formats(lambda row: "one"))
    assert not any(outcome.status == "found" for outcome in outcomes.values())


def test_a_target_that_refuses_is_not_found() -> None:
    def form(row: Any) -> str:
        if "terminated" in row:
            raise DataError("no such field")
        return whole(row)

    outcomes = seen(Formats(form))
    assert outcomes["eos-ignored"].status == "not asked"
    assert "no such field" in outcomes["eos-ignored"].seen


#: what is found in templates that models ship with, beside the museum's
SHIPPED = {
    "deepseekv3": {"template-drops-content"},
    "deepseekv3_training": {"template-drops-content"},
    "deepseek_r1_distill": {"template-drops-content"},
    "glm4moe": {"eos-missing"},
    "gptoss": {"date-in-template"},
    "llama3_2": {"date-in-template"},
    "muse_glimmer": {"date-in-template"},
}


def of_templates(names: Sequence[str], loaded: Any) -> None:
    for name in names:
        loaded.tokenizer.chat_template = texts.trl_template(name)
        subject = LocalSubject(loaded.model, loaded.tokenizer)
        outcomes = seen(subject, "very-long-input", "silent-cut", "empty-input")
        expected = SHIPPED.get(name, SHIPPED.get(name.removesuffix("_training"), set()))
        if name in ("glm4moe_training", "deepseek_r1_distill_training"):
            expected = set()  # they were mended there
        assert faults(outcomes) == expected, name


def test_templates_that_models_ship_with() -> None:
    of_templates(["qwen3", "gemma3", "phi3", "idefics3", "glm4moe_training"], tutor_reward())


@pytest.mark.slow
def test_all_templates_of_trl() -> None:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    of_templates(sorted(path.stem for path in folder.glob("*.jinja")), tutor_reward())
