"""Over a real socket: the official client, clients that go away, and clients that read slowly."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jaxserve.config import Config, ServerConfig
from tests.fake_engine import REPLY, FakeEngine
from tests.server.live import Live, wait_for

LONG = [40] * 3000


@pytest.fixture
def live() -> Iterator[Live]:
    config = Config(server=ServerConfig(api_key="key"))
    engine = FakeEngine(config=config, max_model_len=5000, step_s=0.001)
    server = Live(engine)
    yield server
    server.stop()


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_the_official_client_chats(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    answer = client.chat.completions.create(model="fake", messages=user("Hello"))
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None


def test_the_official_client_streams_as_tokens_come(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="fake", messages=user("Hello"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == REPLY and len(chunks) > 10
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 10


def test_the_official_client_gets_logprobs_n_and_completions(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="fake", messages=user("Hello"), n=2, logprobs=True, top_logprobs=2, max_tokens=3
    )
    assert len(answer.choices) == 2 and answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None and len(entries) == 3 and len(entries[0].top_logprobs) == 2
    completion = client.completions.create(
        model="fake", prompt=["a", "b"], logprobs=1, max_tokens=2, extra_body={"top_k": 3}
    )
    assert len(completion.choices) == 2 and completion.choices[0].logprobs is not None
    assert len(completion.choices[0].logprobs.tokens or ()) == 2


def test_the_official_client_raises_its_own_errors(live: Live, client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=user("Hello"))
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fake", prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    wrong = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_requests(live: Live, stream: bool):
    live.engine.reply = lambda request: LONG

    async def main() -> None:
        headers = {"Authorization": "Bearer key"}
        async with httpx.AsyncClient(base_url=live.url, headers=headers) as http:
            body = {"messages": user("Hello"), "n": 2, "max_tokens": 3000, "stream": stream}
            calls = [
                asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(5)
            ]
            while len(live.engine.live_ids) < 10:
                await asyncio.sleep(0.01)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(main())
    wait_for(lambda: not live.engine.has_work, timeout_s=2)
    assert len(live.engine.aborted) == 10


def test_a_client_that_stops_reading_holds_nobody_up(live: Live, client: openai.OpenAI):
    live.engine.reply = lambda request: LONG if len(request.prompt_ids) > 12 else [40] * 20
    url = httpx.URL(live.url)
    with socket.create_connection((url.host, url.port or 0)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        body = b'{"prompt": "%s", "max_tokens": 3000, "stream": true}' % (b"x " * 20)
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        wait_for(lambda: bool(live.engine.live_ids))
        for _ in range(3):
            client.completions.create(model="fake", prompt="a", max_tokens=20)
        wait_for(lambda: not live.engine.has_work)  # its own work is not held up either
    client.completions.create(model="fake", prompt="a", max_tokens=20)


def test_the_server_can_be_stopped_while_a_stream_is_open():
    engine = FakeEngine(max_model_len=5000, step_s=0.01)
    engine.reply = lambda request: [40] * 200
    server = Live(engine)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.completions.create(model="fake", prompt="a", stream=True, max_tokens=200)
        next(iter(stream))
        server.stop()
