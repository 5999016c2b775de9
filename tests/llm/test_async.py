"""One LLM among coroutines and threads, as in a notebook whose event loop is running."""

import asyncio
import gc
import threading
import weakref

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import EngineDeadError
from tests.fake_engine import REPLY, FakeEngine

LONG = SamplingParams(max_tokens=200, temperature=0)
USER = [{"role": "user", "content": "Hello"}]

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(step_s=0.0005)


@pytest.fixture
def llm(engine: FakeEngine) -> LLM:
    return LLM(engine=engine)


async def test_the_loop_goes_on_while_answers_are_computed(llm: LLM):
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    outputs = await llm.agenerate(["Hello", "world"], LONG)
    ticking.cancel()
    assert [output.outputs[0].text for output in outputs] == [REPLY, REPLY] and ticks > 10
    (answer,) = await llm.achat(USER, LONG)
    assert answer.outputs[0].text == REPLY


async def test_streams_side_by_side_share_the_engines_steps(llm: LLM, engine: FakeEngine):
    async def read(prompt: str) -> str:
        return "".join([str(piece) async for piece in llm.astream(prompt, LONG)])

    texts = await asyncio.gather(*(read(f"prompt {i}") for i in range(8)))
    assert texts == [REPLY] * 8
    assert engine.num_steps < 3 * len(llm.tokenizer.encode(REPLY))


async def test_synchronous_calls_work_in_the_middle_of_asynchronous_ones(llm: LLM):
    pieces = llm.astream(USER, LONG)
    first = str(await anext(pieces))
    assert llm.generate("Hello", LONG, use_tqdm=False)[0].outputs[0].text == REPLY
    assert "".join(map(str, llm.stream(USER, LONG))) == REPLY
    assert first + "".join([str(piece) async for piece in pieces]) == REPLY


async def test_leaving_a_stream_early_or_cancelling_frees_the_request(llm: LLM, engine: FakeEngine):
    pieces = llm.astream(USER, LONG)
    await anext(pieces)
    await pieces.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    assert not engine.has_work
    task = asyncio.create_task(llm.agenerate(["Hello"] * 4, LONG))
    while not engine.has_work:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not engine.has_work and len(engine.aborted) == 5
    assert (await llm.agenerate("Hello", LONG))[0].outputs[0].text == REPLY


async def test_threads_may_use_one_llm_at_the_same_time(llm: LLM):
    texts: list[str] = []

    def work() -> None:
        texts.append(llm.generate("Hello", LONG, use_tqdm=False)[0].outputs[0].text)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    await asyncio.to_thread(lambda: [thread.join(30) for thread in threads])
    assert texts == [REPLY] * 6


async def test_closing_ends_what_still_waits(llm: LLM):
    pieces = llm.astream(USER, LONG)
    await anext(pieces)
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        async for _ in pieces:
            pass


def test_an_llm_that_nobody_holds_closes_its_engine(engine: FakeEngine):
    llm = LLM(engine=engine)
    llm.generate("Hello", LONG, use_tqdm=False)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None and engine.closed
