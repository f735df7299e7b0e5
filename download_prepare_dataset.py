"""Make train.csv, validation.csv and test.csv from the Large Movie Review Dataset (Maas et al., 2011).

    python download_prepare_dataset.py

downloads the official archive, reads its 50,000 labelled reviews straight out of it, shuffles
and cuts them as the published experiment did, and writes the three files.

Experiment: Sebastian Raschka, "Build a Large Language Model (From Scratch)", bonus material to chapter 6,
https://github.com/rasbt/LLMs-from-scratch
"""

import lzma
import os
import re
import tarfile
import zlib
from collections import defaultdict
from pathlib import Path

import pandas as pd

from finetuning.cli import ArgumentParser, run, user_path
from finetuning.download import Download, download, md5
from finetuning.errors import UserError
from finetuning.files import held, written_whole
from finetuning.filetypes import EMPTY, TAR, ZEROS, file_kind, first_line, folder_kind
from finetuning.reviews import csv_paths

# The published order; the shuffle starts from it.
FOLDERS = ("test/pos", "test/neg", "train/pos", "train/neg")
LABELS = {"pos": 1, "neg": 0}
REVIEWS_PER_FOLDER = 12_500
# A review's place in the archive: root folder, one of FOLDERS, file name. Everything else in there is ignored.
REVIEW_NAME = re.compile(r"(?:\./)*((?:(?!\.\.?/|__MACOSX/)[^/]+/)*)((?:test|train)/(?:pos|neg))/(\d+_\d+\.txt)")
# The longest review has 13,704 characters; what claims to be far larger is not a review.
MAX_REVIEW_BYTES = 1_000_000
OFFICIAL = Download("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
                    84_125_825, "7c2ac02c03563afcf9b574c7e56c153a")


def main(argv=None):
    args = parse_args(argv)
    with held(args.data_dir, "--data_dir"):
        source = fetch_archive(args.archive, Path(args.data_dir))
        reviews = load_dataset_to_dataframe(source)
        print(f"Read {len(reviews):,} labelled reviews from {source}")
        splits = partition_and_save(reviews, args.data_dir, args.split)
    print(summary(*splits))
    print(f"Wrote {', '.join(map(str, csv_paths(args.data_dir)))}")


def parse_args(argv=None):
    parser = ArgumentParser(description="Download the IMDb movie reviews and write train.csv, validation.csv, test.csv")
    parser.add_argument("--archive", type=user_path, metavar="PATH_OR_URL", default=OFFICIAL.url,
                        help="archive (file or URL) or an extracted folder")
    parser.add_argument("--data_dir", type=user_path, default=".", help="folder to write the CSV files to")
    parser.add_argument("--split", choices=list(PARTITIONS), default="random",
                        help="random: 35,000/5,000/10,000 as published; "
                             "official: test on the release's own 25,000 test reviews, of other films")
    return parser.parse_args(argv)


def fetch_archive(archive, data_dir):
    """Return the local path of `archive`, downloading it into `data_dir` where it is a URL."""
    if not archive.startswith(("http://", "https://")):
        if not os.path.isfile(archive) and not os.path.isdir(archive):
            raise UserError(f"no archive or folder at {archive}")
        return Path(archive)
    wanted = OFFICIAL if archive == OFFICIAL.url else Download(archive)
    target = data_dir / (Path(archive.partition("?")[0]).name or "archive")
    if wanted.md5 and target.is_file() and md5(target) == wanted.md5:
        return target
    download(wanted, target)
    return target


def load_dataset_to_dataframe(source):
    """Read the labelled reviews from an archive or an extracted folder.

    Returns a data frame with the columns `text`, `label` and `part` (the release's own "test"
    or "train"), in the published order: test/pos, test/neg, train/pos, train/neg, each in
    sorted file-name order. Raises UserError where reviews are missing or the archive is damaged.
    """
    source = Path(source)
    reviews = read_folder(source) if source.is_dir() else read_archive(source)
    lacking = [f"{folder} holds {len(reviews[folder]):,} of {REVIEWS_PER_FOLDER:,} reviews"
               for folder in FOLDERS if len(reviews[folder]) != REVIEWS_PER_FOLDER]
    if lacking:
        raise UserError(f"{source} is not the whole dataset: {', '.join(lacking)}; download or extract it again")
    # Each review's bytes are let go as its text comes, so that memory holds the dataset once.
    rows = [(decode(reviews[folder].pop(name), f"{folder}/{name}"), LABELS[Path(folder).name], Path(folder).parent.name)
            for folder in FOLDERS for name in sorted(reviews[folder])]
    return pd.DataFrame(rows, columns=["text", "label", "part"])


def read_archive(path):
    """Read the reviews out of a tar archive in one pass: {folder: {file name: bytes}}."""
    roots, names = defaultdict(lambda: defaultdict(dict)), []
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                archive.members.clear()  # or it would remember all of them, a kilobyte each
                if len(names) < 3:
                    names.append(member.name)
                match = REVIEW_NAME.fullmatch(member.name)
                if not match or not member.isfile():
                    continue
                check_size(member.size, f"{path}: {member.name}")
                root, folder, name = match.groups()
                roots[root][folder][name] = archive.extractfile(member).read()
            while archive.fileobj.read(1 << 20):  # to its end, where the checksum is
                pass
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        raise UserError(f"{path} {archive_fault(path, error)}") from error
    if not roots and not names:
        raise UserError(f"{path} {archive_fault(path, 'no members')}")
    if not roots:
        raise UserError(f"{path} holds no reviews in {', '.join(FOLDERS)}; it begins with {', '.join(names)}")
    reviews = roots[choose_root(roots, path)]
    return {folder: reviews[folder] for folder in FOLDERS}


def archive_fault(path, reason):
    """Return what is wrong with a file that cannot be read as an archive, for `reason`."""
    kind = file_kind(path)
    if kind in (EMPTY, ZEROS):
        return f"is {kind}; download it again"
    if kind and (kind.endswith(TAR) or kind.startswith("a damaged")):
        return f"is cut short or damaged ({str(reason).partition(chr(10))[0].rstrip(':')}); download it again"
    if not kind:
        line = first_line(path)
        kind = f"a text file that begins with {line!r}" if line else "a file of unknown content"
    extract = "; extract it and pass the folder" * kind.endswith(("zip file", "7z file", "RAR file"))
    return f"is {kind}, no tar archive of the reviews{extract}"


def read_folder(path):
    """Read the reviews from an extracted folder, or one that holds it: {folder: {file name: bytes}}."""
    roots = defaultdict(set)
    for depth in ("", "*/", "*/*/"):
        for folder in FOLDERS:
            for found in path.glob(depth + folder):
                if found.is_dir() and "__MACOSX" not in found.parts:
                    roots[found.resolve().parents[1]].add(folder)
    if not roots:
        raise UserError(f"{path} is {folder_kind(path)}, without the reviews in {', '.join(FOLDERS)}{advice(path)}")
    root = choose_root(roots, path)
    reviews = {folder: {} for folder in FOLDERS}
    for folder in FOLDERS:
        for file in (root / folder).glob("*.txt"):
            if REVIEW_NAME.fullmatch(f"{folder}/{file.name}") and file.is_file() and not file.is_symlink():
                check_size(file.stat().st_size, file)
                reviews[folder][file.name] = file.read_bytes()
    return reviews


def choose_root(roots, source):
    """Return the root that has all four folders, else the one with most, of {root: its folders}.

    Raises UserError if several have all four.
    """
    whole = [root for root in roots if len(roots[root]) == len(FOLDERS)]
    if len(whole) > 1:
        raise UserError(f"{source} holds {' and '.join(sorted(str(root) or '.' for root in whole))}, each with all "
                        "four folders of reviews; extract it if it is an archive, and pass one of them")
    return whole[0] if whole else max(roots, key=lambda root: len(roots[root]))


def advice(path):
    """Return what to pass instead of a folder that holds no reviews, where that can be seen: "; pass ..."."""
    for parent in path.resolve().parents[:2]:
        if all((parent / folder).is_dir() for folder in FOLDERS):
            return f"; pass {parent}"
    archives = sorted(file for pattern in ("*.tar", "*.tar.*", "*.tgz") for file in path.glob(pattern))
    return f"; pass the archive in it: {archives[0]}" if archives else ""


def check_size(size, name):
    """Raise UserError if a file has too many bytes to be a review."""
    if size > MAX_REVIEW_BYTES:
        raise UserError(f"{name} has {size:,} bytes; a review has a few thousand")


def decode(content, name):
    """A review's text, its line ends as "\\n"; raises UserError where it is not UTF-8."""
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error}") from error


def shuffled(reviews):
    """The rows in the published random order."""
    return reviews.sample(frac=1, random_state=123).reset_index(drop=True)


def cut(reviews, *sizes):
    """Cut into consecutive pieces of the given sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [reviews.iloc[end - size:end] for size, end in zip(sizes, ends, strict=True)]


def random_partition(reviews):
    """The published split: all 50,000 shuffled twice, then cut. One film's reviews fall on both sides."""
    return cut(shuffled(shuffled(reviews)), 35_000, 5_000, 10_000)


def official_partition(reviews):
    """The release's own split, no film on both sides of it: its test folder is the test set."""
    train, validation = cut(shuffled(reviews[reviews["part"] == "train"]), 20_000, 5_000)
    return [train, validation, shuffled(reviews[reviews["part"] == "test"])]


PARTITIONS = {"random": random_partition, "official": official_partition}


def partition_and_save(reviews, data_dir=".", split="random"):
    """Cut the reviews into training, validation and test set and write the three CSV files, all or none.

    Returns the three data frames.
    """
    splits = PARTITIONS[split](reviews)
    with written_whole(*csv_paths(data_dir)) as temporaries:
        for frame, temporary in zip(splits, temporaries, strict=True):
            # The same bytes on every system, so that records can name the data by its digest.
            frame.to_csv(temporary, columns=["text", "label"], index=False, lineterminator="\n")
    return splits


def summary(train, validation, test):
    """The counts, the class balance, and how many test reviews have an exact copy in the training set."""
    lines = [f"{name:<11} {len(frame):>6,} reviews, {frame['label'].mean():.2%} positive"
             for name, frame in [("Training:", train), ("Validation:", validation), ("Test:", test)]]
    twins = test["text"].isin(set(train["text"])).sum()
    return "\n".join([*lines, f"{twins:,} of the {len(test):,} test reviews have an exact copy in the training set"])


if __name__ == "__main__":
    run(main)
