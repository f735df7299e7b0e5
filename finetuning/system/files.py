"""Atomic writes, locked folders and one-line errors about disks."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from finetuning.system.errors import UserError

LOCK_NAME = ".lock"
# Errors of the disk, of permissions, and of a file where a folder is needed or the reverse; the user can fix them.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
               errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.EFBIG, errno.ENOLCK}  # fmt: skip
MIN_FREE_BYTES = 1 << 20  # more than a run's record, predictions and figure need


@contextmanager
def atomic_write(*paths: str | Path) -> Iterator[list[Path]]:
    """Yield a temporary path for each of `paths`; rename them into place when the block succeeds.

    If the block or a rename fails, the temporary files are removed and the old files stay. Several old
    files are moved aside before the first rename, so that a crash can leave a file missing but never
    mixes old and new ones. Raises UserError, naming the disk, if it is full or read-only, or a target is a folder.
    """
    targets = [Path(path) for path in paths]
    temporaries = [target.with_name(f".{target.name}.tmp") for target in targets]
    with report_disk_errors(targets[0].parent):
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise UserError(f"cannot write the file {target}: there is a folder of this name")
        try:
            yield temporaries
            for temporary in temporaries:
                sync(temporary)
            with moved_aside(targets if len(targets) > 1 else []):
                for temporary, target in zip(temporaries, targets, strict=True):
                    os.replace(temporary, target)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


@contextmanager
def moved_aside(paths: list[Path]) -> Iterator[None]:
    """Rename files while the block runs; restore them if it fails, or one of them is in use, else delete them."""
    moved = []
    try:
        for path in filter(Path.exists, paths):
            old = path.with_name(f".{path.name}.old.tmp")
            os.replace(path, old)  # fails on Windows if another program has opened the file
            moved.append((old, path))
        yield
    except BaseException:
        for old, path in moved:
            os.replace(old, path)
        raise
    for old, _ in moved:
        old.unlink()


@contextmanager
def atomic_write_dir(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the block succeeds; failures are as in `atomic_write`."""
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.tmp")
    with report_disk_errors(target.parent):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    sync(path)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def report_disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn an error about a full or read-only disk into a UserError that names the folder and the disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error_number(error)
        if number not in DISK_ERRNOS:
            raise
        raise UserError(f"cannot write to {folder}: {os.strerror(number)} ({describe_disk(folder)})") from error


def error_number(error: Exception) -> int | None:
    """Return the errno of a system error, also of one that Safetensors or Tokenizers report as text."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def describe_disk(folder: str | Path) -> str:
    """Return the mount point and free space of a folder's disk: "disk /home: 1 MB free of 20,480 MB"."""
    mount = Path(folder).resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    usage = shutil.disk_usage(mount)
    return f"disk {mount}: {usage.free >> 20:,} MB free of {usage.total >> 20:,} MB"


@contextmanager
def exclusive_dir(folder: str | Path, flag: str) -> Iterator[None]:
    """Create a folder and lock out other runs while the block runs; remove it afterwards if it is empty.

    `flag` is the command-line flag that chose the folder. Raises UserError if another run holds the
    folder, it cannot be written to, or less than MIN_FREE_BYTES are free.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    stack.callback(remove_if_empty, path)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(dir_lock(folder, wait=False))
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(MIN_FREE_BYTES))
        except Timeout as error:
            raise UserError(f"another run is writing to {folder}; wait for it, or choose another {flag}") from error
        except OSError as error:
            disk = f" ({describe_disk(folder)})" if error.errno == errno.ENOSPC else ""
            raise UserError(f"cannot write to {flag} {folder}: {error.strerror}{disk}") from error
        yield


@contextmanager
def dir_lock(folder: str | Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder's lock file while the block runs; raises filelock.Timeout if it is held and `wait` is false."""
    path = Path(folder) / LOCK_NAME
    with FileLock(path, timeout=-1 if wait else 0):
        try:
            yield
        finally:
            # Unlink before releasing: a waiting process notices and creates a new file.
            with suppress(OSError):
                path.unlink()


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()


def hex_digest(path: str | Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file by an algorithm of hashlib."""
    with open(path, "rb") as file:
        # Some systems allow MD5 only for other purposes than security.
        return hashlib.file_digest(file, partial(hashlib.new, algorithm, usedforsecurity=False)).hexdigest()


sha256 = partial(hex_digest, algorithm="sha256")
