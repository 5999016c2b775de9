"""A device that executes step plans on page contents that can be checked.

Each page place holds, instead of a key and value, a digest of all tokens up to that position. A
query is right if the pages that it sees hold the digests of its own history. The next token is a
function of that digest, so the answer to a prompt does not depend on who else runs.
"""

from collections.abc import Callable

import numpy as np

from jaxserve.kv.transfer_plan import TransferPlan
from jaxserve.plan import NO_STEP, StepPlan, StepResult
from jaxserve.types import KVGroup

VOCAB = 97
_PRIME = (1 << 61) - 1


def extend_digests(digests: list[int], token_ids) -> None:
    """Append the digest of each prefix that ends in one more of `token_ids`."""
    last = digests[-1] if digests else 7
    for token_id in token_ids:
        last = (last * 1_000_003 + token_id + 1) % _PRIME
        digests.append(last)


def next_token(digest: int, salt: int) -> int:
    """What the fake model says after the tokens of `digest`; `salt` stands for the seed."""
    return (digest ^ (salt * 0x9E3779B97F4A7C15)) % 1_000_000_007 % VOCAB


def answer(prompt_ids, salt: int, max_tokens: int, stop_ids=()) -> list[int]:
    """The whole answer to a prompt, computed alone."""
    digests: list[int] = []
    extend_digests(digests, prompt_ids)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(next_token(digests[-1], salt))
        extend_digests(digests, tokens[-1:])
        if tokens[-1] in stop_ids:
            break
    return tokens


class FakeDevice:
    """Pages, page tables, last tokens and histories, as the real device state has them."""

    def __init__(self, kv_groups: tuple[KVGroup, ...], num_pages, page_size: int, num_slots: int):
        self.page_size = page_size
        self.windows = [group.cache.window for group in kv_groups]
        self.pools = [np.full((count, page_size), -1, np.int64) for count in num_pages]
        self.tables = [np.full((num_slots, 4096), -1, np.int64) for _ in kv_groups]
        self.last_tokens = [-1] * num_slots
        self.salts = [0] * num_slots
        self.histories: list[list[int]] = [[] for _ in range(num_slots)]
        self.num_queries = 0
        self.transfers: Callable[[TransferPlan, list[np.ndarray]], None] | None = None

    def run(self, plan: StepPlan) -> StepResult:
        """Execute a plan; AssertionError if a query would see a wrong key."""
        if self.transfers is not None:
            self.transfers(plan.transfers, self.pools)
        bucket = plan.bucket
        assert plan.num_rows <= bucket.num_rows and plan.num_tokens <= bucket.num_tokens
        assert bucket.is_decode == (not plan.prefills)
        for load in plan.slot_loads:
            self._load(load)
        if bucket == NO_STEP:
            assert not any(len(updates.slots) for updates in plan.page_updates)
            return StepResult(np.zeros(0, np.int32))
        for table, updates in zip(self.tables, plan.page_updates, strict=True):
            limit = bucket.num_rows + bucket.num_tokens // self.page_size
            assert len(updates.slots) <= limit, "more page updates than the bucket has room for"
            table[updates.slots, updates.indices] = updates.pages
        rows = [
            (slot, position, [self.last_tokens[slot]], True)
            for slot, position in zip(
                plan.decode_slots.tolist(), plan.decode_positions.tolist(), strict=True
            )
        ]
        rows += [(c.slot, c.start, c.token_ids.tolist(), c.samples) for c in plan.prefills]
        assert len({row[0] for row in rows}) == len(rows), "a slot has two rows"
        written: list[set[int]] = [set() for _ in self.pools]
        for slot, start, tokens, _ in rows:
            self._write(slot, start, tokens, written)
        for slot, start, tokens, _ in rows:
            self._check_reads(slot, start, start + len(tokens))
        token_ids = np.full(len(rows), -7, np.int32)
        for row, (slot, start, tokens, samples) in enumerate(rows):
            if samples:
                digest = self.histories[slot][start + len(tokens) - 1]
                self.last_tokens[slot] = token_ids[row] = next_token(digest, self.salts[slot])
        return StepResult(token_ids, **self._logprobs(plan, rows, token_ids))

    def _load(self, load) -> None:
        self.salts[load.slot] = load.sampling.seed
        self.histories[load.slot] = []
        extend_digests(self.histories[load.slot], load.token_ids.tolist())
        for table, pages in zip(self.tables, load.page_rows, strict=True):
            table[load.slot] = -1
            table[load.slot, : len(pages)] = pages

    def _write(self, slot: int, start: int, tokens: list[int], written: list[set[int]]) -> None:
        history = self.histories[slot]
        assert start <= len(history), "a query beyond the tokens that the slot has seen"
        digests = history[:start]
        extend_digests(digests, tokens)
        end = min(len(digests), len(history))
        assert digests[start:end] == history[start:end], "tokens differ from those loaded"
        history += digests[len(history) :]
        positions = np.arange(start, start + len(tokens))
        for pool, table, places in zip(self.pools, self.tables, written, strict=True):
            pages = table[slot, positions // self.page_size]
            assert (pages >= 0).all() and (pages < len(pool)).all(), "a write without a page"
            offsets = positions % self.page_size
            for place in (pages * self.page_size + offsets).tolist():
                assert place not in places, "two rows write to the same place"
                places.add(place)
            pool[pages, offsets] = digests[start:]

    def _check_reads(self, slot: int, start: int, end: int) -> None:
        self.num_queries += end - start
        for pool, table, window in zip(self.pools, self.tables, self.windows, strict=True):
            first = 0 if window is None else max(0, start - window + 1)
            positions = np.arange(first, end)
            seen = pool[table[slot, positions // self.page_size], positions % self.page_size]
            expected = np.array(self.histories[slot][first:end], np.int64)
            wrong = np.flatnonzero(seen != expected)
            assert not wrong.size, (
                f"slot {slot}, queries [{start}, {end}), window {window}: wrong keys at "
                f"positions {(wrong + first).tolist()}"
            )

    def _logprobs(self, plan: StepPlan, rows, token_ids) -> dict:
        """Values from which a test can tell token and position: -(token + position / 1000)."""
        found = {}
        if plan.wants_logprobs:
            ends = np.array([start + len(tokens) for _, start, tokens, _ in rows])
            found["logprobs"] = -(token_ids + ends / 1000)
            found["top_ids"] = token_ids[:, None] + np.arange(20)
            found["top_logprobs"] = -(found["top_ids"] + ends[:, None] / 1000)
        if plan.wants_prompt_logprobs:
            targets = [np.full(plan.num_decodes, -1)]
            targets += [
                np.full(c.end - c.start, -1) if c.targets is None else c.targets
                for c in plan.prefills
            ]
            starts = [plan.decode_positions, *(np.arange(c.start, c.end) for c in plan.prefills)]
            target, ends = np.concatenate(targets), np.concatenate(starts) + 1
            found["prompt_logprobs"] = -(target + ends / 1000)
            found["prompt_top_ids"] = target[:, None] + np.arange(20)
            found["prompt_top_logprobs"] = -(found["prompt_top_ids"] + ends[:, None] / 1000)
        return found
