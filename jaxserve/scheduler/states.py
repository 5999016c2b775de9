"""Hidden states and logits of a step's result, collected for the requests that ask for them.

Knows nothing of pages or devices. A collector belongs to one sequence.
"""

from collections.abc import Iterable

import numpy as np

from jaxserve.plan import PrefillChunk, StatesWanted, StepResult
from jaxserve.types import Request, States


def collector_for(request: Request) -> "StateCollector | None":
    """What collects the states that a request wants; None if it wants none."""
    sampling = request.sampling
    if request.pooling is not None:
        return StateCollector(hidden=True, logits=False, prompt=False, pooling=request.pooling)
    if not (sampling.return_hidden_states or sampling.return_logits):
        return None
    return StateCollector(
        hidden=sampling.return_hidden_states,
        logits=sampling.return_logits,
        prompt=sampling.return_prompt_states,
        pooling=None,
    )


def states_wanted(collectors: "Iterable[StateCollector]") -> StatesWanted:
    """What a step must hand out so that each of these gets what it wants."""
    wanted = [collector.wanted for collector in collectors]
    return StatesWanted(*map(any, zip(*wanted, strict=True))) if wanted else StatesWanted()


class StateCollector:
    """Collects what one request wants.

    Positions of the prompt are kept in order, each once: a chunk that is computed again after a
    preemption adds nothing. For a mean only the sum is kept, so that one starts again from the
    first position (`must_not_resume`).
    """

    def __init__(self, *, hidden: bool, logits: bool, prompt: bool, pooling: str | None):
        self._is_mean = pooling == "mean"
        self._hidden: list[np.ndarray] | None = [] if prompt and hidden else None
        self._logits: list[np.ndarray] | None = [] if prompt and logits else None
        self._num_collected = 0
        self._sum: np.ndarray | None = None
        self.wanted = StatesWanted(
            row_hidden=hidden and not self._is_mean,
            row_logits=logits,
            token_hidden=self._is_mean or self._hidden is not None,
            token_logits=self._logits is not None,
        )

    @property
    def collects_prompt(self) -> bool:
        """Whether every position of the prompt is needed."""
        return self.wanted.token_hidden or self.wanted.token_logits

    @property
    def must_not_resume(self) -> bool:
        """Whether a preempted sequence has to compute everything again."""
        return self._is_mean

    def collect_prompt(self, chunk: PrefillChunk, result: StepResult, first_token: int) -> None:
        """Add the positions of a chunk, the first of which is token `first_token` of the step."""
        if not self.collects_prompt:
            return
        if self._is_mean and chunk.start == 0:
            self._num_collected, self._sum = 0, None
        skipped = self._num_collected - chunk.start
        if skipped < 0 or chunk.end <= self._num_collected:
            return
        tokens = slice(first_token + skipped, first_token + chunk.end - chunk.start)
        self._num_collected = chunk.end
        if self._is_mean:
            assert result.token_hidden is not None, "the plan wanted hidden states"
            total = result.token_hidden[tokens].sum(axis=0, dtype=np.float64)
            self._sum = total if self._sum is None else self._sum + total
        if self._hidden is not None:
            assert result.token_hidden is not None, "the plan wanted hidden states"
            self._hidden.append(result.token_hidden[tokens].copy())
        if self._logits is not None:
            assert result.token_logits is not None, "the plan wanted logits"
            self._logits.append(result.token_logits[tokens].copy())

    def take(self, result: StepResult, row: int) -> States:
        """What belongs to the token that a row sampled, and once the prompt's."""
        prompt_hidden = np.concatenate(self._hidden) if self._hidden else None
        prompt_logits = np.concatenate(self._logits) if self._logits else None
        if self.collects_prompt and not self._is_mean:
            self._hidden = self._logits = None
            self.wanted = self.wanted._replace(token_hidden=False, token_logits=False)
        hidden = logits = None
        if self._is_mean:
            assert self._sum is not None, "the whole prompt was computed"
            hidden = (self._sum / self._num_collected).astype(np.float32)
        elif self.wanted.row_hidden:
            assert result.hidden is not None, "the plan wanted hidden states"
            hidden = result.hidden[row].copy()
        if self.wanted.row_logits:
            assert result.logits is not None, "the plan wanted logits"
            logits = result.logits[row].copy()
        return States(hidden, logits, prompt_hidden, prompt_logits)
