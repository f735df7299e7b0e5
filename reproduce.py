"""The experiments as data: run them, compare and verify runs, and render the tables of the READMEs.

    python reproduce.py --demo                    # try everything out, offline, in a folder of its own
    python reproduce.py 8 9                       # run experiments 8 and 9
    python reproduce.py                           # run all experiments that are not recorded yet
    python reproduce.py --compare RUN_A RUN_B     # is one of two runs significantly better?
    python reproduce.py --verify RUN              # does a record agree with its predictions, data and code?
    python reproduce.py --update_readme           # render tables and figures from the records

Every measured number in a table comes from a record under results/; a dash means that there is none.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from finetuning.cli import ArgumentParser, note, run, seed_number, user_path
from finetuning.demo import ENCODER, GPT, demo_table, write_inputs
from finetuning.errors import UserError
from finetuning.files import sha256, written_whole
from finetuning.interrupts import Terminated
from finetuning.machine import versions
from finetuning.plots import draw_demo, draw_rows, draw_run
from finetuning.records import RECORD, read_record
from finetuning.report import (
    code_block,
    comparison,
    log_section,
    recorded,
    resolution,
    results_table,
    splits_table,
    times_table,
    update,
)
from finetuning.reviews import csv_paths, read_reviews
from finetuning.verification import Check, verify_record

ROOT = Path(__file__).parent
SEED = 123
SHOWN_DISAGREEMENTS, PREVIEW_CHARS = 10, 100
STATUS = {True: "ok", False: "FAILED", None: "not checked"}
PICTURE = Path("results") / "accuracy_against_time.svg"
BENCHMARKS = Path("benchmarks") / "results.json"
README_SECTIONS = ["results", "additions", *(f"log {number}" for number in range(1, 9))]
PAGES = {  # {page: (language, sections that are rendered from the records)}
    "README.md": ("en", README_SECTIONS),
    "README.ja.md": ("ja", README_SECTIONS),
    "docs/experiments.md": ("en", ["resolution", "comparison", "splits", "log 9", "log 10", "log 11"]),
    "docs/hardware.md": ("en", ["times"]),
}


class PublishedLog(NamedTuple):
    """What a published log shows, in percent and minutes; the test accuracy, which comes last, is the Experiment's."""

    sample: tuple[float, float] | None  # accuracies of 20 batches of the training and the validation set
    minutes: float | None  # of training
    train: float
    validation: float
    losses: tuple[tuple[float, float], ...] = ()  # training and validation loss at each of report.PUBLISHED_STEPS
    dummy: tuple[float, float, float] | None = None  # the dummy classifier's accuracies, before a logistic regression's


class Experiment(NamedTuple):
    """A row of the results table."""

    number: int
    title: str  # as published
    hub_id: str | None  # of the pretrained model
    published: float | None  # test accuracy in percent; None for a row of this project's own
    log: PublishedLog | None
    command: str
    name: str  # of the run, without its seed
    benchmark: str | None = None  # its row in benchmarks/results.json
    former_name: str | None = None  # of the run, in records that were made before it was renamed
    data_dir: str = "."  # folder of the CSV files; runs on other than the published split are kept apart


# From step 4300 on, the published logs of rows 4 and 5 are swapped against the table; here these lines stand with the
# accuracies of the table, and steps 0 and 50, which are not swapped, where they were published.
PUBLISHED_SPLIT = (
    Experiment(1, "124M GPT-2 Baseline", "openai-community/gpt2", 91.88,
               PublishedLog((95.62, 95.00), 9.48, 95.64, 92.32,
                            ((3.706, 3.853), (0.682, 0.706), (0.199, 0.285), (0.188, 0.208))),
               "python train_gpt.py --trainable_layers all --num_epochs 1", "gpt2-small-124M-all", "gpt2-all"),
    Experiment(2, "340M BERT", "google-bert/bert-base-uncased", 90.89,
               PublishedLog((92.50, 88.75), 7.65, 94.35, 90.74,
                            ((0.848, 0.775), (0.655, 0.682), (0.146, 0.318), (0.204, 0.217))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model bert", "bert-all", "bert-all"),
    Experiment(3, "66M DistilBERT", "distilbert/distilbert-base-uncased", 91.40,
               PublishedLog((95.62, 91.25), 4.26, 95.30, 91.12,
                            ((0.693, 0.688), (0.452, 0.460), (0.179, 0.272), (0.199, 0.182))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model distilbert", "distilbert-all",
               "distilbert-all"),
    Experiment(4, "355M RoBERTa", "FacebookAI/roberta-large", 92.95,
               PublishedLog((92.50, 94.38), 7.20, 93.44, 93.02,
                            ((0.695, 0.698), (0.670, 0.690), (0.083, 0.098), (0.170, 0.086))),
               "python train_bert_hf.py --trainable_layers last_block --num_epochs 1 --model roberta",
               "roberta-last_block", "roberta-last_block"),
    Experiment(5, "304M DeBERTa-v3", "microsoft/deberta-v3-base", 94.69,
               PublishedLog((98.12, 96.88), 11.22, 96.23, 94.52,
                            ((0.689, 0.694), (0.673, 0.683), (0.126, 0.149), (0.211, 0.138))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model deberta-v3-base",
               "deberta-v3-base-all", "deberta-v3-base-all"),
    Experiment(6, "149M ModernBERT Base", "answerdotai/ModernBERT-base", 93.79,
               PublishedLog((95.62, 93.75), 10.27, 95.72, 94.00,
                            ((0.699, 0.698), (0.564, 0.606), (0.086, 0.168), (0.160, 0.131))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-base",
               "modernbert-base-all", "modernbert-base-all"),
    Experiment(7, "395M ModernBERT Large", "answerdotai/ModernBERT-large", 95.07,
               PublishedLog((96.88, 95.62), 27.69, 97.04, 95.30,
                            ((0.666, 0.662), (0.548, 0.556), (0.083, 0.115), (0.154, 0.116))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-large",
               "modernbert-large-all", "modernbert-large-all"),
    Experiment(8, "Logistic Regression Baseline", None, 88.85,
               PublishedLog(None, None, 99.80, 88.62, dummy=(50.01, 50.14, 49.91)),
               "python train_sklearn_logreg.py", "logreg-counts"),
    Experiment(9, "N-gram Logistic Regression", None, None, None,
               "python train_sklearn_logreg.py --features nb-ngrams", "logreg-nb-ngrams"),
    Experiment(10, "22.7M MiniLM", "sentence-transformers/all-MiniLM-L6-v2", None, None,
               "python train_bert_hf.py --model minilm --learning_rate 5e-5 --eval_freq 250",
               "minilm-all-learning_rate_5e-05", former_name="all-MiniLM-L6-v2-all-learning_rate_5e-05"),
    Experiment(11, "124M GPT-2, Muon", "openai-community/gpt2", 92.40,
               PublishedLog((98.12, 91.88), 23.01, 97.45, 92.52),
               "python train_gpt.py --trainable_layers all --num_epochs 1 --optimizer muon",
               "gpt2-small-124M-all-optimizer_muon"),
    Experiment(12, "124M GPT-2, last non-padding token", "openai-community/gpt2", None, None,
               "python train_gpt.py --trainable_layers all --num_epochs 1 --trainable_token_pos flexible",
               "gpt2-small-124M-all-trainable_token_pos_flexible", "gpt2-flexible"),
    Experiment(13, "149M ModernBERT Base, 1,024 tokens", "answerdotai/ModernBERT-base", None, None,
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-base "
               "--context_length 1024", "modernbert-base-all-context_length_1024"),
)
EXPERIMENTS = PUBLISHED_SPLIT + tuple(
    row._replace(number=14, title=f"{row.title}, official split", published=None, log=None, data_dir="official")
    for row in PUBLISHED_SPLIT if row.number in (8, 9, 10))

# The DEMO's rows stand apart, as their runs do: {name of the run: what to type, but for folders}.
DEMO_SETTINGS = "--trainable_layers all --context_length 64 --batch_size 16 --learning_rate 2e-3 --precision fp32"
DEMO = {
    "DEMO-logreg": "python train_sklearn_logreg.py",
    GPT: f"python train_gpt.py --model_size demo/{GPT} --weights random --trainable_token_pos flexible --num_epochs 7 "
         f"{DEMO_SETTINGS}",
    ENCODER: f"python train_bert_hf.py --model demo/{ENCODER} --num_epochs 3 {DEMO_SETTINGS}",
}
AFTER_THE_DEMO = f"""
All of this was DEMO data. Ask the DEMO's models about a review of your own:
  python predict.py demo/results/{ENCODER} "The plot was dull. I found the cast charming. The music is hardly rich."
The real thing begins with the real reviews (84 MB), and its quickest row:
  python download_prepare_dataset.py
  python reproduce.py 8"""


def main(argv=None):
    args = parse_args(argv)
    if args.update_readme:
        write_pages(ROOT)
    elif args.demo:
        run_demo()
    elif args.compare:
        print_comparison(*map(Path, args.compare), args.csv)
    elif args.verify:
        print_verification(Path(args.verify))
    else:
        run_rows([row for row in EXPERIMENTS if not args.rows or row.number in args.rows], args.seeds)


def parse_args(argv=None):
    parser = ArgumentParser(description="Run the experiments, compare runs, write the READMEs' tables and pictures.")
    numbers = sorted({row.number for row in EXPERIMENTS})
    parser.add_argument("rows", nargs="*", type=int, metavar="ROW",
                        help=f"rows to run, {numbers[0]} to {numbers[-1]}; what is recorded already for the same "
                             "command, data and versions is not run again (default: all)")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[SEED], metavar="SEED",
                        help="run each row once with each of these")
    parser.add_argument("--compare", nargs=2, type=user_path, metavar=("RUN_A", "RUN_B"),
                        help="compare the test predictions of two runs' folders")
    parser.add_argument("--csv", type=user_path, metavar="FILE",
                        help="with --compare: write all reviews on which the runs disagree")
    parser.add_argument("--verify", type=user_path, metavar="RUN",
                        help="check a run's record against its predictions, test.csv, command, commit and versions")
    parser.add_argument("--update_readme", action="store_true", help="render the tables and figures from results/")
    parser.add_argument("--demo", action="store_true",
                        help="try everything out on synthetic reviews, in demo/: some three minutes, no network")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(numbers):
        parser.error(f"there is no row {min(unknown)}; the rows are {numbers[0]} to {numbers[-1]}")
    if bool(args.rows) + bool(args.compare) + bool(args.verify) + args.update_readme + args.demo > 1:
        parser.error("choose one: rows to run, --compare, --verify, --update_readme or --demo")
    if args.csv and not args.compare:
        parser.error("--csv needs --compare")
    return args


def command_line(row, seed):
    """What to type for a row, as a run with this seed records it."""
    other_seed = f" --seed {seed}" if seed != SEED else ""
    other_data = f" --data_dir {row.data_dir} --output_dir {run_folder(row, seed)}" if row.data_dir != "." else ""
    return row.command + other_seed + other_data


def run_folder(row, seed):
    """A run's folder, relative to the project's."""
    return Path("results", row.data_dir, f"{row.name}-seed{seed}").as_posix()


def run_rows(rows, seeds):
    """Run what is not recorded yet, going on after a failure, and print a summary; exits with 1 if any run failed."""
    failed = []
    for row, seed in [(row, seed) for row in rows for seed in seeds]:
        command = command_line(row, seed)
        if is_recorded(row, seed):
            note(f"Row {row.number}: recorded already in {run_folder(row, seed)}")
            continue
        note(f"Row {row.number}: {command}")
        if run_command(command, ROOT / run_folder(row, seed)):
            failed.append(command)
    print(summary(rows, seeds))
    if failed:
        print("\nFailed:", *failed, sep="\n  ")
        sys.exit(1)


def run_command(command, folder, **environment):
    """Run what one would type, with these environment variables added; return its exit status.

    If an interrupted run left a checkpoint in its folder, go on from that.
    """
    resume = ["--resume"] if any(folder.glob("checkpoint*")) else []
    return run_to_end([sys.executable, *shlex.split(command)[1:], *resume], **environment)


def run_to_end(command, **environment):
    """Run a command; return its exit status. An interrupt ends it, too, but lets it save first."""
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt as error:
            if isinstance(error, Terminated):  # Ctrl-C reaches both
                process.terminate()
            process.wait()
            raise


def is_recorded(row, seed):
    """Whether there is a record of this row for the same command, data and versions; UserError if it is broken."""
    folder, paths = ROOT / run_folder(row, seed), csv_paths(ROOT / row.data_dir)
    if not (folder / RECORD).exists() or not all(path.is_file() for path in paths):
        return False
    record = read_record(folder)
    return (record["command"].removesuffix(" --resume") == command_line(row, seed)
            and record["versions"] == versions() and record["data"] == {path.name: sha256(path) for path in paths})


def summary(rows, seeds):
    """A line for each row: its test accuracy, over several seeds their mean and standard deviation."""
    lines = []
    for row in rows:
        folders = [ROOT / run_folder(row, seed) for seed in seeds]
        accuracies = [100 * read_record(folder)["accuracy"]["test"] for folder in folders if (folder / RECORD).exists()]
        result = f"{statistics.fmean(accuracies):.2f}%" if accuracies else "no record"
        if len(accuracies) > 1:
            result += f" (sd {statistics.stdev(accuracies):.2f}, {len(accuracies)} seeds)"
        lines.append(f"{row.number:>3}  {row.title:<45} {result}")
    return "\n".join(lines)


def run_demo():
    """Make the DEMO's inputs, run its rows, and end with a table, a picture and what to type next."""
    folder, picture = ROOT / "demo", ROOT / "demo" / "DEMO-curves.svg"
    note("DEMO: writing synthetic reviews, and two small models with random weights, to demo/")
    write_inputs(folder)
    for number, (name, command) in enumerate(DEMO.items(), 1):
        command += f" --data_dir demo --output_dir demo/results/{name} --save_model"
        note(f"\nDEMO {number} of {len(DEMO)}: {command}")
        if run_command(command, folder / "results" / name, HF_HUB_OFFLINE="1"):
            raise UserError(f"the DEMO stopped, for this command failed: {command}")
    records = {name: read_record(folder / "results" / name) for name in DEMO}
    draw_demo(records, picture)
    print(demo_table(records, folder), f"Picture: {picture}", AFTER_THE_DEMO, sep="\n")


def print_comparison(folder_a, folder_b, csv=None):
    """Print how two runs differ and the reviews on which their probabilities differ most; write all to `csv`."""
    lines, disagreements = comparison(folder_a, folder_b)
    print(*lines, sep="\n")
    record = read_record(folder_a)
    path = Path(record["arguments"]["data_dir"], "test.csv")
    if not path.is_file() or sha256(path) != record["data"]["test.csv"]:
        raise UserError(f"cannot show the {len(disagreements):,} reviews on which the runs disagree: "
                        f"{path} is not the file they were tested on")
    disagreements = disagreements.assign(text=read_reviews(path)["text"].loc[disagreements.index])
    distances = (disagreements["probability_a"] - disagreements["probability_b"]).abs()
    disagreements = disagreements.loc[distances.sort_values(ascending=False, kind="stable").index]
    print("\nrow\tlabel\tA\tB\treview")
    for review in disagreements.head(SHOWN_DISAGREEMENTS).itertuples():
        print(review.Index, review.label, f"{review.probability_a:.3f}", f"{review.probability_b:.3f}",
              " ".join(review.text.split())[:PREVIEW_CHARS], sep="\t")
    if csv:
        with written_whole(Path(csv)) as (temporary,):
            disagreements.to_csv(temporary, index_label="row", lineterminator="\n")
        note(f"All {len(disagreements):,} disagreements: {csv}")


def print_verification(folder):
    """Print what of a run's record holds and what does not; exit with 1 if anything does not."""
    checks = [*verify_record(folder, ROOT), verify_command(folder)]
    for check in checks:
        print(f"{STATUS[check.passed]:<11} {check.name}: {check.detail}")
    if any(check.passed is False for check in checks):
        sys.exit(1)


def verify_command(folder):
    """Check that a record's command is that of the experiment whose folder it lies in."""
    record = read_record(folder)
    command, seed = record["command"].removesuffix(" --resume"), record["arguments"].get("seed")
    by_folder = [row for row in EXPERIMENTS if seed is not None
                 and Path(folder).resolve() == (ROOT / run_folder(row, seed)).resolve()]
    by_command = [row for row in EXPERIMENTS if command == command_line(row, seed)]
    if not by_folder:
        return Check("command", False, f"this is not the folder of an experiment with seed {seed}; the command is that "
                                       f"of {numbers_of(by_command)}")
    if by_command != by_folder:
        return Check("command", False, f"{command!r} is the command of {numbers_of(by_command)}, the folder that of "
                                       f"{numbers_of(by_folder)}")
    return Check("command", True, f"that of {numbers_of(by_folder)}: {command}")


def numbers_of(rows):
    return " and ".join(f"experiment {row.number}" for row in rows) or "no experiment"


def write_pages(root):
    """Write the sections of all PAGES and the figures from the records."""
    results = root / "results"
    for page, (language, names) in PAGES.items():
        prefix = "../" * page.count("/")  # links are relative to the page
        update(root / page, {name: section(name, results, language).replace("](results/", f"]({prefix}results/")
                             for name in names})
    for row in EXPERIMENTS:
        for record in recorded(row, results):
            draw_run((root / record).parent)
    draw_rows(*points(results), root / PICTURE)


def section(name, results, language):
    """Return the Markdown between the markers of this name."""
    kind, _, number = name.partition(" ")
    if kind == "log":
        return log_section(PUBLISHED_SPLIT[int(number) - 1], results, language)
    return {"results": lambda: results_table(PUBLISHED_SPLIT[:8], results, language),
            "additions": lambda: results_table(PUBLISHED_SPLIT[8:], results, language),
            "resolution": lambda: resolution(PUBLISHED_SPLIT, worse=4, better=6),
            "comparison": lambda: comparison_section(results),
            "splits": lambda: splits_table(EXPERIMENTS, results),
            "times": lambda: times_table(EXPERIMENTS, results, results.parent / BENCHMARKS)}[kind]()


def comparison_section(results):
    """Return what --compare prints about the first records of rows 8 and 9, if both exist."""
    paths = [next(iter(recorded(PUBLISHED_SPLIT[number - 1], results)), None) for number in (8, 9)]
    if not all(paths):
        return ""
    lines, _ = comparison(*((results.parent / path).parent for path in paths))
    return code_block("\n".join(lines))


def points(results):
    """The points of the picture and a line on the rows that have none."""
    drawn, missing = [], []
    for row in PUBLISHED_SPLIT:
        records = recorded(row, results).values()
        for record in records:
            drawn.append((f"{row.number} {row.title}", record["seconds"]["training"] / 60, record["accuracy"]["test"],
                          record["test_interval_95"]))
        if row.log and row.log.minutes:
            drawn.append((f"{row.number} {row.title}", row.log.minutes, row.published / 100, None))
        elif not records:
            missing.append(str(row.number))
    return drawn, f"not measured yet, and no published time: rows {', '.join(missing)}" if missing else ""


if __name__ == "__main__":
    run(main)
