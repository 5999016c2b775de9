"""Requests that a server should refuse, and odd ones, as bytes: of many kinds, on every path."""

import gzip
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

ODD_NUMBERS = (b"NaN", b"-Infinity", b"1e999", b"-0.0", b"1e-400", b"9" * 4000, b"0x10", b"1_0")
ODD_TEXTS = (
    b'"\\ud800"',
    b'"\\udfff\\ud800"',
    b'"\\u0000"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"\\x"',
)
METHODS = (b"PATCH", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"PROPFIND", b"post", b"G\xc3\x89T")
PATHS = (
    b"/v1",
    b"/v1/nothing",
    b"/web/../../etc/passwd",
    b"/%00",
    b"//v1/models",
    b"/" + b"a" * 9000,
)

SURE = b"Connection: close\r\n"
"""The end of an answer is the end of the connection."""


@dataclass(frozen=True, slots=True)
class Broken:
    """What a client sends.

    Attributes:
        is_whole: the server can tell that nothing more will come; else the client closes its half.
    """

    data: bytes
    is_whole: bool = True


@dataclass(frozen=True)
class Maker:
    """Makes one request.

    Attributes:
        path: where it goes, unless its kind wants another one.
        body: a valid body for that path.
        headers: whole lines of every request, such as a key.
    """

    rng: random.Random
    path: str
    body: Mapping[str, Any]
    headers: bytes = b""

    @property
    def good(self) -> bytes:
        return json.dumps(self.body).encode()

    @property
    def target(self) -> bytes:
        return self.path.encode()

    def request(
        self,
        body: bytes,
        *lines: bytes,
        path: str | None = None,
        length: int | None = None,
        start: bytes | None = None,
        is_framed: bool = True,
    ) -> bytes:
        """A POST; `lines` are further headers, `is_framed` says whether it tells its length."""
        target = (path or self.path).encode()
        head = [b"POST %s HTTP/1.1" % target if start is None else start, b"Host: x", *lines]
        if is_framed:
            head.append(b"Content-Length: %d" % (len(body) if length is None else length))
        return b"\r\n".join(head) + b"\r\n" + self.headers + SURE + b"\r\n" + body

    def spoilt(self, values: tuple[bytes, ...]) -> bytes:
        """A valid body but for one field, which holds one of these."""
        body = dict(self.body)
        body[self.rng.choice(list(body))] = "@"
        return self.request(json.dumps(body).encode().replace(b'"@"', self.chosen(*values), 1))

    def noise(self, most: int) -> bytes:
        return self.rng.randbytes(self.rng.randrange(1, most))

    def times(self, part: bytes, most: int) -> bytes:
        return part * self.rng.randrange(1, most)

    def chosen(self, *parts: bytes) -> bytes:
        return self.rng.choice(parts)


Kinds: TypeAlias = Mapping[str, Callable[[Maker], Broken]]


def _chunked(maker: Maker, body: bytes) -> bytes:
    return maker.request(body, b"Transfer-Encoding: chunked", is_framed=False)


BROKEN: Kinds = {
    # no HTTP
    "noise": lambda m: Broken(m.noise(300) + b"\r\n\r\n", False),
    "other version": lambda m: Broken(
        m.request(b"{}", start=b"POST /tokenize HTTP/" + m.chosen(b"3.7", b"x", b"1.1.1", b"11"))
    ),
    "HTTP/2": lambda m: Broken(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + m.noise(50), False),
    "TLS": lambda m: Broken(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + m.noise(200), False),
    # bodies
    "a body of noise": lambda m: Broken(m.request(m.noise(200))),
    "JSON cut short": lambda m: Broken(m.request((g := m.good)[: m.rng.randrange(len(g))])),
    "no object": lambda m: Broken(m.request(m.chosen(b"", b"3", b"null", b'"a"', b"[]", b"[{}]"))),
    "open arrays": lambda m: Broken(m.request(m.times(b"[", 5000))),
    "deep": lambda m: Broken(
        m.request(b'{"a":' * (n := m.rng.randrange(65, 3000)) + b"1" + b"}" * n)
    ),
    "odd numbers": lambda m: Broken(
        m.request(b'{"prompt": "a", "n": %s}' % m.chosen(*ODD_NUMBERS), path="/v1/completions")
    ),
    "token ids": lambda m: Broken(
        m.request(
            b'{"prompt": [%s]}' % b",".join([m.chosen(b"-1", b"99999999", b"1.5")] * 9),
            path="/v1/completions",
        )
    ),
    "another content type": lambda m: Broken(
        m.request(
            m.good, b"Content-Type: " + m.chosen(b"text/plain", b"a/b;c", b"\xff", b"x" * 999)
        )
    ),
    "compressed": lambda m: Broken(
        m.request(gzip.compress(m.good), b"Content-Encoding: " + m.chosen(b"gzip", b"br", b"\xff"))
    ),
    "compressed, unsaid": lambda m: Broken(m.request(gzip.compress(m.good))),
    # lengths
    "body cut off": lambda m: Broken(m.request(g := m.good, length=len(g) + 1), False),
    "no body": lambda m: Broken(m.request(b"", length=1 + m.rng.randrange(10**6)), False),
    "wrong length": lambda m: Broken(
        m.request(
            b"{}", b"Content-Length: " + m.chosen(b"-5", b"0x2", b"2, 2", b" "), is_framed=False
        ),
        False,
    ),
    "too long": lambda m: Broken(m.request(b"{}", length=10 ** m.rng.randrange(8, 40)), False),
    "two lengths": lambda m: Broken(m.request(b"{}", b"Content-Length: 3"), False),
    "length and chunks": lambda m: Broken(m.request(b"{}", b"Transfer-Encoding: chunked"), False),
    "chunks of no size": lambda m: Broken(_chunked(m, m.chosen(b"zz\r\n", b"-1\r\n", b"\xff\r\n"))),
    "chunks cut off": lambda m: Broken(
        _chunked(m, b'9\r\n{"prompt"\r\n' + m.chosen(b"", b"5", b"5\r\n", b"5\r\nab", b"0\r\n")),
        False,
    ),
    "chunks of no JSON": lambda m: Broken(_chunked(m, m.times(b"1\r\n{\r\n", 500) + b"0\r\n\r\n")),
    # headers
    "large headers": lambda m: Broken(
        m.request(b"{}", b"X-A: " + b"a" * m.rng.randrange(70000, 99999))
    ),
    "many headers": lambda m: Broken(m.request(b"{}", *[b"X-%d: 1" % i for i in range(300)])),
    "no colon": lambda m: Broken(
        m.request(b"{}", m.chosen(b"nothing", b"a b: c", b": d", b"\xff: e"))
    ),
    "controls": lambda m: Broken(
        m.request(b"{}", b"X-A: a" + m.chosen(b"\x00", b"\x01", b"\x7f") + b"b")
    ),
    "headers cut off": lambda m: Broken(
        (r := m.request(b""))[: m.rng.randrange(1, r.index(b"\r\n\r\n"))], False
    ),
    "another site's page": lambda m: Broken(
        m.request(m.good, b"Origin: " + m.chosen(b"http://evil", b"null", b"http://[", b"\xff"))
    ),
    # paths
    "dots": lambda m: Broken(m.request(b"", start=b"GET /" + m.times(b"%2e", 50) + b" HTTP/1.1")),
    "another path": lambda m: Broken(
        m.request(m.good, start=b"POST %s HTTP/1.1" % m.chosen(*PATHS))
    ),
    "another method": lambda m: Broken(
        m.request(m.good, start=b"%s %s HTTP/1.1" % (m.chosen(*METHODS), m.target))
    ),
    "GET of a POST": lambda m: Broken(m.request(b"", start=b"GET %s HTTP/1.1" % m.target)),
}
"""Each is answered with a 4xx, or its connection is closed."""

ODD: Kinds = {
    "no version": lambda m: Broken(b"GET /\r\n\r\n", False),
    "odd field": lambda m: Broken(m.spoilt(ODD_NUMBERS)),
    "odd text": lambda m: Broken(m.spoilt(ODD_TEXTS)),
    "a name twice": lambda m: Broken(m.request(m.good[:-1] + b', "model": 1, "model": "a"}')),
    "UTF-16": lambda m: Broken(m.request(m.good.decode().encode("utf-16"))),
    "byte order mark": lambda m: Broken(m.request(b"\xef\xbb\xbf" + m.good)),
    "no content type": lambda m: Broken(m.request(m.good, b"Content-Type:")),
    "HTTP/1.0": lambda m: Broken(m.request(m.good, start=b"POST %s HTTP/1.0" % m.target)),
    "pipelined": lambda m: Broken(
        b"".join(
            m.request(m.chosen(m.good, b"{", b"[]")).replace(SURE, b"")
            for _ in range(m.rng.randrange(1, 5))
        )
        + m.request(b"{")
    ),
    "whole URL": lambda m: Broken(m.request(b"", start=b"GET http://y/v1/models HTTP/1.1")),
    "OPTIONS": lambda m: Broken(
        m.request(b"", start=b"OPTIONS %s HTTP/1.1" % m.chosen(b"*", b"/", m.target))
    ),
    "HEAD": lambda m: Broken(
        m.request(b"", start=b"HEAD %s HTTP/1.1" % m.chosen(b"/", b"/health", b"/v1/models"))
    ),
    "upgrade": lambda m: Broken(
        m.request(m.good, b"Upgrade: " + m.chosen(b"websocket", b"h2c"), b"Sec-WebSocket-Key: \xff")
    ),
    "expect": lambda m: Broken(
        m.request(m.good, b"Expect: " + m.chosen(b"100-continue", b"a miracle"))
    ),
    "query": lambda m: Broken(m.request(m.good, path=m.path + "?" + "a=%ff&limit=9e9&" * 50)),
    "garbled query": lambda m: Broken(
        m.request(
            b"",
            start=b"GET /admin/kv/blocks?limit=%s&prefix=%s HTTP/1.1"
            % (m.chosen(*ODD_NUMBERS, b"-1", b"1e5"), m.chosen(b"%00", b"%ff", b"zz", b"a" * 999)),
        )
    ),
    "odd key": lambda m: Broken(
        m.request(
            m.good,
            m.chosen(b"Authorization: ", b"x-api-key: ")
            + m.chosen(b"Bearer \xff", b"Basic YTpi", b"Bearer", b"Bearer " + b"k" * 9999, b"\t"),
        )
    ),
    "odd ids": lambda m: Broken(
        m.request(
            m.good, b"X-Request-Id: \xff" + b"i" * 999, b"Traceparent: 00-" + m.times(b"f", 99)
        )
    ),
    "half closed": lambda m: Broken(m.request(m.good), False),
    "folded header": lambda m: Broken(m.request(m.good, b"X-A: a\r\n b")),
}
"""Whatever these get, it is no 5xx; some are served."""
