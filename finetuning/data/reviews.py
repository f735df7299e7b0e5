"""The three CSV files: reading them in chunks and checking that they hold what training needs."""

import csv
import io
from collections.abc import Collection, Iterable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.data.stray_quotes import check_quotes, has_stray_quotes
from finetuning.system.errors import UserError
from finetuning.system.filetypes import content_type

SPLITS = ("train", "validation", "test")
LABEL_NAMES = ("negative", "positive")  # of the labels 0 and 1
NUM_CLASSES = len(LABEL_NAMES)
COLUMNS = ("text", "label")
CHUNK_SIZE = 5_000  # reviews
ENCODING = "utf-8-sig"
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of files that are not comma-separated
PREPARE_COMMAND = "python download_prepare_dataset.py"


def load_dataframes(data_dir: str | Path = ".") -> tuple[pd.DataFrame, ...]:
    """Read `train.csv`, `validation.csv` and `test.csv` from a folder.

    Return three data frames with a string column `text` and an integer column `label`, 1 for positive
    and 0 for negative. Raises UserError if a file is missing or malformed, or if all training
    reviews are of one class.
    """
    check_files_exist(data_dir)
    frames = tuple(read_reviews(path) for path in csv_paths(data_dir))
    check_classes(frames[0]["label"], data_dir)
    return frames


def check_dataset(data_dir: str | Path = ".") -> int:
    """Check the files like `load_dataframes`, one chunk in memory at a time; return the number of training reviews."""
    check_files_exist(data_dir)
    train, *others = csv_paths(data_dir)
    labels = np.concatenate([chunk["label"] for chunk in iterate_reviews(train)])
    check_classes(labels, data_dir)
    for path in others:
        for _ in iterate_reviews(path):
            pass
    return len(labels)


def check_classes(labels: np.ndarray | pd.Series, data_dir: str | Path) -> None:
    """Raise UserError if all training reviews are of one class."""
    if len(set(labels)) < 2:
        name = LABEL_NAMES[int(labels[0])]
        raise UserError(f"{csv_paths(data_dir)[0]} holds {name} reviews only; training needs both classes")


def check_files_exist(data_dir: str | Path) -> None:
    """Raise UserError, with the command that creates them, if CSV files are missing."""
    missing = [path for path in csv_paths(data_dir) if not path.is_file()]
    if missing:
        flag = f" --data_dir {data_dir}" if str(data_dir) != "." else ""
        raise UserError(
            f"cannot find {', '.join(map(str, missing))}; create the CSV files with: {PREPARE_COMMAND}{flag}"
        )


def csv_paths(data_dir: str | Path) -> list[Path]:
    """Return the paths of the training, validation and test CSV files."""
    return [Path(data_dir) / f"{split}.csv" for split in SPLITS]


def read_reviews(path: str | Path) -> pd.DataFrame:
    """Read one CSV file with the columns `text` and `label`; raises UserError if it is malformed."""
    return pd.concat(iterate_reviews(path))


def duplicated_in_training_set(data_dir: str | Path) -> np.ndarray:
    """Return which test reviews are exact duplicates of training reviews: (test reviews,) bool."""
    train, _, test = csv_paths(data_dir)
    seen = {hash(text) for chunk in iterate_reviews(train) for text in chunk["text"]}
    return np.array([hash(text) in seen for chunk in iterate_reviews(test) for text in chunk["text"]])


def count_line(train: int, validation: int, test: int) -> str:
    """Return the status line on the number of reviews in each file."""
    return f"Reviews: {train:,} training, {validation:,} validation, {test:,} test"


def iterate_reviews(
    path: str | Path, columns: tuple[str, ...] | list[str] = COLUMNS, chunk_size: int | None = None
) -> Iterator[pd.DataFrame]:
    """Yield the `columns` of a CSV file in data frames of CHUNK_SIZE reviews; raises UserError if it is malformed."""
    try:
        with open(path, "rb") as file:
            names, has_spaces = read_header(path, columns, file.peek())
            check_nul_bytes(path)
            is_malformed = cache(partial(has_stray_quotes, path, ENCODING, has_spaces))
            # Strings without missing values: a review may read "None" or "NA".
            settings = {"dtype": str, "keep_default_na": False, "encoding": ENCODING, "skipinitialspace": has_spaces}
            with pd.read_csv(file, **settings, chunksize=chunk_size or CHUNK_SIZE) as chunks:
                for chunk in chunks:
                    if not len(chunk):  # the first and only one
                        raise UserError(f"{path} holds no reviews")
                    # If rows have more fields than the header, pandas uses the first fields as the index.
                    if not isinstance(chunk.index, pd.RangeIndex):
                        raise UserError(f"{path} is not a CSV file: its rows have more fields than its first line")
                    chunk.columns = names
                    check_quotes(chunk, path, is_malformed)
                    yield validate(chunk, path, columns)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error


def read_header(path: str | Path, columns: Iterable[str], start: bytes) -> tuple[list[str], bool]:
    """Return the column names, stripped, and whether spaces follow the commas of a CSV file's first line.

    `start` is the beginning of the file. Raises UserError if it is another kind of file, or if one of
    `columns` is missing or occurs twice.
    """
    if kind := content_type(start):
        raise UserError(f"{path} is not a CSV file in UTF-8: it is {kind}")
    lines = io.StringIO(start.decode(ENCODING, errors="replace"), newline="")
    header = next((row for row in csv.reader(lines) if row), [""])
    names = [name.strip() for name in header]
    missing = [column for column in columns if column not in names]
    if missing:
        separators = [f" (separated by {name}, not by commas)" for mark, name in SEPARATORS.items() if mark in names[0]]
        raise UserError(
            f"{path} has no column {' and no column '.join(missing)}; its columns are: "
            f"{', '.join(names)}{''.join(separators[:1])}"
        )
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path} has the column {repeated[0]} {names.count(repeated[0])} times")
    return names, any(name != name.lstrip() for name in header[1:])


def check_nul_bytes(path: str | Path) -> None:
    """Raise UserError if a file holds a NUL byte, at which some versions of pandas end the field."""
    if Path(path).is_file():  # a pipe can be read only once
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if b"\0" in line:
                    raise UserError(f"{path}, line {number} holds a NUL byte; the file is damaged")


def validate(chunk: pd.DataFrame, path: str | Path, columns: Collection[str]) -> pd.DataFrame:
    """Return the `columns` of a chunk, `label` as integers; raises UserError for empty texts and other labels."""
    problems = {
        "the text is empty": chunk["text"].str.strip() == "",
    }
    if "label" in columns:
        is_label = chunk["label"].str.strip().isin(["0", "1"])
        problems["label {label!r} is neither 0 (negative) nor 1 (positive)"] = ~is_label
    for problem, is_affected in problems.items():
        if is_affected.any():
            row = chunk[is_affected].iloc[0]
            raise UserError(f"{path}, review {row.name + 1}: {problem.format(label=row.get('label'))}")
    reviews = chunk[[*columns]]
    return reviews.astype({"label": int}) if "label" in columns else reviews
