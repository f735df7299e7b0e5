"""Which records a run may replace."""

import json
import re
import shutil
import sys

import pytest
from tiny_models import TINY_CONFIGS, save_encoder

import train_bert_hf
import train_sklearn_logreg
from finetuning.reporting import records
from finetuning.system.errors import UserError


@pytest.fixture
def run(data_dir, tmp_path, monkeypatch):
    """Function that runs train_sklearn_logreg.py with more arguments and returns the bytes of its record."""

    def train(*arguments, data_dir=data_dir, folder=tmp_path / "run"):
        train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(folder), *arguments])
        return (folder / records.RECORD).read_bytes()

    return train


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--seed", "7"],
            r"record of another run \(other seed\): python .* --data_dir .*; choose another --output_dir",
        ),
        (["--features", "nb-ngrams", "--seed", "7"], r"record of another run \(other features, seed\): "),
    ],
)
def test_a_run_refuses_to_replace_the_record_of_another_command(arguments, message, run, tmp_path, capsys):
    run("--save_model")
    before = files(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run" / "record.json")) + f" is the {message}"):
        run(*arguments)
    assert capsys.readouterr().out == ""  # refused before training
    assert files(tmp_path / "run") == before


def test_a_run_replaces_the_record_of_the_same_command(run, data_dir, tmp_path, capsys):
    first = run()
    copy = shutil.copytree(data_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    assert {run("--save_model"), run(), run(data_dir=copy)} != {first}  # the same data in another folder
    capsys.readouterr()
    (data_dir / "train.csv").write_bytes((data_dir / "train.csv").read_bytes() + b"good,1\n")
    with pytest.raises(UserError, match=r"\(other data_dir\)"):  # the last run used the copy
        run()
    (copy / "train.csv").write_bytes((data_dir / "train.csv").read_bytes())
    run(data_dir=copy)
    assert f"{tmp_path / 'run' / 'record.json'} was made with other data; this run will replace it" in (
        capsys.readouterr().err
    )


def test_flags_of_another_version_do_not_make_another_command(run, tmp_path):
    record = json.loads(run())
    del record["arguments"]["save_model"], record["arguments"]["seed"]
    record["arguments"]["removed_flag"] = 1
    (tmp_path / "run" / records.RECORD).write_text(json.dumps(record))
    assert "removed_flag" not in json.loads(run())["arguments"]


def test_a_run_refuses_to_replace_the_record_of_another_script(run, tmp_path):
    record = json.loads(run())
    record["command"] = "torchrun --nproc_per_node 2 train_gpt.py --data_dir ."
    (tmp_path / "run" / records.RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"\(other script\): torchrun"):
        run()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"command": 1, "arguments": {}, "data": {}}'])
def test_a_run_refuses_to_replace_a_file_that_is_not_a_record(content, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / records.RECORD).write_text(content)
    with pytest.raises(UserError, match="record.json exists and is not the record of a run; choose another"):
        run()
    assert (tmp_path / "run" / records.RECORD).read_text() == content
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_models_with_the_same_name_in_two_folders_do_not_share_a_record(
    data_dir, tmp_path, monkeypatch, failing, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for parent in ("a", "b"):
        save_encoder(tmp_path / parent / "checkpoint-500", TINY_CONFIGS["bert"])
    arguments = ["--data_dir", str(data_dir), "--context_length", "16", "--max_steps", "1", "--model"]
    train_bert_hf.main([*arguments, "a/checkpoint-500"])
    before = files(tmp_path / "results")
    capsys.readouterr()
    monkeypatch.setattr(
        train_bert_hf, "load_pretrained", lambda *_: pytest.fail("the model was loaded before the check")
    )
    message = failing(train_bert_hf.main, *arguments, "b/checkpoint-500")
    assert "another run (other model): python " in message
    assert message.endswith("; choose another --output_dir to keep it, or delete it")
    assert files(tmp_path / "results") == before
