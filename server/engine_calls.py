"""What can be asked of a running engine beside requests, by name: statistics, the KV tiers.

This is the engine's side, in whichever process that is. Arguments are JSON values; results are
JSON values too, but for `stats`. Calls may take long: they run on threads of their own and reach
the engine through its loop. Knows nothing of HTTP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.errors import RequestError
from jaxserve.kv.stats import KVStats
from jaxserve.llm import EngineLike, limits_of
from jaxserve.sampling_bounds import check_token_ids
from jaxserve.scheduler.stats import SchedulerStats
from jaxserve.server.engine_loop import EngineLoop

if TYPE_CHECKING:
    from jaxserve.engine.kv_admin import KVAdmin


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of one moment; None: the engine has none of that kind."""

    scheduler: SchedulerStats | None
    kv: KVStats | None


class EngineCalls:
    """The functions of one engine. A call is `calls(name, arguments)`."""

    def __init__(self, engine: EngineLike, loop: EngineLoop):
        self._engine = engine
        self._loop = loop
        self._kv = _kv_admin(engine, loop)
        self._functions: dict[str, Callable[..., Any]] = {
            "stats": self.stats,
            "kv_stat": lambda: self._tiers().stat().as_json(),
            "kv_ls": lambda limit, prefix: self._tiers().ls(limit, prefix).as_json(),
            "kv_verify": self._verify,
            "kv_clear": lambda tiers, stale: self._tiers().clear(tiers, stale).as_json(),
            "kv_pin": self._pin,
            "kv_erase": lambda cache_salt: self._tiers().erase(cache_salt).as_json(),
        }

    def __call__(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a function; for a thread that may wait.

        Raises:
            RequestError: the engine cannot do that, or an argument is wrong.
            EngineDeadError: it has stopped.
        """
        function = self._functions.get(name)
        if function is None:
            raise RequestError(f"the engine cannot {name!r:.60}", code="unsupported_engine")
        return function(**arguments)

    def stats(self) -> EngineStats:
        scheduler = getattr(self._engine, "stats", None)
        kv = getattr(self._engine, "kv_stats", None)
        return self._loop.run(lambda: EngineStats(scheduler and scheduler(), kv and kv()))

    def _tiers(self) -> "KVAdmin":
        if self._kv is None:
            raise RequestError("this engine has no KV tiers", code="unsupported_engine")
        return self._kv

    def _verify(self, recompute: int, prompts: list[Any] | None, seed: int | None) -> Any:
        return self._tiers().verify(recompute, prompts, seed).as_json()

    def _pin(self, hashes: list[str], prompt: Any, cache_salt: str, pinned: bool) -> Any:
        return self._tiers().pin(hashes, prompt, cache_salt, pinned).as_json()


def _kv_admin(engine: EngineLike, loop: EngineLoop) -> "KVAdmin | None":
    """The administration of the engine's tiers, if it is an engine that has any."""
    if not hasattr(engine, "tier_control"):
        return None
    from jaxserve.engine import Engine
    from jaxserve.engine.kv_admin import KVAdmin

    assert isinstance(engine, Engine)
    limits = limits_of(engine)

    def encode(prompt: Any) -> Sequence[int]:
        ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return check_token_ids(ids, "prompt", limits.vocab_size)

    return KVAdmin(engine, loop.run, loop.wait, encode)
