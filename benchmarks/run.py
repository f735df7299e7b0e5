"""Time this project against the reference loop, in alternation, on the same weights and reviews.

    python benchmarks/run.py --data_dir . gpt2-all distilbert-all

Every measurement is a process of its own: it loads the model, times training steps and
evaluation, and reports the peak memory. Reference and project take turns for `--rounds`
rounds, so that a machine whose speed drifts slows both; the table shows the median of the
rounds' ratios. The whole run is put together from the measured parts in the proportions of
the published one: 4,375 steps, 88 log lines over 2 x 160 reviews, 50,000 reviews at the end.

`--output` is a list of reports, one for each call; what a call measures replaces what it holds of
the same rows.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch.utils.data import Subset

import download_prepare_dataset
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from benchmarks import reference
from finetuning.cli import ArgumentParser, positive_int, run, user_path
from finetuning.features import compute_once
from finetuning.files import written_whole
from finetuning.layers import set_trainable
from finetuning.loop import Classifier, predict, train_classifier_simple
from finetuning.machine import git_commit, process_peak_memory, versions
from finetuning.optimizers import build_optimizer
from finetuning.reviews import load_dataframes
from finetuning.runtime import hardware, keep_freed_memory, select_device, select_precision

STEPS, LOG_REVIEWS, FINAL_REVIEWS = 4_375, 88 * 2 * 160, 50_000  # of a published run
GPT = ["--weights", "random", "--trainable_layers"]
# Measured parts and what the table calls them.
PARTS = {"run": "whole run", "step": "training step", "review": "evaluation", "tokenizing": "tokenizing",
         "peak_memory": "peak memory"}
ROWS = {
    "gpt2-all": (train_gpt, [*GPT, "all"]),
    "gpt2-flexible": (train_gpt, [*GPT, "all", "--trainable_token_pos", "flexible"]),
    "gpt2-last_block": (train_gpt, [*GPT, "last_block"]),
    "gpt2-last_layer": (train_gpt, [*GPT, "last_layer"]),
    **{f"{name}-all": (train_bert_hf, ["--trainable_layers", "all", "--model", name]) for name in train_bert_hf.MODELS},
    "roberta-last_block": (train_bert_hf, ["--trainable_layers", "last_block", "--model", "roberta"]),
    "data": (download_prepare_dataset, []),
    "logreg": (train_sklearn_logreg, []),
}


def main(argv=None):
    args = parse_args(argv)
    if args.side:
        print(json.dumps(measure(args)))
        return
    device = select_device(args.device)
    report = {"command": args.command, "hardware": hardware(device), "versions": versions(),
              "git_commit": git_commit(), "rows": {}}
    print(f"| row | {' | '.join(PARTS.values())} |\n|{'---|' * (len(PARTS) + 1)}")
    for row in args.rows:
        rounds = []
        for _ in range(args.rounds):
            rounds.append({side: measure_apart(args, row, side) for side in ("reference", "project")})
            print(row, json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        name = row if args.precision == "auto" else f"{row}, {args.precision}"
        report["rows"][name] = rounds
        print(table_line(name, rounds), flush=True)
        write_report(Path(args.output), report)  # after each row, for the next one may take long


def write_report(path, report):
    """Put a report into a file of reports, in place of what that holds of the same rows."""
    reports = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for older in reports:
        older["rows"] = {row: rounds for row, rounds in older["rows"].items() if row not in report["rows"]}
    reports = [older for older in reports if older["rows"]] + [report]
    with written_whole(path) as (temporary,):
        temporary.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def parse_args(argv=None):
    parser = ArgumentParser(prog="benchmarks/run.py", description="Time this project against a plain reference loop.")
    parser.add_argument("rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="what to time")
    parser.add_argument("--data_dir", type=user_path, default=".", help="folder of the three CSV files")
    parser.add_argument("--archive", type=user_path, help="archive of the reviews, for the row data")
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="measurements of each side")
    parser.add_argument("--steps", type=positive_int, default=6, metavar="N", help="training steps to time")
    parser.add_argument("--reviews", type=positive_int, default=160, metavar="N", help="reviews to evaluate")
    parser.add_argument("--context_length", type=positive_int, default=256, metavar="TOKENS", help="of a review")
    parser.add_argument("--device", default="auto", help="as for the train scripts")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the project's side")
    parser.add_argument("--output", type=user_path, default="benchmarks/results.json",
                        help="file for every single measurement")
    parser.add_argument("--side", choices=["reference", "project"], help="measure one side of one row, here and now")
    return parser.parse_args(argv)


def measure_apart(args, row, side):
    """What `measure` returns for one side of one row, in a new process."""
    command = [sys.executable, __file__, row, "--side", side]
    for key in ("data_dir", "archive", "steps", "reviews", "context_length", "device", "precision"):
        if getattr(args, key) is not None:
            command += [f"--{key}", str(getattr(args, key))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    """Seconds of one side of one row: of its parts, and of the whole run; and its peak memory in bytes."""
    script, flags = ROWS[args.rows[0]]
    if script is download_prepare_dataset:
        seconds = {"run": measure_data(args)}
    elif script is train_sklearn_logreg:
        seconds = {"run": measure_logreg(args)}
    else:
        settings = script.parse_args([*flags, "--data_dir", args.data_dir, "--context_length",
                                      str(args.context_length), "--device", args.device])
        tokenizing = measure_tokenizing(args, script, settings)
        sides = {"reference": measure_reference, "project": measure_project}
        seconds = {"tokenizing": tokenizing, **sides[args.side](args, script, settings)}
        seconds["run"] = (seconds.get("once", 0) + seconds.get("log_once", 0) + STEPS * seconds["step"]
                          + LOG_REVIEWS * seconds.get("log_review", seconds["review"])
                          + FINAL_REVIEWS * seconds["review"])
    return {**seconds, "peak_memory": process_peak_memory()}


def timed(function, *arguments):
    """Seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def measure_data(args):
    """Seconds from the archive to the CSV files."""
    with tempfile.TemporaryDirectory() as folder:
        if args.side == "project":
            return timed(download_prepare_dataset.main, ["--archive", args.archive, "--data_dir", folder])
        return timed(reference.prepare, args.archive, folder)


def measure_logreg(args):
    """Seconds from the CSV files to the accuracies of both scikit-learn baselines."""
    if args.side == "reference":
        return timed(reference.logistic_regression, args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        return timed(train_sklearn_logreg.main, ["--data_dir", args.data_dir, "--output_dir", folder])


def measure_project(args, script, settings):
    """Seconds of a training step, of evaluating a review, and of what is done once for the whole run."""
    model, head, read_logits, _, train, *_ = script.build(settings)
    device = select_device(args.device)
    classifier = Classifier(model.to(device), read_logits, device, select_precision(args.precision, device)[0])
    sample = train.first(max(args.reviews, args.steps * settings.batch_size))
    keep_freed_memory()
    seconds = {}
    started = time.perf_counter()
    classifier, (sample,) = compute_once(settings, classifier, head, sample)
    if classifier.model is head:
        seconds["once"] = (time.perf_counter() - started) / len(sample) * FINAL_REVIEWS
    elif sample.sample is not None:  # what log lines evaluate is kept in a form that is quicker to evaluate
        seconds["log_once"] = 2 * (time.perf_counter() - started)  # of the training and of the validation set
        seconds["log_review"] = timed(predict, sample.sample, classifier) / len(sample.sample)
    optimizer = build_optimizer("adamw", classifier.model, settings.learning_rate)
    clock = []
    train_classifier_simple(classifier, optimizer, sample, sample.first(1), num_epochs=args.steps, batch_size=8,
                            max_steps=args.steps + 1, eval_freq=10**9, eval_iter=1,
                            after_step=lambda progress: clock.append(time.perf_counter()))
    seconds["step"] = statistics.median(b - a for a, b in itertools.pairwise(clock[:args.steps]))
    seconds["review"] = timed(predict, sample, classifier) / len(sample)
    return seconds


def measure_reference(args, script, settings):
    """Seconds of a training step and of evaluating a review in the reference loop."""
    model = train_gpt_book_model(settings) if script is train_gpt else script.build(settings)[0]
    device = select_device(args.device)
    frame = load_dataframes(args.data_dir)[0].head(max(args.reviews, args.steps * settings.batch_size))
    tokenizer = tokenizer_of(script, settings)
    dataset = reference.ReferenceDataset(frame, tokenizer.encode, args.context_length, tokenizer.pad_token_id)
    if script is train_gpt:
        reference.spell_out(model)
        read_logits = reference.gpt_logits("last")
    else:
        model.set_attn_implementation("eager")
        read_logits = reference.encoder_logits
    _, steps = reference.train(model.to(device), read_logits, dataset, learning_rate=settings.learning_rate,
                               max_steps=args.steps)
    sample = Subset(dataset, range(args.reviews))
    return {"step": statistics.median(steps[1:]),
            "review": timed(reference.evaluate, model, read_logits, sample) / args.reviews}


def train_gpt_book_model(settings):
    """The book's GPTModel with its new head and its trainable layers, as train_gpt.py starts from it."""
    model = train_gpt.instantiate_model(settings.model_size, settings.weights, settings.seed, settings.models_dir)
    set_trainable(model, settings.trainable_layers, train_gpt.replace_head(model, settings.seed))
    return model


def tokenizer_of(script, settings):
    """The Tokenizer that a train script uses."""
    if script is train_gpt:
        return train_gpt.wrap(train_gpt.load_encoding())
    return train_bert_hf.wrap(train_bert_hf.load_model(settings.model, settings.seed)[1])


def measure_tokenizing(args, script, settings):
    """Seconds of tokenizing `args.reviews` reviews: one by one for the reference, together for the project."""
    texts = load_dataframes(args.data_dir)[0]["text"].head(args.reviews).tolist()
    encode = tokenizer_of(script, settings).encode
    if args.side == "project":
        return timed(encode, texts, args.context_length)
    return timed(lambda: [encode([text], args.context_length) for text in texts])


def table_line(row, rounds):
    """A line of the table: for each part, the median over the rounds of reference / project."""
    cells = []
    for part in PARTS:
        # Where features are computed once, steps and evaluation of the head alone compare with nothing.
        ratios = [sides["reference"][part] / sides["project"][part] for sides in rounds
                  if part in sides["reference"] and part in sides["project"]
                  and not ("once" in sides["project"] and part in ("step", "review"))]
        cells.append(f"{statistics.median(ratios):.2f}x" if ratios else "")
    return f"| {row} | {' | '.join(cells)} |"


if __name__ == "__main__":
    run(main)
