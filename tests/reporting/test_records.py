import json

import pandas as pd
import pytest
from helpers import example_record, write_example_record

from finetuning.reporting import records
from finetuning.reporting.statistics import wilson_interval
from finetuning.system.errors import UserError


def test_read_record_returns_what_write_record_wrote(tmp_path):
    write_example_record(tmp_path / "run")
    record = records.read_record(tmp_path / "run")
    assert record["accuracy"]["test"] == 0.75
    assert record["test_interval_95"] == pytest.approx(wilson_interval(3, 4))
    assert record["duplicates"] == {"reviews": 1, "accuracy_without": pytest.approx(2 / 3)}
    predictions = records.read_predictions(tmp_path / "run", record)
    assert predictions.index.tolist() == [0, 1, 2, 3]
    assert predictions.to_dict("list") == {"label": [1, 0, 1, 0], "probability": [0.9, 0.25, 0.333333333, 0.1]}


def test_module_docstring_documents_every_key():
    documented = {
        line.split()[0] for line in records.__doc__.splitlines() if line.startswith("    ") and line[4] != " "
    }
    assert documented == records.SCHEMA.keys()


def test_write_record_refuses_unknown_keys(tmp_path):
    with pytest.raises(ValueError, match="surprise"):
        write_example_record(tmp_path, surprise=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[1]", '{"name": "a"}'])
def test_read_record_names_the_damaged_file(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "record.json")):
        records.read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"accuracy": {"train": 1.0, "validation": 1.0}}, "test"),
        ({"seconds": {"training": "long", "evaluation": 1}}, "training"),
        ({"hardware": None}, "hardware"),
        ({"losses": {}}, "losses"),
        ({"reviews": 4}, "reviews"),
        ({"versions": {"torch": 2.11}}, "versions"),
        ({"arguments": {"data_dir": None, "seed": 1}}, "data_dir"),
        ({"test_interval_95": []}, "test_interval_95"),
        ({"test_interval_95": [0.5, "high"]}, "test_interval_95"),
    ],
)
def test_read_record_names_a_value_of_the_wrong_type(tmp_path, change, key):
    write_example_record(tmp_path)
    path = tmp_path / records.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{path} is not a complete record: {key} missing or of the wrong type"):
        records.read_record(tmp_path)


def test_read_record_refuses_a_malformed_command(tmp_path):
    write_example_record(tmp_path, command="python train_gpt.py --output_dir 'a run")
    with pytest.raises(UserError, match=r"holds a malformed command \(No closing quotation\): python train_gpt"):
        records.read_record(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "row,label\n0,1\n",
        "row,label,probability\n0,1,high\n",
        "row,label,probability\n0,1,0.9\n1,0,0.25\n2,1,0.3\n",  # one line less
        "row,label,probability\n0,1,0.9\n1,0,0.25\n2,1,0.6\n3,0,0.1\n",  # 4 correct, but the record says 3
    ],
)
def test_read_predictions_refuses_those_of_another_run(tmp_path, content):
    write_example_record(tmp_path)
    (tmp_path / records.PREDICTIONS).write_text(content)
    with pytest.raises(UserError, match=records.PREDICTIONS):
        records.read_predictions(tmp_path, records.read_record(tmp_path))


def test_write_record_keeps_the_old_record_on_a_full_disk(tmp_path, monkeypatch):
    write_example_record(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(UserError, match=r"No space left on device \(disk /"):
        write_example_record(tmp_path, name="another")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_to_json_writes_one_line_for_each_key():
    text = records.to_json({"a": [1, 2], "b": {"c": None}})
    assert text == '{\n  "a": [1, 2],\n  "b": {"c": null}\n}\n'
    assert json.loads(text) == {"a": [1, 2], "b": {"c": None}}


def test_example_record_has_every_key_that_write_record_does_not_add():
    added = {"finished", "test_interval_95", "calibration", "duplicates"}
    assert example_record().keys() | added == records.SCHEMA.keys()


@pytest.mark.parametrize(
    "command",
    [
        "python train_gpt.py --trainable_layers all --seed 7",
        "python train_gpt.py --seed=7 --trainable_layers all --resume",
        "torchrun --nproc_per_node 4 imdb/train_gpt.py --trainable_layers all --micro_batch_size 4 --seed 7",
        "python train_gpt.py --output_dir 'my runs/1' --trainable_layers all --seed 7 --save_model",
    ],
)
def test_essential_flags_leave_out_what_does_not_change_the_result(command):
    assert records.essential_flags(command) == {("train_gpt.py",), ("--trainable_layers", "all"), ("--seed", "7")}


def test_essential_flags_differ_for_another_value():
    assert records.essential_flags("python a.py --seed 7") != records.essential_flags("python a.py --seed 8")


def test_read_predictions_returns_them_in_the_order_of_the_rows(tmp_path):
    write_example_record(tmp_path)
    path = tmp_path / records.PREDICTIONS
    expected = records.read_predictions_csv(path)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(lines)]) + "\n")
    pd.testing.assert_frame_equal(records.read_predictions_csv(path), expected)


@pytest.mark.parametrize("lines", ["", "0,1,0.5\n0,1,0.5\n", "0,2,0.5\n", "0,1,\n", "0,1,1.5\n", "1,1,0.5\n"])
def test_read_predictions_refuses_missing_or_impossible_values(tmp_path, lines):
    (tmp_path / "predictions.csv").write_text(f"row,label,probability\n{lines}")
    with pytest.raises(UserError, match="does not hold a label 0 or 1 and a probability for each row"):
        records.read_predictions_csv(tmp_path / "predictions.csv")


def test_a_record_replaces_the_link_to_an_older_model(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    write_example_record(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "elsewhere").is_dir()
