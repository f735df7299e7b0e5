"""File and folder types recognized by content, for error messages about unexpected input."""

import bz2
import gzip
import lzma
import re
import zlib
from pathlib import Path
from typing import Any

from finetuning.system.errors import UserError

LFS_POINTER = b"version https://git-lfs"
SIGNATURES = {
    LFS_POINTER: "a Git LFS pointer, not the file itself (fetch that with: git lfs pull)",
    b"PK\x03\x04": "a zip file",
    b"PK\x05\x06": "an empty zip file",
    b"7z\xbc\xaf\x27\x1c": "a 7z file",
    b"Rar!": "a RAR file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow file",
    b"%PDF": "a PDF file",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x28\xb5\x2f\xfd": "a Zstandard file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML file",
}
EMPTY, ZEROS = "empty", "a file of zero bytes"
COMPRESSED: dict[bytes, tuple[str, Any]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
    b"\xfd7zXZ\0": ("xz", lzma.open),
}
TAR, TAR_MAGIC = "a tar archive", slice(257, 262)  # where a tar archive has "ustar"
HEADER_BYTES = 512
PREVIEW_CHARS = 60
MAX_NAMES = 5  # listed of a folder
# File name pattern -> type of the folder; the first match wins.
FOLDER_TYPES = {
    "record.json": "the folder of a training run",
    "train.csv": "a folder of CSV files, which the train scripts read with --data_dir",
    "dataset_dict.json": "a folder of the library Datasets",
    "dataset_info.json": "a folder of the library Datasets",
    "*.arrow": "a folder of Arrow files",
    "*.parquet": "a folder of Parquet files",
    "config.json": "a model's folder",
}


def is_lfs_pointer(path: str | Path) -> bool:
    """Return whether a file is a Git LFS pointer, the placeholder of a large file that was not fetched."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise UserError if a file exists and is a Git LFS pointer."""
    if Path(path).is_file() and is_lfs_pointer(path):
        raise UserError(f"{path} is {SIGNATURES[LFS_POINTER]}")


def file_type(path: str | Path) -> str | None:
    """Return the type of a file, such as "a zip file", or None if it is plain text or unknown."""
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    for magic, (name, opener) in COMPRESSED.items():
        if header.startswith(magic):
            try:
                with opener(path) as file:
                    inner = content_type(file.read(HEADER_BYTES))
            except (EOFError, OSError, zlib.error, lzma.LZMAError):
                return f"a damaged {name} file"
            return f"a {name} file of {inner}" if inner else f"a {name} file"
    return content_type(header)


def content_type(header: bytes) -> str | None:
    """Return the type of content that begins with `header`, or None if it is plain text or unknown."""
    if not header:
        return EMPTY
    if not header.strip(b"\0"):
        return ZEROS
    if header[TAR_MAGIC] == b"ustar":
        return TAR
    if compressed := [name for magic, (name, _) in COMPRESSED.items() if header.startswith(magic)]:
        return f"a {compressed[0]} file"
    lowered = header.lstrip().lower()
    return next(
        (name for magic, name in SIGNATURES.items() if header.startswith(magic) or lowered.startswith(magic)), None
    )


def first_line(path: str | Path) -> str | None:
    """Return the first PREVIEW_CHARS characters of a text file's first line, or None if the file is not text."""
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    text = header.decode("utf-8", errors="replace").splitlines()[0][:PREVIEW_CHARS] if header else ""
    return text if text.isprintable() and not re.search("\ufffd.", text) else None


def folder_type(path: str | Path) -> str:
    """Return the type of a folder, such as "the folder of a training run", or the names of its files."""
    for pattern, name in FOLDER_TYPES.items():
        if any(Path(path).glob(pattern)):
            return name
    names = sorted(entry.name for entry in Path(path).iterdir() if not entry.name.startswith("."))
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return f"a folder of {', '.join(names[:MAX_NAMES])}{more}" if names else "an empty folder"
