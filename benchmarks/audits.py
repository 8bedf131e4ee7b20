"""What the audit says of the museum and of sound models: ``python -m benchmarks.audits``.

No clock but a record, for chapter 9: each specimen of the museum with all checks, and the reports
of models and servers that others made: the tutor's reward model and its server, two models that
stock TRL trained, with a pad token and without; with ``--stories`` the stories260k base and a fresh
head, with ``--vllm`` a real vLLM. It ends with 1 if a specimen is not caught under its name.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
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
from benchmarks.results import add_arguments, save
from benchmarks.serving import server, vllm_server
from companion import save_reward_model
from companion.audit import AuditReport, all_specimens, audit, audit_specimen, tutor_reward
from companion.scoring import add_golden_texts
from companion.tutor import TUTOR_BASE, make_rows


def kept(report: AuditReport) -> dict[str, Any]:
    """What a page shows of a report."""
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


def museum(few: bool) -> list[dict[str, Any]]:
    """Each specimen: what was to find it, and what did."""
    rows = []
    for specimen in all_specimens()[: 2 if few else None]:
        with TemporaryDirectory() as folder:
            report = audit_specimen(specimen, Path(folder), whole=not few)
        found = {r.check.name: r.verdict for r in report.results if r.outcome.status == "found"}
        expected = {specimen.caught_by, *specimen.also}
        faults = [name for name, verdict in found.items() if verdict == "fault"]
        rows.append(
            {
                "specimen": specimen.name,
                "caught by": specimen.caught_by,
                "verdict": found.get(specimen.caught_by, "MISSED"),
                "also": [name for name in faults if name in specimen.also],
                "surplus": [name for name in faults if name not in expected],
                "tokens": report.tokens,
            }
        )
        print(f"{time.process_time():6.0f} s  {rows[-1]}", flush=True)
    return rows


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


def subjects(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, AuditReport]]:
    """Name and report of each model and server."""
    own = scratch / "own"
    save_reward_model(tutor_reward(), own, describe=add_golden_texts)
    yield "the tutor's reward model", audit(own)
    if args.quick:
        return
    with server(str(own), exact=False, cores=range(torch.get_num_threads())) as address:
        yield "its server", audit(f"http://{address}", model=own)
    for name, pad in (("trained by TRL", True), ("trained by TRL, no pad token", False)):
        yield name, audit(trained_by_trl(scratch / name, pad=pad))
    if args.stories:
        yield "stories260k, a fresh head", audit(fresh_head(args.stories, scratch / "stories"))
    if args.vllm:
        with contextlib.ExitStack() as stack:
            address = stack.enter_context(vllm_server(args.vllm, str(own), (0, 1)))
            yield "the same, by vLLM", audit(f"http://{address}", model=own, protocol="vllm")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--stories", type=Path, help="folder of the stories260k base")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--subjects_only", action="store_true", help="leave the museum out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or 1)
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    reports = {}
    with TemporaryDirectory() as scratch:
        for name, report in subjects(args, Path(scratch)):
            reports[name] = kept(report)
            print(f"{time.process_time():6.0f} s  {name}: {report.headline()}", flush=True)
    rows = [] if args.subjects_only else museum(args.quick)
    figures = {"reports": reports, "museum": rows}
    print(table([{key: str(value) for key, value in row.items()} for row in rows]))
    print(f"written: {save('audits', figures, args)}")
    sys.exit(any(row["verdict"] == "MISSED" for row in rows))


if __name__ == "__main__":
    main()
