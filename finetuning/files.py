"""Writing files so that a reader finds the old content or the new, never half of either."""

import hashlib
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_whole(*paths):
    """Yield one temporary path for each of `paths`; rename them into place when the block succeeds.

    If the block fails, the temporary files are removed and whatever stood at `paths` is left
    as it was. With several paths the previous files are removed before the first rename, so
    that a crash in between can leave a file missing, but never old and new ones mixed.
    """
    finals = [Path(path) for path in paths]
    # The process id keeps two runs in one folder from writing to the same temporary file.
    temporaries = [final.with_name(f".{final.name}.{os.getpid()}.tmp") for final in finals]
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
def folder_written_whole(folder, keep=lambda folder: False):
    """Yield a temporary folder that takes the place of `folder` when the block succeeds.

    If the block fails, the temporary folder is removed and `folder` is left as it was. Where
    `keep(folder)` is true by the end of the block, it is left as it is, too.
    """
    final = Path(folder)
    # Not tempfile.mkdtemp, whose folders nobody else may read.
    temporary = final.with_name(f".{final.name}.{uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (path for path in temporary.rglob("*") if path.is_file()):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if not keep(final):
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path):
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
