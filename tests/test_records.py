import json

import pandas as pd
import pytest
from conftest import example_record, write_example

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
