"""Atomic writes, locked folders and one-line errors about disks."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from finetuning.system.errors import UserError

LOCK_NAME = ".lock"
# Errors of the disk or its permissions, which the user can fix.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
MIN_FREE_BYTES = 1 << 20  # more than a run's record, predictions and figure need


@contextmanager
def atomic_write(*paths: str | Path) -> Iterator[list[Path]]:
    """Yield a temporary path for each of `paths`; rename them into place when the block succeeds.

    If the block fails, the temporary files are removed and the old files stay. Several old files are
    removed before the first rename, so that a crash can leave a file missing but never mixes old and
    new ones. Raises UserError, naming the disk, if it is full or read-only.
    """
    targets = [Path(path) for path in paths]
    temporaries = [target.with_name(f".{target.name}.tmp") for target in targets]
    with report_disk_errors(targets[0].parent):
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporaries
            for temporary in temporaries:
                sync(temporary)
            if len(targets) > 1:
                for target in targets:
                    target.unlink(missing_ok=True)
            for temporary, target in zip(temporaries, targets, strict=True):
                os.replace(temporary, target)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


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
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        raise UserError(f"cannot write to {folder}: {error.strerror} ({describe_disk(folder)})") from error


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
        return hashlib.file_digest(file, algorithm).hexdigest()


sha256 = partial(hex_digest, algorithm="sha256")
