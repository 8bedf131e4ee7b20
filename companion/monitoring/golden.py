"""Does the model still say what it said? Golden texts against a folder or a server. Chapter 7.

A score that moves on the same text is a fault of the infrastructure, never drift, and needs no
statistics: it is seen at once, by a tolerance. What is told here beside it is *what* changed: by
hashes, where the target gives them (a folder, ``companion serve``), and by how the values moved.

A server is asked twice: with token ids, as ``RemoteScorer`` asks it, and with the rows themselves,
which it formats. Ids alone would never see that its template or its tokenizer is another one.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from companion.errors import CompanionError, DataError, ModelError, ServiceError
from companion.models.golden import HALF_TOLERANCE, GoldenTexts
from companion.models.manifest import MANIFEST_FILE, RewardManifest

if TYPE_CHECKING:
    from companion.models.identity import Identity
    from companion.scoring.golden import GoldenReport
    from companion.scoring.scorer import LocalScorer

State = Literal["ok", "changed", "moved", "unreachable"]
Engine = Literal["companion", "classify"]

#: What each name in `changed` means, for people.
CHANGES: Final[Mapping[str, str]] = {
    "template": "the chat template, or another rule by which a row becomes a text",
    "tokenizer": "the tokenizer",
    "weights": "the weights, of the head or of any layer",
    "head": "the head, or what is done with its value",
    "config": "the class or the configuration",
    "readout": "the way in which values are read",
    "dtype": "the dtype",
    "checkpoint": "another checkpoint stands there, with a manifest of its own",
    "manifest": "the manifest, which cannot be read",
}
#: Statuses by which a server refuses what was asked; others say nothing about the model.
_REFUSALS: Final = (400, 409, 413, 422)
_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")


@dataclass
class GoldenCheck:
    """What became of the golden texts at a target.

    Attributes
    ----------
    target : str
        The folder, or the server's URL.
    state : {"ok", "changed", "moved", "unreachable"}
        ``changed``: a hash is another, and no golden text shows it. ``moved``: the same text has
        other token ids or another value; a fault.
    changed : list of str
        Names of what changed, keys of :data:`CHANGES`; empty if nothing is known to have.
    moved : list of dict
        ``text``, ``way`` (``alone`` and ``batch``: token ids; ``words``: the row, formatted by the
        target) and ``by``, null where there was no number.
    other_ids : list of int
        Texts that have other token ids than at saving.
    texts : int
        How many there are.
    tolerance, most : float
        Most that a value may move, and most that one did; null if there was no number.
    version : str or None
        Of the model, as the target says it.
    hashes : dict of str to str
        Those of the target; empty for an engine that has none.
    reasons : list of str
        In words.
    """

    target: str
    state: State = "ok"
    changed: list[str] = field(default_factory=list)
    moved: list[dict[str, Any]] = field(default_factory=list)
    other_ids: list[int] = field(default_factory=list)
    texts: int = 0
    tolerance: float = 0.0
    most: float | None = 0.0
    version: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is as it was saved."""
        return self.state == "ok"

    def lines(self) -> list[str]:
        """For people, the verdict first."""
        first = {
            "ok": f"all {self.texts} golden texts have the values that they had at saving",
            "changed": f"no golden text moved, but what is at {self.target} is not what was saved",
            "moved": f"the golden texts moved at {self.target}: a fault, no drift",
            "unreachable": f"{self.target} could not be asked",
        }[self.state]
        names = ", ".join(self.changed)
        if self.changed:
            first += f"; changed: {names}"
        elif self.state == "moved":
            first += "; nothing there has a hash that says what changed"
        return [first, *self.reasons]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}


def read_golden(
    model: str | os.PathLike[str], *, revision: str | None = None
) -> dict[str, Any] | None:
    """The golden texts of a saved model as plain data, for a plan that outlives the folder.

    A folder's are read without loading torch. None if it has none. `revision` is of a hub id.

    Raises
    ------
    ModelError
        If there is no manifest, or it is damaged.
    """
    file: str | None = str(Path(model) / MANIFEST_FILE)
    if not Path(model).is_dir():
        from companion.models.checkpoint import find_file, resolve

        file = find_file(resolve(model), MANIFEST_FILE, revision)
    if file is None:
        raise ModelError(f"{model}: no {MANIFEST_FILE}", "give a model that the companion saved")
    found = RewardManifest.load(file).golden_texts
    return None if found is None else asdict(found)


def check_target(
    model: str | os.PathLike[str],
    *,
    url: str | None = None,
    protocol: Engine = "companion",
    golden: GoldenTexts | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    tolerance: float | None = None,
    timeout: float = 60.0,
    retries: int = 3,
    api_key: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> GoldenCheck:
    """Ask a target for the golden texts of a saved model, and name what changed.

    Parameters
    ----------
    model : str or path
        Folder or hub id of the model.
    url : str, optional
        A server that runs it; without one the folder itself is the target.
    protocol : {"companion", "classify"}
        With ``classify``, vLLM's route, there are no hashes: texts moved or they did not. Whether
        its template is another one is seen only by conversations, which are sent as messages.
    golden : GoldenTexts or mapping, optional
        What was recorded when watching began (:func:`read_golden`). Default: the manifest's, which
        cannot tell that the whole folder was replaced by another model's.
    dtype : str, optional
        In which the target is meant to run; default: as the golden texts were made. Half precision
        has a coarser tolerance, and is named as a change if it is not meant: say ``bfloat16`` for
        an engine on a GPU that runs in it.
    tolerance : float, optional
        Most that a value may move; default: the golden texts', or that of `dtype` if coarser.
    timeout, retries
        Of the server: seconds for an answer, and how often it is asked again.
    api_key : str, optional
        Default: the environment's ``COMPANION_REWARD_API_KEY``.
    revision, trust_remote_code
        For transformers.

    Returns
    -------
    GoldenCheck
        Also for a target that cannot be asked, or a folder that cannot be loaded any more.

    Raises
    ------
    ModelError
        If there are no golden texts, or the model here, that of a server, cannot be read.
    DataError
        For another `dtype` or `protocol`.
    """
    if protocol not in ("companion", "classify"):
        raise DataError(f"protocol is {protocol!r}", "use companion or classify")
    if dtype is not None and dtype not in _DTYPES:
        raise DataError(f"dtype is {dtype!r}", f"use one of: {', '.join(_DTYPES)}")
    given: Any = read_golden(model, revision=revision) if golden is None else golden
    if given is None:
        raise ModelError(
            f"{model}: has no golden texts, so nothing says what it said when it was saved",
            "train it with the companion, or save it with describe=add_golden_texts",
        )
    if not isinstance(given, GoldenTexts):
        given = GoldenTexts.from_dict(dict(given), "golden")
    meant = dtype or given.dtype
    coarse = max(given.tolerance, HALF_TOLERANCE.get(meant, 0.0))
    task = _Task(given, meant, tolerance if tolerance is not None else coarse)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if url is None:
        return _of_folder(task, model, hub)
    asked: dict[str, Any] = {"timeout": timeout, "retries": retries, "api_key": api_key}
    return _of_server(task, model, url, protocol, asked, hub)


@dataclass(frozen=True)
class _Task:
    """What is to be asked, and what is allowed."""

    golden: GoldenTexts
    dtype: str
    tolerance: float

    @property
    def scalar(self) -> bool:
        return self.golden.places is None

    def check(self, target: str) -> GoldenCheck:
        return GoldenCheck(target, texts=len(self.golden.rows), tolerance=self.tolerance)

    def compare(self, check: GoldenCheck, hashes: Mapping[str, str]) -> None:
        """Note the hashes of a target, and the names of those that are others."""
        check.hashes = dict(hashes)
        before = self.golden.hashes
        for name, own in hashes.items():
            if before.get(name) == own:
                continue
            if name == "dtype":
                is_now, was = _dtypes_of(own), _dtypes_of(before.get(name, ""))
                if is_now and is_now <= {self.dtype, "float32"} and self.dtype in is_now:
                    continue  # as it is meant to run
                check.reasons.append(f"dtype: {_listed(was)} at saving, {_listed(is_now)} now")
            check.changed.append(name)

    def add(self, check: GoldenCheck, values: Sequence[Any], way: str) -> None:
        """Hold values against those at saving."""
        for i, (value, saved) in enumerate(zip(values, self.golden.values, strict=True)):
            by = _distance(value, saved)
            known = math.isfinite(by)
            if check.most is not None:
                check.most = max(check.most, by) if known else None
            if not by <= self.tolerance:
                check.moved.append({"text": i, "way": way, "by": by if known else None})

    def read(self, check: GoldenCheck, report: GoldenReport) -> None:
        """Take over what `check_golden` found of token ids, which says nothing of `changed`."""
        check.moved += [
            {"text": i, "way": way, "by": by if math.isfinite(by) else None}
            for i, way, by in report.moved
        ]
        check.most = report.most if math.isfinite(report.most) else None
        if report.moved and (said := _relation(self.golden, report.values, self.tolerance)):
            check.reasons.append(said)
            # (what another checkpoint says is no function of what this one said)
            check.changed.append("head")

    def done(self, check: GoldenCheck, refused: bool = False) -> GoldenCheck:
        """The state, and the worst moves in words."""
        worst = sorted(check.moved, key=lambda one: -(one["by"] or math.inf))[:3]
        told = {"alone": "its token ids", "batch": "its token ids, in a batch", "words": "its row"}
        for one in worst:
            by = "is no number any more" if one["by"] is None else f"moved by {one['by']:.3g}"
            check.reasons.append(f"text {one['text']} ({told[one['way']]}) {by}")
        if check.moved:
            count = len({one["text"] for one in check.moved})
            check.reasons.append(
                f"{count} of {check.texts} texts moved by more than {self.tolerance:g}"
            )
        check.changed = [name for name in CHANGES if name in check.changed]
        bad = bool(check.moved or check.other_ids or refused)
        check.state = "moved" if bad else "changed" if check.changed else "ok"
        return check


# ---------------------------------------------------------------------- a folder


def _of_folder(task: _Task, model: str | os.PathLike[str], hub: dict[str, Any]) -> GoldenCheck:
    from companion.models.identity import identity_of
    from companion.scoring.golden import check_golden
    from companion.scoring.scorer import load_scorer

    check = task.check(str(model))
    try:
        scorer: Any = load_scorer(model, dtype=task.dtype, **hub)
    except CompanionError as error:
        check.reasons.append(f"cannot be loaded as it was saved: {error.what}")
        return _why_not_loaded(task, check, model, hub)
    identity = identity_of(scorer.reward_model)
    check.version = identity.version
    task.compare(check, identity.to_dict())
    _look_into(task, check, scorer, identity)
    refused = (scorer.readout.kind == "scalar") != task.scalar
    if refused:
        check.reasons.append(f"the model is of another kind: {scorer.readout.kind}")
    else:
        try:
            report = check_golden(scorer, tolerance=task.tolerance, golden=task.golden)
        except CompanionError as error:  # of ids that this model does not know, say
            check.reasons.append(f"the golden texts cannot be scored: {error.what}")
            refused = True
        else:
            assert report is not None
            check.other_ids = report.other_ids
            if report.other_ids:
                check.reasons.append(f"texts with other token ids: {report.other_ids}")
            task.read(check, report)
    return task.done(check, refused)


def _why_not_loaded(
    task: _Task, check: GoldenCheck, model: str | os.PathLike[str], hub: dict[str, Any]
) -> GoldenCheck:
    """Part by part: what of a folder cannot be loaded."""
    from companion.models.checkpoint import find_file, resolve
    from companion.models.loading import load_formatter

    try:
        file = find_file(resolve(model), MANIFEST_FILE, hub["revision"])
    except CompanionError:
        file = None
    if file is None and not Path(model).is_dir():
        check.state = "unreachable"
        return check
    try:
        if file is not None:
            RewardManifest.load(file)
    except CompanionError:
        check.changed.append("manifest")
        return task.done(check, refused=True)
    try:
        load_formatter(model, **hub)
    except CompanionError:
        check.changed.append("tokenizer")
    else:
        check.changed.append("weights")
    return task.done(check, refused=True)


def _look_into(
    task: _Task, check: GoldenCheck, scorer: LocalScorer[Any], identity: Identity
) -> None:
    """What only a folder shows: how weights are stored, the manifest, the template's own file."""
    from companion.models.checkpoint import read_tensor

    model, manifest = scorer.reward_model, scorer.manifest
    own = None if manifest is None else manifest.golden_texts
    if "weights" in check.changed:
        if own is not None and own.hashes.get("weights") == identity.weights:
            check.changed.append("checkpoint")  # it is whole, and not the one that was recorded
        names = [name for name, p in model.model.named_parameters() if p.ndim == 1]
        if model.source is not None and names:
            stored = read_tensor(model.source[0], names[0], model.source[1])
            now = None if stored is None else str(stored.dtype).removeprefix("torch.")
            if now is not None and now != task.golden.dtype:
                check.changed.append("dtype")
                check.reasons.append(
                    f"dtype: the weights are stored in {now}, and were {task.golden.dtype}"
                )
    # the companion formats by the manifest; everybody else by the file, and would get other ids
    # (for an adopted model it may say otherwise on purpose: a pair's, the answer's header)
    adopted = scorer.readout.read_as is not None
    if manifest is not None and not adopted and scorer.formatter.template_override is not None:
        check.changed.append("template")
        check.reasons.append(
            "the folder's chat template is not the manifest's: what reads the folder without the "
            "companion formats otherwise"
        )


# ---------------------------------------------------------------------- a server


def _of_server(
    task: _Task,
    model: str | os.PathLike[str],
    url: str,
    protocol: Engine,
    asked: dict[str, Any],
    hub: dict[str, Any],
) -> GoldenCheck:
    from companion.scoring.golden import check_golden
    from companion.scoring.remote import KEY_VARIABLE, RemoteScorer
    from companion.scoring.servers import Refused, Servers

    key = asked["api_key"] or os.environ.get(KEY_VARIABLE)
    servers = Servers([url], Counter(), backoff=0.5, **{**asked, "api_key": key})
    check = task.check(url)
    scorer = RemoteScorer.from_pretrained(url, model, protocol=protocol, **asked, **hub)
    scorer.counts["warnings"] += 1  # else its log says that an unfinished text has no end
    try:
        if protocol == "companion":
            kind = _describe(task, check, servers, scorer)
            if (kind == "scalar") != task.scalar or kind != scorer.readout.kind:
                check.changed.append("readout")
                check.reasons.append(f"the server has a model of another kind: {kind}")
                return task.done(check, refused=True)
            told = _as_rows(task, check, servers)
        else:
            told = _as_messages(task, check, servers, scorer)
        report = check_golden(scorer, tolerance=task.tolerance, golden=task.golden)
    except ServiceError as error:
        if isinstance(error, Refused) and error.status in _REFUSALS:
            check.reasons.append(f"the server refuses the golden texts: {error.what}")
            return task.done(check, refused=True)
        check.state = "unreachable"
        check.reasons.append(error.what)
        return check
    assert report is not None
    if report.other_ids:
        check.other_ids = sorted({*check.other_ids, *report.other_ids})
        check.changed += [name for name in report.differs if name not in check.changed]
        check.reasons.append(
            f"the model's folder here formats otherwise than at saving: texts {report.other_ids}"
        )
    task.read(check, report)
    task.add(check, told, "words")
    words = [one for one in check.moved if one["way"] == "words"]
    if words and not report.moved and not {"template", "tokenizer"} & {*check.changed}:
        check.reasons.append(
            "token ids have their values and rows have not: the server formats them otherwise (its "
            "template or its tokenizer)"
        )
    return task.done(check)


def _send(servers: Any, path: str, body: Any = None) -> Any:
    """The JSON of an answer."""
    from companion.scoring.servers import Refused, refusal
    from companion.scoring.waiting import wait_for

    async def send() -> Any:
        async with servers.client() as client:
            return await servers.send(client, path, body)

    url, response = wait_for(send())
    if response.status_code != 200:
        raise Refused(f"{url}{path}: {refusal(response)[0]}", None, response.status_code)
    try:
        return response.json()
    except ValueError as error:
        raise ServiceError(f"{url}{path}: answered no JSON: {response.text[:200]!r}") from error


def _describe(task: _Task, check: GoldenCheck, servers: Any, scorer: Any) -> str:
    """Which model a companion serves: its hashes and its kind."""
    from companion.models.identity import text_hashes

    answer = _send(servers, "/v1/models")
    try:
        found = answer["data"][0]
        kind, hashes = str(found["kind"]), {str(k): str(v) for k, v in found["hashes"].items()}
        check.version = str(found["model_version"])
        temperature = found.get("temperature")
    except (LookupError, TypeError, AttributeError) as error:
        raise ServiceError(
            f"{check.target}/v1/models: no answer of a companion: {error!r}; an engine of another "
            "kind needs protocol='classify'"
        ) from error
    if hashes.get("dtype") == "engine":  # a gateway knows the words, not the model behind it
        hashes = {name: hashes[name] for name in ("template", "tokenizer", "readout")}
        check.reasons.append("a gateway: its engine has no hashes of weights, config and dtype")
    # what becomes of texts that are too long is the server's own setting, and stands in this hash
    formatter = scorer.formatter
    if found.get("overlong") in ("drop", "error", "truncate_prompt"):
        alike = text_hashes(formatter.changed(overlong=found["overlong"]), scorer.readout)
        if hashes.get("template") == alike["template"]:
            hashes["template"] = text_hashes(formatter, scorer.readout)["template"]
    task.compare(check, hashes)
    if "weights" in check.changed:
        own = scorer.manifest
        reference = _send(servers, "/v1/reference").get("reference")
        here = None if own is None or own.reference is None else vars(own.reference)
        if own is not None and (own.temperature, here) != (temperature, reference):
            check.changed.append("checkpoint")
    return kind


def _as_rows(task: _Task, check: GoldenCheck, servers: Any) -> list[Any]:
    """What a companion says of the rows, which it formats."""
    items = [{key: row[key] for key in row} for row in task.golden.rows]
    body: dict[str, Any] = {"items": items}
    path, name = "/v1/steps", "results"
    if task.scalar:
        path, name, body["return"] = "/v1/rewards", "rewards", ["raw"]
    answer = _send(servers, path, body)
    values: list[Any] = [math.nan] * len(items)
    counted: list[str] = []
    try:
        for one in answer[name]:
            i = one["index"]
            values[i] = one["raw" if task.scalar else "logits"]
            wanted = len(task.golden.input_ids[i])
            same = one["n_tokens"] == wanted
            if task.golden.places is not None:
                same = same and one["places"] == task.golden.places[i]
            if not same:
                check.other_ids.append(i)
                counted.append(f"{wanted} → {one['n_tokens']}")
    except (LookupError, TypeError) as error:
        raise ServiceError(f"{check.target}{path}: the answer does not fit: {error!r}") from error
    check.other_ids.sort()
    if counted:
        more = ", …" if len(counted) > 3 else ""
        told = f"{', '.join(counted[:3])}{more} tokens"
        check.reasons.append(f"the server made other token ids of {len(counted)} texts: {told}")
    return [math.nan if value is None else value for value in values]


def _as_messages(task: _Task, check: GoldenCheck, servers: Any, scorer: Any) -> list[Any]:
    """What vLLM's route says of the conversations, which the engine formats; else what was saved.

    Plain text has no template, and text that was cut off cannot be said in messages.
    """
    from companion.scoring.servers import Refused

    values = list(task.golden.values)
    if scorer.formatter.text != "chat":
        check.reasons.append("the model reads plain text: only token ids were sent")
        return values
    for i, row in enumerate(task.golden.rows):
        if row.get("terminated", True) is False:
            continue
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        try:
            answer = _send(servers, "/classify", {"messages": messages, "use_activation": False})
        except Refused as error:
            if error.status not in (*_REFUSALS, 404, 501):
                raise
            check.reasons.append(f"the engine takes no messages, so only ids: {error.what}")
            break
        try:
            values[i] = float(answer["data"][0]["probs"][0])
        except (LookupError, TypeError, ValueError) as error:
            raise ServiceError(f"{check.target}/classify: does not fit: {error!r}") from error
    return values


# ---------------------------------------------------------------------- values


def _distance(a: Any, b: Any) -> float:
    """The largest difference; infinite for other shapes and for what is no number."""
    try:
        left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    except (TypeError, ValueError):
        return math.inf
    if left.shape != right.shape or not np.isfinite(left).all():
        return math.inf
    return float(np.abs(left - right).max(initial=0.0))


def _relation(golden: GoldenTexts, values: Sequence[Any], tolerance: float) -> str | None:
    """Values that are a function of those at saving: the layers are right, what follows is not."""
    if golden.places is not None or len(values) < 4:  # a line goes through any two
        return None
    then, now = np.asarray(golden.values, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not np.isfinite(now).all() or np.abs(now - then).max() <= 10 * tolerance:
        return None  # (noise of that size lies near any line)
    if np.abs(now - 1 / (1 + np.exp(-then))).max() <= tolerance:
        return "each value is the sigmoid of what it was: turn the engine's activation off"
    slope, shift = np.polyfit(then, now, 1)
    if np.abs(now - slope * then - shift).max() <= tolerance and abs(slope) > 1e-3:
        plus = f" {shift:+.4g}" if abs(shift) > tolerance else ""
        return f"each value is {slope:.4g} times what it was{plus}: the head, or a scale behind it"
    return None


def _dtypes_of(hashed: str) -> set[str]:
    """The dtypes whose hash this is: of one, or of two, as a head in float32 makes it."""
    from companion.models.identity import short_hash

    for a in _DTYPES:
        for b in _DTYPES:
            names = {f"torch.{a}", f"torch.{b}"}
            if short_hash(" ".join(sorted(names)).encode()) == hashed:
                return {a, b}
    return set()


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names)) or "another"
