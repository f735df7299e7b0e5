import os
import re
import signal
import sys

import pandas as pd
import pytest
from helpers import REPOSITORY, change_record, write_example_record

import reproduce
from finetuning.reporting.experiments import SEED, Experiment
from finetuning.reporting.records import RECORD, read_record
from finetuning.system.errors import UserError
from finetuning.system.files import sha256
from finetuning.system.signals import Hangup, Terminated, raise_exception

COUNTS = Experiment(number=8, title="Counts", command="python train_sklearn_logreg.py", name="logreg-counts")


@pytest.fixture
def root(data_dir, monkeypatch):
    """Project folder with small data, the real scikit-learn script, and two experiments, the first of which fails."""
    (data_dir / "train_sklearn_logreg.py").symlink_to(REPOSITORY / "train_sklearn_logreg.py")
    monkeypatch.setattr(reproduce, "ROOT", data_dir)
    failing = COUNTS._replace(number=7, title="Fails", command="python train_sklearn_logreg.py --data_dir nowhere")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", (failing, COUNTS))
    return data_dir


def test_experiments_run_once_and_a_failure_does_not_stop_the_others(root, capfd):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([])
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    record = read_record(root / "results" / "logreg-counts-seed123")
    assert f"8  Counts{'':<39} {record['accuracy']['test']:.2%}" in out
    assert out.endswith("Failed:\n  python train_sklearn_logreg.py --data_dir nowhere\n")
    assert "cannot find nowhere/train.csv" in err

    reproduce.main(["8"])  # returns, so nothing failed
    out, err = capfd.readouterr()
    assert "Experiment 8: already recorded in results/logreg-counts-seed123" in err
    assert "Logistic regression classifier:" not in out


def test_each_seed_runs_once():
    assert reproduce.parse_args(["8", "--seeds", "124", "123", "124"]).seeds == [124, 123]


def test_missing_data_are_named_with_the_command_of_their_split(root):
    official = COUNTS._replace(data_dir="official")
    message = (
        "cannot find official/train.csv, official/validation.csv, official/test.csv; create the CSV files with: "
        "python download_prepare_dataset.py --split official --data_dir official"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        reproduce.run_experiments([COUNTS, official], [SEED])
    assert not (root / "results").exists()


def test_a_record_with_a_saved_model_counts_as_recorded(root):
    reproduce.main(["8"])
    change_record(root / COUNTS.run_folder(SEED), command=f"{COUNTS.command_line(SEED)} --save_model")
    assert reproduce.is_recorded(COUNTS, SEED)
    change_record(root / COUNTS.run_folder(SEED), command=f"{COUNTS.command_line(SEED)} --features nb-ngrams")
    assert not reproduce.is_recorded(COUNTS, SEED)


def test_run_command_resumes_from_a_checkpoint(root):
    (root / "echo.py").write_text(
        "import os, sys; open('echo', 'w').write(' '.join([*sys.argv[1:], os.environ['FLAG']]))"
    )
    for checkpoint, arguments in (("other.pt", "--seed 7 on"), ("checkpoint.previous.pt", "--seed 7 --resume on")):
        (root / checkpoint).touch()
        assert reproduce.run_command("python echo.py --seed 7", root, FLAG="on") == 0
        assert (root / "echo").read_text() == arguments


SAVE_ON_SIGNAL = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.6)  # longer than subprocess.run waits before it kills
    open("saved", "w").close()
    sys.exit(143)
number, *processes = map(int, sys.argv[1:])
signal.signal(number, save)
for process in processes:
    os.kill(process, number)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("name", "reaches_the_run", "exception"),
    [("SIGINT", True, KeyboardInterrupt), ("SIGTERM", False, Terminated), ("SIGHUP", False, Hangup)],
)
def test_run_process_waits_until_an_interrupted_run_has_saved(root, name, reaches_the_run, exception):
    """Ctrl-C reaches the run as well, other signals may reach only reproduce.py."""
    number = getattr(signal, name)
    before = signal.signal(number, raise_exception)
    shell = ["sh", "-c", 'exec "$0" "$@"' + " $$" * reaches_the_run]
    try:
        with pytest.raises(exception):
            reproduce.run_process([*shell, sys.executable, "-c", SAVE_ON_SIGNAL, str(int(number)), str(os.getpid())])
    finally:
        signal.signal(number, before)
    assert (root / "saved").exists()


def test_an_experiment_runs_again_if_the_data_changed(root):
    reproduce.main(["8"])
    first = read_record(root / "results" / "logreg-counts-seed123")
    pd.read_csv(root / "train.csv").iloc[:-1].to_csv(root / "train.csv", index=False)
    reproduce.main(["8"])
    assert read_record(root / "results" / "logreg-counts-seed123")["data"] != first["data"]


def test_summary_shows_mean_and_standard_deviation_of_several_seeds(root, capfd, monkeypatch):
    for seed, correct in [(1, 4), (2, 3)]:
        probabilities = [0.9, 0.1, 0.9, 0.1 if correct == 4 else 0.9]
        write_example_record(root / "results" / f"logreg-counts-seed{seed}", probabilities)
    monkeypatch.setattr(reproduce, "is_recorded", lambda experiment, seed: True)
    reproduce.main(["8", "--seeds", "1", "2"])
    # 100% and 75%: mean 87.5, standard deviation 25 / sqrt(2)
    assert capfd.readouterr().out.strip().endswith("87.50% (sd 17.68, 2 seeds)")


def test_a_damaged_record_is_an_error_that_names_it(root):
    folder = root / "results" / "logreg-counts-seed123"
    folder.mkdir(parents=True)
    (folder / RECORD).write_text("{}")
    with pytest.raises(UserError, match="logreg-counts-seed123"):
        reproduce.main(["8"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["99"],
        ["8", "--update_readme"],
        ["--update_readme", "--compare", "a", "b"],
        ["8", "--verify", "a"],
        ["8", "--csv", "a"],
        ["--seeds", "x"],
    ],
)
def test_contradictory_arguments_are_refused(arguments, failing):
    assert failing(lambda: reproduce.main(arguments))


@pytest.fixture
def two_runs(root):
    """Runs on the reviews "a", "bbb", "cc" and "dddd": A is incorrect on the third, B on the second and fourth."""
    pd.DataFrame({"text": ["a", "bbb", "cc", "dddd"], "label": [1, 0, 1, 0]}).to_csv(root / "test.csv", index=False)
    shared = {
        "arguments": {"data_dir": str(root), "seed": 123},
        "data": {"train.csv": "", "validation.csv": "", "test.csv": sha256(root / "test.csv")},
    }
    write_example_record(root / "run_a", (0.9, 0.25, 0.4, 0.1), name="A-run", **shared)
    write_example_record(root / "run_b", (0.9, 0.75, 0.6, 0.8), name="B-run", **shared)
    return str(root / "run_a"), str(root / "run_b")


def test_compare_shows_the_largest_disagreements_first(two_runs, capsys):
    reproduce.main(["--compare", *two_runs])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "A: A-run  75.00% of 4 test reviews; only A is correct on 2",
        "B: B-run  50.00% of 4 test reviews; only B is correct on 1",
    ]
    assert lines[2].startswith("B - A: -25.00 points (95% interval ")
    assert lines[2].endswith("p = 1 (exact McNemar test)")
    # The probabilities differ by 0.7, 0.5 and 0.2.
    assert lines[3:] == [
        "",
        "row\tlabel\tA\tB\treview",
        "3\t0\t0.100\t0.800\tdddd",
        "1\t0\t0.250\t0.750\tbbb",
        "2\t1\t0.400\t0.600\tcc",
    ]


def test_compare_limits_the_shown_disagreements_and_writes_all_to_a_file(two_runs, root, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "MAX_DISAGREEMENTS", 1)
    reproduce.main(["--compare", *two_runs, "--csv", str(root / "all.csv")])
    assert capsys.readouterr().out.splitlines()[5:] == ["3\t0\t0.100\t0.800\tdddd"]
    written = pd.read_csv(root / "all.csv", index_col="row")
    assert written["text"].to_dict() == {3: "dddd", 1: "bbb", 2: "cc"}
    assert written["probability_b"].tolist() == [0.8, 0.75, 0.6]


def test_compare_prints_the_statistics_without_the_reviews(two_runs, root, capsys):
    (root / "test.csv").unlink()
    with pytest.raises(UserError, match=r"cannot show the 3 reviews on which the runs disagree"):
        reproduce.main(["--compare", *two_runs])
    assert "only A is correct on 2" in capsys.readouterr().out


def test_compare_refuses_runs_on_different_test_sets(two_runs, tmp_path):
    write_example_record(tmp_path / "other")
    with pytest.raises(UserError, match="tested on different reviews"):
        reproduce.main(["--compare", two_runs[0], str(tmp_path / "other")])
