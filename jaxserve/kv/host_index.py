"""Which slot of the host tier holds which block: residency, references, claims, eviction.

A slot has room for the blocks of all KV groups under one name; a bit per group says which of them
are there. A name is a block hash, or a private name of a preempted sequence's unfinished block.

    free        no content
    writing     some group's bytes are on their way in
    resident    some group's bytes are there; may be read while it is held

A slot is evicted only if nothing is on its way in or out, and nobody claims or pins its name.
The policy orders names; this index acts. Every operation is O(1) in the number of slots, apart
from names that the policy has to pass over. No arrays, no jax, no threads: one owner.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.policy.base import Policy


class HostIndex:
    """Slots of the host tier.

    Args:
        num_slots: slots of the host pool.
        num_groups: KV groups of the model.
        policy: order and admission; its capacity is `num_slots`.
    """

    def __init__(self, num_slots: int, num_groups: int, policy: Policy):
        assert policy.capacity == num_slots
        self.num_slots = num_slots
        self.num_evicted = 0
        self.num_resident = [0] * num_groups
        """Readable blocks of each group; slots that only wait for bytes do not count."""
        self._all_groups = (1 << num_groups) - 1
        self._policy = policy
        self._slots: dict[BlockHash, int] = {}
        self._names: list[BlockHash | None] = [None] * num_slots
        self._resident = [0] * num_slots
        self._writing = [0] * num_slots
        self._references = [0] * num_slots
        self._generations = [0] * num_slots
        self._doomed: set[int] = set()
        self._claims = Counter[BlockHash]()
        self._pins: set[BlockHash] = set()
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_used(self) -> int:
        """Slots that have content or wait for it."""
        return self.num_slots - len(self._free)

    @property
    def num_pinned(self) -> int:
        """Slots that are kept from eviction on somebody's word."""
        return len(self._pins)

    def _set_resident(self, slot: int, groups: int) -> None:
        changed = self._resident[slot] ^ groups
        for group in range(len(self.num_resident)):
            if changed >> group & 1:
                self.num_resident[group] += 1 if groups >> group & 1 else -1
        self._resident[slot] = groups

    def has(self, name: BlockHash, group: int) -> bool:
        """Whether the group's bytes of a block can be read now."""
        slot = self._slots.get(name, -1)
        return slot >= 0 and bool(self._resident[slot] >> group & 1)

    def will_have(self, name: BlockHash, group: int) -> bool:
        """Whether the group's bytes of a block are there or on their way."""
        slot = self._slots.get(name, -1)
        if slot < 0 or slot in self._doomed:
            return False
        return bool((self._resident[slot] | self._writing[slot]) >> group & 1)

    def is_complete(self, name: BlockHash) -> bool:
        """Whether the bytes of every group are there."""
        slot = self._slots.get(name, -1)
        return slot >= 0 and self._resident[slot] == self._all_groups

    def generation(self, slot: int) -> int:
        """How often the slot has been handed out; a change means that its content is another."""
        return self._generations[slot]

    def reserve(self, name: BlockHash, groups: int, *, is_needed: bool = False) -> int | None:
        """A slot to write the bytes of `groups` (bits) into; `commit` or `abort` must follow.

        Args:
            is_needed: somebody waits for the block, so the policy is not asked whether it pays.

        Returns:
            None if these bytes are there or on their way, the policy does not want the block, or
            every slot is held.
        """
        slot = self._slots.get(name)
        if slot is not None:
            if (self._resident[slot] | self._writing[slot]) & groups or slot in self._doomed:
                return None
            self._writing[slot] |= groups
            return slot
        if not is_needed and name not in self._claims and not self._policy.admits(name):
            return None
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        self._generations[slot] += 1
        self._slots[name], self._names[slot] = slot, name
        self._writing[slot] = groups
        self._policy.insert(name)
        return slot

    def _evict(self) -> int | None:
        name = self._policy.victim(self._may_leave)
        if name is None:
            return None
        slot = self._slots[name]
        self._drop(slot, evicted=True)
        self.num_evicted += 1
        return self._free.pop()

    def _may_leave(self, name: BlockHash) -> bool:
        slot = self._slots[name]
        held = self._references[slot] or self._writing[slot]
        return not held and name not in self._claims and name not in self._pins

    def commit(self, slot: int, generation: int, groups: int) -> bool:
        """The bytes of `groups` are in the slot. False if the block was forgotten meanwhile."""
        assert generation == self._generations[slot] and self._writing[slot] & groups == groups
        self._writing[slot] &= ~groups
        if slot in self._doomed:
            self._settle(slot)
            return False
        self._set_resident(slot, self._resident[slot] | groups)
        return True

    def abort(self, slot: int, generation: int, groups: int) -> None:
        """The bytes of `groups` will not come."""
        assert generation == self._generations[slot] and self._writing[slot] & groups == groups
        self._writing[slot] &= ~groups
        if not self._resident[slot]:
            self._doomed.add(slot)
        self._settle(slot)

    def acquire(self, name: BlockHash) -> int:
        """Hold a resident block's slot for reading; return the slot."""
        slot = self._slots[name]
        assert self._resident[slot]
        self._references[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Give a reference back."""
        assert self._references[slot] > 0, f"slot {slot} is released more often than taken"
        self._references[slot] -= 1
        self._settle(slot)

    def touch(self, name: BlockHash) -> None:
        """Tell the policy that the block was used, or looked for in vain."""
        if name in self._slots:
            self._policy.touch(name)
        else:
            self._policy.miss(name)

    def observe(self, names: Sequence[BlockHash]) -> None:
        """Tell the policy which blocks a new request needs, head first."""
        self._policy.observe(names)

    def claim(self, name: BlockHash) -> None:
        """A waiting sequence will need the block: admit it and keep it. Claims count."""
        self._claims[name] += 1

    def is_claimed(self, name: BlockHash) -> bool:
        """Whether a waiting sequence will need the block."""
        return name in self._claims

    def unclaim(self, name: BlockHash) -> None:
        """Undo one `claim`."""
        assert self._claims[name] > 0, "a block is unclaimed more often than claimed"
        self._claims[name] -= 1
        if not self._claims[name]:
            del self._claims[name]

    def pin(self, name: BlockHash, pinned: bool) -> bool:
        """Keep a block from eviction, or stop. False if it is not there."""
        if name not in self._slots:
            return False
        (self._pins.add if pinned else self._pins.discard)(name)
        return True

    def forget(self, name: BlockHash) -> bool:
        """Make a block unfindable; its slot is free once nobody reads or writes it."""
        slot = self._slots.get(name)
        if slot is None or slot in self._doomed:
            return False
        self._doomed.add(slot)
        self._set_resident(slot, 0)
        self._settle(slot)
        return True

    def forget_partial(self, name: BlockHash) -> None:
        """Make room for the whole block if only some groups of it are here and nobody uses them."""
        slot = self._slots.get(name)
        if slot is not None and not self.is_complete(name) and self._may_leave(name):
            self.forget(name)

    def names(self) -> Iterator[BlockHash]:
        """The names of all resident blocks."""
        return (name for name, slot in self._slots.items() if self._resident[slot])

    def all_names(self) -> Iterator[BlockHash]:
        """The names of all blocks that are here or on their way in."""
        return iter(self._slots)

    def is_pinned(self, name: BlockHash) -> bool:
        """Whether `pin` keeps the block."""
        return name in self._pins

    def _settle(self, slot: int) -> None:
        """Free a forgotten slot that nobody uses any more."""
        if slot in self._doomed and not self._references[slot] and not self._writing[slot]:
            self._drop(slot, evicted=False)

    def _drop(self, slot: int, *, evicted: bool) -> None:
        name = self._names[slot]
        assert name is not None
        self._policy.remove(name, evicted=evicted)
        del self._slots[name]
        self._names[slot] = None
        self._set_resident(slot, 0)
        self._pins.discard(name)
        self._doomed.discard(slot)
        self._free.append(slot)

    def check_integrity(self) -> None:
        """Recount everything; AssertionError says what is wrong."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is in the free list twice"
        for slot, name in enumerate(self._names):
            assert (name is None) == (slot in free), f"slot {slot}: named and free do not differ"
            resident, writing = self._resident[slot], self._writing[slot]
            assert not resident & writing, f"slot {slot} is written where it is resident"
            assert self._references[slot] >= 0, f"slot {slot} has negative references"
            if name is None:
                assert not resident and not writing and not self._references[slot], (
                    f"free slot {slot}: resident {resident}, writing {writing}, "
                    f"{self._references[slot]} references"
                )
                continue
            assert self._slots.get(name) == slot, f"slot {slot} has a name that leads elsewhere"
            doomed = slot in self._doomed
            assert resident or writing or doomed, f"slot {slot} is used for nothing"
            assert not doomed or writing or self._references[slot], f"slot {slot} should be free"
        for group, num_resident in enumerate(self.num_resident):
            counted = sum(bits >> group & 1 for bits in self._resident)
            assert counted == num_resident, (
                f"group {group}: {counted} resident blocks, {num_resident} counted"
            )
        assert len(self._slots) == self.num_used, "names and used slots do not add up"
        assert all(count > 0 for count in self._claims.values()), "a claim count is not positive"
