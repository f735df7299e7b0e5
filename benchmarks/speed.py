"""Time this project against a plain reference loop and the Hugging Face Trainer, and against the device's limit.

    python benchmarks/speed.py --data_dir . gpt2-all distilbert-all --peer trainer
    python benchmarks/speed.py --data_dir . --gpu

Each measurement is a process of its own: it loads the model, times training steps and evaluation,
and reports the peak memory. The implementations take turns for `--rounds` rounds, so that a machine
whose speed drifts slows all of them. The seconds of a whole run are extrapolated from its measured
parts in the proportions of the published one: 4,375 steps, 88 log lines over 2 x 160 reviews and
50,000 reviews at the end.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import download_prepare_dataset
import train_bert_hf
import train_sklearn_logreg
from benchmarks import reference, report
from benchmarks.implementations import (
    FINAL_REVIEWS,
    LOG_SAMPLE,
    measure_project,
    measure_reference,
    measure_trainer,
)
from benchmarks.timing import timed
from benchmarks.workloads import WORKLOADS
from finetuning.cli import ArgumentParser, positive_float, positive_int, run_main, user_path
from finetuning.performance.device import device_count, device_name, select_device
from finetuning.system.console import print_status
from finetuning.system.environment import git_commit, peak_rss, versions
from finetuning.system.errors import UserError

NUM_STEPS, NUM_LOG_LINES = 4_375, 88  # of a published run
IMPLEMENTATIONS = ("reference", *report.TRAINERS, *report.PROJECTS)
GPU_WORKLOADS = ("gpt2-all", "bert-all", "modernbert-base-all")
# Defaults with --gpu.
GPU_DEFAULTS = {
    "device": "cuda",
    "compile": True,
    "peer": "trainer",
    "rounds": 1,
    "steps": 30,
    "reviews": 800,
    "minutes": 10.0,
    "output": str(report.GPU_PATH),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one implementation in this process, or all of them in processes of their own."""
    args = parse_args(argv)
    if args.update_readme:
        report.update_page()
    elif args.implementation:
        print(json.dumps(measure(args)))
    else:
        run_rounds(args)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="benchmarks/speed.py", description="Time this project against a reference loop and the device's limit."
    )
    add, count = parser.add_argument, {"type": positive_int, "metavar": "N"}
    add(
        "workloads",
        nargs="*",
        type=workload_name,
        metavar="WORKLOAD",
        help=f"{', '.join(WORKLOADS)} (default: all)",
    )
    add("--data_dir", type=user_path, default=".", help="folder of the three CSV files")
    add("--archive", type=user_path, help="archive of the reviews, for the workload data")
    add("--peer", choices=["trainer"], help="also time the Hugging Face Trainer, in fp32 and in bf16; encoders only")
    add("--compile", action="store_true", help="also time the project with --compile")
    add("--rounds", **count, default=3, help="measurements of each implementation")
    add("--steps", **count, default=6, help="training steps to time, the first of them to warm up")
    add("--reviews", **count, default=160, help="reviews to evaluate")
    add("--context_length", type=positive_int, default=256, metavar="TOKENS", help="truncate reviews to this many")
    add("--device", default="auto", help="as for the train scripts")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the project")
    add("--minutes", type=positive_float, metavar="X", help="stop after this time (default: no limit)")
    add("--output", type=user_path, default=str(report.PATH), help="file for every single measurement")
    add("--gpu", action="store_true", help=f"GPT-2, BERT and ModernBERT on CUDA, with and without --compile, within "
        f"ten minutes; writes {report.GPU_PATH}")  # fmt: skip
    add("--update_readme", action="store_true", help="write the tables of benchmarks/README.md, measure nothing")
    add("--implementation", choices=IMPLEMENTATIONS, help="measure this one of one workload in this process")
    if "--gpu" in (sys.argv if argv is None else argv):
        parser.set_defaults(**GPU_DEFAULTS)
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be 2 or more: the first one warms up")
    args.workloads = args.workloads or list(GPU_WORKLOADS if args.gpu else WORKLOADS)
    return args


def workload_name(text: str) -> str:
    """Parse a name in WORKLOADS; `choices` of Python 3.11's argparse refuses an empty list."""
    if text not in WORKLOADS:
        raise ArgumentTypeError(f"must be one of {', '.join(WORKLOADS)}, not {text!r}")
    return text


def run_rounds(args: Namespace) -> None:
    """Measure all workloads, print their tables and add them to the report."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    device = select_device(args.device)
    check_single_gpu(args, device)
    environment = {
        "command": args.command,
        "hardware": device_name(device),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    rows, failed = {}, []
    for name in args.workloads:
        rounds = []
        for _ in range(args.rounds):
            measured = {}
            for implementation in implementations(args, name):
                seconds = measure_in_subprocess(args, name, implementation, deadline)
                if seconds is None:
                    failed.append(f"{name} ({implementation})")
                else:
                    measured[implementation] = seconds
                    print_status(f"{name} {implementation} {json.dumps(seconds)}")
            rounds += [measured] if "project" in measured else []
        if rounds:
            rows[name if args.precision == "auto" else f"{name}, {args.precision}"] = rounds
            report.add_report(Path(args.output), {**environment, "rows": rows})  # the next workload may take long
    print(f"{report.ratio_table(rows)}\n\n{report.utilization_table(rows)}")
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}; the others are in {args.output}")


def check_single_gpu(args: Namespace, device: torch.device) -> None:
    """Raise UserError if the Trainer, which uses all GPUs it sees, would be compared with this project on one."""
    num_gpus = device_count("cuda") if device.type == "cuda" else 0
    measured = {implementation for name in args.workloads for implementation in implementations(args, name)}
    if num_gpus > 1 and measured.intersection(report.TRAINERS):
        raise UserError(f"the Trainer of --peer would use all {num_gpus} GPUs; set CUDA_VISIBLE_DEVICES to one of them")


def implementations(args: Namespace, name: str) -> list[str]:
    """Return the implementations of a workload to measure, the project first: --minutes may end the rest."""
    workload = WORKLOADS[name]
    compiled = ["project_compiled"] if args.compile and workload.is_neural else []
    trainers = report.TRAINERS if args.peer == "trainer" and workload.script is train_bert_hf else ()
    return ["project", "reference", *compiled, *trainers]


def measure_in_subprocess(args: Namespace, name: str, implementation: str, deadline: float | None) -> dict | None:
    """Return what `measure` does, in a new process; None if it fails or does not end before the deadline."""
    command = [sys.executable, __file__, name, "--implementation", implementation]
    for key in ("data_dir", "archive", "steps", "reviews", "context_length", "device", "precision"):
        if getattr(args, key) is not None:
            command += [f"--{key}", str(getattr(args, key))]
    remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=remaining)
    except subprocess.SubprocessError as error:
        print_status(str(error))
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: Namespace) -> dict[str, float | str]:
    """Return the seconds of a workload's parts and of its whole run, and its peak memory in bytes."""
    (name,), implementation = args.workloads, args.implementation
    workload = WORKLOADS[name]
    if workload.script is download_prepare_dataset:
        return {"run": time_data(args), "peak_memory": peak_rss()}
    if workload.script is train_sklearn_logreg:
        return {"run": time_logreg(args), "peak_memory": peak_rss()}
    if implementation == "reference":
        seconds = measure_reference(args, workload)
    elif implementation in report.TRAINERS:
        seconds = measure_trainer(args, workload, precision=implementation.removeprefix("trainer_"))
    else:
        seconds = measure_project(args, workload, *(["--compile"] if implementation == "project_compiled" else []))
    return {"run": whole_run(seconds), **seconds}


def whole_run(seconds: dict) -> float:
    """Extrapolate the seconds of the published run from its measured parts."""
    return (
        seconds.get("compiling", 0)
        + seconds.get("caching", 0)
        + seconds.get("log_caching", 0)
        + NUM_STEPS * seconds["step"]
        + NUM_LOG_LINES * LOG_SAMPLE * seconds.get("log_review", seconds["review"])
        + FINAL_REVIEWS * seconds["review"]
    )


def time_data(args: Namespace) -> float:
    """Return the seconds from the archive to the CSV files."""
    with tempfile.TemporaryDirectory() as folder:
        if args.implementation == "reference":
            return timed(reference.prepare, args.archive, folder)
        return timed(download_prepare_dataset.main, ["--archive", args.archive, "--data_dir", folder])


def time_logreg(args: Namespace) -> float:
    """Return the seconds from the CSV files to the accuracies of both scikit-learn baselines."""
    if args.implementation == "reference":
        return timed(reference.logistic_regression, args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        return timed(train_sklearn_logreg.main, ["--data_dir", args.data_dir, "--output_dir", folder])


if __name__ == "__main__":
    run_main(main)
