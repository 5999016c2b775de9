"""Valid bodies of every endpoint, with parts replaced at random: never a 5xx, never a long error.

RANDOM_BODIES sets how many are sent to each endpoint.
"""

import asyncio
import json
import os
import random
from typing import Any

import httpx
import pytest

from tests.fake_engine import FakeEngine
from tests.server.random_bodies import BODIES, mutated

NUM_BODIES = int(os.environ.get("RANDOM_BODIES", "120"))


@pytest.mark.parametrize("path", BODIES)
def test_random_bodies_get_an_answer_or_a_short_error(serve: Any, path: str):
    rng = random.Random(path)

    async def main() -> None:
        async with serve(FakeEngine()) as http:
            await send_all(http)

    async def send_all(http: httpx.AsyncClient) -> None:
        statuses = set()
        for _ in range(NUM_BODIES):
            content = json.dumps(mutated(BODIES[path], rng))
            response = await http.post(path, content=content)
            assert response.status_code < 500, f"{content}\n{response.text}"
            statuses.add(response.status_code)
            if response.status_code >= 400:
                assert "error" in response.json() and len(response.content) < 4096, content
            else:
                assert "server_error" not in response.text and "api_error" not in response.text
        assert statuses >= {200, 400}

    asyncio.run(main())
