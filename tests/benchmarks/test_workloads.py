import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.benchmarks.filler import Filler, calibrated, find_tokenizer
from jaxserve.benchmarks.workloads import (
    Limits,
    Session,
    Shape,
    Turn,
    arriving,
    multi_turn,
    random_prompts,
    replay,
    shared_prefixes,
    sharegpt,
)
from jaxserve.embedded import EMBEDDED_MODEL_NAME
from jaxserve.errors import ConfigError


@pytest.fixture(scope="module")
def exact() -> Filler:
    filler = find_tokenizer(None, EMBEDDED_MODEL_NAME)
    assert filler is not None and filler.has_ids
    return filler


def test_prompts_have_the_lengths_that_were_asked_for(exact: Filler):
    shape = Shape(num_prompts=20, input_len=100, output_len=10, range_ratio=0.3)
    sessions = random_prompts(shape, exact, as_ids=True)
    lengths = [len(session.turns[0].prompt) for session in sessions]
    assert min(lengths) >= 70 and max(lengths) <= 130 and len(set(lengths)) > 5
    assert all(7 <= session.turns[0].num_output_tokens <= 13 for session in sessions)
    assert sessions == random_prompts(shape, exact, as_ids=True), "the seed decides"
    for count in (1, 7, 300):
        text = exact.text(count, random.Random(1))
        assert abs(exact.count(text) - count) <= 3


def test_without_a_tokenizer_words_are_counted_by_what_the_server_said():
    filler = calibrated(401, 3)
    assert filler.tokens_per_word == 2.0 and not filler.has_ids
    assert len(filler.text(100, random.Random(0)).split()) == 50


def test_shared_prefixes_are_shared_and_come_in_random_order(exact: Filler):
    shape = Shape(num_prompts=40, input_len=10, prefix_len=50, num_prefixes=4)
    sessions = shared_prefixes(shape, exact, as_ids=True)
    heads = [tuple(session.turns[0].prompt[:50]) for session in sessions]
    assert len(set(heads)) == 4 and all(heads.count(head) == 10 for head in heads)
    assert len({tuple(session.turns[0].prompt) for session in sessions}) == 40
    assert heads != sorted(heads)


def test_conversations_have_turns_and_count_as_requests(exact: Filler):
    sessions = multi_turn(Shape(num_prompts=7, input_len=10, prefix_len=40, num_turns=3), exact)
    assert [len(session.turns) for session in sessions] == [3, 3, 1]
    first, second, _ = sessions[0].turns
    assert first.num_input_tokens == 50 and second.num_input_tokens == 10


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_gaps_are_gamma_distributed_with_the_rate_as_mean(burstiness: float, variation: float):
    sessions = [Session((Turn("x", 1, 1),))] * 4000
    times = [session.at_s for session in arriving(sessions, 50.0, burstiness, seed=1)]
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(4000 / 50)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)
    assert all(s.at_s == 0 for s in arriving(sessions, float("inf"), 1.0, seed=1))


def trace(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def record(at: int, num_input: int, names: list[int]) -> dict[str, Any]:
    return {"timestamp": at, "input_length": num_input, "output_length": 20, "hash_ids": names}


@pytest.mark.parametrize("as_ids", [True, False])
def test_equal_hashes_of_a_trace_become_equal_pieces(exact: Filler, tmp_path: Path, as_ids: bool):
    path = trace(
        tmp_path,
        record(500, 1024 + 100, [0, 1, 2]),
        record(1500, 1024 + 300, [0, 1, 3]),
        record(2500, 512 + 10, [0, 9]),
    )
    sessions = replay(path, exact, Limits(), as_ids=as_ids)
    first, second, third = (session.turns[0] for session in sessions)
    assert [session.at_s for session in sessions] == [0.0, 1.0, 2.0]
    if as_ids:
        assert [len(turn.prompt) for turn in (first, second, third)] == [1124, 1324, 522]
        assert first.prompt[:1024] == second.prompt[:1024] != third.prompt[:1024]
        assert first.prompt[:512] == third.prompt[:512]
        assert first.prompt[1024:] != second.prompt[1024:1124]
    else:
        assert isinstance(first.prompt, str) and isinstance(second.prompt, str)
        shared = len(first.prompt) - len(first.prompt.removeprefix(second.prompt[:1200]))
        assert shared == 1200
    assert {turn.num_output_tokens for turn in (first, second, third)} == {20}


def test_a_trace_can_be_shortened_and_sped_up_and_leaves_out_what_does_not_fit(
    exact: Filler, tmp_path: Path
):
    path = trace(tmp_path, record(0, 2048, [0, 1, 2, 3]), record(0, 9000, [0]), record(900, 5, [0]))
    limits = Limits(max_model_len=600)
    sessions = replay(path, exact, limits, speed=3.0, length_scale=0.25, as_ids=True)
    assert [len(session.turns[0].prompt) for session in sessions] == [512, 1]
    assert sessions[1].at_s == pytest.approx(0.3) and len(limits.left_out) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:1 is not JSON"),
        ("[]", "trace.jsonl:1 is not a request"),
        ('{"timestamp": 1}', "KeyError"),
        ('{"timestamp": "x", "input_length": 1, "output_length": 1, "hash_ids": []}', "x"),
        ('{"timestamp": 1, "input_length": -1, "output_length": 1, "hash_ids": []}', "is not"),
    ],
)
def test_a_broken_trace_is_told(exact: Filler, tmp_path: Path, line: str, message: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        replay(path, exact, Limits(), as_ids=True)


def test_sharegpt_conversations_give_questions_and_answer_lengths(exact: Filler, tmp_path: Path):
    turns = [{"from": "human", "value": "Tell me a story."}, {"from": "gpt", "value": "One day."}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, {}]))
    (session,) = sharegpt(path, exact, Limits(), num_prompts=5, output_len=None, seed=0)
    assert session.turns[0].prompt == "Tell me a story."
    assert session.turns[0].num_output_tokens == exact.count("One day.")
    path.write_text("[]")
    with pytest.raises(ConfigError, match="holds no conversations"):
        sharegpt(path, exact, Limits(), num_prompts=5, output_len=None, seed=0)
