"""`jaxserve kv` against a running server: its admin routes, as methods.

Knows nothing of what the commands print.
"""

from collections.abc import Sequence
from typing import Any

import httpx

from jaxserve.errors import ConfigError, JaxserveError

TIMEOUT_S = 180.0


class ServerTiers:
    """The tiers of a running server.

    Args:
        url: of the server, with or without /v1.
        admin_key: what it was started with.
        transport: instead of the network, for tests.
    """

    def __init__(self, url: str, admin_key: str | None, transport: Any = None):
        if not admin_key:
            raise ConfigError(
                "a running server wants its admin key: give --admin-key or JAXSERVE_ADMIN_KEY (or "
                "--kv-store URL for a store that no server uses)"
            )
        if not admin_key.strip().isprintable():
            raise ConfigError("the admin key has characters that no key has, such as line ends")
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--server is {url!r:.200}; expected a URL such as http://host:8000")
        self._http = httpx.Client(
            base_url=self.url,
            headers={b"Authorization": f"Bearer {admin_key.strip()}".encode()},
            timeout=TIMEOUT_S,
            transport=transport,
        )

    def stat(self) -> dict[str, Any]:
        """`KVStats.as_json`."""
        return self._call("GET", "stat")

    def ls(self, limit: int, prefix: str) -> dict[str, Any]:
        """`BlockList.as_json`."""
        return self._call("GET", "blocks", params={"limit": limit, "prefix": prefix})

    def verify(self, recompute: int, prompts: Sequence[Any] | None) -> dict[str, Any]:
        """`VerifyReport.as_json`; takes as long as it takes."""
        body = {"recompute": recompute, "prompts": prompts}
        return self._call("POST", "verify", json=body, timeout=None)

    def clear(self, tiers: Sequence[str], stale: bool) -> dict[str, Any]:
        """`ClearReceipt.as_json`."""
        return self._call("POST", "clear", json={"tiers": list(tiers), "stale": stale})

    def pin(
        self, hashes: Sequence[str], prompt: str | None, cache_salt: str, pinned: bool
    ) -> dict[str, Any]:
        """`PinReceipt.as_json`."""
        body = {"hashes": list(hashes), "prompt": prompt, "cache_salt": cache_salt}
        return self._call("POST", "pin", json={**body, "pinned": pinned})

    def erase(self, cache_salt: str) -> dict[str, Any]:
        """`EraseReceipt.as_json`."""
        return self._call("POST", "erase", json={"cache_salt": cache_salt})

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, what: str, **how: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, f"/admin/kv/{what}", **how)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise JaxserveError(f"no answer from {self.url}: {error}") from error
        if response.status_code == 404:
            raise JaxserveError(
                f"{self.url} has no admin routes: start the server with --admin-key, and give "
                "--server its address, such as http://host:8000"
            )
        try:
            body = response.json()
        except ValueError:
            body = {}
        if response.status_code != 200:
            message = (body.get("error") or {}).get("message") or f"status {response.status_code}"
            raise JaxserveError(f"{self.url}: {message}")
        return body
