"""Measure how time and memory grow: with the number of reviews in batching, with their length in a training step.

    python benchmarks/scaling.py --data_dir .

The reviews are those of the training set, repeated as often as needed. Each measurement is a process
of its own, because a process reports only one peak memory.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pandas as pd
import torch

import train_gpt
from benchmarks.timing import timed
from finetuning.cli import ArgumentParser, positive_int, run_main, user_path
from finetuning.data.batching import IMDbDataset, batches_by_token_budget, shuffled_batches
from finetuning.data.reviews import csv_paths, read_reviews
from finetuning.data.tokenization import EncodedReviews, load_or_tokenize
from finetuning.optimizers import build_optimizers
from finetuning.performance.device import device_name, select_device, select_precision, synchronize, tune_malloc
from finetuning.performance.gpt_classifier import GPTClassifier
from finetuning.performance.inference import EVAL_TOKENS_PER_BATCH, Classifier
from finetuning.system.console import print_status
from finetuning.system.environment import git_commit, peak_rss, versions
from finetuning.system.files import atomic_write
from finetuning.training import batch_loss

CONTEXT_LENGTH, BATCH_SIZE = 256, 8  # as published


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one size in this process, or all of them in processes of their own."""
    args = parse_args(argv)
    if args.measure:
        kind, size = args.measure
        print(json.dumps({"reviews": measure_reviews, "tokens": measure_step}[kind](args, int(size))))
        return
    report = {
        "command": args.command,
        "hardware": device_name(select_device(args.device)),
        "versions": versions(),
        "git_commit": git_commit(),
        "reviews": [measure_in_subprocess(args, "reviews", size) for size in args.reviews],
        "tokens": [measure_in_subprocess(args, "tokens", size) for size in args.tokens],
    }
    print(f"{reviews_table(report['reviews'])}\n\n{tokens_table(report['tokens'])}")
    with atomic_write(Path(args.output)) as (temporary,):
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="benchmarks/scaling.py",
        description="Measure how time and memory grow with the number of reviews and tokens.",
    )
    add, counts = parser.add_argument, {"nargs": "+", "type": positive_int, "metavar": "N"}
    add("--data_dir", type=user_path, default=".", help="folder of the three CSV files")
    add("--reviews", **counts, default=[5_000, 50_000, 500_000], help="numbers of reviews to tokenize and batch")
    add("--tokens", **counts, default=[128, 256, 512, 1024], help="lengths of reviews in a training step of GPT-2 124M")
    add("--device", default="auto", help="as for the train scripts")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the training step")
    add("--output", type=user_path, default="benchmarks/scaling.json", help="file for the measurements")
    add("--measure", nargs=2, metavar=("KIND", "N"),
        help="only measure N reviews or tokens, in this process; KIND: reviews or tokens")  # fmt: skip
    return parser.parse_args(argv)


def measure_in_subprocess(args: Namespace, kind: str, size: int) -> dict:
    """Return the measurement of one size, made in a new process."""
    flags = ["--data_dir", args.data_dir, "--device", args.device, "--precision", args.precision]
    command = [sys.executable, __file__, "--measure", kind, str(size), *flags]
    line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    print_status(f"{kind} {size} {line}")
    return json.loads(line)


def measure_reviews(args: Namespace, count: int) -> dict:
    """Return the seconds to tokenize reviews, to load them from the cache and to batch them, and the peak memory."""
    tokenizer = train_gpt.make_tokenizer(train_gpt.load_encoding())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.csv")
        write_repeated(read_reviews(csv_paths(args.data_dir)[0]), count, path)
        memory_before = peak_rss()
        tokenizing = timed(load_or_tokenize, path, tokenizer, CONTEXT_LENGTH)
        cached = timed(load_or_tokenize, path, tokenizer, CONTEXT_LENGTH)
        dataset = IMDbDataset(load_or_tokenize(path, tokenizer, CONTEXT_LENGTH), tokenizer.pad_token_id)
        batching = timed(collate_all, dataset)
        del dataset  # Windows cannot delete a mapped file
    return {
        "reviews": count,
        "tokenizing": tokenizing,
        "cached": cached,
        "batching": batching,
        "peak_memory": peak_rss(),
        "peak_memory_before": memory_before,
    }


def collate_all(dataset: IMDbDataset) -> None:
    """Collate the batches of an epoch and those of an evaluation."""
    training_batches = shuffled_batches(len(dataset), BATCH_SIZE)
    evaluation_batches = batches_by_token_budget(dataset.lengths, EVAL_TOKENS_PER_BATCH["cpu"])
    for indices in chain(training_batches, evaluation_batches):
        dataset.collate(indices)


def write_repeated(reviews: pd.DataFrame, count: int, path: Path) -> None:
    """Write a CSV file of `count` reviews that repeats `reviews`, without holding all of them in memory."""
    repeats, rest = divmod(count, len(reviews))
    with path.open("w", encoding="utf-8", newline="") as file:
        for i, size in enumerate([len(reviews)] * repeats + [rest]):
            reviews.head(size).to_csv(file, index=False, header=i == 0, lineterminator="\n")


def measure_step(args: Namespace, length: int) -> dict:
    """Return the seconds of a training step of GPT-2 124M, all layers, on 8 reviews, and the peak memory."""
    settings = train_gpt.parse_args(["--weights", "random", "--trainable_layers", "all"])
    tune_malloc()  # as a training run does
    model = train_gpt.instantiate_model(settings.model_size, settings.weights)
    train_gpt.replace_head(model, settings.seed)
    device = select_device(args.device)
    precision, _ = select_precision(args.precision, device)
    classifier = Classifier(GPTClassifier(model).to(device).train(), train_gpt.last_token_logits, device, precision)
    (optimizer,) = build_optimizers("adamw", model, settings.learning_rate)
    ids = torch.randint(50_257, (BATCH_SIZE * length,)).numpy()
    lengths = np.full(BATCH_SIZE, length)
    batch = IMDbDataset(EncodedReviews(ids, lengths, lengths % 2), pad_token_id=0).collate(range(BATCH_SIZE))

    def step():
        batch_loss(batch, classifier).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)

    seconds = [timed(step) for _ in range(4)][1:]  # the first step also allocates the optimizer's state
    return {"tokens": length, "step": statistics.median(seconds), "precision": precision, "peak_memory": peak_rss()}


def reviews_table(rows: list[dict]) -> str:
    """Return the Markdown table of seconds and memory by the number of reviews."""
    lines = [
        "| reviews | tokenizing | from the cache | batching | peak memory | of which for reviews |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['reviews']:,} | {row['tokenizing']:.1f} s | {row['cached']:.2f} s | {row['batching']:.1f} s | "
        f"{row['peak_memory'] / 1e9:.2f} GB | {(row['peak_memory'] - row['peak_memory_before']) / 1e9:.2f} GB |"
        for row in rows
    ]
    return "\n".join(lines)


def tokens_table(rows: list[dict]) -> str:
    """Return the Markdown table of seconds and memory of a training step by the length of the reviews."""
    lines = ["| tokens | training step | for 1,000 tokens | peak memory |", "|---|---|---|---|"]
    lines += [
        f"| {row['tokens']:,} | {row['step']:.2f} s | {row['step'] / row['tokens'] / BATCH_SIZE * 1e6:.0f} ms | "
        f"{row['peak_memory'] / 1e9:.2f} GB |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
