"""What a run leaves behind: `record.json` and `test_predictions.csv` in the run's folder.

A picture, `curves.svg`, is drawn from the two by `finetuning.plots`, and with --save_model the
trained model stands in `model/`, as `finetuning.saved` describes it.

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
    calibration         {"log_loss", "expected_calibration_error"} of the test probabilities, as
                        `finetuning.uncertainty.calibration` defines them
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
import shlex
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType

import numpy as np
import pandas as pd

from finetuning.cli import note
from finetuning.errors import UserError
from finetuning.files import sha256, written_whole
from finetuning.filetypes import refuse_lfs_pointer
from finetuning.machine import git_commit, versions
from finetuning.reviews import SPLITS, csv_paths
from finetuning.uncertainty import answers, calibration, wilson_interval

RECORD, PREDICTIONS, MODEL = "record.json", "test_predictions.csv", "model"
# Arguments that may differ between two runs of the same command.
NOT_COMPARED = {"resume", "checkpoint_minutes", "output_dir", "models_dir", "accumulate", "tensorboard", "save_model"}
NUMBER = (int, float)
SPLIT_SHARES, COUNTS = dict.fromkeys(SPLITS, NUMBER), dict.fromkeys(SPLITS, int)
# What each value must be: a type, several to choose from, or a dictionary of keys that must be there.
SCHEMA = {
    "name": str, "command": str, "arguments": dict, "finished": str, "hardware": str, "precision": (dict, NoneType),
    "versions": dict, "git_commit": (str, NoneType), "data": {f"{split}.csv": str for split in SPLITS},
    "parameters": {"all": int, "trainable": int}, "losses": list, "curve": list, "epochs": list,
    "accuracy": SPLIT_SHARES, "test_interval_95": list,
    "calibration": {"log_loss": NUMBER, "expected_calibration_error": NUMBER},
    "copies": {"reviews": int, "accuracy_without": (*NUMBER, NoneType)}, "reviews": COUNTS,
    "seconds": {"training": NUMBER, "evaluation": NUMBER},
    "reviews_per_second": {"training": NUMBER, "evaluation": NUMBER}, "peak_memory": (int, NoneType),
}


def run_folder(args, name):
    """The folder a run writes to: --output_dir, or results/ and the run's name."""
    return Path(args.output_dir or Path("results") / name)


def facts(args):
    """The part of a record that holds before the run: what was asked, with which code and data."""
    arguments = {key: value for key, value in vars(args).items() if key not in ("command", "variants")}
    return {"command": args.command, "arguments": arguments, "versions": versions(), "git_commit": git_commit(),
            "data": {path.name: sha256(path) for path in csv_paths(args.data_dir)}}


def check_replaceable(folder, facts):
    """Raise UserError where a folder holds the record of another command, which a run with these facts would replace.

    The same command replaces its record, with a note where its data have changed.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        command, arguments, data = record["command"], record["arguments"], record["data"]
        script, arguments = script_name(command), dict(arguments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is in the way and is not a run's record; choose another --output_dir, or delete it"
                        ) from error
    same_data = data == facts["data"]
    # Flags that only one of the two knows came or went between versions of this code.
    differing = [key for key, value in facts["arguments"].items() if arguments.get(key, value) != value
                 and key not in NOT_COMPARED and not (key == "data_dir" and same_data)]
    if script != script_name(facts["command"]):
        differing.insert(0, "script")
    if differing:
        raise UserError(f"{path} is the record of another run (other {', '.join(differing)}): {command}; "
                        "choose another --output_dir to keep it, or delete it")
    if not same_data:
        note(f"{path} was made with other data; this run will replace it")


def script_name(command):
    """Return which script a recorded command runs; None if none."""
    return next((Path(word).name for word in shlex.split(command) if word.endswith(".py")), None)


def write_record(folder, record, copies, labels, probabilities):
    """Write both files; a model that an earlier run saved in the folder is removed, for it made other predictions.

    There is one of each for every test review: whether it stands in the training set, its label,
    and the probability that it is positive.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=float)
    right, new = answers(probabilities) == labels, ~np.asarray(copies)
    record = {**record, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
              "test_interval_95": wilson_interval(right.sum(), len(right)),
              "calibration": calibration(labels, probabilities),
              "copies": {"reviews": int((~new).sum()), "accuracy_without": right[new].mean() if new.any() else None}}
    if record.keys() != SCHEMA.keys():
        raise ValueError(f"the record's keys differ from the schema in {sorted(record.keys() ^ SCHEMA.keys())}")
    predictions = pd.DataFrame({"label": labels, "probability": probabilities})
    folder = Path(folder)
    if (folder / MODEL).exists():
        shutil.rmtree(folder / MODEL)
    with written_whole(folder / RECORD, folder / PREDICTIONS) as (record_file, predictions_file):
        record_file.write_text(to_json(record), encoding="utf-8")
        predictions.to_csv(predictions_file, index_label="row", float_format="%.9f", lineterminator="\n")


def to_json(record):
    """JSON with one key a line: long lists stay on theirs, so that a record is short to read."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_record(folder):
    """The record in a run's folder; raises UserError where it is missing, damaged or does not fit the schema."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a run's record: {error}") from error
    if wrong := misfits(record, SCHEMA):
        raise UserError(f"{path} is not a whole record: {', '.join(wrong)} missing or of the wrong kind")
    return record


def misfits(value, schema, name="it"):
    """The names of what in `value` is missing or not as `schema` says."""
    if not isinstance(schema, dict):
        return [] if isinstance(value, schema) else [name]
    if not isinstance(value, dict):
        return [name]
    return [wrong for key, part in schema.items() for wrong in misfits(value.get(key, ...), part, key)]


def read_predictions(folder, record):
    """The data frame of a run's test predictions; raises UserError where they are not those of its record."""
    path = Path(folder) / PREDICTIONS
    refuse_lfs_pointer(path)
    try:
        predictions = pd.read_csv(path, index_col="row", dtype={"label": int, "probability": float})
        right = answers(predictions["probability"]) == predictions["label"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not hold a run's test predictions: {error}") from error
    if len(right) != record["reviews"]["test"] or abs(right.mean() - record["accuracy"]["test"]) > 1e-9:
        raise UserError(f"{path} does not belong to the record beside it: {right.sum():,} of {len(right):,} right")
    return predictions
