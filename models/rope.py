"""From the rope fields of a config.json to a `RopeSpec`: the frequencies of every scaling kind.

Both spellings are read: `rope_theta` + `rope_scaling`, and `rope_parameters`, possibly per layer
type. Frequencies are computed in float32, step by step as models were trained with them: at
position 100,000 one ulp of a frequency is already 1e-2 of a radian.

Two kinds would depend on the length of the sequence at hand, which cannot work with cached keys.
Both are decided once: `longrope` by whether the context exceeds the original one, and `dynamic`
never scales, because sequences are limited to the trained context.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.models.config import RopeSpec
from jaxserve.models.fields import Fields

_KINDS = {
    "default": "default",
    "mrope": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}

_KNOWN_KEYS = frozenset(
    """rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
    max_position_embeddings attention_factor beta_fast beta_slow short_factor long_factor
    low_freq_factor high_freq_factor mscale mscale_all_dim truncate mrope_section""".split()
)


def rope_parameters(f: Fields, layer_type: str | None = None) -> dict[str, Any]:
    """The raw rope object, in either spelling, for one layer type if they differ."""
    old, new = f.table("rope_scaling"), f.table("rope_parameters")
    table = old or new
    if layer_type is not None and isinstance(table.get(layer_type), dict):
        table = table[layer_type]
    return dict(table)


def longest_context(f: Fields) -> int:
    """Positions the model was made for: `max_position_embeddings`, or what YaRN stretches it to.

    Who adds YaRN to a config, as its makers advise, leaves the other field as it was.
    """
    max_len = f.integer("max_position_embeddings")
    table = rope_parameters(f, "full_attention")
    rope = Fields(table, f"{f.origin}: rope parameters")
    if table.get("rope_type", table.get("type")) != "yarn":
        return max_len
    original = rope.get("original_max_position_embeddings")
    if original is None or rope.get("factor") is None:
        return max_len
    stretched = rope.number("factor") * rope.integer("original_max_position_embeddings")
    return max(max_len, int(stretched))


def read_rope(
    f: Fields,
    head_dim: int,
    *,
    table: Mapping[str, Any] | None = None,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
    context_len: int | None = None,
) -> RopeSpec:
    """The rotary embedding of the layers whose rope object is `table` (default: the only one).

    Args:
        theta: the family's default base.
        partial: the family's default for the rotated part of a head; None: it rotates all of it.
        context_len: longest sequence that will be served (default: the model's).
    """
    table = rope_parameters(f) if table is None else dict(table)
    rope = Fields(table, f"{f.origin}: rope parameters")
    unknown = sorted(set(table) - _KNOWN_KEYS)
    if unknown:
        rope.refuse(unknown[0], "is not a known rope parameter")
    kind = rope.choice("rope_type" if "rope_type" in rope else "type", _KINDS, "default")
    theta = rope.number("rope_theta", f.number("rope_theta", theta))
    part = rope.number("partial_rotary_factor", f.number("partial_rotary_factor", partial or 1.0))
    if theta <= 0:
        f.refuse("rope_theta", f"is {theta}; expected a positive number")
    if not 0 < part <= 1 or (partial is None and part != 1):
        f.refuse("partial_rotary_factor", f"is {part}, which this architecture does not support")
    dim = int(head_dim * part)
    if dim < 1 or dim + dim % 2 > head_dim:
        f.refuse("head_dim", f"is {head_dim}: rope needs an even number of rotated entries")
    max_len = f.integer("max_position_embeddings")
    original = f.get("original_max_position_embeddings")
    if original is None:
        original = rope.integer("original_max_position_embeddings", max_len)
    frequencies, amplitude = _scaled(
        kind, rope, _wavelengths(theta, dim), theta, dim, max_len, original, context_len
    )
    return RopeSpec(tuple(float(x) for x in frequencies), float(amplitude), interleaved)


def _wavelengths(theta: float, dim: int) -> np.ndarray:
    """theta ** (2i / dim), float32."""
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _scaled(
    kind: str,
    rope: Fields,
    wavelengths: np.ndarray,
    theta: float,
    dim: int,
    max_len: int,
    original: int,
    context_len: int | None,
) -> tuple[np.ndarray, float]:
    """Frequencies, and the factor on cosine and sine."""
    plain = np.float32(1) / wavelengths
    if kind == "linear":
        return plain / np.float32(rope.number("factor")), 1.0
    if kind == "llama3":
        return _llama3(rope, plain, original), 1.0
    if kind == "yarn":
        return _yarn(rope, wavelengths, theta, dim, max_len, original)
    if kind == "longrope":
        return _longrope(rope, wavelengths, max_len, original, context_len)
    return plain, 1.0


def _llama3(rope: Fields, plain: np.ndarray, original: int) -> np.ndarray:
    """Slow frequencies divided by `factor`, fast ones kept, those between interpolated."""
    factor = np.float32(rope.number("factor"))
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * plain / factor + smooth * plain
    slow, fast = wavelengths > original / low, wavelengths < original / high
    return np.where(slow, plain / factor, np.where(fast, plain, between))


def _yarn(
    rope: Fields, wavelengths: np.ndarray, theta: float, dim: int, max_len: int, original: int
) -> tuple[np.ndarray, float]:
    """Interpolated below, extrapolated above, and a ramp between two rotation counts."""
    factor = rope.number("factor", max_len / original)

    def log_scale(strength: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

    amplitude = rope.optional_number("attention_factor")
    mscale, mscale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if amplitude is None:
        both = mscale and mscale_all
        amplitude = log_scale(mscale) / log_scale(mscale_all) if both else log_scale(1.0)

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dim_of(rope.number("beta_fast", 32.0) or 32.0)
    high = dim_of(rope.number("beta_slow", 1.0) or 1.0)
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    steps = np.arange(len(wavelengths), dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp.astype(np.float32)
    interpolated = np.float32(1) / (np.float32(factor) * wavelengths)
    extrapolated = np.float32(1) / wavelengths
    return interpolated * (np.float32(1) - keep) + extrapolated * keep, amplitude


def _longrope(
    rope: Fields,
    wavelengths: np.ndarray,
    max_len: int,
    original: int,
    context_len: int | None,
) -> tuple[np.ndarray, float]:
    """A factor per frequency, from one of two lists."""
    is_long = (context_len or max_len) > original
    name = "long_factor" if is_long else "short_factor"
    factors = rope.get(name)
    count = len(wavelengths)
    if not isinstance(factors, list) or len(factors) != count:
        rope.refuse(name, f"must be a list of {count} numbers")
    factor = rope.number("factor", max_len / original)
    amplitude = rope.optional_number("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return np.float32(1) / (np.asarray(factors, np.float32) * wavelengths), amplitude
