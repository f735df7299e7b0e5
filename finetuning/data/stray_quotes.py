"""Detection of unquoted CSV texts that begin with a quotation mark and swallow the rows that follow.

A parser takes such a text for a quoted field, which extends to the next quotation mark.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from finetuning.system.errors import UserError

LINE_END = r"(?:\r\n|\r|\n)"


def check_quotes(chunk: pd.DataFrame, path: str | Path, is_malformed: Callable[[], bool]) -> None:
    """Raise UserError if a text with several lines has swallowed rows of the file.

    A text is refused if it has two or more line ends and all look like row boundaries, or if one does and the
    file `is_malformed()`. The first check needs a label column.
    """
    label = chunk.columns.get_loc("label") if "label" in chunk.columns else None
    for position in set(range(chunk.shape[1])) - {label}:
        boundary = row_boundary(position, label, chunk.shape[1])
        for index, text in zip(chunk.index, chunk.iloc[:, position].to_numpy(dtype=object), strict=True):
            if "\n" not in text and "\r" not in text:
                continue
            num_rows, num_lines = len(re.findall(boundary, text)), len(re.findall(LINE_END, text))
            only_rows = num_rows == num_lines > 1 and label is not None
            if num_rows and (only_rows or is_malformed()):
                raise UserError(
                    f"{path}, review {index + 1}: the quotation mark it begins with swallows {num_rows} of the "
                    'following rows; put such a text in quotation marks and double its own: """Good"" film"'
                )


def row_boundary(position: int, label: int | None, num_columns: int) -> str:
    """Return a pattern for the end of an unquoted row, as seen from the column at `position`.

    The column at `label` holds 0 or 1; without labels, any line end may be the end of a row.
    """
    if label is None:
        return LINE_END
    if position < label:
        return rf", *[01] *(?:,[^,\r\n]*){{{num_columns - 1 - label}}}{LINE_END}"
    return rf"{LINE_END}(?:[^,\r\n]*,){{{label}}} *[01] *,"


def has_stray_quotes(path: str | Path, encoding: str, skip_initial_space: bool) -> bool:
    """Return whether a quotation mark that ends a field is followed by something other than a comma."""
    if not Path(path).is_file():  # a pipe can be read only once
        return False
    limit = csv.field_size_limit(1 << 30)
    try:
        with open(path, newline="", encoding=encoding) as file:
            for _ in csv.reader(file, skipinitialspace=skip_initial_space, strict=True):
                pass
    except csv.Error:
        return True
    finally:
        csv.field_size_limit(limit)
    return False
