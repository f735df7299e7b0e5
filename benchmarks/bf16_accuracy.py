"""Compare test accuracy after training in fp32 and in bf16: a pretrained encoder, several seeds.

    python benchmarks/bf16_accuracy.py --data_dir .

Each run is one of train_bert_hf.py on the first reviews of the training set and of the test set. The
two precisions of a seed train on the same batches, and their predictions are compared review by
review, as `reproduce.py --compare` does.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetuning.cli import ArgumentParser, positive_int, run_main, seed_int, user_path
from finetuning.data.reviews import csv_paths, read_reviews
from finetuning.reporting.records import read_predictions, read_record
from finetuning.reporting.statistics import mcnemar_test, predicted_labels
from finetuning.system.console import print_status
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write

SCRIPT = Path(__file__).parent.parent / "train_bert_hf.py"
PRECISIONS = ("fp32", "bf16")
VALIDATION_REVIEWS = 200  # for the logged losses


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each seed in each precision, print the table and write the measurements."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = {"command": args.command, **measure(args, Path(folder))}
    print(accuracy_table(report["seeds"]))
    with atomic_write(Path(args.output)) as (temporary,):
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="benchmarks/bf16_accuracy.py", description="Compare the accuracy of a pretrained model in fp32 and bf16."
    )
    add, count = parser.add_argument, {"type": positive_int, "metavar": "N"}
    add("--model", type=user_path, default="minilm", help="as for train_bert_hf.py")
    add("--data_dir", type=user_path, default=".", help="folder of the three CSV files")
    add("--seeds", nargs="+", type=seed_int, default=[123, 124, 125], metavar="SEED", help="one run per precision each")
    add("--train", **count, default=4_000, help="reviews to train on")
    add("--test", **count, default=4_000, help="reviews to test on")
    add("--context_length", type=positive_int, default=128, metavar="TOKENS", help="truncate reviews to this many")
    add("--learning_rate", default="5e-5", help="as for train_bert_hf.py")
    add("--output", type=user_path, default="benchmarks/bf16_accuracy.json", help="file for the measurements")
    return parser.parse_args(argv)


def measure(args: Namespace, folder: Path) -> dict:
    """Train with each seed in each precision, in subfolders of `folder`; return hardware, versions and results."""
    for path, count in zip(csv_paths(args.data_dir), (args.train, VALIDATION_REVIEWS, args.test), strict=True):
        read_reviews(path).head(count).to_csv(folder / path.name, index=False, lineterminator="\n")
    seeds = []
    for seed in args.seeds:
        runs = {precision: train(args, folder, seed, precision) for precision in PRECISIONS}
        seeds.append({"seed": seed, **compare(*runs.values())})
        print_status(json.dumps(seeds[-1]))
    record = read_record(runs["fp32"])
    return {"hardware": record["hardware"], "versions": record["versions"], "seeds": seeds}


def train(args: Namespace, folder: Path, seed: int, precision: str) -> Path:
    """Run train_bert_hf.py; return the folder of its record."""
    output = folder / f"{precision}-{seed}"
    flags = {
        "--model": args.model,
        "--data_dir": folder,
        "--output_dir": output,
        "--seed": seed,
        "--precision": precision,
        "--context_length": args.context_length,
        "--learning_rate": args.learning_rate,
        "--eval_freq": 100,
    }
    command = [sys.executable, str(SCRIPT), *(str(word) for flag in flags.items() for word in flag)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"this run failed: {' '.join(command)}")
    return output


def compare(fp32: Path, bf16: Path) -> dict:
    """Return the difference of the test accuracies of two runs, bf16 - fp32, with its interval, and both results."""
    records = [read_record(run) for run in (fp32, bf16)]
    correct = [
        (predicted_labels(predictions["probability"]) == predictions["label"]).to_numpy()
        for predictions in map(read_predictions, (fp32, bf16), records)
    ]
    comparison = mcnemar_test(*correct)
    results = {
        precision: {
            "test": record["accuracy"]["test"],
            "training_seconds": record["seconds"]["training"],
            "last_loss": record["eval_history"][-1]["validation_loss"],
        }
        for precision, record in zip(PRECISIONS, records, strict=True)
    }
    return {
        "reviews": comparison.total,
        "difference": comparison.difference,
        "interval": comparison.interval,
        "p_value": comparison.p_value,
        **results,
    }


def accuracy_table(seeds: list[dict]) -> str:
    """Return the Markdown table of both accuracies of each seed and their difference, and of the means."""
    lines = ["| seed | fp32 | bf16 | bf16 - fp32 (95% interval) | p |", "|---|---|---|---|---|"]
    for result in seeds:
        difference, low, high = (f"{100 * value:+.2f}" for value in (result["difference"], *result["interval"]))
        lines.append(
            f"| {result['seed']} | {result['fp32']['test']:.2%} | {result['bf16']['test']:.2%} | "
            f"{difference} points ({low} to {high}) | {result['p_value']:.2f} |"
        )
    fp32, bf16 = (statistics.fmean(result[precision]["test"] for result in seeds) for precision in PRECISIONS)
    lines.append(f"| mean | {fp32:.2%} | {bf16:.2%} | {100 * (bf16 - fp32):+.2f} points | |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
