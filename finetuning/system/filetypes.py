"""File and folder types recognized by content, for error messages about unexpected input."""

import bz2
import gzip
import lzma
import re
import zlib
from pathlib import Path
from typing import Any

from finetuning.system.errors import UserError

LFS_POINTER = "a Git LFS pointer, not the file itself (fetch that with: git lfs pull)"
LFS_SIGNATURE = b"version https://git-lfs"
EMPTY, ZEROS = "empty", "a file of zero bytes"
TAR, TAR_MAGIC = "a tar archive", slice(257, 262)  # where a tar archive has "ustar"
OPENERS: dict[str, Any] = {"a gzip file": gzip.open, "a bzip2 file": bz2.open, "a xz file": lzma.open}
# Type -> the bytes that its files begin with, or several alternatives.
SIGNATURES: dict[str, bytes | tuple[bytes, ...]] = {
    "a gzip file": b"\x1f\x8b",
    "a bzip2 file": b"BZh",
    "a xz file": b"\xfd7zXZ\0",
    LFS_POINTER: LFS_SIGNATURE,
    "a zip file": b"PK\x03\x04",
    "an empty zip file": b"PK\x05\x06",
    "a 7z file": b"7z\xbc\xaf\x27\x1c",
    "a RAR file": b"Rar!",
    "a Parquet file": b"PAR1",
    "an Arrow file": (b"ARROW1", b"\xff\xff\xff\xff"),
    "a PDF file": b"%PDF",
    "an SQLite database": b"SQLite format 3",
    "an HDF5 file": b"\x89HDF",
    "a Zstandard file": b"\x28\xb5\x2f\xfd",
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    "an old Excel file": b"\xd0\xcf\x11\xe0",
    "UTF-16 text": (b"\xff\xfe", b"\xfe\xff"),
    "a web page": (b"<!doctype html", b"<html"),
    "an XML file": b"<?xml",
}
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


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise UserError if a file is a Git LFS pointer, the placeholder of a large file that was not fetched."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            if file.read(len(LFS_SIGNATURE)) == LFS_SIGNATURE:
                raise UserError(f"{path} is {LFS_POINTER}")


def file_type(path: str | Path) -> str | None:
    """Return the type of a file, such as "a zip file", or None if it is plain text or unknown."""
    with open(path, "rb") as file:
        kind = content_type(file.read(HEADER_BYTES))
    if kind not in OPENERS:
        return kind
    try:
        with OPENERS[kind](path) as file:
            inner = content_type(file.read(HEADER_BYTES))
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return f"a damaged {kind.removeprefix('a ')}"
    return f"{kind} of {inner}" if inner else kind


def content_type(header: bytes) -> str | None:
    """Return the type of content that begins with `header`, or None if it is plain text or unknown."""
    if not header:
        return EMPTY
    if not header.strip(b"\0"):
        return ZEROS
    if header[TAR_MAGIC] == b"ustar":
        return TAR
    lowered = header.lstrip().lower()
    return next(
        (name for name, magic in SIGNATURES.items() if header.startswith(magic) or lowered.startswith(magic)), None
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
