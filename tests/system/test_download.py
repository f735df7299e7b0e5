"""Downloads from a server that misbehaves."""

import os

import pytest
from download_faults import (
    FAULTS,
    RANGE_FAULTS,
    cuts_chunk,
    declares_less,
    declares_more,
    omits_length,
    resets,
    responds_429,
    responds_500,
    responds_503,
    stalls,
    truncates,
)
from local_server import ARCHIVE_CONTENT, ARCHIVE_NAME, LocalServer, MisbehavingServer, remote_file, send_correctly

from finetuning.system import download as downloads
from finetuning.system.download import MAX_FAILURES, RemoteFile, download
from finetuning.system.errors import UserError


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Shorten timeouts and do not wait between attempts; return the list of skipped waits in seconds."""
    waits = []
    monkeypatch.setattr(downloads, "TIMEOUT", (5, 0.3))
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__doc__)
def test_download_survives_one_fault(fault, tmp_path):
    with MisbehavingServer(ARCHIVE_CONTENT, fault, send_correctly) as server:
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT
    assert os.listdir(tmp_path) == [ARCHIVE_NAME]


@pytest.mark.parametrize("fault", RANGE_FAULTS, ids=lambda fault: fault.__doc__)
def test_download_survives_fault_when_resuming(fault, tmp_path):
    with MisbehavingServer(ARCHIVE_CONTENT, truncates, fault, send_correctly) as server:
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert server.requests[1] == "bytes=150000-"
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__doc__)
def test_download_with_permanent_fault_completes_or_raises(fault, tmp_path):
    """It completes if each attempt receives something new; else it raises UserError and leaves no file."""
    with MisbehavingServer(ARCHIVE_CONTENT, fault) as server:
        remote = remote_file(server)
        if fault in (truncates, resets, stalls, declares_less, declares_more, omits_length, cuts_chunk):
            download(remote, tmp_path / ARCHIVE_NAME)
            assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT
        else:
            with pytest.raises(UserError, match=f"cannot download {remote.url}: "):
                download(remote, tmp_path / ARCHIVE_NAME)
            assert not (tmp_path / ARCHIVE_NAME).exists()
            assert MAX_FAILURES <= len(server.requests) <= MAX_FAILURES + 1


def test_download_survives_a_sequence_of_different_faults(tmp_path):
    faults = [fault for fault in FAULTS if fault not in (responds_500, responds_429)]
    with MisbehavingServer(
        ARCHIVE_CONTENT, *[step for fault in faults for step in (truncates, fault)], send_correctly
    ) as server:
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_download_does_not_retry_permanent_http_errors(status, tmp_path, waits):
    with MisbehavingServer(ARCHIVE_CONTENT, lambda exchange: exchange.send_headers(status=status, length=0)) as server:
        with pytest.raises(UserError, match=f"{status} "):
            download(remote_file(server), tmp_path / ARCHIVE_NAME)
        assert len(server.requests) == 1
    assert waits == []
    assert os.listdir(tmp_path) == []


def test_download_raises_on_redirect_loop(tmp_path):
    with (
        MisbehavingServer(
            ARCHIVE_CONTENT, lambda exchange: exchange.send_headers(302, 0, Location=f"/{ARCHIVE_NAME}")
        ) as server,
        pytest.raises(UserError, match="redirects"),
    ):
        download(remote_file(server), tmp_path / ARCHIVE_NAME)


def test_waits_double_and_restart_after_progress(tmp_path, waits):
    with MisbehavingServer(
        ARCHIVE_CONTENT, responds_503, responds_503, responds_503, truncates, responds_503, send_correctly
    ) as server:
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert waits == [1, 2, 4, 1, 2]


@pytest.mark.parametrize("size", [1, 200_000, 299_999, 300_000])
def test_download_resumes_from_part_of_earlier_process(tmp_path, size):
    (tmp_path / f".{ARCHIVE_NAME}.part").write_bytes(ARCHIVE_CONTENT[:size])
    with MisbehavingServer(ARCHIVE_CONTENT, send_correctly) as server:
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert server.requests == ([] if size == 300_000 else [f"bytes={size}-"])
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT


@pytest.mark.parametrize("part", [b"x" * 200_000, b"x" * 300_000, b"x" * 400_000])
def test_download_replaces_part_of_another_file(tmp_path, part):
    (tmp_path / f".{ARCHIVE_NAME}.part").write_bytes(part)
    with MisbehavingServer(ARCHIVE_CONTENT, send_correctly) as server:
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT


def test_download_without_digest_resumes_only_with_if_range(tmp_path):
    (tmp_path / f".{ARCHIVE_NAME}.part").write_bytes(b"of another file")
    for tag, ranges in [('"one"', [None, "bytes=150000-"]), (None, [None, None])]:
        with MisbehavingServer(ARCHIVE_CONTENT, truncates, send_correctly, tag=tag) as server:
            download(RemoteFile(f"{server.url}/{ARCHIVE_NAME}"), tmp_path / ARCHIVE_NAME)
        assert server.requests == ranges
        assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT


def test_download_restarts_if_the_file_changes_on_the_server(tmp_path):
    with MisbehavingServer(ARCHIVE_CONTENT, truncates, send_correctly) as server:

        def change(seconds):
            server.content, server.tag = ARCHIVE_CONTENT[::-1], '"two"'

        downloads.time.sleep = change
        download(RemoteFile(f"{server.url}/{ARCHIVE_NAME}"), tmp_path / ARCHIVE_NAME)
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT[::-1]


def test_interrupted_download_leaves_only_the_part(tmp_path):
    downloads.time.sleep = lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt)
    with MisbehavingServer(ARCHIVE_CONTENT, truncates) as server, pytest.raises(KeyboardInterrupt):
        download(remote_file(server), tmp_path / ARCHIVE_NAME)
    assert os.listdir(tmp_path) == [f".{ARCHIVE_NAME}.part"]
    assert (tmp_path / f".{ARCHIVE_NAME}.part").read_bytes() == ARCHIVE_CONTENT[:150_000]


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_download_uses_proxy_of_the_environment(tmp_path, monkeypatch, variable):
    """The server does not exist; the proxy has the file."""
    url = f"http://reviews.invalid/{ARCHIVE_NAME}"
    with LocalServer({url: ARCHIVE_CONTENT}) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        download(RemoteFile(url), tmp_path / ARCHIVE_NAME)
    assert (tmp_path / ARCHIVE_NAME).read_bytes() == ARCHIVE_CONTENT
