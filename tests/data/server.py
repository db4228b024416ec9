"""A web server of this machine that serves a folder, counts what it is asked, and fails as it is told."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves the files below a folder.

    Attributes:
        counts: number of requests, by method and path.
        bytes_sent: bytes of files that were sent.
        starts: the first byte of each answer to a GET.
        answers: by path, the status to answer instead of the file.
        redirects: by path, the address that has the file.
        logins: the passwords that were sent, by path.
        cuts: by path, the byte of the file after which the connection ends, once for each entry of the list.
        ranges: whether it serves a part of a file.
        versions: whether it sends an ETag.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.counts, self.bytes_sent = Counter[str](), 0
        self.starts: list[int] = []
        self.answers: dict[str, int] = {}
        self.redirects: dict[str, str] = {}
        self.logins: dict[str, str | None] = {}
        self.cuts: dict[str, list[int]] = {}
        self.ranges = self.versions = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.counts[f"{self.command} {path}"] += 1
        status, content, headers = server.answers.get(path, 200), b"", {}
        file = server.root / path.lstrip("/")
        server.logins[path] = self.headers.get("Authorization")
        if path in server.redirects:
            status, headers["Location"] = 302, server.redirects[path]
        if status == 200 and not file.is_file():
            status = 404
        if status == 200:
            content = file.read_bytes()
            if server.versions:
                headers["ETag"] = f'"{hash(content):x}"'
            if path.endswith(".html"):
                headers["Content-Type"] = "text/html; charset=utf-8"
        start, end = 0, len(content)
        if content and server.ranges and (ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, status = int(ranged[1]), 206
            end = int(ranged[2]) + 1 if ranged[2] else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": end - start}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            server.starts.append(start)
            if cuts := server.cuts.get(path):
                end = max(start, cuts.pop(0))
                self.close_connection = True
            server.bytes_sent += end - start  # before the client has them and looks
            self.wfile.write(content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    """A server of a folder, until the context ends."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
