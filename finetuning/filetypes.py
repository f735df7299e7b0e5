"""What a file or a folder is, by its content: for messages about one that is not what it should be."""

import bz2
import gzip
import lzma
import re
import zlib
from pathlib import Path

from finetuning.errors import UserError

LFS_POINTER = b"version https://git-lfs"
# How files begin, and what they are.
SIGNATURES = {
    LFS_POINTER: "a Git LFS pointer, not the file itself (fetch that with: git lfs pull)",
    b"PK\x03\x04": "a zip file", b"PK\x05\x06": "an empty zip file", b"7z\xbc\xaf\x27\x1c": "a 7z file",
    b"Rar!": "a RAR file", b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow file",
    b"%PDF": "a PDF file", b"SQLite format 3": "an SQLite database", b"\x89HDF": "an HDF5 file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle", b"\x80\x05": "a pickle", b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"<!doctype html": "a web page", b"<html": "a web page",
    b"<?xml": "an XML file",
}
EMPTY, ZEROS = "empty", "a file of zero bytes"
COMPRESSED = {b"\x1f\x8b": ("gzip", gzip.open), b"BZh": ("bzip2", bz2.open), b"\xfd7zXZ\0": ("xz", lzma.open)}
TAR, TAR_MAGIC = "a tar archive", slice(257, 262)  # these bytes of a tar archive are "ustar"
BLOCK = 512  # bytes that are looked at
# What names in a folder tell of it, in this order.
FOLDER_KINDS = {
    "record.json": "the folder of a training run",
    "train.csv": "a folder of CSV files, which the train scripts read with --data_dir",
    "dataset_dict.json": "a folder of the library Datasets", "dataset_info.json": "a folder of the library Datasets",
    "*.arrow": "a folder of Arrow files", "*.parquet": "a folder of Parquet files",
    "config.json": "a model's folder",
}
SHOWN = 5  # names of what a folder holds


def refuse_lfs_pointer(path):
    """Raise UserError if there is, at `path`, what Git leaves in place of a large file that it has not fetched."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is {SIGNATURES[LFS_POINTER]}")


def file_kind(path):
    """Return what a file is, such as "a zip file", or None if it is plain text or unknown."""
    with open(path, "rb") as file:
        start = file.read(BLOCK)
    for magic, (name, opener) in COMPRESSED.items():
        if start.startswith(magic):
            try:
                with opener(path) as file:
                    inner = content_kind(file.read(BLOCK))
            except (EOFError, OSError, zlib.error, lzma.LZMAError):
                return f"a damaged {name} file"
            return f"a {name} file of {inner}" if inner else f"a {name} file"
    return content_kind(start)


def content_kind(start):
    """Return what begins with these bytes, or None if it is plain text or unknown."""
    if not start:
        return EMPTY
    if not start.strip(b"\0"):
        return ZEROS
    if start[TAR_MAGIC] == b"ustar":
        return TAR
    if compressed := [name for magic, (name, _) in COMPRESSED.items() if start.startswith(magic)]:
        return f"a {compressed[0]} file"
    folded = start.lstrip().lower()
    return next((kind for magic, kind in SIGNATURES.items() if start.startswith(magic) or folded.startswith(magic)),
                None)


def first_line(path):
    """Return how the first line of a text file begins, or None if the file is no text."""
    with open(path, "rb") as file:
        start = file.read(BLOCK)
    text = start.decode("utf-8", errors="replace").splitlines()[0][:60] if start else ""
    return text if text.isprintable() and not re.search("\ufffd.", text) else None


def folder_kind(path):
    """Return what a folder is, such as "the folder of a training run", or what it holds."""
    for pattern, kind in FOLDER_KINDS.items():
        if any(Path(path).glob(pattern)):
            return kind
    names = sorted(entry.name for entry in Path(path).iterdir() if not entry.name.startswith("."))
    more = f" and {len(names) - SHOWN:,} more" * (len(names) > SHOWN)
    return f"a folder of {', '.join(names[:SHOWN])}{more}" if names else "an empty folder"
