"""Small HTTP servers on this machine, for tests of downloading: one that behaves, one that does not."""

import contextlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Serves with the methods of a request handler's class while the `with` block runs; `url` is where."""

    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *_: None  # a client that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class LocalServer(Server):
    """Serves `files`, {path: content}, to HEAD and GET, with extra `headers`; 404 for anything else."""

    def __init__(self, files, headers=None):
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
    """Serves one file, the first requests as `faults` say, functions of an Exchange; the last of them for good.

    `requests` are the Range headers of the requests that came, None where one had none.
    """

    def __init__(self, content, *faults, tag='"one"'):
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
    """One request, and the means to answer it well or badly."""

    def __init__(self, handler, content, tag, closing):
        self.handler, self.content, self.tag, self.closing = handler, content, tag, closing
        asked, version = handler.headers.get("Range"), handler.headers.get("If-Range", tag)
        self.start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and version == tag else 0

    def head(self, status=None, length=None, **headers):
        """Send the head of an answer from `start` on; `length` ... tells none."""
        self.handler.send_response(status or (206 if self.start else 200))
        if self.start and status is None:
            total = len(self.content)
            self.handler.send_header("Content-Range", f"bytes {self.start}-{total - 1}/{total}")
        if length is not ...:
            self.handler.send_header("Content-Length", str(len(self.rest) if length is None else length))
        if self.tag:
            self.handler.send_header("ETag", self.tag)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()

    def send(self, content):
        self.handler.wfile.write(content)

    @property
    def rest(self):
        """What a server that behaves would send."""
        return self.content[self.start:]

    def half(self):
        """Send half of that."""
        self.send(self.rest[:(len(self.rest) + 1) // 2])
        self.handler.wfile.flush()

    def reset(self):
        """Break the connection as a crash does."""
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.handler.connection.close()
        self.handler.wfile = self.handler.rfile = open("/dev/null", "wb")  # noqa: SIM115, the handler closes it

    def stall(self):
        """Say nothing more, without hanging up."""
        self.closing.wait(30)
