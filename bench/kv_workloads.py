"""Generators of block-name traces that differ in character; each is determined by its seed.

    shared_prompts   300 system prompts by popularity, a question of its own each time
    chat             conversations of a few turns with pauses for thought, many of one turn
    agents           few long conversations in quick succession, contexts that grow and grow
    documents        4,000 documents by popularity, one or two per question
    scans            popular prompts interrupted by bursts of prompts that never come again
    drift            popularity moves on through a catalogue
    loop             1,500 documents in turn, again and again: larger than any tested tier
    phases           all of the above but drift, one after the other
    mixed            chat, documents, shared prompts and scans at once

Written after the default policy was made, to judge it:

    long_chat        like chat, with ten turns, long pauses and more prompts of one turn
    tree             prompts of three parts by popularity, each part depending on those before
    flat             20,000 documents whose popularity differs little
    tides            two populations of prompts that take turns, and prompts that never come again

A request is a list of block names, head first.
"""

import bisect
import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence

Blocks = list[int]
Requests = list[Blocks]


class Source:
    """Random draws, and names that were not used before."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self._num_used = 0

    def fresh(self, num_blocks: int) -> Blocks:
        start = self._num_used
        self._num_used += num_blocks
        return list(range(start, self._num_used))

    def size(self, median: float, spread: float, low: int, high: int) -> int:
        """Log-normal, cut off."""
        return int(min(high, max(low, self.random.lognormvariate(math.log(median), spread))))

    def pieces(self, count: int, median: float, spread: float, low: int, high: int) -> Requests:
        return [self.fresh(self.size(median, spread, low, high)) for _ in range(count)]

    def rank(self, cumulative: Sequence[float]) -> int:
        return bisect.bisect(cumulative, self.random.random() * cumulative[-1])


def zipf(count: int, exponent: float) -> list[float]:
    """Cumulated weights of ranks."""
    return list(itertools.accumulate((rank + 1) ** -exponent for rank in range(count)))


def shared_prompts(seed: int = 1, num_requests: int = 12_000) -> Requests:
    source, ranks = Source(seed), zipf(300, 1.0)
    prompts = source.pieces(300, 8, 0.7, 2, 40)
    return [
        prompts[source.rank(ranks)] + source.fresh(source.size(8, 0.8, 1, 60))
        for _ in range(num_requests)
    ]


def _sessions(
    seed: int,
    num_requests: int,
    *,
    starts_per_s: float,
    mean_turns: float,
    pause_s: float,
    pause_spread: float,
    first_blocks: float,
    one_shot_share: float,
) -> Requests:
    source, ranks = Source(seed), zipf(20, 1.2)
    draw = source.random
    prompts = [source.fresh(draw.randint(1, 6)) for _ in range(20)]
    waiting: list[tuple[float, int, Blocks, int]] = []
    order = itertools.count()
    next_start_s = 0.0
    requests: Requests = []
    while len(requests) < num_requests:
        if not waiting or waiting[0][0] > next_start_s:
            now_s = next_start_s
            next_start_s += draw.expovariate(starts_per_s)
            context = prompts[source.rank(ranks)] + source.fresh(
                source.size(first_blocks, 1.0, 1, 200)
            )
            num_left = 0
            if draw.random() >= one_shot_share:
                num_left = 1 + int(math.log(1 - draw.random()) / math.log(1 - 1 / mean_turns))
        else:
            now_s, _, context, num_left = heapq.heappop(waiting)
        requests.append(context)
        if num_left:
            due_s = now_s + draw.lognormvariate(math.log(pause_s), pause_spread)
            grown = context + source.fresh(source.size(3, 0.8, 1, 200))
            heapq.heappush(waiting, (due_s, next(order), grown, num_left - 1))
    return requests


def chat(seed: int = 2, num_requests: int = 12_000) -> Requests:
    return _sessions(
        seed,
        num_requests,
        starts_per_s=3.0,
        mean_turns=4,
        pause_s=60,
        pause_spread=1.2,
        first_blocks=8,
        one_shot_share=0.3,
    )


def agents(seed: int = 3, num_requests: int = 12_000) -> Requests:
    return _sessions(
        seed,
        num_requests,
        starts_per_s=0.5,
        mean_turns=15,
        pause_s=8,
        pause_spread=1.0,
        first_blocks=12,
        one_shot_share=0.05,
    )


def documents(seed: int = 4, num_requests: int = 10_000) -> Requests:
    source, ranks = Source(seed), zipf(4000, 0.8)
    pieces = source.pieces(4000, 12, 0.6, 3, 60)
    system = source.fresh(3)
    second: dict[tuple[int, int], Blocks] = {}  # a block's name depends on all that precedes it
    requests: Requests = []
    for _ in range(num_requests):
        first = source.rank(ranks)
        context = system + pieces[first]
        if source.random.random() < 0.5:
            pair = (first, source.rank(ranks))
            if pair not in second:
                second[pair] = source.fresh(len(pieces[pair[1]]))
            context = context + second[pair]
        requests.append(context + source.fresh(source.random.randint(1, 3)))
    return requests


def scans(seed: int = 5, num_requests: int = 12_000) -> Requests:
    source, ranks = Source(seed), zipf(400, 0.7)
    draw = source.random
    prompts = source.pieces(400, 10, 0.5, 3, 30)
    requests: Requests = []
    while len(requests) < num_requests:
        for _ in range(draw.randint(50, 200)):
            requests.append(prompts[source.rank(ranks)] + source.fresh(2))
        requests += source.pieces(draw.randint(20, 150), 40, 0.5, 10, 120)
    return requests[:num_requests]


def drift(seed: int = 6, num_requests: int = 12_000) -> Requests:
    source, ranks = Source(seed), zipf(500, 0.9)
    pieces = source.pieces(6000, 10, 0.6, 2, 50)
    return [
        pieces[(7 * source.rank(ranks) + number // 3) % len(pieces)]
        + source.fresh(source.random.randint(1, 3))
        for number in range(num_requests)
    ]


def loop(seed: int = 7, num_requests: int = 8_000) -> Requests:
    source = Source(seed)
    pieces = [source.fresh(source.random.randint(5, 40)) for _ in range(1500)]
    return [pieces[number % len(pieces)] + source.fresh(1) for number in range(num_requests)]


def phases(seed: int = 8, num_requests: int = 24_000) -> Requests:
    parts = _parts(seed, num_requests, (chat, documents, loop, shared_prompts, scans, agents))
    return [request for part in parts for request in part]


def mixed(seed: int = 9, num_requests: int = 16_000) -> Requests:
    parts = _parts(seed, num_requests, (chat, documents, shared_prompts, scans))
    order = [index for index, part in enumerate(parts) for _ in part]
    random.Random(seed).shuffle(order)
    streams = [iter(part) for part in parts]
    return [next(streams[index]) for index in order]


def long_chat(seed: int = 77, num_requests: int = 12_000) -> Requests:
    return _sessions(
        seed,
        num_requests,
        starts_per_s=1.0,
        mean_turns=10,
        pause_s=300,
        pause_spread=1.6,
        first_blocks=4,
        one_shot_share=0.6,
    )


def tree(seed: int = 78, num_requests: int = 12_000) -> Requests:
    source = Source(seed)
    roots = source.pieces(20, 10, 0.4, 4, 30)
    ranks = (zipf(20, 0.9), zipf(60, 0.9), zipf(15, 1.1))
    branches: dict[tuple[int, ...], Blocks] = {}
    requests: Requests = []
    for _ in range(num_requests):
        root, branch, leaf = (source.rank(cumulative) for cumulative in ranks)
        for path, median in (((root, branch), 6), ((root, branch, leaf), 5)):
            if path not in branches:
                branches[path] = source.fresh(source.size(median, 0.6, 1, 30))
        context = roots[root] + branches[root, branch] + branches[root, branch, leaf]
        requests.append(context + source.fresh(source.size(2, 0.8, 1, 20)))
    return requests


def flat(seed: int = 79, num_requests: int = 15_000) -> Requests:
    source, ranks = Source(seed), zipf(20_000, 0.6)
    pieces = source.pieces(20_000, 14, 0.7, 2, 80)
    return [pieces[source.rank(ranks)] + source.fresh(1) for _ in range(num_requests)]


def tides(seed: int = 80, num_requests: int = 16_000) -> Requests:
    source, ranks = Source(seed), zipf(400, 0.9)
    populations = [source.pieces(400, 10, 0.5, 2, 40) for _ in range(2)]
    requests: Requests = []
    for number in range(num_requests):
        prompts = populations[number // 2000 % 2]
        is_popular = source.random.random() < 0.6
        head = prompts[source.rank(ranks)] if is_popular else []
        requests.append(head + source.fresh(source.size(6, 0.8, 1, 60)))
    return requests


def _parts(
    seed: int, num_requests: int, generators: Sequence[Callable[[int, int], Requests]]
) -> list[Requests]:
    """Equally many requests of each, with names that differ between them."""
    parts, base = [], 0
    for index, generate in enumerate(generators):
        part = generate(10 * seed + index, num_requests // len(generators))
        parts.append([[name + base for name in request] for request in part])
        base += 1 + max(max(request) for request in part)
    return parts


WORKLOADS: dict[str, Callable[..., Requests]] = {
    generate.__name__: generate
    for generate in (
        shared_prompts,
        chat,
        agents,
        documents,
        scans,
        drift,
        loop,
        phases,
        mixed,
        long_chat,
        tree,
        flat,
        tides,
    )
}
