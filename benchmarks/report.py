"""The measurements of benchmarks/speed.py as JSON, and their tables in benchmarks/README.md.

A file holds a list of reports, one for each call of the script. Their "rows" are
{workload: [{implementation: {part: value}} for each round]}.
"""

import json
import statistics
from pathlib import Path

from benchmarks.workloads import WORKLOADS
from finetuning.reporting.pages import replace_sections
from finetuning.reporting.tables import markdown_table
from finetuning.system.files import atomic_write

FOLDER = Path(__file__).parent
PATH, GPU_PATH = Path("benchmarks/speed.json"), Path("benchmarks/speed_gpu.json")
TRAINERS = ("trainer_fp32", "trainer_bf16")
PROJECTS = {"project": "", "project_compiled": ", compiled"}  # implementation -> suffix of the workload's name
# Parts of a run and what the tables call them.
PARTS = {
    "run": "whole run",
    "step": "training step",
    "review": "evaluation",
    "tokenizing": "tokenizing",
    "peak_memory": "peak memory",
}
TRAINER_PARTS = {part: f"Trainer: {PARTS[part]}" for part in ("step", "review", "peak_memory")}
UTILIZATION_COLUMNS = (
    "workload",
    "precision",
    "matrix products",
    "training step",
    "of the limit",
    "evaluating a review",
    "of the limit",
)


def add_report(path: Path, report: dict) -> None:
    """Add a report to a file of reports, in place of its earlier measurements of the same workloads."""
    reports = read_reports(path) if path.exists() else []
    for older in reports:
        older["rows"] = {name: rounds for name, rounds in older["rows"].items() if name not in report["rows"]}
    reports = [older for older in reports if older["rows"]] + [report]
    with atomic_write(path) as (temporary,):
        temporary.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def read_reports(path: Path) -> list[dict]:
    """Read a file of reports."""
    return json.loads(path.read_text(encoding="utf-8"))


def merge_rows(reports: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of all reports in the order of WORKLOADS."""
    rows = {name: rounds for report in reports for name, rounds in report["rows"].items()}
    order = list(WORKLOADS)
    return dict(sorted(rows.items(), key=lambda row: (order.index(row[0].partition(",")[0]), row[0])))


def ratio_table(rows: dict[str, list[dict]]) -> str:
    """Return the Markdown table of other implementation / project, the medians over the rounds."""
    lines = []
    for name, rounds in rows.items():
        for project, suffix in PROJECTS.items():
            if any(project in measured for measured in rounds):
                cells = [ratio(rounds, ("reference",), project, part) for part in PARTS]
                cells += [ratio(rounds, TRAINERS, project, part) for part in TRAINER_PARTS]
                lines.append([name + suffix, *cells])
    return markdown_table(["workload", *PARTS.values(), *TRAINER_PARTS.values()], lines)


def ratio(rounds: list[dict], others: tuple[str, ...], project: str, part: str) -> str:
    """Return the median over the rounds of the best of the other implementations / project; "" if not measured."""
    ratios = []
    for measured in rounds:
        theirs = [measured[other][part] for other in others if part in measured.get(other, {})]
        ours = measured.get(project, {})
        # With cached outputs of the frozen layers a step of the head alone is not a step of the model.
        is_comparable = part in ours and not ("caching" in ours and part in ("step", "review"))
        if theirs and is_comparable:
            ratios.append(min(theirs) / ours[part])
    return f"{statistics.median(ratios):.2f}x" if ratios else ""


def utilization_table(rows: dict[str, list[dict]]) -> str:
    """Return the Markdown table of FLOPs and of the share of the device's matrix rate, the medians over the rounds."""
    lines = []
    for name, rounds in rows.items():
        for project, suffix in PROJECTS.items():
            runs = [measured[project] for measured in rounds if "step_utilization" in measured.get(project, {})]
            if runs:
                lines.append([name + suffix, runs[0]["precision"], *utilization_cells(runs)])
    return markdown_table(UTILIZATION_COLUMNS, lines) if lines else "Not measured yet."


def utilization_cells(runs: list[dict]) -> list[str]:
    """Return the cells of the matrix rate, and of the FLOPs and the share of a training step and of an evaluation."""

    def median(key):
        return statistics.median(run[key] for run in runs)

    return [
        f"{median('matmul_throughput') / 1e9:,.0f} GFLOP/s",
        f"{median('step_flops') / 1e9:,.0f} GFLOP",
        f"{median('step_utilization'):.0%}",
        f"{median('review_flops') / 1e9:,.1f} GFLOP",
        f"{median('review_utilization'):.0%}",
    ]


def sections(folder: Path = FOLDER) -> dict[str, str]:
    """Return the generated sections of the page: {name: Markdown}."""
    rows = merge_rows(read_reports(folder / PATH.name))
    return {"ratios": ratio_table(rows), "shares": utilization_table(rows), "gpu": gpu_section(folder / GPU_PATH.name)}


def gpu_section(path: Path) -> str:
    """Return the tables of a file of reports with the hardware they are of."""
    if not path.exists():
        return "Not measured yet."
    reports = read_reports(path)
    rows, hardware = merge_rows(reports), " and ".join(sorted({report["hardware"] for report in reports}))
    return f"{hardware}:\n\n{ratio_table(rows)}\n\n{utilization_table(rows)}"


def update_page(folder: Path = FOLDER) -> None:
    """Write the generated sections of README.md; raises UserError if a marker is missing."""
    replace_sections(folder / "README.md", sections(folder), script="benchmarks/speed.py")
