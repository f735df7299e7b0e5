"""The experiments as data: runs them, compares two runs, and makes the READMEs' tables from the records.

    python reproduce.py --demo                    # tries everything out, without network, in a folder of its own
    python reproduce.py 8 9                       # runs rows 8 and 9
    python reproduce.py                           # runs all rows that are not recorded yet
    python reproduce.py --compare RUN_A RUN_B     # is one of two runs really better?
    python reproduce.py --table                   # writes tables and pictures anew from the records

Every measured number in a table comes from a record under results/; where there is none, the
table says so.
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
from finetuning.files import sha256
from finetuning.interrupts import Terminated
from finetuning.machine import versions
from finetuning.plots import draw_demo, draw_rows, draw_run
from finetuning.records import RECORD, read_record
from finetuning.report import (
    comparison,
    logs,
    recorded,
    resolution,
    results_table,
    splits_table,
    times_table,
    update,
)
from finetuning.reviews import csv_paths, read_reviews

ROOT = Path(__file__).parent
SEED = 123
PICTURE = Path("results") / "accuracy_against_time.svg"
BENCHMARKS = Path("benchmarks") / "results.json"
PAGES = {"README.md": "en", "README.ja.md": "ja"}


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
    loads: str  # what the command loads
    published: float | None  # test accuracy in percent; None for a row of this project's own
    log: PublishedLog | None
    command: str
    name: str  # of the run, without its seed
    benchmark: str | None = None  # its row in benchmarks/results.json
    data_dir: str = "."  # folder of the CSV files; runs on other than the published split are kept apart


# From step 4300 on, the published logs of rows 4 and 5 are swapped against the table; here these lines stand with the
# accuracies of the table, and steps 0 and 50, which are not swapped, where they were published.
PUBLISHED_SPLIT = (
    Experiment(1, "124M GPT-2 Baseline", "`openai-community/gpt2`, 124.4M", 91.88,
               PublishedLog((95.62, 95.00), 9.48, 95.64, 92.32,
                            ((3.706, 3.853), (0.682, 0.706), (0.199, 0.285), (0.188, 0.208))),
               "python train_gpt.py --trainable_layers all --num_epochs 1", "gpt2-small-124M-all", "gpt2-all"),
    Experiment(2, "340M BERT", "`google-bert/bert-base-uncased`, 109.5M", 90.89,
               PublishedLog((92.50, 88.75), 7.65, 94.35, 90.74,
                            ((0.848, 0.775), (0.655, 0.682), (0.146, 0.318), (0.204, 0.217))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model bert", "bert-all", "bert-all"),
    Experiment(3, "66M DistilBERT", "`distilbert/distilbert-base-uncased`, 67.0M", 91.40,
               PublishedLog((95.62, 91.25), 4.26, 95.30, 91.12,
                            ((0.693, 0.688), (0.452, 0.460), (0.179, 0.272), (0.199, 0.182))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model distilbert", "distilbert-all",
               "distilbert-all"),
    Experiment(4, "355M RoBERTa", "`FacebookAI/roberta-large`, 355.4M", 92.95,
               PublishedLog((92.50, 94.38), 7.20, 93.44, 93.02,
                            ((0.695, 0.698), (0.670, 0.690), (0.083, 0.098), (0.170, 0.086))),
               "python train_bert_hf.py --trainable_layers last_block --num_epochs 1 --model roberta",
               "roberta-last_block", "roberta-last_block"),
    Experiment(5, "304M DeBERTa-v3", "`microsoft/deberta-v3-base`, 184.4M", 94.69,
               PublishedLog((98.12, 96.88), 11.22, 96.23, 94.52,
                            ((0.689, 0.694), (0.673, 0.683), (0.126, 0.149), (0.211, 0.138))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model deberta-v3-base",
               "deberta-v3-base-all", "deberta-v3-base-all"),
    Experiment(6, "149M ModernBERT Base", "`answerdotai/ModernBERT-base`, 149.6M", 93.79,
               PublishedLog((95.62, 93.75), 10.27, 95.72, 94.00,
                            ((0.699, 0.698), (0.564, 0.606), (0.086, 0.168), (0.160, 0.131))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-base",
               "modernbert-base-all", "modernbert-base-all"),
    Experiment(7, "395M ModernBERT Large", "`answerdotai/ModernBERT-large`, 395.8M", 95.07,
               PublishedLog((96.88, 95.62), 27.69, 97.04, 95.30,
                            ((0.666, 0.662), (0.548, 0.556), (0.083, 0.115), (0.154, 0.116))),
               "python train_bert_hf.py --trainable_layers all --num_epochs 1 --model modernbert-large",
               "modernbert-large-all", "modernbert-large-all"),
    Experiment(8, "Logistic Regression Baseline", "scikit-learn, bag of words", 88.85,
               PublishedLog(None, None, 99.80, 88.62, dummy=(50.01, 50.14, 49.91)),
               "python train_sklearn_logreg.py", "logreg-counts"),
    Experiment(9, "N-gram Logistic Regression", "scikit-learn, 1- to 3-grams weighted by naive Bayes", None, None,
               "python train_sklearn_logreg.py --features nb-ngrams", "logreg-nb-ngrams"),
    Experiment(10, "22.7M MiniLM", "the folder `all-MiniLM-L6-v2`, 22.7M", None, None,
               "python train_bert_hf.py --model all-MiniLM-L6-v2 --learning_rate 5e-5 --eval_freq 250",
               "all-MiniLM-L6-v2-all-learning_rate_5e-05"),
    Experiment(11, "124M GPT-2, Muon", "`openai-community/gpt2`, 124.4M", 92.40,
               PublishedLog((98.12, 91.88), 23.01, 97.45, 92.52),
               "python train_gpt.py --trainable_layers all --num_epochs 1 --optimizer muon",
               "gpt2-small-124M-all-optimizer_muon"),
    Experiment(12, "124M GPT-2, last real token", "`openai-community/gpt2`, 124.4M", None, None,
               "python train_gpt.py --trainable_layers all --num_epochs 1 --trainable_token_pos flexible",
               "gpt2-small-124M-all-trainable_token_pos_flexible", "gpt2-flexible"),
    Experiment(13, "149M ModernBERT Base, 1,024 tokens", "`answerdotai/ModernBERT-base`, 149.6M", None, None,
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
    if args.table:
        write_pages(ROOT)
    elif args.demo:
        run_demo()
    elif args.compare:
        print_comparison(*map(Path, args.compare))
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
                        help="compare two runs' folders, review by review")
    parser.add_argument("--table", action="store_true", help="write the tables and pictures anew from results/")
    parser.add_argument("--demo", action="store_true",
                        help="try everything out on synthetic reviews, in demo/: some three minutes, no network")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(numbers):
        parser.error(f"there is no row {min(unknown)}; the rows are {numbers[0]} to {numbers[-1]}")
    if bool(args.rows) + bool(args.compare) + args.table + args.demo > 1:
        parser.error("choose one: rows to run, --compare, --table or --demo")
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


def print_comparison(folder_a, folder_b):
    """Print how two runs differ, and the reviews on which they disagree, longest first."""
    lines, disagreements = comparison(folder_a, folder_b)
    print(*lines, sep="\n")
    record = read_record(folder_a)
    path = Path(record["arguments"]["data_dir"], "test.csv")
    if not path.is_file() or sha256(path) != record["data"]["test.csv"]:
        raise UserError(f"the {len(disagreements):,} reviews on which they disagree cannot be shown: "
                        f"{path} is not the file the runs were tested on")
    texts = read_reviews(path)["text"].loc[disagreements.index]
    print("\nrow\tlabel\tA\tB\tcharacters\treview")
    for row in texts.str.len().sort_values(ascending=False, kind="stable").index:
        review = disagreements.loc[row]
        print(row, int(review["label"]), f"{review['probability_a']:.3f}", f"{review['probability_b']:.3f}",
              len(texts[row]), " ".join(texts[row].split())[:100], sep="\t")


def write_pages(root):
    """Write the sections of both READMEs and the pictures from the records."""
    results = root / "results"
    for page, language in PAGES.items():
        update(root / page, sections(results, language))
    for row in EXPERIMENTS:
        for record in recorded(row, results):
            draw_run((root / record).parent)
    draw_rows(*points(results), root / PICTURE)


def sections(results, language):
    """What stands between the markers of a page: {name: Markdown}."""
    found = {row.number: [results.parent / path for path in recorded(row, results)] for row in PUBLISHED_SPLIT}
    return {"results": results_table(EXPERIMENTS, results, language),
            "resolution": resolution(EXPERIMENTS, worse=4, better=6, language=language),
            "splits": splits_table(EXPERIMENTS, results, language),
            "logs": logs(EXPERIMENTS, results, language),
            "times": times_table(EXPERIMENTS, results, results.parent / BENCHMARKS, language),
            "comparison": "\n".join(["```", *comparison(found[8][0].parent, found[9][0].parent)[0], "```"])
            if found[8] and found[9] else ""}


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
