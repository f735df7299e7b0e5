"""What a run leaves behind: `record.json` and `test_predictions.csv` in the run's folder.

`record.json` is one JSON object with these keys:

    name                the run's name, such as "bert-all-seed123"
    command             what was typed
    arguments           every flag's value, defaults included
    finished            date and time in UTC, ISO 8601
    hardware            name of the GPU or CPU that did the work
    precision           {"used": "fp32", "tf32" or "bf16", "why": ...}; null for scikit-learn
    versions            of Python and the packages that matter
    git_commit          of this code, "+" appended if its files differed from it; null outside a checkout
    data                SHA-256 of each CSV file
    parameters          {"all": ..., "trainable": ...}, counted
    losses              the training loss of every update; [] for scikit-learn
    curve               [{"step", "train_loss", "validation_loss"}, ...], one for each log line
    epochs              [{"step", "train_accuracy", "validation_accuracy"}, ...] on `eval_iter` batches
    accuracy            {"train", "validation", "test"}: correct reviews / reviews, on the full sets
    test_interval_95    [low, high]: Wilson interval of the test accuracy
    calibration         {"log_loss", "expected_calibration_error"} of the test probabilities: the mean
                        of -log(probability of the right label), in nats; and, over CALIBRATION_BINS
                        bins of confidence, the mean distance between confidence and accuracy
                        (Guo et al., 2017), from 0 to 1
    copies              {"reviews", "accuracy_without"}: how many test reviews stand in the training
                        set word for word, and the test accuracy without them
    reviews             {"train", "validation", "test"}: how many each set holds
    seconds             {"training", "evaluation"}: wall-clock
    reviews_per_second  {"training", "evaluation"}
    peak_memory         bytes: of the GPU on CUDA, else of the process; null if unknown

`test_predictions.csv` has a row for each test review, in the order of test.csv: `row` (from 0),
`label`, and `probability` (of a positive review; above 0.5 the answer is "positive").
"""

import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.errors import UserError
from finetuning.files import sha256, written_whole
from finetuning.machine import git_commit, versions
from finetuning.reviews import csv_paths

RECORD, PREDICTIONS = "record.json", "test_predictions.csv"
KEYS = {"name", "command", "arguments", "finished", "hardware", "precision", "versions", "git_commit", "data",
        "parameters", "losses", "curve", "epochs", "accuracy", "test_interval_95", "calibration", "copies", "reviews",
        "seconds", "reviews_per_second", "peak_memory"}
CALIBRATION_BINS = 15
LEAST_PROBABILITY = 1e-6  # of the right label, as the log loss counts it: no answer costs more than 14 nats


def run_folder(args, name):
    """The folder a run writes to: --output_dir, or results/ and the run's name."""
    return Path(args.output_dir or Path("results") / name)


def make_folder(folder):
    """Make a run's folder and try to write to it, before the work and not after; raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {folder}: {error.strerror}") from error


def facts(args):
    """The part of a record that holds before the run: what was asked, with which code and data."""
    arguments = {key: value for key, value in vars(args).items() if key not in ("command", "variants")}
    return {"command": args.command, "arguments": arguments, "versions": versions(), "git_commit": git_commit(),
            "data": {path.name: sha256(path) for path in csv_paths(args.data_dir)}}


def wilson_interval(correct, total, z=1.959964):
    """The 95% confidence interval of a proportion (Wilson, 1927), as (low, high)."""
    p = correct / total
    center = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (center - spread) / scale, (center + spread) / scale


def calibration(labels, probabilities):
    """How far the probabilities of a positive review can be believed: the record's `calibration`.

    Both arguments are arrays with one entry for each review.
    """
    of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    log_loss = -np.log(of_label.clip(LEAST_PROBABILITY)).mean()
    confidence = np.maximum(probabilities, 1 - probabilities)
    right = answers(probabilities) == labels
    # Confidence in one of two answers is at least 1/2: bins of equal width from there to 1.
    bins = np.minimum((confidence - 0.5) * 2 * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    distances = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(CALIBRATION_BINS)]
    return {"log_loss": float(log_loss), "expected_calibration_error": float(sum(distances) / len(labels))}


def answers(probabilities):
    """The labels that probabilities of a positive review stand for."""
    return (probabilities > 0.5).astype(int)


def write_record(folder, record, copies, labels, probabilities):
    """Write both files.

    There is one of each for every test review: whether it stands in the training set, its label,
    and the probability that it is positive.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=float)
    right, new = answers(probabilities) == labels, ~np.asarray(copies)
    record = {**record, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
              "test_interval_95": wilson_interval(right.sum(), len(right)),
              "calibration": calibration(labels, probabilities),
              "copies": {"reviews": int((~new).sum()), "accuracy_without": right[new].mean() if new.any() else None}}
    if record.keys() != KEYS:
        raise ValueError(f"the record's keys differ from the schema in {sorted(record.keys() ^ KEYS)}")
    predictions = pd.DataFrame({"label": labels, "probability": probabilities})
    folder = Path(folder)
    with written_whole(folder / RECORD, folder / PREDICTIONS) as (record_file, predictions_file):
        record_file.write_text(to_json(record), encoding="utf-8")
        predictions.to_csv(predictions_file, index_label="row", float_format="%.9f", lineterminator="\n")


def to_json(record):
    """JSON with one key a line: long lists stay on theirs, so that a record is short to read."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_record(folder):
    """The record in a run's folder; raises UserError where it is missing, damaged or lacks a key."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        lacking = KEYS - record.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a run's record: {error}") from error
    if lacking:
        raise UserError(f"{path} is not a whole record: it lacks {', '.join(sorted(lacking))}")
    return record
