"""Nothing that lower tiers do changes a token: evictions, restarts, meshes, faults, encryption."""

import fcntl
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.engine import Engine, tiers
from jaxserve.errors import ConfigError
from jaxserve.kv.prefill_cost import PrefillCost
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.types import Request
from tests.engine.tiers_harness import (
    FIXTURES,
    loaded,
    make_engine,
    renamed,
    requests,
    serve,
    settle,
)

FULL = bool(os.environ.get("PROVE_IN_FULL"))
"""`make prove`: eight times the requests, every combination of tiers."""

NUM_REQUESTS = 500 if FULL else 60
HOST_BYTES = 24 * 8192  # two dozen slots of the tiny model


@cache
def expected(model: str) -> dict[str, list[int | None]]:
    """What the engine says without lower tiers, one request at a time and no reuse."""
    return serve_alone(model, requests(NUM_REQUESTS))


def serve_alone(model: str, asked: list[Request]) -> dict[str, list[int | None]]:
    engine = make_engine(FIXTURES / model, enable_prefix_caching=False)
    try:
        tokens = {}
        for request in asked:
            tokens |= serve(engine, [request])
        return tokens
    finally:
        engine.close()


def check(model: str, suffix: str, tokens: dict[str, list[int | None]]) -> None:
    wrong = [name for name, right in expected(model).items() if tokens[name + suffix] != right]
    assert not wrong, f"{len(wrong)} of {len(tokens)} answers differ: {wrong[:5]}"


def run(model: str, suffix: str = "", **settings: Any) -> dict[str, int]:
    """Serve everything with an engine of its own; what was loaded, by source."""
    engine = make_engine(FIXTURES / model, **settings)
    try:
        check(model, suffix, serve(engine, renamed(requests(NUM_REQUESTS), suffix)))
        settle(engine)
        return dict(loaded(engine))
    finally:
        engine.close()


@pytest.mark.parametrize("policy", ["arc", "s3fifo?store_threshold=2"])
def test_the_host_tier_changes_no_token(policy: str):
    # Always loading: whether it pays for so small a model depends on how busy the machine is.
    settings = {"kv_host_bytes": HOST_BYTES, "kv_host_policy": policy, "kv_load": "load"}
    sources = run("llama31-v0", **settings)
    assert sources.get("host", 0) > (20 if policy == "arc" else 0)  # a gate lets little in


COMBINATIONS = [
    (offload, stores, load)
    for offload in ("lazy", "eager")
    for stores in ("", "memory", "disk", "memory disk", "disk files")
    for load in ("auto", "load")
]


@pytest.mark.parametrize(
    ("offload", "stores", "load"), COMBINATIONS if FULL else COMBINATIONS[5:20:7]
)
def test_no_combination_of_tiers_changes_a_token(
    offload: str, stores: str, load: str, tmp_path: Path
):
    urls = {
        "memory": "memory://?max_bytes=200KiB",
        "disk": f"file://{tmp_path}/disk?max_bytes=1MiB",
        "files": f"objects+file://{tmp_path}/files?max_bytes=2MiB",
    }
    for suffix in ("", "b"):  # with a restart in between
        run(
            "llama31-v0",
            suffix,
            kv_host_bytes=HOST_BYTES,
            kv_offload=offload,
            kv_load=load,
            kv_store=" ".join(urls[name] for name in stores.split()) or None,
        )


@pytest.mark.parametrize("model", ["llama31-v0", "gemma3-v0"])
def test_disk_and_host_change_no_token_before_and_after_a_restart(model: str, tmp_path: Path):
    store = f"file://{tmp_path}/kv?max_bytes=4MiB"
    settings = {"kv_host_bytes": HOST_BYTES, "kv_store": store, "kv_load": "load"}
    run(model, **settings)
    again = run(model, "b", **settings)
    assert again.get("disk", 0) > 50


def test_a_start_learns_what_computing_and_loading_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It computes into pages and reads from the store; no answer differs for that."""
    settings = {"kv_host_bytes": HOST_BYTES, "kv_store": f"file://{tmp_path}?max_bytes=64MiB"}
    run("llama31-v0", "-before", **settings)
    steps: list[tuple[int, float]] = []
    records: list[int] = []
    observe, get = PrefillCost.observe, DiskStore.get

    def observed(cost: PrefillCost, num_tokens: int, num_pairs: float, seconds: float) -> None:
        steps.append((num_tokens, num_pairs))
        observe(cost, num_tokens, num_pairs, seconds)

    def got(store: DiskStore, keys: Any, buffers: Any) -> list[int]:
        lengths = get(store, keys, buffers)
        records.extend(lengths)
        return lengths

    monkeypatch.setattr(tiers, "TRY_OUT_S", 30.0)
    monkeypatch.setattr(PrefillCost, "observe", observed)
    monkeypatch.setattr(DiskStore, "get", got)
    engine = make_engine(FIXTURES / "llama31-v0", warmup=True, **settings)
    try:
        assert steps == [(64, 0.0)] * 2, "the smallest and the largest: there is one"
        assert len(records) > 8 and all(records)
        assert not any(loaded(engine).values())
        check("llama31-v0", "-after", serve(engine, renamed(requests(NUM_REQUESTS), "-after")))
    finally:
        engine.close()


def test_a_folder_that_another_process_is_about_to_leave_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = f"file://{tmp_path}/kv?max_bytes=64MiB"
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o700)
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(tiers, "IN_USE_WAIT_S", 0.0)
    with pytest.raises(ConfigError, match="in use by another process"):
        make_engine(kv_store=store)
    monkeypatch.setattr(tiers, "IN_USE_WAIT_S", 30.0)
    leaves = threading.Timer(0.3, os.close, [other])
    leaves.start()
    engine = make_engine(kv_store=store)
    leaves.join()
    with pytest.raises(ConfigError, match="in use by this process"):
        make_engine(kv_store=store)
    engine.close()
    make_engine(kv_store=store).close()


def test_two_stores_behind_a_host_tier_that_holds_next_to_nothing(tmp_path: Path):
    stores = f"memory://?max_bytes=100KiB objects+file://{tmp_path}/objects?max_bytes=4MiB"
    settings = {"kv_host_bytes": HOST_BYTES // 2, "kv_store": stores, "kv_load": "load"}
    run("llama31-v0", **settings)
    again = run("llama31-v0", "b", **settings)  # the nearer store has forgotten everything
    assert again.get("files", 0) > 0


def test_a_full_disk_store_evicts_and_stays_within_its_bytes(tmp_path: Path):
    store = f"file://{tmp_path}/kv?max_bytes=1MiB"
    for suffix in ("", "b"):
        run("llama31-v0", suffix, kv_host_bytes=HOST_BYTES, kv_store=store)
        used = sum(path.stat().st_blocks * 512 for path in (tmp_path / "kv").rglob("*"))
        assert used <= 1.01 * (1 << 20)


def test_what_one_device_wrote_two_devices_read(tmp_path: Path):
    settings = {"kv_host_bytes": HOST_BYTES, "kv_store": f"file://{tmp_path}/kv?max_bytes=8MiB"}
    run("llama31-v0", **settings)
    sources = run("llama31-v0", "b", tensor_parallel_size=2, kv_load="load", **settings)
    assert sources.get("disk", 0) > 50


@pytest.mark.parametrize("change", [{"page_size": 16, "num_pages": 20}, {"dtype": "bfloat16"}])
def test_another_page_size_or_dtype_hits_nothing(tmp_path: Path, change: dict):
    settings = {"kv_host_bytes": HOST_BYTES, "kv_store": f"file://{tmp_path}/kv?max_bytes=8MiB"}
    settings |= {"kv_load": "load", "kv_offload": "eager"}
    found = []
    for changed in ({}, {}, change):
        engine = make_engine(**{**settings, **changed})
        try:
            serve(engine, requests(10))
            settle(engine)
            if changed:
                check_nothing_read(engine)
            found.append(loaded(engine).get("disk", 0))
        finally:
            engine.close()
    assert found[0] == 0 < found[1]  # the second engine finds what the first has written


def check_nothing_read(engine: Engine) -> None:
    assert engine.lower is not None and engine.lower.cascade is not None
    assert not engine.lower.cascade.verdicts, "a record of another namespace was read"
    assert "disk" not in loaded(engine)


def swap_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name] + np.float32(0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] *= 2
    else:
        config["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [swap_weights, change_rope])
def test_what_is_changed_under_the_same_name_hits_nothing(
    tmp_path: Path, change: Callable[[Path], None]
):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "llama31-v0", folder)
    settings = {
        "folder": folder,
        "kv_host_bytes": HOST_BYTES,
        "kv_store": f"file://{tmp_path}/kv?max_bytes=8MiB",
        "kv_load": "load",
    }
    asked = requests(8)
    answers = []
    for prepare in (None, None, change, None):
        if prepare is not None:
            prepare(folder)
        engine = make_engine(**settings)
        try:
            answers.append(serve(engine, asked))
            if prepare is not None:
                check_nothing_read(engine)
            elif len(answers) > 1:
                assert loaded(engine).get("disk", 0) > 5
            settle(engine)
        finally:
            engine.close()
    assert answers[0] == answers[1] != answers[2] == answers[3]


def test_another_page_size_gives_the_same_tokens():
    run("llama31-v0", page_size=16, num_pages=20, kv_host_bytes=HOST_BYTES)


def test_encrypted_blocks_come_back_and_hold_no_plain_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXSERVE_KV_KEY", "ab" * 32)
    settings = {
        "kv_host_bytes": HOST_BYTES,
        "kv_store": f"file://{tmp_path}/kv?max_bytes=8MiB",
        "kv_encrypt": True,
        "kv_key_folder": str(tmp_path / "keys"),
        "kv_load": "load",
    }
    run("llama31-v0", **settings)
    assert run("llama31-v0", "b", **settings).get("disk", 0) > 50
    for path in (tmp_path / "keys").iterdir():
        if path.stat().st_size > 0:
            os.remove(path)
    engine = make_engine(**settings)
    try:
        serve(engine, requests(10)[:1])
        assert loaded(engine) == {}, "a block was read without its key"
    finally:
        engine.close()


@pytest.mark.parametrize(
    "fault",
    [
        "hang=true",
        "error_rate=0.3",
        "corrupt=0.3",
        "latency=20ms",
        "flap=50ms",
        "error_rate=1",
        "corrupt=1",
    ],
)
def test_a_faulty_store_changes_no_token(fault: str, tmp_path: Path):
    store = f"fault+objects+file://{tmp_path}/kv?max_bytes=8MiB&{fault}&seed=3&get_timeout=500ms"
    engine = make_engine(kv_host_bytes=HOST_BYTES, kv_store=store + "&put_timeout=200ms")
    try:
        for suffix in ("", "b"):
            asked = renamed(requests(NUM_REQUESTS), suffix)
            check("llama31-v0", suffix, serve(engine, asked))
        if fault == "corrupt=1":
            assert engine.lower is not None and engine.lower.cascade is not None
            assert engine.lower.cascade.verdicts["ok"] == 0
            assert loaded(engine).get("files", 0) == 0
    finally:
        engine.close()


def test_preempted_sequences_compute_nothing_twice_while_the_host_has_room():
    asked = [
        replace(request, sampling=replace(request.sampling, max_tokens=30))
        for request in requests(90, seed=9)
    ]
    engine = make_engine(kv_host_bytes=64 * HOST_BYTES)
    try:
        assert serve(engine, asked, seed=5) == serve_alone("llama31-v0", asked)
        stats = engine.stats()
        assert stats.num_preemptions > 5, "the pool is too large to test preemption"
        assert stats.recomputed_tokens == 0
    finally:
        engine.close()


def test_stored_bytes_are_the_recomputed_bytes(tmp_path: Path):
    """Where the shapes of the steps are the same, nothing differs, not even the last bit."""
    pages: list[list[np.ndarray]] = []
    for _ in range(2):
        engine = make_engine(kv_host_bytes=HOST_BYTES, kv_offload="eager")
        serve(engine, requests(3)[:1])
        settle(engine)
        assert engine.lower is not None
        host = engine.lower.tiers.host
        names = sorted(host.names())
        assert names
        pages.append([engine.lower.pool.block(host._slots[name], 0).copy() for name in names])
        engine.close()
    for first, second in zip(*pages, strict=True):
        assert first.tobytes() == second.tobytes()


def test_an_aborted_request_leaves_nothing_held():
    rng = random.Random(3)
    engine = make_engine(kv_host_bytes=HOST_BYTES, kv_store="memory://")
    try:
        waiting = requests(60)
        live: list[str] = []
        while waiting or engine.has_work:
            if waiting and rng.random() < 0.5:
                engine.add(waiting[-1])
                live.append(waiting.pop().request_id)
            engine.step()
            if live and rng.random() < 0.3:
                engine.abort(live.pop(rng.randrange(len(live))))
            engine.check_integrity()
        settle(engine)
        assert engine.lower is not None
        host = engine.lower.tiers.host
        assert not any(host._references) and not host._claims
        assert all(group.num_in_use == 0 for group in engine.stats().pages)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_host_policy": "fifo"}, "unknown replacement policy 'fifo'"),
        ({"kv_encrypt": True}, "kv_encrypt needs a store"),
        ({"kv_ttl": "soon"}, "kv_ttl is 'soon'"),
        ({"kv_ttl": "7d", "kv_host_bytes": 1 << 20}, "kv_ttl is about what stores keep"),
        ({"kv_store": "memory://", "kv_key_file": "k"}, "nothing would be encrypted"),
        ({"kv_encrypt": True, "kv_store": "memory://"}, "needs a master key"),
        ({"kv_host_bytes": 10}, "kv_host_bytes is 10; one block of all KV groups needs"),
        ({"kv_store": "tape://x"}, "unknown KV store scheme 'tape'; expected one of"),
        ({"kv_store": "memory:// memory://"}, "names must differ"),
        ({"kv_store": "memory://", "kv_ttl": "soon"}, "kv_ttl is 'soon'; expected a duration"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JAXSERVE_KV_KEY", raising=False)
    with pytest.raises(ConfigError, match=message):
        make_engine(**settings)
