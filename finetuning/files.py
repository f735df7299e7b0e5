"""Writing files so that a reader finds the old content or the new, never half of either, and one run at a time."""

import errno
import hashlib
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from finetuning.errors import UserError

LOCK = ".lock"
# Failures of the disk or its permissions are the world's, not a bug.
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
ROOM = 1 << 20  # bytes: more than a run's record, predictions and picture take


@contextmanager
def written_whole(*paths):
    """Yield one temporary path for each of `paths`; rename them into place when the block succeeds.

    If the block fails, the temporary files are removed and whatever stood at `paths` is left
    as it was; what a killed process leaves is overwritten the next time. With several paths the
    previous files are removed before the first rename, so that a crash in between can leave a file
    missing, but never old and new ones mixed. Raises UserError, naming the disk, where it is full.
    """
    finals = [Path(path) for path in paths]
    temporaries = [final.with_name(f".{final.name}.tmp") for final in finals]
    with disk_named(finals[0].parent):
        for final in finals:
            final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporaries
            for temporary in temporaries:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            if len(finals) > 1:
                for final in finals:
                    final.unlink(missing_ok=True)
            for temporary, final in zip(temporaries, finals, strict=True):
                os.replace(temporary, final)
        finally:
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)


@contextmanager
def disk_named(folder):
    """Turn a disk that is full or does not let us write to `folder` into a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        raise UserError(f"cannot write to {folder}: {error.strerror} ({disk(folder)})") from error


def disk(folder):
    """The disk a folder is on, or will be, and its room: "/home: 1 MB free of 20,480 MB"."""
    mount = Path(folder).resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    usage = shutil.disk_usage(mount)
    return f"disk {mount}: {usage.free >> 20:,} MB free of {usage.total >> 20:,} MB"


@contextmanager
def held(folder, flag):
    """Make a folder and keep other runs out of it while the block runs; `flag` is how the user chose it.

    An empty folder is not left behind. Raises UserError, before any work is done, where another
    run holds the folder or it cannot be written to.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    stack.callback(remove_if_empty, path)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, wait=False))
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(ROOM))
        except Timeout as error:
            raise UserError(f"another run is writing to {folder}; wait for it, or choose another {flag}") from error
        except OSError as error:
            where = f" ({disk(folder)})" if error.errno == errno.ENOSPC else ""
            raise UserError(f"cannot write to {flag} {folder}: {error.strerror}{where}") from error
        yield


@contextmanager
def locked(folder, wait):
    """Hold a folder's lock, which other processes see, while the block runs; raises Timeout if not to `wait` for it."""
    path = Path(folder) / LOCK
    with FileLock(path, timeout=-1 if wait else 0):
        try:
            yield
        finally:
            # While it is still held; whoever waits for it notices and makes a new one.
            with suppress(OSError):
                path.unlink()


def remove_if_empty(folder):
    """Remove a folder if there is nothing in it."""
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def folder_written_whole(folder):
    """Yield a temporary folder that takes the place of `folder` when the block succeeds.

    If the block fails, the temporary folder is removed and `folder` is left as it was; what a killed
    process leaves is overwritten the next time. Raises UserError, naming the disk, where it is full.
    """
    final = Path(folder)
    temporary = final.with_name(f".{final.name}.tmp")
    with disk_named(final.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in (path for path in temporary.rglob("*") if path.is_file()):
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sha256(path):
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
