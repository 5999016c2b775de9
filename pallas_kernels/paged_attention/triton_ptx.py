"""The few instructions that the Pallas-Triton kernels ask for by name, and what they mean in jnp.

What Triton makes of `exp2` and of a conversion from 8 bits costs several times the instructions:
exp2 handles subnormal results, a product and a difference are never fused, and 8-bit numbers go
through float32. In the machine code for sm_90a, these were a third of the inner loop.

Interpreted, each function computes the same in plain jnp.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

# 0x6400 + u are the bits of the float16 1024 + u, for u in [0, 1024): biased to u = x + 128, an
# int8 x is that number minus 1152 (0x6480).
WIDEN_INT8 = """{
.reg .b32 biased, offset;
xor.b32 biased, $2, 0x80808080;
mov.b32 offset, 0x64806480;
prmt.b32 $0, biased, 0x64646464, 0x4140;
prmt.b32 $1, biased, 0x64646464, 0x4342;
sub.f16x2 $0, $0, offset;
sub.f16x2 $1, $1, offset;
}"""
WIDEN_FLOAT8_E4M3FN = """{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""

EXP2_OF_DIFFERENCE = """{
.reg .f32 negated, difference;
neg.f32 negated, $3;
fma.rn.ftz.f32 difference, $1, $2, negated;
ex2.approx.ftz.f32 $0, difference;
}"""


def widened(x: jax.Array, *, interpret: bool) -> jax.Array:
    """int8 or float8_e4m3fn as float16, exactly (the latter from sm_89 on)."""
    if interpret:
        return x.astype(jnp.float16)
    asm = WIDEN_INT8 if x.dtype == jnp.int8 else WIDEN_FLOAT8_E4M3FN
    return _elementwise(asm, "=r,=r,r", [x], pack=4, dtype=jnp.float16)


def exp2(x: jax.Array, *, interpret: bool) -> jax.Array:
    """2**x of float32; subnormal results are 0."""
    if interpret:
        return jnp.exp2(x)
    return _elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x])


def exp2_of_difference(
    x: jax.Array, factor: jax.Array, minus: jax.Array, *, interpret: bool
) -> jax.Array:
    """2**(x * factor - minus) of float32 arrays of one shape, the difference rounded once."""
    if interpret:
        return jnp.exp2(x * factor - minus)
    return _elementwise(EXP2_OF_DIFFERENCE, "=f,f,f,f", [x, factor, minus])


def reciprocal(x: jax.Array, *, interpret: bool) -> jax.Array:
    """1 / x of float32, within an ulp; of infinity 0."""
    if interpret:
        return 1 / x
    return _elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x])


def nearest(x: jax.Array, *, interpret: bool) -> jax.Array:
    """float32 rounded to whole numbers, ties to even. (Triton knows floor and ceil only.)"""
    if interpret:
        return jnp.round(x)
    return _elementwise("cvt.rni.f32.f32 $0, $1;", "=f,f", [x])


def _elementwise(
    asm: str, constraints: str, args: list[jax.Array], *, pack: int = 1, dtype=jnp.float32
) -> jax.Array:
    [result] = pltriton.elementwise_inline_asm(
        asm,
        args=args,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return result
