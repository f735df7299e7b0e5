"""Write train.csv, validation.csv and test.csv from the Large Movie Review Dataset (Maas et al., 2011).

    python download_prepare_dataset.py

downloads the official archive, reads its 50,000 labelled reviews without extracting it, and
shuffles and splits them as the published experiment did.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from finetuning.cli import ArgumentParser, run_main, user_path
from finetuning.data.archive import FOLDERS, decode, read_archive, read_folder
from finetuning.data.reviews import csv_paths
from finetuning.system.download import RemoteFile, download
from finetuning.system.errors import UserError
from finetuning.system.files import atomic_write, exclusive_dir, hex_digest

OFFICIAL = RemoteFile(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", 84_125_825, "7c2ac02c03563afcf9b574c7e56c153a"
)
REVIEWS_PER_FOLDER = 12_500
LABELS = {"pos": 1, "neg": 0}


def main(argv: Sequence[str] | None = None) -> None:
    """Download and read the reviews, split them and write the CSV files."""
    args = parse_args(argv)
    with exclusive_dir(args.data_dir, "--data_dir"):
        source = fetch_archive(args.archive, Path(args.data_dir))
        reviews = load_dataset_to_dataframe(source)
        print(f"Read {len(reviews):,} labelled reviews from {source}")
        splits = partition_and_save(reviews, args.data_dir, args.split)
    print(summary(*splits))
    print(f"Wrote {', '.join(map(str, csv_paths(args.data_dir)))}")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description="Download the IMDb movie reviews and write train.csv, validation.csv, test.csv")
    parser.add_argument(
        "--archive",
        type=user_path,
        metavar="PATH_OR_URL",
        default=OFFICIAL.url,
        help="archive (file or URL) or an extracted folder",
    )
    parser.add_argument("--data_dir", type=user_path, default=".", help="folder to write the CSV files to")
    parser.add_argument(
        "--split",
        choices=list(PARTITIONS),
        default="random",
        help="random: 35,000/5,000/10,000 as published; "
        "official: test on the release's own 25,000 test reviews, of other films",
    )
    return parser.parse_args(argv)


def fetch_archive(archive: str, data_dir: Path) -> Path:
    """Return the local path of an archive or folder; download a URL to `data_dir` first.

    Raises UserError if there is no such file, or if the target of an unofficial URL exists.
    """
    if not archive.startswith(("http://", "https://")):
        if not os.path.isfile(archive) and not os.path.isdir(archive):
            raise UserError(f"no archive or folder at {archive}")
        return Path(archive)
    target = data_dir / (Path(archive.partition("?")[0]).name or "archive")
    if archive != OFFICIAL.url:
        if target.exists():
            raise UserError(f"{target} exists; pass --archive {target} to use it, or delete it to download it again")
        download(RemoteFile(archive), target)
    elif not target.is_file() or hex_digest(target, "md5") != OFFICIAL.md5:
        download(OFFICIAL, target)
    return target


def load_dataset_to_dataframe(source):
    """Read the labelled reviews from an archive or an extracted folder.

    Return a data frame with the columns `text`, `label` and `part` (the release's own "test" or
    "train"), in the published order: test/pos, test/neg, train/pos, train/neg, each sorted by file
    name. Raises UserError if reviews are missing or the archive is damaged.
    """
    source = Path(source)
    reviews = read_folder(source) if source.is_dir() else read_archive(source)
    incomplete = [
        f"{folder} holds {len(reviews[folder]):,} of {REVIEWS_PER_FOLDER:,} reviews"
        for folder in FOLDERS
        if len(reviews[folder]) != REVIEWS_PER_FOLDER
    ]
    if incomplete:
        raise UserError(f"{source} is not the complete dataset: {', '.join(incomplete)}; download or extract it again")
    # Free the bytes of each review as it is decoded, so that memory holds the dataset once.
    rows = [
        (decode(reviews[folder].pop(name), f"{folder}/{name}"), LABELS[Path(folder).name], Path(folder).parent.name)
        for folder in FOLDERS
        for name in sorted(reviews[folder])
    ]
    return pd.DataFrame(rows, columns=["text", "label", "part"])


def partition_and_save(reviews, data_dir=".", split="random"):
    """Split the reviews, write the three CSV files, all or none, and return the three data frames."""
    splits = PARTITIONS[split](reviews)
    with atomic_write(*csv_paths(data_dir)) as paths:
        for frame, path in zip(splits, paths, strict=True):
            # The same bytes on every system, because records identify the data by SHA-256.
            frame.to_csv(path, columns=["text", "label"], index=False, lineterminator="\n")
    return splits


def random_partition(reviews: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the published split: 35,000, 5,000 and 10,000 reviews; films occur in more than one set."""
    reviews = shuffle(shuffle(reviews))  # the published code shuffles twice
    return [reviews[:35_000], reviews[35_000:40_000], reviews[40_000:]]


def official_partition(reviews: pd.DataFrame) -> list[pd.DataFrame]:
    """Return 20,000 and 5,000 of the release's training reviews, and its 25,000 test reviews, of other films."""
    train = shuffle(reviews[reviews["part"] == "train"])
    return [train[:20_000], train[20_000:], shuffle(reviews[reviews["part"] == "test"])]


PARTITIONS = {"random": random_partition, "official": official_partition}


def shuffle(reviews: pd.DataFrame) -> pd.DataFrame:
    """Return the reviews in a random order, with the published seed."""
    return reviews.sample(frac=1, random_state=123).reset_index(drop=True)


def summary(train: pd.DataFrame, validation: pd.DataFrame, test: pd.DataFrame) -> str:
    """Return the number of reviews and the class balance of each set, and the train-test overlap, as lines."""
    lines = [
        f"{name:<11} {len(frame):>6,} reviews, {frame['label'].mean():.2%} positive"
        for name, frame in [("Training:", train), ("Validation:", validation), ("Test:", test)]
    ]
    num_duplicates = test["text"].isin(set(train["text"])).sum()
    overlap = f"{num_duplicates:,} of the {len(test):,} test reviews are exact duplicates of training reviews"
    return "\n".join([*lines, f"Train-test overlap: {overlap}"])


if __name__ == "__main__":
    run_main(main)
