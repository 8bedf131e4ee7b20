"""The best of N completions of each prompt of a file, as data for fine-tuning.

Every row of the input gets a line in a file of ranks, which a stopped run goes on with. From it,
once it is whole, come the rows for fine-tuning (rejection sampling) and pairs. Chapter 5.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import PartialState

from companion.data.writing import check_output, write_rows
from companion.errors import CompanionError, DataError
from companion.formatting.conversation import as_reply, check_messages, has_text, is_messages
from companion.functional.resampling import Interval, bootstrap_interval
from companion.functional.selection import best_of_n_kl, measured_best_of_n_kl
from companion.generation.policy import Policy
from companion.layouts import read_row
from companion.models.checkpoint import model_fingerprint
from companion.scoring.files import Line, parse_line, write_in_chunks
from companion.scoring.processes import add_up_counts
from companion.scoring.reward_function import TEMPLATE_COLUMNS
from companion.scoring.scorer import OnError, Progress, Scorer
from companion.search.search import best_first


@dataclass
class RankReport:
    """What :func:`rank_file` did.

    Attributes
    ----------
    rows, resumed_at, failed : int
        Rows of the input, rows that earlier runs had done, and rows without a ranking.
    candidates, without_score, cut_off : int
        Completions; those without a score; those that were cut off.
    tied : int
        Prompts of which several completions are best; the first of them is taken.
    not_written : int
        Prompts that have no finished completion with a score, and so no row for fine-tuning.
    best, pairs : int
        Rows written for fine-tuning, and pairs.
    score_best, score_mean : float
        Mean score of the best completions, and of all.
    kl_bound, kl_measured : float
        Mean over prompts of :func:`companion.functional.best_of_n_kl` and of
        :func:`companion.functional.measured_best_of_n_kl`, in nats.
    kl_interval : companion.functional.Interval
        95% bootstrap interval over prompts of the measured one.
    """

    rows: int
    resumed_at: int
    failed: int = 0
    candidates: int = 0
    without_score: int = 0
    cut_off: int = 0
    tied: int = 0
    not_written: int = 0
    best: int = 0
    pairs: int = 0
    score_best: float = float("nan")
    score_mean: float = float("nan")
    kl_bound: float = float("nan")
    kl_measured: float = float("nan")
    kl_interval: Interval | None = None


def rank_file(
    scorer: Scorer[Any],
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    ranks_path: str | os.PathLike[str] | None = None,
    pairs_path: str | os.PathLike[str] | None = None,
    policy: Policy | None = None,
    n: int = 16,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    top_k: int = 1,
    on_error: OnError = "raise",
    overwrite: bool = False,
    chunk_rows: int = 64,
    progress: Progress | None = None,
    on_total: Progress | None = None,
    processes: PartialState | None = None,
) -> RankReport:
    """Rank N completions of each prompt, and write the best.

    Parameters
    ----------
    scorer : Scorer
        Here or on a server.
    input_path : path
        As of :func:`companion.scoring.score_file`. Each row has a ``prompt`` and, without a policy,
        ``completions``: a list of N texts or lists of messages; optionally ``terminated``, a list
        of N booleans, and ``tools`` and ``chat_template_kwargs``, which are written out with the
        best.
    output_path : path
        The best as rows of ``prompt`` and ``completion``, as TRL's ``SFTTrainer`` takes them, in
        the form (text or messages) of the input. A completion that was cut off is never among
        them: it would teach the policy to end there.
    ranks_path : path, optional
        One line a row of the input: its completions best first, with scores, ties and KL. Default:
        the output's name with ``.ranks.jsonl`` behind it.
    pairs_path : path, optional
        Best and worst finished completion as ``prompt``, ``chosen``, ``rejected``, for DPO or
        pairwise training; none where the two scores are equal.
    policy : Policy, optional
        Draws the completions.
    n, temperature, top_p, max_new_tokens, seed
        Of the policy's sampling. A row's samples depend on its prompt, its index and the seed.
    top_k : int
        How many of each prompt to write.
    on_error : {"raise", "skip"}
        A row that cannot be ranked stops the run, or gets an ``error`` in the ranks.
    overwrite, chunk_rows, progress, on_total, processes
        As in :func:`companion.scoring.score_file`.

    Raises
    ------
    DataError
        For a bad row (file and line), a setting, or ranks that belong to another run.

    Notes
    -----
    Finished completions come before those that were cut off, then the higher score, then the one
    that came first.
    """
    source, output = Path(input_path), Path(output_path)
    ranks = Path(f"{output}.ranks.jsonl" if ranks_path is None else ranks_path)
    if top_k < 1 or n < 1:
        raise DataError(f"n={n}, top_k={top_k}", "both must be at least 1")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is {on_error!r}", "use 'raise' or 'skip'")
    files = [source, *(Path(file) for file in (output, ranks, pairs_path) if file is not None)]
    for place, file in enumerate(files[1:], start=1):
        check_output(file, *files[:place], regular=True)
    sampling = {
        "n": n,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    state = {
        "model": scorer.fingerprint(),
        "formatter": scorer.formatter.fingerprint(),
        "readout": None if scorer.readout.kind == "scalar" else scorer.readout.to_dict(),
        "policy": None if policy is None else [model_fingerprint(policy.model), sampling],
        "on_error": on_error,
    }
    done = write_in_chunks(
        source,
        ranks,
        lambda chunk: _chunk_records(scorer, chunk, policy, sampling, on_error),
        state,
        overwrite=overwrite,
        chunk_rows=chunk_rows,
        progress=progress,
        on_total=on_total,
        processes=processes,
    )
    add_up_counts(scorer.formatter, processes)
    report = RankReport(done.rows, done.resumed_at)
    if processes is not None and not processes.is_main_process:
        return report  # the first process has the files
    _measure(ranks, report)
    report.best = write_rows(_best_rows(ranks, top_k), output)
    if pairs_path is not None:
        report.pairs = write_rows(_pair_rows(ranks), pairs_path)
    return report


# ---------------------------------------------------------------------- one chunk


def _chunk_records(
    scorer: Scorer[Any],
    chunk: Sequence[Line],
    policy: Policy | None,
    sampling: Mapping[str, Any],
    on_error: OnError,
) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    errors: dict[int, DataError] = {}
    for index, place in chunk:
        try:
            rows[index] = _row(parse_line(place), place[0], policy)
        except DataError as error:
            if on_error == "raise":
                raise
            errors[index] = error
    if policy is not None:
        errors |= _draw(policy, rows, sampling, on_error)
    flat = [
        {
            "prompt": row["prompt"],
            "completion": text,
            "terminated": end,
            "drawn": policy is not None,
            **_for_template(row),
        }
        for index, row in rows.items()
        if index not in errors
        for text, end in zip(row["completions"], row["terminated"], strict=True)
    ]
    names = [
        f"{row['where']}, completion {number}"
        for index, row in rows.items()
        if index not in errors
        for number in range(len(row["completions"]))
    ]
    scores = scorer.score(flat, on_error="skip", names=names)
    values, reasons = scores.raw, scores.reasons
    records, begin = [], 0
    for index, (where, _) in chunk:
        if index in errors:
            records.append({"index": index, "error": errors[index].what})
            continue
        part = slice(begin, begin + len(rows[index]["completions"]))
        begin = part.stop
        record = _record(index, rows[index], values[part], reasons[part])
        if "error" in record and on_error == "raise":
            raise DataError(f"{where}: {record['error']}")
        records.append(record)
    return records


def _for_template(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row is said to the chat template beside its messages."""
    return {key: row[key] for key in TEMPLATE_COLUMNS if row.get(key) is not None}


_FORM: Final = "write text, or a list of {role, content} messages"


def _row(row: Any, where: str, policy: Policy | None) -> dict[str, Any]:
    """Prompt, completions and whether each was ended; checked."""
    row = read_row(row, where, (), Counter(), alone=policy is not None)
    if not isinstance(row, dict) or row.get("prompt") is None:
        raise DataError(
            f"{where}: the field 'prompt' is missing or null",
            "write the prompt, or leave the row out",
        )
    prompt, completions = row["prompt"], row.get("completions")
    base: dict[str, Any] = {"prompt": prompt, "where": where, **_for_template(row)}
    if "id" in row:
        base["id"] = row["id"]
    if not isinstance(prompt, str):
        if not is_messages(prompt) or not prompt:
            raise DataError(f"{where}, 'prompt': neither text nor a list of messages", _FORM)
        base["prompt"] = check_messages(prompt, f"{where}, 'prompt'")
    if policy is not None:
        if completions is not None:
            raise DataError(
                f"{where}: has completions, and a policy is to draw them",
                "leave out --policy, or take the field 'completions' off the rows",
            )
        if seen := _for_template(row):
            raise DataError(
                f"{where}: has {' and '.join(seen)}, which a policy's prompt is written without",
                "draw the completions elsewhere, and give them in the field 'completions'",
            )
        return base
    if not isinstance(completions, list) or not completions:
        raise DataError(
            f"{where}: the field 'completions' is no list of completions",
            "give N completions in each row, or a --policy that draws them",
        )
    kinds = {isinstance(item, str) for item in completions}
    if len(kinds) > 1 or (isinstance(prompt, str) and False in kinds):
        raise DataError(f"{where}: texts and messages are mixed", "use one form for all")
    for number, item in enumerate(completions):
        if not isinstance(item, str) and (not is_messages(item) or not item):
            raise DataError(f"{where}, completion {number}: neither text nor messages", _FORM)
    ended = row.get("terminated", [True] * len(completions))
    if (
        not isinstance(ended, list)
        or len(ended) != len(completions)
        or not all(isinstance(item, bool) for item in ended)
    ):
        raise DataError(f"{where}: 'terminated' is no list of {len(completions)} true or false")
    return {**base, "completions": completions, "terminated": ended}


def _draw(
    policy: Policy,
    rows: Mapping[int, dict[str, Any]],
    sampling: Mapping[str, Any],
    on_error: OnError,
) -> dict[int, DataError]:
    """Let the policy complete the prompts, in place; errors of the rows that it cannot complete."""
    # the index is part of the seed, so a chunk's size makes no difference
    seeds = [sampling["seed"] * 2**32 + index for index in rows]
    prompts = [row["prompt"] for row in rows.values()]
    try:
        drawn = policy.sample(prompts, **{**sampling, "seed": seeds})
    except CompanionError as error:
        if len(rows) != 1:  # one by one, so that a bad prompt fails alone
            alone = (_draw(policy, {index: row}, sampling, on_error) for index, row in rows.items())
            return {index: named for errors in alone for index, named in errors.items()}
        [(index, row)] = rows.items()
        named = DataError(f"{row['where']}: {error.what}", error.cure)
        if on_error == "raise":
            raise named from error
        return {index: named}
    for row, group in zip(rows.values(), drawn, strict=True):
        row["completions"] = [sample.text for sample in group]
        row["terminated"] = [sample.terminated for sample in group]
        row["n_tokens"] = sum(sample.n_tokens for sample in group)
    return {}


def _record(
    index: int, row: Mapping[str, Any], values: np.ndarray, reasons: Sequence[str | None]
) -> dict[str, Any]:
    ended, completions = row["terminated"], row["completions"]
    record: dict[str, Any] = {"index": index}
    record |= {key: row[key] for key in ("id", "prompt", "n_tokens") if key in row}
    record |= _for_template(row)
    ranked = sorted(range(len(completions)), key=lambda i: best_first(float(values[i]), ended[i]))
    scored = [i for i in ranked if reasons[i] is None]
    if not scored:
        return {**record, "error": f"no completion has a score: {reasons[ranked[0]]}"}
    record["completions"] = [
        {
            "place": i,
            "completion": completions[i],
            "score": float(values[i]) if reasons[i] is None else None,
            "terminated": ended[i],
            **({} if reasons[i] is None else {"error": reasons[i]}),
        }
        for i in ranked
    ]
    keys = [(ended[i], float(values[i])) for i in scored]
    levels = torch.tensor([float(sorted(set(keys)).index(key)) for key in keys])
    record["n_tied"] = keys.count(keys[0])
    record["kl_bound"] = best_of_n_kl(len(scored))
    record["kl_measured"] = float(measured_best_of_n_kl(levels, len(scored)))
    return record


# ---------------------------------------------------------------------- the file of ranks


def _ranked(ranks: Path) -> Iterator[dict[str, Any]]:
    with open(ranks, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _finished(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Completions that may be trained on, best first."""
    return [
        item
        for item in record.get("completions", [])
        if item["terminated"] and item["score"] is not None and _says_something(item["completion"])
    ]


def _says_something(completion: Any) -> bool:
    return has_text(completion if isinstance(completion, str) else completion[-1].get("content"))


def _measure(ranks: Path, report: RankReport) -> None:
    """Fill in the counts and means of a file of ranks."""
    best, every, bounds, measured = [], [], [], []
    for record in _ranked(ranks):
        if "error" in record:
            report.failed += 1
            continue
        items = record["completions"]
        report.candidates += len(items)
        report.without_score += sum(item["score"] is None for item in items)
        report.cut_off += sum(not item["terminated"] for item in items)
        report.tied += record["n_tied"] > 1
        report.not_written += not _finished(record)
        scores = [item["score"] for item in items if item["score"] is not None]
        best.append(scores[0])
        every += scores
        bounds.append(record["kl_bound"])
        measured.append(record["kl_measured"])
    if best:
        report.score_best, report.score_mean = float(np.mean(best)), float(np.mean(every))
        report.kl_bound, report.kl_measured = float(np.mean(bounds)), float(np.mean(measured))
        report.kl_interval = bootstrap_interval(measured)


def _best_rows(ranks: Path, top_k: int) -> Iterator[dict[str, Any]]:
    """The best finished completions of each prompt, as ``prompt`` and ``completion``."""
    for record in _ranked(ranks):
        for item in _finished(record)[:top_k]:
            prompt = record["prompt"]
            best = {"prompt": prompt, "completion": as_reply(prompt, item["completion"])}
            yield best | _for_template(record)


def _pair_rows(ranks: Path) -> Iterator[dict[str, Any]]:
    """Best and worst finished completion of each prompt, as ``chosen`` and ``rejected``."""
    for record in _ranked(ranks):
        items = _finished(record)
        if items and items[0]["score"] > items[-1]["score"]:
            prompt = record["prompt"]
            yield {
                "prompt": prompt,
                "chosen": as_reply(prompt, items[0]["completion"]),
                "rejected": as_reply(prompt, items[-1]["completion"]),
                **_for_template(record),
            }
