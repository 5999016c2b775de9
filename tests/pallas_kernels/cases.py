"""Random steps for attention backends, each a small description from which the arrays follow.

`grid` draws descriptions that soon cover all pairs of choices. What no query may see is poisoned:
pages of nobody, other layers, tokens before the window and past the end of a sequence, and what
padding points to are NaN (quantised pages: any bytes, with NaN scales).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn

from jaxserve.pallas_kernels.paged_attention.reference import table_width
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows
from tests.pallas_kernels.oracle import Expected, attention

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(float8_e4m3fn),
}
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}

CHOICES: dict[str, tuple[Any, ...]] = {
    "heads": ((8, 2), (4, 4), (8, 1), (14, 2), (6, 2), (1, 1), (16, 4)),  # Q, K
    "head_dim": (128, 64, 96, 192, 256),
    "page_size": (16, 32, 64, 128, 256),
    "dtype": ("bfloat16", "float32", "float16"),
    "quantised": (None, "int8", None, "float8_e4m3fn"),
    "window": (None, 19, None, 64, 1, 200),
    "soft_cap": (None, 5.0, 30.0),
    "has_sinks": (False, True),
    "layers": ((1, 0), (2, 1), (3, 1)),  # L, layer
    "latent_dim": (None,),
    "batch": (
        "mixed", "padded decodes", "prefill", "page borders", "padded mixed", "decodes",
        "page borders", "prefills", "only decodes in a mixed graph", "padded mixed", "no rows",
        "no rows in a mixed graph",
    ),
}  # fmt: skip
"""What a description can hold; what is there twice is drawn twice as often."""


@dataclass(frozen=True)
class Case:
    """A random step. The arrays are made when they are asked for; equal cases have equal ones.

    `decode_lens` are tokens per decode row, `prefills` pairs of query tokens and all tokens.
    `dtype` is that of queries, and of pages unless these are `quantised`.
    """

    seed: int = 0
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "float32"
    quantised: str | None = None
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    layers: tuple[int, int] = (1, 0)
    decode_lens: tuple[int, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    pad_rows: int = 0
    pad_tokens: int = 0
    is_mixed: bool = False
    """The graph has prefills, even if the step has none."""
    is_raw: bool = False
    """16-bit and float8 pages are their bits, as unsigned integers."""
    scale: float | None = None
    latent_dim: int | None = None
    """Pages are latent."""

    def __str__(self) -> str:
        q, k = self.heads
        parts = [
            f"{self.dtype}{'' if self.quantised is None else '/' + self.quantised}",
            f"Q{q} K{k} H{self.head_dim} P{self.page_size} L{self.layers[0]}",
            f"latent {self.latent_dim}" if self.latent_dim else "",
            f"window {self.window}" if self.window else "",
            f"cap {self.soft_cap:g}" if self.soft_cap else "",
            "sinks" if self.has_sinks else "",
            f"decodes {self.decode_lens}" if self.decode_lens else "",
            f"prefills {self.prefills}" if self.prefills else "",
            "mixed graph" if self.is_mixed else "",
            f"padding {self.pad_rows}+{self.pad_tokens}" if self.pad_rows else "",
        ]
        return " ".join(part for part in parts if part)

    @property
    def num_tokens(self) -> int:
        """Real ones."""
        return len(self.decode_lens) + sum(q_len for q_len, _ in self.prefills)

    @property
    def spec(self) -> AttentionSpec:
        # Scores with a deviation of about 2: few keys matter much, so a wrong one is seen.
        scale = self.scale or 2.0 * self.head_dim**-0.5
        num_layers, layer = self.layers
        return AttentionSpec(
            scale, num_layers, layer, self.window, self.soft_cap, latent_dim=self.latent_dim
        )

    @cached_property
    def rows(self) -> RaggedRows:
        """Numpy arrays, like all others here."""
        q_len = np.array([1] * len(self.decode_lens) + [q for q, _ in self.prefills], np.int32)
        num_padded = len(q_len) + self.pad_rows

        def padded(values: np.ndarray, fill: int) -> Any:
            values = np.pad(values, (0, self.pad_rows), constant_values=fill)
            return values.astype(np.int32)

        num_decodes: Any = np.asarray(len(self.decode_lens), np.int32)
        page_table: Any = self._page_table(num_padded)
        return RaggedRows(
            num_decodes=num_decodes,
            num_rows=num_decodes + np.int32(len(self.prefills)),
            q_start=padded(np.cumsum(q_len) - q_len, self.num_tokens),
            q_len=padded(q_len, 0),
            kv_len=padded(self._kv_len, 0),
            page_table=page_table,
            has_prefills=self.is_mixed or bool(self.prefills),
        )

    @property
    def _kv_len(self) -> np.ndarray:
        return np.array([*self.decode_lens, *(kv_len for _, kv_len in self.prefills)], np.int32)

    @property
    def _num_pages(self) -> int:
        return int((-(-self._kv_len // self.page_size)).sum()) + 3

    def _page_table(self, num_rows: int) -> np.ndarray:
        """Pages in random order; what is left over points to a page of nobody."""
        order = self._rng("pages").permutation(self._num_pages)
        longest = int(self._kv_len.max(initial=1))
        width = table_width(longest + 17 * (self.seed % 3), self.page_size)
        table = np.full((num_rows, width), order[-1], np.int32)
        taken = 0
        for row, kv_len in enumerate(self._kv_len):
            count = -(-kv_len // self.page_size)
            table[row, :count] = order[taken : taken + count]
            taken += count
        return table

    def _rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what.encode()])

    @cached_property
    def q_tqh(self) -> np.ndarray:
        num_rows = self.rows.q_len.shape[0]
        shape = (max(self.num_tokens + self.pad_tokens, num_rows, 1), self.heads[0], self.head_dim)
        return self._rng("q").standard_normal(shape).astype(DTYPES[self.dtype])

    @cached_property
    def sinks_q(self) -> np.ndarray | None:
        if not self.has_sinks:
            return None
        return self._rng("sinks").normal(1.0, 2.0, self.heads[0]).astype(np.float32)

    @cached_property
    def pages(self) -> KVPages:
        """Quantised from values whose size differs from token to token."""
        (num_layers, layer), num_kv = self.layers, self.heads[1]
        parts = self.spec.parts
        shape = (self._num_pages * num_layers * parts, num_kv, self.page_size, self.head_dim)
        if self.quantised is None:
            pool, scales = np.full(shape, np.nan, DTYPES[self.dtype]), None
        else:
            noise = self._rng("noise").integers(0, 256, shape, np.uint8)
            pool = noise.view(DTYPES[self.quantised])
            scales = np.full(shape[:3], np.nan, np.float32)
        rng, table = self._rng("keys and values"), np.asarray(self.rows.page_table)
        for row, (kv_len, q_len) in enumerate(
            zip(self._kv_len, np.asarray(self.rows.q_len), strict=False)
        ):
            first = 0 if self.window is None else max(0, kv_len - q_len - self.window + 1)
            for index in range(-(-kv_len // self.page_size)):
                begin = index * self.page_size
                held = slice(max(0, first - begin), max(0, min(self.page_size, kv_len - begin)))
                at = (table[row, index] * num_layers + layer) * parts
                kv = rng.standard_normal((parts, *shape[1:]), np.float32)
                kv *= np.exp(0.3 * rng.standard_normal((parts, *shape[1:3], 1), np.float32))
                if scales is None or self.quantised is None:
                    pool[at : at + parts, :, held] = kv[:, :, held].astype(pool.dtype)
                    continue
                scale = np.abs(kv).max(axis=-1) / np.float32(LARGEST[self.quantised])
                stored = kv / scale[..., None]
                stored = np.rint(stored) if self.quantised == "int8" else stored
                pool[at : at + parts, :, held] = stored[:, :, held].astype(pool.dtype)
                scales[at : at + parts, :, held] = scale[:, :, held]
        raw = {"bfloat16": np.uint16, "float16": np.uint16, "float8_e4m3fn": np.uint8}
        if self.is_raw and pool.dtype.name in raw:
            pool = pool.view(raw[pool.dtype.name])
        held_pages: Any = (pool, scales)
        return KVPages(*held_pages)

    @cached_property
    def expected(self) -> Expected:
        return attention(self.q_tqh, self.pages, self.rows, self.spec, self.sinks_q)


def grid(
    count: int, *, seed: int = 0, max_kv: int = 600, max_q: int = 150, **limits: Sequence[Any]
) -> list[Case]:
    """Random cases, each chosen so as to show as many new pairs of choices as it can.

    Args:
        max_kv: most tokens of a row, unless a page is larger.
        max_q: most query tokens of a row.
        limits: what to draw from instead of `CHOICES`, by name.
    """
    if unknown := limits.keys() - CHOICES.keys():
        raise ValueError(f"no choices named {sorted(unknown)}; expected some of {list(CHOICES)}")
    choices = CHOICES | limits
    rng = np.random.default_rng(seed)
    covered: set[frozenset[tuple[str, Any]]] = set()
    cases = []
    for index in range(count):
        drawn = [_draw(rng, choices) for _ in range(24)]
        best = max(drawn, key=lambda draw: len(_pairs(draw) - covered))
        covered |= _pairs(best)
        lengths = _lengths(rng, best.pop("batch"), best["page_size"], max_kv, max_q)
        cases.append(Case(seed=seed * 10_000 + index, **best, **lengths))
    return cases


def _draw(rng: np.random.Generator, choices: dict[str, Any]) -> dict[str, Any]:
    return {name: values[rng.integers(len(values))] for name, values in choices.items()}


def _pairs(draw: dict[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(draw.items(), 2)}


LATENT_CHOICES: dict[str, tuple[Any, ...]] = {
    "heads": ((16, 1), (5, 1), (1, 1), (20, 1)),
    "quantised": (None, None, "int8", None, "float8_e4m3fn"),
    "window": (None, None, 19),
    "soft_cap": (None, None, 30.0),
    "has_sinks": (False, False, True),
}
"""What `grid` draws latent cases from, beside head_dim and latent_dim, which go together."""


def latent_grid(count: int, *, max_kv: int = 200, max_q: int = 24, **limits: Any) -> list[Case]:
    """Cases with latent pages: DeepSeek's widths, MiniCPM's, and small ones."""
    widths = ((576, 512), (288, 256), (80, 64), (48, 32))
    per_width = -(-count // len(widths))
    cases = []
    for index, (head_dim, latent_dim) in enumerate(widths):
        choices = LATENT_CHOICES | limits
        choices |= {"head_dim": (head_dim,), "latent_dim": (latent_dim,)}
        cases += grid(per_width, seed=70 + index, max_kv=max_kv, max_q=max_q, **choices)
    return cases[:count]


def _lengths(
    rng: np.random.Generator, batch: str, page_size: int, max_kv: int, max_q: int
) -> dict[str, Any]:
    """Rows and padding of a batch of that kind."""

    def tokens(num_rows: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(1, max_kv + 1, num_rows))

    def chunks(num_rows: int) -> tuple[tuple[int, int], ...]:
        q_lens = rng.integers(1, max_q + 1, num_rows)
        cached = rng.integers(0, max_kv - q_lens.max() + 1, num_rows) * rng.integers(0, 2, num_rows)
        return tuple((int(q), int(q + c)) for q, c in zip(q_lens, cached, strict=True))

    def at_borders(num_rows: int) -> tuple[int, ...]:
        pages = rng.integers(1, max(1, max_kv // page_size) + 1, num_rows)
        return tuple(int(x) for x in pages * page_size + rng.integers(-1, 2, num_rows))

    padding = {"pad_rows": int(rng.integers(1, 5)), "pad_tokens": int(rng.integers(1, 40))}
    if batch == "decodes":
        return {"decode_lens": tokens(int(rng.integers(1, 7)))}
    if batch == "padded decodes":
        return {"decode_lens": tokens(int(rng.integers(1, 5))), "pad_rows": padding["pad_rows"]}
    if batch == "prefill":
        return {"prefills": chunks(1)}
    if batch == "prefills":
        return {"prefills": chunks(3)}
    if batch == "mixed":
        return {"decode_lens": tokens(3), "prefills": chunks(2)}
    if batch == "padded mixed":
        return {"decode_lens": tokens(2), "prefills": chunks(2), **padding}
    if batch == "page borders":
        ends = at_borders(2)
        prefills = tuple((min(end, int(rng.integers(1, max_q + 1))), end) for end in ends)
        return {"decode_lens": at_borders(3), "prefills": prefills}
    if batch == "only decodes in a mixed graph":
        return {"decode_lens": tokens(3), "is_mixed": True, **padding}
    if batch == "no rows in a mixed graph":
        return {"is_mixed": True, **padding}
    if batch == "no rows":
        return {"pad_rows": padding["pad_rows"]}
    raise ValueError(f"no batch named {batch!r}; expected one of {CHOICES['batch']}")
