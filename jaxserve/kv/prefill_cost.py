"""What it costs to compute positions, learnt from the steps that were served.

A step takes k + a * T + c * p seconds: T tokens of its padded bucket, p (query, key) pairs. The
three are fitted by least squares of relative errors, with forgetting; none is negative, and none
alone is more than some step took lately, so a step that was held up spoils little. What the data
leave open counts as tokens. Knows nothing of arrays, jax or queues.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FORGETTING = 0.98
"""Weight of all earlier steps when a new one is observed."""

NUM_RECENT = 64
"""Steps that bound the coefficients."""

_SCALE = np.array([1.0, 1.0, 1e-3])  # pairs are many; for the sake of the numbers
_RIDGE = np.diag([1e-3, 1e-6, 1e-4])  # of normalised columns: constant, tokens, pairs


class Steps(NamedTuple):
    """The steps in which positions would be computed: how many, and their padded tokens."""

    num_steps: int
    num_tokens: int


class Coefficients(NamedTuple):
    """Seconds per step, per token of its bucket, and per (query, key) pair."""

    per_step_s: float
    per_token_s: float
    per_pair_s: float


class PrefillCost:
    """Estimates of computing time.

    Args:
        steps: how so many positions are cut into steps; default: one step without padding.
    """

    def __init__(self, steps: Callable[[int], Steps] = lambda count: Steps(1, count)):
        self.num_observed = 0
        self._steps = steps
        self._squares = np.zeros((3, 3))
        self._products = np.zeros(3)
        self._bounds: deque[np.ndarray] = deque(maxlen=NUM_RECENT)
        self._fitted: Coefficients | None = Coefficients(0.0, 0.0, 0.0)

    def observe(self, num_tokens: int, num_pairs: float, seconds: float) -> None:
        """A step of a bucket with so many tokens, and with so many pairs, took this time."""
        size = max(num_tokens, 1)
        terms = np.array((1.0, size, num_pairs)) * _SCALE
        row = terms / size  # errors count in relation to size
        self._bounds.append(np.divide(seconds, terms, out=np.full(3, np.inf), where=terms > 0))
        self._squares = FORGETTING * self._squares + np.outer(row, row)
        self._products = FORGETTING * self._products + row * (seconds / size)
        self.num_observed += 1
        self._fitted = None

    @property
    def coefficients(self) -> Coefficients:
        """The fit as of now."""
        if self._fitted is None:
            self._fitted = self._fit()
        return self._fitted

    def _fit(self) -> Coefficients:
        """Settles one coefficient after the other, each within its bound, given those before."""
        most = np.min(self._bounds, axis=0)
        found = np.zeros(3)
        for column in range(3):
            rest = self._products - self._squares @ found
            solved = self._solve([i for i in range(column, 3) if self._squares[i, i] > 0], rest)
            found[column] = min(solved[column], most[column])
        return Coefficients(*(found * _SCALE).tolist())

    def _solve(self, columns: list[int], products: np.ndarray) -> np.ndarray:
        """Least squares in these columns; leaves out one after the other until none is negative."""
        found = np.zeros(3)
        while columns:
            size = np.sqrt(self._squares[columns, columns])
            chosen = np.ix_(columns, columns)
            normal = self._squares[chosen] / np.outer(size, size) + _RIDGE[chosen]
            solved = np.linalg.solve(normal, products[columns] / size) / size
            worst = int(np.argmin(solved))
            if solved[worst] >= 0:
                found[columns] = solved
                break
            del columns[worst]
        return found

    def seconds(self, start: int, end: int) -> float:
        """Estimate for computing the positions [start, end); 0 if nothing was observed."""
        if end <= start:
            return 0.0
        per_step_s, per_token_s, per_pair_s = self.coefficients
        num_steps, num_tokens = self._steps(end - start)
        num_pairs = (end * end - start * start) / 2
        return per_step_s * num_steps + per_token_s * num_tokens + per_pair_s * num_pairs
