"""What the audit says of the museum and of sound models: ``python -m benchmarks.audits``.

No clock but a record, for chapter 9: each specimen of the museum with all checks, and the reports
of models and servers that others made: the tutor's reward model and its server, two models that
stock TRL trained, with a pad token and without; with ``--stories`` the stories260k base and a fresh
head, with ``--vllm`` a real vLLM. It ends with 1 if a specimen is not caught under its name.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from benchmarks.measuring import table
from benchmarks.overoptimization import once
from benchmarks.results import add_arguments, save
from benchmarks.serving import server, vllm_server
from companion import save_reward_model
from companion.audit import (
    AuditReport,
    Specimen,
    all_specimens,
    audit,
    audit_specimen,
    tutor_reward,
)
from companion.scoring import add_golden_texts
from companion.tutor import TUTOR_BASE, make_rows


def kept(ask: Callable[[], AuditReport]) -> dict[str, Any]:
    """What a page shows of a report."""
    report = ask()
    return {
        "headline": report.headline(),
        "what": report.what,
        "protocol": report.protocol,
        "tokens": report.tokens,
        "requests": report.requests,
        "seconds": round(report.seconds, 1),
        "checks": [
            {
                "name": result.check.name,
                "verdict": result.verdict,
                **({"seen": result.outcome.seen} if result.outcome.status == "found" else {}),
            }
            for result in report.results
            if result.verdict != "not asked"
        ],
    }


def caught(specimen: Specimen, whole: bool) -> dict[str, Any]:
    """What was to find a specimen, and what did."""
    with TemporaryDirectory() as folder:
        report = audit_specimen(specimen, Path(folder), whole=whole)
    found = {r.check.name: r.verdict for r in report.results if r.outcome.status == "found"}
    faults = [name for name, verdict in found.items() if verdict == "fault"]
    return {
        "specimen": specimen.name,
        "caught by": specimen.caught_by,
        "verdict": found.get(specimen.caught_by, "MISSED"),
        "also": [name for name in faults if name in specimen.also],
        "surplus": sorted({*faults} - {specimen.caught_by, *specimen.also}),
        "tokens": report.tokens,
    }


def trained_by_trl(folder: Path, *, pad: bool) -> Path:
    """A model of stock TRL, which pads with the EOS where the tokenizer has no pad token."""
    tokenizer = AutoTokenizer.from_pretrained(TUTOR_BASE)
    if not pad:
        tokenizer.pad_token = None
    rows = make_rows("pairs", 256, seed=93)
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(
            TUTOR_BASE, num_labels=1, dtype=torch.float32
        ),
        RewardConfig(
            str(folder),
            learning_rate=1e-3,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(
            [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in rows]
        ),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def fresh_head(base: Path, folder: Path) -> Path:
    """A base with a head that nobody trained, as stock tools save it."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def subjects(
    args: argparse.Namespace, scratch: Path
) -> Iterator[tuple[str, Callable[[], AuditReport]]]:
    """Name of each model and server, and what makes its report."""
    own = scratch / "own"
    save_reward_model(tutor_reward(), own, describe=add_golden_texts)
    yield "the tutor's reward model", partial(audit, own)
    if args.quick:
        return

    def trained(folder: Path, pad: bool) -> AuditReport:
        return audit(trained_by_trl(folder, pad=pad))

    def served() -> AuditReport:
        with server(str(own), exact=False, cores=(0,)) as address:
            return audit(f"http://{address}", model=own)

    def by_vllm() -> AuditReport:
        with vllm_server(args.vllm, str(own), (0, 1)) as address:
            return audit(f"http://{address}", model=own, protocol="vllm")

    yield "its server", served
    for name, pad in (("trained by TRL", True), ("trained by TRL, no pad token", False)):
        yield name, partial(trained, scratch / f"trl-{pad}", pad)
    if args.stories:
        yield (
            "stories260k, a fresh head",
            lambda: audit(fresh_head(args.stories, scratch / "stories")),
        )
    if args.vllm:
        yield "the tutor's, by vLLM", by_vllm


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--stories", type=Path, help="folder of the stories260k base")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--work", type=Path, default=Path("runs/audits"), help="what is finished")
    args = parser.parse_args()
    if args.quick:
        args.work = args.work / "quick"
    torch.set_num_threads(args.threads or 1)
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reports, rows = {}, []
    with TemporaryDirectory() as scratch:
        for name, ask in subjects(args, Path(scratch)):
            file = args.work / f"{name.replace(' ', '_')}.json"
            reports[name] = once(file, partial(kept, ask))
            print(f"{time.process_time():6.0f} s  {name}: {reports[name]['headline']}", flush=True)
    for specimen in all_specimens()[: 2 if args.quick else None]:
        work = partial(caught, specimen, not args.quick)
        rows.append(once(args.work / "museum" / f"{specimen.name}.json", work))
        print(f"{time.process_time():6.0f} s  {rows[-1]}", flush=True)
    figures = {"reports": reports, "museum": rows}
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))
    print(f"written: {save('audits', figures, args)}")
    sys.exit(any(row["verdict"] == "MISSED" for row in rows))


if __name__ == "__main__":
    main()
