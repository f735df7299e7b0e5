"""Run the experiments, compare and verify runs, and render the tables of the READMEs.

    python reproduce.py --demo                    # a demo on synthetic reviews, offline
    python reproduce.py 8 9                       # run experiments 8 and 9
    python reproduce.py                           # run all experiments that are not recorded yet
    python reproduce.py --compare RUN_A RUN_B     # is the difference between two runs significant?
    python reproduce.py --verify RUN              # does a record match its predictions, data and code?
    python reproduce.py --update_readme           # render tables and figures from the records

Every measured number in a table comes from a record under results/; a dash means that there is none.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuning.cli import ArgumentParser, run_main, seed_int, user_path
from finetuning.data.reviews import csv_paths, read_reviews
from finetuning.demo import ENCODER, GPT, demo_table, write_inputs
from finetuning.reporting.comparison import compare_runs
from finetuning.reporting.experiments import EXPERIMENTS, PREPARE_COMMANDS, SEED, Experiment
from finetuning.reporting.pages import write_pages
from finetuning.reporting.plots import plot_demo
from finetuning.reporting.records import RECORD, essential_flags, read_record
from finetuning.reporting.verification import check_command, verify_record
from finetuning.system.console import print_status
from finetuning.system.environment import versions
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write, sha256
from finetuning.system.signals import signal_number

ROOT = Path(__file__).parent
MAX_DISAGREEMENTS, PREVIEW_CHARS = 10, 100
STATUS = {True: "ok", False: "FAILED", None: "not checked"}

# {name of the run: command without folders}; these runs never enter the tables.
DEMO_FLAGS = "--trainable_layers all --context_length 64 --batch_size 16 --precision fp32"
DEMO = {
    "DEMO-logreg": "python train_sklearn_logreg.py",
    GPT: f"python train_gpt.py --model_size demo/{GPT} --weights random --trainable_token_pos flexible --num_epochs 7 "
    f"--learning_rate 2e-3 {DEMO_FLAGS}",
    ENCODER: f"python train_bert_hf.py --model demo/{ENCODER} --num_epochs 3 --learning_rate 1e-3 {DEMO_FLAGS}",
}
NEXT_STEPS = f"""
All of this was demo data. To classify a review of your own with a demo model:
  python predict.py demo/results/{ENCODER} "The plot was dull. I found the cast charming. The music is hardly rich."
To download the real reviews (84 MB) and run the fastest experiment:
  python download_prepare_dataset.py
  python reproduce.py 8"""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    args = parse_args(argv)
    if args.update_readme:
        write_pages(ROOT)
    elif args.demo:
        run_demo()
    elif args.compare:
        run_a, run_b = args.compare
        print_comparison(Path(run_a), Path(run_b), args.csv)
    elif args.verify:
        print_verification(Path(args.verify))
    else:
        numbers = args.experiments
        run_experiments([each for each in EXPERIMENTS if not numbers or each.number in numbers], args.seeds)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = ArgumentParser(description="Run the experiments, compare and verify runs, update the READMEs.")
    numbers = sorted({experiment.number for experiment in EXPERIMENTS})
    add = parser.add_argument
    skipped = "those recorded with the same command, data and versions are skipped"
    experiments = f"experiments to run, {numbers[0]} to {numbers[-1]} (default: all, days on a CPU); {skipped}"
    add("experiments", nargs="*", type=int, metavar="N", help=experiments)
    add("--seeds", nargs="+", type=seed_int, default=[SEED], metavar="SEED", help="run each experiment with each seed")
    compare = "compare the test predictions in the folders of two runs"
    add("--compare", nargs=2, type=user_path, metavar=("RUN_A", "RUN_B"), help=compare)
    add("--csv", type=user_path, metavar="FILE", help="with --compare: write all reviews on which the runs disagree")
    verify = "check a run's record against its predictions, test.csv, command, commit and versions"
    add("--verify", type=user_path, metavar="RUN", help=verify)
    add("--update_readme", action="store_true", help="render the tables and figures from results/")
    add("--demo", action="store_true", help="run a demo on synthetic reviews in demo/: about a minute, offline")
    args = parser.parse_args(argv)
    if unknown := set(args.experiments) - set(numbers):
        parser.error(f"there is no experiment {min(unknown)}; choose from {numbers[0]} to {numbers[-1]}")
    if bool(args.experiments) + bool(args.compare) + bool(args.verify) + args.update_readme + args.demo > 1:
        parser.error("choose one: experiments to run, --compare, --verify, --update_readme or --demo")
    if args.csv and not args.compare:
        parser.error("--csv needs --compare")
    args.seeds = list(dict.fromkeys(args.seeds))  # each once
    return args


def run_experiments(experiments: Sequence[Experiment], seeds: Sequence[int]) -> None:
    """Run the experiments that are not recorded yet and print a summary; exit with status 1 if a run failed."""
    for experiment in experiments:
        check_data(experiment)
    failed = []
    for experiment, seed in [(experiment, seed) for experiment in experiments for seed in seeds]:
        command = experiment.command_line(seed)
        if is_recorded(experiment, seed):
            print_status(f"Experiment {experiment.number}: already recorded in {experiment.run_folder(seed)}")
            continue
        print_status(f"Experiment {experiment.number}: {command}")
        if run_command(command, ROOT / experiment.run_folder(seed)):
            failed.append(command)
    print(summary(experiments, seeds))
    if failed:
        print("\nFailed:", *failed, sep="\n  ")
        sys.exit(1)


def check_data(experiment: Experiment) -> None:
    """Raise UserError, with the command that creates them, if the CSV files of the experiment's split are missing."""
    missing = [path for path in csv_paths(ROOT / experiment.data_dir) if not path.is_file()]
    if missing:
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in missing)
        raise UserError(f"cannot find {names}; create the CSV files with: {PREPARE_COMMANDS[experiment.data_dir]}")


def is_recorded(experiment: Experiment, seed: int) -> bool:
    """Return whether there is a record of the same command, data and versions; raise UserError if it is damaged."""
    folder, paths = ROOT / experiment.run_folder(seed), csv_paths(ROOT / experiment.data_dir)
    if not (folder / RECORD).exists():
        return False
    record = read_record(folder)
    return (
        essential_flags(record["command"]) == essential_flags(experiment.command_line(seed))
        and record["versions"] == versions()
        and record["data"] == {path.name: sha256(path) for path in paths}
    )


def run_command(command: str, folder: Path, **environment: str) -> int:
    """Run a command with additional environment variables; return its exit status.

    Resume if an interrupted run left a checkpoint in `folder`.
    """
    resume = ["--resume"] if any(folder.glob("checkpoint*")) else []
    return run_process([sys.executable, *shlex.split(command)[1:], *resume], **environment)


def run_process(command: Sequence[str], **environment: str) -> int:
    """Run a process and return its exit status; if interrupted, interrupt it and wait until it has saved."""
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as error:
            # Ctrl-C reaches both processes, other signals perhaps only this one.
            if type(error) is not KeyboardInterrupt:
                process.send_signal(signal_number(error))
            process.wait()
            raise


def summary(experiments: Sequence[Experiment], seeds: Sequence[int]) -> str:
    """Return a line for each experiment: the test accuracy, or mean and standard deviation over seeds."""
    lines = []
    for experiment in experiments:
        folders = [ROOT / experiment.run_folder(seed) for seed in seeds]
        accuracies = [100 * read_record(folder)["accuracy"]["test"] for folder in folders if (folder / RECORD).exists()]
        result = f"{statistics.fmean(accuracies):.2f}%" if accuracies else "no record"
        if len(accuracies) > 1:
            result += f" (sd {statistics.stdev(accuracies):.2f}, {len(accuracies)} seeds)"
        lines.append(f"{experiment.number:>3}  {experiment.title:<45} {result}")
    return "\n".join(lines)


def run_demo() -> None:
    """Write the demo's inputs, run its commands, and print a table, the figure's path and the next steps."""
    folder, figure = ROOT / "demo", ROOT / "demo" / "DEMO-curves.svg"
    print_status("DEMO: writing synthetic reviews and two small models with random weights to demo/")
    write_inputs(folder)
    for number, (name, command) in enumerate(DEMO.items(), 1):
        command += f" --data_dir demo --output_dir demo/results/{name} --save_model"
        print_status(f"\nDEMO {number} of {len(DEMO)}: {command}")
        if run_command(command, folder / "results" / name, HF_HUB_OFFLINE="1"):
            raise UserError(f"the demo stopped because this command failed: {command}")
    records = {name: read_record(folder / "results" / name) for name in DEMO}
    plot_demo(records, figure)
    print(demo_table(records, folder), f"Figure: {figure}", NEXT_STEPS, sep="\n")


def print_comparison(folder_a: Path, folder_b: Path, csv: str | None = None) -> None:
    """Print how two runs differ and the reviews on which they disagree most; write all such reviews to `csv`."""
    text, disagreements = compare_runs(folder_a, folder_b)
    print(text)
    record = read_record(folder_a)
    path = Path(record["arguments"]["data_dir"], "test.csv")
    if not path.is_file() or sha256(path) != record["data"]["test.csv"]:
        raise UserError(
            f"cannot show the {len(disagreements):,} reviews on which the runs disagree: "
            f"{path} is missing or not the file they were tested on"
        )
    disagreements = disagreements.assign(text=read_reviews(path)["text"].loc[disagreements.index])
    distances = (disagreements["probability_a"] - disagreements["probability_b"]).abs()
    disagreements = disagreements.loc[distances.sort_values(ascending=False, kind="stable").index]
    print("\nrow\tlabel\tA\tB\treview")
    for review in disagreements.head(MAX_DISAGREEMENTS).itertuples():
        probabilities = f"{review.probability_a:.3f}\t{review.probability_b:.3f}"
        print(review.Index, review.label, probabilities, " ".join(review.text.split())[:PREVIEW_CHARS], sep="\t")
    if csv:
        with atomic_write(csv) as (temporary,):
            disagreements.to_csv(temporary, index_label="row", lineterminator="\n")
        print_status(f"All {len(disagreements):,} disagreements: {csv}")


def print_verification(folder: Path) -> None:
    """Print the checks of a run's record; exit with status 1 if a check fails."""
    checks = [*verify_record(folder, ROOT), check_command(folder, ROOT)]
    for check in checks:
        print(f"{STATUS[check.passed]:<11} {check.name}: {check.detail}")
    if any(check.passed is False for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
