"""A small Hugging Face hub: enough of its HTTP API to fetch snapshots of local folders."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What is there, and what was asked for.

    Attributes:
        folders: by repository name.
        cut_after: the first answer with more bytes than this ends early, once.
    """

    def __init__(self, folders: dict[str, Path]):
        self.folders = folders
        self.asked: list[str] = []
        self.cut_after: int | None = None
        self.url = ""


@contextlib.contextmanager
def fake_hub(folders: dict[str, Path]) -> Iterator[FakeHub]:
    """A hub on a free port, for HF_ENDPOINT."""
    hub = FakeHub(folders)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None: ...

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.asked.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                self._api("/".join(parts[2:4]), parts[4:], with_body)
            elif len(parts) > 4 and parts[2] == "resolve":
                self._file("/".join(parts[:2]), "/".join(parts[4:]), with_body)
            else:
                self._send(404, b"{}", {}, with_body)

        def _api(self, name: str, rest: list[str], with_body: bool) -> None:
            if name not in hub.folders:
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
                return
            files = sorted(p for p in hub.folders[name].iterdir() if p.is_file())
            if rest[:1] == ["tree"]:
                body: object = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)}
                    for f in files
                ]
            else:
                siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
                body = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(body).encode(), {}, with_body)

        def _file(self, name: str, file: str, with_body: bool) -> None:
            path = hub.folders.get(name, Path("/nowhere")) / file
            if not path.is_file():
                code = "EntryNotFound" if name in hub.folders else "RepoNotFound"
                self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, with_body)
                return
            data, headers = path.read_bytes(), {"ETag": f'"{_etag(path)}"'}
            headers |= {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            status = 200
            if (given := self.headers.get("Range", "")).startswith("bytes="):
                start = int(given.removeprefix("bytes=").split("-")[0] or 0)
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data, status = data[start:], 206
            self._send(status, data, headers, with_body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not with_body:
                return
            if hub.cut_after is not None and len(data) > hub.cut_after:
                data, hub.cut_after = data[: hub.cut_after], None
                self.close_connection = True
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
