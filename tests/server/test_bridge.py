import asyncio
import gc
import threading
import time

import pytest

from jaxserve.config import Config, SchedulerConfig
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.requests import DrawSeed, make_requests
from jaxserve.sampling_bounds import Limits
from jaxserve.server.bridge import EngineBridge, EventQueue
from jaxserve.server.engine_loop import EngineLoop
from jaxserve.types import Request, SamplingParams, TokenEvent
from tests.fake_engine import FakeEngine

LIMITS = Limits(256, 400, (1,))


def requests(name: str, n: int = 1, max_tokens: int = 5) -> list[Request]:
    sampling = SamplingParams(n=n, max_tokens=max_tokens)
    return make_requests(name, [5, 6], sampling, LIMITS, draw_seed=DrawSeed(0))


async def drain(queue: EventQueue) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while queue.unfinished or not events:
        events += await queue.get()
    return events


def test_events_of_a_group_arrive_in_order_and_end():
    async def main() -> None:
        bridge = EngineBridge(FakeEngine())
        queue = await bridge.submit(requests("a", n=3))
        events = await drain(queue)
        assert len(events) == 15 and bridge.num_live == 0
        ends = [event.request_id for event in events if event.finish_reason]
        assert sorted(ends) == ["a-0", "a-1", "a-2"]
        await bridge.stop()

    asyncio.run(main())


def test_one_step_wakes_the_event_loop_once(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        engine = FakeEngine(step_s=0.002)
        bridge = EngineBridge(engine)
        num_calls = 0
        call = bridge._loop.call_soon_threadsafe

        def counting(*args: object) -> object:
            nonlocal num_calls
            num_calls += 1
            return call(*args)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(bridge._loop, "call_soon_threadsafe", counting)
        queue = await bridge.submit(requests("a", n=50, max_tokens=20))
        assert len(await drain(queue)) == 1000
        monkeypatch.undo()
        await bridge.stop()
        assert num_calls <= engine.num_steps + 2

    asyncio.run(main())


def test_what_the_link_cannot_carry_is_an_error_and_leaves_nothing_behind():
    class Narrow:
        def add(self, *args: object) -> None:
            raise OverflowError

        call = abort = add

        async def stop(self) -> None: ...

    async def main() -> None:
        loop = asyncio.get_running_loop()
        unretrieved: list[dict[str, object]] = []
        loop.set_exception_handler(lambda _, context: unretrieved.append(context))
        bridge = EngineBridge(FakeEngine(), lambda bridge: Narrow())  # pyright: ignore[reportArgumentType]
        for wrong in (bridge.call("stats"), bridge.submit(requests("a"))):
            with pytest.raises(OverflowError):
                await wrong
        await bridge.stop()  # what still waited would be told, and nobody would hear it
        gc.collect()
        assert not unretrieved and bridge.num_live == 0

    asyncio.run(main())


def test_a_group_is_admitted_whole_or_not_at_all():
    class Picky(FakeEngine):
        def add(self, request: Request) -> None:
            if request.request_id.endswith("-2"):
                raise RequestError("not this one", param="prompt")
            super().add(request)

    async def main() -> None:
        engine = Picky(step_s=0.001)
        bridge = EngineBridge(engine)
        with pytest.raises(RequestError, match="not this one"):
            await bridge.submit(requests("a", n=3))
        assert bridge.num_live == 0
        await bridge.stop()
        assert sorted(engine.aborted) == ["a-0", "a-1"]

    asyncio.run(main())


def test_abort_reaches_the_engine_and_stops_events():
    async def main() -> None:
        engine = FakeEngine(step_s=0.001)
        bridge = EngineBridge(engine)
        queue = await bridge.submit(requests("a", max_tokens=200))
        await queue.get()
        bridge.abort(queue.unfinished)
        assert bridge.num_live == 0 and not queue.unfinished
        bridge.abort(["a-0", "unknown"])
        await bridge.stop()
        assert engine.aborted == ["a-0"] and not engine.has_work

    asyncio.run(main())


def test_giving_up_while_waiting_for_admission_aborts():
    async def main() -> None:
        engine = FakeEngine(step_s=0.05)
        bridge = EngineBridge(engine)
        await bridge.submit(requests("busy", max_tokens=200))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(bridge.submit(requests("late", max_tokens=200)))
        await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        await asyncio.sleep(0.2)
        assert engine.live_ids == ["busy-0"]
        await bridge.stop()

    asyncio.run(main())


def test_a_failed_engine_fails_what_runs_and_what_comes():
    async def main() -> None:
        engine = FakeEngine(fail_at_step=3, step_s=0.005)
        bridge = EngineBridge(engine)
        queues = [await bridge.submit(requests(name)) for name in "ab"]
        for queue in queues:
            with pytest.raises(EngineDeadError):
                while True:
                    await queue.get()
        with pytest.raises(EngineDeadError):
            await bridge.submit(requests("c"))
        assert isinstance(bridge.error, RuntimeError)
        await bridge.stop()
        assert engine.closed

    asyncio.run(main())


def test_more_than_may_run_and_wait_is_refused():
    async def main() -> None:
        config = Config(scheduler=SchedulerConfig(max_num_seqs=1, max_num_waiting=1))
        bridge = EngineBridge(FakeEngine(config=config, step_s=0.001))
        await bridge.submit(requests("a", n=2, max_tokens=200))
        with pytest.raises(RequestError) as caught:
            await bridge.submit(requests("b"))
        assert caught.value.code == "queue_full"
        await bridge.stop()

    asyncio.run(main())


def test_stopping_ends_what_runs_and_closes_the_engine():
    async def main() -> None:
        engine = FakeEngine(step_s=0.001)
        bridge = EngineBridge(engine)
        queue = await bridge.submit(requests("a", max_tokens=200))
        started_s = time.monotonic()
        await bridge.stop()
        assert engine.closed and time.monotonic() - started_s < 5
        with pytest.raises(EngineDeadError):
            while True:
                await queue.get()

    asyncio.run(main())


def test_functions_run_on_the_engines_thread_and_their_errors_come_back():
    engine = FakeEngine()
    loop = EngineLoop(engine, lambda events: None)
    thread = threading.Thread(target=loop.run_until_stopped, name="the engine's")
    thread.start()
    assert loop.run(lambda: threading.current_thread().name) == "the engine's"
    with pytest.raises(ZeroDivisionError):
        loop.run(lambda: 1 // 0)
    assert loop.run(lambda: 2) == 2, "the engine goes on"
    loop.stop()
    thread.join()
    loop.close()
    assert engine.closed
    with pytest.raises(EngineDeadError):
        loop.run(lambda: None)
    with pytest.raises(EngineDeadError):
        loop.wait(threading.Event())


def test_a_call_that_the_engine_does_not_know_is_refused_and_the_engine_goes_on():
    async def main() -> None:
        bridge = EngineBridge(FakeEngine())
        for name in ("nothing", "kv_stat", "__init__"):
            with pytest.raises(RequestError) as caught:
                await bridge.call(name)
            assert caught.value.code == "unsupported_engine"
        assert len(await drain(await bridge.submit(requests("a")))) == 5
        await bridge.stop()
        with pytest.raises(EngineDeadError):
            await bridge.call("stats")

    asyncio.run(main())
