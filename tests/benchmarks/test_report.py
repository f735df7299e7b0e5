import json

import pytest
from tiny_benchmarks import measured

from benchmarks import bf16_accuracy, report, scaling
from finetuning.system.errors import UserError


def test_ratio_table_holds_the_median_of_the_rounds_ratios():
    rounds = [
        {"reference": measured(run=6.0, step=step), "project": measured(run=2.0, step=2.0)} for step in (2.0, 9.0, 4.0)
    ]
    assert report.ratio_table({"gpt2-all": rounds}).splitlines()[2:] == [
        "| gpt2-all | 3.00x | 2.00x | 1.00x | 1.00x | 1.00x |  |  |  |"
    ]


def test_ratio_table_counts_the_better_precision_of_the_trainer_for_each_part():
    trainers = {"trainer_fp32": measured(step=3.0, review=5.0), "trainer_bf16": measured(step=4.0, review=2.0)}
    rounds = [trainers | {"project": measured(), "project_compiled": measured(step=0.5)}]
    assert report.ratio_table({"bert-all": rounds}).splitlines()[2:] == [
        "| bert-all |  |  |  |  |  | 3.00x | 2.00x | 1.00x |",
        "| bert-all, compiled |  |  |  |  |  | 6.00x | 2.00x | 1.00x |",
    ]


def test_ratio_table_leaves_cells_empty_that_were_not_measured_or_do_not_compare():
    rows = {
        "data": [{"reference": {"run": 10.0, "peak_memory": 5}, "project": {"run": 4.0, "peak_memory": 10}}],
        "gpt2-last_layer": [{"reference": measured(run=8.0), "project": measured(caching=0.5, step=0.001)}],
    }
    assert report.ratio_table(rows).splitlines()[2:] == [
        "| data | 2.50x |  |  |  | 0.50x |  |  |  |",
        "| gpt2-last_layer | 8.00x |  |  | 1.00x | 1.00x |  |  |  |",
    ]


def test_utilization_table_holds_medians():
    shares = {"matmul_throughput": 325e9, "step_flops": 1024.7e9, "review_flops": 42.69e9, "review_utilization": 0.824}
    rounds = [
        {"project": measured(precision="fp32", step_utilization=share, **shares), "reference": measured()}
        for share in (0.8, 0.851, 0.9)
    ]
    assert report.utilization_table({"gpt2-all": rounds, "logreg": [{"project": measured()}]}).splitlines()[2:] == [
        "| gpt2-all | fp32 | 325 GFLOP/s | 1,025 GFLOP | 85% | 42.7 GFLOP | 82% |"
    ]
    assert report.utilization_table({"logreg": [{"project": measured()}]}) == "Not measured yet."


def test_add_report_replaces_earlier_measurements_of_the_same_workload(tmp_path):
    path = tmp_path / "speed.json"
    report.add_report(path, {"command": "1", "rows": {"data": [1], "logreg": [2]}})
    report.add_report(path, {"command": "2", "rows": {"logreg": [3]}})
    report.add_report(path, {"command": "3", "rows": {"data": [4], "bert-all": [5]}})
    assert report.read_reports(path) == [
        {"command": "2", "rows": {"logreg": [3]}},
        {"command": "3", "rows": {"data": [4], "bert-all": [5]}},
    ]
    assert report.merge_rows(report.read_reports(path)) == {"bert-all": [5], "data": [4], "logreg": [3]}


def test_update_page_writes_the_sections_between_their_markers(tmp_path):
    rounds = [{"reference": measured(run=2.0), "project": measured()}]
    for path in (report.PATH, report.GPU_PATH):
        report.add_report(tmp_path / path.name, {"hardware": "a GPU", "rows": {"logreg": rounds}})
    page = tmp_path / "README.md"
    lines = [f"<!-- {name}: written by benchmarks/speed.py --update_readme -->\nold\n<!-- end of {name} -->\nkept\n"
             for name in report.sections(tmp_path)]  # fmt: skip
    page.write_text("".join(lines))
    report.update_page(tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert text.count("kept") == 3
    assert text.count("| logreg | 2.00x |") == 2
    assert "a GPU:\n\n| workload |" in text
    report.update_page(tmp_path)
    assert page.read_text() == text
    page.write_text(lines[0])
    with pytest.raises(UserError, match="must have the lines"):
        report.update_page(tmp_path)


def test_page_holds_what_was_measured():
    page = (report.FOLDER / "README.md").read_text(encoding="utf-8")
    for name, content in report.sections().items():
        assert f"-->\n{content}\n<!-- end of {name} -->" in page
    bf16_report = json.loads((report.FOLDER / "bf16_accuracy.json").read_text(encoding="utf-8"))
    assert bf16_accuracy.accuracy_table(bf16_report["seeds"]) in page
    scaling_report = json.loads((report.FOLDER / "scaling.json").read_text(encoding="utf-8"))
    assert scaling.reviews_table(scaling_report["reviews"]) in page
    assert scaling.tokens_table(scaling_report["tokens"]) in page
