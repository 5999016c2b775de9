"""More generators of block-name traces, to judge the default policy on what it was not made from.

Each is a family: seed, size and character are arguments, and WORKLOADS names the members that are
measured. From 10,000 to over a million blocks are referred to.

    zipf_*      prompts by popularity, of exponent 0.5 to 1.4, and a question of its own each time
    rag         questions with two chunks each from a catalogue that grows; new chunks are popular
    upheaval    popularity is dealt anew among the prompts every 1,500 requests
    rescans     loops over large sets of prompts, one after the other, beside popular prompts
    wonders     popular prompts, and bursts of prompts that never come again, of all lengths
    think_*     conversations; pauses are from seconds to hours, and many users never come back
    branches    agents on shared system prompts that fan out into sub-agents and go on from them
    tenants     customers with prompts of their own who come and go
    retries     each prompt comes again once or twice, after a while that differs little
    regimes     parts of the above, one after the other, and then again
    blend       parts of the above at once

Written after the gates of limited reach and the longer stay of keys used once, to judge them:

    edits       documents that are changed somewhere and sent again; the rest has new names
    jobs        many questions in a row on a document of the job's own, several jobs at once
    vogue       each request repeats one of the past, the late ones most, or brings a new prompt
    shifts      groups of prompts whose share of the traffic rises and falls, each with its phase

Written after trials of imitating other policies, to judge the balances as they were left:

    forum       threads that grow at the end and are read by many while they are young
    nights      chats by day; by night a batch goes over a set of documents once per question

A request is a list of block names, head first.
"""

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterator
from functools import partial

from bench.kv_workloads import Blocks, Requests, Source, zipf


def by_popularity(
    seed: int, num_requests: int, *, exponent: float, num_prompts: int, question: float = 4
) -> Requests:
    source, ranks = Source(seed), zipf(num_prompts, exponent)
    prompts = source.pieces(num_prompts, 10, 0.8, 1, 80)
    return [
        prompts[source.rank(ranks)] + source.fresh(source.size(question, 0.9, 1, 60))
        for _ in range(num_requests)
    ]


def rag(
    seed: int, num_requests: int, *, catalogue: int = 3000, requests_per_chunk: int = 8
) -> Requests:
    """A new chunk takes a random rank of popularity from an old one, which moves down a little."""
    source, ranks = Source(seed), zipf(catalogue, 0.9)
    draw = source.random
    system = source.fresh(4)
    by_rank = list(range(catalogue))
    sizes = [source.size(6, 0.5, 1, 30) for _ in by_rank]
    contexts: dict[tuple[int, ...], Blocks] = {}
    requests: Requests = []
    for number in range(num_requests):
        if number % requests_per_chunk == 0:
            by_rank.insert(int(catalogue * draw.random() ** 3), len(sizes))
            sizes.append(source.size(6, 0.5, 1, 30))
            by_rank.pop()
        path: tuple[int, ...] = ()
        request = system
        for _ in range(2):
            path = (*path, by_rank[source.rank(ranks)])
            if path not in contexts:  # a block's name depends on all that precedes it
                contexts[path] = source.fresh(sizes[path[-1]])
            request = request + contexts[path]
        requests.append(request + source.fresh(draw.randint(1, 4)))
    return requests


def upheaval(seed: int, num_requests: int, *, every: int = 1500) -> Requests:
    source, ranks = Source(seed), zipf(1200, 1.0)
    prompts = source.pieces(1200, 9, 0.7, 1, 60)
    requests: Requests = []
    for number in range(num_requests):
        if number % every == 0:
            source.random.shuffle(prompts)
        requests.append(prompts[source.rank(ranks)] + source.fresh(source.size(3, 0.8, 1, 30)))
    return requests


def rescans(seed: int, num_requests: int) -> Requests:
    source, ranks = Source(seed), zipf(600, 0.8)
    draw = source.random
    popular = source.pieces(600, 8, 0.6, 2, 40)
    requests: Requests = []
    while len(requests) < num_requests:
        scanned = source.pieces(draw.randint(200, 1200), 15, 0.6, 3, 60)
        for prompt in itertools.chain(*itertools.repeat(scanned, draw.randint(2, 5))):
            requests.append(prompt + source.fresh(1))
            if draw.random() < 0.7:
                requests.append(popular[source.rank(ranks)] + source.fresh(1))
    return requests[:num_requests]


def wonders(seed: int, num_requests: int) -> Requests:
    source, ranks = Source(seed), zipf(800, 0.9)
    prompts = source.pieces(800, 9, 0.7, 1, 50)
    requests: Requests = []
    while len(requests) < num_requests:
        for _ in range(source.size(60, 1.0, 5, 1000)):
            requests.append(prompts[source.rank(ranks)] + source.fresh(source.size(2, 0.7, 1, 20)))
        requests += source.pieces(source.size(15, 1.6, 1, 2000), 20, 1.0, 1, 200)
    return requests[:num_requests]


def think(
    seed: int, num_requests: int, *, starts_per_s: float, pause_s: float, leaves: float
) -> Requests:
    """Pauses are Pareto with exponent 1.1, from `pause_s`; after each turn a share leaves."""
    source, ranks = Source(seed), zipf(40, 1.0)
    draw = source.random
    prompts = source.pieces(40, 4, 0.8, 1, 30)
    waiting: list[tuple[float, int, Blocks]] = []
    order, requests = itertools.count(), Requests()
    start_s = 0.0
    while len(requests) < num_requests:
        if waiting and waiting[0][0] <= start_s:
            now_s, _, context = heapq.heappop(waiting)
        else:
            now_s, context = start_s, prompts[source.rank(ranks)]
            start_s += draw.expovariate(starts_per_s)
        context = context + source.fresh(source.size(4, 1.0, 1, 100))
        requests.append(context)
        if draw.random() >= leaves:
            due_s = now_s + pause_s * draw.paretovariate(1.1)
            heapq.heappush(waiting, (due_s, next(order), context))
    return requests


def branches(seed: int, num_requests: int, *, num_at_once: int = 12) -> Requests:
    """Agents take turns at random; each step may fan out, and the next step reads the answers."""
    source, ranks = Source(seed), zipf(12, 0.8)
    draw = source.random
    systems = source.pieces(12, 12, 0.5, 4, 40)

    def agent() -> Iterator[Blocks]:
        context = systems[source.rank(ranks)] + source.fresh(source.size(3, 0.8, 1, 30))
        for _ in range(source.size(8, 0.8, 1, 60)):
            yield context
            if draw.random() < 0.2:
                children = [context + source.fresh(2) for _ in range(draw.randint(2, 6))]
                for _ in range(draw.randint(1, 4)):
                    for index, child in enumerate(children):
                        yield child
                        children[index] = child + source.fresh(source.size(2, 0.6, 1, 12))
            context = context + source.fresh(source.size(3, 0.9, 1, 50))

    running = [agent() for _ in range(num_at_once)]
    requests: Requests = []
    while len(requests) < num_requests:
        index = draw.randrange(num_at_once)
        step = next(running[index], None)
        if step is None:
            running[index] = agent()
        else:
            requests.append(step)
    return requests


def tenants(seed: int, num_requests: int) -> Requests:
    source, ranks = Source(seed), zipf(60, 0.8)
    draw = source.random
    active: list[tuple[Blocks, Requests]] = []
    requests: Requests = []
    for number in range(num_requests):
        if number % 400 == 0:
            tenant = source.fresh(source.size(10, 0.5, 3, 30)), source.pieces(60, 8, 0.8, 1, 60)
            active.insert(draw.randint(0, len(active)), tenant)
            del active[10:]
        system, examples = active[min(len(active) - 1, int(draw.expovariate(0.4)))]
        question = source.fresh(source.size(5, 0.8, 1, 50))
        requests.append(system + examples[source.rank(ranks)] + question)
    return requests


def retries(seed: int, num_requests: int, *, lag: int = 600) -> Requests:
    source = Source(seed)
    draw = source.random
    waiting: list[tuple[float, int, Blocks, int]] = []
    order, requests = itertools.count(), Requests()
    while len(requests) < num_requests:
        now = len(requests)
        if waiting and waiting[0][0] <= now:
            _, _, prompt, num_left = heapq.heappop(waiting)
        else:
            prompt, num_left = source.fresh(source.size(12, 0.8, 1, 100)), draw.choice((0, 1, 1, 2))
        requests.append(prompt)
        if num_left:
            due = now + lag * draw.lognormvariate(0, 0.4)
            heapq.heappush(waiting, (due, next(order), prompt, num_left - 1))
    return requests


def regimes(seed: int, num_requests: int) -> Requests:
    return [request for part in _parts(seed, num_requests, 10) for request in part]


def blend(seed: int, num_requests: int) -> Requests:
    parts = _parts(seed, num_requests, 5)
    order = [index for index, part in enumerate(parts) for _ in part]
    random.Random(seed).shuffle(order)
    streams = [iter(part) for part in parts]
    return [next(streams[index]) for index in order]


def edits(seed: int, num_requests: int, *, num_open: int = 120) -> Requests:
    """A few of the open documents get most of the changes; now and then one is closed."""
    source, ranks = Source(seed), zipf(num_open, 0.9)
    draw = source.random
    system = source.fresh(5)
    documents = source.pieces(num_open, 14, 0.8, 2, 80)
    requests: Requests = []
    for _ in range(num_requests):
        index = source.rank(ranks)
        if draw.random() < 0.02:
            documents[index] = source.fresh(source.size(14, 0.8, 2, 80))
        document = documents[index]
        kept = int(len(document) * draw.random() ** 0.4)
        documents[index] = document[:kept] + source.fresh(len(document) - kept)
        requests.append(system + documents[index])
    return requests


def jobs(seed: int, num_requests: int, *, num_at_once: int = 25) -> Requests:
    """Sizes of jobs differ by orders of magnitude; between them come chats of one turn."""
    source, ranks = Source(seed), zipf(num_at_once, 0.7)
    draw = source.random
    systems = source.pieces(8, 6, 0.5, 2, 20)

    def job() -> tuple[Blocks, int]:
        document = draw.choice(systems) + source.fresh(source.size(15, 0.9, 2, 150))
        return document, source.size(12, 1.4, 1, 800)

    running = [job() for _ in range(num_at_once)]
    requests: Requests = []
    while len(requests) < num_requests:
        if draw.random() < 0.25:
            requests.append(draw.choice(systems) + source.fresh(source.size(5, 1.0, 1, 80)))
            continue
        index = source.rank(ranks)
        document, num_left = running[index]
        requests.append(document + source.fresh(draw.randint(1, 3)))
        running[index] = (document, num_left - 1) if num_left > 1 else job()
    return requests


def vogue(seed: int, num_requests: int, *, new: float = 0.15) -> Requests:
    """How far back a request repeats is log-uniform, so that what is repeated is repeated more."""
    source = Source(seed)
    draw = source.random
    prompts = [source.fresh(8)]
    for _ in range(num_requests - 1):
        if draw.random() < new:
            prompts.append(source.fresh(source.size(9, 0.8, 1, 80)))
        else:
            prompts.append(prompts[-int(len(prompts) ** draw.random())])
    return [prompt + source.fresh(draw.randint(1, 3)) for prompt in prompts]


def shifts(seed: int, num_requests: int, *, num_groups: int = 8, period: int = 4000) -> Requests:
    source, ranks = Source(seed), zipf(150, 0.8)
    groups = [source.pieces(150, 9, 0.7, 1, 60) for _ in range(num_groups)]
    requests: Requests = []
    for number in range(num_requests):
        phases = (number / period - index / num_groups for index in range(num_groups))
        shares = itertools.accumulate(math.exp(3 * math.cos(math.tau * phase)) for phase in phases)
        prompt = groups[source.rank(list(shares))][source.rank(ranks)]
        requests.append(prompt + source.fresh(source.size(3, 0.9, 1, 40)))
    return requests


def forum(seed: int, num_requests: int, *, num_open: int = 400) -> Requests:
    """A reader asks about a whole thread; the longer a thread, the likelier it is to get longer."""
    source = Source(seed)
    draw = source.random
    system = source.fresh(3)
    threads = source.pieces(num_open, 4, 0.7, 1, 30)
    requests: Requests = []
    for _ in range(num_requests):
        index = max(draw.randrange(num_open), draw.randrange(num_open))
        if draw.random() < 0.3:
            threads[index] = threads[index] + source.fresh(source.size(1, 0.7, 1, 6))
        if draw.random() < 0.06:
            del threads[draw.randrange(num_open)]
            threads.append(source.fresh(source.size(4, 0.7, 1, 30)))
            index = num_open - 1
        requests.append(system + threads[index] + source.fresh(source.size(1, 0.8, 1, 10)))
    return requests


def nights(seed: int, num_requests: int, *, day: int = 1500) -> Requests:
    source = Source(seed)
    draw = source.random
    requests: Requests = []
    chats = source.pieces(60, 6, 0.8, 1, 60)
    while len(requests) < num_requests:
        for _ in range(day):
            index = int(draw.expovariate(0.08)) % len(chats)
            chats[index] = chats[index] + source.fresh(source.size(2, 0.8, 1, 30))
            requests.append(chats[index])
            if draw.random() < 0.12:
                chats[index] = source.fresh(source.size(6, 0.8, 1, 60))
        documents = source.pieces(draw.randint(100, 500), 18, 0.7, 3, 100)
        for _ in range(draw.randint(1, 4)):
            requests += [document + source.fresh(1) for document in documents]
    return requests[:num_requests]


def _parts(seed: int, num_requests: int, num_parts: int) -> list[Requests]:
    """Equally many requests of five families in turn, with names that differ between them."""
    generators: tuple[Callable[[int, int], Requests], ...] = (
        partial(by_popularity, exponent=0.8, num_prompts=2000),
        rescans,
        partial(think, starts_per_s=1.0, pause_s=20.0, leaves=0.2),
        rag,
        branches,
    )
    parts, base = [], 0
    for index in range(num_parts):
        generate = generators[index % len(generators)]
        part = generate(100 * seed + index, num_requests // num_parts)
        parts.append([[name + base for name in request] for request in part])
        base += 1 + max(map(max, part))
    return parts


TRACES: dict[str, Callable[[], Requests]] = {
    "zipf_flat": partial(by_popularity, 501, 20_000, exponent=0.5, num_prompts=8000),
    "zipf_small": partial(by_popularity, 502, 650, exponent=0.8, num_prompts=200),
    "zipf_large": partial(by_popularity, 503, 60_000, exponent=1.0, num_prompts=30_000),
    "zipf_steep": partial(by_popularity, 504, 12_000, exponent=1.4, num_prompts=5000),
    "rag": partial(rag, 505, 14_000),
    "rag_fast": partial(rag, 506, 14_000, requests_per_chunk=2),
    "upheaval": partial(upheaval, 507, 18_000),
    "rescans": partial(rescans, 508, 16_000),
    "wonders": partial(wonders, 509, 14_000),
    "think_brief": partial(think, 510, 9_000, starts_per_s=2.0, pause_s=15.0, leaves=0.3),
    "think_long": partial(think, 511, 22_000, starts_per_s=0.5, pause_s=90.0, leaves=0.08),
    "branches": partial(branches, 512, 6_000),
    "tenants": partial(tenants, 513, 14_000),
    "retries": partial(retries, 514, 15_000),
    "regimes": partial(regimes, 515, 25_000),
    "blend": partial(blend, 516, 15_000),
    "edits": partial(edits, 517, 8_000),
    "jobs": partial(jobs, 518, 7_000),
    "vogue": partial(vogue, 519, 12_000),
    "shifts": partial(shifts, 520, 11_000),
    "forum": partial(forum, 521, 12_000),
    "nights": partial(nights, 522, 10_000),
}
