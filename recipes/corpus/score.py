"""Score a folder of JSONL files: datatrove starts the tasks here, on SLURM or on Ray.

The same command goes on after whatever stopped it: datatrove skips the tasks that are complete, and
the others go on in the middle of their file. A file's scores appear when it is whole.

    python recipes/corpus/score.py local --model DIR --input corpus --output scores --tasks 4

SLURM and Ray: not run here. On SLURM start it on a login node; each task is a job of an array, and
each job has a GPU. Cores and memory are those of a task.
"""

from __future__ import annotations

import argparse

from datatrove.executor import (
    LocalPipelineExecutor,
    RayPipelineExecutor,
    SlurmPipelineExecutor,
)

from companion.scoring import ScoreRewards


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="score a folder of JSONL files")
    parser.add_argument("executor", choices=("local", "slurm", "ray"))
    parser.add_argument("--model", required=True, help="folder or hub id of a reward model")
    parser.add_argument("--input", required=True, help="folder of .jsonl and .jsonl.gz files")
    parser.add_argument("--output", required=True, help="folder; one .jsonl for each file")
    parser.add_argument("--tasks", type=int, required=True, help="at most one a file is of use")
    parser.add_argument("--workers", type=int, default=1, help="tasks at one time")
    parser.add_argument("--logs", help="markers, logs and counts; default: OUTPUT-logs")
    parser.add_argument("--fields", nargs="*", default=["id"], help="copied from each row")
    parser.add_argument("--partition", help="of SLURM")
    parser.add_argument("--time", default="24:00:00", help="limit of a task on SLURM")
    parser.add_argument("--cores", type=int, default=8, help="of a task on SLURM and Ray")
    parser.add_argument("--gigabytes", type=int, default=8, help="a core, on SLURM and Ray")
    args = parser.parse_args(words)
    if args.executor == "slurm" and args.partition is None:
        parser.error("SLURM needs --partition")
    return args


def main() -> None:
    args = arguments()
    # a bad row gets its 'error' in place of a score; the counts are in LOGS/stats.json
    step = ScoreRewards(args.model, args.input, args.output, fields=args.fields, on_error="skip")
    shared = {
        "tasks": args.tasks,
        "workers": args.workers,
        "logging_dir": args.logs or f"{args.output.rstrip('/')}-logs",
    }
    if args.executor == "local":
        LocalPipelineExecutor([step], **shared).run()
        return
    shared |= {"mem_per_cpu_gb": args.gigabytes}
    if args.executor == "ray":
        RayPipelineExecutor([step], cpus_per_task=args.cores, gpus_per_task=1, **shared).run()
        return
    SlurmPipelineExecutor(
        [step],
        time=args.time,
        partition=args.partition,
        cpus_per_task=args.cores,
        gpus_per_task=1,
        job_name="score",
        sbatch_args={"signal": "USR1@60"},  # a minute before the limit: it is requeued
        **shared,
    ).run()


if __name__ == "__main__":
    main()
