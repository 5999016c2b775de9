"""What is asked, how long the answers shall be, and when: sessions of one or more turns.

Every workload is a function of its options and a seed. Mooncake's traces name the blocks of each
prompt; equal names become equal pieces of prompt, so that a prefix cache sees what the trace saw.
Knows nothing of HTTP or clocks.
"""

import gzip
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxserve.benchmarks.filler import Filler
from jaxserve.errors import ConfigError

Prompt: TypeAlias = str | Sequence[int]

WORKLOADS = ("random", "shared-prefix", "multi-turn", "trace", "sharegpt")
MAX_REQUESTS = 10_000_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        prompt: what it adds to the turns before it.
        num_input_tokens: what `prompt` was made to have; the server counts for itself.
    """

    prompt: Prompt
    num_input_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that follow each other; all but the first wait for the answer before.

    Attributes:
        at_s: when the first turn is sent, counted from the start.
        think_s: pause before each later turn.
    """

    turns: tuple[Turn, ...]
    at_s: float = 0.0
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How much is asked.

    Attributes:
        range_ratio: lengths are drawn from [1 - ratio, 1 + ratio] times what is asked for.
        num_prefixes: of the shared-prefix workload; every prompt begins with one of them.
        num_turns, think_s: of the multi-turn workload.
    """

    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 256
    num_prefixes: int = 10
    num_turns: int = 5
    think_s: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What does not fit into the model's context is left out and counted."""

    max_model_len: int | None = None
    left_out: list[int] = field(default_factory=list)

    def admits(self, num_input: int, num_output: int) -> bool:
        if self.max_model_len is None or num_input + num_output <= self.max_model_len:
            return True
        self.left_out.append(num_input + num_output)
        return False


def random_prompts(shape: Shape, filler: Filler, *, as_ids: bool) -> list[Session]:
    """Prompts that share nothing."""
    rng = random.Random(shape.seed)
    return [
        Session((_turn(filler, _around(shape.input_len, shape, rng), shape, rng, as_ids),))
        for _ in range(shape.num_prompts)
    ]


def shared_prefixes(shape: Shape, filler: Filler, *, as_ids: bool) -> list[Session]:
    """Each prompt is one of a few prefixes and a suffix of its own, in random order."""
    rng = random.Random(shape.seed)
    prefixes = [_piece(filler, shape.prefix_len, rng, as_ids) for _ in range(shape.num_prefixes)]
    order = [index % shape.num_prefixes for index in range(shape.num_prompts)]
    rng.shuffle(order)
    sessions = []
    for index in order:
        turn = _turn(filler, _around(shape.input_len, shape, rng), shape, rng, as_ids)
        prompt: Any = prefixes[index] + turn.prompt  # both are text, or both are ids
        total = turn.num_input_tokens + shape.prefix_len
        sessions.append(Session((replace(turn, prompt=prompt, num_input_tokens=total),)))
    return sessions


def multi_turn(shape: Shape, filler: Filler) -> list[Session]:
    """Conversations: the first turn brings `prefix_len` tokens more than the others.

    `num_prompts` counts requests, so there are `num_prompts / num_turns` conversations.
    """
    rng = random.Random(shape.seed)
    sessions = []
    left = shape.num_prompts
    while left > 0:
        turns = []
        for index in range(min(shape.num_turns, left)):
            extra = shape.prefix_len if index == 0 else 0
            num_tokens = _around(shape.input_len, shape, rng) + extra
            turns.append(_turn(filler, num_tokens, shape, rng, as_ids=False))
        left -= len(turns)
        sessions.append(Session(tuple(turns), think_s=shape.think_s))
    return sessions


def replay(
    path: str | Path,
    filler: Filler,
    limits: Limits,
    *,
    num_prompts: int | None = None,
    speed: float = 1.0,
    length_scale: float = 1.0,
    block_tokens: int = 512,
    seed: int = 0,
    as_ids: bool,
) -> list[Session]:
    """A trace of Mooncake's kind: timestamp (ms), input_length, output_length, hash_ids.

    Args:
        speed: 2 sends twice as fast.
        length_scale: of prompts, answers and blocks, for models with a shorter context.

    Raises:
        ConfigError: the file cannot be read, or a line is not of a trace.
    """
    num_block = max(1, round(block_tokens * length_scale))
    blocks: dict[Any, Any] = {}

    def block(name: Any) -> Any:
        if name not in blocks:
            blocks[name] = _piece(filler, num_block, random.Random(f"{seed}/{name}"), as_ids)
        return blocks[name]

    sessions: list[Session] = []
    start_ms: float | None = None
    for line, record in _json_lines(path):
        entry = _trace_entry(record, f"{path}:{line}")
        num_input = max(1, round(entry.num_input * length_scale))
        num_output = max(1, round(entry.num_output * length_scale))
        if not limits.admits(num_input, num_output):
            continue
        start_ms = entry.at_ms if start_ms is None else start_ms
        names = list(entry.names)[: -(-num_input // num_block)]
        missing = -(-num_input // num_block) - len(names)
        names += [f"own/{line}/{index}" for index in range(missing)]  # the trace named too few
        whole = [block(name) for name in names[:-1]]
        num_last = num_input - num_block * (len(names) - 1)
        last = _beginning(block(names[-1]), num_last, num_block)
        prompt: Any = "".join([*whole, last]) if isinstance(last, str) else sum([*whole, last], [])
        at_s = max(0.0, (entry.at_ms - start_ms) / 1000 / speed)
        sessions.append(Session((Turn(prompt, num_input, num_output),), at_s))
        if num_prompts is not None and len(sessions) >= num_prompts:
            break
    return sessions


def sharegpt(
    path: str | Path,
    filler: Filler,
    limits: Limits,
    *,
    num_prompts: int,
    output_len: int | None,
    seed: int,
) -> list[Session]:
    """The first question of each conversation of a file; its answer's length, unless one is given.

    Raises:
        ConfigError: the file cannot be read, or holds no conversations.
    """
    content = _read_json(path)
    pairs = list(_first_turns(content if isinstance(content, list) else []))
    if not pairs:
        raise ConfigError(
            f"{path} holds no conversations; expected a JSON list of objects with "
            '"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
        )
    random.Random(seed).shuffle(pairs)
    sessions = []
    for question, answer in pairs:
        num_input = filler.count(question)
        num_output = output_len or filler.count(answer)
        if limits.admits(num_input, num_output):
            sessions.append(Session((Turn(question, num_input, num_output),)))
        if len(sessions) >= num_prompts:
            break
    return sessions


def arriving(
    sessions: Sequence[Session], rate: float, burstiness: float, seed: int
) -> list[Session]:
    """The same sessions at random times: gaps are gamma distributed, and average 1 / rate.

    Args:
        rate: requests (of multi-turn: conversations) per second; infinite sends all at once.
        burstiness: shape of the distribution: 1 is a Poisson process, less is burstier.
    """
    if not np.isfinite(rate):
        return [replace(session, at_s=0.0) for session in sessions]
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), len(sessions))
    times = np.cumsum(gaps)
    if len(times) and times[-1] > 0:
        times *= len(times) / rate / times[-1]  # the mean of this sample, too
    return [replace(s, at_s=float(at)) for s, at in zip(sessions, times, strict=True)]


@dataclass(frozen=True, slots=True)
class _TraceEntry:
    at_ms: float
    num_input: int
    num_output: int
    names: Sequence[Any]


def _trace_entry(record: Any, place: str) -> _TraceEntry:
    expected = "a request with timestamp, input_length, output_length and hash_ids"
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is not {expected}")
    try:
        at_ms, names = float(record["timestamp"]), record["hash_ids"]
        num_input, num_output = int(record["input_length"]), int(record["output_length"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{place} is not {expected}: {error!r}") from error
    if not isinstance(names, list) or num_input < 0 or num_output < 0 or not np.isfinite(at_ms):
        raise ConfigError(f"{place} is not {expected}")
    return _TraceEntry(at_ms, num_input, num_output, names)


def _turn(filler: Filler, num_tokens: int, shape: Shape, rng: random.Random, as_ids: bool) -> Turn:
    prompt = _piece(filler, num_tokens, rng, as_ids)
    return Turn(prompt, num_tokens, _around(shape.output_len, shape, rng))


def _piece(filler: Filler, num_tokens: int, rng: random.Random, as_ids: bool) -> Any:
    return filler.ids(num_tokens, rng) if as_ids else filler.text(num_tokens, rng)


def _beginning(piece: Any, num_tokens: int, num_whole: int) -> Any:
    if not isinstance(piece, str):
        return piece[:num_tokens]
    words = piece.split(" ")
    return " ".join(words[: max(2, round(len(words) * num_tokens / num_whole))])


def _around(number: int, shape: Shape, rng: random.Random) -> int:
    low, high = (int(number * (1 + sign * shape.range_ratio)) for sign in (-1, 1))
    return max(1, rng.randint(low, max(low, high)))


def _first_turns(conversations: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for entry in conversations:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        question, answer = values
        if isinstance(question, str) and isinstance(answer, str) and question and answer:
            yield question, answer


def _open(path: str | Path) -> Any:
    opener = gzip.open if str(path).endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8")


def _json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise ConfigError(f"{path}:{number} is not JSON: {error}") from error
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _read_json(path: str | Path) -> Any:
    try:
        with _open(path) as file:
            return json.load(file)
    except (OSError, EOFError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
