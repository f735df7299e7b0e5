"""Render records as Markdown: the sections between the markers of the READMEs and of docs/."""

import json
import math
import statistics

from finetuning.console import accuracy_lines, end_of_training, epoch_line, step_line
from finetuning.errors import UserError
from finetuning.files import written_whole
from finetuning.parameter_counts import count_parameters
from finetuning.records import RECORD, read_predictions, read_record
from finetuning.reviews import SPLITS
from finetuning.uncertainty import Z_95, answers, compare, wilson_interval

# Reviews of each split, by the folder of its CSV files: numbers of other data do not enter a table.
REVIEWS = {".": {"train": 35_000, "validation": 5_000, "test": 10_000},
           "official": {"train": 20_000, "validation": 5_000, "test": 25_000}}
PUBLISHED_STEPS = (0, 50, 4300, 4350)  # whose log lines were published, of 4,375 steps in one epoch

WORDS = {
    "en": {
        "results": ["#", "model", "parameters", "published", "measured here (95% interval)"],
        "interval": " ({:.2%} to {:.2%})", "seeds": ", mean of {} seeds, sd {:.2f}",
        "measured log": "Measured here on {} ([record]({})):",
    },
    "ja": {
        "results": ["#", "モデル", "パラメータ数", "公表値", "ここでの実測値(95% 信頼区間)"],
        "interval": "({:.2%}~{:.2%})", "seeds": "、{} 個のシードの平均、標準偏差 {:.2f}",
        "measured log": "ここでの実測({}、[記録]({})):",
    },
}
DASH = "–"


def results_table(experiments, results, language="en"):
    """Return the Markdown table of these experiments, measured values from the records in the folder `results`."""
    words = WORDS[language]
    lines = table_head(words["results"])
    for row in experiments:
        published = f"{row.published:.2f}%" if row.published else DASH
        lines.append(table_line([str(row.number), row.title, parameters(row, results), published,
                                 measured_accuracy(row, results, words)]))
    return "\n".join(lines)


def parameters(row, results):
    """Return how many parameters an experiment's model has: as its record counted them, else counted from the config.
    """
    records = list(recorded(row, results).values())
    if not records and not row.hub_id:
        return DASH
    count = records[0]["parameters"]["all"] if records else count_parameters(row.hub_id)
    return f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count / 1e3:,.1f}k"


def measured_accuracy(row, results, words):
    """Return the test accuracy of an experiment's records with its interval and links; a dash if there are none."""
    records = recorded(row, results)
    if not records:
        return DASH
    accuracies = [record["accuracy"]["test"] for record in records.values()]
    total = REVIEWS[row.data_dir]["test"]
    mean = statistics.fmean(accuracies)
    interval = words["interval"].format(*wilson_interval(round(mean * total), total))
    seeds = words["seeds"].format(len(records), 100 * statistics.stdev(accuracies)) if len(records) > 1 else ""
    return f"{link(f'{mean:.2%}', records)}{interval}{seeds}"


def splits_table(experiments, results):
    """Return the table of accuracy without duplicates, accuracy on the official split, and calibration."""
    official = {row.name: row for row in experiments if row.data_dir == "official"}
    lines = table_head(["#", "model", "random split", "without duplicates", "official split (95% interval)", "log loss",
                        "calibration error"])
    for row in experiments:
        records = recorded(row, results)
        if row.data_dir != "." or not records:
            continue
        means = [statistics.fmean(values) for values in zip(
            *[(record["accuracy"]["test"], record["copies"]["accuracy_without"], record["calibration"]["log_loss"],
               record["calibration"]["expected_calibration_error"]) for record in records.values()], strict=True)]
        on_official = measured_accuracy(official[row.name], results, WORDS["en"]) if row.name in official else ""
        lines.append(table_line([str(row.number), row.title, link(f"{means[0]:.2%}", records), f"{means[1]:.2%}",
                                 on_official, f"{means[2]:.3f}", f"{means[3]:.3f}"]))
    return "\n".join(lines)


def log_section(row, results, language="en"):
    """Return an experiment's published log and the log of its first record, if they exist, as code blocks."""
    blocks = [code_block(published_log(row))] if row.log else []
    for path, record in list(recorded(row, results).items())[:1]:
        blocks += [WORDS[language]["measured log"].format(record["hardware"], path), code_block(recorded_log(record))]
    return "\n".join(blocks)


def code_block(log):
    """Return a log as a Markdown code block, without blank lines and the title of the final accuracies."""
    title = end_of_training(0).split("\n")[2]
    return "\n".join(["```", *(line for line in log.splitlines() if line not in ("", title)), "```"])


def recorded_log(record):
    """What a run printed on standard output: of its step lines, the first and the last two."""
    if record["precision"] is None:  # scikit-learn, behind the dummy classifier
        return f"...\n{accuracy_lines(record['accuracy'], 'Accuracy')}"
    steps_per_epoch = record["reviews"]["train"] // record["arguments"]["batch_size"]
    lines = [step_line(point["step"] // steps_per_epoch + 1, point) for point in record["curve"]]
    if len(lines) > 4:
        lines[2:-2] = ["..."]
    return "\n".join([*lines, *map(epoch_line, record["epochs"][-1:]),
                      end_of_training(record["seconds"]["training"]), accuracy_lines(record["accuracy"])])


def published_log(row):
    """An experiment's published log, "..." where lines of it are not known."""
    log = row.log
    accuracies = by_split(log.train, log.validation, row.published)
    if log.dummy:
        return (f"Dummy classifier:\n{accuracy_lines(by_split(*log.dummy), 'Accuracy')}\n\n\n"
                f"Logistic regression classifier:\n{accuracy_lines(accuracies, 'Accuracy')}")
    lines = [step_line(1, {"step": step, "train_loss": train, "validation_loss": validation})
             for step, (train, validation) in zip(PUBLISHED_STEPS, log.losses, strict=False)]
    sample = dict(zip(("train_accuracy", "validation_accuracy"), (share / 100 for share in log.sample), strict=True))
    return "\n".join([*lines[:2], "...", *lines[2:], epoch_line(sample), end_of_training(60 * log.minutes),
                      accuracy_lines(accuracies)])


def by_split(*percent):
    """Accuracies in percent as shares, by split."""
    return {split: value / 100 for split, value in zip(SPLITS, percent, strict=True)}


def times_table(experiments, results, benchmarks):
    """Return the table of how long each experiment takes and how much memory: from its records, else its benchmark.

    `benchmarks` is the file of benchmarks/run.py, whose whole runs are extrapolated from measured parts.
    """
    measured = {row: (report["hardware"], rounds) for report in json.loads(benchmarks.read_text(encoding="utf-8"))
                for row, rounds in report["rows"].items()}
    lines = table_head(["#", "model", "published: training", "measured: whole run", "peak memory", "hardware"])
    for row in experiments:
        cells = [DASH, "", ""]
        if row.benchmark in measured:
            hardware, rounds = measured[row.benchmark]
            seconds, memory = (statistics.median(sides["project"][part] for sides in rounds)
                               for part in ("run", "peak_memory"))
            cells = [f"{seconds / 3600:.1f} h, extrapolated", gigabytes(memory), hardware]
        if records := list(recorded(row, results).values()):
            minutes = statistics.fmean(sum(record["seconds"].values()) / 60 for record in records)
            cells = [f"{minutes:.1f} min", gigabytes(max(record["peak_memory"] for record in records)),
                     records[0]["hardware"]]
        published = f"{row.log.minutes:.1f} min" if row.log and row.log.minutes else ""
        lines.append(table_line([str(row.number), row.title, published, *cells]))
    return "\n".join(lines)


def gigabytes(count):
    return f"{count / 1e9:.1f} GB"


def recorded(row, results):
    """Return {path of the record: record} of an experiment, one for each seed; raise UserError if one is broken."""
    found, parent = {}, results / row.data_dir
    folders = sorted(parent.glob(f"{row.name}-seed*")) or sorted(parent.glob(f"{row.former_name}-seed*"))
    for folder in folders:
        record = read_record(folder)
        if record["reviews"] != REVIEWS[row.data_dir]:
            raise UserError(f"{folder / RECORD} is not of the split it stands for: it has {record['reviews']} reviews")
        found[(folder / RECORD).relative_to(results.parent).as_posix()] = record
    return found


def link(text, records):
    """The number with a link to its record, or to each of them."""
    first, *more = records
    return f"[{text}]({first})" + "".join(f" [+]({path})" for path in more)


def table_head(cells):
    return [table_line(cells), "|" + "---|" * len(cells)]


def table_line(cells):
    return f"| {' | '.join(cells)} |"


def resolution(experiments, worse, better):
    """Say which differences the test set can tell apart, by the example of two published rows.

    Without their predictions the two count as independent, which overestimates the sampling error.
    """
    rows = {row.number: row for row in experiments}
    total = REVIEWS["."]["test"]
    p, q = (rows[number].published / 100 for number in (worse, better))
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / total)
    return (f"On {total:,} test reviews, two accuracies near {100 * q:.0f}% differ by more than sampling error if they "
            f"are {100 * Z_95 * error:.1f} points apart, or less if both models fail on the same reviews. "
            f"{rows[worse].title} at {p:.2%} and {rows[better].title} at {q:.2%} differ by {100 * (q - p):.2f} points: "
            f"a significant difference between these two runs (p = {math.erfc((q - p) / error / math.sqrt(2)):.3f} or "
            "less). One run each does not tell how much another seed would change.")


def comparison(folder_a, folder_b):
    """Compare two runs on the same test reviews.

    Return (three lines of summary, data frame with the columns label, probability_a and probability_b of the reviews
    on which they disagree). Raise UserError if the two were not tested on the same file.
    """
    records = [read_record(folder) for folder in (folder_a, folder_b)]
    if records[0]["data"]["test.csv"] != records[1]["data"]["test.csv"]:
        raise UserError(f"{folder_a} and {folder_b} were tested on different reviews")
    a, b = (read_predictions(folder, record)
            for folder, record in zip((folder_a, folder_b), records, strict=True))
    right_a, right_b = ((answers(frame["probability"]) == frame["label"]).to_numpy() for frame in (a, b))
    counts = compare(right_a, right_b)
    low, high = counts.interval
    names = [record["name"] for record in records]
    width = max(map(len, names))
    lines = [f"{letter}: {name:<{width}}  {record['accuracy']['test']:.2%} of {len(a):,} test reviews; "
             f"only {letter} is correct on {only:,}"
             for letter, name, record, only in zip("AB", names, records, (counts.only_a, counts.only_b), strict=True)]
    lines += [f"B - A: {100 * counts.difference:+.2f} points (95% interval {100 * low:+.2f} to {100 * high:+.2f}), "
              f"p = {counts.p_value:.2g} (exact McNemar test)"]
    both = a.rename(columns={"probability": "probability_a"}).assign(probability_b=b["probability"])
    return lines, both[right_a != right_b]


def update(page, sections):
    """Replace what stands between the markers of a page; raises UserError where it lacks one.

    `sections` is {name: text}; the markers are those of `markers(name)`.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in sections.items():
        start, end = markers(name)
        if text.count(start) != 1 or text.count(end) != 1:
            raise UserError(f"{page} must have the lines {start} and {end} once each")
        before, rest = text.split(start)
        text = f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
    with written_whole(page) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def markers(name):
    """The lines before and after a section that is written by the program."""
    return f"<!-- {name}: written by reproduce.py --update_readme -->", f"<!-- end of {name} -->"
