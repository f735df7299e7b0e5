"""Download of a large file: retried and resumed if the connection breaks, verified at the end."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3
from tqdm import tqdm

from finetuning.system.console import print_status
from finetuning.system.errors import UserError
from finetuning.system.files import hex_digest, report_disk_errors
from finetuning.system.network import misconfigured_variable

TIMEOUT = 10, 30  # seconds: to connect, and between two bytes
MAX_FAILURES = 5  # consecutive attempts that receive nothing new
RETRYABLE_STATUSES = {408, 425, 429, 500, 502, 503, 504}
CHUNK_BYTES = 1 << 16


class RemoteFile(NamedTuple):
    """A file to download, with the properties that are known of it beforehand."""

    url: str
    size: int | None = None  # bytes
    md5: str | None = None  # hexadecimal


class IncompleteDownload(Exception):
    """The content received is incomplete or of another file; a retry may succeed."""


def download(remote: RemoteFile, target: str | Path) -> None:
    """Download a file to `target`, which appears only when it is complete and verified.

    Partial content is kept beside it in `.NAME.part`. If the MD5 digest is known, a later process
    resumes from that. Raises UserError if the server cannot be reached, responds with an error or
    keeps sending content of another size or digest.
    """
    target = Path(target)
    part = target.with_name(f".{target.name}.part")
    with report_disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not remote.md5:
            part.unlink(missing_ok=True)  # could be of another file, which only a digest would reveal
        num_failures, most_received = 0, 0
        if_range: dict[str, str] = {}
        while True:
            try:
                fetch_remaining(remote, part, if_range)
                verify(remote, part)
                break
            except (IncompleteDownload, OSError, urllib3.exceptions.HTTPError) as error:
                if isinstance(error, OSError) and error.errno:  # of the disk; those of requests have no errno
                    raise
                received = file_size(part)
                num_failures = 1 if received > most_received else num_failures + 1
                most_received = max(most_received, received)
                problem = misconfigured_variable(error, "requests")
                if problem or num_failures == MAX_FAILURES or not is_retryable(error):
                    reason = problem or f"{root_cause(error)}; if you have the archive, pass it with --archive"
                    raise UserError(f"cannot download {remote.url}: {reason}") from error
                wait = 2 ** (num_failures - 1)
                print_status(f"{root_cause(error)}; retrying in {wait} s ({received:,} bytes received so far)")
                time.sleep(wait)
        os.replace(part, target)


def fetch_remaining(remote: RemoteFile, part: Path, if_range: dict[str, str]) -> None:
    """Append the missing bytes to `part`, or rewrite it if the server does not support ranges.

    `if_range` holds the If-Range header, which tells the server the version that `part` is of; the
    first response fills it. Without it, and without a digest to verify, `part` is not resumed.
    """
    start = file_size(part) if if_range or remote.md5 else 0
    if start and start == remote.size:
        return
    # Without "identity", some servers declare a .tar.gz as gzip-encoded, and requests would unpack it.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-", **if_range} if start else {})
    with requests.get(remote.url, stream=True, timeout=TIMEOUT, headers=headers) as response:
        if start and response.status_code == 416:  # range not satisfiable
            part.unlink()
            raise IncompleteDownload("the server's file is shorter than the partial download")
        response.raise_for_status()
        content_range = response.headers.get("Content-Range", "")
        if response.status_code != 206 or not content_range.startswith(f"bytes {start}-"):
            start = 0
        if tag := response.headers.get("ETag") or response.headers.get("Last-Modified"):
            if_range["If-Range"] = tag
        length = int(response.headers.get("Content-Length", 0))
        size = remote.size or (start + length if length else None)
        write_body(response, part, start, size)
    if size and file_size(part) < size:
        raise IncompleteDownload(f"received {file_size(part):,} of {size:,} bytes")


def write_body(response: requests.Response, part: Path, start: int, size: int | None) -> None:
    """Write a response's body to `part` from byte `start`, with a progress bar; stop beyond `size` bytes."""
    name = part.name[1 : -len(".part")]
    with (
        open(part, "ab" if start else "wb") as file,
        tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=name) as bar,
    ):
        # read1 returns what has arrived, so that nothing is lost if the connection breaks.
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))
            if size and file.tell() > size:
                break
        file.flush()
        os.fsync(file.fileno())


def verify(remote: RemoteFile, part: Path) -> None:
    """Delete `part` and raise IncompleteDownload if its size or digest differs from the expected one."""
    if remote.size and file_size(part) != remote.size:
        problem = f"received {file_size(part):,} bytes instead of {remote.size:,}"
    elif remote.md5 and hex_digest(part, "md5") != remote.md5:
        problem = "the file received is not the official archive (its MD5 differs)"
    else:
        return
    part.unlink()
    raise IncompleteDownload(problem)


def is_retryable(error: Exception) -> bool:
    """Return whether a failed request may succeed later."""
    if isinstance(error, requests.exceptions.SSLError):
        return False
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code in RETRYABLE_STATUSES
    connection_errors = requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError
    return isinstance(error, (IncompleteDownload, *connection_errors))


def root_cause(error: Exception) -> object:
    """Return the innermost cause of a failed request, which has the shortest message."""
    while isinstance(error, requests.RequestException) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    error = getattr(error, "reason", None) or error
    return error.args[0] if error.args else error


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0
