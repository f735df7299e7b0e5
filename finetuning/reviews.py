"""Reading the three CSV files and checking that they hold what the training needs."""

from pathlib import Path

import numpy as np
import pandas as pd

from finetuning.errors import UserError

SPLITS = ("train", "validation", "test")
LABELS = ("negative", "positive")  # the names of the labels 0 and 1
COLUMNS = ("text", "label")
CHUNK = 5_000  # reviews read at a time
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


def iterate_reviews(path, columns=COLUMNS):
    """Read a CSV file as `read_reviews` does, but a data frame of CHUNK reviews, with these columns, at a time."""
    try:
        # As strings, nothing taken for missing: a review may well read "None" or "NA".
        with pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=CHUNK) as chunks:
            empty = True
            for chunk in chunks:
                # Where rows have more fields than the header, pandas takes the first ones for names of the rows.
                if not isinstance(chunk.index, pd.RangeIndex):
                    raise UserError(f"{path} is not a CSV file: its rows have more fields than its first line")
                rows = checked(chunk, path, columns)
                if len(rows):
                    empty = False
                    yield rows
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if empty:
        raise UserError(f"{path} holds no reviews")


def checked(frame, path, columns):
    """The `columns` of rows as read from `path`: `text`, and where it is among them `label`, as integers."""
    absent = [column for column in columns if column not in frame.columns]
    if absent:
        raise UserError(f"{path} has no column {' and no column '.join(absent)}; its columns are: "
                        f"{', '.join(frame.columns)}")
    torn = frame[frame["text"].str.contains("\0", regex=False)]
    if len(torn):
        raise UserError(f"{path}, review {torn.index[0] + 1}: the text holds a NUL byte; the file is damaged")
    blank = frame[frame["text"].str.strip() == ""]
    if len(blank):
        raise UserError(f"{path}, review {blank.index[0] + 1}: the text is empty")
    if "label" not in columns:
        return frame[[*columns]]
    wrong = frame[~frame["label"].isin(["0", "1"])]
    if len(wrong):
        raise UserError(f"{path}, review {wrong.index[0] + 1}: label {wrong['label'].iloc[0]!r} "
                        "is neither 0 (negative) nor 1 (positive)")
    return frame[[*columns]].astype({"label": int})
