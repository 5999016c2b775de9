"""Part `tune`: tries sizes of the attention launches from a bounded list, and writes what won.

One choice after the other, each with the best of those before it; a candidate's score is the mean,
over a few shapes, of its time over the machine's limit. The best so far is written after each
choice (`tuned-mosaic_gpu.json`, `tuned-triton.json`, in the form that the kernels read), so that
what has been found stays when time runs out. What does not compile loses.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module, resources
from typing import Any

import jax

from bench.attention_workloads import Workload
from bench.gpu.inputs import Inputs, make_inputs
from bench.gpu.kernels import PACKAGE, TINY, load, time_attention_loop
from bench.gpu.report import Context

MIN_LEFT_S = 15.0
"""A candidate is not begun with less time than this left."""

MAX_POOL_BYTES = 8 << 30


def _decodes(**facts: Any) -> tuple[Workload, ...]:
    return tuple(
        Workload(f"decode {batch}x{kv_len}", decodes=(kv_len,) * batch, page_size=16, **facts)
        for batch, kv_len in ((64, 8192), (1, 8192), (16, 2048))
    )


def _prefills(**facts: Any) -> tuple[Workload, ...]:
    return tuple(
        Workload(f"prefill {q_len} of {kv_len}", prefills=((q_len, kv_len),), page_size=16, **facts)
        for q_len, kv_len in ((8192, 8192), (2048, 4096))
    )


@dataclass(frozen=True)
class Choice:
    """One thing to choose.

    Attributes:
        changes: of each candidate: of the whole tuning, or of the tile that the workload takes.
        of_tile: the launch whose tile is changed, `decode` or `prefill`; None: the whole.
        works: what candidates are timed on.
    """

    backend: str
    works: tuple[Workload, ...]
    changes: "tuple[dict[str, Any], ...]"
    of_tile: str | None = None


def _product(**values: "tuple[Any, ...]") -> "tuple[dict[str, Any], ...]":
    """All combinations."""
    found: list[dict[str, Any]] = [{}]
    for name, options in values.items():
        found = [x | {name: option} for x in found for option in options]
    return tuple(found)


MOSAIC_TILES = _product(tile_tokens=(32, 64, 128), stages=(2, 3, 4, 6))
MOSAIC_PREFILL = _product(tile_tokens=(64, 128), stages=(2, 3, 4))
TRITON_DECODE = _product(block_k=(32, 64, 128), num_warps=(2, 4, 8), num_stages=(2, 3, 4))
TRITON_PREFILL = _product(
    block_m=(64, 128), block_k=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)
)

CHOICES = (
    Choice("mosaic_gpu", _decodes(), MOSAIC_TILES, "decode"),
    Choice(
        "mosaic_gpu",
        _decodes(),
        _product(decode_blocks=(264, 528, 792, 1056, 1584), min_piece_tokens=(128, 256, 512)),
    ),
    Choice("mosaic_gpu", _prefills(), MOSAIC_PREFILL, "prefill"),
    Choice("mosaic_gpu", _prefills(), _product(prefill_takes_turns=(True, False))),
    Choice("triton", _decodes(), TRITON_DECODE, "decode"),
    Choice(
        "triton", _decodes(), _product(programs_per_sm=(2, 4, 8, 16), min_split_tokens=(128, 256))
    ),
    Choice("triton", _prefills(), TRITON_PREFILL, "prefill"),
    Choice("mosaic_gpu", _decodes(quantised="int8"), MOSAIC_TILES, "decode"),
    Choice("mosaic_gpu", _decodes(head_dim=64), MOSAIC_TILES, "decode"),
)
"""In the order of their worth."""


def run(context: Context) -> None:
    best: dict[str, Any] = {}
    for choice in _choices(context):
        if context.left_s < MIN_LEFT_S and not context.is_tiny:
            context.line(failed="no time left", choice=_name(choice))
            continue
        tuning = best.get(choice.backend) or _load_tuning(choice.backend)
        best[choice.backend] = _choose(context, choice, tuning)
        _write(context, choice.backend, best[choice.backend])


def _choices(context: Context) -> Iterator[Choice]:
    if not context.is_tiny:
        yield from CHOICES
        return
    for choice in (CHOICES[0], CHOICES[4], CHOICES[5]):
        yield replace(choice, works=TINY[:1], changes=choice.changes[:1])


def _choose(context: Context, choice: Choice, tuning: Any) -> Any:
    """The best of the candidates and what was there before, which is timed first."""
    all_inputs = [make_inputs(work, MAX_POOL_BYTES) for work in choice.works]
    candidates: list[tuple[dict[str, Any], Any]] = [({}, tuning)]
    for change in choice.changes:
        changed = _changed(choice, tuning, change)
        if changed != tuning:
            candidates.append((change, changed))
    best, best_score = tuning, math.inf
    for change, candidate in candidates:
        if context.left_s < MIN_LEFT_S and not context.is_tiny:
            break
        about = {"choice": _name(choice), "backend": choice.backend, "change": change}
        with context.attempt(about):
            backend = load(choice.backend, is_tiny=context.is_tiny, tuning=candidate)
            times = [_time(context, backend, inputs) for inputs in all_inputs]
            score = sum(times) / len(times)
            context.line(**about, score=round(score, 4), of_each=[round(x, 4) for x in times])
            if score < best_score * 0.99:  # less is noise: what was there before stays
                best, best_score = candidate, score
    context.line(choice=_name(choice), backend=choice.backend, best=_as_json(best))
    return best


def _time(context: Context, backend: Any, inputs: Inputs) -> float:
    """Time over the limit; without known limits, microseconds."""
    timing = time_attention_loop(context, backend, inputs)
    least_s = context.limits.seconds(inputs.work.bytes_moved, inputs.work.flops)
    return timing.median_s / (least_s or 1e-6)


def _changed(choice: Choice, tuning: Any, change: dict[str, Any]) -> Any:
    """The tuning with one candidate's change."""
    if choice.of_tile is None:
        return replace(tuning, **change)
    work = choice.works[0]
    find: Callable[..., Any] = _module(choice.backend).find_tile
    facts: dict[str, Any] = {
        "is_quantised": work.quantised is not None,
        "head_dim": work.head_dim,
    }
    if choice.backend == "triton":
        facts["query_bytes"] = 2
    tiles = getattr(tuning, choice.of_tile)
    tile = find(tiles, **facts)
    changed = tuple(replace(x, **change) if x is tile else x for x in tiles)
    return replace(tuning, **{choice.of_tile: changed})


def _module(backend: str) -> Any:
    return import_module(f"{PACKAGE}.{backend}_tuning")


def _load_tuning(backend: str) -> Any:
    module = _module(backend)
    return module.load_tuning(module.device_kind())


def _name(choice: Choice) -> str:
    launch = choice.of_tile or " and ".join(sorted(choice.changes[0]))
    work = choice.works[0]
    return f"{launch} of {work.name}, head dim {work.head_dim}, {work.kv_dtype.name}"


def _as_json(tuning: Any) -> dict[str, Any]:
    values = dataclasses.asdict(tuning)
    # As the files have it: what a tile leaves at its default is not written.
    for launch in ("decode", "prefill"):
        values[launch] = [
            {k: v for k, v in tile.items() if k != "narrow_stages" or v} for tile in values[launch]
        ]
    return values


def _write(context: Context, backend: str, tuning: Any) -> None:
    """The whole file of that backend with this device's entry."""
    folder = resources.files(PACKAGE) / "tuned"
    devices = json.loads((folder / f"{backend}.json").read_text())
    kind = _module(backend).device_kind() if not context.is_tiny else "tiny"
    devices[kind] = {
        "date": context.common["date"],
        "measured": True,
        "chosen_by": f"bench/gpu/suite.sh --only tune, commit {context.common['commit']}, "
        f"jax {jax.__version__}",
        **_as_json(tuning),
    }
    path = context.folder / f"tuned-{backend}.json"
    path.write_text(json.dumps(devices, indent=2) + "\n")
