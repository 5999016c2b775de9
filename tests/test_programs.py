"""Traced programs on disk: what is damaged is never run, and the folder stays small."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve import programs
from jaxserve.programs import ProgramSpec, ProgramStore


def spec(function: Callable[..., list[jax.Array]], name: str = "program") -> ProgramSpec:
    return ProgramSpec(name, function, [jax.ShapeDtypeStruct((4,), jnp.float32)], donate=())


def run(store: ProgramStore, what: ProgramSpec) -> float:
    (result,) = store.lower(what).compile()(jnp.arange(4, dtype=jnp.float32))
    return float(result[1])


def doubled(x: jax.Array) -> list[jax.Array]:
    return [x * 2]


def tripled(x: jax.Array) -> list[jax.Array]:
    return [x * 3]


def test_a_kept_program_is_not_traced_again(tmp_path: Path):
    assert run(ProgramStore(tmp_path, "model"), spec(doubled)) == 2
    assert run(ProgramStore(tmp_path, "model"), spec(tripled)) == 2  # same name: the kept one
    assert run(ProgramStore(tmp_path, "other model"), spec(tripled)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap"])
def test_a_damaged_program_is_traced_again(tmp_path: Path, damage: str):
    store = ProgramStore(tmp_path, "model")
    run(store, spec(tripled, "other"))
    (other,) = tmp_path.iterdir()
    run(store, spec(doubled))
    (path,) = set(tmp_path.iterdir()) - {other}
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes(
        {"flip": data, "cut": data[:-1], "empty": b"", "swap": data[:32] + other.read_bytes()[32:]}[
            damage
        ]
    )
    assert run(store, spec(doubled)) == 2


def test_programs_used_longest_ago_leave_a_full_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = ProgramStore(tmp_path, "model")
    for age, name in enumerate(("newest", "middle", "oldest")):
        before = set(tmp_path.iterdir())
        run(store, spec(doubled, name))
        (path,) = set(tmp_path.iterdir()) - before
        os.utime(path, (1e9 - age, 1e9 - age))
    run(store, spec(tripled, "oldest"))  # used: now it is the newest
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr(programs, "MAX_FOLDER_BYTES", 3 * size)
    run(store, spec(doubled, "one more"))
    assert len(list(tmp_path.iterdir())) == 3
    assert run(store, spec(tripled, "oldest")) == 2  # still there
    assert run(store, spec(tripled, "middle")) == 3  # gone
