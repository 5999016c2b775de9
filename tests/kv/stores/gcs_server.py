"""A small server that answers as Google Cloud Storage's JSON API does, in memory.

    python -m tests.kv.stores.gcs_server PORT

Knows what tensorstore's driver asks for: media reads with ranges and generations, simple uploads,
deletions and paged listings, of one bucket of any name. Everything that it was given is gone when
it ends.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50
"""Names in one answer of a listing: few, so that listings take several."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one packet: else its end waits for an acknowledgement
    objects: dict[str, tuple[int, bytes]] = {}  # generation and content, by name
    lock = threading.Lock()
    generation = 0

    def do_GET(self) -> None:
        path, query = self._asked()
        if path.endswith("/o"):
            return self._list(query)
        with self.lock:
            generation, data = self.objects.get(self._name(path), (0, b""))
        if not generation:
            return self._answer(404, b"{}")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304, b"")
        if query.get("alt") != "media":
            return self._json(self._about(self._name(path), generation, data))
        status, total = 200, len(data)
        headers = {"x-goog-generation": str(generation)}
        if (wanted := self.headers.get("Range")) is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(total - int(last), 0)
            end = min(int(last) + 1, total) if first and last else total
            status, data = 206, data[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self._answer(status, data, headers)

    def do_POST(self) -> None:
        path, query = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if not path.startswith("/upload/"):
            return self._answer(404, b"{}")
        name = query["name"]
        with self.lock:
            known, _ = self.objects.get(name, (0, b""))
            if query.get("ifGenerationMatch", str(known)) != str(known):
                return self._answer(412, b"{}")
            Handler.generation += 1
            self.objects[name] = (Handler.generation, data)
            about = self._about(name, Handler.generation, data)
        self._json(about)

    def do_DELETE(self) -> None:
        path, query = self._asked()
        name = self._name(path)
        with self.lock:
            known, _ = self.objects.get(name, (0, b""))
            if query.get("ifGenerationMatch", str(known)) != str(known):
                return self._answer(412, b"{}")
            is_there = self.objects.pop(name, None) is not None
        self._answer(204 if is_there else 404, b"")

    def _list(self, query: dict[str, str]) -> None:
        start, end = query.get("pageToken") or query.get("startOffset", ""), query.get("endOffset")
        with self.lock:
            names = [
                name
                for name in sorted(self.objects)
                if name.startswith(query.get("prefix", ""))
                and name >= start
                and (end is None or name < end)
            ]
            items = [self._about(name, *self.objects[name]) for name in names[:PAGE]]
        answer: dict[str, Any] = {"kind": "storage#objects", "items": items}
        if len(names) > PAGE:
            answer["nextPageToken"] = names[PAGE]
        self._json(answer)

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {key: values[-1] for key, values in parse_qs(parts.query).items()}

    @staticmethod
    def _name(path: str) -> str:
        return unquote(path.partition("/o/")[2])

    @staticmethod
    def _about(name: str, generation: int, data: bytes) -> dict[str, str]:
        return {
            "name": name,
            "bucket": "any",
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        print(format % args, flush=True)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
