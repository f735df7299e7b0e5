"""Reading the reviews of the Large Movie Review Dataset from its archive or an extracted folder."""

import lzma
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from finetuning.system.errors import UserError
from finetuning.system.filetypes import EMPTY, TAR, ZEROS, file_type, first_line, folder_type

FOLDERS = ("test/pos", "test/neg", "train/pos", "train/neg")  # in the published order
# Path of a review in the archive: root folder, one of FOLDERS, file name. Other members are ignored.
REVIEW_NAME = re.compile(r"(?:\./)*((?:(?!\.\.?/|__MACOSX/)[^/]+/)*)((?:test|train)/(?:pos|neg))/(\d+_\d+\.txt)")
MAX_REVIEW_BYTES = 1_000_000  # the longest review has 13,704 characters

Root = TypeVar("Root", str, Path)
FolderContents = dict[str, dict[str, bytes]]  # {folder: {file name: content}}


def read_archive(path: Path) -> FolderContents:
    """Read the reviews of a tar archive in one pass; raises UserError if it is damaged or holds none."""
    roots: dict[str, FolderContents] = defaultdict(lambda: defaultdict(dict))
    first_names: list[str] = []
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps a kilobyte per member
                if len(first_names) < 3:
                    first_names.append(member.name)
                match = REVIEW_NAME.fullmatch(member.name)
                if not match or not member.isfile():
                    continue
                check_size(member.size, f"{path}: {member.name}")
                root, folder, name = match.groups()
                roots[root][folder][name] = archive.extractfile(member).read()  # type: ignore[union-attr]
            # The checksum is at the end of the file.
            while archive.fileobj.read(1 << 20):  # type: ignore[union-attr]
                pass
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        raise UserError(f"{path} {describe_fault(path, error)}") from error
    if not first_names:
        raise UserError(f"{path} {describe_fault(path, 'no members')}")
    if not roots:
        raise UserError(f"{path} holds no reviews in {', '.join(FOLDERS)}; it begins with {', '.join(first_names)}")
    reviews = roots[choose_root(roots, path)]
    return {folder: reviews[folder] for folder in FOLDERS}


def describe_fault(path: Path, error: Exception | str) -> str:
    """Return the end of an error message on a file that is not a readable archive: "is ..."."""
    kind = file_type(path)
    if kind in (EMPTY, ZEROS):
        return f"is {kind}; download it again"
    if kind and (kind.endswith(TAR) or kind.startswith("a damaged")):
        first_error_line = str(error).partition("\n")[0].rstrip(":")
        return f"is truncated or damaged ({first_error_line}); download it again"
    if not kind:
        line = first_line(path)
        kind = f"a text file that begins with {line!r}" if line else "a file of unknown content"
    extract = "; extract it and pass the folder" if kind.endswith(("zip file", "7z file", "RAR file")) else ""
    return f"is {kind}, not a tar archive of the reviews{extract}"


def read_folder(path: Path) -> FolderContents:
    """Read the reviews below a folder, at most two levels down; raises UserError if there are none."""
    roots = defaultdict(set)
    for prefix in ("", "*/", "*/*/"):
        for folder in FOLDERS:
            for match in path.glob(prefix + folder):
                if match.is_dir() and "__MACOSX" not in match.parts:
                    roots[match.parents[1].resolve()].add(folder)
    if not roots:
        raise UserError(
            f"{path} is {folder_type(path)}, without the reviews in {', '.join(FOLDERS)}{suggest_source(path)}"
        )
    root = choose_root(roots, path)
    reviews: FolderContents = {folder: {} for folder in FOLDERS}
    for folder in FOLDERS:
        for file in (root / folder).glob("*.txt"):
            if REVIEW_NAME.fullmatch(f"{folder}/{file.name}") and file.is_file() and not file.is_symlink():
                check_size(file.stat().st_size, file)
                reviews[folder][file.name] = file.read_bytes()
    return reviews


def choose_root(roots: Mapping[Root, Collection[str]], source: Path) -> Root:
    """Return the root that has all four folders, or else the one with most, of {root: its folders}.

    Raises UserError if several roots have all four.
    """
    complete = [root for root, folders in roots.items() if len(folders) == len(FOLDERS)]
    if len(complete) > 1:
        names = " and ".join(sorted(str(root) or "." for root in complete))
        raise UserError(
            f"{source} holds {names}, each with all four folders of reviews; "
            "extract it if it is an archive, and pass one of them"
        )
    return complete[0] if complete else max(roots, key=lambda root: len(roots[root]))


def suggest_source(path: Path) -> str:
    """Return "; pass ..." if the dataset is above a folder without reviews or its archive is in it, else ""."""
    for parent in path.resolve().parents[:2]:
        if all((parent / folder).is_dir() for folder in FOLDERS):
            return f"; pass {parent}"
    archives = sorted(file for pattern in ("*.tar", "*.tar.*", "*.tgz") for file in path.glob(pattern))
    return f"; pass the archive in it: {archives[0]}" if archives else ""


def check_size(num_bytes: int, name: str | Path) -> None:
    """Raise UserError if a file is too large for a review."""
    if num_bytes > MAX_REVIEW_BYTES:
        raise UserError(f"{name} has {num_bytes:,} bytes; a review has a few thousand")


def decode(content: bytes, name: str) -> str:
    r"""Decode a review and convert its line ends to "\n"; raises UserError if it is not UTF-8."""
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text: {error}") from error
