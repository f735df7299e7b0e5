import shlex
import subprocess

import pandas as pd
import pytest
from helpers import REPOSITORY, change_record, write_example_record

import reproduce
from finetuning.reporting.experiments import EXPERIMENTS
from finetuning.reporting.verification import check_command, check_commit, verify_record
from finetuning.system.errors import UserError
from finetuning.system.files import sha256


@pytest.fixture
def run(tmp_path):
    """Folder of a run that passes all checks except that of the commit."""
    (tmp_path / "requirements-extra.txt").write_text("# bounds\nnumpy>=2.3\ntorch>=2.11.0\n")
    pd.DataFrame({"text": list("abcd"), "label": [1, 0, 1, 0]}).to_csv(tmp_path / "test.csv", index=False)
    write_example_record(
        tmp_path / "run",
        arguments={"data_dir": ".", "seed": 123},
        versions={"numpy": "2.4.6", "torch": "2.13.0+cpu"},
        data={"train.csv": "", "validation.csv": "", "test.csv": sha256(tmp_path / "test.csv")},
    )
    return tmp_path / "run"


def failed_checks(run):
    return [check.name for check in verify_record(run, run.parent) if check.passed is False]


def test_verify_record_accepts_an_unchanged_record(run):
    assert failed_checks(run) == ["code"]


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"accuracy": {"train": 1, "validation": 1, "test": 0.76}}, ["test accuracy"]),
        ({"test_interval_95": [0.4, 0.9]}, ["test interval, low", "test interval, high"]),
        (
            {"calibration": {"log_loss": 0.1, "expected_calibration_error": 0.0}},
            ["log loss", "expected calibration error"],
        ),
        ({"versions": {"numpy": "2.2.9", "torch": "2.13.0+cpu"}}, ["versions"]),
        ({"reviews": {"train": 4, "validation": 4, "test": 5}}, ["number of test reviews"]),
    ],
)
def test_verify_record_names_the_failed_checks(run, changed, names):
    change_record(run, **changed)
    assert set(failed_checks(run)) == {*names, "code"}


def test_verify_record_names_changed_labels(run):
    path = run / "test_predictions.csv"
    path.write_text(path.read_text().replace("0,1,0.9", "0,0,0.9"))
    assert "labels" in failed_checks(run)


def test_labels_of_a_header_with_spaces_are_compared(run):
    path = run.parent / "test.csv"
    path.write_text(path.read_text().replace("text,label", "text, label"))
    change_record(run, data={"train.csv": "", "validation.csv": "", "test.csv": sha256(path)})
    assert "labels" not in failed_checks(run)


def test_labels_are_not_checked_without_the_test_set(run):
    (run.parent / "test.csv").write_text("text,label\n")
    assert [check.name for check in verify_record(run, run.parent) if check.passed is None] == ["labels"]


@pytest.mark.parametrize("version", ["unknown", "2.10.0"])
def test_versions_outside_the_bounds_fail(run, version):
    change_record(run, versions={"torch": version})
    assert "versions" in failed_checks(run)


def test_check_commit_accepts_only_commits_of_the_repository(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ("init -q", "commit -q --allow-empty -m first"):
        subprocess.run([*git, *shlex.split(command)], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert check_commit(commit, tmp_path).passed
    for other in (None, f"{commit}+", "0" * 40, "main"):
        assert check_commit(other, tmp_path).passed is False


def test_verify_record_refuses_damaged_predictions(run):
    (run / "test_predictions.csv").write_text("row,label\n0,1\n")
    with pytest.raises(UserError, match=r"test_predictions.csv"):
        verify_record(run, run.parent)


def test_check_command_compares_the_command_with_the_folder(tmp_path):
    bert, logreg = EXPERIMENTS[1], EXPERIMENTS[7]
    folder = tmp_path / bert.run_folder(7)
    write_example_record(folder, arguments={"data_dir": ".", "seed": 7}, command=bert.command_line(7) + " --resume")
    assert check_command(folder, tmp_path).passed
    change_record(
        folder, command=bert.command_line(7).replace("python", "torchrun --nproc_per_node 2") + " --save_model"
    )
    assert check_command(folder, tmp_path).passed
    change_record(folder, command=logreg.command_line(7))
    check = check_command(folder, tmp_path)
    assert not check.passed
    assert "is the command of experiment 8, the folder that of experiment 2" in check.detail
    change_record(folder, arguments={"data_dir": ".", "seed": 8})
    assert "not the folder of an experiment with seed 8" in check_command(folder, tmp_path).detail


def test_verify_exits_with_1_if_a_check_fails(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["--verify", str(run)])
    assert stopped.value.code == 1
    assert "FAILED      code: the run was made outside a Git checkout" in capsys.readouterr().out


def test_the_committed_record_of_experiment_8_passes():
    folder = REPOSITORY / "results" / "logreg-counts-seed123"
    checks = [*verify_record(folder, REPOSITORY), check_command(folder, REPOSITORY)]
    assert [check.name for check in checks if check.passed is False and check.name != "code"] == []
