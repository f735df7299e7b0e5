import re
import subprocess
import sys

import pytest
from helpers import REPOSITORY

import download_prepare_dataset
import predict
import reproduce
import train_bert_hf
import train_gpt
import train_sklearn_logreg
from benchmarks import bf16_accuracy, scaling, speed
from finetuning import cli
from finetuning.reporting.records import read_record

TRAINERS = [train_gpt, train_bert_hf, train_sklearn_logreg]
SCRIPTS = [download_prepare_dataset, *TRAINERS, predict, reproduce]


@pytest.mark.parametrize("script", TRAINERS)
def test_missing_csv_names_the_command_that_writes_it(script, tmp_path, failing):
    message = failing(script.main, "--data_dir", tmp_path)
    assert f"python download_prepare_dataset.py --data_dir {tmp_path}" in message


@pytest.mark.parametrize("script", TRAINERS)
def test_csv_without_label_column_is_reported(script, data_dir, failing):
    (data_dir / "validation.csv").write_text("text,sentiment\ngood,1\n")
    assert "validation.csv has no column label" in failing(script.main, "--data_dir", data_dir)


@pytest.mark.parametrize("script", TRAINERS)
def test_invalid_label_is_reported(script, data_dir, failing):
    (data_dir / "test.csv").write_text("text,label\ngood,1\nbad,-1\n")
    assert "review 2: label '-1' is neither 0 (negative) nor 1 (positive)" in failing(
        script.main, "--data_dir", data_dir
    )


def test_unknown_model_is_reported_with_the_known_ones(data_dir, failing):
    message = failing(train_bert_hf.main, "--model", "nonsense", "--data_dir", data_dir)
    assert "cannot load --model nonsense" in message
    assert "it is none of distilbert, bert, roberta" in message


def test_missing_cache_without_network_is_reported(data_dir, failing, byte_tokenizer):
    assert "cannot load --model roberta" in failing(train_bert_hf.main, "--model", "roberta", "--data_dir", data_dir)
    assert "cannot get config.json of openai-community/gpt2 from the Hugging Face Hub" in failing(
        train_gpt.main, "--data_dir", data_dir
    )


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (train_gpt, ["--model_size", "gpt2-tiny"], "invalid choice: 'gpt2-tiny'"),
        (train_gpt, ["--num_epochs", "0"], "argument --num_epochs: must be a whole number of 1 or more, not '0'"),
        (train_gpt, ["--learning_rate", "-1"], "argument --learning_rate: must be a number above 0, not '-1'"),
        (train_gpt, ["--learning_rate", "nan"], "must be a number above 0, not 'nan'"),
        (train_gpt, ["--batch_size", "two"], "must be a whole number of 1 or more, not 'two'"),
        (train_gpt, ["--context_length", "long"], "or model_context_length, not 'long'"),
        (train_gpt, ["--context_length", "0"], "argument --context_length: must be a whole number of 1 or more"),
        (train_gpt, ["--seed", "-1"], "must be a whole number between 0 and 4294967295, not '-1'"),
        (train_gpt, ["--trainable_layers", "none"], "invalid choice: 'none'"),
        (train_gpt, ["--trainable", "all"], "unrecognized arguments: --trainable all"),
        (train_bert_hf, ["--use_attention_mask", "maybe"], "invalid choice: 'maybe'"),
        (train_sklearn_logreg, ["--model", "bert"], "unrecognized arguments: --model bert"),
        (download_prepare_dataset, ["--split", "half"], "invalid choice: 'half'"),
    ],
)
def test_invalid_arguments_are_reported(script, arguments, message, failing):
    assert message in failing(script.main, *arguments)


def test_unwritable_output_folder_is_reported_before_the_run(data_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr(
        sys, "argv", ["train_sklearn_logreg.py", "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "file")]
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(train_sklearn_logreg.main)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"train_sklearn_logreg.py: cannot write to --output_dir {tmp_path / 'file'}: File exists"
    ]
    assert printed.out == ""


@pytest.mark.parametrize("script", [*SCRIPTS, reproduce])
def test_help_fits_two_screens_and_shows_every_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 80
    flags = re.split(r"\n  (?=-)", "\n".join(lines))[1:]
    without_default = [flag.split()[0] for flag in flags if "default: " not in " ".join(flag.split())]
    # These three choose what to do and act on the named files: without them, nothing is done by default.
    without_default.remove("-h,")
    assert without_default == (["--compare", "--csv", "--verify"] if script is reproduce else [])


@pytest.mark.parametrize("script", [train_gpt, train_bert_hf])
def test_help_is_grouped(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    headings = re.findall(r"^(\w+):$", capsys.readouterr().out, re.MULTILINE)
    assert headings == ["options", "model", "training", "logging", "hardware", "run"]


def test_process_ends_with_one_line_and_status_2(tmp_path):
    process = subprocess.run(
        [sys.executable, "train_sklearn_logreg.py", "--data_dir", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("train_sklearn_logreg.py: cannot find ")


def test_run_main_keeps_the_traceback_of_a_bug():
    def broken():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run_main(broken)


def test_run_main_reports_ctrl_c_in_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        cli.run_main(interrupted)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_parse_args_stores_the_quoted_command(monkeypatch):
    args = train_gpt.parse_args(["--model_size", "gpt2-xl (1558M)"])
    assert args.command.endswith(" --model_size 'gpt2-xl (1558M)'")


def actions_of(script, monkeypatch):
    """Return {dest: argparse action} of a script."""

    class Parsed(Exception):
        """Carries the parser's actions out of the script."""

    def stop(parser, *_, **__):
        raise Parsed(parser._actions)

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(cli.ArgumentParser, method, stop)
    with pytest.raises(Parsed) as parsed:
        script.parse_args([])
    return {action.dest: action for action in parsed.value.args[0]}


@pytest.mark.parametrize("script", [*SCRIPTS, scaling, bf16_accuracy, speed])
def test_every_path_argument_expands_the_home_folder(script, monkeypatch):
    """In `--data_dir=~/reviews` the shell does not expand the "~"."""
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("USERPROFILE", "/home/user")
    path_actions = [
        action
        for action in actions_of(script, monkeypatch).values()
        if action.nargs != 0
        and action.choices is None
        and re.search(r"folder|file|archive", f"{action.dest} {action.help}")
    ]
    assert path_actions
    for action in path_actions:
        if action.dest != "model_size":  # its type also checks the value
            assert action.type("~/a b") == "/home/user/a b", action.dest
            assert action.type("https://host/~someone/a.tar.gz") == "https://host/~someone/a.tar.gz"


def test_home_folder_is_expanded_but_the_recorded_command_is_as_typed(data_dir, tmp_path, monkeypatch, tiny_gpt):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(data_dir)
    train_sklearn_logreg.main(["--data_dir=~", "--output_dir=~/runs/a"])
    record = read_record(tmp_path / "runs" / "a")
    assert record["arguments"]["output_dir"] == str(tmp_path / "runs" / "a")
    assert record["command"].endswith(" '--data_dir=~' '--output_dir=~/runs/a'")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert train_gpt.parse_args(["--model_size=~/model"]).model_size == str(tmp_path / "model")
