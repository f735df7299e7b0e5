"""Markdown tables of the experiments; every measured number comes from a record."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetuning.reporting.experiments import Experiment
from finetuning.reporting.parameter_counts import count_parameters
from finetuning.reporting.records import RECORD, read_record
from finetuning.reporting.statistics import Z_95, wilson_interval
from finetuning.system.errors import UserError

# Reviews of each split, by the folder of its CSV files: the tables refuse records of other data.
REVIEWS = {
    ".": {"train": 35_000, "validation": 5_000, "test": 10_000},
    "official": {"train": 20_000, "validation": 5_000, "test": 25_000},
}
STRINGS = {
    "en": {
        "results": ["#", "model", "parameters", "published", "measured here (95% interval)"],
        "interval": " ({:.2%} to {:.2%})",
        "seeds": ", mean of seeds {}, sd {:.2f} points",
        "separator": ", ",
        "measured log": "Measured here on {} with seed {} ([record]({})):",
    },
    "ja": {
        "results": ["#", "モデル", "パラメータ数", "公表値", "本リポジトリでの実測値(95% 信頼区間)"],
        "interval": "({:.2%}〜{:.2%})",
        "seeds": "、シード {} の平均、標準偏差 {:.2f} ポイント",
        "separator": "、",
        "measured log": "本リポジトリでの実測({}、シード {}、[記録]({})):",
    },
}
DASH = "–"


def load_records(experiment: Experiment, results: Path) -> dict[str, dict]:
    """Return {path of the record: record} of an experiment, one for each seed.

    A folder whose name ends with another seed than its record's is ignored. Raises UserError if a record is
    damaged or of other data.
    """
    records, parent = {}, results / experiment.data_dir
    # A folder without a record is that of a running or interrupted run.
    for path in sorted(parent.glob(f"{experiment.name}-seed*/{RECORD}")):
        record = read_record(path.parent)
        if not path.parent.name.endswith(f"-seed{record['arguments']['seed']}"):
            continue
        if record["reviews"] != REVIEWS[experiment.data_dir]:
            raise UserError(
                f"{path} has other numbers of reviews ({record['reviews']}) than its split "
                f"({REVIEWS[experiment.data_dir]})"
            )
        records[path.relative_to(results.parent).as_posix()] = record
    return records


def results_table(experiments: Iterable[Experiment], results: Path, language: str = "en") -> str:
    """Return the table of published and measured accuracies."""
    strings = STRINGS[language]
    rows = [
        [
            str(experiment.number),
            experiment.title,
            parameters_cell(experiment, results),
            f"{experiment.published:.2f}%" if experiment.published else DASH,
            accuracy_cell(experiment, results, strings),
        ]
        for experiment in experiments
    ]
    return markdown_table(strings["results"], rows)


def parameters_cell(experiment: Experiment, results: Path) -> str:
    """Return the number of parameters: from the record if there is one, else counted from the model's configuration."""
    records = list(load_records(experiment, results).values())
    if not records and not experiment.hub_id:
        return DASH
    count = records[0]["parameters"]["total"] if records else count_parameters(experiment.hub_id)
    return f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count / 1e3:,.1f}k"


def accuracy_cell(experiment: Experiment, results: Path, strings: dict) -> str:
    """Return the mean test accuracy of an experiment's records, with interval and links; a dash without records."""
    records = load_records(experiment, results)
    if not records:
        return DASH
    accuracies = [record["accuracy"]["test"] for record in records.values()]
    total = REVIEWS[experiment.data_dir]["test"]
    mean = statistics.fmean(accuracies)
    interval = strings["interval"].format(*wilson_interval(round(mean * total), total))
    if len(records) == 1:
        return accuracy_link(mean, records) + interval
    seeds = seed_links(records, strings["separator"])
    return f"{mean:.2%}{interval}" + strings["seeds"].format(seeds, 100 * statistics.stdev(accuracies))


def splits_table(experiments: Sequence[Experiment], results: Path) -> str:
    """Return the table of accuracy without duplicates, accuracy on the official split, and calibration."""
    official = {experiment.name: experiment for experiment in experiments if experiment.data_dir == "official"}
    rows = []
    for experiment in experiments:
        records = load_records(experiment, results)
        if experiment.data_dir != "." or not records:
            continue
        rows.append(
            [
                str(experiment.number),
                experiment.title,
                accuracy_link(record_mean(records, "accuracy", "test"), records),
                f"{record_mean(records, 'duplicates', 'accuracy_without'):.2%}",
                accuracy_cell(official[experiment.name], results, STRINGS["en"]) if experiment.name in official else "",
                f"{record_mean(records, 'calibration', 'log_loss'):.3f}",
                f"{record_mean(records, 'calibration', 'expected_calibration_error'):.3f}",
            ]
        )
    columns = ["#", "model", "random split", "without duplicates", "official split (95% interval)"]
    return markdown_table([*columns, "log loss", "calibration error"], rows)


def record_mean(records: dict[str, dict], group: str, key: str) -> float:
    """Return the mean over records of a value, such as "test" in the group "accuracy"."""
    return statistics.fmean(record[group][key] for record in records.values())


def times_table(experiments: Iterable[Experiment], results: Path, benchmarks: Iterable[Path]) -> str:
    """Return the table of run times and memory: from the records, else extrapolated by the benchmarks.

    `benchmarks` are files that benchmarks/speed.py writes, one for each kind of device.
    """
    reports = [report for path in benchmarks if path.exists() for report in json.loads(path.read_text("utf-8"))]
    rows = []
    for experiment in experiments:
        records = list(load_records(experiment, results).values())
        measured = recorded_times(records) or extrapolated_times(experiment.benchmark, reports)
        published = f"{experiment.log.minutes:.1f} min" if experiment.log and experiment.log.minutes else ""
        first = [str(experiment.number), experiment.title, published]
        rows += [[*first, *cells] for cells in measured or [[DASH, "", ""]]]
    columns = ["#", "model", "published: training", "measured: training and evaluation", "peak memory", "hardware"]
    return markdown_table(columns, rows)


def recorded_times(records: Sequence[dict]) -> list[list[str]]:
    """Return, for each hardware, the cells mean time, peak memory and hardware of its records."""
    rows = []
    for hardware in dict.fromkeys(record["hardware"] for record in records):
        same = [record for record in records if record["hardware"] == hardware]
        minutes = statistics.fmean(sum(record["seconds"].values()) / 60 for record in same)
        peak = max((record["peak_memory"] for record in same if record["peak_memory"]), default=None)
        rows.append([f"{minutes:.1f} min", gigabytes(peak), hardware])
    return rows


def extrapolated_times(benchmark: str | None, reports: Iterable[dict]) -> list[list[str]]:
    """Return the cells time, memory and hardware of each report of a benchmark, with --compile where that is faster."""
    rows = []
    for report in reports:
        candidates = []
        for implementation, flag in (("project", ""), ("project_compiled", " with --compile")):
            rounds = report["rows"].get(benchmark, [])
            runs = [timings[implementation] for timings in rounds if implementation in timings]
            if runs:
                seconds, peak = (statistics.median(run[key] for run in runs) for key in ("run", "peak_memory"))
                candidates.append((seconds, flag, peak))
        if candidates:
            seconds, flag, peak = min(candidates)
            duration = f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.1f} min"
            rows.append([f"{duration}{flag}, extrapolated", gigabytes(peak), report["hardware"]])
    return rows


def gigabytes(count: float | None) -> str:
    """Return a number of bytes in GB, or a dash if it is unknown."""
    return DASH if count is None else f"{count / 1e9:.1f} GB"


def accuracy_link(accuracy: float, records: dict[str, dict]) -> str:
    """Return an accuracy with a link to its record, or to the record of each seed."""
    if len(records) > 1:
        return f"{accuracy:.2%} (seeds {seed_links(records)})"
    return f"[{accuracy:.2%}]({next(iter(records))})"


def seed_links(records: dict[str, dict], separator: str = ", ") -> str:
    """Return the seeds of records, {path: record}, each with a link to its record."""
    return separator.join(f"[{record['arguments']['seed']}]({path})" for path, record in records.items())


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def significance_sentence(experiments: Sequence[Experiment], worse: int, better: int) -> str:
    """Return a sentence on which differences are significant, with two published results as the example."""
    total = REVIEWS["."]["test"]
    published = {each.number: (each.title, each.published / 100) for each in experiments if each.published}
    (worse_title, p), (better_title, q) = published[worse], published[better]
    # Without their predictions the two count as independent, which overestimates the sampling error.
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / total)
    return (
        f"On {total:,} test reviews, two accuracies near {100 * q:.0f}% differ by more than sampling error if they "
        f"are {100 * Z_95 * error:.1f} points apart, or less if both models fail on the same reviews. "
        f"{worse_title} at {p:.2%} and {better_title} at {q:.2%} differ by {100 * (q - p):.2f} points: a significant "
        f"difference between these two runs (p = {math.erfc((q - p) / error / math.sqrt(2)):.3f} or less). "
        "One run each does not tell how much another seed would change."
    )
