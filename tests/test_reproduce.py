import json
import os
import re
import shutil
import signal
import sys

import pandas as pd
import pytest
from conftest import REPOSITORY, write_example

import reproduce
import train_gpt
from finetuning import report
from finetuning.errors import UserError
from finetuning.interrupts import Terminated, raise_terminated
from finetuning.records import RECORD, read_record
from reproduce import Experiment, PublishedLog

ROW = Experiment(8, "Counts", None, 88.85, None, "python train_sklearn_logreg.py", "logreg-counts")
OFFICIAL = ROW._replace(number=14, published=None, data_dir="official")


@pytest.fixture
def root(data_dir, monkeypatch):
    """A project folder with small data, the real scikit-learn script, and two rows, the first of which fails."""
    (data_dir / "train_sklearn_logreg.py").symlink_to(REPOSITORY / "train_sklearn_logreg.py")
    monkeypatch.setattr(reproduce, "ROOT", data_dir)
    failing = ROW._replace(number=7, title="Fails", command="python train_sklearn_logreg.py --data_dir nowhere")
    monkeypatch.setattr(reproduce, "EXPERIMENTS", (failing, ROW))
    return data_dir


def test_rows_run_once_and_a_failure_does_not_stop_the_others(root, capfd):
    with pytest.raises(SystemExit) as stopped:
        reproduce.main([])
    assert stopped.value.code == 1
    out, err = capfd.readouterr()
    record = read_record(root / "results" / "logreg-counts-seed123")
    assert f"8  Counts{'':<39} {record['accuracy']['test']:.2%}" in out
    assert out.endswith("Failed:\n  python train_sklearn_logreg.py --data_dir nowhere\n")
    assert "cannot find nowhere/train.csv" in err

    reproduce.main(["8"])  # no exit: nothing failed
    out, err = capfd.readouterr()
    assert "recorded already in results/logreg-counts-seed123" in err
    assert "Logistic regression classifier:" not in out


SAVES_BEFORE_IT_LEAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.6)  # longer than subprocess.run would wait before it kills
    open("saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
for number in sys.argv[1:]:
    os.kill(int(number), signal.SIGTERM if len(sys.argv) == 2 else signal.SIGINT)
time.sleep(60)
"""


def test_a_run_that_left_a_checkpoint_is_gone_on_with(root):
    (root / "say.py").write_text("import os, sys; open('said', 'w').write(' '.join([*sys.argv[1:], os.environ['SO']]))")
    for checkpoint, said in (("other.pt", "--seed 7 yes"), ("checkpoint.previous.pt", "--seed 7 --resume yes")):
        (root / checkpoint).touch()
        assert reproduce.run_command("python say.py --seed 7", root, SO="yes") == 0
        assert (root / "said").read_text() == said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("by_keyboard", [False, True])
def test_an_interrupt_lets_the_run_save(root, by_keyboard, monkeypatch):
    """SIGTERM comes to reproduce.py alone, Ctrl-C to the run as well."""
    handlers = {signal.SIGTERM: raise_terminated, signal.SIGINT: signal.default_int_handler}  # a job in the background
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}  # may ignore the latter
    try:
        with pytest.raises(KeyboardInterrupt if by_keyboard else Terminated):
            reproduce.run_to_end(["sh", "-c", 'exec "$0" "$@"' + " $$" * by_keyboard, sys.executable, "-c",
                                  SAVES_BEFORE_IT_LEAVES, str(os.getpid())])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (root / "saved").exists()


def test_other_data_is_another_experiment(root, capfd):
    reproduce.main(["8"])
    first = read_record(root / "results" / "logreg-counts-seed123")
    pd.read_csv(root / "train.csv").iloc[:-1].to_csv(root / "train.csv", index=False)
    reproduce.main(["8"])
    assert read_record(root / "results" / "logreg-counts-seed123")["data"] != first["data"]


def test_several_seeds_give_mean_and_spread(root, capfd, monkeypatch):
    for seed, right in [(1, 4), (2, 3)]:
        probabilities = [0.9, 0.1, 0.9, 0.1 if right == 4 else 0.9]
        write_example(root / "results" / f"logreg-counts-seed{seed}", probabilities)
    monkeypatch.setattr(reproduce, "is_recorded", lambda row, seed: True)
    reproduce.main(["8", "--seeds", "1", "2"])
    # 100% and 75%: mean 87.5, standard deviation 25 / sqrt(2)
    assert capfd.readouterr().out.strip().endswith("87.50% (sd 17.68, 2 seeds)")


def test_a_broken_record_stops_with_its_name(root):
    folder = root / "results" / "logreg-counts-seed123"
    folder.mkdir(parents=True)
    (folder / RECORD).write_text("{}")
    with pytest.raises(UserError, match="logreg-counts-seed123"):
        reproduce.main(["8"])


def test_the_command_of_another_seed_and_another_split():
    assert reproduce.command_line(ROW, 123) == "python train_sklearn_logreg.py"
    assert reproduce.command_line(ROW, 7) == "python train_sklearn_logreg.py --seed 7"
    assert reproduce.command_line(OFFICIAL, 7) == (
        "python train_sklearn_logreg.py --seed 7 --data_dir official --output_dir results/official/logreg-counts-seed7")


@pytest.mark.parametrize("arguments", [["99"], ["8", "--update_readme"], ["--update_readme", "--compare", "a", "b"],
                                       ["8", "--verify", "a"], ["8", "--csv", "a"], ["--seeds", "x"]])
def test_arguments_that_make_no_sense(arguments, failing):
    assert failing(lambda: reproduce.main(arguments))


@pytest.fixture
def two_runs(root):
    """Runs on the four reviews "a", "bbb", "cc" and "dddd": A errs on the third, B on the second and fourth."""
    pd.DataFrame({"text": ["a", "bbb", "cc", "dddd"], "label": [1, 0, 1, 0]}).to_csv(root / "test.csv", index=False)
    shared = {"arguments": {"data_dir": str(root)},
              "data": {**dict.fromkeys(["train.csv", "validation.csv"], ""),
                       "test.csv": reproduce.sha256(root / "test.csv")}}
    write_example(root / "run_a", (0.9, 0.25, 0.4, 0.1), name="A-run", **shared)
    write_example(root / "run_b", (0.9, 0.75, 0.6, 0.8), name="B-run", **shared)
    return str(root / "run_a"), str(root / "run_b")


def test_a_comparison_shows_the_largest_disagreements_first(two_runs, capsys):
    reproduce.main(["--compare", *two_runs])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["A: A-run  75.00% of 4 test reviews; only A is correct on 2",
                         "B: B-run  50.00% of 4 test reviews; only B is correct on 1"]
    assert lines[2].startswith("B - A: -25.00 points (95% interval ")
    assert lines[2].endswith("p = 1 (exact McNemar test)")
    # The probabilities differ by 0.7, 0.5 and 0.2.
    assert lines[3:] == ["", "row\tlabel\tA\tB\treview", "3\t0\t0.100\t0.800\tdddd", "1\t0\t0.250\t0.750\tbbb",
                         "2\t1\t0.400\t0.600\tcc"]


def test_a_comparison_shows_ten_disagreements_and_writes_all_to_a_file(two_runs, root, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "SHOWN_DISAGREEMENTS", 1)
    reproduce.main(["--compare", *two_runs, "--csv", str(root / "all.csv")])
    assert capsys.readouterr().out.splitlines()[5:] == ["3\t0\t0.100\t0.800\tdddd"]
    written = pd.read_csv(root / "all.csv", index_col="row")
    assert written["text"].to_dict() == {3: "dddd", 1: "bbb", 2: "cc"}
    assert written["probability_b"].tolist() == [0.8, 0.75, 0.6]


def test_without_the_reviews_the_numbers_still_come(two_runs, root, failing, capsys):
    (root / "test.csv").unlink()
    with pytest.raises(UserError, match=r"cannot show the 3 reviews on which the runs disagree"):
        reproduce.main(["--compare", *two_runs])
    assert "only A is correct on 2" in capsys.readouterr().out


def test_runs_on_other_reviews_are_not_compared(two_runs, tmp_path):
    write_example(tmp_path / "other")
    with pytest.raises(UserError, match="tested on different reviews"):
        reproduce.main(["--compare", two_runs[0], str(tmp_path / "other")])


def table_record(folder, accuracy, data_dir=".", **changes):
    """A record with this test accuracy, of the right size; the predictions beside it are not looked at."""
    write_example(folder, reviews=report.REVIEWS[data_dir], accuracy=dict.fromkeys(["train", "validation", "test"],
                                                                                   accuracy), **changes)


def test_a_row_of_one_record(tmp_path):
    table_record(tmp_path / "results" / "logreg-counts-seed123", 0.9, parameters={"all": 12_345, "trainable": 12_345})
    line = report.results_table([ROW], tmp_path / "results").splitlines()[-1]
    # Wilson: 0.9 of 10,000 is 89.40% to 90.57%
    assert line == ("| 8 | Counts | 12.3k | 88.85% | [90.00%](results/logreg-counts-seed123/record.json) "
                    "(89.40% to 90.57%) |")


def test_a_row_of_three_seeds(tmp_path):
    for seed, accuracy in enumerate([0.89, 0.9, 0.91]):
        table_record(tmp_path / "results" / f"logreg-counts-seed{seed}", accuracy)
    line = report.results_table([ROW], tmp_path / "results").splitlines()[-1]
    assert "[90.00%](results/logreg-counts-seed0/record.json) [+](results/logreg-counts-seed1/record.json)" in line
    assert line.endswith(", mean of 3 seeds, sd 1.00 |")


def test_a_missing_record_shows(tmp_path):
    assert report.results_table([ROW], tmp_path).endswith("| 8 | Counts | – | 88.85% | – |")
    bert = ROW._replace(hub_id="google-bert/bert-base-uncased", published=None)
    assert report.results_table([bert], tmp_path, "ja").endswith("| 8 | Counts | 109.5M | – | – |")


def test_a_record_under_a_former_name_shows_until_there_is_one_under_the_new_name(tmp_path):
    row = ROW._replace(name="new", former_name="old")
    table_record(tmp_path / "results" / "old-seed123", 0.8)
    assert "[80.00%](results/old-seed123/record.json)" in report.results_table([row], tmp_path / "results")
    table_record(tmp_path / "results" / "new-seed123", 0.9)
    assert [*report.recorded(row, tmp_path / "results")] == ["results/new-seed123/record.json"]


def test_a_record_of_other_data_is_not_shown_as_a_row(tmp_path):
    write_example(tmp_path / "results" / "logreg-counts-seed123")
    with pytest.raises(UserError, match="not of the split it stands for"):
        report.results_table([ROW], tmp_path / "results")


def test_both_splits_side_by_side(tmp_path):
    table_record(tmp_path / "results" / "logreg-counts-seed123", 0.9)
    table_record(tmp_path / "results" / "official" / "logreg-counts-seed123", 0.8, "official")
    line = report.splits_table([ROW, OFFICIAL], tmp_path / "results").splitlines()[-1]
    # 2 of the 3 reviews that are no duplicates are classified correctly; 0.8 of 25,000 is 79.50% to 80.49%.
    assert line.startswith("| 8 | Counts | [90.00%](results/logreg-counts-seed123/record.json) | 66.67% | [80.00%]")
    assert "(79.50% to 80.49%)" in line


def test_what_ten_thousand_reviews_resolve():
    text = report.resolution(reproduce.EXPERIMENTS, worse=4, better=6)
    # Two shares of 10,000, 0.9295 and 0.9379: sqrt((0.065530 + 0.058244) / 10,000) = 0.0035182; times 1.96: 0.69;
    # 0.0084 / 0.0035182 = 2.3876 standard errors, two-sided p = 0.0170
    assert "0.7 points apart" in text
    assert "0.84 points" in text
    assert "p = 0.017" in text


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    page = tmp_path / "README.md"
    start, end = report.markers("results")
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    report.update(page, {"results": "new"})
    assert page.read_text() == f"before\n{start}\nnew\n{end}\nafter\n"
    with pytest.raises(UserError, match="must have the lines"):
        report.update(page, {"results": "newer", "splits": "none"})
    assert page.read_text() == f"before\n{start}\nnew\n{end}\nafter\n"


@pytest.fixture
def copy_of_the_project(tmp_path):
    """The pages and the records, to be changed."""
    (tmp_path / "docs").mkdir()
    for page in reproduce.PAGES:
        shutil.copy(REPOSITORY / page, tmp_path / page)
    shutil.copytree(REPOSITORY / "results", tmp_path / "results")
    (tmp_path / reproduce.BENCHMARKS).parent.mkdir()
    shutil.copy(REPOSITORY / reproduce.BENCHMARKS, tmp_path / reproduce.BENCHMARKS)
    return tmp_path


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_pages_and_pictures_are_those_of_the_records(copy_of_the_project):
    before = snapshot(copy_of_the_project)
    reproduce.write_pages(copy_of_the_project)
    after = snapshot(copy_of_the_project)
    assert [path.as_posix() for path in before.keys() | after.keys() if before.get(path) != after.get(path)] == []


def test_a_deleted_record_shows(copy_of_the_project):
    shutil.rmtree(copy_of_the_project / "results" / "logreg-counts-seed123")
    before = snapshot(copy_of_the_project)
    reproduce.write_pages(copy_of_the_project)
    after = snapshot(copy_of_the_project)
    changed = {path.as_posix() for path in before if before[path] != after[path]}
    assert changed == {*reproduce.PAGES, "results/accuracy_against_time.svg"}
    assert "88.85% | – |" in (copy_of_the_project / "README.md").read_text(encoding="utf-8")


def test_a_measured_log_is_the_one_the_run_printed(tmp_path, tiny_gpt, data_dir, capsys):
    folder = tmp_path / "results" / "tiny-seed123"
    train_gpt.main(["--model_size", tiny_gpt, "--weights", "random", "--context_length", "16", "--data_dir",
                    str(data_dir), "--eval_freq", "1", "--num_epochs", "2", "--output_dir", str(folder)])
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("Ep ")]) == 12  # 48 reviews / 8, twice
    log = report.recorded_log(read_record(folder)).splitlines()
    # The first and the last two step lines, and all from the last epoch's accuracies on.
    assert log == [*printed[:2], "...", *printed[-10:-8], *printed[-8:]]
    assert (log[3][:18], log[4][:18]) == ("Ep 2 (Step 000010)", "Ep 2 (Step 000011)")


def test_a_measured_log_of_few_lines_is_shown_whole(tmp_path):
    curve = [{"step": step, "train_loss": 0.9, "validation_loss": 0.95} for step in (0, 2, 4)]
    write_example(tmp_path / "run", curve=curve, epochs=[{"step": 6, "train_accuracy": 1, "validation_accuracy": 1}],
                  precision={"used": "fp32", "why": ""}, arguments={"batch_size": 1}, reviews=dict.fromkeys(
                      ("train", "validation", "test"), 4))
    log = report.recorded_log(read_record(tmp_path / "run")).splitlines()
    assert log[:4] == ["Ep 1 (Step 000000): Train loss 0.900, Val loss 0.950",
                       "Ep 1 (Step 000002): Train loss 0.900, Val loss 0.950",
                       "Ep 2 (Step 000004): Train loss 0.900, Val loss 0.950",
                       "Training accuracy: 100.00% | Validation accuracy: 100.00%"]


ROW_1 = """
Ep 1 (Step 000000): Train loss 3.706, Val loss 3.853
Ep 1 (Step 000050): Train loss 0.682, Val loss 0.706
...
Ep 1 (Step 004300): Train loss 0.199, Val loss 0.285
Ep 1 (Step 004350): Train loss 0.188, Val loss 0.208
Training accuracy: 95.62% | Validation accuracy: 95.00%
Training completed in 9.48 minutes.

Evaluating on the full datasets ...

Training accuracy: 95.64%
Validation accuracy: 92.32%
Test accuracy: 91.88%
"""
ROW_8 = """
Dummy classifier:
Training Accuracy: 50.01%
Validation Accuracy: 50.14%
Test Accuracy: 49.91%


Logistic regression classifier:
Training Accuracy: 99.80%
Validation Accuracy: 88.62%
Test Accuracy: 88.85%
"""
# Losses of the four published step lines of each row, then the accuracies after the epoch.
PUBLISHED = {
    1: "3.706 3.853 0.682 0.706 0.199 0.285 0.188 0.208 95.62 95.00",
    2: "0.848 0.775 0.655 0.682 0.146 0.318 0.204 0.217 92.50 88.75",
    3: "0.693 0.688 0.452 0.460 0.179 0.272 0.199 0.182 95.62 91.25",
    4: "0.695 0.698 0.670 0.690 0.083 0.098 0.170 0.086 92.50 94.38",  # the last two lines are published under row 5
    5: "0.689 0.694 0.673 0.683 0.126 0.149 0.211 0.138 98.12 96.88",
    6: "0.699 0.698 0.564 0.606 0.086 0.168 0.160 0.131 95.62 93.75",
    7: "0.666 0.662 0.548 0.556 0.083 0.115 0.154 0.116 96.88 95.62",
    11: "98.12 91.88",
}


def test_published_logs_are_shown_in_full():
    rows = {row.number: row for row in reproduce.PUBLISHED_SPLIT if row.log}
    assert report.published_log(rows[1]) == ROW_1.strip()
    assert report.published_log(rows[8]) == ROW_8.strip()
    assert rows.keys() == {*PUBLISHED, 8}
    for number, expected in PUBLISHED.items():
        log = report.published_log(rows[number])
        assert " ".join(re.findall(r"\d+\.\d+", log)).startswith(expected)
        assert f"Test accuracy: {rows[number].published:.2f}%" in log
    assert "Training completed in 23.01 minutes" in report.published_log(rows[11])


def test_a_published_log_comes_before_the_measured_one(tmp_path):
    row = ROW._replace(log=PublishedLog((95.62, 95.0), 9.48, 95.64, 92.32), published=91.88)
    published = report.log_section(row, tmp_path)
    lines = published.splitlines()
    assert (lines[0], lines[-1]) == ("```", "```")
    assert lines[-6:-1] == ["Training accuracy: 95.62% | Validation accuracy: 95.00%",
                            "Training completed in 9.48 minutes.", "Training accuracy: 95.64%",
                            "Validation accuracy: 92.32%", "Test accuracy: 91.88%"]
    assert report.log_section(row._replace(log=None), tmp_path) == ""
    table_record(tmp_path / "results" / "logreg-counts-seed1", 0.9)
    both = report.log_section(row, tmp_path / "results")
    measured = "Measured here on a CPU ([record](results/logreg-counts-seed1/record.json)):"
    assert both.startswith(f"{published}\n{measured}\n```\n")
    assert both.endswith("Test Accuracy: 90.00%\n```")


def test_times_are_those_of_the_record_or_extrapolated(tmp_path):
    results, benchmarks = tmp_path / "results", tmp_path / "results.json"
    sides = [{"reference": {}, "project": {"run": hours * 3600, "peak_memory": 2e9}} for hours in (1, 9, 2)]
    benchmarks.write_text(json.dumps([{"hardware": "a GPU", "rows": {"counts": sides}}]))
    row = ROW._replace(log=PublishedLog((1, 1), 9.48, 1, 1))

    def line(row):
        return report.times_table([row], results, benchmarks).splitlines()[-1]
    assert line(row) == "| 8 | Counts | 9.5 min | – |  |  |"
    row = row._replace(benchmark="counts")
    assert line(row) == "| 8 | Counts | 9.5 min | 2.0 h, extrapolated | 2.0 GB | a GPU |"
    table_record(results / "logreg-counts-seed123", 0.9, peak_memory=3_000_000_000)
    assert line(row) == "| 8 | Counts | 9.5 min | 1.5 min | 3.0 GB | a CPU |"
