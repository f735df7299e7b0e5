"""From records to what the pages say: the tables and sentences between the markers of both READMEs."""

import json
import math
import statistics

from finetuning.console import accuracy_lines, end_of_training, epoch_line, step_line
from finetuning.errors import UserError
from finetuning.files import written_whole
from finetuning.records import RECORD, read_predictions, read_record
from finetuning.reviews import SPLITS
from finetuning.uncertainty import Z_95, answers, compare, wilson_interval

# Reviews of each split, by the folder of its CSV files: numbers of other data do not enter a table.
REVIEWS = {".": {"train": 35_000, "validation": 5_000, "test": 10_000},
           "official": {"train": 20_000, "validation": 5_000, "test": 25_000}}
PUBLISHED_STEPS = (0, 50, 4300, 4350)  # whose log lines were published, of 4,375 steps in one epoch

WORDS = {
    "en": {
        "results": ["#", "model", "what the command loads", "published", "measured here (95% interval)", "seeds",
                    "hardware", "minutes"],
        "splits": ["#", "model", "random split", "without copies", "official split (95% interval)", "log loss",
                   "calibration error"],
        "times": ["#", "model", "published: GPU, training", "measured: whole run", "its peak memory",
                  "hardware"],
        "not measured": "not measured yet", "own row": "(own row)", "sd": "sd {:.2f}",
        "log": "Row {}, {}: {}", "measured": "measured here", "published": "as published", "minutes": "{:.1f} min",
        "hours": "{:.1f} h, put together from parts",
        "resolution": "On {test:,} test reviews, accuracies of two runs near {better:.0f}% differ by more than the "
                      "luck of the draw of reviews where they lie {least:.1f} points apart, or less if the two mostly "
                      "err on the same reviews. {worse_title} at {worse:.2f}% against {better_title} at {better:.2f}% "
                      "is {difference:.2f} points, so a real difference between these two runs (p = {p:.3f} at most), "
                      "though one run each says nothing of what another seed would give.",
    },
    "ja": {
        "results": ["#", "モデル", "コマンドが読み込むもの", "公表値", "ここでの実測値(95% 信頼区間)", "シード",
                    "ハードウェア", "分"],
        "splits": ["#", "モデル", "無作為分割", "重複を除く", "公式分割(95% 信頼区間)", "対数損失", "較正誤差"],
        "times": ["#", "モデル", "公表値: GPU、学習のみ", "実測値: 実行全体", "そのピークメモリ", "ハードウェア"],
        "not measured": "未計測", "own row": "(独自の行)", "sd": "標準偏差 {:.2f}",
        "log": "{} 行目、{}: {}", "measured": "ここでの実測", "published": "公表されたもの", "minutes": "{:.1f} 分",
        "hours": "{:.1f} 時間(部分の計測から合成)",
        "resolution": "テストレビュー {test:,} 件では、{better:.0f}% 前後の二つの正解率は {least:.1f} ポイント"
                      "(同じレビューで誤ることが多ければそれ以下)離れていれば、レビューの選ばれ方の偶然を超えて異なります。"
                      "{worse_title} の {worse:.2f}% と {better_title} の {better:.2f}% の差は "
                      "{difference:.2f} ポイントで、この二回の実行の間の本当の差です(p は高々 {p:.3f})。"
                      "ただし一回ずつの実行なので、別のシードでどうなるかはわかりません。",
    },
}


def results_table(experiments, results, language="en"):
    """The Markdown table of all experiments, measured values from the records in the folder `results`."""
    words = WORDS[language]
    lines = table_head(words["results"])
    for row in experiments:
        published = f"{row.published:.2f}%" if row.published else words["own row"]
        cells = measured_cells(row, results, words)
        lines.append(table_line([str(row.number), row.title, row.loads, published, *cells]))
    return "\n".join(lines)


def measured_cells(row, results, words):
    """The cells of a row that come from its records: accuracy, seeds, hardware, minutes."""
    records = recorded(row, results)
    if not records:
        return [words["not measured"], "", "", ""]
    accuracies = [record["accuracy"]["test"] for record in records.values()]
    total = REVIEWS[row.data_dir]["test"]
    mean = statistics.fmean(accuracies)
    low, high = wilson_interval(round(mean * total), total)
    seeds = str(len(records))
    if len(records) > 1:
        seeds += f", {words['sd'].format(100 * statistics.stdev(accuracies))}"
    minutes = statistics.fmean(sum(record["seconds"].values()) / 60 for record in records.values())
    hardware = ", ".join(sorted({record["hardware"] for record in records.values()}))
    return [f"{link(f'{mean:.2%}', records)} ({low:.2%} to {high:.2%})", seeds, hardware, f"{minutes:.1f}"]


def splits_table(experiments, results, language="en"):
    """For each measured experiment: accuracy without copies, on the official split, and calibration."""
    words = WORDS[language]
    official = {row.name: row for row in experiments if row.data_dir == "official"}
    lines = table_head(words["splits"])
    for row in experiments:
        records = recorded(row, results)
        if row.data_dir != "." or not records:
            continue
        means = [statistics.fmean(values) for values in zip(
            *[(record["accuracy"]["test"], record["copies"]["accuracy_without"], record["calibration"]["log_loss"],
               record["calibration"]["expected_calibration_error"]) for record in records.values()], strict=True)]
        kept_apart = measured_cells(official[row.name], results, words)[0] if row.name in official else ""
        lines.append(table_line([str(row.number), row.title, link(f"{means[0]:.2%}", records), f"{means[1]:.2%}",
                                 kept_apart, f"{means[2]:.3f}", f"{means[3]:.3f}"]))
    return "\n".join(lines)


def logs(experiments, results, language="en"):
    """The abridged console logs of each experiment, folded up: as published, and of its first record."""
    words = WORDS[language]
    found = []
    for row in experiments:
        kinds = {words["published"]: published_log(row)} if row.log else {}
        if records := recorded(row, results):
            kinds[words["measured"]] = recorded_log(next(iter(records.values())))
        for kind, log in kinds.items():
            title = words["log"].format(row.number, row.title, kind)
            found.append(f"<details><summary>{title}</summary>\n\n```\n{log}\n```\n\n</details>")
    return "\n".join(found)


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


def times_table(experiments, results, benchmarks, language="en"):
    """The Markdown table of how long each experiment takes and how much memory: from its records, else its benchmark.

    `benchmarks` is the file that benchmarks/run.py writes, whose whole runs are put together from
    measured parts.
    """
    words = WORDS[language]
    measured = {row: (report["hardware"], rounds) for report in json.loads(benchmarks.read_text(encoding="utf-8"))
                for row, rounds in report["rows"].items()}
    lines = table_head(words["times"])
    for row in experiments:
        cells = [words["not measured"], "", ""]
        if row.benchmark in measured:
            hardware, rounds = measured[row.benchmark]
            seconds, memory = (statistics.median(sides["project"][part] for sides in rounds)
                               for part in ("run", "peak_memory"))
            cells = [words["hours"].format(seconds / 3600), gigabytes(memory), hardware]
        if records := list(recorded(row, results).values()):
            minutes = statistics.fmean(sum(record["seconds"].values()) / 60 for record in records)
            cells = [words["minutes"].format(minutes), gigabytes(max(record["peak_memory"] for record in records)),
                     records[0]["hardware"]]
        published = words["minutes"].format(row.log.minutes) if row.log and row.log.minutes else ""
        lines.append(table_line([str(row.number), row.title, published, *cells]))
    return "\n".join(lines)


def gigabytes(count):
    return f"{count / 1e9:.1f} GB"


def recorded(row, results):
    """The records of an experiment, {path of the record: record}, one for each seed; broken ones raise UserError."""
    found = {}
    for folder in sorted((results / row.data_dir).glob(f"{row.name}-seed*")):
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


def resolution(experiments, worse, better, language="en"):
    """Two sentences on what the test set can tell apart, by the example of two published rows.

    Without their predictions the two count as independent, which makes the difference least sure.
    """
    rows = {row.number: row for row in experiments}
    total = REVIEWS["."]["test"]
    p, q = (rows[number].published / 100 for number in (worse, better))
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / total)
    return WORDS[language]["resolution"].format(
        test=total, least=100 * Z_95 * error, worse_title=rows[worse].title, worse=100 * p,
        better_title=rows[better].title, better=100 * q, difference=100 * (q - p),
        p=math.erfc((q - p) / error / math.sqrt(2)))


def comparison(folder_a, folder_b):
    """What `--compare` says of two runs on the same test reviews; with it, the reviews on which they disagree.

    Returns (lines, data frame with the columns label, probability_a and probability_b). Raises
    UserError where the two were not tested on the same file.
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
    lines = [*(f"{letter}: {name:<{width}}  {record['accuracy']['test']:.2%} of {len(a):,} test reviews"
               for letter, name, record in zip("AB", names, records, strict=True)),
             f"both right {counts.both:,}, only A {counts.only_a:,}, only B {counts.only_b:,}, "
             f"neither {counts.neither:,}",
             f"B - A: {100 * counts.difference:+.2f} points, "
             f"95% interval {100 * low:+.2f} to {100 * high:+.2f} (Agresti & Min)",
             f"equally good? p = {counts.p_value:.2g} (exact McNemar test)"]
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
    return f"<!-- {name}: written by reproduce.py --table -->", f"<!-- end of {name} -->"
