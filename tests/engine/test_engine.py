"""The real engine on a tiny checkpoint: what a client notices of batches, aborts and seeds."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxserve.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from jaxserve.engine import Engine, build_engine
from jaxserve.errors import ConfigError
from jaxserve.types import FinishReason, Request, SamplingParams, TokenEvent
from tests.fake_engine import byte_level_backend

TINY = Path(__file__).parents[1] / "fixtures" / "tiny" / "llama31-v0"
MAX_LEN, VOCAB = 96, 256


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Warmed up, with too few pages for all slots at once (8 x 96 tokens in 60 pages of 8)."""
    engine = build_engine(
        Config(
            model=ModelConfig(model=str(TINY), max_model_len=MAX_LEN),
            cache=CacheConfig(page_size=8, num_pages=60),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        )
    )
    yield engine
    engine.close()


def drain(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        engine.check_integrity()
    return events


def answer(engine: Engine, request: Request) -> list[int | None]:
    engine.add(request)
    return [event.token_id for event in drain(engine)[request.request_id]]


def random_request(rng: random.Random, name: str) -> Request:
    shared = [(i * 7) % VOCAB for i in range(40)]
    prompt = shared[: rng.randrange(41)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 1, 5]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.1]),
        seed=rng.randrange(2**40),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.3]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias={3: -5.0} if rng.random() < 0.2 else {},
        allowed_token_ids=tuple(range(50)) if rng.random() < 0.1 else None,
        banned_token_ids=(7, 8) if rng.random() < 0.2 else (),
        min_tokens=rng.choice([0, 3]),
        max_tokens=rng.randint(3, 30),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=(11, 12) if rng.random() < 0.3 else (),
        logprobs=rng.choice([None, None, 0, 5]),
        prompt_logprobs=rng.choice([None, None, None, 2]),
    )
    ids = tuple(prompt[: MAX_LEN - 2])
    return Request(name, ids, sampling, eos_token_ids=(2,), cache_salt=rng.choice(["", "", "a"]))


def test_500_random_requests_compile_nothing_and_give_every_page_back(engine: Engine):
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    rng = random.Random(0)
    waiting = [random_request(rng, f"r{i}") for i in range(500)]
    requests = {request.request_id: request for request in waiting}
    finished: dict[str, list[TokenEvent]] = {}
    aborted: set[str] = set()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        while waiting or engine.has_work:
            for _ in range(min(len(waiting), rng.choice([0, 0, 1, 1, 2, 5]))):
                engine.add(waiting.pop())
            for event in engine.step():
                assert event.request_id not in aborted
                finished.setdefault(event.request_id, []).append(event)
            engine.check_integrity()
            if rng.random() < 0.1:
                name = f"r{rng.randrange(500)}"
                ended = name in finished and finished[name][-1].finish_reason is not None
                if not ended and all(request.request_id != name for request in waiting):
                    engine.abort(name)
                    aborted.add(name)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []
    assert len(aborted) > 20
    assert all(group.num_in_use == 0 for group in engine.stats().pages)
    for name, request in requests.items():
        if name in aborted:
            continue
        sampling, events = request.sampling, finished[name]
        tokens = [event.token_id for event in events]
        assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert all(event.finish_reason is None for event in events[:-1])
        assert sampling.max_tokens is not None and len(tokens) <= sampling.max_tokens
        if events[-1].finish_reason is FinishReason.STOP:
            assert len(tokens) > sampling.min_tokens
        assert not set(tokens) & set(sampling.banned_token_ids)
        if sampling.allowed_token_ids is not None:
            assert set(tokens) <= set(sampling.allowed_token_ids)
        assert all((event.logprobs is None) == (sampling.logprobs is None) for event in events)
        prompt_logprobs = events[0].prompt_logprobs
        assert (prompt_logprobs is None) == (sampling.prompt_logprobs is None)
        if prompt_logprobs is not None:
            assert len(prompt_logprobs) == len(request.prompt_ids)


def test_a_seeded_sample_is_the_same_alone_and_in_company(engine: Engine):
    rng = random.Random(1)
    request = replace(
        random_request(rng, "alone"),
        sampling=SamplingParams(temperature=1.0, seed=5, max_tokens=30, ignore_eos=True),
    )
    alone = answer(engine, request)
    for i in range(7):
        engine.add(random_request(rng, f"company {i}"))
    engine.step()
    engine.add(replace(request, request_id="among others"))
    among = [event.token_id for event in drain(engine)["among others"]]
    assert among == alone
    sampling = replace(request.sampling, seed=6)
    assert answer(engine, replace(request, sampling=sampling)) != alone


def test_a_cached_prefix_changes_no_token_and_is_reported(engine: Engine):
    sampling = SamplingParams(temperature=0.0, max_tokens=20, seed=0, ignore_eos=True)
    request = Request("first", tuple(range(100, 150)), sampling, cache_salt="fresh")
    engine.add(request)
    first = drain(engine)["first"]
    engine.add(replace(request, request_id="second"))
    second = drain(engine)["second"]
    assert [event.token_id for event in first] == [event.token_id for event in second]
    assert first[0].num_cached_tokens == 0 and second[0].num_cached_tokens == 48
    engine.add(replace(request, request_id="other tenant", cache_salt="other"))
    assert drain(engine)["other tenant"][0].num_cached_tokens == 0


@pytest.mark.parametrize("steps_before_abort", range(6))
def test_abort_at_any_moment_frees_everything_and_says_nothing_more(
    engine: Engine, steps_before_abort: int
):
    sampling = SamplingParams(temperature=0.0, max_tokens=30, seed=0, ignore_eos=True)
    engine.add(Request("doomed", tuple(range(90)), replace(sampling, max_tokens=5)))
    engine.add(Request("other", tuple(range(3)), sampling))
    for _ in range(steps_before_abort):
        engine.step()
    engine.abort("doomed")
    engine.check_integrity()
    events = drain(engine)
    assert "doomed" not in events
    assert all(group.num_in_use == 0 for group in engine.stats().pages)


def test_the_end_token_of_the_tokenizer_ends_an_answer_too(tmp_path: Path):
    folder = tmp_path / "fine-tuned"
    shutil.copytree(TINY, folder)
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    engine = build_engine(
        Config(
            model=ModelConfig(model=str(folder), max_model_len=32),
            cache=CacheConfig(num_pages=8),
            scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=16),
            runtime=RuntimeConfig(warmup=False),
        )
    )
    engine.close()
    assert engine.eos_token_ids == (*engine.model.config.eos_token_ids, 1)


def test_more_pages_than_memory_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="^100000000 KV pages .* lower num_pages"):
        build_engine(
            Config(model=ModelConfig(model=str(TINY)), cache=CacheConfig(num_pages=100_000_000))
        )


def test_a_platform_that_is_not_there_is_one_line():
    run = subprocess.run(
        [sys.executable, "-m", "jaxserve.cli", "generate", "x", "--model", str(TINY)],
        env=os.environ | {"JAX_PLATFORMS": "nope"},
        cwd=TINY.parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("jaxserve: error: JAX cannot start on 'nope' (JAX_PLATFORMS):")
    assert run.stderr.count("\n") == 1


def test_memory_for_less_than_a_useful_context_is_an_error():
    with pytest.raises(ConfigError, match="needs 32 KV pages of 16 tokens"):
        build_engine(
            Config(model=ModelConfig(model=str(TINY)), cache=CacheConfig(kv_bytes=1024)),
        )


def test_an_engine_starts_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    build_engine(
        Config(
            model=ModelConfig(model=str(TINY), max_model_len=64),
            cache=CacheConfig(num_pages=8),
            runtime=RuntimeConfig(warmup=False),
        )
    ).close()
