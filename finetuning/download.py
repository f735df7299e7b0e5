"""Downloading a large file over connections that break: it goes on where it stopped, and is checked at the end."""

import hashlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3
from tqdm import tqdm

from finetuning.cli import note
from finetuning.errors import UserError
from finetuning.files import disk_named
from finetuning.network import wrong_setting

TIMEOUT = 10, 30  # seconds: to connect, and without a byte from the server
ATTEMPTS = 5  # in a row that bring nothing new
WORTH_ANOTHER_TRY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses of troubles that pass


class Download(NamedTuple):
    """Where a file is, and what it must be if that is known beforehand."""

    url: str
    size: int | None = None  # bytes
    md5: str | None = None


class Broken(Exception):
    """What came is not the file, or not all of it; another try may bring it."""


def download(wanted, target):
    """Download a file to `target`, which appears only once it is whole.

    What has come so far is in `.NAME.part` beside it. If the file's digest is known, the part
    outlives this process, and the next one goes on with it. Raises UserError if the server cannot be
    reached, answers with an error, or keeps sending something of another size or digest than it should.
    """
    target = Path(target)
    part = target.with_name(f".{target.name}.part")
    with disk_named(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not wanted.md5:
            part.unlink(missing_ok=True)  # nothing would tell whether it is of the same file
        failures, most, version = 0, 0, {}
        while True:
            try:
                receive(wanted, part, version)
                check(wanted, part)
                break
            except (Broken, OSError, urllib3.exceptions.HTTPError) as error:  # a RequestException is an OSError
                if isinstance(error, OSError) and error.errno:  # of the disk
                    raise
                if problem := wrong_setting(error, "requests"):
                    raise UserError(f"cannot download {wanted.url}: {problem}") from error
                size = size_of(part)
                failures = 1 if size > most else failures + 1
                most = max(most, size)
                if failures == ATTEMPTS or not worth_another_try(error):
                    raise UserError(f"cannot download {wanted.url}: {reason(error)}; if you have the archive, "
                                    "pass it with --archive") from error
                note(f"{reason(error)}; trying again in {2 ** (failures - 1)} s, {size:,} bytes are here")
                time.sleep(2 ** (failures - 1))
        os.replace(part, target)


def receive(wanted, part, version):
    """Add to `part` what it lacks of the file, or all of it where the server does not send pieces.

    `version` is the If-Range header, by which the server knows which version the part is of; it is
    filled by the first answer. Without one, and without a digest to check, a part is not gone on with.
    """
    start = size_of(part) if version or wanted.md5 else 0
    if start and start == wanted.size:
        return
    # As it is stored: some servers call a .tar.gz a gzipped page, which requests would unpack.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-", **version} if start else {})
    with requests.get(wanted.url, stream=True, timeout=TIMEOUT, headers=headers) as response:
        if start and response.status_code == 416:  # it has no such piece: not the file the part is of
            part.unlink()
            raise Broken("the server's file is shorter than what is here")
        response.raise_for_status()
        continued = (response.status_code == 206
                     and response.headers.get("Content-Range", "").startswith(f"bytes {start}-"))
        start = start if continued else 0
        if tag := response.headers.get("ETag") or response.headers.get("Last-Modified"):
            version["If-Range"] = tag
        length = int(response.headers.get("Content-Length", 0))
        size = wanted.size or (start + length if length else None)
        with open(part, "ab" if start else "wb") as file, tqdm(
                total=size, initial=start, unit="B", unit_scale=True, desc=part.name[1:-len(".part")]) as bar:
            while chunk := response.raw.read1(1 << 16, decode_content=False):  # whatever came before a break counts
                file.write(chunk)
                bar.update(len(chunk))
                if size and file.tell() > size:
                    break
            file.flush()
            os.fsync(file.fileno())
    if size and size_of(part) < size:
        raise Broken(f"received {size_of(part):,} of {size:,} bytes")


def check(wanted, part):
    """Raise Broken, and delete the part, if it is not the file that is wanted."""
    if wanted.size and size_of(part) != wanted.size:
        wrong = f"received {size_of(part):,} bytes instead of {wanted.size:,}"
    elif wanted.md5 and md5(part) != wanted.md5:
        wrong = "the file received is not the official archive (its MD5 differs)"
    else:
        return
    part.unlink()
    raise Broken(wrong)


def worth_another_try(error):
    """Whether what went wrong may go right the next time."""
    if isinstance(error, requests.HTTPError):
        return error.response.status_code in WORTH_ANOTHER_TRY
    return isinstance(error, (Broken, requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)
                      ) and not isinstance(error, requests.exceptions.SSLError)


def reason(error):
    """The innermost cause of a failed request, which says the most in the fewest words."""
    while isinstance(error, requests.RequestException) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    error = getattr(error, "reason", None) or error
    return error.args[0] if error.args else error


def size_of(path):
    """The size of a file in bytes, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def md5(path):
    """Hexadecimal MD5 of a file's content: the digest that is known of the official archive."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
