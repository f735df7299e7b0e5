import json

import pytest
from conftest import REPOSITORY

import train_gpt
from benchmarks import growth, run


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


@pytest.mark.parametrize("trainable", ["all", "last_layer"])
@pytest.mark.parametrize("side", ["reference", "project"])
def test_both_sides_of_a_row_are_measured(trainable, side, tiny_gpt, data_dir, monkeypatch):
    monkeypatch.setitem(run.ROWS, "gpt2-all", (train_gpt, [
        "--model_size", tiny_gpt, "--weights", "random", "--trainable_layers", trainable]))
    measured = run.measure(run.parse_args(["gpt2-all", "--side", side, "--data_dir", str(data_dir), "--steps", "3",
                                           "--reviews", "10", "--context_length", "16"]))
    assert {"tokenizing", "step", "review", "run", "peak_memory"} <= measured.keys()
    assert all(value > 0 for value in measured.values())
    assert measured["run"] == pytest.approx(measured.get("once", 0) + 4_375 * measured["step"]
                                            + (88 * 320 + 50_000) * measured["review"])


def test_growth_is_measured(byte_tokenizer, tiny_gpt, data_dir, monkeypatch):
    monkeypatch.setitem(train_gpt.MODEL_CONFIGS, "gpt2-small (124M)", train_gpt.MODEL_CONFIGS[tiny_gpt])
    args = growth.parse_args(["--data_dir", str(data_dir), "--precision", "fp32"])
    row = growth.measure_reviews(args, 100)  # the 48 reviews of the training set, twice and 4 of them
    assert row["reviews"] == 100
    assert min(row["tokenizing"], row["cached"], row["batching"]) > 0
    assert growth.measure_step(args, 16)["step"] > 0


def test_the_page_holds_what_was_measured():
    folder = REPOSITORY / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8")
    reports = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    expected = {run.table_line(row, rounds) for report in reports for row, rounds in report["rows"].items()}
    assert {line for line in page.splitlines() if line.startswith(tuple(f"| {row} |" for row in run.ROWS))} == expected
    growth_report = json.loads((folder / "growth.json").read_text(encoding="utf-8"))
    assert growth.reviews_table(growth_report["reviews"]) in page
    assert growth.tokens_table(growth_report["tokens"]) in page
