"""The checker of compiled programs finds what it is there to find, on the CPU's HLO."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.aot.hlo import find_copies

POOL = jax.ShapeDtypeStruct((256, 4, 16, 64), jnp.float32)
NEW = jax.ShapeDtypeStruct((8, 4, 64), jnp.float32)
INDEX = jax.ShapeDtypeStruct((8,), jnp.int32)
POOL_BYTES = 256 * 4 * 16 * 64 * 4


def compiled(function, *args) -> str:
    text = jax.jit(function, donate_argnums=0).lower(*args).compile().as_text()
    assert text is not None
    return text


def write(pool, new, row, offset):
    return pool.at[row, :, offset].set(new, mode="drop")


def test_scatter_into_donated_pool_is_no_copy():
    hlo = compiled(write, POOL, NEW, INDEX, INDEX)
    assert "scatter" in hlo
    assert find_copies(hlo, POOL_BYTES // 2) == []


def test_pool_carried_through_loop_is_no_copy():
    def layers(pool, new, row, offset):
        return lax.fori_loop(0, 4, lambda i, pool: write(pool, new, row + i, offset), pool)

    assert find_copies(compiled(layers, POOL, NEW, INDEX, INDEX), POOL_BYTES // 2) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pool: pool * 2,
        lambda pool: pool.astype(jnp.bfloat16).astype(jnp.float32) + 1,
        lambda pool: pool.transpose(0, 2, 1, 3),
        lambda pool: jnp.concatenate([pool[:128], pool[:128]]),
    ],
)
def test_pool_made_anew_is_found(spoil):
    def step(pool, new, row, offset):
        return spoil(write(pool, new, row, offset))

    assert find_copies(compiled(step, POOL, NEW, INDEX, INDEX), POOL_BYTES // 2)


def test_use_of_old_pool_after_write_is_found():
    def step(pool, new, row, offset):
        after = write(pool, new, row, offset)
        return after, pool.sum() + after.sum()

    assert find_copies(compiled(step, POOL, NEW, INDEX, INDEX), POOL_BYTES // 2)


def test_copy_inside_a_loop_is_found():
    hlo = """
%body (state: (s32[], f32[256,4,16,64])) -> (s32[], f32[256,4,16,64]) {
  %state = (s32[], f32[256,4,16,64]{3,2,1,0}) parameter(0)
  %pool = f32[256,4,16,64]{3,2,1,0} get-tuple-element(%state), index=1
  %copy.1 = f32[256,4,16,64]{3,2,1,0:T(8,128)} copy(%pool)
}
"""
    (line,) = find_copies(hlo, POOL_BYTES // 2)
    assert line.startswith("%copy.1")


def test_fusion_that_rewrites_its_update_target_is_found():
    """The root is an update, but of an array made in the same fusion."""
    hlo = """
%fused (p: f32[256,4,16,64], u: f32[1,4,16,64], i: s32[]) -> f32[256,4,16,64] {
  %p = f32[256,4,16,64]{3,2,1,0} parameter(0)
  %u = f32[1,4,16,64]{3,2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %twice = f32[256,4,16,64]{3,2,1,0} add(%p, %p)
  ROOT %dus = f32[256,4,16,64]{3,2,1,0} dynamic-update-slice(%twice, %u, %i, %i, %i, %i)
}

ENTRY %main (p: f32[256,4,16,64], u: f32[1,4,16,64], i: s32[]) -> f32[256,4,16,64] {
  %p = f32[256,4,16,64]{3,2,1,0} parameter(0)
  %u = f32[1,4,16,64]{3,2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %fusion = f32[256,4,16,64]{3,2,1,0} fusion(%p, %u, %i), kind=kLoop, calls=%fused
}
"""
    assert find_copies(hlo, POOL_BYTES // 2)
    in_place = hlo.replace("slice(%twice", "slice(%p")
    assert find_copies(in_place, POOL_BYTES // 2) == []
