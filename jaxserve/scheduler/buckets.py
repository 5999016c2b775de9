"""The static shapes that steps are compiled for, and which of them a step uses."""

from collections.abc import Sequence

from jaxserve.errors import ConfigError
from jaxserve.plan import Bucket

_SMALLEST_DECODE = 1
_MIXED_TOKENS = (16, 64, 256, 1024)
_FEW_ROWS = 8


def default_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[Bucket, ...]:
    """Shapes for these limits: 17 for the default configuration, smallest first.

    Decode steps come in powers of two. Steps with prefill chunks come in powers of four of tokens,
    each with few rows (one long prompt beside few others) and with as many rows as can run.
    """
    decode_rows = []
    rows = _SMALLEST_DECODE
    while rows < max_num_seqs:
        decode_rows.append(rows)
        rows *= 2
    decode_rows.append(max(max_num_seqs, _SMALLEST_DECODE))
    decodes = [Bucket(rows, rows, True) for rows in decode_rows]
    tokens = [count for count in _MIXED_TOKENS if count < max_num_batched_tokens]
    mixed = {
        Bucket(num_tokens, min(rows, num_tokens), False)
        for num_tokens in (*tokens, max_num_batched_tokens)
        for rows in (min(_FEW_ROWS, max_num_seqs), max_num_seqs)
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
        wide = [bucket for bucket in self._mixed if bucket.num_rows >= max_num_seqs]
        if not wide:
            raise ConfigError(f"no mixed bucket holds max_num_seqs ({max_num_seqs}) rows")
        self.max_num_tokens = min(max_num_batched_tokens, wide[-1].num_tokens)
        """Most tokens of a step, however many rows it has."""
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
