import json

import pytest
from tiny_models import TINY_CONFIGS, save_encoder

from benchmarks import bf16_accuracy


def test_bf16_accuracy_compares_runs_of_the_train_script(data_dir, tmp_path, capsys):
    save_encoder(tmp_path / "model", TINY_CONFIGS["modernbert-base"])
    output = tmp_path / "bf16_accuracy.json"
    flags = {
        "--model": tmp_path / "model",
        "--data_dir": data_dir,
        "--seeds": 1,
        "--train": 16,
        "--test": 12,
        "--context_length": 16,
        "--learning_rate": 1e-3,
        "--output": output,
    }
    bf16_accuracy.main([str(word) for flag in flags.items() for word in flag])
    (row,) = json.loads(output.read_text())["seeds"]
    assert row["reviews"] == 12
    assert row["difference"] == pytest.approx(row["bf16"]["test"] - row["fp32"]["test"])
    assert row["bf16"]["last_loss"] == pytest.approx(row["fp32"]["last_loss"], abs=0.05)
    assert row["bf16"]["last_loss"] != row["fp32"]["last_loss"]
    assert "| mean |" in capsys.readouterr().out


def test_accuracy_table_holds_each_seed_and_the_mean():
    results = {"fp32": {"test": 0.9}, "bf16": {"test": 0.89}}
    row = {"seed": 1, "difference": -0.01, "interval": [-0.02, 0.0], "p_value": 0.051, **results}
    assert bf16_accuracy.accuracy_table([row, {**row, "bf16": {"test": 0.92}}]).splitlines()[2:] == [
        "| 1 | 90.00% | 89.00% | -1.00 points (-2.00 to +0.00) | 0.05 |",
        "| 1 | 90.00% | 92.00% | -1.00 points (-2.00 to +0.00) | 0.05 |",
        "| mean | 90.00% | 90.50% | +0.50 points | |",
    ]
