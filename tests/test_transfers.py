"""Blocks there and back: bytes, dtypes, meshes, odd counts, failures of the machine."""

import threading
import time
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve import transfers as transfers_module
from jaxserve.errors import ConfigError
from jaxserve.kv.host_pool import HostPool
from jaxserve.kv.messages import Message, Saved, Staged
from jaxserve.kv.transfer_plan import PageSave, PieceLoad, TransferPlan
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.api import Backend, Bound
from jaxserve.transfers import Transfers

NUM_PAGES, NUM_SLOTS = 100, 80
SHAPES = ((2, 2, 4, 4, 8), (1, 2, 4, 4, 8))


class Bench:
    """A pool of two groups with known bytes, a host pool, and a mover between them."""

    def __init__(
        self,
        dtype: str = "uint16",
        mesh: Mesh | None = None,
        stages_saves: bool | None = None,
        backend: Backend = reference,
    ):
        rng = np.random.default_rng(0)
        self.content = [
            rng.integers(0, 256, (NUM_PAGES, *shape, np.dtype(dtype).itemsize), np.uint8)
            .view(dtype)
            .reshape(NUM_PAGES, *shape)
            for shape in SHAPES
        ]
        sharding = SingleDeviceSharding(jax.devices()[0])
        if mesh is not None:
            sharding = NamedSharding(mesh, PartitionSpec(None, None, None, "x"))
        self.pool = [jax.device_put(array, sharding) for array in self.content]
        slot_bytes = sum(int(np.prod(shape)) for shape in SHAPES) * np.dtype(dtype).itemsize
        self.host = HostPool(NUM_SLOTS * slot_bytes, SHAPES, np.dtype(dtype))
        self.inbox: deque[Message] = deque()
        self.arrived = threading.Event()
        self.mover = Transfers(
            self.host, self.pool, self.inbox, self.arrived.set, backend, stages_saves
        )

    def wait_for(self, count: int) -> list[Message]:
        until = time.monotonic() + 30
        while len(self.inbox) < count and time.monotonic() < until:
            self.arrived.wait(0.1)
            self.arrived.clear()
        messages = list(self.inbox)
        assert len(messages) == count
        self.inbox.clear()
        return messages

    def save(self, pages: list[int]) -> list[Message]:
        """Page i of both groups goes to slot i of the list."""
        saves = [PageSave(g, page, slot, 1) for slot, page in enumerate(pages) for g in (0, 1)]
        self.pool = self.mover.execute(TransferPlan(saves=tuple(saves)), self.pool)
        return self.wait_for(len(saves))


@pytest.fixture(params=["uint16", "float32", "float16, not staged"])
def bench(request: pytest.FixtureRequest):
    """Saves go through pinned memory, as on a GPU, or not, as by default on CPU."""
    dtype, *not_staged = request.param.split(", ")
    made = Bench(dtype, stages_saves=not not_staged)
    yield made
    made.mover.close()


@pytest.mark.parametrize("count", [1, 4, 5, 70])
def test_pages_reach_slots_and_pages_again_bit_for_bit(bench: Bench, count: int):
    pages = list(range(NUM_PAGES - count, NUM_PAGES))
    assert all(isinstance(message, Saved) and message.is_ok for message in bench.save(pages))
    for slot, page in enumerate(pages):
        for group in (0, 1):
            assert bench.host.block(slot, group).tobytes() == bench.content[group][page].tobytes()
    count = min(count, 64)
    bench.mover.stage(7, range(count))
    (staged,) = bench.wait_for(1)
    assert isinstance(staged, Staged) and staged.is_ok and staged.num_bytes > 0
    skipped = count // 2
    targets = np.arange(count, dtype=np.int32)
    targets[skipped] = -1
    load = PieceLoad(7, (targets, np.full(count, -1, np.int32)))
    bench.pool = bench.mover.execute(TransferPlan(loads=(load,)), bench.pool)
    after = [np.asarray(array) for array in bench.pool]
    expected = bench.content[0].copy()
    for slot, target in enumerate(targets.tolist()):
        if target >= 0:
            expected[target] = bench.content[0][pages[slot]]
    assert after[0].tobytes() == expected.tobytes()
    assert after[1].tobytes() == bench.content[1].tobytes(), "a group that needs nothing changed"


@pytest.mark.parametrize("num_devices", [1, 2])
def test_pages_are_moved_by_the_backend_with_its_part_of_the_heads(num_devices: int):
    moved = []

    def gather(pool_n, ids_b):
        moved.append(("gather", pool_n.shape[3]))
        return reference.gather_pages(pool_n, ids_b)

    def scatter(pool_n, ids_b, rows_b):
        moved.append(("scatter", rows_b.shape[3]))
        return reference.scatter_pages(pool_n, ids_b, rows_b)

    backend = Bound(
        reference.ragged_paged_attention,
        reference.write_kv,
        gather_pages=gather,
        scatter_pages=scatter,
    )
    mesh = None if num_devices == 1 else Mesh(np.array(jax.devices()[:2]), ("x",))
    bench = Bench(mesh=mesh, backend=backend)
    bench.save([3])
    bench.mover.stage(1, [0])
    bench.wait_for(1)
    targets = np.array([50], np.int32)
    load = PieceLoad(1, (targets, targets))
    bench.pool = bench.mover.execute(TransferPlan(loads=(load,)), bench.pool)
    for array, content in zip(bench.pool, bench.content, strict=True):
        assert np.asarray(array[50]).tobytes() == content[3].tobytes()
    heads = {shape[2] // num_devices for shape in SHAPES}
    assert set(moved) == {(move, count) for move in ("gather", "scatter") for count in heads}
    bench.mover.close()


def test_a_save_holds_what_the_page_was_before_the_step_that_overwrites_it(bench: Bench):
    overwrite = jax.jit(lambda pool: jnp.zeros_like(pool), donate_argnums=0)
    saves = tuple(PageSave(0, page, page, 1) for page in range(60))
    for _ in range(3):
        bench.pool = bench.mover.execute(TransferPlan(saves=saves), bench.pool)
        bench.pool[0] = overwrite(bench.pool[0])
        bench.wait_for(60)
        for page in range(60):
            assert bench.host.block(page, 0).tobytes() == bench.content[0][page].tobytes()
        bench.pool[0] = jax.device_put(bench.content[0], bench.pool[0].sharding)


def test_a_slot_may_be_overwritten_once_its_piece_is_staged(bench: Bench):
    bench.save([3])
    bench.mover.stage(1, [0])
    bench.wait_for(1)
    bench.host.block(0, 0)[...] = 0
    target = np.array([50], np.int32)
    bench.pool = bench.mover.execute(
        TransferPlan(loads=(PieceLoad(1, (target, target)),)), bench.pool
    )
    assert np.asarray(bench.pool[0][50]).tobytes() == bench.content[0][3].tobytes()


def test_staging_waits_for_pieces_to_be_written_or_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfers_module, "MAX_STAGED_BYTES", 0)  # then two pieces may wait
    bench.save(list(range(64)))
    for piece_id in range(4):
        bench.mover.stage(piece_id, range(64))
    assert [message.piece_id for message in bench.wait_for(2) if isinstance(message, Staged)] == [
        0,
        1,
    ]
    time.sleep(0.1)
    assert not bench.inbox, "a third piece is on the device"
    bench.mover.drop(1)
    bench.wait_for(1)
    target = np.full(64, -1, np.int32)
    bench.mover.execute(TransferPlan(loads=(PieceLoad(0, (target, target)),)), bench.pool)
    bench.wait_for(1)


def test_closing_does_not_wait_for_room():
    bench = Bench()
    bench.save(list(range(64)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfers_module, "MAX_STAGED_BYTES", 0)
        for piece_id in range(4):
            bench.mover.stage(piece_id, range(64))
        bench.wait_for(2)
        bench.mover.close()


@pytest.mark.parametrize("stages_saves", [True, False])
def test_the_bytes_of_a_block_do_not_depend_on_the_mesh(stages_saves: bool):
    bench = Bench(mesh=Mesh(np.array(jax.devices()[:2]), ("x",)), stages_saves=stages_saves)
    try:
        before = bench.pool[0].sharding
        bench.save([5, 6])
        assert bench.host.block(1, 0).tobytes() == bench.content[0][6].tobytes()
        bench.mover.stage(0, [1])
        bench.wait_for(1)
        target = np.array([9], np.int32)
        load = PieceLoad(0, (target, target))
        bench.pool = bench.mover.execute(TransferPlan(loads=(load,)), bench.pool)
        assert bench.pool[0].sharding == before, "the pool has moved"
        assert np.asarray(bench.pool[0][9]).tobytes() == bench.content[0][6].tobytes()
    finally:
        bench.mover.close()


def test_what_fails_on_a_thread_is_reported_and_the_thread_lives_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def broken(slot: int, group: int) -> np.ndarray:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(bench.host, "block", broken)
        assert not any(message.is_ok for message in bench.save([1, 2]))  # pyright: ignore
        bench.mover.stage(0, [0])
        (staged,) = bench.wait_for(1)
        assert isinstance(staged, Staged) and not staged.is_ok
    assert all(message.is_ok for message in bench.save([1, 2]))  # pyright: ignore


def test_a_save_for_which_there_is_no_memory_is_reported_and_blocks_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object, **kwargs: object):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", full)
        patch.setattr(bench.mover, "_program", full)
        for _ in range(2 * transfers_module.MAX_SAVES_IN_FLIGHT):
            assert not any(message.is_ok for message in bench.save([1]))  # pyright: ignore
    assert all(message.is_ok for message in bench.save([1, 2]))  # pyright: ignore


def test_no_step_waits_for_saves_that_nobody_needs(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """With the copying thread held up, more saves than fit are planned at once."""
    may_go, block = threading.Event(), bench.host.block

    def late(slot: int, group: int) -> np.ndarray:
        may_go.wait(30)
        return block(slot, group)

    monkeypatch.setattr(bench.host, "block", late)
    most, ended = transfers_module.MAX_SAVES_IN_FLIGHT, threading.Event()

    def plan(slots: range, is_needed: bool) -> None:
        for slot in slots:
            save = PageSave(0, slot, slot, 1, is_needed)
            bench.pool = bench.mover.execute(TransferPlan(saves=(save,)), bench.pool)

    plan(range(most + 3), is_needed=False)
    given_up = bench.wait_for(3)
    assert [message.save.slot for message in given_up] == [most, most + 1, most + 2]  # pyright: ignore
    assert not any(message.is_ok for message in given_up)  # pyright: ignore

    def save_what_is_needed() -> None:
        plan(range(most, most + 1), is_needed=True)
        ended.set()

    threading.Thread(target=save_what_is_needed, daemon=True).start()
    assert not ended.wait(0.2), "a block that somebody waits for was given up"
    may_go.set()
    assert ended.wait(30)
    assert all(message.is_ok for message in bench.wait_for(most + 1))  # pyright: ignore


def test_memory_that_damages_or_moves_what_is_put_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(transfers_module, "STAGING_KIND", "no_such_memory")
    with pytest.raises(ConfigError, match="no no_such_memory memory.*set kv_host_bytes to 0"):
        Bench()
    monkeypatch.undo()
    real = jax.device_put

    def damaging(x: object, device: object = None, **kwargs: object):
        array = real(x, device, **kwargs)
        if getattr(device, "memory_kind", None) == "pinned_host":
            return real(np.asarray(array) + np.asarray(array).dtype.type(1), device)
        return array

    monkeypatch.setattr(jax, "device_put", damaging)
    with pytest.raises(ConfigError, match="comes back damaged from pinned_host"):
        Bench()

    def falling_back(x: object, device: object = None, **kwargs: object):
        if getattr(device, "memory_kind", None) == "pinned_host":
            return real(x, SingleDeviceSharding(jax.devices()[0]))
        return real(x, device, **kwargs)

    monkeypatch.setattr(jax, "device_put", falling_back)
    with pytest.raises(ConfigError, match="instead of pinned_host, silently"):
        Bench()
