"""HTTP servers on this machine for tests of downloads: a correct one and one that misbehaves."""

import contextlib
import hashlib
import random
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from finetuning.system.download import RemoteFile

ARCHIVE_NAME = "a.tar.gz"
ARCHIVE_CONTENT = random.Random(0).randbytes(300_000)


class Server:
    """Server at `url` that runs a request handler's class inside a `with` block."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *_: None  # clients may disconnect
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class LocalServer(Server):
    """Server of `files`, {path: content}, to HEAD and GET, with extra `headers`; 404 for other paths."""

    def __init__(self, files: dict[str, bytes], headers: dict[str, str] | None = None):
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                content = files.get(self.path.partition("?")[0])
                self.send_response(404 if content is None else 200)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                return content

            def do_GET(self):
                content = self.do_HEAD()
                if content:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        super().__init__(Handler)


class MisbehavingServer(Server):
    """Server of one file that answers the n-th request with the n-th of `faults`, later ones with the last.

    Faults are functions of an Exchange. `requests` lists the Range header of each request, or None.
    """

    def __init__(self, content: bytes, *faults, tag: str | None = '"one"'):
        self.requests = []
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append(self.headers.get("Range"))
                fault = faults[min(len(server.requests), len(faults)) - 1]
                with contextlib.suppress(ConnectionError):
                    fault(Exchange(self, server.content, server.tag, server.closing))

            def log_message(self, *_):
                pass

        self.content, self.tag = content, tag
        super().__init__(Handler)

    def __exit__(self, *_):
        self.closing.set()
        super().__exit__()


class Exchange:
    """One request, with methods for correct and faulty responses."""

    def __init__(self, handler: BaseHTTPRequestHandler, content: bytes, tag: str | None, closing: threading.Event):
        self.handler, self.content, self.tag, self.closing = handler, content, tag, closing
        content_range, if_range = handler.headers.get("Range"), handler.headers.get("If-Range", tag)
        resumes = content_range and if_range == tag
        self.start = int(content_range.removeprefix("bytes=").rstrip("-")) if resumes else 0

    def send_headers(self, status=None, length=None, **headers):
        """Send status and headers of a response from byte `start`; without Content-Length if `length` is "unknown"."""
        self.handler.send_response(status or (206 if self.start else 200))
        if self.start and status is None:
            total = len(self.content)
            self.handler.send_header("Content-Range", f"bytes {self.start}-{total - 1}/{total}")
        if length != "unknown":
            self.handler.send_header("Content-Length", str(len(self.remaining) if length is None else length))
        if self.tag:
            self.handler.send_header("ETag", self.tag)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()

    def send(self, content: bytes):
        """Send bytes of the body."""
        self.handler.wfile.write(content)

    @property
    def remaining(self) -> bytes:
        """The body of a correct response."""
        return self.content[self.start :]

    def send_half(self):
        """Send the first half of the correct body."""
        self.send(self.remaining[: (len(self.remaining) + 1) // 2])
        self.handler.wfile.flush()

    def reset(self):
        """Reset the connection, as a crashing server does."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.connection.close()
        self.handler.wfile = self.handler.rfile = open("/dev/null", "wb")  # noqa: SIM115, the handler closes it

    def stall(self):
        """Send nothing more and keep the connection open."""
        self.closing.wait(30)


def send_correctly(exchange: Exchange) -> None:
    """Send the correct response."""
    exchange.send_headers()
    exchange.send(exchange.remaining)


def remote_file(server: MisbehavingServer, content: bytes = ARCHIVE_CONTENT) -> RemoteFile:
    """Return a server's archive with its size and digest."""
    return RemoteFile(f"{server.url}/{ARCHIVE_NAME}", len(content), hashlib.md5(content).hexdigest())
