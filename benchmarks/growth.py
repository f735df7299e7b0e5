"""How cost grows: with the number of reviews through tokenizing and batching, with their length through a step.

    python benchmarks/growth.py --data_dir .

The reviews are those of the training set, repeated as often as it takes. Every measurement is a
process of its own, so that its peak memory is its own, too.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train_gpt
from finetuning.batches import IMDbDataset, evaluation_order, training_order
from finetuning.cli import ArgumentParser, positive_int, run, user_path
from finetuning.files import written_whole
from finetuning.gpt_classifier import GPTClassifier
from finetuning.loop import EVALUATION_TOKENS, Classifier, calc_loss_batch
from finetuning.machine import git_commit, process_peak_memory, versions
from finetuning.optimizers import build_optimizer
from finetuning.reviews import csv_paths, read_reviews
from finetuning.runtime import hardware, keep_freed_memory, select_device, select_precision, synchronize
from finetuning.tokens import Tokens, cached_tokens

CONTEXT_LENGTH, BATCH_SIZE = 256, 8  # as published


def main(argv=None):
    args = parse_args(argv)
    if args.measure:
        kind, size = args.measure
        print(json.dumps({"reviews": measure_reviews, "tokens": measure_step}[kind](args, int(size))))
        return
    report = {"command": args.command, "hardware": hardware(select_device(args.device)), "versions": versions(),
              "git_commit": git_commit(),
              "reviews": [measure_apart(args, "reviews", size) for size in args.reviews],
              "tokens": [measure_apart(args, "tokens", size) for size in args.tokens]}
    print(f"{reviews_table(report['reviews'])}\n\n{tokens_table(report['tokens'])}")
    with written_whole(Path(args.output)) as (temporary,):
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_args(argv=None):
    parser = ArgumentParser(prog="benchmarks/growth.py",
                            description="Measure how time and memory grow with the number of reviews and tokens.")
    parser.add_argument("--data_dir", type=user_path, default=".", help="folder of the three CSV files")
    parser.add_argument("--reviews", nargs="+", type=positive_int, default=[5_000, 50_000, 500_000], metavar="N",
                        help="numbers of reviews to tokenize and batch")
    parser.add_argument("--tokens", nargs="+", type=positive_int, default=[128, 256, 512, 1024], metavar="N",
                        help="lengths to time a training step of GPT-2 124M at")
    parser.add_argument("--device", default="auto", help="as for the train scripts")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the training step")
    parser.add_argument("--output", type=user_path, default="benchmarks/growth.json", help="file for the measurements")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "N"),
                        help="one measurement, here and now: of N reviews or N tokens (default: all)")
    return parser.parse_args(argv)


def measure_apart(args, kind, size):
    """What the measurement of one size returns, in a new process."""
    command = [sys.executable, __file__, "--measure", kind, str(size), "--data_dir", args.data_dir,
               "--device", args.device, "--precision", args.precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(kind, size, done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_reviews(args, count):
    """Seconds for tokenizing `count` reviews, finding them in the cache, and padding all batches; peak memory."""
    tokenizer = train_gpt.wrap(train_gpt.load_encoding())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.csv")
        write_repeated(read_reviews(csv_paths(args.data_dir)[0]), count, path)
        before, started = process_peak_memory(), time.perf_counter()
        tokens = cached_tokens(path, tokenizer, CONTEXT_LENGTH)
        tokenized = time.perf_counter()
        tokens = cached_tokens(path, tokenizer, CONTEXT_LENGTH)
        found = time.perf_counter()
        dataset = IMDbDataset(tokens, tokenizer.pad_token_id)
        orders = training_order(len(dataset), BATCH_SIZE), evaluation_order(dataset.lengths, EVALUATION_TOKENS["cpu"])
        for indices in chain(*orders):
            dataset.batch(indices)
        batched = time.perf_counter()
        del tokens, dataset  # or Windows could not delete the mapped file
    return {"reviews": count, "tokenizing": tokenized - started, "cached": found - tokenized,
            "batching": batched - found, "peak_memory": process_peak_memory(), "peak_memory_before": before}


def write_repeated(reviews, count, path):
    """Write a CSV file of `count` reviews, going through `reviews` again and again, a part at a time."""
    whole, rest = divmod(count, len(reviews))
    with path.open("w", encoding="utf-8", newline="") as file:
        for part, size in enumerate([len(reviews)] * whole + [rest]):
            reviews.head(size).to_csv(file, index=False, header=part == 0, lineterminator="\n")


def measure_step(args, length):
    """Seconds of a training step of GPT-2 124M, all layers, on 8 reviews of `length` tokens; peak memory."""
    settings = train_gpt.parse_args(["--weights", "random", "--trainable_layers", "all"])
    keep_freed_memory()  # as a training run does
    model = train_gpt.instantiate_model(settings.model_size, settings.weights)
    train_gpt.replace_head(model, settings.seed)
    device = select_device(args.device)
    precision, _ = select_precision(args.precision, device)
    classifier = Classifier(GPTClassifier(model).to(device).train(), train_gpt.read_last, device, precision)
    optimizer = build_optimizer("adamw", model, settings.learning_rate)
    ids = torch.randint(50_257, (BATCH_SIZE * length,)).numpy()
    lengths = torch.full((BATCH_SIZE,), length).numpy()
    batch = IMDbDataset(Tokens(ids, lengths, lengths % 2), pad_token_id=0).batch(range(BATCH_SIZE))
    seconds = []
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        calc_loss_batch(batch, classifier).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    # The first step also makes the optimizer's state.
    return {"tokens": length, "step": statistics.median(seconds[1:]), "precision": precision,
            "peak_memory": process_peak_memory()}


def reviews_table(rows):
    """Markdown: seconds and memory by the number of reviews."""
    lines = ["| reviews | tokenizing | from the cache | batching | peak memory | of it for reviews |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {row['reviews']:,} | {row['tokenizing']:.1f} s | {row['cached']:.2f} s | {row['batching']:.1f} s | "
              f"{row['peak_memory'] / 1e9:.2f} GB | {(row['peak_memory'] - row['peak_memory_before']) / 1e9:.2f} GB |"
              for row in rows]
    return "\n".join(lines)


def tokens_table(rows):
    """Markdown: seconds and memory of a training step by the length of the reviews."""
    lines = ["| tokens | training step | for 1,000 tokens | peak memory |", "|---|---|---|---|"]
    lines += [f"| {row['tokens']:,} | {row['step']:.2f} s | {row['step'] / row['tokens'] / BATCH_SIZE * 1e6:.0f} ms | "
              f"{row['peak_memory'] / 1e9:.2f} GB |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
