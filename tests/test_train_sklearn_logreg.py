import dataclasses
import re
import subprocess
import sys

import pandas as pd
import pytest
from bad_inputs import bad_csv, parameters
from helpers import REPOSITORY

import train_sklearn_logreg
from finetuning.reporting import records


@pytest.mark.parametrize("features", train_sklearn_logreg.FEATURES)
def test_log_has_the_published_format_and_matches_the_record(features, data_dir, tmp_path, capsys):
    train_sklearn_logreg.main(
        ["--data_dir", str(data_dir), "--output_dir", str(tmp_path / "run"), "--features", features]
    )
    lines = capsys.readouterr().out.splitlines()
    accuracies = [r"Training Accuracy: \d+\.\d\d%", r"Validation Accuracy: \d+\.\d\d%", r"Test Accuracy: \d+\.\d\d%"]
    for line, pattern in zip(
        lines,
        ["Dummy classifier:", *accuracies, "", "", train_sklearn_logreg.FEATURES[features].title, *accuracies],
        strict=True,
    ):
        assert re.fullmatch(pattern, line), line
    # The dummy predicts the majority class of the training set.
    train, test = (pd.read_csv(data_dir / f"{split}.csv")["label"] for split in ("train", "test"))
    assert lines[3] == f"Test Accuracy: {(test == train.mode()[0]).mean():.2%}"
    record = records.read_record(tmp_path / "run")
    assert record["name"] == f"logreg-{features}-seed123"
    assert f"Test Accuracy: {record['accuracy']['test']:.2%}" == lines[-1]
    predictions = pd.read_csv(tmp_path / "run" / records.PREDICTIONS)
    assert ((predictions["probability"] > 0.5) == predictions["label"]).mean() == record["accuracy"]["test"]


def test_vocabulary_comes_from_the_training_set_alone(data_dir, tmp_path):
    def num_parameters(folder):
        train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(tmp_path / folder)])
        return records.read_record(tmp_path / folder)["parameters"]["total"]

    before = num_parameters("before")
    for split in ("validation", "test"):
        with (data_dir / f"{split}.csv").open("a") as file:
            file.write("unheard of words,1\n")
    assert num_parameters("after") == before


def test_too_large_vocabulary_is_reported(data_dir, failing, monkeypatch):
    ngrams = train_sklearn_logreg.FEATURES["nb-ngrams"]
    monkeypatch.setitem(
        train_sklearn_logreg.FEATURES,
        "nb-ngrams",
        dataclasses.replace(ngrams, vectorizer=lambda: ngrams.vectorizer(ngram_range=(1, 32))),
    )
    monkeypatch.setattr(train_sklearn_logreg, "print_status", lambda message: None)
    message = failing(
        train_sklearn_logreg.main, "--data_dir", data_dir, "--output_dir", data_dir / "run", "--features", "nb-ngrams"
    )
    assert message.endswith(
        "cannot compute --features nb-ngrams of the training set: 16 distinct words are too "
        "many for n-grams of 32 words"
    )


def test_script_does_not_import_torch():
    code = "import sys, train_sklearn_logreg; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


CASES = [
    bad_csv(
        "no words",
        b"text,label\n" + b"?,0\n!,1\n" * 24,
        "cannot compute --features counts of the training set: empty vocabulary",
        scripts="logreg",
    ),
]


@pytest.mark.parametrize(("bad", "script"), parameters(CASES))
def test_reviews_without_words_end_in_one_line_and_change_no_file(bad, script, assert_refused):
    assert_refused(bad, script)
