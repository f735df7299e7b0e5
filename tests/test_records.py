import json

import numpy as np
import pandas as pd
import pytest

from finetuning import records
from finetuning.errors import UserError


def record():
    made = {"finished", "test_interval_95", "calibration", "copies"}
    return dict.fromkeys(records.KEYS - made) | {"accuracy": {"test": 0.75}}


def test_the_wilson_interval_by_hand():
    # p = 1/2, n = 100: center 1/2, half-width z / (2 sqrt(n + z^2)) = 1.959964 / (2 * sqrt(103.84146))
    assert records.wilson_interval(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert records.wilson_interval(10_000, 10_000) == pytest.approx((0.9996160, 1.0), abs=1e-6)


def test_what_is_written_is_read_back(tmp_path):
    records.write_record(tmp_path / "run", record(), [True, False, False, False], [1, 0, 1, 0], [0.9, 0.25, 1 / 3, 0.1])
    read = records.read_record(tmp_path / "run")
    assert read["accuracy"] == {"test": 0.75}
    assert read["test_interval_95"] == pytest.approx(records.wilson_interval(3, 4))
    assert read["copies"] == {"reviews": 1, "accuracy_without": pytest.approx(2 / 3)}
    predictions = pd.read_csv(tmp_path / "run" / records.PREDICTIONS)
    assert predictions.to_dict("list") == {
        "row": [0, 1, 2, 3], "label": [1, 0, 1, 0], "probability": [0.9, 0.25, 0.333333333, 0.1]}


def test_calibration_by_hand():
    # Right with 0.9 and with 0.75, wrong with 0.9 and with 0.6; -log of 0.9, 0.75, 0.1 and 0.4, averaged:
    # (0.105361 + 0.287682 + 2.302585 + 0.916291) / 4
    found = records.calibration(np.array([1, 0, 0, 1]), np.array([0.9, 0.25, 0.9, 0.4]))
    assert found["log_loss"] == pytest.approx(0.902980, abs=1e-6)
    # The two of 0.9 are one bin: |1 right - 1.8|; 0.75: |1 - 0.75|; 0.6: |0 - 0.6|; over 4 reviews.
    assert found["expected_calibration_error"] == pytest.approx((0.8 + 0.25 + 0.6) / 4)


def test_certainty_has_its_bin_and_a_finite_price():
    found = records.calibration(np.array([1, 0]), np.array([1.0, 1.0]))
    assert found == {"log_loss": pytest.approx(6 * np.log(10) / 2), "expected_calibration_error": 0.5}


def test_the_docstring_documents_every_key():
    documented = {line.split()[0] for line in records.__doc__.splitlines()
                  if line.startswith("    ") and line[4] != " "}
    assert documented == records.KEYS


def test_a_record_with_other_keys_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="surprise"):
        records.write_record(tmp_path, record() | {"surprise": 1}, [False], [1], [0.9])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[1]", '{"name": "a"}'])
def test_a_broken_record_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "record.json")):
        records.read_record(tmp_path)


def test_an_interrupted_write_leaves_the_old_record(tmp_path, monkeypatch):
    records.write_record(tmp_path, record(), [False], [1], [0.9])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space"):
        records.write_record(tmp_path, record() | {"accuracy": {"test": 0.5}}, [False], [1], [0.1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_record_has_one_key_a_line():
    text = records.to_json({"a": [1, 2], "b": {"c": None}})
    assert text == '{\n  "a": [1, 2],\n  "b": {"c": null}\n}\n'
    assert json.loads(text) == {"a": [1, 2], "b": {"c": None}}
