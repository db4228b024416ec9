"""A Hugging Face Hub in miniature, for tests without a network: the requests that `datasets` makes, answered.

python hub.py FOLDER PROGRAM ... runs a program whose Hub it is. FOLDER/USER/NAME is a data set; USER/gated needs a
permission, USER/private needs a login.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        place = unquote(urlparse(self.path).path).strip("/").split("/")
        is_api = place[0] == "api"
        _, user, name, *rest = [*(place[1:] if is_api else place), "", "", ""]
        files = {
            path.relative_to(self.root / user / name).as_posix(): path.read_bytes()
            for path in sorted((self.root / user / name).rglob("*"))
            if path.is_file()
        }
        if name == "gated" and not is_api:
            self.answer(403, {}, error="GatedRepo")
        elif name == "private":
            self.answer(401, {}, error="RepoNotFound")
        elif not name or not (self.root / user / name).is_dir():
            self.answer(404, {}, error="RepoNotFound")
        elif is_api and rest[:1] == ["tree"]:
            folder = "/".join(rest[2:]).strip("/")
            found = [entry(path, content) for path, content in files.items() if path.rpartition("/")[0] == folder]
            folders = {path.partition("/")[0] for path in files if "/" in path} if not folder else ()
            self.answer(
                200, found + [{"type": "directory", "path": path, "oid": COMMIT, "size": 0} for path in folders]
            )
        elif is_api:
            self.answer(
                200, {"id": f"{user}/{name}", "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
            )
        elif (path := "/".join(rest[2:]).strip("/")) in files:
            self.answer(200, files[path])
        else:
            self.answer(404, {}, error="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(404, {})

    def answer(self, status: int, content: object, error: str = "") -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Error-Code": error}
        wanted = self.headers.get("Range")
        if wanted and status == 200:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            last = min(int(end or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(body)}"
            body, status = body[int(start) : last + 1], 206
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    sys.exit(subprocess.run(sys.argv[2:], env=env).returncode)
