"""A small HTTP server on this machine, for tests of downloading."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """Serves `files`, {path: content}, to HEAD and GET, with extra `headers`; 404 for anything else.

    `claim` adds that many bytes to the length it states, as if the connection broke before the end.
    """

    def __init__(self, files, headers=None, claim=0):
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                content = files.get(self.path.partition("?")[0])
                self.send_response(404 if content is None else 200)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content or b"") + claim))
                self.end_headers()
                return content

            def do_GET(self):
                content = self.do_HEAD()
                if content:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
