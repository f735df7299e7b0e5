"""Checks of a contributed record: its statistics, labels, code, versions and command."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from finetuning.data.reviews import read_reviews
from finetuning.reporting.experiments import EXPERIMENTS, Experiment
from finetuning.reporting.records import PREDICTIONS, essential_flags, read_predictions_csv, read_record
from finetuning.reporting.statistics import calibration, predicted_labels, wilson_interval
from finetuning.system.files import sha256

TOLERANCE = 1e-5  # probabilities are stored with nine digits


class Check(NamedTuple):
    """Result of one check; `passed` is None if the check was not possible here."""

    name: str
    passed: bool | None
    detail: str


def verify_record(folder: str | Path, repository: Path) -> list[Check]:
    """Check a run's record against its predictions, its test set, and the repository's code and requirements.

    Raises UserError if a file is missing or damaged.
    """
    # read_predictions would raise at the first difference from the record.
    record, predictions = read_record(folder), read_predictions_csv(Path(folder) / PREDICTIONS)
    return [
        *check_statistics(record, predictions),
        check_labels(record, predictions, repository),
        check_commit(record["git_commit"], repository),
        check_versions(record["versions"], repository / "requirements-extra.txt"),
    ]


def check_statistics(record: dict, predictions: pd.DataFrame) -> list[Check]:
    """Recompute the record's statistics of the test predictions."""
    labels, probabilities = predictions["label"].to_numpy(), predictions["probability"].to_numpy()
    correct, total = int((predicted_labels(probabilities) == labels).sum()), len(labels)
    recomputed = {
        "number of test reviews": (record["reviews"]["test"], total),
        "test accuracy": (record["accuracy"]["test"], correct / total),
        "test interval, low": (record["test_interval_95"][0], wilson_interval(correct, total)[0]),
        "test interval, high": (record["test_interval_95"][1], wilson_interval(correct, total)[1]),
        **{
            name.replace("_", " "): (record["calibration"][name], value)
            for name, value in calibration(labels, probabilities).items()
        },
    }
    return [
        Check(name, abs(recorded - value) <= TOLERANCE, f"recorded {recorded:.7g}, recomputed {value:.7g}")
        for name, (recorded, value) in recomputed.items()
    ]


def check_labels(record: dict, predictions: pd.DataFrame, repository: Path) -> Check:
    """Compare the labels with those of a local test.csv that has the recorded digest."""
    digest, data_dir = record["data"]["test.csv"], record["arguments"]["data_dir"]
    candidates = Path(data_dir, "test.csv"), repository / data_dir / "test.csv"
    path = next((path for path in candidates if path.is_file() and sha256(path) == digest), None)
    if path is None:
        return Check("labels", None, f"there is no {Path(data_dir, 'test.csv')} with the SHA-256 {digest}")
    labels = read_reviews(path)["label"]
    if len(labels) != len(predictions):
        return Check("labels", False, f"{len(predictions):,} predictions for the {len(labels):,} reviews of {path}")
    differing = int((labels.to_numpy() != predictions["label"].to_numpy()).sum())
    return Check("labels", not differing, f"{differing:,} of {len(labels):,} differ from those of {path}")


def check_commit(commit: str | None, repository: Path) -> Check:
    """Check that the run's code is a commit of the repository, without changes."""
    if commit is None:
        return Check("code", False, "the run was made outside a Git checkout")
    if commit.endswith("+"):
        return Check("code", False, f"the run was made with uncommitted changes to {commit[:-1]}")
    if not re.fullmatch("[0-9a-f]{40}", commit):
        return Check("code", False, f"{commit!r} is not a commit")
    command = ["git", "-C", str(repository), "cat-file", "-e", f"{commit}^{{commit}}"]
    try:
        known = subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.SubprocessError) as error:
        return Check("code", None, f"cannot run git: {error}")
    hint = "" if known else " is unknown here (in a shallow clone, run `git fetch --unshallow` first)"
    return Check("code", known, f"commit {commit}{hint}")


def check_versions(versions: dict[str, str], requirements: Path) -> Check:
    """Check that the recorded versions are within the bounds of a requirements file."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, filter(None, lines))}
    outside = [
        f"{package} {version} is not {bounds[package]}"
        for package, version in versions.items()
        if package in bounds and not is_within(bounds[package], version)
    ]
    return Check("versions", not outside, "; ".join(outside) or "within the bounds of requirements-extra.txt")


def is_within(bounds: SpecifierSet, version: str) -> bool:
    """Return whether a version, without its local part such as "+cpu", is within bounds."""
    try:
        return bounds.contains(version.partition("+")[0], prereleases=True)
    except InvalidVersion:
        return False


def check_command(folder: str | Path, repository: Path) -> Check:
    """Check that the record's command is the command of the experiment to which the folder belongs."""
    record = read_record(folder)
    command, seed = record["command"], record["arguments"]["seed"]
    path = Path(folder).resolve()
    by_folder = [each for each in EXPERIMENTS if path == (repository / each.run_folder(seed)).resolve()]
    flags = essential_flags(command)
    by_command = [each for each in EXPERIMENTS if flags == essential_flags(each.command_line(seed))]
    if not by_folder:
        detail = f"not the folder of an experiment with seed {seed}; the command is that of {describe(by_command)}"
        return Check("command", False, detail)
    if by_command != by_folder:
        detail = f"{command!r} is the command of {describe(by_command)}, the folder that of {describe(by_folder)}"
        return Check("command", False, detail)
    return Check("command", True, f"that of {describe(by_folder)}: {command}")


def describe(experiments: list[Experiment]) -> str:
    """Return "experiment 1", or "no experiment"."""
    return " and ".join(f"experiment {experiment.number}" for experiment in experiments) or "no experiment"
