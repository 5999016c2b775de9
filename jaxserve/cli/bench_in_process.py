"""`jaxserve bench throughput` and `bench latency`: the engine alone, in this process."""

import json
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from jaxserve.cli.app import option
from jaxserve.cli.flags import with_model_argument, with_settings
from jaxserve.errors import ConfigError
from jaxserve.settings import Settings

if TYPE_CHECKING:
    from jaxserve.benchmarks.in_process import Lengths

LARGEST = 1_000_000
InputLen: TypeAlias = Annotated[
    int, option("--input-len", metavar="N", help="tokens of a prompt; default: 128")
]
OutputLen: TypeAlias = Annotated[
    int, option("--output-len", metavar="N", help="tokens of an answer; default: 64")
]
AsJson: TypeAlias = Annotated[bool, option("--json", help="print the JSON line only")]


@with_model_argument
@with_settings()
def throughput(
    *,
    num_prompts: Annotated[
        int, option("--num-prompts", metavar="N", help="prompts; default: 64")
    ] = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    as_json: AsJson = False,
    settings: Settings,
) -> int:
    """Measure tokens per second of many prompts at once.

    share_of_limit is the time that reading the weights and the cache, and multiplying them, would
    take at the rates measured on this machine, divided by the time it took.
    """
    from jaxserve.benchmarks.in_process import Lengths, measure_throughput

    lengths = Lengths(num_prompts, input_len, output_len)

    def measure(llm: Any, limits: Any, weights: Any) -> dict[str, Any]:
        return measure_throughput(llm, lengths, limits, weights, settings.config.runtime.seed)

    return _run("throughput", lengths, settings, measure, as_json)


@with_model_argument
@with_settings()
def latency(
    *,
    batch_size: Annotated[
        int, option("--batch-size", metavar="N", help="prompts at once; default: 8")
    ] = 8,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    num_iters: Annotated[
        int, option("--num-iters", metavar="N", help="batches that count; default: 10")
    ] = 10,
    num_warmups: Annotated[
        int,
        option(
            "--num-warmups",
            "--num-iters-warmup",
            metavar="N",
            help="batches before them; default: 2",
        ),
    ] = 2,
    as_json: AsJson = False,
    settings: Settings,
) -> int:
    """Measure the seconds of one batch, of its prefill and of a decode step."""
    from jaxserve.benchmarks.in_process import Lengths, measure_latency

    _check("--num-iters", num_iters, 1)
    _check("--num-warmups", num_warmups, 0)
    lengths = Lengths(batch_size, input_len, output_len)

    def measure(llm: Any, limits: Any, weights: Any) -> dict[str, Any]:
        return measure_latency(
            llm,
            lengths,
            limits,
            weights,
            num_warmups=num_warmups,
            num_iters=num_iters,
            percentiles=(10, 50, 90, 99),
            seed=settings.config.runtime.seed,
        )

    return _run("latency", lengths, settings, measure, as_json)


def _run(name: str, lengths: "Lengths", settings: Settings, measure: Any, as_json: bool) -> int:
    for option_name, value in (
        ("number of prompts", lengths.num_prompts),
        ("--input-len", lengths.input_len),
        ("--output-len", lengths.output_len),
    ):
        _check(option_name, value, 1)

    import jax

    import jaxserve
    from jaxserve.benchmarks.in_process import check_lengths, limits_line, weights_of
    from jaxserve.benchmarks.machine import measure_limits
    from jaxserve.engine import build_engine
    from jaxserve.llm import LLM
    from jaxserve.progress import Progress

    with Progress() as bars:
        engine = build_engine(settings.config, bars)
    with LLM(engine=engine) as llm:
        check_lengths(lengths, engine.max_model_len)
        weights = weights_of(engine)
        limits = measure_limits(engine.model.dtype)
        figures = measure(llm, limits, weights)
    line = {
        "benchmark": name,
        "jaxserve_version": jaxserve.__version__,
        "jax_version": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model_id": engine.model_name,
        "dtype": engine.model.dtype,
        "input_len": lengths.input_len,
        "output_len": lengths.output_len,
        "batch_size" if name == "latency" else "num_prompts": lengths.num_prompts,
        **figures,
        **limits_line(limits, weights),
    }
    if not as_json:
        print(_table(line))
    print(json.dumps(line))
    return 0


def _table(line: dict[str, Any]) -> str:
    rows = []
    for name, value in line.items():
        if name.endswith("share_of_limit"):
            rows.append((name.replace("_", " "), f"{100 * value:.1f} %"))
        elif isinstance(value, dict):
            text = ", ".join(f"{inner} {number:.4g}" for inner, number in value.items())
            rows.append((name.replace("_", " "), text))
        elif isinstance(value, float):
            rows.append((name.replace("_", " "), f"{value:,.4g}"))
        else:
            rows.append((name.replace("_", " "), str(value)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows) + "\n"


def _check(name: str, value: int, low: int) -> None:
    if not low <= value <= LARGEST:
        raise ConfigError(f"{name} is {value}; expected {low} to {LARGEST}")
