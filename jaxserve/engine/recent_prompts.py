"""Token ids of recent prompts, so that their blocks can be computed again and compared.

In memory only, bounded, and nothing of requests that said no-store: a block's name tells nothing of
its tokens, so without this (or the prompts themselves) no block could be checked against the model.
Knows nothing of blocks.
"""

from array import array
from collections import OrderedDict
from typing import NamedTuple

from jaxserve.types import Request

MAX_PROMPTS = 256
MAX_TOKENS = 1 << 20
"""Of all remembered prompts together: 4 MiB."""


class KnownPrompt(NamedTuple):
    """A prompt and whose it is."""

    token_ids: array
    cache_salt: str


class RecentPrompts:
    """The latest prompts; the oldest are forgotten first."""

    def __init__(self, max_prompts: int = MAX_PROMPTS, max_tokens: int = MAX_TOKENS):
        self._max_prompts, self._max_tokens = max_prompts, max_tokens
        self._prompts: OrderedDict[tuple[str, int], KnownPrompt] = OrderedDict()
        self._num_tokens = 0

    def note(self, request: Request) -> None:
        """Remember a request's prompt, unless it said no-store."""
        ids = request.prompt_ids
        if request.no_store or len(ids) > self._max_tokens:
            return
        key = (request.cache_salt, hash(ids))
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return
        self._prompts[key] = KnownPrompt(array("i", ids), request.cache_salt)
        self._num_tokens += len(ids)
        while len(self._prompts) > self._max_prompts or self._num_tokens > self._max_tokens:
            _, oldest = self._prompts.popitem(last=False)
            self._num_tokens -= len(oldest.token_ids)

    def all(self) -> list[KnownPrompt]:
        """Every prompt that is remembered."""
        return list(self._prompts.values())

    def forget(self, cache_salt: str | None = None) -> None:
        """Forget the prompts of a salt, or all."""
        for key in [key for key in self._prompts if cache_salt in (None, key[0])]:
            self._num_tokens -= len(self._prompts.pop(key).token_ids)
