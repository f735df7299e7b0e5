"""The README's commands are ones that exist, and its numbers are those of the records."""

import json
import re
import shlex

import pytest
from conftest import REPOSITORY

import download_prepare_dataset
import reproduce
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning.errors import UserError
from finetuning.records import KEYS, RECORD

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PARSERS = {"download_prepare_dataset.py": download_prepare_dataset, "train_gpt.py": train_gpt,
           "train_bert_hf.py": train_bert_hf, "train_sklearn_logreg.py": train_sklearn_logreg,
           "reproduce.py": reproduce}


def commands(text):
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"^\s*(python \S+\.py.*)$", text, re.MULTILINE)]


def test_every_command_is_understood():
    found = commands(README)
    assert {script for script, *_ in found} == set(PARSERS)
    for script, *arguments in found:
        PARSERS[script].parse_args(arguments)


@pytest.mark.parametrize("row", reproduce.EXPERIMENTS, ids=lambda row: row.name)
def test_every_experiment_has_its_command_and_default_folder(row):
    script, *arguments = shlex.split(row.command)[1:]
    assert [script, *arguments] in commands(README)
    args = PARSERS[script].parse_args(arguments)
    assert PARSERS[script].run_name(args) == row.name


def test_the_table_is_that_of_the_records():
    start, end = reproduce.MARKERS
    assert README.split(start)[1].split(end)[0].strip() == reproduce.results_table(REPOSITORY / "results")


def test_a_missing_or_broken_record_shows(tmp_path):
    assert "88.85% | not measured yet" in reproduce.results_table(tmp_path)
    (tmp_path / "logreg-counts-seed123").mkdir()
    (tmp_path / "logreg-counts-seed123" / "record.json").write_text("{}")
    with pytest.raises(UserError, match="logreg-counts-seed123"):
        reproduce.results_table(tmp_path)


def test_a_record_of_other_data_is_not_shown_as_a_row(tmp_path):
    row = tmp_path / "logreg-counts-seed123"
    row.mkdir()
    record = dict.fromkeys(KEYS) | {"reviews": {"train": 32, "validation": 16, "test": 16}}
    (row / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match="not of the published split"):
        reproduce.results_table(tmp_path)


def test_only_the_table_is_replaced(tmp_path):
    page = tmp_path / "README.md"
    start, end = reproduce.MARKERS
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    reproduce.update(page, "new")
    assert page.read_text() == f"before\n{start}\nnew\n{end}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(UserError, match="must have the lines"):
        reproduce.update(page, "new")


def test_the_test_command_is_the_one_ci_runs():
    assert "python -m pytest" in README.splitlines()
    assert "python -m pytest" in (REPOSITORY / ".ci" / "run").read_text().splitlines()
