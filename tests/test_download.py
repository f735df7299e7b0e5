"""Downloads from a server that misbehaves on purpose; the faults are the functions with a docstring."""

import hashlib
import os
import random

import pytest
from local_server import LocalServer, MisbehavingServer

from finetuning import download as downloads
from finetuning.download import ATTEMPTS, Download, download
from finetuning.errors import UserError

CONTENT = random.Random(0).randbytes(300_000)
NAME = "a.tar.gz"


def fine(exchange):
    exchange.head()
    exchange.send(exchange.rest)


def truncates(exchange):
    """hangs up half way"""
    exchange.head()
    exchange.half()


def resets(exchange):
    """breaks the connection half way"""
    truncates(exchange)
    exchange.reset()


def resets_at_once(exchange):
    """breaks the connection before the answer"""
    exchange.reset()


def stalls(exchange):
    """falls silent half way"""
    truncates(exchange)
    exchange.stall()


def stalls_at_once(exchange):
    """falls silent before the answer"""
    exchange.stall()


def claims_less(exchange):
    """claims half the length, and sends half"""
    exchange.head(length=(len(exchange.rest) + 1) // 2)
    exchange.half()


def claims_more(exchange):
    """claims a greater length than it sends"""
    exchange.head(length=len(exchange.rest) + 100)
    exchange.send(exchange.rest)


def sends_more(exchange):
    """sends more than the file"""
    exchange.head(length=len(exchange.rest) + 70_000)
    exchange.send(exchange.rest + bytes(70_000))


def sends_wrong_bytes(exchange):
    """changes one bit"""
    exchange.head()
    exchange.send(exchange.rest[:-1] + bytes([exchange.rest[-1] ^ 1]))


def sends_a_page(exchange):
    """sends a page of HTML with status 200"""
    exchange.head(length=19, status=200)
    exchange.send(b"<html>Log in</html>")


def hides_the_length(exchange):
    """tells no length, and hangs up half way"""
    exchange.head(length=...)
    exchange.half()


def cuts_a_chunk(exchange):
    """hangs up within a chunk of a chunked answer"""
    exchange.head(length=..., Transfer_Encoding="chunked")
    exchange.send(b"%x\r\n" % len(exchange.rest))
    exchange.half()


def is_overloaded(exchange):
    """answers 503"""
    exchange.head(status=503, length=0)


def is_broken(exchange):
    """answers 500"""
    exchange.head(status=500, length=0)


def is_impatient(exchange):
    """answers 429"""
    exchange.head(status=429, length=0)


def ignores_ranges(exchange):
    """sends the whole file when asked for its rest"""
    exchange.start = 0
    fine(exchange)


def refuses_ranges(exchange):
    """answers 416 when asked for the rest"""
    exchange.head(status=416 if exchange.start else 200, length=0 if exchange.start else None)
    exchange.send(b"" if exchange.start else exchange.content)


def confuses_ranges(exchange):
    """sends other bytes than those it says it sends"""
    exchange.head()
    exchange.send(exchange.content[:len(exchange.rest)])


PASSING = [truncates, resets, resets_at_once, stalls, stalls_at_once, claims_less, claims_more, sends_more,
           sends_wrong_bytes, sends_a_page, hides_the_length, cuts_a_chunk, is_overloaded, is_broken, is_impatient]
OF_RANGES = [ignores_ranges, refuses_ranges, confuses_ranges]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short timeouts, and no waiting between attempts; returns the seconds it would have waited."""
    waits = []
    monkeypatch.setattr(downloads, "TIMEOUT", (5, 0.3))
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    return waits


def official(server, content=CONTENT):
    return Download(f"{server.url}/{NAME}", len(content), hashlib.md5(content).hexdigest())


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.__doc__)
def test_a_server_that_misbehaves_once(fault, tmp_path):
    with MisbehavingServer(CONTENT, fault, fine) as server:
        download(official(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("fault", OF_RANGES, ids=lambda fault: fault.__doc__)
def test_a_server_that_does_not_continue_as_asked(fault, tmp_path):
    with MisbehavingServer(CONTENT, truncates, fault, fine) as server:
        download(official(server), tmp_path / NAME)
    assert server.requests[1] == "bytes=150000-"
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.__doc__)
def test_a_server_that_always_misbehaves(fault, tmp_path):
    """Where each attempt brings something new the file is whole in the end; else it is refused, and not there."""
    with MisbehavingServer(CONTENT, fault) as server:
        wanted = official(server)
        if fault in (truncates, resets, stalls, claims_less, claims_more, hides_the_length, cuts_a_chunk):
            download(wanted, tmp_path / NAME)
            assert (tmp_path / NAME).read_bytes() == CONTENT
        else:
            with pytest.raises(UserError, match=f"cannot download {wanted.url}: "):
                download(wanted, tmp_path / NAME)
            assert not (tmp_path / NAME).exists()
            assert ATTEMPTS <= len(server.requests) <= ATTEMPTS + 1


def test_all_at_once(tmp_path):
    """A different fault each time."""
    faults = [fault for fault in PASSING if fault not in (is_broken, is_impatient)]
    with MisbehavingServer(CONTENT, *[step for fault in faults for step in (truncates, fault)], fine) as server:
        download(official(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_what_no_other_try_would_bring_is_not_tried_again(status, tmp_path, quick):
    with MisbehavingServer(CONTENT, lambda exchange: exchange.head(status=status, length=0)) as server:
        with pytest.raises(UserError, match=f"{status} "):
            download(official(server), tmp_path / NAME)
        assert len(server.requests) == 1
    assert quick == []
    assert os.listdir(tmp_path) == []


def test_a_redirect_to_itself_is_refused(tmp_path):
    with MisbehavingServer(CONTENT, lambda exchange: exchange.head(302, 0, Location=f"/{NAME}")) as server, \
            pytest.raises(UserError, match="redirects"):
        download(official(server), tmp_path / NAME)


def test_the_waits_grow_and_start_anew_where_something_came(tmp_path, quick):
    with MisbehavingServer(CONTENT, is_overloaded, is_overloaded, is_overloaded, truncates, is_overloaded, fine
                           ) as server:
        download(official(server), tmp_path / NAME)
    assert quick == [1, 2, 4, 1, 2]


@pytest.mark.parametrize("size", [1, 200_000, 299_999, 300_000])
def test_a_later_process_goes_on_with_the_part(tmp_path, size):
    (tmp_path / f".{NAME}.part").write_bytes(CONTENT[:size])
    with MisbehavingServer(CONTENT, fine) as server:
        download(official(server), tmp_path / NAME)
    assert server.requests == ([] if size == 300_000 else [f"bytes={size}-"])
    assert (tmp_path / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"x" * 200_000, b"x" * 300_000, b"x" * 400_000])
def test_a_part_of_another_file_costs_an_attempt(tmp_path, part):
    (tmp_path / f".{NAME}.part").write_bytes(part)
    with MisbehavingServer(CONTENT, fine) as server:
        download(official(server), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_without_a_digest_a_part_is_gone_on_with_only_if_the_server_vouches_for_it(tmp_path):
    (tmp_path / f".{NAME}.part").write_bytes(b"of who knows what")
    for tag, ranges in [('"one"', [None, "bytes=150000-"]), (None, [None, None])]:
        with MisbehavingServer(CONTENT, truncates, fine, tag=tag) as server:
            download(Download(f"{server.url}/{NAME}"), tmp_path / NAME)
        assert server.requests == ranges
        assert (tmp_path / NAME).read_bytes() == CONTENT


def test_a_file_that_changes_meanwhile_is_not_mixed(tmp_path):
    with MisbehavingServer(CONTENT, truncates, fine) as server:
        def change(seconds):
            server.content, server.tag = CONTENT[::-1], '"two"'
        downloads.time.sleep = change
        download(Download(f"{server.url}/{NAME}"), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT[::-1]


def test_an_interrupted_download_leaves_a_part_and_no_file(tmp_path):
    def interrupted(exchange):
        truncates(exchange)
    downloads.time.sleep = lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt)
    with MisbehavingServer(CONTENT, interrupted) as server, pytest.raises(KeyboardInterrupt):
        download(official(server), tmp_path / NAME)
    assert os.listdir(tmp_path) == [f".{NAME}.part"]
    assert (tmp_path / f".{NAME}.part").read_bytes() == CONTENT[:150_000]


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_from_the_environment(tmp_path, monkeypatch, variable):
    """The server of that name is nowhere; the proxy has the file."""
    url = f"http://reviews.invalid/{NAME}"
    with LocalServer({url: CONTENT}) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        download(Download(url), tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == CONTENT
