"""Bad requests to every endpoint of a server: answers and errors, never a 5xx, a hang or a leak.

Three sources take turns: schemathesis on the server's own OpenAPI schema, valid bodies with parts
replaced, and what is no proper HTTP or JSON.
"""

import asyncio
import base64
import itertools
import json
import random
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.own_environment import python_with
from tests.server.hostile import BROKEN, ODD, Broken, Maker
from tests.server.proof.served import ADMIN_KEY, AUTHORIZATION, Served, served
from tests.server.random_bodies import ADMIN_BODIES, BODIES, mutated

PACKAGES = ("schemathesis==4.32.5",)
CONCURRENCY = 16
ANSWER_TIMEOUT_S = 60.0
WAIT_TIMEOUT_S = 30.0
"""How long the server waits for the rest of headers or a body."""

STALLED = 16
"""Clients that stop in the middle and wait."""

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
STREAM = "/v1/kv/stream"
"""Never ends by itself."""

MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Sent:
    """One request.

    Attributes:
        source: who thought of it, and its kind.
        is_http: proper HTTP, which must have an answer.
        enough_bytes: after so many the client leaves.
    """

    source: str
    broken: Broken
    is_http: bool = True
    enough_bytes: int = 1 << 30


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    num_refused: int = 0
    worst_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def note(self, sent: Sent, data: bytes | None, elapsed_s: float) -> None:
        """Count an answer; None: there was none in time."""
        self.sources[sent.source.partition(":")[0]] += 1
        self.worst_s = max(self.worst_s, elapsed_s)
        statuses = [status.decode() for status in STATUS.findall(data or b"")]
        self.statuses.update(statuses or ["hang" if data is None else "closed"])
        self.num_refused += not any(status.startswith("2") for status in statuses)
        fault = fault_of(sent, data, statuses)
        if fault is not None:
            shown = f"{fault}: {sent.source}: {sent.broken.data[:600]!r} -> {(data or b'')[:300]!r}"
            self.faults.append(shown)


def fault_of(sent: Sent, data: bytes | None, statuses: list[str]) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if data is None:
        return "no end in time"
    if any(status >= "500" for status in statuses):
        return "a 5xx"
    if not statuses:
        return "no answer" if sent.is_http else None
    head, _, body = data.partition(b"\r\n\r\n")
    if len(statuses) == 1 and statuses[0] >= "400" and not sent.broken.data.startswith(b"HEAD"):
        try:
            return None if json.loads(body)["error"] and len(body) <= 16 << 10 else "no error"
        except (ValueError, KeyError, TypeError):
            return "no error in the body"
    if b'"server_error"' in body or b'"api_error"' in body:
        return "an error inside of a stream"
    return None


@contextmanager
def schema_requests(schema: Any, seed: int) -> Iterator[Iterator[Sent]]:
    """Requests of schemathesis, made in a process of its own while they are read."""
    script = Path(__file__).with_name("schema_requests.py")
    python = python_with(PACKAGES, "schemathesis")
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryDirectory() as folder:
        json.dump(schema, given)
        given.seek(0)
        command = [python, str(script), str(seed)]
        with subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, text=True, cwd=folder
        ) as process:
            assert process.stdout is not None
            try:
                yield (_of_schema(json.loads(line)) for line in process.stdout)
            finally:
                process.kill()


def _of_schema(line: dict[str, Any]) -> Sent:
    body = base64.b64decode(line["body"])
    headers = [f"{name}: {value}" for name, value in line["headers"] if name != "Connection"]
    if not any(name.lower() == "content-length" for name, _ in line["headers"]):
        headers.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([f"{line['method']} {line['target']} HTTP/1.1", "Host: x", *headers])
    data = head.encode() + b"\r\n" + _key(line["target"]) + b"Connection: close\r\n\r\n" + body
    enough = 1 if line["target"].startswith(STREAM) else 1 << 30
    return Sent(f"schemathesis: {line['method']} {line['target']}", Broken(data), True, enough)


def _key(target: str) -> bytes:
    return _ADMIN if target.startswith("/admin") else AUTHORIZATION


_ADMIN = f"Authorization: Bearer {ADMIN_KEY}\r\n".encode()


def own_requests(rng: random.Random) -> Iterator[Sent]:
    """Spoilt bodies and broken requests by turns."""
    bodies = BODIES | ADMIN_BODIES
    for kind in itertools.cycle([*BROKEN, *ODD]):
        path = rng.choice(list(bodies))
        spoilt = json.dumps(mutated(bodies[path], rng)).encode()
        yield Sent(f"spoilt: {path}", Broken(_maker(rng, path).request(spoilt)))
        path = rng.choice(list(bodies))
        make = BROKEN.get(kind) or ODD[kind]
        yield Sent(f"broken: {kind}", make(_maker(rng, path)), is_http=False)


def _maker(rng: random.Random, path: str) -> Maker:
    return Maker(rng, path, (BODIES | ADMIN_BODIES)[path], _key(path))


async def ask(port: int, sent: Sent) -> bytes:
    """Send a request; returns everything that came until the server closed."""
    data = b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent.broken.data)
        if not sent.broken.is_whole:
            writer.write_eof()
        while len(data) < sent.enough_bytes and (piece := await reader.read(1 << 16)):
            data += piece
    except ConnectionError:
        pass  # reset: it had seen enough
    finally:
        writer.close()
    return data


async def ask_all(port: int, source: Iterator[Sent], num_refused: int, tally: Tally) -> None:
    """Send requests until so many have been refused."""

    async def work() -> None:
        for sent in source:
            start_s, data = time.monotonic(), None
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    data = await ask(port, sent)
            except TimeoutError:
                pass
            tally.note(sent, data, time.monotonic() - start_s)
            if tally.num_refused >= num_refused:
                return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONCURRENCY):
            tasks.create_task(work())


async def stall(port: int, rng: random.Random) -> list[float]:
    """Stop in the middle of headers and bodies; seconds until the server gave up on each."""

    async def one(index: int) -> float:
        whole = _maker(rng, "/tokenize").request(b"{", length=100)
        cut = len(whole) if index % 2 else rng.randrange(len(whole) // 2)
        start_s = time.monotonic()
        async with asyncio.timeout(WAIT_TIMEOUT_S + ANSWER_TIMEOUT_S):
            data = await ask(port, Sent("stalled", Broken(whole[:cut])))
        assert b" 408 " in data[:20], data[:200]
        return time.monotonic() - start_s

    return await asyncio.gather(*(one(index) for index in range(STALLED)))


def prove(count: int, seed: int) -> dict[str, Any]:
    """Have so many requests refused."""
    with served() as server, schema_requests(server.get("/openapi.json"), seed) as derived:
        own = own_requests(random.Random(seed))
        source = (one for pair in zip(derived, own, own, strict=False) for one in pair)
        warm = Tally()
        asyncio.run(ask_all(server.port, source, max(100, count // 20), warm))
        return _measured(server, source, count, seed, warm)


def _measured(
    server: Served, source: Iterator[Sent], count: int, seed: int, warm: Tally
) -> dict[str, Any]:
    before, tally = server.uses(), Tally(faults=warm.faults)

    async def main() -> list[float]:
        stalled = asyncio.create_task(stall(server.port, random.Random(seed)))
        await ask_all(server.port, source, count, tally)
        return await stalled

    stalled_s = asyncio.run(main())
    after = server.settled(before)
    is_idle = server.is_idle()
    for fault in tally.faults[:MAX_SHOWN]:
        print(fault, flush=True)
    return {
        "proof": "bad requests",
        "requests": sum(tally.sources.values()),
        "refused": tally.num_refused,
        "sources": dict(tally.sources),
        "statuses": dict(sorted(tally.statuses.items())),
        "faults": len(tally.faults),
        "logged_failures": server.num_errors_logged(),
        "worst_s": round(tally.worst_s, 2),
        "stalled": {"clients": len(stalled_s), "cut_off_after_s": round(max(stalled_s), 1)},
        "pages_in_use": server.pages_in_use(),
        "before": before.told(),
        "after": after.told(),
        "holds": not tally.faults and is_idle and after.is_back_at(before),
    }
