import pytest

from jaxserve.benchmarks.client import Answer
from jaxserve.benchmarks.counters import counters, increase
from jaxserve.benchmarks.load import Load
from jaxserve.benchmarks.report import histogram, table
from jaxserve.benchmarks.summary import busiest_second, parse_goals, summarise
from jaxserve.errors import ConfigError


def answer(start_s: float, first_s: float, *gaps_s: float, tokens: int = 0) -> Answer:
    one = Answer(sent_s=start_s, first_s=start_s + first_s, gaps_s=list(gaps_s))
    one.ended_s = one.first_s + sum(gaps_s)
    one.completion_tokens, one.prompt_tokens = tokens or len(gaps_s) + 1, 10
    one.is_counted = True
    return one


def test_figures_are_what_one_computes_by_hand():
    load = Load(
        [
            answer(0.0, 0.1, 0.01, 0.03),
            answer(0.5, 0.3, 0.02),
            Answer(sent_s=1.0, ended_s=2.0, error="http 429", message="queue full"),
        ],
        duration_s=2.0,
    )
    load.answers[0].cached_tokens, load.answers[0].cached_by_source = 8, {"host": 8}
    found = summarise(load, [50.0, 99.0], parse_goals(["ttft:200"]))
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 5)
    assert found["request_throughput"] == 1.0 and found["output_throughput"] == 2.5
    assert found["request_goodput"] == 0.5
    assert found["mean_ttft_ms"] == pytest.approx(200) and found["median_ttft_ms"] == 200
    assert found["mean_tpot_ms"] == pytest.approx(20) and found["mean_itl_ms"] == pytest.approx(20)
    assert found["p50_e2el_ms"] == pytest.approx(230)
    assert found["errors"] == {"http 429": 1} and found["first_error"] == "queue full"
    assert found["cached_tokens"] == 8 and found["cached_tokens_by_source"] == {"host": 8}
    text = table(found)
    assert "40.0 %  host 8" in text and "1 times http 429" in text
    assert max(map(len, text.splitlines())) <= 110


def test_a_piece_may_hold_several_tokens():
    found = summarise(Load([answer(0.0, 0.1, 0.1, tokens=21)], duration_s=1.0), [99.0], [])
    assert found["mean_tpot_ms"] == pytest.approx(5) and found["mean_itl_ms"] == pytest.approx(100)
    assert busiest_second([answer(0.0, 0.9, 0.2, tokens=30)]) == 15


def test_a_run_without_an_answer_has_counts_and_no_times():
    found = summarise(Load([Answer(error="connect")], duration_s=1.0), [99.0], [])
    assert found["completed"] == 0 and "mean_ttft_ms" not in found
    assert "requests failed" in table(found)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "x:5", "itl:3", "ttft:nan"])
def test_a_goal_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="--goodput has"):
        parse_goals([text])
    assert len(parse_goals(["ttft:200,tpot:50", "e2el:3000"])) == 3


@pytest.mark.parametrize("values", [[5.0], [1.0, 1.0], [0.0, 1.0, 1000.0], [1.0, 1000.0]])
def test_a_histogram_counts_everything_once(values: list[float]):
    lines = histogram(values, "ms").splitlines()
    counts = [int(line.split()[-1]) for line in lines if line.split()[-1].isdigit()]
    assert len(lines) == 10 and sum(counts) == len(values)


def test_the_increase_of_a_servers_counters_leaves_out_gauges_and_what_stood_still():
    text = (
        "# TYPE vllm:prompt_tokens_total counter\n"
        'vllm:prompt_tokens_total{{model_name="m"}} {0}\n'
        "# TYPE vllm:num_requests_running gauge\n"
        "vllm:num_requests_running 3\n"
        "# TYPE jaxserve_kv_hit_tokens_total counter\n"
        'jaxserve_kv_hit_tokens_total{{source="host"}} {0}\n'
        'jaxserve_kv_hit_tokens_total{{source="device"}} 7\n'
        "# TYPE other_total counter\nother_total {0}\n"
    )
    found = increase(counters(text.format(5)), counters(text.format(9)))
    assert found == {
        "vllm:prompt_tokens_total": 4,
        "jaxserve_kv_hit_tokens_total{source=host}": 4,
    }
