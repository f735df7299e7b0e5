"""Comparison of two runs, review by review."""

from pathlib import Path

import pandas as pd

from finetuning.reporting.records import read_predictions, read_record
from finetuning.reporting.statistics import mcnemar_test, predicted_labels
from finetuning.system.errors import UserError


def compare_runs(folder_a: Path, folder_b: Path) -> tuple[str, pd.DataFrame]:
    """Return a summary in three lines, and the test reviews that only one of two runs classified correctly.

    The data frame has the columns label, probability_a and probability_b. Raises UserError if the test sets differ.
    """
    record_a, record_b = read_record(folder_a), read_record(folder_b)
    if record_a["data"]["test.csv"] != record_b["data"]["test.csv"]:
        raise UserError(f"{folder_a} and {folder_b} were tested on different reviews")
    a, b = read_predictions(folder_a, record_a), read_predictions(folder_b, record_b)
    correct_a, correct_b = ((predicted_labels(run["probability"]) == run["label"]).to_numpy() for run in (a, b))
    test = mcnemar_test(correct_a, correct_b)
    low, high = test.interval
    width = max(len(record_a["name"]), len(record_b["name"]))
    lines = [
        f"{letter}: {record['name']:<{width}}  {record['accuracy']['test']:.2%} of {test.total:,} test reviews; "
        f"only {letter} is correct on {only:,}"
        for letter, record, only in (("A", record_a, test.only_a), ("B", record_b, test.only_b))
    ]
    lines.append(
        f"B - A: {100 * test.difference:+.2f} points (95% interval {100 * low:+.2f} to {100 * high:+.2f}), "
        f"p = {test.p_value:.2g} (exact McNemar test)"
    )
    both = a.rename(columns={"probability": "probability_a"}).assign(probability_b=b["probability"])
    return "\n".join(lines), both[correct_a != correct_b]
