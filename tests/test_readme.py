"""The README's commands are ones that exist, and its numbers are those of the records."""

import re
import shlex

import pytest
from conftest import REPOSITORY

import download_prepare_dataset
import predict
import reproduce
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from finetuning.records import run_folder

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PARSERS = {"download_prepare_dataset.py": download_prepare_dataset, "train_gpt.py": train_gpt,
           "train_bert_hf.py": train_bert_hf, "train_sklearn_logreg.py": train_sklearn_logreg,
           "reproduce.py": reproduce, "predict.py": predict}


def commands(text):
    """What is given to python in each command: [script, argument, ...]"""
    lines = re.findall(r"^(?:.* && |torchrun (?:--n\w+ \d+ |--rdzv\w+ \S+ )+)?((?:python )?\w+\.py\b.*)$",
                       text, re.MULTILINE)
    return [shlex.split(line.removeprefix("python ").partition("`")[0], comments=True) for line in lines]


def test_every_command_is_understood():
    found = commands(README)
    assert {script for script, *_ in found} == set(PARSERS)
    for script, *arguments in found:
        PARSERS[script].parse_args(arguments)


@pytest.mark.parametrize("row", reproduce.EXPERIMENTS, ids=lambda row: f"{row.number} {row.name}")
def test_every_experiment_has_its_command_and_its_folder(row):
    script, *arguments = shlex.split(reproduce.command_line(row, reproduce.SEED))[1:]
    assert [script, *arguments] in commands(README)
    args = PARSERS[script].parse_args(arguments)
    folder = run_folder(args, PARSERS[script].run_name(args))
    assert folder.as_posix() == reproduce.run_folder(row, reproduce.SEED)


def test_both_languages_give_the_same_commands():
    japanese = (REPOSITORY / "README.ja.md").read_text(encoding="utf-8")
    assert commands(japanese) == commands(README)
    assert code_blocks(japanese) == code_blocks(README)


def code_blocks(text):
    """The shell commands of a page, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_test_command_is_the_one_ci_runs():
    assert "python -m pytest" in README.splitlines()
    assert [line for line in README.splitlines() if line.endswith("-r requirements-dev.txt && python -m pytest")]
    assert "python -m pytest" in (REPOSITORY / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", reproduce.PAGES)
def test_the_layout_names_every_file(page):
    tree = (REPOSITORY / page).read_text(encoding="utf-8").split("\n.\n├── ")[1].split("```")[0]
    named = re.findall(r"(?:^|── )(\w+\.py)", tree)
    assert sorted(named) == sorted(path.name for folder in (REPOSITORY, REPOSITORY / "finetuning")
                                   for path in folder.glob("*.py") if path.name != "__init__.py")
