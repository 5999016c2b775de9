"""The static shapes that steps are compiled for, and which of them a step uses."""

from collections.abc import Sequence

from jaxserve.errors import ConfigError
from jaxserve.kv.prefill_cost import Steps
from jaxserve.plan import Bucket

_SMALLEST_DECODE = 1
_FEW_ROWS = 8
_TOKENS_OF_FEW_ROWS = (16, 32, 64, 128, 256, 512, 1024)
_TOKENS_OF_MANY_ROWS = (128, 512)

_STEP_TOKENS = 64
"""What another step costs, in tokens: reading the weights once takes as long as computing so many,
or more (about 40 on two CPU cores with a model of 150 M parameters, 150 on an H200 with 8 B)."""


def default_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[Bucket, ...]:
    """Shapes for these limits: 18 for the default configuration.

    Decode steps come in powers of two. Steps with prefill chunks come in powers of two of tokens
    with few rows (one long prompt beside few others), and more coarsely with as many rows as run.
    """
    decode_rows = []
    rows = _SMALLEST_DECODE
    while rows < max_num_seqs:
        decode_rows.append(rows)
        rows *= 2
    decode_rows.append(max(max_num_seqs, _SMALLEST_DECODE))
    decodes = [Bucket(rows, rows, True) for rows in decode_rows]
    mixed = {
        Bucket(num_tokens, min(rows, num_tokens), False)
        for rows, choices in (
            (min(_FEW_ROWS, max_num_seqs), _TOKENS_OF_FEW_ROWS),
            (max_num_seqs, _TOKENS_OF_MANY_ROWS),
        )
        for num_tokens in (*choices, max_num_batched_tokens)
        if num_tokens <= max_num_batched_tokens
    }
    return (*decodes, *sorted(mixed))


class BucketChooser:
    """Finds the smallest bucket for a step.

    Args:
        buckets: what the runner has compiled or will compile.
        max_num_seqs: most rows of a step.
        max_num_batched_tokens: most tokens of a step.

    Raises:
        ConfigError: some step would fit no bucket.
    """

    def __init__(self, buckets: Sequence[Bucket], max_num_seqs: int, max_num_batched_tokens: int):
        self._decodes = sorted(bucket for bucket in buckets if bucket.is_decode)
        self._mixed = sorted(bucket for bucket in buckets if not bucket.is_decode)
        if not self._decodes or self._decodes[-1].num_rows < max_num_seqs:
            raise ConfigError(f"no decode bucket holds max_num_seqs ({max_num_seqs}) rows")
        self._mixed_rows = sorted({bucket.num_rows for bucket in self._mixed})
        wide = [bucket for bucket in self._mixed if bucket.num_rows >= max_num_seqs]
        if not wide:
            raise ConfigError(f"no mixed bucket holds max_num_seqs ({max_num_seqs}) rows")
        self.max_num_tokens = min(max_num_batched_tokens, wide[-1].num_tokens)
        """Most tokens of a step, however many rows it has."""
        self._fits: dict[tuple[int, int], int] = {}
        if self.max_num_tokens < max_num_seqs:
            raise ConfigError(
                f"a step takes {self.max_num_tokens} tokens, fewer than max_num_seqs "
                f"({max_num_seqs}): each running sequence needs one"
            )

    def choose(self, num_tokens: int, num_rows: int, is_decode: bool) -> Bucket:
        """The smallest bucket (by tokens, then rows) that holds the step."""
        for bucket in self._decodes if is_decode else self._mixed:
            if bucket.num_tokens >= num_tokens and bucket.num_rows >= num_rows:
                return bucket
        raise AssertionError(f"no bucket for {num_tokens} tokens in {num_rows} rows")

    def fit(self, num_tokens: int, num_rows: int) -> int:
        """How many of these tokens a mixed step should take: all, or what fills a smaller bucket
        if the padding that this saves is worth the further steps."""
        rows = next((rows for rows in self._mixed_rows if rows >= num_rows), num_rows)
        if (num_tokens, rows) not in self._fits:
            self._fits[num_tokens, rows] = self._cut(num_tokens, rows)
        return self._fits[num_tokens, rows]

    def _cut(self, num_tokens: int, num_rows: int) -> int:
        smaller = 0
        for bucket in self._mixed:
            if bucket.num_rows < num_rows:
                continue
            if bucket.num_tokens < num_tokens:
                smaller = bucket.num_tokens
                continue
            if not smaller:
                return num_tokens
            rest = self.steps(num_tokens - smaller)
            in_parts = smaller + rest.num_tokens + _STEP_TOKENS * rest.num_steps
            return num_tokens if bucket.num_tokens <= in_parts else smaller
        return smaller

    def steps(self, num_tokens: int) -> Steps:
        """The steps in which the prefill of one sequence would compute so many tokens."""
        num_steps, rest = divmod(num_tokens, self.max_num_tokens)
        padded = num_steps * self.max_num_tokens
        while rest > 0:
            taken = self.fit(rest, 1) or rest
            padded += self.choose(taken, 1, is_decode=False).num_tokens
            rest -= taken
            num_steps += 1
        return Steps(num_steps, padded)
