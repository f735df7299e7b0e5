import json

import pytest
from conftest import REPOSITORY, TINY_CONFIGS, save_encoder

import train_gpt
from benchmarks import growth, precision, run


def side(**parts):
    return {"run": 1.0, "step": 1.0, "review": 1.0, "tokenizing": 1.0, "peak_memory": 100} | parts


def test_a_line_of_the_table_holds_the_median_of_the_rounds_ratios():
    rounds = [{"reference": side(run=6.0, step=a), "project": side(run=2.0, step=2.0)} for a in (2.0, 9.0, 4.0)]
    assert run.table_line("gpt2-all", rounds) == "| gpt2-all | 3.00x | 2.00x | 1.00x | 1.00x | 1.00x |"


def test_parts_that_one_side_does_not_have_stay_empty():
    rounds = [{"reference": {"run": 10.0, "peak_memory": 5}, "project": {"run": 4.0, "peak_memory": 10}}]
    assert run.table_line("data", rounds) == "| data | 2.50x |  |  |  | 0.50x |"
    rounds = [{"reference": side(run=8.0), "project": side(once=0.5, step=0.001)}]
    assert run.table_line("gpt2-last_layer", rounds) == "| gpt2-last_layer | 8.00x |  |  | 1.00x | 1.00x |"


@pytest.mark.parametrize("trainable", ["all", "last_block", "last_layer"])
@pytest.mark.parametrize("side", ["reference", "project"])
def test_both_sides_of_a_row_are_measured(trainable, side, tiny_gpt, data_dir, monkeypatch):
    monkeypatch.setitem(run.ROWS, "gpt2-all", (train_gpt, [
        "--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", trainable]))
    measured = run.measure(run.parse_args(["gpt2-all", "--side", side, "--data_dir", str(data_dir), "--steps", "3",
                                           "--reviews", "10", "--context_length", "16"]))
    assert {"tokenizing", "step", "review", "run", "peak_memory"} <= measured.keys()
    assert all(value > 0 for value in measured.values())
    assert ("once" in measured) == (side == "project" and trainable == "last_layer")
    assert ("log_review" in measured) == (side == "project" and trainable == "last_block")
    assert measured["run"] == pytest.approx(
        measured.get("once", 0) + measured.get("log_once", 0) + 4_375 * measured["step"]
        + 88 * 320 * measured.get("log_review", measured["review"]) + 50_000 * measured["review"])


def test_a_row_measured_anew_replaces_the_older_one(tmp_path):
    path = tmp_path / "results.json"
    run.write_report(path, {"command": "1", "rows": {"data": [1], "logreg": [2]}})
    run.write_report(path, {"command": "2", "rows": {"logreg": [3]}})
    run.write_report(path, {"command": "3", "rows": {"data": [4], "bert-all": [5]}})
    assert json.loads(path.read_text()) == [{"command": "2", "rows": {"logreg": [3]}},
                                            {"command": "3", "rows": {"data": [4], "bert-all": [5]}}]


def test_growth_is_measured(byte_tokenizer, tiny_gpt, data_dir, monkeypatch):
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, "gpt2-small (124M)", train_gpt.MODEL_CONFIGS[tiny_gpt])
    args = growth.parse_args(["--data_dir", str(data_dir), "--precision", "fp32"])
    row = growth.measure_reviews(args, 100)  # the 48 reviews of the training set, twice and 4 of them
    assert row["reviews"] == 100
    assert min(row["tokenizing"], row["cached"], row["batching"]) > 0
    assert growth.measure_step(args, 16)["step"] > 0


def test_the_precisions_are_compared_on_real_runs(data_dir, tmp_path, capsys):
    save_encoder(tmp_path / "model", TINY_CONFIGS["modernbert-base"])
    output = tmp_path / "precision.json"
    precision.main(["--model", str(tmp_path / "model"), "--data_dir", str(data_dir), "--seeds", "1", "--train", "16",
                    "--test", "12", "--context_length", "16", "--learning_rate", "1e-3", "--output", str(output)])
    row, = json.loads(output.read_text())["seeds"]
    assert row["reviews"] == 12
    assert row["difference"] == pytest.approx(row["bf16"]["test"] - row["fp32"]["test"])
    assert row["bf16"]["last_loss"] == pytest.approx(row["fp32"]["last_loss"], abs=0.05)
    assert row["bf16"]["last_loss"] != row["fp32"]["last_loss"]
    assert "| mean |" in capsys.readouterr().out


def test_the_table_of_precisions():
    sides = {"fp32": {"test": 0.9}, "bf16": {"test": 0.89}}
    row = {"seed": 1, "difference": -0.01, "interval": [-0.02, 0.0], "p_value": 0.051, **sides}
    assert precision.table([row, {**row, "bf16": {"test": 0.92}}]).splitlines()[2:] == [
        "| 1 | 90.00% | 89.00% | -1.00 points (-2.00 to +0.00) | 0.05 |",
        "| 1 | 90.00% | 92.00% | -1.00 points (-2.00 to +0.00) | 0.05 |",
        "| mean | 90.00% | 90.50% | +0.50 points | |"]


def test_the_page_holds_what_was_measured():
    folder = REPOSITORY / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8")
    reports = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    expected = {run.table_line(row, rounds) for report in reports for row, rounds in report["rows"].items()}
    starts = tuple(f"| {row}{end}" for row in run.ROWS for end in (" |", ", fp32 |"))
    assert {line for line in page.splitlines() if line.startswith(starts)} == expected
    precision_report = json.loads((folder / "precision.json").read_text(encoding="utf-8"))
    assert precision.table(precision_report["seeds"]) in page
    growth_report = json.loads((folder / "growth.json").read_text(encoding="utf-8"))
    assert growth.reviews_table(growth_report["reviews"]) in page
    assert growth.tokens_table(growth_report["tokens"]) in page
