"""Runs measures on engines in turn (A B A B ...), and repeats what other processes disturbed."""

import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.peers.engines import Engine, EngineFailed
from bench.peers.machine import read_cpu_clock
from bench.peers.measures import Measure
from bench.peers.workload import Run

QUIET_SHARE = 0.05
"""A turn counts as quiet if other processes used at most this fraction of all CPUs meanwhile."""
SAMPLE_S = 0.5
MIN_TURN_S = 0.3
"""Shorter turns are not judged: the system counts CPU time in hundredths of a second."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's values in one round; `others_cpu` is None if it could not be told."""

    values: tuple[float, ...]
    others_cpu: float | None
    runs: tuple[Run, ...]

    @property
    def is_quiet(self) -> bool:
        return self.others_cpu is None or self.others_cpu <= QUIET_SHARE


@dataclass(slots=True)
class Outcome:
    """The turns that count, by engine, and how many were dropped."""

    measure: Measure
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    num_dropped: int = 0

    def values(self, engine: str, figure: int) -> list[float]:
        return [turn.values[figure] for turn in self.turns[engine]]

    def median(self, engine: str, figure: int) -> float:
        return statistics.median(self.values(engine, figure))

    @property
    def is_quiet(self) -> bool:
        return all(turn.is_quiet for turns in self.turns.values() for turn in turns)

    @property
    def others_cpu(self) -> float | None:
        """The worst of the turns that count."""
        shares = [turn.others_cpu for turns in self.turns.values() for turn in turns]
        known = [share for share in shares if share is not None]
        return max(known, default=None)


def run_measure(
    measure: Measure,
    engines: Sequence[Engine],
    way_of: Mapping[str, str],
    num_rounds: int,
    seed: int,
    patience_s: float,
) -> Outcome:
    """Rounds of turns; a disturbed round is dropped while enough are left to be had.

    A first round, which does not count, lets every engine compile, allocate and settle.
    Before each round it waits for a quiet moment, in all at most `patience_s` seconds. At most
    twice the rounds are run: then the least disturbed ones count, and the outcome says so.
    """
    rounds: list[dict[str, Turn]] = []
    for index in range(2 * num_rounds + 1):
        patience_s = wait_until_quiet(patience_s)
        turns = {
            engine.name: take_turn(measure, engine, way_of.get(engine.name, ""), (seed, index))
            for engine in engines
        }
        if index > 0:
            rounds.append(turns)
            print(_told(turns), file=sys.stderr, flush=True)
        if sum(all(t.is_quiet for t in turns.values()) for turns in rounds) >= num_rounds:
            break
    rounds.sort(key=_disturbance)
    kept = rounds[:num_rounds]
    return Outcome(
        measure,
        {engine.name: [turns[engine.name] for turns in kept] for engine in engines},
        num_dropped=len(rounds) - len(kept),
    )


def wait_until_quiet(patience_s: float) -> float:
    """Sleep until others leave the CPUs alone; the patience that is left. Engines are stopped."""
    while patience_s > 0:
        before = read_cpu_clock(set())
        time.sleep(SAMPLE_S)
        share = before.others_share(read_cpu_clock(set()))
        if share is None or share <= QUIET_SHARE:
            break
        patience_s -= SAMPLE_S
    return patience_s


def take_turn(measure: Measure, engine: Engine, way: str, seed: tuple[int, int]) -> Turn:
    """Wake an engine, let it do the batches of one round, and stop it again."""
    rng = random.Random(repr((measure.name, seed)))
    values, runs = [], []
    engine.thaw()
    try:
        before = read_cpu_clock({engine.session})
        for _ in range(measure.repeats):
            repeat = [engine.run(batch, way) for batch in measure.batches(rng)]
            values.append(measure.evaluate(repeat))
            runs += repeat
        after = read_cpu_clock({engine.session})
    finally:
        engine.freeze()
    share = before.others_share(after) if after.at_s - before.at_s >= MIN_TURN_S else None
    medians = tuple(statistics.median(column) for column in zip(*values, strict=True))
    return Turn(medians, share, tuple(runs))


def seconds_of_ways(measure: Measure, engine: Engine, ways: Sequence[str]) -> dict[str, float]:
    """How long each way of an engine takes for a measure, the faster of two goes.

    A way that fails is left out, with a word about it; if all fail, the last one's failure counts.
    """
    seconds: dict[str, float] = {}
    for way in ways:
        try:
            for go in range(2):
                start_s = time.perf_counter()
                take_turn(measure, engine, way, (go, -1))
                elapsed_s = time.perf_counter() - start_s
                seconds[way] = min(elapsed_s, seconds.get(way, elapsed_s))
        except EngineFailed as error:
            if way == ways[-1] and not seconds:
                raise
            print(f"left out: {error}", file=sys.stderr)
    return seconds


def _told(turns: dict[str, Turn]) -> str:
    """One line about a round."""
    parts = []
    for name, turn in turns.items():
        share = "" if turn.others_cpu is None else f" (others {turn.others_cpu:.0%})"
        parts.append(f"{name} {' '.join(f'{value:.4g}' for value in turn.values)}{share}")
    return "  " + ", ".join(parts)


def _disturbance(turns: dict[str, Turn]) -> float:
    return max(turn.others_cpu or 0.0 for turn in turns.values())
