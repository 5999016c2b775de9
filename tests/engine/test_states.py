"""Hidden states, logits and embeddings from the real engine, held to `transformers` and itself."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import RequestError
from jaxserve.types import Request
from tests.parity.harness import TOLERANCE

TINY = Path(__file__).parents[1] / "fixtures" / "tiny" / "llama31-v0"
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Chunks of at most 16 tokens, and too few pages for all slots at once."""
    with LLM(
        str(TINY),
        dtype="float32",
        max_model_len=96,
        page_size=8,
        num_pages=30,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        progress=False,
    ) as llm:
        yield llm


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_the_logits_of_a_prompt_are_those_of_transformers(llm: LLM):
    expected = np.load(TINY / "expected.npz")
    ids = expected["input_ids"].tolist()
    params = SamplingParams(
        max_tokens=1, return_logits=True, return_hidden_states=True, return_prompt_states=True
    )
    (output,) = llm.generate([ids], params, use_tqdm=False)
    assert output.prompt_logits is not None and output.prompt_hidden_states is not None
    assert np.abs(output.prompt_logits - expected["logits"]).max() <= TOLERANCE
    head = np.asarray(llm.engine.model.params["head"])  # pyright: ignore
    logits = output.prompt_hidden_states @ head.T
    assert np.abs(logits - output.prompt_logits).max() <= TOLERANCE


def test_each_token_comes_with_the_logits_it_was_sampled_from(llm: LLM):
    params = SamplingParams(
        max_tokens=5, logprobs=0, return_logits=True, return_hidden_states=True, **GREEDY
    )
    (output,) = llm.generate([prompt(20)], params, use_tqdm=False)
    (answer,) = output.outputs
    assert answer.logits is not None and answer.hidden_states is not None
    assert len(answer.logits) == len(answer.hidden_states) == len(answer.token_ids) == 5
    assert answer.logits.argmax(axis=1).tolist() == answer.token_ids
    for row, token_id, entry in zip(
        answer.logits, answer.token_ids, answer.logprobs or (), strict=True
    ):
        logprob = row[token_id] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert abs(logprob - entry[token_id].logprob) <= TOLERANCE
    assert output.prompt_logits is None and output.prompt_hidden_states is None


def test_nobody_gets_states_who_did_not_ask(llm: LLM):
    asks = SamplingParams(max_tokens=4, return_hidden_states=True, **GREEDY)
    plain = SamplingParams(max_tokens=4, **GREEDY)
    with_states, without = llm.generate([prompt(9), prompt(9, 1)], [asks, plain], use_tqdm=False)
    assert with_states.outputs[0].hidden_states is not None
    assert with_states.outputs[0].logits is None
    assert without.outputs[0].hidden_states is None


def test_embeddings_are_the_pooled_states_also_of_cached_prompts_and_in_crowds(llm: LLM):
    prompts = [prompt(length, seed) for seed, length in enumerate([3, 16, 17, 40, 60, 61, 80, 90])]
    params = SamplingParams(max_tokens=1, return_hidden_states=True, return_prompt_states=True)
    states = []
    for ids in prompts:
        (output,) = llm.generate([ids], params, use_tqdm=False)
        assert output.prompt_hidden_states is not None
        assert len(output.prompt_hidden_states) == len(ids)
        states.append(output.prompt_hidden_states)
    for _ in range(2):
        last = llm.embed(prompts, use_tqdm=False)
        mean = llm.embed(prompts, pooling="mean", normalize=False, use_tqdm=False)
        for i, hidden in enumerate(states):
            assert np.abs(last[i].outputs.embedding - unit(hidden[-1])).max() <= TOLERANCE
            assert np.abs(mean[i].outputs.embedding - hidden.mean(axis=0)).max() <= TOLERANCE
    for pooling, num_cached in (("last", 88), ("mean", 0)):
        (again,) = llm.embed([prompts[-1]], pooling=pooling, use_tqdm=False)
        assert again.num_cached_tokens == num_cached
    llm.engine.check_integrity()  # pyright: ignore


def test_embeddings_under_preemption_are_the_same(llm: LLM):
    """Long answers of more important requests take the pages of embeddings that have begun."""
    ids = prompt(90, 7)
    alone = llm.embed([ids], pooling="mean", use_tqdm=False)[0].outputs.embedding
    engine = llm.engine
    params = SamplingParams(max_tokens=60, return_hidden_states=True, seed=0, **GREEDY)
    before = engine.stats().num_preemptions  # pyright: ignore
    for i in range(3):
        engine.add(Request(f"long {i}", tuple(prompt(30, 20 + i)), params))
    engine.add(Request("mean", tuple(ids), SamplingParams(max_tokens=1, seed=0), pooling="mean"))
    ends = {}
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason is not None:
                ends[event.request_id] = event
        engine.check_integrity()  # pyright: ignore
    assert len(ends) == 4 and ends["mean"].token_id is None
    assert np.abs(unit(ends["mean"].states.hidden) - alone).max() <= TOLERANCE
    assert engine.stats().num_preemptions > before  # pyright: ignore


def test_embedding_compiles_nothing(llm: LLM):
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        llm.embed([prompt(33, 3), prompt(5, 4)], use_tqdm=False)
        llm.embed([prompt(33, 3)], pooling="mean", use_tqdm=False)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []


def test_states_do_not_depend_on_the_number_of_devices(llm: LLM):
    params = SamplingParams(max_tokens=2, return_logits=True, return_prompt_states=True, **GREEDY)
    (alone,) = llm.generate([prompt(30)], params, use_tqdm=False)
    (embedded,) = llm.embed([prompt(30)], pooling="mean", use_tqdm=False)
    with LLM(
        str(TINY),
        dtype="float32",
        max_model_len=96,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        tensor_parallel_size=2,
        warmup=False,
        progress=False,
    ) as split:
        (output,) = split.generate([prompt(30)], params, use_tqdm=False)
        (shared,) = split.embed([prompt(30)], pooling="mean", use_tqdm=False)
    assert alone.prompt_logits is not None and output.prompt_logits is not None
    assert np.abs(alone.prompt_logits - output.prompt_logits).max() <= TOLERANCE
    assert np.abs(embedded.outputs.embedding - shared.outputs.embedding).max() <= TOLERANCE


def test_fewer_dimensions_are_the_first_ones_scaled_again(llm: LLM):
    whole = llm.embed([prompt(5)], use_tqdm=False)[0].outputs.embedding
    few = llm.embed([prompt(5)], dimensions=4, use_tqdm=False)[0].outputs.embedding
    assert few.shape == (4,) and np.allclose(few, unit(whole[:4]), atol=1e-6)
    with pytest.raises(RequestError, match="dimensions is 1000"):
        llm.embed([prompt(5)], dimensions=1000)
    with pytest.raises(RequestError, match="pooling is 'max'; expected one of last, mean"):
        llm.embed([prompt(5)], pooling="max")


def test_states_of_the_prompt_need_to_be_asked_for_by_kind(llm: LLM):
    with pytest.raises(RequestError, match="needs return_logits or return_hidden_states"):
        llm.generate([prompt(5)], SamplingParams(return_prompt_states=True))


def test_a_bad_sequence_does_not_come_in_an_answer(llm: LLM):
    greedy = SamplingParams(max_tokens=12, **GREEDY)
    ids = prompt(11, 5)
    free = llm.generate([ids], greedy, use_tqdm=False)[0].outputs[0].token_ids
    bad = (tuple(free[2:5]), (free[7],))
    params = SamplingParams(max_tokens=12, bad_token_sequences=bad, **GREEDY)
    held = llm.generate([ids], params, use_tqdm=False)[0].outputs[0].token_ids
    if free[7] not in free[:4]:
        assert held[:4] == free[:4]
    assert free[7] not in held and all(held[i : i + 3] != free[2:5] for i in range(10))
