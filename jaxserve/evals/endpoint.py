"""Asks any OpenAI chat endpoint; a callable like `retrieval.InProcess`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from tqdm import tqdm

from jaxserve.errors import JaxserveError

NUM_AT_ONCE = 16
TIMEOUT_S = 600.0


class Endpoint:
    """The first model of an endpoint such as http://127.0.0.1:8000/v1."""

    def __init__(
        self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None
    ):
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=TIMEOUT_S,
            transport=transport,
        )
        models = self._call("GET", "/models").get("data") or []
        if not models:
            raise JaxserveError(f"{url} serves no model")
        self.model_name: str = models[0]["id"]

    def __call__(self, chats: Sequence[list[dict[str, str]]], max_tokens: int) -> list[str]:
        """The greedy answer to each chat, in order."""

        def ask(messages: list[dict[str, str]]) -> str:
            body = {
                "model": self.model_name,
                "messages": messages,
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            reply = self._call("POST", "/chat/completions", body)
            return reply["choices"][0]["message"]["content"] or ""

        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            return list(tqdm(pool.map(ask, chats), total=len(chats), desc="prompts"))

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise JaxserveError(
                f"{self._http.base_url}: {error or type(error).__name__}"
            ) from error
        if response.status_code != 200:
            raise JaxserveError(
                f"{self._http.base_url}{path.lstrip('/')}: HTTP {response.status_code}: "
                f"{response.text[:300]}"
            )
        return response.json()
