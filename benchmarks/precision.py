"""Does bf16 arithmetic cost accuracy? The same training in fp32 and in bf16, a pretrained encoder, several seeds.

    python benchmarks/precision.py --model all-MiniLM-L6-v2 --data_dir .

Each run is one of train_bert_hf.py on the first reviews of the training and of the test set, in a
process of its own. The two precisions of a seed are compared review by review, as
`reproduce.py --compare` does.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from finetuning.cli import ArgumentParser, positive_int, run, seed_number, user_path
from finetuning.errors import UserError
from finetuning.files import written_whole
from finetuning.records import read_predictions, read_record
from finetuning.reviews import csv_paths, read_reviews
from finetuning.uncertainty import answers, compare

SCRIPT = Path(__file__).parent.parent / "train_bert_hf.py"
PRECISIONS = ("fp32", "bf16")


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = {"command": args.command, **measure(args, Path(folder))}
    print(table(report["seeds"]))
    with written_whole(Path(args.output)) as (temporary,):
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_args(argv=None):
    parser = ArgumentParser(prog="benchmarks/precision.py",
                            description="Compare fp32 and bf16 arithmetic on a model that learns.")
    parser.add_argument("--model", type=user_path, default="all-MiniLM-L6-v2", help="as for train_bert_hf.py")
    parser.add_argument("--data_dir", type=user_path, default=".", help="folder of the three CSV files")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[123, 124, 125], metavar="SEED",
                        help="one run in each precision for each of these")
    parser.add_argument("--train", type=positive_int, default=4_000, metavar="N", help="reviews to train on")
    parser.add_argument("--test", type=positive_int, default=4_000, metavar="N", help="reviews to test on")
    parser.add_argument("--context_length", type=positive_int, default=128, metavar="TOKENS", help="of a review")
    parser.add_argument("--learning_rate", default="5e-5", help="as for train_bert_hf.py")
    parser.add_argument("--output", type=user_path, default="benchmarks/precision.json",
                        help="file for the measurements")
    return parser.parse_args(argv)


def measure(args, folder):
    """What the runs of all seeds gave, in files under `folder`."""
    for path, count in zip(csv_paths(args.data_dir), (args.train, 200, args.test), strict=True):
        read_reviews(path).head(count).to_csv(folder / path.name, index=False, lineterminator="\n")
    seeds = []
    for seed in args.seeds:
        runs = [train(args, folder, seed, precision) for precision in PRECISIONS]
        records = [read_record(run) for run in runs]
        right = [(answers(predictions["probability"]) == predictions["label"]).to_numpy()
                 for predictions in map(read_predictions, runs, records)]
        counts = compare(*right)
        seeds.append({"seed": seed, "reviews": counts.total, "difference": counts.difference,
                      "interval": counts.interval, "p_value": counts.p_value,
                      **{precision: {"test": record["accuracy"]["test"], "training_seconds":
                                     record["seconds"]["training"], "last_loss": record["curve"][-1]["validation_loss"]}
                         for precision, record in zip(PRECISIONS, records, strict=True)}})
        print(json.dumps(seeds[-1]), file=sys.stderr, flush=True)
    return {"hardware": records[0]["hardware"], "versions": records[0]["versions"], "seeds": seeds}


def train(args, folder, seed, precision):
    """Run train_bert_hf.py; return the folder of its record."""
    output = folder / f"{precision}-{seed}"
    command = [sys.executable, str(SCRIPT), "--model", args.model, "--data_dir", str(folder), "--output_dir",
               str(output), "--seed", str(seed), "--precision", precision, "--context_length",
               str(args.context_length), "--learning_rate", args.learning_rate, "--eval_freq", "100"]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"this run failed: {' '.join(command)}")
    return output


def table(seeds):
    """Markdown: both accuracies of each seed and their difference, and the mean of these."""
    lines = ["| seed | fp32 | bf16 | bf16 - fp32 (95% interval) | p |", "|---|---|---|---|---|"]
    lines += [f"| {row['seed']} | {row['fp32']['test']:.2%} | {row['bf16']['test']:.2%} | "
              f"{100 * row['difference']:+.2f} points ({100 * row['interval'][0]:+.2f} to "
              f"{100 * row['interval'][1]:+.2f}) | {row['p_value']:.2f} |" for row in seeds]
    means = [sum(row[precision]["test"] for row in seeds) / len(seeds) for precision in PRECISIONS]
    lines.append(f"| mean | {means[0]:.2%} | {means[1]:.2%} | {100 * (means[1] - means[0]):+.2f} points | |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
