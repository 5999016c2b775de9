"""`jaxserve bench serve`: a load test of any OpenAI server."""

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxserve.cli.app import option
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.settings import unknown_name

if TYPE_CHECKING:
    from jaxserve.benchmarks.serve import Run

URL = "http://127.0.0.1:8000/v1"
WORKLOADS = ("random", "shared-prefix", "multi-turn", "trace", "sharegpt")
BACKENDS = ("openai", "openai-chat")
TARGET, LOAD, WORK, RESULT = "Server", "Load", "Workload", "Results"


def bench_serve(
    *,
    url: Annotated[
        str,
        option("--url", "--base-url", metavar="URL", help=f"default: {URL}", section=TARGET),
    ] = URL,
    model: Annotated[
        str | None,
        option("--model", metavar="NAME", help="default: the server's first", section=TARGET),
    ] = None,
    api_key: Annotated[
        str | None,
        option("--api-key", metavar="KEY", help="(env JAXSERVE_API_KEY)", section=TARGET),
    ] = None,
    backend: Annotated[
        str,
        option(
            "--backend",
            metavar="NAME",
            help="openai uses /completions, openai-chat uses /chat/completions; default: openai",
            section=TARGET,
        ),
    ] = "openai",
    tokenizer: Annotated[
        str | None,
        option(
            "--tokenizer",
            metavar="NAME",
            help="folder, or hub name in the cache, for exact prompt lengths; default: the "
            "model's, if it is on this machine, else words",
            section=TARGET,
        ),
    ] = None,
    timeout: Annotated[
        float,
        option(
            "--timeout", metavar="S", help="seconds per request; default: 21600", section=TARGET
        ),
    ] = 21600.0,
    request_rate: Annotated[
        float,
        option(
            "--request-rate",
            metavar="X",
            help="requests (multi-turn: conversations) per second; default: inf, all at once",
            section=LOAD,
        ),
    ] = float("inf"),
    burstiness: Annotated[
        float,
        option(
            "--burstiness",
            metavar="X",
            help="shape of the gamma distribution of gaps: 1 is Poisson, less is burstier; "
            "default: 1",
            section=LOAD,
        ),
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        option(
            "--max-concurrency", metavar="N", help="most requests under way at once", section=LOAD
        ),
    ] = None,
    num_warmups: Annotated[
        int,
        option(
            "--num-warmups",
            metavar="N",
            help="requests before the run, of the same kind but other content; default: 1",
            section=LOAD,
        ),
    ] = 1,
    seed: Annotated[
        int, option("--seed", metavar="N", help="of prompts and arrivals; default: 0", section=LOAD)
    ] = 0,
    workload: Annotated[
        str,
        option(
            "--workload",
            "--dataset-name",
            metavar="NAME",
            help=f"one of {', '.join(WORKLOADS)}; default: random",
            section=WORK,
        ),
    ] = "random",
    path: Annotated[
        str | None,
        option(
            "--dataset-path",
            metavar="FILE",
            help="of trace (Mooncake's JSON lines) and sharegpt; .gz is unpacked",
            section=WORK,
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        option("--num-prompts", metavar="N", help="requests; default: 1000", section=WORK),
    ] = None,
    input_len: Annotated[
        int | None,
        option(
            "--input-len",
            "--random-input-len",
            metavar="N",
            help="tokens of a prompt, or of a turn; default: 1024, or what fits",
            section=WORK,
        ),
    ] = None,
    output_len: Annotated[
        int | None,
        option(
            "--output-len",
            "--random-output-len",
            metavar="N",
            help="tokens of an answer; default: 128, or what fits; of sharegpt: the "
            "recorded answer's",
            section=WORK,
        ),
    ] = None,
    range_ratio: Annotated[
        float,
        option(
            "--range-ratio",
            "--random-range-ratio",
            metavar="X",
            help="lengths vary by this share up and down; default: 0",
            section=WORK,
        ),
    ] = 0.0,
    prefix_len: Annotated[
        int | None,
        option(
            "--prefix-len",
            metavar="N",
            help="of shared-prefix, and of the first turn; default: 256, or what fits",
            section=WORK,
        ),
    ] = None,
    num_prefixes: Annotated[
        int,
        option("--num-prefixes", metavar="N", help="of shared-prefix; default: 10", section=WORK),
    ] = 10,
    num_turns: Annotated[
        int, option("--num-turns", metavar="N", help="of multi-turn; default: 5", section=WORK)
    ] = 5,
    think_time: Annotated[
        float,
        option(
            "--think-time",
            metavar="S",
            help="seconds between an answer and the next turn; default: 0",
            section=WORK,
        ),
    ] = 0.0,
    trace_speed: Annotated[
        float,
        option("--trace-speed", metavar="X", help="2 replays twice as fast", section=WORK),
    ] = 1.0,
    length_scale: Annotated[
        float,
        option(
            "--length-scale",
            metavar="X",
            help="multiplies a trace's lengths and its blocks; what does not fit the context is "
            "left out and counted",
            section=WORK,
        ),
    ] = 1.0,
    block_tokens: Annotated[
        int,
        option(
            "--block-tokens",
            metavar="N",
            help="tokens that one hash of the trace stands for; default: 512",
            section=WORK,
        ),
    ] = 512,
    ignore_eos: Annotated[
        bool | None,
        option(
            "--ignore-eos/--no-ignore-eos",
            help="make answers as long as asked; an extra field that some servers refuse; default: "
            "yes, of sharegpt no",
            section=WORK,
        ),
    ] = None,
    temperature: Annotated[
        float, option("--temperature", metavar="X", help="default: 0", section=WORK)
    ] = 0.0,
    goodput: Annotated[
        list[str] | None,
        option(
            "--goodput",
            metavar="GOALS",
            help="such as 'ttft:200 tpot:50 e2el:3000' (ms): also report requests that met all",
            section=RESULT,
        ),
    ] = None,
    percentiles: Annotated[
        str,
        option(
            "--metric-percentiles",
            metavar="LIST",
            help="separated by commas; default: 99",
            section=RESULT,
        ),
    ] = "99",
    server_metrics: Annotated[
        bool,
        option(
            "--server-metrics/--no-server-metrics",
            help="add the increase of the server's own counters, if it has /metrics; default: yes",
            section=RESULT,
        ),
    ] = True,
    out: Annotated[
        str | None,
        option("--out", metavar="FILE", help="append the JSON line to a file", section=RESULT),
    ] = None,
    detailed: Annotated[
        bool, option("--detailed", help="add every request to the JSON line", section=RESULT)
    ] = False,
    plot: Annotated[
        str | None,
        option("--plot", metavar="FILE", help="draw a picture (.png, .svg, .pdf)", section=RESULT),
    ] = None,
    as_json: Annotated[
        bool, option("--json", help="print the JSON line only", section=RESULT)
    ] = False,
) -> int:
    """Send load to an OpenAI server and report latencies and throughput.

    Prints a table, histograms and one JSON line, whose names are those of vLLM's benchmark where
    they mean the same. Exit status 1 if no request was answered.
    """
    import os

    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r:.80} is not a URL such as {URL}")
    _check_choice("--workload", workload, WORKLOADS)
    _check_choice("--backend", backend, BACKENDS)
    _check_range("--request-rate", request_rate, 0, open_low=True)
    _check_range("--burstiness", burstiness, 0, open_low=True)
    _check_range("--range-ratio", range_ratio, 0, 1)
    _check_range("--trace-speed", trace_speed, 0, open_low=True)
    _check_range("--length-scale", length_scale, 0, 100, open_low=True)
    _check_range("--think-time", think_time, 0, 86_400)
    _check_range("--temperature", temperature, 0, 100)
    _check_range("--timeout", timeout, 0, open_low=True)
    _check_range("--num-warmups", num_warmups, 0, 100_000)
    for name, value in (
        ("--num-prompts", num_prompts),
        ("--input-len", input_len),
        ("--output-len", output_len),
        ("--max-concurrency", max_concurrency),
        ("--num-prefixes", num_prefixes),
        ("--num-turns", num_turns),
        ("--block-tokens", block_tokens),
    ):
        if value is not None:
            _check_range(name, value, 1, 10_000_000)
    if prefix_len is not None:
        _check_range("--prefix-len", prefix_len, 0, 10_000_000)
    if workload in ("trace", "sharegpt") and path is None:
        raise ConfigError(f"--workload {workload} needs its file: --dataset-path FILE")
    if workload not in ("trace", "sharegpt") and path is not None:
        raise ConfigError(f"--dataset-path is for trace and sharegpt, not {workload}")

    from jaxserve.benchmarks.plot import check_plot
    from jaxserve.benchmarks.serve import Options, run_load_test
    from jaxserve.benchmarks.summary import parse_goals

    if plot is not None:
        check_plot(plot)
    options = Options(
        url=url.rstrip("/") if url.rstrip("/").endswith("/v1") else url.rstrip("/") + "/v1",
        model=model,
        api_key=api_key or os.environ.get("JAXSERVE_API_KEY"),
        backend=backend,
        tokenizer=tokenizer,
        workload=workload,
        path=path,
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        prefix_len=prefix_len,
        range_ratio=range_ratio,
        num_prefixes=num_prefixes,
        num_turns=num_turns,
        think_s=think_time,
        block_tokens=block_tokens,
        trace_speed=trace_speed,
        length_scale=length_scale,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        num_warmups=num_warmups,
        seed=seed,
        ignore_eos=workload != "sharegpt" if ignore_eos is None else ignore_eos,
        temperature=temperature,
        timeout_s=timeout,
        percentiles=_percentiles(percentiles),
        goals=tuple(parse_goals(goodput or [])),
        server_metrics=server_metrics,
    )
    run = asyncio.run(run_load_test(options))
    return _report(run, out=out, detailed=detailed, plot=plot, as_json=as_json)


def _report(
    run: "Run",
    *,
    out: str | None,
    detailed: bool,
    plot: str | None,
    as_json: bool,
) -> int:
    from jaxserve.benchmarks import report, summary
    from jaxserve.benchmarks.plot import draw

    good = [answer for answer in run.load.answers if not answer.error]
    line = dict(run.line)
    if detailed:
        line["requests"] = [_detail(answer, run.load.started_s) for answer in run.load.answers]
    text = json.dumps(line)
    if not as_json:
        print(report.table(run.line))
        for metric, values in summary.series(good).items():
            if metric in ("ttft", "itl") and len(values) > 1:
                print(f"\n{report.NAMES[metric]}, {len(values):,} of them")
                print(report.histogram(values, "ms"))
        if left_out := run.line.get("left_out_too_long"):
            print(f"\n{left_out:,} requests of the trace do not fit the context and were left out")
        print()
    print(text)
    if out is not None:
        try:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise JaxserveError(f"cannot write {out}: {error.strerror}") from error
    if plot is not None:
        title = f"{run.line['model_id']}: {run.line['workload']}, {len(good):,} requests answered"
        draw(plot, title, run.line, run.load.answers)
        print(f"drawn: {plot}", file=sys.stderr)
    return 0 if good else 1


def _detail(answer: Any, started_s: float) -> dict[str, Any]:
    return {
        "at_s": round(answer.sent_s - started_s, 6),
        "ttft_ms": round(1e3 * answer.ttft_s, 3) if answer.first_s else None,
        "e2el_ms": round(1e3 * answer.latency_s, 3),
        "itl_ms": [round(1e3 * gap_s, 3) for gap_s in answer.gaps_s],
        "input_tokens": answer.prompt_tokens,
        "output_tokens": answer.completion_tokens,
        "cached_tokens": answer.cached_tokens,
        "error": answer.error,
    }


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < 100 for value in values):
        raise ConfigError(
            f"--metric-percentiles is {text!r:.60}; expected numbers between 0 and 100, such as "
            "50,90,99"
        )
    return values


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(unknown_name(f"value of {name}", value, choices))


def _check_range(
    name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    if (low < value if open_low else low <= value) and value <= high:
        return
    bound = "" if high == float("inf") else f" and at most {high:g}"
    raise ConfigError(
        f"{name} is {value:g}; expected {'more than' if open_low else 'at least'} {low:g}{bound}"
    )
