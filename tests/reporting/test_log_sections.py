import re

from helpers import write_example_record, write_sized_example

import train_gpt
from finetuning.reporting import log_sections
from finetuning.reporting.experiments import PUBLISHED_SPLIT, Experiment, PublishedLog
from finetuning.reporting.records import read_record


def test_recorded_log_is_the_log_that_the_run_printed(tmp_path, tiny_gpt, data_dir, capsys):
    folder = tmp_path / "results" / "tiny-seed123"
    flags = "--weights random --context_length 16 --eval_freq 1 --num_epochs 2"
    folders = ["--data_dir", str(data_dir), "--output_dir", str(folder)]
    train_gpt.main(["--model_size", tiny_gpt, *flags.split(), *folders])
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("Ep ")]) == 12  # 48 reviews / 8, twice
    log = log_sections.recorded_log(read_record(folder)).splitlines()
    # The first and the last two step lines, and everything from the last epoch's accuracies on.
    assert log == [*printed[:2], "...", *printed[-10:-8], *printed[-8:]]
    assert (log[3][:18], log[4][:18]) == ("Ep 2 (Step 000010)", "Ep 2 (Step 000011)")


def test_recorded_log_shows_all_of_a_few_lines(tmp_path):
    write_example_record(
        tmp_path / "run",
        eval_history=[{"step": step, "train_loss": 0.9, "validation_loss": 0.95} for step in (0, 2, 4)],
        epoch_metrics=[{"step": 6, "train_accuracy": 1, "validation_accuracy": 1}],
        precision={"dtype": "fp32", "reason": ""},
        arguments={"data_dir": ".", "seed": 123, "batch_size": 1},
        reviews=dict.fromkeys(("train", "validation", "test"), 4),
    )
    log = log_sections.recorded_log(read_record(tmp_path / "run")).splitlines()
    assert log[:4] == [
        "Ep 1 (Step 000000): Train loss 0.900, Val loss 0.950",
        "Ep 1 (Step 000002): Train loss 0.900, Val loss 0.950",
        "Ep 2 (Step 000004): Train loss 0.900, Val loss 0.950",
        "Training accuracy: 100.00% | Validation accuracy: 100.00%",
    ]


LOG_1 = """
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
LOG_8 = """
Dummy classifier:
Training Accuracy: 50.01%
Validation Accuracy: 50.14%
Test Accuracy: 49.91%


Logistic regression classifier:
Training Accuracy: 99.80%
Validation Accuracy: 88.62%
Test Accuracy: 88.85%
"""
# Losses of the four published step lines of each experiment, then the accuracies after the epoch.
PUBLISHED = {
    1: "3.706 3.853 0.682 0.706 0.199 0.285 0.188 0.208 95.62 95.00",
    2: "0.848 0.775 0.655 0.682 0.146 0.318 0.204 0.217 92.50 88.75",
    3: "0.693 0.688 0.452 0.460 0.179 0.272 0.199 0.182 95.62 91.25",
    4: "0.695 0.698 0.670 0.690 0.083 0.098 0.170 0.086 92.50 94.38",  # last two lines: published under experiment 5
    5: "0.689 0.694 0.673 0.683 0.126 0.149 0.211 0.138 98.12 96.88",
    6: "0.699 0.698 0.564 0.606 0.086 0.168 0.160 0.131 95.62 93.75",
    7: "0.666 0.662 0.548 0.556 0.083 0.115 0.154 0.116 96.88 95.62",
    11: "98.12 91.88",
}


def test_published_log_has_every_published_number():
    by_number = {experiment.number: experiment for experiment in PUBLISHED_SPLIT if experiment.log}
    logs = {
        number: log_sections.published_log(experiment.log, experiment.published)
        for number, experiment in by_number.items()
    }
    assert logs[1] == LOG_1.strip()
    assert logs[8] == LOG_8.strip()
    assert by_number.keys() == {*PUBLISHED, 8}
    for number, expected in PUBLISHED.items():
        assert " ".join(re.findall(r"\d+\.\d+", logs[number])).startswith(expected)
        assert f"Test accuracy: {by_number[number].published:.2f}%" in logs[number]
    assert "Training completed in 23.01 minutes" in logs[11]


def test_log_section_shows_the_published_log_before_the_recorded_one(tmp_path):
    experiment = Experiment(
        number=8,
        title="Counts",
        published=91.88,
        log=PublishedLog(epoch=(95.62, 95.0), minutes=9.48, train=95.64, validation=92.32),
        command="python train_sklearn_logreg.py",
        name="logreg-counts",
    )
    published = log_sections.log_section(experiment, tmp_path)
    lines = published.splitlines()
    assert (lines[0], lines[-1]) == ("```", "```")
    assert lines[-6:-1] == [
        "Training accuracy: 95.62% | Validation accuracy: 95.00%",
        "Training completed in 9.48 minutes.",
        "Training accuracy: 95.64%",
        "Validation accuracy: 92.32%",
        "Test accuracy: 91.88%",
    ]
    assert log_sections.log_section(experiment._replace(log=None), tmp_path) == ""
    write_sized_example(tmp_path / "results" / "logreg-counts-seed1", 0.9)
    both = log_sections.log_section(experiment, tmp_path / "results")
    recorded = "Measured here on a CPU with seed 1 ([record](results/logreg-counts-seed1/record.json)):"
    assert both.startswith(f"{published}\n{recorded}\n```\n")
    assert both.endswith("Test Accuracy: 90.00%\n```")
    write_sized_example(tmp_path / "results" / "logreg-counts-seed2", 0.8)
    assert log_sections.log_section(experiment, tmp_path / "results") == both  # of several seeds, the first
