"""A server whose engine is in another process: loading, serving, the death of either, draining."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxserve.config import Config, SchedulerConfig
from jaxserve.errors import EngineDeadError, RequestError, WeightsError
from jaxserve.requests import DrawSeed, make_requests
from jaxserve.sampling_bounds import Limits
from jaxserve.server.bridge import EngineBridge
from jaxserve.server.remote import Connected, connect
from jaxserve.server.wire import LENGTH, Frames, exception_of, failure_of
from jaxserve.types import Request, SamplingParams, no_progress
from tests.fake_engine import REPLY

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.server.fake_engine_process"]
USER = [{"role": "user", "content": "Hello"}]

SERVER = """
import sys
from dataclasses import replace
from jaxserve.cli.serve import bind
from jaxserve.config import Config, ServerConfig
from jaxserve.server.launch import serve
from jaxserve.types import no_progress
folder, options, drain_s = sys.argv[1:]
config = Config(server=ServerConfig(port=0, drain_timeout_s=float(drain_s)))
listener = bind(config)
print(listener.getsockname()[1], flush=True)
command = [sys.executable, "-m", "tests.server.fake_engine_process", folder, options]
serve(config, listener, no_progress, lambda engine: print("ready", flush=True), command=command)
"""


@dataclass
class Server:
    """A server process, and that of its engine."""

    process: "subprocess.Popen[str]"
    url: str
    folder: Path

    @property
    def engine_pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def get_health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=5)


@contextmanager
def server(folder: Path, drain_s: float = 10, **options: Any) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVER, str(folder), json.dumps(options), str(drain_s)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environ
    ) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            wait_for(lambda: is_listening(port))
            yield Server(process, f"http://127.0.0.1:{port}", folder)
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> float:
    """Seconds until the condition came true."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "the condition did not come true"
        time.sleep(0.01)
    return time.monotonic() - start_s


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ready(served: Server) -> None:
    assert served.process.stdout is not None
    assert served.process.stdout.readline().strip() == "ready"


async def until_served(http: httpx.AsyncClient, num_requests: int) -> None:
    """Wait until the engine has so many requests."""
    async with asyncio.timeout(30):  # for ever, if some have ended before the last one came
        while (await http.get("/load")).json()["server_load"] < num_requests:
            await asyncio.sleep(0.02)


def requests(name: str, n: int = 1, max_tokens: int = 5) -> list[Request]:
    sampling = SamplingParams(n=n, max_tokens=max_tokens)
    return make_requests(name, [5, 6], sampling, Limits(256, 400, (1,)), draw_seed=DrawSeed(0))


async def start(folder: Path, config: Config | None = None, **options: Any) -> Connected:
    command = [*COMMAND, str(folder), json.dumps(options)]
    return await connect(config or Config(), no_progress, command)


def test_an_engine_in_another_process_serves_like_one_in_this(tmp_path: Path):
    async def main() -> None:
        connected = await start(tmp_path)
        engine = connected.engine
        assert engine.model_name == "fake" and engine.max_model_len == 256
        assert engine.tokenizer.encode_chat(USER) and engine.report.num_graphs == 7
        bridge = EngineBridge(engine, connected.link)
        queue = await bridge.submit(requests("a", n=3))
        events = []
        while queue.unfinished or not events:
            events += await queue.get()
        assert len(events) == 15 and bridge.num_live == 0
        with pytest.raises(RequestError) as caught:
            await bridge.call("kv_stat")
        assert caught.value.code == "unsupported_engine"
        for salt in ("\ud800", 10**30):  # nothing that MessagePack has a form for
            with pytest.raises(RequestError, match="beyond 64 bits, or .* surrogate"):
                await bridge.call("kv_erase", cache_salt=salt)
        (request,) = requests("c")
        with pytest.raises(RequestError, match="surrogate"):
            await bridge.submit([replace(request, cache_salt="\ud800")])
        assert bridge.num_live == 0
        stats = await bridge.stats()
        assert stats.scheduler is None and stats.kv is None
        await bridge.stop()
        with pytest.raises(EngineDeadError):
            await bridge.submit(requests("b"))

    asyncio.run(main())


def test_a_refusal_of_the_engine_keeps_its_words_and_its_code(tmp_path: Path):
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_waiting=0)

    async def main() -> None:
        connected = await start(tmp_path, Config(scheduler=scheduler), step_s=0.01)
        bridge = EngineBridge(connected.engine, connected.link)
        bridge.max_live = 10  # so that the engine itself refuses
        await bridge.submit(requests("a", max_tokens=200))
        with pytest.raises(RequestError, match="too many requests wait") as caught:
            await bridge.submit(requests("b"))
        assert caught.value.code == "queue_full" and bridge.num_live == 1
        await bridge.stop()

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_the_same_error_as_in_this_process(tmp_path: Path):
    with pytest.raises(WeightsError, match="a tensor is missing"):
        asyncio.run(start(tmp_path, refuse=True))


def test_a_process_that_ends_before_it_is_ready_is_an_error_not_a_wait(tmp_path: Path):
    async def main() -> None:
        with pytest.raises(EngineDeadError):
            await connect(Config(), no_progress, [sys.executable, "-c", "raise SystemExit"])

    asyncio.run(main())


def test_the_port_answers_while_the_model_loads(tmp_path: Path):
    with server(tmp_path, load_s=1.5) as served:
        health = served.get_health()
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert health.headers["retry-after"]
        wait_for(lambda: served.get_health().json()["progress"]["total"] == 4)
        refused = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": USER})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "unavailable_error"
        wait_until_ready(served)
        assert served.get_health().json() == {"status": "ok"}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": USER})
        assert answer.json()["choices"][0]["message"]["content"] == REPLY


def test_a_killed_engine_is_noticed_at_once_and_every_open_request_is_answered(tmp_path: Path):
    async def ask(http: httpx.AsyncClient, is_stream: bool) -> httpx.Response:
        body = {"messages": USER, "max_tokens": 200, "stream": is_stream}
        return await http.post("/v1/chat/completions", json=body)

    async def main(served: Server) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=20) as http:
            asks = [asyncio.create_task(ask(http, i % 2 == 0)) for i in range(20)]
            await until_served(http, 20)
            os.kill(served.engine_pid, signal.SIGKILL)
            return list(await asyncio.gather(*asks))

    with server(tmp_path, step_s=0.05, reply_len=200) as served:
        wait_until_ready(served)
        responses = asyncio.run(main(served))
        for response in responses:
            if response.status_code == 200:
                last = response.text.strip().split("\n\n")[-2:]
                assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == "engine_dead"
                assert last[1] == "data: [DONE]"
            else:
                assert response.json()["error"]["code"] == "engine_dead"
        health = served.get_health()
        assert health.status_code == 503 and health.json()["status"] == "dead"
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0


def test_a_killed_server_takes_its_engine_with_it(tmp_path: Path):
    with server(tmp_path) as served:
        wait_until_ready(served)
        pid = served.engine_pid
        assert is_running(pid)
        served.process.kill()
        wait_for(lambda: not is_running(pid))


def test_a_server_killed_while_the_model_loads_takes_its_engine_with_it(tmp_path: Path):
    with server(tmp_path, load_s=60) as served:
        wait_for(lambda: (tmp_path / "pid").exists())
        pid = served.engine_pid
        served.process.kill()
        wait_for(lambda: not is_running(pid))


def test_sigterm_while_the_model_loads_ends_both_processes(tmp_path: Path):
    with server(tmp_path, load_s=60) as served:
        wait_for(lambda: (tmp_path / "pid").exists())
        pid = served.engine_pid
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        assert not is_running(pid)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path):
    async def main(served: Server) -> httpx.Response:
        async with httpx.AsyncClient(base_url=served.url, timeout=20) as http:
            body = {"messages": USER, "max_tokens": 40}
            running = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await until_served(http, 1)
            served.process.send_signal(signal.SIGTERM)
            while (health := await http.get("/health")).status_code == 200:
                await asyncio.sleep(0.02)
            assert health.status_code == 503 and health.json()["status"] == "draining"
            refused = await http.post("/v1/chat/completions", json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            return await running

    with server(tmp_path, step_s=0.05, reply_len=200) as served:
        wait_until_ready(served)
        pid = served.engine_pid
        answer = asyncio.run(main(served))
        assert answer.json()["usage"]["completion_tokens"] == 40
        assert served.process.wait(20) == 0 and not is_running(pid)


def test_what_outlives_the_drain_ends_with_an_error(tmp_path: Path):
    async def main(served: Server) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=20) as http:
            body = {"messages": USER, "max_tokens": 200}
            bodies = [body, {**body, "stream": True}]
            calls = [http.post("/v1/chat/completions", json=one) for one in bodies]
            running = asyncio.gather(*calls)
            await until_served(http, 2)
            served.process.send_signal(signal.SIGTERM)
            return list(await running)

    with server(tmp_path, drain_s=0.5, step_s=0.2, reply_len=200) as served:
        wait_until_ready(served)
        whole, stream = asyncio.run(main(served))
        assert whole.status_code == 503 and whole.json()["error"]["code"] == "engine_draining"
        assert "engine_draining" in stream.text and stream.text.endswith("data: [DONE]\n\n")
        assert served.process.wait(20) == 0


def test_a_second_signal_ends_at_once(tmp_path: Path):
    with server(tmp_path, drain_s=600, step_s=0.2, reply_len=200) as served:
        wait_until_ready(served)
        pid = served.engine_pid
        port = int(served.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = json.dumps({"messages": USER, "max_tokens": 200}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            wait_for(lambda: httpx.get(f"{served.url}/load").json()["server_load"] == 1)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: served.get_health().status_code == 503)
            assert served.process.poll() is None
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(10) != 0
        wait_for(lambda: not is_running(pid))


def test_what_is_no_frame_is_an_error_and_never_a_large_allocation():
    with pytest.raises(EngineDeadError):
        list(Frames().feed(LENGTH.pack(1 << 31) + b"x"))
    frames, whole = Frames(), LENGTH.pack(3) + b"abc" + LENGTH.pack(0) + LENGTH.pack(1) + b"d"
    pieces = [list(frames.feed(whole[i : i + 1])) for i in range(len(whole))]
    assert [payload for some in pieces for payload in some] == [b"abc", b"", b"d"]


def test_exceptions_keep_what_clients_may_know_and_nothing_else():
    known = exception_of(failure_of(RequestError("too long", param="prompt", code="x")))
    assert isinstance(known, RequestError) and (known.param, known.code) == ("prompt", "x")
    unknown = exception_of(failure_of(OSError("/secret/path")))
    assert "secret" not in str(unknown) and "OSError" in str(unknown)
