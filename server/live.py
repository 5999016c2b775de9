"""The engine as people watch it: one JSON picture of now, and a feed of such pictures.

A picture has totals only: no prompts, names of blocks, tenants, folders or addresses, so that every
client of the API may see it. Counters are from the start of the engine; whoever wants rates takes
differences over `at_s`. However many watch, the engine is asked once per picture, and not at all
while nobody watches. Knows nothing of routes.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from jaxserve.config import Config
from jaxserve.errors import EngineDeadError, RequestError
from jaxserve.kv.stats import KVStats, StoreStats, TierStats
from jaxserve.kv.stores.stats import LATENCY_BOUNDS_S, OperationStats
from jaxserve.scheduler.stats import SchedulerStats
from jaxserve.server.streaming import sse

logger = logging.getLogger(__name__)

MAX_WATCHERS = 32
INTERVAL_S = 0.25
"""Between two pictures of a feed, at least."""

STILL_S = 2.0
"""A picture in which nothing has changed is sent as often as this."""

Picture = dict[str, Any]


def picture(
    config: Config,
    engine: SchedulerStats | None,
    kv: KVStats | None,
    num_live: int,
    at_s: float,
) -> Picture:
    """What is shown of a moment.

    Args:
        engine, kv: of the engine; None: it has none to tell.
        num_live: requests that the server has taken and not answered.
        at_s: seconds since the epoch.
    """
    scheduler = config.scheduler
    shown: Picture = {
        "at_s": at_s,
        "requests": {
            "live": num_live,
            "running": engine.num_running if engine else num_live,
            "waiting": engine.num_waiting if engine else 0,
            "max_running": scheduler.max_num_seqs,
            "max_waiting": scheduler.max_num_waiting,
        },
    }
    if engine is not None:
        shown["tokens"] = {
            "prefill": engine.scheduled_prefill_tokens,
            "decode": engine.scheduled_decode_tokens,
        }
        shown["steps"] = engine.num_steps
        shown["preemptions"] = engine.num_preemptions
        shown["recomputed_tokens"] = engine.recomputed_tokens
        shown["pages"] = [
            {"free": group.num_free, "cached": group.num_cached, "in_use": group.num_in_use}
            for group in engine.pages
        ]
    if kv is not None:
        shown["prompt_tokens"] = {
            "looked_up": kv.queried_tokens,
            "cached": dict(kv.hit_tokens),
        }
        stores = {store.name: store for store in kv.stores}
        shown["tiers"] = [_tier(tier, kv, stores) for tier in kv.tiers]
        shown["decisions"] = dict(kv.decisions)
        shown["moved_bytes"] = {
            "device_to_host": kv.saved_bytes,
            "host_to_device": kv.loaded_bytes,
        }
        shown["dropped_saves"] = kv.dropped_saves + kv.failed_saves
        shown["rejected_records"] = {
            verdict: count for verdict, count in kv.verdicts.items() if verdict != "ok"
        }
    return shown


def _tier(tier: TierStats, kv: KVStats, stores: Mapping[str, StoreStats]) -> Picture:
    shown: Picture = {
        "name": tier.name,
        "num_blocks": tier.num_blocks,
        "num_bytes": tier.num_bytes,
        "max_bytes": tier.max_bytes,
        "num_evicted": tier.num_evicted,
        "num_pinned": tier.num_pinned,
        "is_known": tier.is_known,
        "hit_tokens": kv.hit_tokens.get(tier.name, 0),
        "loaded_blocks": kv.loaded_blocks.get(tier.name, 0),
        "lost_blocks": kv.lost_blocks.get(tier.name, 0),
    }
    if tier.name in stores:
        worker = stores[tier.name].worker
        shown["store"] = {
            "bytes_read": worker.bytes_read,
            "bytes_written": worker.bytes_written,
            "load_bytes_per_s": worker.load_bytes_per_s,
            "write_bytes_per_s": worker.write_bytes_per_s,
            "queued": worker.queued_loads + worker.queued_writes,
            "dropped_writes": worker.dropped_writes,
            "failures": sum(
                one.failures + one.timeouts
                for one in (worker.probe, worker.get, worker.put, worker.alone)
            ),
            "load_breaker": str(worker.load_breaker),
            "write_breaker": str(worker.write_breaker),
            "get_p99_s": _p99(worker.get),
        }
    return shown


def _p99(stats: OperationStats) -> float | None:
    """Upper bound of the bucket that 99 % of calls do not exceed; None: no calls, or no bound."""
    wanted, seen = 0.99 * sum(stats.latency_counts), 0
    if not wanted:
        return None
    for bound_s, count in zip(LATENCY_BOUNDS_S, stats.latency_counts, strict=False):
        seen += count
        if seen >= wanted:
            return bound_s
    return None


class Watcher:
    """The frames that one client gets; gives its place back even if it never asks for one."""

    def __init__(self, frames: AsyncGenerator[bytes, None], places: "set[Watcher]"):
        self._frames = frames
        self._places = places

    def __aiter__(self) -> "Watcher":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._frames)
        except BaseException:  # it has ended, or is about to
            self._places.discard(self)
            raise

    async def aclose(self) -> None:
        self._places.discard(self)
        await self._frames.aclose()


class LiveFeed:
    """Hands the pictures of one engine to whoever watches; lives on one event loop.

    Args:
        read: takes a picture; raises EngineDeadError if there is nothing to see any more.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Picture]],
        *,
        max_watchers: int = MAX_WATCHERS,
        interval_s: float = INTERVAL_S,
    ):
        self._watchers: set[Watcher] = set()
        self._read = read
        self._max_watchers = max_watchers
        self._interval_s = interval_s
        self._next: asyncio.Future[bytes | None] | None = None
        self._sampler: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    def watch(self) -> "Watcher":
        """Server-sent events, one picture each: the first at once, then whenever it changes.

        Counts from now on, and until it is closed or has ended.

        Raises:
            RequestError: enough watch already.
        """
        if self.num_watchers >= self._max_watchers:
            raise RequestError(
                f"{self.num_watchers} watch this engine and {self._max_watchers} may; try again "
                "later, or ask /v1/kv/stat now and then",
                code="too_many_watchers",
            )
        watcher = Watcher(self._watch(), self._watchers)
        self._watchers.add(watcher)
        return watcher

    def close(self) -> None:
        """End every feed: the server is about to stop."""
        self._is_closed = True
        self._publish(None)

    async def _watch(self) -> AsyncGenerator[bytes, None]:
        try:
            if not self._is_closed:
                yield await self._frame()
            while not self._is_closed:
                if self._next is None:
                    self._next = asyncio.get_running_loop().create_future()
                if self._sampler is None:
                    self._sampler = asyncio.create_task(self._sample())
                frame = await asyncio.shield(self._next)
                if frame is None:
                    return
                yield frame
        except EngineDeadError as error:
            yield sse({"error": {"message": str(error), "code": "engine_dead"}})

    async def _frame(self) -> bytes:
        return sse(await self._read())

    async def _sample(self) -> None:
        """Take pictures for as long as anybody watches."""
        loop = asyncio.get_running_loop()
        last: Picture = {}
        sent_s = loop.time()
        try:
            while self.num_watchers and not self._is_closed:
                await asyncio.sleep(self._interval_s)
                try:
                    shown = await self._read()
                except EngineDeadError:
                    self._publish(None)
                    return
                except Exception:
                    logger.exception("no picture of the engine could be taken")
                    self._publish(None)  # nobody is to wait for what does not come
                    return
                is_still = {**shown, "at_s": 0} == {**last, "at_s": 0}
                if not is_still or loop.time() - sent_s >= STILL_S:
                    last, sent_s = shown, loop.time()
                    self._publish(sse(shown))
        finally:
            self._sampler = None

    def _publish(self, frame: bytes | None) -> None:
        waiting, self._next = self._next, None
        if waiting is not None and not waiting.done():
            waiting.set_result(frame)
