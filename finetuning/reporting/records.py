"""The record of a run: `record.json` and `test_predictions.csv` in the run's folder.

`record.json` is one JSON object with these keys:

    name                name of the run, such as "bert-all-seed123"
    command             command line of the run
    arguments           value of every flag, defaults included
    finished            date and time in UTC, ISO 8601
    hardware            name of the GPU or CPU, with the numbers of processes and threads
    precision           {"dtype": "fp32", "tf32" or "bf16", "reason": ...}; null for scikit-learn
    versions            versions of Python and the packages that affect results
    git_commit          commit of this code, "+" appended if files were changed; null outside a checkout
    data                SHA-256 of each CSV file
    parameters          {"total", "trainable"}: number of parameters
    losses              training loss of every step; [] for scikit-learn
    eval_history        [{"step", "train_loss", "validation_loss"}, ...], one for each log line
    epoch_metrics       [{"step", "train_accuracy", "validation_accuracy"}, ...] on `eval_iter` batches
    accuracy            {"train", "validation", "test"}: accuracy on the full sets
    test_interval_95    [low, high]: Wilson interval of the test accuracy
    calibration         {"log_loss", "expected_calibration_error"} of the test probabilities, see
                        `finetuning.reporting.statistics.calibration`
    duplicates          {"reviews", "accuracy_without"}: number of test reviews that are exact duplicates of
                        training reviews, and the test accuracy without them
    reviews             {"train", "validation", "test"}: number of reviews
    seconds             {"training", "evaluation"}: wall-clock time
    reviews_per_second  {"training", "evaluation"}
    peak_memory         bytes: of the GPU on CUDA, else of the process; null if unknown

`test_predictions.csv` has a line for each test review, in the order of test.csv: `row` (from 0),
`label`, and `probability` (of a positive review; above 0.5 the prediction is "positive").
"""

import argparse
import json
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from finetuning.data.reviews import SPLITS, csv_paths
from finetuning.reporting.statistics import calibration, predicted_labels, wilson_interval
from finetuning.system.console import print_status
from finetuning.system.environment import git_commit, versions
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write, sha256
from finetuning.system.filetypes import refuse_lfs_pointer

RECORD, PREDICTIONS, MODEL = "record.json", "test_predictions.csv", "model"
# Arguments that may differ between two runs of the same command.
IGNORED_ARGUMENTS = {"resume", "checkpoint_minutes", "output_dir", "models_dir", "micro_batch_size", "tensorboard",
                     "save_model"}  # fmt: skip
NUMBER = (int, float)
# Type of each value: one type, a tuple of alternatives, a dictionary of required keys, or a list of its items' types.
SCHEMA = {
    "name": str,
    "command": str,
    "arguments": {"data_dir": str, "seed": int},
    "finished": str,
    "hardware": str,
    "precision": (dict, NoneType),
    "versions": dict,
    "git_commit": (str, NoneType),
    "data": {f"{split}.csv": str for split in SPLITS},
    "parameters": {"total": int, "trainable": int},
    "losses": list,
    "eval_history": list,
    "epoch_metrics": list,
    "accuracy": dict.fromkeys(SPLITS, NUMBER),
    "test_interval_95": [NUMBER, NUMBER],
    "calibration": {"log_loss": NUMBER, "expected_calibration_error": NUMBER},
    "duplicates": {"reviews": int, "accuracy_without": (*NUMBER, NoneType)},
    "reviews": dict.fromkeys(SPLITS, int),
    "seconds": {"training": NUMBER, "evaluation": NUMBER},
    "reviews_per_second": {"training": NUMBER, "evaluation": NUMBER},
    "peak_memory": (int, NoneType),
}


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """Return the folder of a run: --output_dir, or its name under results/."""
    return Path(args.output_dir or Path("results") / name)


def run_metadata(args: argparse.Namespace) -> dict:
    """Return the part of a record that is known before the run: command, arguments, code and data."""
    arguments = {key: value for key, value in vars(args).items() if key not in ("command", "overrides")}
    return {
        "command": args.command,
        "arguments": arguments,
        "versions": versions(),
        "git_commit": git_commit(),
        "data": {path.name: sha256(path) for path in csv_paths(args.data_dir)},
    }


def check_replaceable(folder: str | Path, metadata: dict) -> None:
    """Raise UserError if the folder holds the record of another command than that of `metadata`.

    A run of the same command may replace its record; a status message says if the data have changed.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        command, arguments, data = record["command"], dict(record["arguments"]), record["data"]
        script = script_name(command)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} exists and is not the record of a run; choose another --output_dir, or delete it"
        ) from error
    same_data = data == metadata["data"]
    # A flag that only one of the two has was added or removed between versions of this code.
    differing = [
        key
        for key, value in metadata["arguments"].items()
        if arguments.get(key, value) != value and key not in IGNORED_ARGUMENTS and not (key == "data_dir" and same_data)
    ]
    if script != script_name(metadata["command"]):
        differing.insert(0, "script")
    if differing:
        raise UserError(
            f"{path} is the record of another run (other {', '.join(differing)}): {command}; "
            "choose another --output_dir to keep it, or delete it"
        )
    if not same_data:
        print_status(f"{path} was made with other data; this run will replace it")


def essential_flags(command: str) -> set[tuple[str, ...]]:
    """Return what determines the result in a recorded command: its script, and each flag with its values."""
    parts: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.endswith(".py"):
            parts = [[Path(word).name]]  # without the launcher
        elif word.startswith("--"):
            parts.append(word.split("=", 1))
        else:
            parts[-1].append(word)
    return {tuple(part) for part in parts if part and part[0].removeprefix("--") not in IGNORED_ARGUMENTS}


def script_name(command: str) -> str | None:
    """Return the file name of the script that a recorded command runs, or None."""
    return next((Path(word).name for word in shlex.split(command) if word.endswith(".py")), None)


def reviews_per_second(num_trained: int, num_evaluated: int, seconds: dict[str, float]) -> dict[str, float]:
    """Return the record's `reviews_per_second` from the numbers of reviews and the seconds they took."""
    return {"training": num_trained / seconds["training"], "evaluation": num_evaluated / seconds["evaluation"]}


def write_record(
    folder: str | Path, record: dict, duplicated: ArrayLike, labels: ArrayLike, probabilities: ArrayLike
) -> None:
    """Add the test statistics to `record`; write it and the test predictions, and remove an older saved model.

    For each test review, `duplicated` says whether it is an exact duplicate of a training review, and
    `probabilities` holds the probability that it is positive.
    """
    label_array, probability_array = np.asarray(labels), np.asarray(probabilities, dtype=float)
    correct, unique = predicted_labels(probability_array) == label_array, ~np.asarray(duplicated)
    record = {
        **record,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "test_interval_95": wilson_interval(correct.sum(), len(correct)),
        "calibration": calibration(label_array, probability_array),
        "duplicates": {
            "reviews": int((~unique).sum()),
            "accuracy_without": correct[unique].mean() if unique.any() else None,
        },
    }
    if record.keys() != SCHEMA.keys():
        raise ValueError(f"the record's keys differ from the schema in {sorted(record.keys() ^ SCHEMA.keys())}")
    predictions = pd.DataFrame({"label": labels, "probability": probabilities})
    folder = Path(folder)
    # The predictions of an older model are about to be replaced.
    if (folder / MODEL).is_symlink() or (folder / MODEL).is_file():
        (folder / MODEL).unlink()
    elif (folder / MODEL).exists():
        shutil.rmtree(folder / MODEL)
    with atomic_write(folder / RECORD, folder / PREDICTIONS) as (record_file, predictions_file):
        record_file.write_text(to_json(record), encoding="utf-8")
        predictions.to_csv(predictions_file, index_label="row", float_format="%.9f", lineterminator="\n")


def to_json(record: dict) -> str:
    """Return JSON with one line for each key, which keeps long lists on one line."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_record(folder: str | Path) -> dict:
    """Return the record in a run's folder; raise UserError if it is missing, damaged or does not fit the schema."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the record of a run: {error}") from error
    if keys := schema_errors(record, SCHEMA):
        raise UserError(f"{path} is not a complete record: {', '.join(keys)} missing or of the wrong type")
    if not all(isinstance(version, str) for version in record["versions"].values()):
        raise UserError(f"{path} is not a complete record: versions missing or of the wrong type")
    try:
        shlex.split(record["command"])
    except ValueError as error:
        raise UserError(f"{path} holds a malformed command ({error}): {record['command']}") from error
    return record


def schema_errors(value: object, schema: dict | list | type | tuple[type, ...], name: str = "record") -> list[str]:
    """Return the keys of `value` that are missing or of another type than in `schema`."""
    if isinstance(schema, list):
        is_valid = isinstance(value, list) and len(value) == len(schema) and all(map(isinstance, value, schema))
        return [] if is_valid else [name]
    if not isinstance(schema, dict):
        return [] if isinstance(value, schema) else [name]
    if not isinstance(value, dict):
        return [name]
    return [error for key, part in schema.items() for error in schema_errors(value.get(key, ...), part, key)]


def read_predictions(folder: str | Path, record: dict) -> pd.DataFrame:
    """Return a run's test predictions; raise UserError if they are damaged or do not match the record."""
    path = Path(folder) / PREDICTIONS
    refuse_lfs_pointer(path)
    predictions = read_predictions_csv(path)
    correct = predicted_labels(predictions["probability"]) == predictions["label"]
    if len(correct) != record["reviews"]["test"] or abs(correct.mean() - record["accuracy"]["test"]) > 1e-9:
        raise UserError(f"{path} does not match {RECORD}: {correct.sum():,} of {len(correct):,} are correct")
    return predictions


def read_predictions_csv(path: str | Path) -> pd.DataFrame:
    """Return the columns label and probability of a file of test predictions; raise UserError if it is damaged."""
    try:
        columns = {"label": int, "probability": float}
        predictions = pd.read_csv(path, index_col="row", dtype=columns)[list(columns)].sort_index()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not contain test predictions: {error}") from error
    is_complete = len(predictions) and (predictions.index == np.arange(len(predictions))).all()
    if not (is_complete and predictions["label"].isin([0, 1]).all() and predictions["probability"].between(0, 1).all()):
        raise UserError(f"{path} does not hold a label 0 or 1 and a probability for each row, counted from 0")
    return predictions
