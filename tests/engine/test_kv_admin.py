"""Looking into the tiers of a real engine, checking them, and removing things from them."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve import LLM, ConfigError, RequestError, SamplingParams
from jaxserve.engine.history import TierHistory
from jaxserve.engine.recompute import compare
from jaxserve.kv.stores.base import SealedRecord
from tests.engine.tiers_harness import PAGE_SIZE, make_engine, settle

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
PROMPT = [3 + (7 * i) % 200 for i in range(50)]
OTHER = [5 + (11 * i) % 200 for i in range(50)]
NUM_BLOCKS = 6  # full ones of 50 + 3 tokens: the last token is never computed


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("kv")
    (folder / "master.key").touch(0o600)
    (folder / "master.key").write_text("ab" * 32)
    engine = make_engine(
        kv_host_bytes=1 << 20,
        kv_store=f"file://{folder}/disk?max_bytes=16MiB memory://?name=far",
        kv_encrypt=True,
        kv_key_file=str(folder / "master.key"),
        kv_key_folder=str(folder / "keys"),
        kv_load="load",
    )
    with LLM(engine=engine) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> LLM:
    """An engine with a host tier and two stores, all of them empty."""
    shared.kv.clear()
    settle(shared.engine)  # pyright: ignore
    return shared


def ask(llm: LLM, prompt: list[int] = PROMPT, **how: Any) -> Any:
    (output,) = llm.generate([prompt], GREEDY, use_tqdm=False, **how)
    settle(llm.engine)  # pyright: ignore
    return output


def num_blocks(llm: LLM) -> dict[str, int]:
    return {tier.name: tier.num_blocks for tier in llm.kv.stat().tiers}


def salted(llm: LLM, salt: str) -> list[Any]:
    """The records of a tenant in all stores."""
    tenant = llm.engine.tier_control.scheduler.tenant_of(salt)  # pyright: ignore
    return [
        info
        for worker in llm.kv._control.workers
        for info in worker.store.scan()
        if info.tenant == tenant
    ]


def damage(llm: LLM, store_index: int, how_many: int) -> None:
    """Flip a bit of some records of a store."""
    store = llm.kv._control.workers[store_index].store
    for info in list(store.scan())[:how_many]:
        record = bytearray(info.num_bytes)
        assert store.get([info.block_hash], [memoryview(record)]) == [info.num_bytes]
        record[-20] ^= 4
        store.delete([info.block_hash])
        assert store.put([SealedRecord(info, (memoryview(bytes(record)),))])[0].value == "stored"


def test_stat_counts_what_each_tier_holds(llm: LLM):
    before = llm.kv.stat()
    ask(llm)
    stats = llm.kv.stat()
    assert num_blocks(llm) == dict.fromkeys(("device", "host", "disk", "far"), NUM_BLOCKS)
    device, host, disk, _ = stats.tiers
    assert device.num_bytes == host.num_bytes < disk.num_bytes, "records have headers"
    assert (device.max_bytes, host.max_bytes) == (40 * device.num_bytes // NUM_BLOCKS, 1 << 20)
    assert stats.saved_bytes - before.saved_bytes == host.num_bytes
    ask(llm)
    hits = llm.kv.stat().hit_tokens["device"] - before.hit_tokens.get("device", 0)
    assert hits == NUM_BLOCKS * PAGE_SIZE
    told = str(llm.kv.stat())
    assert "disk" in told and "prompt tokens" in told


def test_each_answer_says_which_tier_its_prompt_came_from(llm: LLM):
    fresh = ask(llm)
    assert fresh.cached_tokens_by_source == {"device": 0} and fresh.load_decision is None
    for tiers, source in ((["device"], "host"), (["device", "host"], "disk")):
        llm.kv.clear(tiers)
        output = ask(llm)
        assert output.outputs[0].token_ids == fresh.outputs[0].token_ids
        assert output.cached_tokens_by_source == {"device": 0, source: 48}
        assert output.num_cached_tokens == 48
        assert output.load_decision.choice == "load" and output.load_decision.num_loaded == 6
    llm.kv.clear(["device", "host", "disk"])
    assert ask(llm).cached_tokens_by_source == {"device": 0, "far": 48}
    llm.kv.clear()
    assert ask(llm).num_cached_tokens == 0


def test_ls_shows_where_each_block_is(llm: LLM):
    ask(llm)
    llm.kv.clear(["device"])
    listed = llm.kv.ls()
    assert listed.is_complete and len(listed.blocks) == NUM_BLOCKS
    assert {block.tiers for block in listed.blocks} == {("host", "disk", "far")}
    llm.kv.clear(["host"])
    name = listed.blocks[0].name
    (one,) = llm.kv.ls(prefix=name[:12].upper()).blocks
    assert one.name == name and one.tiers == ("disk", "far") and one.created_s > 0 and one.is_ours
    few = llm.kv.ls(limit=2)
    assert len(few.blocks) == 2 and not few.is_complete


def test_verify_reads_every_record_and_deletes_what_is_damaged(llm: LLM):
    fresh = ask(llm)
    told: list[tuple[str, int]] = []
    report = llm.kv.verify(progress=lambda what, count: told.append((what, count)))
    assert not report.is_damaged and report.is_complete and not report.index_error
    assert [dict(check.verdicts) for check in report.stores] == [{"ok": NUM_BLOCKS}] * 2
    assert told == [("disk", NUM_BLOCKS), ("far", NUM_BLOCKS)]
    damage(llm, 0, 2)
    damage(llm, 1, 3)
    report = llm.kv.verify()
    assert report.is_damaged
    assert [(check.num_damaged, check.num_deleted) for check in report.stores] == [(2, 2), (3, 3)]
    assert not llm.kv.verify().is_damaged
    llm.kv.clear(["device", "host"])
    assert ask(llm).outputs[0].token_ids == fresh.outputs[0].token_ids


def test_recomputed_blocks_equal_every_copy_that_is_kept(llm: LLM):
    ask(llm)
    ask(llm, OTHER, cache_salt="a")
    check = llm.kv.verify(recompute=100, seed=0).recompute
    assert check is not None and check.num_wanted == 100 and "only 12 blocks of 2" in check.note
    assert (check.num_skipped, check.num_compared, check.num_equal) == (0, 36, 36)
    assert check.max_abs_difference == 0 and check.num_wrong == 0
    assert num_blocks(llm)["far"] == 2 * NUM_BLOCKS, "recomputing leaves nothing behind"
    given = [{"prompt_token_ids": OTHER, "cache_salt": "a"}, PROMPT[:20]]
    check = llm.kv.verify(recompute=3, prompts=given, seed=1).recompute
    assert check is not None and check.num_compared == 9 and not check.note
    assert check.num_wrong == 0 and check.max_relative_error < 1e-5, "in other steps: it rounds"


def test_a_block_that_is_whole_but_wrong_is_found_by_recomputing(llm: LLM):
    fresh = ask(llm)
    lower = llm.engine.lower  # pyright: ignore
    name = llm.engine.tier_control.scheduler.names_of(PROMPT)[3]  # pyright: ignore
    slot = lower.tiers.host.acquire(name)
    lower.pool.block(slot, 0)[...] += 1
    lower.tiers.host.release(slot)
    report = llm.kv.verify(recompute=6, seed=0)
    assert report.is_damaged and report.recompute is not None
    assert report.recompute.num_wrong == 1 and report.recompute.num_equal == 3 * 6 - 1
    assert name.hex() not in {block.name for block in llm.kv.ls().blocks}
    llm.kv.clear(["device"])
    assert ask(llm).outputs[0].token_ids == fresh.outputs[0].token_ids


def test_pins_count_by_tier_and_can_be_taken_back(llm: LLM):
    ask(llm)
    receipt = llm.kv.pin(prompt=PROMPT)
    assert receipt.num_blocks == NUM_BLOCKS
    assert receipt.by_tier == {"host": NUM_BLOCKS, "disk": NUM_BLOCKS, "far": NUM_BLOCKS}
    assert llm.kv.stat().tiers[1].num_pinned == NUM_BLOCKS
    pinned = [block.name for block in llm.kv.ls().blocks if block.is_pinned]
    assert len(pinned) == NUM_BLOCKS
    assert llm.kv.pin(hashes=pinned, pinned=False).by_tier["host"] == NUM_BLOCKS
    assert llm.kv.stat().tiers[1].num_pinned == 0


def test_a_tenant_is_erased_from_every_tier_and_nobody_else_is(llm: LLM):
    for salt in ("gone", "stays", ""):
        ask(llm, cache_salt=salt)
    assert len(salted(llm, "gone")) == 2 * NUM_BLOCKS
    receipt = llm.kv.erase("gone")
    assert (receipt.device_blocks, receipt.host_blocks) == (NUM_BLOCKS, NUM_BLOCKS)
    assert [erasure.num_records for erasure in receipt.stores] == [NUM_BLOCKS] * 2
    assert receipt.key == "destroyed" and receipt.is_complete and receipt.is_exact
    assert salted(llm, "gone") == [] and len(salted(llm, "stays")) == 2 * NUM_BLOCKS
    assert ask(llm, cache_salt="stays").num_cached_tokens == 48
    assert ask(llm).num_cached_tokens == 48
    assert ask(llm, cache_salt="gone").num_cached_tokens == 0
    assert llm.kv.erase("unheard of").key == "none"


def test_what_is_on_its_way_to_stores_is_erased_too(llm: LLM):
    stream = llm.stream(PROMPT, GREEDY, cache_salt="hasty")
    next(stream)
    receipt = llm.kv.erase("hasty")
    assert receipt.live_requests == 1
    assert sum(len(piece.token_ids) for piece in stream) == 3
    settle(llm.engine)  # pyright: ignore
    assert salted(llm, "hasty") == []
    assert ask(llm, cache_salt="hasty").num_cached_tokens == 0


def test_clear_stale_leaves_what_this_engine_can_use(llm: LLM):
    ask(llm)
    store = llm.kv._control.workers[1].store
    (info, *_) = store.scan()
    foreign = replace(info, block_hash=bytes(32), namespace=bytes(16))
    store.put([SealedRecord(foreign, (memoryview(bytes(info.num_bytes)),))])
    receipt = llm.kv.clear(stale=True)
    assert [erasure.num_records for erasure in receipt.stores] == [0, 1]
    assert num_blocks(llm) == dict.fromkeys(("device", "host", "disk", "far"), NUM_BLOCKS)


def test_nothing_is_kept_of_a_request_that_said_no_store(llm: LLM):
    ask(llm, no_store=True)
    assert set(num_blocks(llm).values()) == {0}
    assert llm.engine.tier_control.prompts.all() == []  # pyright: ignore
    assert ask(llm).num_cached_tokens == 0
    assert ask(llm, no_store=True).num_cached_tokens == 48, "it may use what others left"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda kv: kv.clear(["dsik"]), "no tier 'dsik'; expected device, host, disk, far"),
        (lambda kv: kv.erase(""), "needs the tenant's cache_salt"),
        (lambda kv: kv.pin(), "nothing to pin"),
        (lambda kv: kv.pin(prompt=[3] * (PAGE_SIZE - 1)), "at least one full block"),
        (lambda kv: kv.pin(hashes=["xyz"]), "no block hash"),
        (lambda kv: kv.ls(limit=0), "limit is 0"),
        (lambda kv: kv.ls(prefix="../"), "no start of a hash"),
        (lambda kv: kv.verify(recompute=-1), "recompute is -1"),
        (lambda kv: kv.verify(1, prompts=[[9999]]), "expected a token id"),
    ],
)
def test_a_wrong_call_says_what_was_expected(llm: LLM, call: Any, message: str):
    with pytest.raises(RequestError, match=message):
        call(llm.kv)


def test_the_tiers_can_be_plotted_over_time(llm: LLM, tmp_path: Path):
    ask(llm)
    path = tmp_path / "tiers.png"
    figure = llm.kv.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG") and len(figure.axes) == 2
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # pyright: ignore
    assert [label.split(":")[0] for label in labels] == ["device", "host", "disk", "far"]


def test_without_matplotlib_a_plot_says_what_to_install(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[plot\]'"):
        llm.kv.plot()


def test_history_covers_any_time_in_bounded_memory(llm: LLM):
    history = TierHistory(llm.kv.stat, max_samples=8, interval_s=1.0)
    for second in range(100):
        history.maybe_add(float(second))
    samples = history.samples()
    assert 4 <= len(samples) < 8
    assert samples[-1].at_s > samples[0].at_s


def test_a_device_without_lower_tiers_can_be_looked_at_and_cleared():
    with LLM(engine=make_engine()) as llm:
        llm.generate([PROMPT], GREEDY, use_tqdm=False)
        assert num_blocks(llm) == {"device": NUM_BLOCKS}
        assert len(llm.kv.ls().blocks) == NUM_BLOCKS
        assert not llm.kv.verify(recompute=2).is_damaged
        receipt = llm.kv.erase("tenant")
        assert not receipt.is_exact and receipt.device_blocks == NUM_BLOCKS
        assert llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_a_difference_is_measured_in_the_numbers_that_bytes_mean():
    block = np.linspace(1, 2, 8, dtype=np.float32)
    same = compare([block], [block.copy()], block.dtype)
    assert same is not None and same.is_equal
    near = compare([block], [block * np.float32(1.001)], block.dtype)
    assert near is not None and not near.is_equal and 0.0005 < near.relative_error < 0.002
    broken = compare([block], [np.full_like(block, np.nan)], block.dtype)
    assert broken is not None and broken.relative_error == float("inf")
    assert compare([block], [None], block.dtype) is None


def test_numbers_of_a_store_that_fails_are_marked_as_old(tmp_path: Path):
    engine = make_engine(kv_host_bytes=1 << 20, kv_store="fault+memory://?error_rate=1")
    with LLM(engine=engine) as llm:
        assert "?" not in str(llm.kv.stat()) and llm.kv.stat().tiers[2].is_known
        receipt = llm.kv.pin(["ab" * 32])
        assert receipt.note == "memory did not answer: store memory fails as planned"
        ask(llm)
        for _ in range(3):
            llm.kv.ls()
        assert "?" in str(llm.kv.stat()) and not llm.kv.stat().tiers[2].is_known
