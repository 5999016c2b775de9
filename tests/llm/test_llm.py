import asyncio
import signal
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import Config, SchedulerConfig
from jaxserve.errors import ConfigError, EngineDeadError, RequestError
from jaxserve.types import LoadDecision, PromptReuse
from tests.fake_engine import EOS_ID, REPLY, FakeEngine

LONG = SamplingParams(max_tokens=200, temperature=0)
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def llm(engine: FakeEngine) -> LLM:
    return LLM(engine=engine)


def test_every_form_of_prompt_gives_results_in_order(llm: LLM):
    ids = llm.tokenizer.encode("Hello")
    forms: list[Any] = ["Hello", ids, {"prompt": "Hello"}, {"prompt_token_ids": ids}]
    for form in forms:
        (output,) = llm.generate(form, LONG, use_tqdm=False)
        assert output.outputs[0].text == REPLY and output.prompt_token_ids == ids
    outputs = llm.generate(forms, LONG)
    assert [output.prompt for output in outputs] == ["Hello", None, "Hello", None]
    assert len({output.request_id for output in outputs}) == 4


def test_a_finished_output_has_vllms_fields(llm: LLM):
    (output,) = llm.generate("Hello", SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1))
    (answer,) = output.outputs
    assert output.finished and answer.finish_reason == "length" and len(answer.token_ids) == 3
    assert answer.logprobs is not None and len(answer.logprobs) == 3
    first = answer.logprobs[0][answer.token_ids[0]]
    assert first.rank == 1 and first.logprob == -0.5
    assert answer.cumulative_logprob == -1.5
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None


def test_n_answers_are_numbered(llm: LLM, engine: FakeEngine):
    (output,) = llm.generate("Hello", SamplingParams(n=3, seed=1))
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert [request.sampling.seed for request in engine.added] == [1, 2, 3]


def test_each_prompt_may_have_its_own_parameters(llm: LLM):
    outputs = llm.generate(["a", "b"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2]
    with pytest.raises(RequestError, match="expected one each"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_the_second_time_a_prompt_is_found_in_the_cache(llm: LLM):
    assert llm.generate("Hello world", LONG)[0].num_cached_tokens == 0
    assert llm.generate("Hello world", LONG)[0].num_cached_tokens > 0


def test_an_output_says_which_tier_its_prompt_came_from(llm: LLM, engine: FakeEngine):
    engine.reuse = PromptReuse({"host": 4}, LoadDecision("load", 1, 1, 0.001, 0.5))
    (output,) = llm.generate("Hello", use_tqdm=False)
    assert output.cached_tokens_by_source == {"host": 4}
    assert output.load_decision is not None and output.load_decision.choice == "load"


def test_no_store_reaches_every_request(llm: LLM, engine: FakeEngine):
    llm.generate(["Hello", "world"], use_tqdm=False, no_store=True)
    llm.chat([{"role": "user", "content": "Hello"}], use_tqdm=False, no_store=True)
    list(llm.stream("Hello", no_store=True))
    llm.generate("Hello", use_tqdm=False)
    assert [request.no_store for request in engine.added] == [True, True, True, True, False]


def test_chat_uses_the_template_and_generates_to_the_end(llm: LLM, engine: FakeEngine):
    (output,) = llm.chat(USER)
    assert output.prompt == "<|begin|><|user|>Hello<|end|><|assistant|>"
    assert output.outputs[0].text == REPLY and output.outputs[0].finish_reason == "stop"
    assert len(llm.chat([USER, USER, USER])) == 3


def test_chat_shows_tools_to_the_template_and_refuses_what_is_none(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    shown = []
    monkeypatch.setattr(
        llm.tokenizer, "render_chat", lambda messages, **options: shown.append(options) or "Hello"
    )
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    llm.chat(USER, tools=[tool], chat_template_kwargs={"enable_thinking": False})
    assert shown == [{"add_generation_prompt": True, "enable_thinking": False, "tools": [tool]}]
    with pytest.raises(RequestError, match=r"tools\.0 is no function"):
        llm.chat(USER, tools=[{"name": "look"}])


def test_a_stop_string_frees_the_request_in_the_engine(llm: LLM, engine: FakeEngine):
    (output,) = llm.generate("Hello", SamplingParams(max_tokens=200, stop=("story",)))
    assert output.outputs[0].text == REPLY.split("story")[0]
    assert output.outputs[0].stop_reason == "story"
    assert engine.aborted == [engine.added[0].request_id] and not engine.has_work


def test_more_prompts_than_may_wait_are_fed_as_there_is_room():
    config = Config(scheduler=SchedulerConfig(max_num_seqs=2, max_num_waiting=3))
    llm = LLM(engine=FakeEngine(config=config))
    assert len(llm.generate(["Hello"] * 20, SamplingParams(max_tokens=3), use_tqdm=False)) == 20


def test_a_bad_prompt_among_good_ones_is_refused_before_anything_runs(llm: LLM, engine: FakeEngine):
    with pytest.raises(RequestError, match="shorten the prompt"):
        llm.generate(["good", [3] * 1000])
    assert not engine.added and not engine.has_work
    assert llm.generate([]) == []


def test_stream_gives_the_same_text_as_generate(llm: LLM):
    deltas = list(llm.stream("Hello", LONG))
    assert "".join(map(str, deltas)) == REPLY == llm.generate("Hello", LONG)[0].outputs[0].text
    assert deltas[-1].finish_reason == "stop" and len(deltas) > 3
    assert [token_id for delta in deltas for token_id in delta.token_ids][-1] == EOS_ID


def test_a_stream_goes_on_when_nobody_else_holds_its_llm(engine: FakeEngine):
    stream = LLM(engine=engine).stream("Hello", LONG)
    assert "".join(map(str, stream)) == REPLY


def test_stream_of_messages_uses_the_template(llm: LLM, engine: FakeEngine):
    list(llm.stream(USER))
    assert llm.tokenizer.decode(engine.added[0].prompt_ids, False).endswith("<|assistant|>")


def test_closing_a_stream_early_aborts_its_request(llm: LLM, engine: FakeEngine):
    stream = llm.stream("Hello", LONG)
    next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert engine.aborted and not engine.has_work


def test_streams_and_generate_may_be_interleaved(llm: LLM):
    one, two = llm.stream("one", LONG), llm.stream("two", LONG)
    text_one, text_two = str(next(one)), str(next(two))
    (output,) = llm.generate("three", LONG)
    assert output.outputs[0].text == REPLY
    assert text_one + "".join(map(str, one)) == REPLY == text_two + "".join(map(str, two))


def test_it_works_inside_a_running_event_loop(llm: LLM):
    async def cell() -> str:
        return llm.generate("Hello", LONG)[0].outputs[0].text

    assert asyncio.run(cell()) == REPLY


def test_an_interrupt_leaves_nothing_behind(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch):
    llm = LLM(engine=engine)
    steps = iter([engine.step, engine.step])

    def step() -> Any:
        try:
            return next(steps)()
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], LONG)
    assert not engine.has_work
    assert llm.generate("again", LONG)[0].outputs[0].text == REPLY


def test_a_failed_engine_says_so_from_then_on(engine: FakeEngine):
    llm = LLM(engine=engine)
    engine.fail_at_step = 3
    with pytest.raises(RuntimeError, match="fell over"):
        llm.generate("Hello", LONG)
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        llm.generate("Hello", LONG)


def test_closing_closes_the_engine_once(engine: FakeEngine):
    with LLM(engine=engine) as llm:
        llm.generate("Hello")
    assert engine.closed
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("Hello")


def test_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean page_size"):
        LLM("some/model", page_sise=16)
    with pytest.raises(TypeError, match="either an engine"):
        LLM("some/model", engine=FakeEngine())


def test_ctrl_c_takes_effect_between_steps_and_the_next_call_works(llm: LLM, engine: FakeEngine):
    step, finished_steps = engine.step, 0

    def interrupted_step():
        nonlocal finished_steps
        if finished_steps == 2:
            signal.raise_signal(signal.SIGINT)
        events = step()
        finished_steps += 1
        return events

    engine.step = interrupted_step  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        llm.generate("Hello", LONG, use_tqdm=False)
    assert finished_steps == 3 and engine.live_ids == []
    assert llm.generate("Hello", LONG, use_tqdm=False)[0].outputs[0].text == REPLY
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
