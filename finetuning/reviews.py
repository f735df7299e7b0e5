"""Reading the three CSV files and checking that they hold what the training needs."""

import csv
import io
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.errors import UserError
from finetuning.filetypes import content_kind

SPLITS = ("train", "validation", "test")
LABELS = ("negative", "positive")  # the names of the labels 0 and 1
COLUMNS = ("text", "label")
CHUNK = 5_000  # reviews read at a time
# As strings, nothing taken for missing: a review may well read "None" or "NA".
READ = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of files that are not comma-separated
LINE_END = r"(?:\r\n|\r|\n)"
PREPARE = "python download_prepare_dataset.py"


def load_dataframes(data_dir="."):
    """Read `train.csv`, `validation.csv` and `test.csv` from `data_dir`.

    Returns three data frames with a string column `text` and an integer column `label`,
    1 for a positive review and 0 for a negative one. Raises UserError where a file is missing
    or holds anything else, or the training set holds reviews of one class only.
    """
    check_presence(data_dir)
    frames = tuple(read_reviews(path) for path in csv_paths(data_dir))
    check_classes(frames[0]["label"], data_dir)
    return frames


def check_dataset(data_dir="."):
    """Raise the UserError that `load_dataframes` would raise, without holding the reviews in memory.

    Returns the number of training reviews.
    """
    check_presence(data_dir)
    train, *others = csv_paths(data_dir)
    labels = np.concatenate([frame["label"] for frame in iterate_reviews(train)])
    check_classes(labels, data_dir)
    for path in others:
        for _ in iterate_reviews(path):
            pass
    return len(labels)


def check_classes(labels, data_dir):
    """Raise UserError where the training set has one class only: there is nothing to tell apart."""
    if len(set(labels)) < 2:
        only = "positive" if labels[0] else "negative"
        raise UserError(f"{csv_paths(data_dir)[0]} holds {only} reviews only; training needs both kinds")


def check_presence(data_dir):
    """Raise UserError, with the command that makes them, where CSV files are missing."""
    missing = [path for path in csv_paths(data_dir) if not path.is_file()]
    if missing:
        folder = f" --data_dir {data_dir}" if str(data_dir) != "." else ""
        raise UserError(f"cannot find {', '.join(map(str, missing))}; make the CSV files with: {PREPARE}{folder}")


def csv_paths(data_dir):
    """The paths of the three CSV files, in the order train, validation, test."""
    return [Path(data_dir) / f"{split}.csv" for split in SPLITS]


def read_reviews(path):
    """Read one CSV file with the columns `text` and `label`; raises UserError where it is not one."""
    return pd.concat(iterate_reviews(path))


def copies_in_training_set(data_dir):
    """Which reviews of the test set stand in the training set word for word: (test reviews,) bool."""
    train, _, test = csv_paths(data_dir)
    seen = {hash(text) for frame in iterate_reviews(train) for text in frame["text"]}
    return np.array([hash(text) in seen for frame in iterate_reviews(test) for text in frame["text"]])


def count_line(train, validation, test):
    """Return the status line on how many reviews each file gave."""
    return f"Reviews: {train:,} training, {validation:,} validation, {test:,} test"


def iterate_reviews(path, columns=COLUMNS):
    """Read a CSV file as `read_reviews` does, but a data frame of CHUNK reviews, with these columns, at a time."""
    try:
        with open(path, "rb") as file:
            names, spaced = read_header(path, columns, file.peek())
            stray_quotes = cache(partial(has_stray_quotes, path, spaced))
            empty = True
            with pd.read_csv(file, **READ, skipinitialspace=spaced, chunksize=CHUNK) as chunks:
                for chunk in chunks:
                    # Where rows have more fields than the header, pandas takes the first ones for names of the rows.
                    if not isinstance(chunk.index, pd.RangeIndex):
                        raise UserError(f"{path} is not a CSV file: its rows have more fields than its first line")
                    chunk.columns = names
                    check_quotes(chunk, path, stray_quotes)
                    rows = checked(chunk, path, columns)
                    if len(rows):
                        empty = False
                        yield rows
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if empty:
        raise UserError(f"{path} holds no reviews")


def read_header(path, columns, start):
    """Return the names in the first line of a CSV file that begins with the bytes `start`, and whether it is spaced.

    That is, whether spaces follow its commas; they do not count. Raises UserError where the file is
    something else, one of `columns` is not there, or a name is there twice.
    """
    if kind := content_kind(start):
        raise UserError(f"{path} is not a CSV file in UTF-8: it is {kind}")
    lines = io.StringIO(start.decode(READ["encoding"], errors="replace"), newline="")
    header = next((row for row in csv.reader(lines) if row), [""])
    names = [name.strip() for name in header]
    absent = [column for column in columns if column not in names]
    if absent:
        separators = [f" (separated by {name}, not by commas)" for mark, name in SEPARATORS.items() if mark in names[0]]
        raise UserError(f"{path} has no column {' and no column '.join(absent)}; its columns are: "
                        f"{', '.join(names)}{''.join(separators[:1])}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path} has the column {twice[0]} {names.count(twice[0])} times")
    return names, any(name != name.lstrip() for name in header[1:])


def check_quotes(frame, path, stray_quotes):
    """Raise UserError where a text that begins with a quotation mark but is not quoted swallows the next rows.

    Up to the next mark they become lines of the text. Such a text holds what looks like the end of
    a row at its line ends, and mostly the next mark stands where no quoted field may end:
    `stray_quotes()` tells that of the file. A text of several lines that is quoted passes, unless
    every line of three or more looks like a row.
    """
    label = frame.columns.get_loc("label") if "label" in frame.columns else None
    for position in set(range(frame.shape[1])) - {label}:
        for index, text in zip(frame.index, frame.iloc[:, position].to_numpy(dtype=object), strict=True):
            if "\n" not in text and "\r" not in text:
                continue
            rows, ends = (len(re.findall(pattern, text)) for pattern in
                          (row_boundary(position, label, frame.shape[1]), LINE_END))
            if rows and (rows == ends > 1 and label is not None or stray_quotes()):
                raise UserError(f"{path}, review {index + 1}: the quotation mark it begins with swallows {rows} of the "
                                'following rows; put such a text in quotation marks and double its own: """Good"" film"'
                                )


def row_boundary(position, label, fields):
    """Return the pattern of a line end between unquoted rows, as seen from the field at `position`.

    The rows have so many fields, a 0 or 1 in that at `label`; without labels any line end may be one.
    """
    if label is None:
        return LINE_END
    if position < label:
        return rf", *[01] *(?:,[^,\r\n]*){{{fields - 1 - label}}}{LINE_END}"
    return rf"{LINE_END}(?:[^,\r\n]*,){{{label}}} *[01] *,"


def has_stray_quotes(path, spaced):
    """Return whether a quotation mark ends a field of a CSV file, and something other than a comma follows."""
    if not Path(path).is_file():  # a pipe, which can be read once
        return False
    limit = csv.field_size_limit(1 << 30)
    try:
        with open(path, newline="", encoding=READ["encoding"]) as file:
            for _ in csv.reader(file, skipinitialspace=spaced, strict=True):
                pass
    except csv.Error:
        return True
    finally:
        csv.field_size_limit(limit)
    return False


def checked(frame, path, columns):
    """The `columns` of rows as read from `path`: `text`, and where it is among them `label`, as integers."""
    torn = frame[frame["text"].str.contains("\0", regex=False)]
    if len(torn):
        raise UserError(f"{path}, review {torn.index[0] + 1}: the text holds a NUL byte; the file is damaged")
    blank = frame[frame["text"].str.strip() == ""]
    if len(blank):
        raise UserError(f"{path}, review {blank.index[0] + 1}: the text is empty")
    if "label" not in columns:
        return frame[[*columns]]
    wrong = frame[~frame["label"].isin(["0", "1"])]
    if len(wrong := wrong[~wrong["label"].str.strip().isin(["0", "1"])]):
        raise UserError(f"{path}, review {wrong.index[0] + 1}: label {wrong['label'].iloc[0]!r} "
                        "is neither 0 (negative) nor 1 (positive)")
    return frame[[*columns]].astype({"label": int})
