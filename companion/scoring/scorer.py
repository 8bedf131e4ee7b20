"""Scorers: rows in, scores out, in the same order, each depending on its own text alone.

One rule above all (Chapter 6): a batch, packed or padded, gives each text the score that it has
alone. In float32 they agree within 1e-5, whatever the batch, the order, the thread and the padding
side; reward-bench #137 shows what happens elsewhere.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from accelerate import PartialState

from companion.engine.devices import resolve_dtype
from companion.engine.forward import check_texts
from companion.engine.runner import BatchRunner, Packing, default_token_budget
from companion.errors import CompanionError, DataError, ModelError, ReadoutError
from companion.formatting import Encoded, Overlong, RewardFormatter, Row, TextMode
from companion.formatting.steps import EncodedSteps
from companion.functional.reduction import How
from companion.models.checkpoint import is_adapter, model_fingerprint, resolve
from companion.models.ends import end_token_ids, turn_end_ids
from companion.models.golden import ROWS
from companion.models.loading import load_reward_model, manifest_of
from companion.models.manifest import MANIFEST_FILE, ReferenceStats, RewardManifest
from companion.models.memory import chosen_device
from companion.models.published import kind_of
from companion.models.readout import ReadAs, Readout, ScalarReadout, TokenReadout
from companion.models.reward_model import RewardModel
from companion.scoring.processes import across_processes
from companion.scoring.reading import Found, NoValue, Text, ids_of, reading_of, without_end
from companion.scoring.results import PairScores, Scores, TokenScores
from companion.scoring.reward_function import AsyncRewardFunction, RewardFunction
from companion.scoring.waiting import in_thread

OnError = Literal["raise", "skip"]
Progress = Callable[[int], None]
ScoresT = TypeVar("ScoresT", bound=Scores)
#: encoders whose first position is the one behind their pad id
_COUNT_FROM_PAD = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"})


@dataclass(frozen=True)
class Prepared:
    """Rows that were formatted and not yet scored; see :meth:`Scorer.prepare`.

    Attributes
    ----------
    found : sequence
        Of each row its texts, the error that it is, or None where it was dropped for its length.
    width : int
        Texts of a row: 1, or 2 for pairs.
    names : list of str
        Of the rows, for errors.
    reasons : list of (str or None)
        Why a row has no score.
    kept : list of int
        Indices of the rows that are run.
    texts : list
        All their texts, row by row: what :meth:`Scorer.values` takes.
    """

    found: Found
    width: int
    names: list[str]
    reasons: list[str | None]
    kept: list[int]
    texts: list[Text]


class Scorer(ABC, Generic[ScoresT]):
    """What all scorers offer, wherever their model runs and however its values are read.

    A scorer may be called from several threads at once, and several scorers may share a model.

    Attributes
    ----------
    readout : ScalarReadout or TokenReadout
        How the model's values are read: ``scalar``, ``outcome`` or ``process``.
    max_positions : int or None
        Longest text that the model has positions for; None where nobody says.
    processes : PartialState or None
        Processes that share the texts of each call, and all of which must make it, with the same
        rows (:func:`companion.scoring.launched_processes`); None, the default: this one alone.
    """

    processes: PartialState | None = None
    _cure_of_nan: ClassVar[str] = "score in float32; if it stays, the model's training has diverged"

    def __init__(self, about: RewardModel, readout: Readout, max_positions: int | None) -> None:
        self._about = about
        self.readout: Readout = readout
        self.max_positions = max_positions

    @property
    def formatter(self) -> RewardFormatter:
        """The formatter of the model, with its counts."""
        return self._about.formatter

    @property
    def tokenizer(self) -> Any:
        """The reward model's tokenizer."""
        return self._about.tokenizer

    @property
    def manifest(self) -> RewardManifest | None:
        """What was saved with the model; None for one that was not saved by the companion."""
        return self._about.manifest

    @property
    def reference(self) -> ReferenceStats | None:
        """The reference set of the manifest."""
        return None if self.manifest is None else self.manifest.reference

    @property
    def notes(self) -> list[str]:
        """What was repaired or assumed while loading, and on the way."""
        own = self._about.notes
        return [*own, *(note for note in self.formatter.notes if note not in own)]

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a completion of the model's own family.

        Its EOS, those of its configuration, and what its chat template writes behind an answer.
        """
        said = getattr(getattr(self._about.model, "config", None), "eos_token_id", None)
        ends = turn_end_ids(self.tokenizer, self.formatter.template_override)
        return sorted({*end_token_ids(self.tokenizer, said), *ends})

    def read_texts(
        self,
        max_length: int | None = None,
        overlong: Overlong | None = None,
        text: TextMode | None = None,
    ) -> None:
        """Take another limit of length, way with what is longer, or way to read text, if given."""
        self._about.read_texts(max_length, overlong, text)

    @abstractmethod
    def fingerprint(self) -> str:
        """What tells the model from others: a run over a file only goes on with the same one."""

    # ------------------------------------------------------------------ rows

    def score(
        self,
        rows: Sequence[Row],
        *,
        terminated: bool | None = None,
        field: str = "completion",
        on_error: OnError = "raise",
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> ScoresT:
        """Score rows.

        Parameters
        ----------
        rows : sequence
            Each a string, a list of messages, ``{"prompt", "completion"}``, ``{"messages"}`` or
            ``{"text"}``. For an outcome or process model the prompt must be told apart: a mapping
            with ``prompt`` and ``completion``, or messages, of which the last is the solution; for
            a process model also ``prompt`` and ``completions``, the steps. A solution in one piece
            is split at the separator; with ``terminated=False`` its last step is closed by it.
        terminated : bool, optional
            False: the completions were cut off. Default: what a row says, else True.
        field : str
            Field of the completion in place of ``completion`` (``chosen``, say).
        on_error : {"raise", "skip"}
            What to do with a bad row or a score that is not finite: raise an error that names it,
            or give it NaN and the reason.
        names : sequence of str, optional
            How to call the rows in errors; default ``row 0``, …
        progress : callable, optional
            Called with the number of texts of each batch done.

        Returns
        -------
        Scores or TokenScores
            In input order, the latter of an outcome or process model. A row that was dropped for
            its length has NaN and the reason.

        Raises
        ------
        CompanionError
            With ``on_error="raise"``.
        ServiceError
            If a model on a server cannot be asked, with ``on_error="skip"`` too: a server that is
            gone is no bad row.
        """
        prepared = self.prepare(rows, terminated=terminated, fields=[field], names=names)
        values = self._run(prepared, on_error, progress)
        return self.finish(prepared, values, on_error=on_error)

    def score_pairs(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        on_error: OnError = "raise",
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> PairScores:
        """Score ``chosen`` and ``rejected`` of each row (with ``prompt`` or without).

        A pair of which one side is too long has NaN on both, and a reason. Parameters as in
        :meth:`score`.
        """
        prepared = self.prepare(rows, fields=["chosen", "rejected"], names=names)
        values = self._run(prepared, on_error, progress)
        return self.finish_pairs(prepared, values, on_error=on_error)

    async def score_async(self, rows: Sequence[Row], **settings: Any) -> ScoresT:
        """:meth:`score`, awaited: it runs in a thread, and the event loop goes on.

        `settings` are those of :meth:`score`; ``progress`` is called in the loop's thread. If the
        task is cancelled, the thread ends: with a model here at the next batch, with one on a
        server at once, and the connection is closed.
        """
        return await in_thread(self.score, rows, executor=self._threads(), **settings)

    async def score_pairs_async(
        self, rows: Sequence[Mapping[str, Any]], **settings: Any
    ) -> PairScores:
        """:meth:`score_pairs`, awaited, as :meth:`score_async`."""
        return await in_thread(self.score_pairs, rows, executor=self._threads(), **settings)

    def _threads(self) -> Executor | None:
        """Where awaited calls run; None: the event loop's own threads."""
        return None

    def as_reward_func(self, **settings: Any) -> RewardFunction:
        """This scorer as a reward function for TRL's ``GRPOTrainer`` and ``RLOOTrainer``.

        TRL 1.16 has no PPO trainer; trl #7020 removed it.

        Parameters
        ----------
        **settings
            Those of :class:`companion.scoring.RewardFunction`: ``transform``,
            ``clip``, ``truncated``, ``eos_token_ids``, ``policy``, ``name``.
        """
        return RewardFunction(self, **settings)

    def as_async_reward_func(self, **settings: Any) -> AsyncRewardFunction:
        """The same as a coroutine, which TRL awaits together with other reward functions.

        Parameters
        ----------
        **settings
            As in :meth:`as_reward_func`.
        """
        return AsyncRewardFunction(self.as_reward_func(**settings))

    # ------------------------------------------------------------------ token ids

    def score_encoded(
        self,
        encoded: Sequence[Encoded | EncodedSteps | Sequence[int]],
        *,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Score token ids, ``[N]`` float64 in input order.

        An outcome model needs :class:`Encoded`, which says where the completion begins, a process
        model :class:`companion.formatting.EncodedSteps`.

        Raises
        ------
        ReadoutError
            If a score is not finite; it names the first such text and their number.
        ModelError
            If a text is longer than the model has positions.
        """
        reading = reading_of(self.readout)
        names = [f"text {index}" for index in range(len(encoded))]
        texts = [reading.text(item, name) for item, name in zip(encoded, names, strict=True)]
        prepared = self._prepared([[text] for text in texts], 1, names)
        limit, limited = self._limit()
        for name, text in zip(names, texts, strict=True):
            if limit is not None and len(ids_of(text)) > limit:
                raise ModelError(
                    f"{name} has {len(ids_of(text))} tokens, {limited} {limit}",
                    f"format with max_length={limit}",
                )
        values = self._run(prepared, "raise", progress)
        return self._read_rows(prepared, values, "raise")[0][:, 0]

    def logits(
        self, texts: Sequence[EncodedSteps], *, progress: Progress | None = None
    ) -> list[torch.Tensor]:
        """Logits ``[places, labels]`` (float32, on the CPU) of an outcome or process model."""
        found = self._values([ids_of(t) for t in texts], [t.ends for t in texts], progress)
        labels = self.readout.labels
        return [
            torch.full((len(text.ends), labels), torch.nan) if isinstance(own, NoValue) else own
            for text, own in zip(texts, found, strict=True)
        ]

    def prepare(
        self,
        rows: Sequence[Row],
        *,
        terminated: bool | None = None,
        fields: Sequence[str] = ("completion",),
        names: Sequence[str] | None = None,
    ) -> Prepared:
        """Rows as token ids, for one who runs them elsewhere: a server's queue. Chapter 6.

        :meth:`score` is this, then :meth:`values` of ``prepared.texts``, then :meth:`finish`.

        Parameters
        ----------
        rows, terminated, names
            As in :meth:`score`; a row may also be :class:`companion.formatting.Encoded` (for an
            outcome or process model ``EncodedSteps``): token ids.
        fields : sequence of str
            The field of the completion; or ``("chosen", "rejected")``, both sides of a pair.
        """
        rows, names = _named_rows(rows, names)
        reading = reading_of(self.readout)
        words = [i for i, row in enumerate(rows) if not isinstance(row, Text)]
        encoded = reading.encode(
            self.formatter,
            [rows[i] for i in words],
            [names[i] for i in words],
            list(fields),
            terminated,
        )
        found: list[Any] = [
            [reading.text(row, name)] if isinstance(row, Text) else row
            for row, name in zip(rows, names, strict=True)
        ]
        for i, texts in zip(words, encoded, strict=True):
            found[i] = texts
        return self._prepared(found, len(fields), names)

    def values(self, texts: Sequence[Text], *, progress: Progress | None = None) -> Sequence[Any]:
        """What the model says of texts: a scalar each, or logits ``[places, labels]``."""

        def run(own: Sequence[Text]) -> Sequence[Any]:
            scalar = isinstance(self.readout, ScalarReadout)
            places = None if scalar else [text.ends for text in own]  # type: ignore[union-attr]
            return self._values([ids_of(text) for text in own], places, progress)

        return across_processes(texts, run, self.processes)

    def check(self, texts: Sequence[Text]) -> None:
        """Refuse texts of which one would end a whole batch with an error.

        Raises
        ------
        CompanionError
            For an empty text, or places that it does not have; here also for ids that the model
            does not know, a text that ends with the pad id, and two BOS.
        """
        for text in texts:
            n = len(ids_of(text))
            if not n:
                raise DataError("the text has no tokens")
            if isinstance(text, EncodedSteps) and not text.ends:
                raise DataError("the text has no places to read", "name at least one of its tokens")
            if isinstance(text, EncodedSteps) and not all(0 <= at < n for at in text.ends):
                raise DataError(f"places {list(text.ends)} in a text of {n} tokens")

    def finish(
        self, prepared: Prepared, values: Sequence[Any], *, on_error: OnError = "skip"
    ) -> ScoresT:
        """Scores of prepared rows (one text each) from the values of their texts, in order.

        With ``on_error="raise"`` a value that is not finite is a :class:`ReadoutError`.
        """
        raw, lengths, reasons, found = self._read_rows(prepared, values, on_error)
        reading = reading_of(self.readout)
        read = [
            None if value is None else (texts[0], value[0])  # type: ignore[index]
            for texts, value in zip(prepared.found, found, strict=True)
        ]
        scores: Any = reading.scores(raw[:, 0], lengths[:, 0], reasons, read)  # type: ignore[arg-type]
        return scores.against(self.reference)  # type: ignore[no-any-return]

    def finish_pairs(
        self, prepared: Prepared, values: Sequence[Any], *, on_error: OnError = "skip"
    ) -> PairScores:
        """As :meth:`finish`, of rows with two texts each."""
        raw, lengths, reasons, _ = self._read_rows(prepared, values, on_error)
        return PairScores(raw[:, 0], raw[:, 1], lengths[:, 0], lengths[:, 1], reasons)

    # ------------------------------------------------------------------ inside

    @abstractmethod
    def _values(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None,
        progress: Progress | None,
    ) -> Sequence[Any]:
        """Of each text its scalar, or with `places` its logits there, ``[places, labels]``.

        Or a :class:`companion.scoring.reading.NoValue`.
        """

    def _limit(self) -> tuple[int | None, str]:
        """Longest text that has a score, in tokens, and the words before this number."""
        return self.max_positions, "the model has positions for"

    def _prepared(self, found: Found, width: int, names: Sequence[str]) -> Prepared:
        """Which rows of `width` texts each are run, and why the others are not."""
        reasons: list[str | None] = [None] * len(found)
        limit, limited = self._limit()
        kept: list[int] = []
        texts: list[Text] = []
        for index, row in enumerate(found):
            if isinstance(row, CompanionError):
                reasons[index] = row.what
            elif row is None:
                reasons[index] = f"longer than max_length={self.formatter.max_length} tokens"
            elif limit is not None and (longest := max(len(ids_of(t)) for t in row)) > limit:
                reasons[index] = f"{longest} tokens, {limited} {limit}"
            else:
                kept.append(index)
                texts += row
        return Prepared(found, width, list(names), reasons, kept, texts)

    def _refuse_bad(self, prepared: Prepared) -> None:
        """Raise for the first row that cannot be scored; what was dropped on purpose is none."""
        for row, name, reason in zip(prepared.found, prepared.names, prepared.reasons, strict=True):
            if isinstance(row, CompanionError):
                raise row
            if row is not None and reason is not None and self.formatter.overlong == "error":
                raise DataError(f"{name}: {reason}", "shorten the text")

    def _read_rows(
        self, prepared: Prepared, values: Sequence[Any], on_error: OnError
    ) -> tuple[np.ndarray, np.ndarray, list[str | None], list[list[Any] | None]]:
        """Scores and lengths ``[N, width]``, reasons, and values of the rows."""
        reading = reading_of(self.readout)
        rows, width = len(prepared.found), prepared.width
        raw = np.full((rows, width), np.nan)
        lengths = np.zeros((rows, width), dtype=np.int64)
        reasons = list(prepared.reasons)
        read: list[list[Any] | None] = [None] * rows
        failed: list[int] = []
        cure: str | None = self._cure_of_nan
        for place, index in enumerate(prepared.kept):
            part = slice(place * width, (place + 1) * width)
            own = list(values[part])
            if not all(bool(np.isfinite(np.asarray(value)).all()) for value in own):
                missing = next((value for value in own if isinstance(value, NoValue)), None)
                if missing is not None and not failed:
                    cure = None  # (the reason is not ours)
                failed.append(index)
                reasons[index] = reading.not_finite(own) if missing is None else missing.reason
                continue
            read[index] = own
            raw[index] = [reading.score(value) for value in own]
            lengths[index] = [len(ids_of(text)) for text in prepared.texts[part]]
        if failed and on_error == "raise":
            raise ReadoutError(
                f"{prepared.names[failed[0]]}: {reasons[failed[0]]}; {len(failed)} such in all",
                cure,
            )
        return raw, lengths, reasons, read

    def _run(
        self, prepared: Prepared, on_error: OnError, progress: Progress | None
    ) -> Sequence[Any]:
        """The values of the rows; with "raise", the first row that has none is an error."""
        if on_error not in ("raise", "skip"):
            raise DataError(f"on_error is {on_error!r}", "use 'raise' or 'skip'")
        if on_error == "raise":
            self._refuse_bad(prepared)
        return self.values(prepared.texts, progress=progress)


def _named_rows(rows: Any, names: Sequence[str] | None) -> tuple[list[Any], Sequence[str]]:
    """A list of rows; a single text or row handed over by mistake is an error, not 20 letters."""
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(
            f"score takes a list of rows, not one {type(rows).__name__}", "wrap it: score([row])"
        )
    listed = list(rows)
    if listed and all(isinstance(r, Mapping) and {"role", "content"} <= set(r) for r in listed):
        raise DataError(
            "score takes a list of rows, and this is one list of messages",
            "wrap it: score([messages])",
        )
    return listed, names if names is not None else [f"row {i}" for i in range(len(listed))]


# ---------------------------------------------------------------------- models of this process


class LocalScorer(Scorer[ScoresT]):
    """A scorer with the model in this process: batches by tokens, no gradient, fp32 head.

    Packing, the last layer and eval mode are switched on the model itself, so a batch holds the
    model's lock (:func:`companion.models.locking.lock_of`) while it runs: scorers in other threads
    wait for it, a batch at a time, and the model is then as it was. A thread that *trains* or
    generates with the model does not ask for that lock; let it not score meanwhile.
    """

    _kinds: ClassVar[tuple[str, ...]]
    _wrong_kind: ClassVar[tuple[str, str]]

    def __init__(
        self,
        reward_model: RewardModel,
        readout: Readout | None = None,
        *,
        max_tokens_per_batch: int | None = None,
        max_rows_per_batch: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        packing: Packing = "auto",
    ) -> None:
        readout = readout or reward_model.readout
        if readout is None or readout.kind not in self._kinds:
            what, cure = self._wrong_kind
            raise ModelError(f"the reward model {what}", cure)
        super().__init__(reward_model, readout, positions_of(reward_model.model.config))
        self.reward_model = reward_model
        self._runner = BatchRunner(
            reward_model.model,
            reward_model.pad_token_id,
            max_tokens=max_tokens_per_batch,
            max_rows=max_rows_per_batch,
            packing=packing,
            padding_side=padding_side,
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        max_tokens_per_batch: int | None = None,
        packing: Packing = "auto",
        max_length: int | None = None,
        overlong: Overlong | None = None,
        text: TextMode | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        read_as: ReadAs | None = None,
        device_map: Any = None,
        load_in_4bit: bool = False,
    ) -> Self:
        """Load a reward model for scoring.

        Parameters
        ----------
        device : str, optional
            Default: the GPU if there is one.
        dtype : torch.dtype or str, optional
            Default 'auto': bfloat16 on a GPU that has it, else float32. In half precision a score
            moves with its batch.
        max_tokens_per_batch, packing
            As for the class.
        max_length, overlong, text
            In place of what the manifest says; see :class:`companion.formatting.RewardFormatter`.
        read_as : ReadAs, optional
            How to read a checkpoint that others published, where its files do not say so.
        device_map, load_in_4bit
            As in :func:`companion.models.load_reward_model`.

        Raises
        ------
        ModelError
            For a folder of another kind, which names the class to take.
        """
        cls._check_kind(path_or_id, revision, read_as)
        device = chosen_device(device)
        reward_model = load_reward_model(
            path_or_id,
            device=device,
            dtype=resolve_dtype(dtype, device),
            revision=revision,
            trust_remote_code=trust_remote_code,
            read_as=read_as,
            device_map=device_map,
            load_in_4bit=load_in_4bit,
        )
        reward_model.read_texts(max_length, overlong, text)
        scorer = cls(reward_model, max_tokens_per_batch=max_tokens_per_batch, packing=packing)
        reward_model.notes += scorer._runner.notes()
        if read_as is not None and read_as.readout is not None:
            reward_model.notes += readout_notes(scorer)
        return scorer

    @classmethod
    def _check_kind(
        cls, path_or_id: str | os.PathLike[str], revision: str | None, read_as: ReadAs | None
    ) -> None:
        if model_kind(path_or_id, revision=revision, read_as=read_as) not in cls._kinds:
            what, cure = cls._wrong_kind
            raise ModelError(f"{os.fspath(path_or_id)}: {what}", cure)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.reward_model.model.parameters()).device

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of all texts of the last call, and tokens that were computed for them.

        Fewer are computed where prefixes are shared, more where there is padding. With several
        threads, of the call that ended last.
        """
        return self._runner.tokens

    @property
    def batch_tokens(self) -> int:
        """Budget of a batch, in computed tokens; on CUDA it follows the free memory."""
        return self._runner.max_tokens or default_token_budget(self.reward_model.model)

    def run_alone(self) -> None:
        """Run each text alone from now on: its score is then the same to the last bit, always."""
        self._runner.max_rows = 1

    @property
    def packs(self) -> bool:
        """Whether batches are packed, without padding."""
        return self._runner.packs

    def check(self, texts: Sequence[Text]) -> None:
        """As :meth:`Scorer.check`; also ids that the model has no embedding for."""
        super().check(texts)
        if texts:
            rows = self.reward_model.model.get_input_embeddings().weight.shape[0]
            for text in texts:
                least, most = min(ids_of(text)), max(ids_of(text))
                if least < 0 or most >= rows:
                    wrong = least if least < 0 else most
                    raise DataError(
                        f"the token id {wrong} is not one of the model's {rows}",
                        "make the ids with the model's own tokenizer",
                    )
            check_texts([ids_of(text) for text in texts], self.reward_model.model.config)

    def fingerprint(self) -> str:
        """Of the model; see :func:`companion.models.checkpoint.model_fingerprint`."""
        return model_fingerprint(self.reward_model.model)

    def _values(
        self,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]] | None,
        progress: Progress | None,
    ) -> Sequence[Any]:
        if places is None:
            return self._runner.run(ids, progress).tolist()  # type: ignore[no-any-return]
        return self._runner.run_tokens(ids, places, progress)


class RewardScorer(LocalScorer[Scores]):
    """Scores with one reward model: token-budget batches, no gradient, eval mode, fp32 head.

    It may be called from several threads, and share its model with other scorers: one batch at a
    time runs in a model. What trains or generates with the same model in another thread does not
    wait, and is not waited for.

    Parameters
    ----------
    reward_model : RewardModel
        From :func:`companion.models.load_reward_model`, or one in training (it is put into
        eval mode while it scores, and back).
    readout : ScalarReadout, optional
        Default: the model's.
    max_tokens_per_batch : int, optional
        Budget for the computed tokens of a batch; default 2,048 on a CPU, on CUDA what the free
        memory holds. A batch that does not fit is tried again with half of them.
    max_rows_per_batch : int, optional
        Most rows of a batch.
    padding_side : {"right", "left"}
        Of batches that are padded. Makes no difference to the scores; right is faster.
    packing : {"auto", "off"}
        "auto": no padding, and a prompt that several texts share is computed once, where that is
        exact for the model; the others are padded, and the log says why.
    """

    _kinds = ("scalar",)
    _wrong_kind = (
        "holds a model with a value for each token, not one for a text",
        "load it with companion.scoring.TokenScorer",
    )


class TokenScorer(LocalScorer[TokenScores]):
    """Scores with one outcome or process model: values of tokens or steps, and their aggregate.

    As :class:`RewardScorer`, with its parameters and its safety: each text's values depend on that
    text alone, and what a value means is said by the manifest. Chapter 3.
    """

    readout: TokenReadout
    _kinds = ("outcome", "process")
    _wrong_kind = (
        "holds a reward model with one score a text, no outcome or process model",
        "load it with companion.scoring.RewardScorer",
    )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        aggregation: How | None = None,
        step_score: Literal["good", "expected"] | None = None,
        **settings: Any,
    ) -> Self:
        """Load an outcome or process model that the companion saved.

        Parameters
        ----------
        aggregation, step_score : optional
            In place of what the manifest says.
        **settings
            As for :meth:`RewardScorer.from_pretrained`.

        Raises
        ------
        ModelError
            For a folder of another kind, which names the class to take.
        """
        scorer = super().from_pretrained(path_or_id, **settings)
        given = {"aggregation": aggregation, "step_score": step_score}
        changes: Any = {name: value for name, value in given.items() if value is not None}
        scorer.readout = replace(scorer.readout, **changes)
        return scorer

    @classmethod
    def _check_kind(
        cls, path_or_id: str | os.PathLike[str], revision: str | None, read_as: ReadAs | None
    ) -> None:
        kind = model_kind(path_or_id, revision=revision, read_as=read_as)
        if kind == "scalar" and manifest_of(resolve(path_or_id), revision) is None:
            raise ModelError(
                f"{os.fspath(path_or_id)}: no {MANIFEST_FILE}: nothing says what the values of its "
                "tokens mean",
                "give a folder that 'companion train outcome' or 'companion train process' wrote; "
                "of a published process model, name what ends a step (--step_separator)",
            )
        super()._check_kind(path_or_id, revision, read_as)


def positions_of(config: Any) -> int | None:
    """Longest text that a model of this configuration has positions for."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None)
    if isinstance(value, int) and text.model_type in _COUNT_FROM_PAD:
        value -= (text.pad_token_id or 0) + 1
    return value if isinstance(value, int) and value > 0 else None


def model_kind(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    read_as: ReadAs | None = None,
) -> str:
    """``outcome`` or ``process`` for such a model, ``scalar`` for any other; reads no weights.

    Raises
    ------
    ModelError
        For a folder that holds no model, or a damaged manifest.
    """
    name = resolve(path_or_id)
    manifest = manifest_of(name, revision)
    if manifest is not None:
        return manifest.kind
    return "scalar" if is_adapter(name, revision) else kind_of(name, revision, read_as or ReadAs())


def readout_notes(scorer: LocalScorer[Any]) -> list[str]:
    """What it changes, on the golden texts, to read at the EOS or before it. Chapter 2.

    Returns
    -------
    list of str
        One line, or none if the model has no such choice.
    """
    readout, eos = scorer.readout, scorer.tokenizer.eos_token_id
    if not isinstance(readout, ScalarReadout) or readout.finished:
        return []
    encoded = [item for item in scorer.formatter.try_encode_many(ROWS) if isinstance(item, Encoded)]
    scorer.formatter.reset_counts()
    ended = [item.input_ids for item in encoded if item.input_ids[-1] == eos]
    if not ended:
        return ["none of the golden texts ends with the EOS: both read-outs are the same for them"]
    at, before = (scorer._runner.run(ids) for ids in (ended, [without_end(i, eos) for i in ended]))
    named = "transformers" if readout.skipped is not None else "mask"
    return [
        f"read as {named!r}: on {len(ended)} texts of the golden ones a score at the EOS and one "
        f"before it differ by up to {np.abs(at - before).max():.3g}, where scores have a standard "
        f"deviation of {(before if readout.skipped is not None else at).std():.3g}"
    ]


def load_scorer(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    read_as: ReadAs | None = None,
    **settings: Any,
) -> RewardScorer | TokenScorer:
    """Load a reward model of any kind for scoring. Chapter 3.

    Parameters
    ----------
    path_or_id : str or path
        Folder or hub id.
    revision : str, optional
        Branch, tag or commit of a hub id.
    read_as : ReadAs, optional
        How to read a checkpoint that others published, where its files do not say so.
    **settings
        Those of :meth:`RewardScorer.from_pretrained`.

    Returns
    -------
    RewardScorer or TokenScorer
        The second for outcome and process models.

    Raises
    ------
    ModelError
        For a folder that holds no reward model, or a damaged one.
    """
    kind = model_kind(path_or_id, revision=revision, read_as=read_as)
    scorer = RewardScorer if kind == "scalar" else TokenScorer
    return scorer.from_pretrained(path_or_id, revision=revision, read_as=read_as, **settings)
