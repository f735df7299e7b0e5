import json
import shutil

import pytest
from helpers import write_example_record, write_sized_example

from finetuning.reporting import tables
from finetuning.reporting.experiments import EXPERIMENTS, Experiment, PublishedLog
from finetuning.system.errors import UserError

COUNTS = Experiment(
    number=8, title="Counts", published=88.85, command="python train_sklearn_logreg.py", name="logreg-counts"
)
OFFICIAL = COUNTS._replace(number=14, published=None, data_dir="official")


def test_results_table_shows_the_interval_of_one_record(tmp_path):
    folder = tmp_path / "results" / "logreg-counts-seed123"
    write_sized_example(folder, 0.9, parameters={"total": 12_345, "trainable": 12_345})
    line = tables.results_table([COUNTS], tmp_path / "results").splitlines()[-1]
    # Wilson: 0.9 of 10,000 is 89.40% to 90.57%
    assert line == (
        "| 8 | Counts | 12.3k | 88.85% | [90.00%](results/logreg-counts-seed123/record.json) (89.40% to 90.57%) |"
    )


def test_results_table_shows_the_mean_of_three_seeds(tmp_path):
    for seed, accuracy in enumerate([0.89, 0.9, 0.91]):
        write_sized_example(tmp_path / "results" / f"logreg-counts-seed{seed}", accuracy)
    line = tables.results_table([COUNTS], tmp_path / "results").splitlines()[-1]
    seeds = ", ".join(f"[{seed}](results/logreg-counts-seed{seed}/record.json)" for seed in range(3))
    assert line.endswith(f"| 90.00% (89.40% to 90.57%), mean of seeds {seeds}, sd 1.00 points |")


def test_results_table_shows_a_dash_without_a_record(tmp_path):
    assert tables.results_table([COUNTS], tmp_path).endswith("| 8 | Counts | – | 88.85% | – |")
    bert = COUNTS._replace(hub_id="google-bert/bert-base-uncased", published=None)
    assert tables.results_table([bert], tmp_path, "ja").endswith("| 8 | Counts | 109.5M | – | – |")


def test_load_records_ignores_the_folder_of_an_interrupted_run(tmp_path):
    (tmp_path / "results" / "logreg-counts-seed7").mkdir(parents=True)
    (tmp_path / "results" / "logreg-counts-seed7" / "checkpoint.pt").touch()
    assert tables.load_records(COUNTS, tmp_path / "results") == {}
    write_sized_example(tmp_path / "results" / "logreg-counts-seed123", 0.9)
    assert [*tables.load_records(COUNTS, tmp_path / "results")] == ["results/logreg-counts-seed123/record.json"]


def test_load_records_ignores_copies_of_a_folder(tmp_path):
    folder = tmp_path / "results" / "logreg-counts-seed123"
    write_sized_example(folder, 0.9)
    for copy in ("logreg-counts-seed123 (copy)", "logreg-counts-seed123-old", "logreg-counts-seed124"):
        shutil.copytree(folder, folder.parent / copy)
    assert [*tables.load_records(COUNTS, tmp_path / "results")] == ["results/logreg-counts-seed123/record.json"]


def test_load_records_refuses_a_record_of_other_data(tmp_path):
    write_example_record(tmp_path / "results" / "logreg-counts-seed123")
    with pytest.raises(UserError, match="has other numbers of reviews"):
        tables.results_table([COUNTS], tmp_path / "results")


def test_splits_table_shows_both_splits_in_one_line(tmp_path):
    write_sized_example(tmp_path / "results" / "logreg-counts-seed123", 0.9)
    write_sized_example(tmp_path / "results" / "official" / "logreg-counts-seed123", 0.8, "official")
    line = tables.splits_table([COUNTS, OFFICIAL], tmp_path / "results").splitlines()[-1]
    # Of the 3 reviews that are not duplicates, 2 are classified correctly; 0.8 of 25,000 is 79.50% to 80.49%.
    assert line.startswith("| 8 | Counts | [90.00%](results/logreg-counts-seed123/record.json) | 66.67% | [80.00%]")
    assert "(79.50% to 80.49%)" in line
    write_sized_example(tmp_path / "results" / "logreg-counts-seed124", 0.92)
    line = tables.splits_table([COUNTS, OFFICIAL], tmp_path / "results").splitlines()[-1]
    seeds = ", ".join(f"[{seed}](results/logreg-counts-seed{seed}/record.json)" for seed in (123, 124))
    assert line.startswith(f"| 8 | Counts | 91.00% (seeds {seeds}) | 66.67% | [80.00%]")


def test_significance_sentence_by_hand():
    text = tables.significance_sentence(EXPERIMENTS, worse=4, better=6)
    # Proportions of 10,000, 0.9295 and 0.9379: sqrt((0.065530 + 0.058244) / 10,000) = 0.0035182; times 1.96: 0.69;
    # 0.0084 / 0.0035182 = 2.3876 standard errors, two-sided p = 0.0170
    assert "0.7 points apart" in text
    assert "0.84 points" in text
    assert "p = 0.017" in text


def test_times_table_shows_the_faster_of_plain_and_compiled_runs_of_each_device(tmp_path):
    def report(hardware, **seconds):
        timings = {way: {"run": run, "peak_memory": 2e9} for way, run in seconds.items()}
        return [{"hardware": hardware, "rows": {"counts": [timings]}}]

    paths = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    paths[0].write_text(json.dumps(report("a CPU", project=7_200, reference=60)))
    paths[1].write_text(json.dumps(report("a GPU", project=180, project_compiled=90)))
    experiment = COUNTS._replace(benchmark="counts")
    assert tables.times_table([experiment], tmp_path / "results", paths).splitlines()[2:] == [
        "| 8 | Counts |  | 2.0 h, extrapolated | 2.0 GB | a CPU |",
        "| 8 | Counts |  | 1.5 min with --compile, extrapolated | 2.0 GB | a GPU |",
    ]


def test_times_table_prefers_the_record_to_the_benchmark(tmp_path):
    results, benchmarks = tmp_path / "results", tmp_path / "speed.json"
    rounds = [{"reference": {}, "project": {"run": hours * 3600, "peak_memory": 2e9}} for hours in (1, 9, 2)]
    benchmarks.write_text(json.dumps([{"hardware": "a GPU", "rows": {"counts": rounds}}]))
    experiment = COUNTS._replace(log=PublishedLog(train=1, validation=1, minutes=9.48))

    def line(experiment):
        (line,) = tables.times_table([experiment], results, [benchmarks, tmp_path / "missing.json"]).splitlines()[2:]
        return line

    assert line(experiment) == "| 8 | Counts | 9.5 min | – |  |  |"
    experiment = experiment._replace(benchmark="counts")
    assert line(experiment) == "| 8 | Counts | 9.5 min | 2.0 h, extrapolated | 2.0 GB | a GPU |"
    write_sized_example(results / "logreg-counts-seed123", 0.9, peak_memory=None)
    assert line(experiment) == "| 8 | Counts | 9.5 min | 1.5 min | – | a CPU |"
    write_sized_example(results / "logreg-counts-seed124", 0.9, peak_memory=3_000_000_000)
    assert line(experiment) == "| 8 | Counts | 9.5 min | 1.5 min | 3.0 GB | a CPU |"


def test_times_table_has_a_line_for_each_hardware_of_the_records(tmp_path):
    results = tmp_path / "results"
    for seed, hardware, seconds in [(1, "a CPU", 600), (2, "a GPU", 60), (3, "a GPU", 120)]:
        settings = {
            "hardware": hardware,
            "seconds": {"training": seconds, "evaluation": 0},
            "peak_memory": seed * 10**9,
        }
        write_sized_example(results / f"logreg-counts-seed{seed}", 0.9, **settings)
    assert tables.times_table([COUNTS], results, []).splitlines()[2:] == [
        "| 8 | Counts |  | 10.0 min | 1.0 GB | a CPU |",
        "| 8 | Counts |  | 1.5 min | 3.0 GB | a GPU |",
    ]
