"""The generated sections of the READMEs and of docs/, and the figures, rendered from the records."""

from pathlib import Path

from finetuning.reporting import tables
from finetuning.reporting.comparison import compare_runs
from finetuning.reporting.experiments import EXPERIMENTS, PUBLISHED_SPLIT
from finetuning.reporting.log_sections import code_block, log_section
from finetuning.reporting.plots import Point, plot_experiments, plot_run
from finetuning.reporting.tables import load_records
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write

FIGURE = Path("results") / "accuracy_against_time.svg"
BENCHMARKS = Path("benchmarks") / "speed.json", Path("benchmarks") / "speed_gpu.json"
README_SECTIONS = ["results", "additions", *(f"log {number}" for number in range(1, 9))]
PAGES = {  # {page: (language, generated sections)}
    "README.md": ("en", README_SECTIONS),
    "README.ja.md": ("ja", README_SECTIONS),
    "docs/experiments.md": ("en", ["significance", "comparison", "splits", "log 9", "log 10", "log 11"]),
    "docs/hardware.md": ("en", ["times"]),
}


def write_pages(root: Path) -> None:
    """Write the generated sections of all PAGES and the figures of all runs."""
    results = root / "results"
    for page, (language, names) in PAGES.items():
        link = f"]({'../' * page.count('/')}results/"  # relative to the page
        sections = {name: section(name, results, language).replace("](results/", link) for name in names}
        replace_sections(root / page, sections)
    for experiment in EXPERIMENTS:
        for record in load_records(experiment, results):
            plot_run((root / record).parent)
    plot_experiments(accuracy_points(results), missing_footnote(results), root / FIGURE)


def section(name: str, results: Path, language: str) -> str:
    """Return the Markdown of a generated section."""
    kind, _, number = name.partition(" ")
    if kind == "log":
        return log_section(PUBLISHED_SPLIT[int(number) - 1], results, language)
    return {
        "results": lambda: tables.results_table(PUBLISHED_SPLIT[:8], results, language),
        "additions": lambda: tables.results_table(PUBLISHED_SPLIT[8:], results, language),
        "significance": lambda: tables.significance_sentence(PUBLISHED_SPLIT, worse=4, better=6),
        "comparison": lambda: comparison_section(results),
        "splits": lambda: tables.splits_table(EXPERIMENTS, results),
        "times": lambda: tables.times_table(EXPERIMENTS, results, [results.parent / path for path in BENCHMARKS]),
    }[kind]()


def comparison_section(results: Path) -> str:
    """Return the comparison of the first records of experiments 8 and 9, if both exist."""
    paths = [path for number in (8, 9) for path in list(load_records(PUBLISHED_SPLIT[number - 1], results))[:1]]
    if len(paths) < 2:
        return ""
    summary, _ = compare_runs(*((results.parent / path).parent for path in paths))
    return code_block(summary)


def accuracy_points(results: Path) -> list[Point]:
    """Return the measured and published points of the figure."""
    points = []
    for experiment in PUBLISHED_SPLIT:
        label = f"{experiment.number} {experiment.title}"
        for index, record in enumerate(load_records(experiment, results).values()):
            name = f"{experiment.number}, seed {record['arguments']['seed']}" if index else label
            minutes = record["seconds"]["training"] / 60
            points.append(Point(name, minutes, record["accuracy"]["test"], record["test_interval_95"]))
        if experiment.published and experiment.log and experiment.log.minutes:
            points.append(Point(label, experiment.log.minutes, experiment.published / 100))
    return points


def missing_footnote(results: Path) -> str:
    """Return a sentence on the experiments that the figure does not show, if any."""
    missing = [
        str(experiment.number)
        for experiment in PUBLISHED_SPLIT
        if not (experiment.log and experiment.log.minutes) and not load_records(experiment, results)
    ]
    return f"not measured yet, and no published time: experiments {', '.join(missing)}" if missing else ""


def replace_sections(page: Path, sections: dict[str, str], script: str = "reproduce.py") -> None:
    """Replace the sections {name: text} that a script generates on a page; raise UserError if it lacks a marker."""
    text = page.read_text(encoding="utf-8")
    for name, content in sections.items():
        start, end = markers(name, script)
        if text.count(start) != 1 or text.count(end) != 1:
            raise UserError(f"{page} must have the lines {start} and {end} once each")
        before, rest = text.split(start)
        text = f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"
    with atomic_write(page) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def markers(name: str, script: str = "reproduce.py") -> tuple[str, str]:
    """Return the lines before and after a section that a script generates."""
    return f"<!-- {name}: written by {script} --update_readme -->", f"<!-- end of {name} -->"
