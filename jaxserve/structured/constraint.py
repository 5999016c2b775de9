"""One answer's progress through its grammar, and the masks of several.

Not thread-safe: the engine's thread owns a Constraint from the first token on.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

logger = logging.getLogger(__name__)

FEW = 4
"""So many masks are computed one after the other: handing them to threads costs more."""


class Constraint:
    """Follows the tokens of one answer.

    Args:
        matcher: at the start of its grammar, and nobody else's.
    """

    def __init__(self, matcher: "LLMatcher"):
        self.matcher = matcher
        self.is_over = False
        """The last token was one after which the grammar allows nothing but the end."""

    @property
    def has_failed(self) -> bool:
        """The grammar became too expensive to follow, or a token did not fit it."""
        return self.matcher.is_error()

    def advance(self, token_id: int) -> None:
        """Take the token that was sampled."""
        if not self.matcher.consume_token(token_id):
            logger.warning(
                "token %d ended a constrained answer: %s",
                token_id,
                self.matcher.get_error().splitlines()[:1],
            )
        self.is_over = self.matcher.is_stopped()


def fill_masks(
    executor: "LLExecutor | None",
    constraints: Sequence[Constraint],
    masks_rw: Int32[np.ndarray, "R W"],
) -> None:
    """Write what may follow into rows of `masks_rw`, in order; bit `id % 32` of word `id // 32`.

    Without an executor, one after the other.
    """
    assert masks_rw.flags.c_contiguous and len(constraints) <= len(masks_rw)
    num_bytes, address = masks_rw.strides[0], masks_rw.ctypes.data
    matchers = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
    if executor is None or len(matchers) <= FEW:
        for matcher, row in matchers:
            matcher.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)
    else:
        executor.unsafe_compute_mask_ptr(matchers, address, num_bytes, len(masks_rw))
