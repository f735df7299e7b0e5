import json
import shutil
import sys

import pandas as pd
import pytest
from conftest import TINY_CONFIGS, example_record, save_encoder, write_example

import train_bert_hf
import train_sklearn_logreg
from finetuning import records
from finetuning.errors import UserError
from finetuning.uncertainty import wilson_interval


def test_what_is_written_is_read_back(tmp_path):
    write_example(tmp_path / "run")
    read = records.read_record(tmp_path / "run")
    assert read["accuracy"]["test"] == 0.75
    assert read["test_interval_95"] == pytest.approx(wilson_interval(3, 4))
    assert read["copies"] == {"reviews": 1, "accuracy_without": pytest.approx(2 / 3)}
    predictions = records.read_predictions(tmp_path / "run", read)
    assert predictions.index.tolist() == [0, 1, 2, 3]
    assert predictions.to_dict("list") == {"label": [1, 0, 1, 0], "probability": [0.9, 0.25, 0.333333333, 0.1]}


def test_the_docstring_documents_every_key():
    documented = {line.split()[0] for line in records.__doc__.splitlines()
                  if line.startswith("    ") and line[4] != " "}
    assert documented == records.SCHEMA.keys()


def test_a_record_with_other_keys_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="surprise"):
        write_example(tmp_path, surprise=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[1]", '{"name": "a"}'])
def test_a_broken_record_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "record.json")):
        records.read_record(tmp_path)


@pytest.mark.parametrize(("change", "named"), [
    ({"accuracy": {"train": 1.0, "validation": 1.0}}, "test"), ({"seconds": {"training": "long", "evaluation": 1}},
                                                                "training"),
    ({"hardware": None}, "hardware"), ({"losses": {}}, "losses"), ({"reviews": 4}, "reviews")])
def test_a_value_of_the_wrong_kind_is_named(tmp_path, change, named):
    write_example(tmp_path)
    path = tmp_path / records.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{path} is not a whole record: {named} missing or of the wrong kind"):
        records.read_record(tmp_path)


@pytest.mark.parametrize("content", [
    "", "row,label\n0,1\n", "row,label,probability\n0,1,high\n",
    "row,label,probability\n0,1,0.9\n1,0,0.25\n2,1,0.3\n",  # one short
    "row,label,probability\n0,1,0.9\n1,0,0.25\n2,1,0.6\n3,0,0.1\n"])  # all right, and the record says 3 of 4
def test_predictions_of_another_run_are_named(tmp_path, content):
    write_example(tmp_path)
    (tmp_path / records.PREDICTIONS).write_text(content)
    with pytest.raises(UserError, match=records.PREDICTIONS):
        records.read_predictions(tmp_path, records.read_record(tmp_path))


def test_an_interrupted_write_leaves_the_old_record(tmp_path, monkeypatch):
    write_example(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match=r"No space left on device \(disk /"):
        write_example(tmp_path, name="another")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_record_has_one_key_a_line():
    text = records.to_json({"a": [1, 2], "b": {"c": None}})
    assert text == '{\n  "a": [1, 2],\n  "b": {"c": null}\n}\n'
    assert json.loads(text) == {"a": [1, 2], "b": {"c": None}}


def test_the_example_is_what_a_run_hands_over():
    made = {"finished", "test_interval_95", "calibration", "copies"}
    assert example_record().keys() | made == records.SCHEMA.keys()


@pytest.fixture
def run(data_dir, tmp_path, monkeypatch):
    """Run train_sklearn_logreg.py with more arguments; return what it leaves: its record, or None."""
    def train(*arguments, data_dir=data_dir, folder=tmp_path / "run"):
        train_sklearn_logreg.main(["--data_dir", str(data_dir), "--output_dir", str(folder), *arguments])
        return (folder / records.RECORD).read_bytes()
    return train


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--seed", "7"], r"record of another run \(other seed\): python .* --data_dir .*; choose another --output_dir"),
    (["--features", "nb-ngrams", "--seed", "7"], r"record of another run \(other features, seed\): ")])
def test_the_record_of_another_command_is_kept(arguments, message, run, tmp_path, capsys):
    run("--save_model")
    before = files(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(UserError, match=f"{tmp_path / 'run' / 'record.json'} is the {message}"):
        run(*arguments)
    assert capsys.readouterr().out == ""  # refused before the work
    assert files(tmp_path / "run") == before


def test_the_same_command_replaces_its_record(run, data_dir, tmp_path, capsys):
    first = run()
    copy = shutil.copytree(data_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("run"))
    assert {run("--save_model"), run(), run(data_dir=copy)} != {first}  # the same data by another name
    capsys.readouterr()
    (data_dir / "train.csv").write_bytes((data_dir / "train.csv").read_bytes() + b"good,1\n")
    with pytest.raises(UserError, match=r"\(other data_dir\)"):  # the last record's is the copy
        run()
    (copy / "train.csv").write_bytes((data_dir / "train.csv").read_bytes())
    run(data_dir=copy)
    assert f"{tmp_path / 'run' / 'record.json'} was made with other data; this run will replace it" in (
        capsys.readouterr().err)


def test_a_record_of_an_older_version_with_other_flags_is_the_same_commands(run, tmp_path):
    record = json.loads(run())
    del record["arguments"]["save_model"], record["arguments"]["seed"]
    record["arguments"]["gone"] = 1
    (tmp_path / "run" / records.RECORD).write_text(json.dumps(record))
    assert "gone" not in json.loads(run())["arguments"]


def test_another_script_is_another_command(run, tmp_path):
    record = json.loads(run())
    record["command"] = "torchrun --nproc_per_node 2 train_gpt.py --data_dir ."
    (tmp_path / "run" / records.RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"\(other script\): torchrun"):
        run()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"command": 1, "arguments": {}, "data": {}}'])
def test_a_file_that_is_no_record_is_not_replaced(content, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / records.RECORD).write_text(content)
    with pytest.raises(UserError, match="record.json is in the way and is not a run's record; choose another"):
        run()
    assert (tmp_path / "run" / records.RECORD).read_text() == content
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_models_of_one_name_in_two_folders_do_not_replace_each_others_record(data_dir, tmp_path, monkeypatch, failing,
                                                                             capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for parent in ("a", "b"):
        save_encoder(tmp_path / parent / "checkpoint-500", TINY_CONFIGS["bert"])
    arguments = ["--data_dir", str(data_dir), "--context_length", "16", "--max_steps", "1", "--model"]
    train_bert_hf.main([*arguments, "a/checkpoint-500"])
    before = files(tmp_path / "results")
    capsys.readouterr()
    monkeypatch.setattr(train_bert_hf, "load_model", lambda *_: pytest.fail("too late"))
    message = failing(train_bert_hf.main, *arguments, "b/checkpoint-500")
    assert "another run (other model): python " in message
    assert message.endswith("; choose another --output_dir to keep it, or delete it")
    assert files(tmp_path / "results") == before
