import json
import shlex
import subprocess

import pandas as pd
import pytest
from conftest import REPOSITORY, write_example

import reproduce
from finetuning.errors import UserError
from finetuning.files import sha256
from finetuning.records import RECORD
from finetuning.verification import check_commit, verify_record


@pytest.fixture
def run(tmp_path):
    """A run's folder whose record fits, but for the code, which is of no commit."""
    (tmp_path / "requirements-extra.txt").write_text("# bounds\nnumpy>=2.3\ntorch>=2.11.0\n")
    pd.DataFrame({"text": list("abcd"), "label": [1, 0, 1, 0]}).to_csv(tmp_path / "test.csv", index=False)
    write_example(tmp_path / "run", arguments={"data_dir": ".", "seed": 123},
                  versions={"numpy": "2.4.6", "torch": "2.13.0+cpu"},
                  data={"train.csv": "", "validation.csv": "", "test.csv": sha256(tmp_path / "test.csv")})
    return tmp_path / "run"


def failed(run):
    return [check.name for check in verify_record(run, run.parent) if check.passed is False]


def change(run, **values):
    record = json.loads((run / RECORD).read_text())
    (run / RECORD).write_text(json.dumps(record | values))


def test_a_record_that_fits(run):
    assert failed(run) == ["code"]


@pytest.mark.parametrize(("changed", "names"), [
    ({"accuracy": {"train": 1, "validation": 1, "test": 0.76}}, ["test accuracy"]),
    ({"test_interval_95": [0.4, 0.9]}, ["test interval, low", "test interval, high"]),
    ({"calibration": {"log_loss": 0.1, "expected_calibration_error": 0.0}}, ["log loss", "expected calibration error"]),
    ({"versions": {"numpy": "2.2.9", "torch": "2.13.0+cpu"}}, ["versions"]),
    ({"reviews": {"train": 4, "validation": 4, "test": 5}}, ["number of test reviews"]),
])
def test_what_does_not_fit_is_named(run, changed, names):
    change(run, **changed)
    assert set(failed(run)) == {*names, "code"}


def test_predictions_of_other_labels_are_named(run):
    path = run / "test_predictions.csv"
    path.write_text(path.read_text().replace("0,1,0.9", "0,0,0.9"))
    assert "labels" in failed(run)


def test_labels_are_not_checked_without_the_test_set(run):
    (run.parent / "test.csv").write_text("text,label\n")
    assert [check.name for check in verify_record(run, run.parent) if check.passed is None] == ["labels"]


def test_the_code_must_be_a_commit_of_the_repository(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ("init -q", "commit -q --allow-empty -m first"):
        subprocess.run([*git, *shlex.split(command)], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert check_commit(commit, tmp_path).passed
    for other in (None, f"{commit}+", "0" * 40, "main"):
        assert check_commit(other, tmp_path).passed is False


def test_predictions_that_are_none_are_an_error(run):
    (run / "test_predictions.csv").write_text("row,label\n0,1\n")
    with pytest.raises(UserError, match=r"test_predictions.csv"):
        verify_record(run, run.parent)


def test_the_command_must_be_that_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    bert, logreg = (row for row in reproduce.EXPERIMENTS[1:8] if row.number in (2, 8))
    folder = tmp_path / reproduce.run_folder(bert, 7)
    write_example(folder, arguments={"seed": 7}, command=reproduce.command_line(bert, 7) + " --resume")
    assert reproduce.verify_command(folder).passed
    change(folder, command=reproduce.command_line(logreg, 7))
    check = reproduce.verify_command(folder)
    assert not check.passed
    assert "is the command of experiment 8, the folder that of experiment 2" in check.detail
    change(folder, arguments={"seed": 8})
    assert "not the folder of an experiment with seed 8" in reproduce.verify_command(folder).detail


def test_verify_exits_with_1_if_a_check_fails(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["--verify", str(run)])
    assert stopped.value.code == 1
    assert "FAILED      code: the run was made outside of a Git checkout" in capsys.readouterr().out


def test_the_committed_record_of_row_8_fits():
    checks = [*verify_record(REPOSITORY / "results" / "logreg-counts-seed123", REPOSITORY),
              reproduce.verify_command(REPOSITORY / "results" / "logreg-counts-seed123")]
    assert [check.name for check in checks if check.passed is False and check.name != "code"] == []
