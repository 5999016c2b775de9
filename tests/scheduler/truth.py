"""What each block must hold, whoever computed it, and whether all tiers hold just that."""

import numpy as np

from jaxserve.kv.blocks import BlockHash, block_hashes, salted_root
from jaxserve.types import Request
from tests.scheduler.fake_device import answer, extend_digests
from tests.scheduler.simulation import ROOT, Simulation


class Truth:
    """The content of every block that the requests of a test can have.

    Args:
        page_size: tokens per block.
    """

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._content: dict[BlockHash, list[int]] = {}

    def note(self, request: Request) -> None:
        """Take in a request's prompt and its answer, and what would follow a stop token."""
        sampling, size = request.sampling, self._page_size
        assert sampling.seed is not None and sampling.max_tokens is not None
        more = answer(request.prompt_ids, sampling.seed, sampling.max_tokens + 1)
        tokens, digests = [*request.prompt_ids, *more], []
        extend_digests(digests, tokens)
        names = block_hashes(tokens, size, salted_root(ROOT, request.cache_salt))
        for block, name in enumerate(names):
            self._content[name] = digests[block * size : (block + 1) * size]

    def check(self, sim: Simulation) -> None:
        """AssertionError if a lookup in any tier would find a block that holds something else."""
        assert sim.tiers is not None
        tiers, memory = sim.tiers.tiers, sim.tiers.memory
        for group, pool in zip(sim.scheduler.index.groups, sim.device.pools, strict=True):
            for name in group.names():
                if not tiers.is_private(name):
                    self._check(name, pool[group.lookup(name).page], "device")
        for name, slot in tiers.host._slots.items():
            for group in range(memory.shape[1]):
                if tiers.host.has(name, group) and not tiers.is_private(name):
                    self._check(name, memory[slot, group], "host")
        for name, record in sim.tiers.records.items():
            for content in record:
                self._check(name, content, "store")

    def _check(self, name: BlockHash, content: np.ndarray, where: str) -> None:
        assert name in self._content, f"the {where} has a block that nobody asked for"
        assert content.tolist() == self._content[name], f"the {where} holds something else"
