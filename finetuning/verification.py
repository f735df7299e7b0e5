"""Checks of a run's record that someone else contributed."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from packaging.requirements import Requirement

from finetuning.errors import UserError
from finetuning.files import sha256
from finetuning.records import PREDICTIONS, read_record
from finetuning.uncertainty import answers, calibration, wilson_interval

TOLERANCE = 1e-5  # the probabilities are stored with nine digits


class Check(NamedTuple):
    """A check of a record; `passed` is None if it could not be made here."""

    name: str
    passed: bool | None
    detail: str


def verify_record(folder, repository) -> list[Check]:
    """Check a run's record against its predictions, its test set, and the code and requirements of the repository.

    Raise UserError if a file is missing or has another format.
    """
    record, predictions = read_record(folder), read_frame(Path(folder) / PREDICTIONS)
    return [*check_statistics(record, predictions), check_labels(record, predictions, Path(repository)),
            check_commit(record["git_commit"], repository),
            check_versions(record["versions"], Path(repository) / "requirements-extra.txt")]


def read_frame(path):
    """Return the data frame of a run's predictions, whether or not they are those of its record."""
    try:
        return pd.read_csv(path, index_col="row", dtype={"label": int, "probability": float})[["label", "probability"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not hold a run's test predictions: {error}") from error


def check_statistics(record, predictions):
    """Recompute what the record says about the test predictions."""
    labels, probabilities = predictions["label"].to_numpy(), predictions["probability"].to_numpy()
    correct, total = int((answers(probabilities) == labels).sum()), len(labels)
    recomputed = {
        "number of test reviews": (record["reviews"]["test"], total),
        "test accuracy": (record["accuracy"]["test"], correct / total),
        "test interval, low": (record["test_interval_95"][0], wilson_interval(correct, total)[0]),
        "test interval, high": (record["test_interval_95"][1], wilson_interval(correct, total)[1]),
        **{name.replace("_", " "): (record["calibration"][name], value)
           for name, value in calibration(labels, probabilities).items()}}
    return [Check(name, abs(recorded - value) <= TOLERANCE, f"recorded {recorded:.7g}, recomputed {value:.7g}")
            for name, (recorded, value) in recomputed.items()]


def check_labels(record, predictions, repository):
    """Compare the labels with those of a test.csv of the recorded digest, if there is one."""
    digest, data_dir = record["data"]["test.csv"], record["arguments"].get("data_dir", ".")
    path = next((path for path in (Path(data_dir, "test.csv"), repository / data_dir / "test.csv")
                 if path.is_file() and sha256(path) == digest), None)
    if path is None:
        return Check("labels", None, f"there is no {Path(data_dir, 'test.csv')} with the SHA-256 {digest}")
    labels = pd.read_csv(path, usecols=["label"])["label"]
    if len(labels) != len(predictions):
        return Check("labels", False, f"{len(predictions):,} predictions for the {len(labels):,} reviews of {path}")
    wrong = int((labels.to_numpy() != predictions["label"].to_numpy()).sum())
    return Check("labels", not wrong, f"{wrong:,} of {len(labels):,} differ from those of {path}")


def check_commit(commit, repository):
    """Check that the code of the run is a commit of this repository, without changes."""
    if commit is None:
        return Check("code", False, "the run was made outside of a Git checkout")
    if commit.endswith("+"):
        return Check("code", False, f"the run was made with uncommitted changes to {commit[:-1]}")
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return Check("code", False, f"{commit!r} is not a commit")
    command = ["git", "-C", str(repository), "cat-file", "-e", f"{commit}^{{commit}}"]
    try:
        known = subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.SubprocessError) as error:
        return Check("code", None, f"cannot run git: {error}")
    return Check("code", known, f"commit {commit}" + ("" if known else " is unknown here (in a shallow clone, run "
                                                      "`git fetch --unshallow` first)"))


def check_versions(versions, requirements):
    """Compare the recorded versions with the bounds of the requirements file."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, filter(None, lines))}
    outside = [f"{package} {version} is not {bounds[package]}" for package, version in versions.items()
               if package in bounds and not bounds[package].contains(version.partition("+")[0], prereleases=True)]
    return Check("versions", not outside, "; ".join(outside) or "within the bounds of requirements-extra.txt")
