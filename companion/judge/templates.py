"""What a judge is asked, and how its answer is read: templates that a user can replace.

A template is a small YAML file: the prompt with its placeholders, and the text that stands for each
verdict. An answer is read without guessing. It has a verdict if exactly one verdict occurs in it,
once or several times; an answer with none, or with two that contradict each other, is *unparsed*,
and so is one that was cut off. FastChat took ``[[A]]`` if it stood anywhere in the answer, also
where ``[[B]]`` was the conclusion (FastChat #3921); a judge that muses about A then favours it.
Chapter 3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import yaml

from companion.errors import DataError

Mode = Literal["pairwise", "pointwise"]
#: What a verdict says: ``a``, ``b`` or ``tie`` of two completions, a number of one.
Outcome = str | float

#: mode -> placeholders of its prompt, each of which must be there
PLACEHOLDERS: Final[dict[str, tuple[str, ...]]] = {
    "pairwise": ("prompt", "a", "b"),
    "pointwise": ("prompt", "completion"),
}
_FOLDER: Final = Path(__file__).resolve().parent.parent / "assets" / "judge"
#: Names of the templates that come with the companion.
BUILT_IN: Final = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))
_FIELDS: Final = ("mode", "system", "prompt", "verdicts", "whole_answer", "max_tokens")
_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_]\w*)\}")
#: What reasoning models write before ``</think>`` is not the answer. Some templates put the opening
#: tag into the prompt, so that only the closing one is seen.
_OPEN, _CLOSE = "<think>", "</think>"


class Reading(NamedTuple):
    """What an answer says.

    Attributes
    ----------
    outcome : str, float or None
        The verdict; None if the answer is unparsed.
    reason : str or None
        Why it is unparsed: ``no verdict``, ``conflicting verdicts`` or ``cut off``.
    start : int
        Where in the answer the verdict's text begins; −1 without one.
    """

    outcome: Outcome | None
    reason: str | None
    start: int


@dataclass(frozen=True)
class JudgeTemplate:
    """A prompt with placeholders, and the texts of the verdicts.

    Attributes
    ----------
    mode : {"pairwise", "pointwise"}
    prompt : str
        The user's message, with ``{prompt}``, ``{a}`` and ``{b}``; pointwise ``{prompt}`` and
        ``{completion}``. Other braces are left alone.
    verdicts : mapping
        What each verdict looks like: from ``a``, ``b`` and, where the judge may say so, ``tie``
        (pointwise: from numbers) to a text, or to several.
    system : str
        The system message; none if empty.
    whole_answer : bool
        The answer must be the verdict and nothing else.
    max_tokens : int
        How long an answer may be, in tokens.
    name : str
        For reports.

    Raises
    ------
    DataError
        If a placeholder is missing or unknown, or two verdicts cannot be told apart.
    """

    mode: Mode
    prompt: str
    verdicts: Mapping[Outcome, tuple[str, ...]]
    system: str = ""
    whole_answer: bool = False
    max_tokens: int = 1024
    name: str = field(default="own", compare=False)

    def __post_init__(self) -> None:
        if self.mode not in PLACEHOLDERS:
            raise DataError(f"{self._place}: mode {self.mode!r}", "use pairwise or pointwise")
        self._check_prompt()
        object.__setattr__(self, "verdicts", self._checked_verdicts())
        if self.max_tokens < 1:
            raise DataError(f"{self._place}: max_tokens is {self.max_tokens}", "use 1 or more")

    @property
    def _place(self) -> str:
        return f"judge template {self.name!r}"

    def _check_prompt(self) -> None:
        wanted = PLACEHOLDERS[self.mode]
        found = set(_PLACEHOLDER.findall(self.prompt))
        if missing := [name for name in wanted if name not in found]:
            raise DataError(
                f"{self._place}: the prompt lacks {', '.join(f'{{{n}}}' for n in missing)}",
                f"a {self.mode} prompt holds {', '.join(f'{{{n}}}' for n in wanted)}",
            )
        if unknown := sorted(found - set(wanted)):
            raise DataError(
                f"{self._place}: unknown placeholder {', '.join(f'{{{n}}}' for n in unknown)}",
                f"a {self.mode} prompt may hold {', '.join(f'{{{n}}}' for n in wanted)}",
            )
        if found & set(_PLACEHOLDER.findall(self.system)):
            raise DataError(f"{self._place}: a placeholder in the system message", "move it")

    def _checked_verdicts(self) -> dict[Outcome, tuple[str, ...]]:
        verdicts: dict[Outcome, tuple[str, ...]] = {}
        for outcome, texts in self.verdicts.items():
            key = _outcome(outcome, self.mode, self._place)
            given = (texts,) if isinstance(texts, str) else tuple(texts)
            if not given or not all(isinstance(t, str) and t.strip() == t and t for t in given):
                raise DataError(
                    f"{self._place}: verdict {outcome!r} has no text, or one with blanks around it",
                    'write it in quotes, such as "[[A]]"',
                )
            verdicts[key] = given
        wanted = {"a", "b"} if self.mode == "pairwise" else set()
        if not wanted <= set(verdicts) or len(verdicts) < 2:
            raise DataError(
                f"{self._place}: verdicts {sorted(map(str, verdicts)) or 'missing'}",
                "pairwise needs a and b, and may have tie; pointwise needs two numbers or more",
            )
        every = [text for texts in verdicts.values() for text in texts]
        for text in every:
            holders = [other for other in every if text in other]
            if len(holders) > 1 and not (self.whole_answer and every.count(text) == 1):
                raise DataError(
                    f"{self._place}: the verdict {text!r} also stands in another verdict",
                    "choose texts of which none is a part of another",
                )
        return verdicts

    # ------------------------------------------------------------------ asking

    def messages(self, texts: Mapping[str, str]) -> list[dict[str, str]]:
        """Messages to ask with; what ``texts`` fills in is not searched for placeholders."""
        filled = _PLACEHOLDER.sub(lambda match: texts[match[1]], self.prompt)
        user = {"role": "user", "content": filled}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    # ------------------------------------------------------------------ reading

    def read(self, answer: str, *, finished: bool = True) -> Reading:
        """Read an answer without guessing.

        Parameters
        ----------
        answer : str
            As the model wrote it; what stands before ``</think>`` is passed over.
        finished : bool
            Whether the model ended it. One that was cut off has no verdict: what would have come
            might have taken it back.

        Returns
        -------
        Reading
        """
        if not finished:
            return Reading(None, "cut off", -1)
        begin = answer.rfind(_CLOSE) + len(_CLOSE) if _CLOSE in answer else 0
        if not begin and answer.lstrip().startswith(_OPEN):
            return Reading(None, "no verdict", -1)
        found: dict[Outcome, int] = {}
        for outcome, texts in self.verdicts.items():
            for text in texts:
                place = self._find(answer, text, begin)
                if place >= 0:
                    found[outcome] = min(place, found.get(outcome, place))
        if not found:
            return Reading(None, "no verdict", -1)
        if len(found) > 1:
            return Reading(None, "conflicting verdicts", -1)
        ((outcome, place),) = found.items()
        return Reading(outcome, None, place)

    def _find(self, answer: str, text: str, begin: int) -> int:
        if self.whole_answer:
            body = answer[begin:]
            return begin + len(body) - len(body.lstrip()) if body.strip() == text else -1
        # a verdict that begins or ends with a letter must not be a part of a word
        before = r"(?<!\w)" if text[0].isalnum() else ""
        after = r"(?!\w)" if text[-1].isalnum() else ""
        match = re.compile(before + re.escape(text) + after).search(answer, begin)
        return match.start() if match else -1

    def to_dict(self) -> dict[str, Any]:
        """What decides the question and its reading; part of a cached answer's key."""
        return {
            "mode": self.mode,
            "system": self.system,
            "prompt": self.prompt,
            "verdicts": {str(key): list(texts) for key, texts in self.verdicts.items()},
            "whole_answer": self.whole_answer,
        }


def _outcome(value: Any, mode: str, place: str) -> Outcome:
    if mode == "pairwise" and value in ("a", "b", "tie"):
        return str(value)
    if mode == "pointwise" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    known = "a, b or tie" if mode == "pairwise" else "a number"
    raise DataError(f"{place}: verdict {value!r} in mode {mode}", f"name it {known}")


def load_template(source: str | os.PathLike[str] | JudgeTemplate) -> JudgeTemplate:
    """A template by name, from a file, or from a text.

    Parameters
    ----------
    source : str, path or JudgeTemplate
        The name of one of :data:`BUILT_IN`; a ``.yaml`` file with the fields of
        :class:`JudgeTemplate`; a ``.txt`` or ``.md`` file with a prompt; or the prompt itself. A
        prompt alone is pointwise if it holds ``{completion}``, and is answered with the verdicts
        of the built-in template of its mode.

    Returns
    -------
    JudgeTemplate

    Raises
    ------
    DataError
        If there is none of that name, or it is no usable template.
    """
    if isinstance(source, JudgeTemplate):
        return source
    text = os.fspath(source)
    if text in BUILT_IN:
        return _from_yaml(_FOLDER / f"{text}.yaml", text)
    if "\n" in text or "{" in text:
        return _from_prompt(text, "own")
    path = Path(text)
    if not path.is_file():
        raise DataError(
            f"no judge template {text!r}",
            f"give a file, a prompt with its placeholders, or one of: {', '.join(BUILT_IN)}",
        )
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, path.name)
    return _from_prompt(path.read_text(encoding="utf-8").strip("\n"), path.name)


def _from_prompt(prompt: str, name: str) -> JudgeTemplate:
    mode: Mode = "pointwise" if "{completion}" in prompt else "pairwise"
    usual = load_template(mode)
    return JudgeTemplate(mode, prompt, usual.verdicts, max_tokens=usual.max_tokens, name=name)


def _from_yaml(path: Path, name: str) -> JudgeTemplate:
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path}: no fields", f"it takes {', '.join(_FIELDS)}")
    if unknown := sorted(set(map(str, fields)) - set(_FIELDS)):
        raise DataError(f"{path}: unknown {', '.join(unknown)}", f"it takes {', '.join(_FIELDS)}")
    for key, kind in (("mode", str), ("prompt", str), ("verdicts", dict)):
        if not isinstance(fields.get(key), kind):
            raise DataError(f"{path}: {key} is missing or no {kind.__name__}")
    return JudgeTemplate(**fields, name=name)
