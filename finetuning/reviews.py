"""Reading the three CSV files and checking that they hold what the training needs."""

from pathlib import Path

import pandas as pd

from finetuning.errors import UserError

SPLITS = ("train", "validation", "test")
PREPARE = "python download_prepare_dataset.py"


def load_dataframes(data_dir="."):
    """Read `train.csv`, `validation.csv` and `test.csv` from `data_dir`.

    Returns three data frames with a string column `text` and an integer column `label`,
    1 for a positive review and 0 for a negative one. Raises UserError where a file is missing
    or holds anything else.
    """
    missing = [name for name in csv_paths(data_dir) if not name.is_file()]
    if missing:
        folder = f" --data_dir {data_dir}" if str(data_dir) != "." else ""
        raise UserError(f"no {' or '.join(map(str, missing))}; make the CSV files with: {PREPARE}{folder}")
    return tuple(read_reviews(path) for path in csv_paths(data_dir))


def csv_paths(data_dir):
    """The paths of the three CSV files, in the order train, validation, test."""
    return [Path(data_dir) / f"{split}.csv" for split in SPLITS]


def read_reviews(path):
    """Read one CSV file with the columns `text` and `label`; raises UserError where it is not one."""
    try:
        # As strings, nothing taken for missing: a review may well read "None" or "NA".
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    absent = [column for column in ("text", "label") if column not in frame.columns]
    if absent:
        raise UserError(f"{path} has no column {' and no column '.join(absent)}; its columns are: "
                        f"{', '.join(frame.columns)}")
    if frame.empty:
        raise UserError(f"{path} holds no reviews")
    wrong = ~frame["label"].isin(["0", "1"])
    if wrong.any():
        raise UserError(f"{path}, review {wrong.argmax() + 1}: label {frame['label'][wrong.argmax()]!r} "
                        "is neither 0 (negative) nor 1 (positive)")
    blank = frame["text"].str.strip() == ""
    if blank.any():
        raise UserError(f"{path}, review {blank.argmax() + 1}: the text is empty")
    return frame[["text", "label"]].astype({"label": int})
