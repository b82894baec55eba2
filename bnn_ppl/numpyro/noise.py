r"""Counter-based noise: one draw for all the parameters of a step, cheap enough for an inner loop on a CPU.

Element ``i`` of the draw of step ``c`` is a function of two seed words, ``c`` and ``i`` alone,

.. math:: z_i = T(x_i + P_b(x_i)), \qquad x_i = \phi\, i + a, \qquad (a, b) = K(w_0, w_1, c),

where all arithmetic is modulo 2^32, phi is the integer nearest to 2^32 over the golden ratio, and P_b is the
integer hash *lowbias32* of Wellons with the key word ``b`` added between its two multiplications. Adding the
input to its output (Davies, Meyer) makes a random function of a permutation, so that values repeat as often
as they should. K is three full hashes of scalars; the same words give different keys (a, b) to all 2^32
counters. The elements need no state and no order, so that the draw is one vectorised loop.

``T`` is the inverse normal distribution function ("normal") or a centred bit count ("fast"). "fast" is
binomial: its first three moments are those of the normal, its kurtosis is 2.94, and it takes 33 values, none
beyond 5.7. That is enough for methods of weak order 1 (Kloeden and Platen, section 14.1).

References
----------
- C. Wellons, *Prospecting for Hash Functions*, https://nullprogram.com/blog/2018/07/31/ (lowbias32).
- J. Salmon, M. Moraes, R. Dror, D. Shaw, *Parallel Random Numbers: As Easy as 1, 2, 3*, SC 2011.
- P. Kloeden, E. Platen, *Numerical Solution of Stochastic Differential Equations*, 1992.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_GOLDEN = np.uint32(0x9E3779B9)
# log(1 + m) / m for m in [sqrt(1/2) - 1, sqrt(2) - 1], error of the logarithm 2e-7
_LOG = (0.118274719, -0.189019774, 0.206046744, -0.248813398, 0.333032982, -0.500019651, 1.00000325)
# -ndtri(p) = numerator(t) / denominator(t), t = sqrt(-2 log p), for p in [2^-33, 1/2], error 1e-6
_NUMERATOR = (1.57270089, 3.27984937, -3.50875363, -2.98260821)
_DENOMINATOR = (0.000299794648, 1.56213221, 3.50146006, 1.0)


def seed_words(key: Array) -> Array:
    """Two 32-bit words that stand for a key.

    Parameters
    ----------
    key : jax.Array
        One PRNG key, typed or raw, of any implementation.

    Returns
    -------
    jax.Array, uint32, shape (2,)
    """
    return jax.random.bits(key, (2,), "uint32")


def normal(words: Array, counter: Array, size: int, dtype: Any, kind: str = "normal", offset: Array | int = 0) -> Array:
    """Independent draws of mean 0 and variance 1.

    Parameters
    ----------
    words : jax.Array, uint32, shape (2,)
        The seed, from `seed_words`.
    counter : jax.Array, int32 or uint32, scalar
        The step. Other words or another counter give independent draws.
    size : int
        How many; static.
    dtype : dtype
        float32 or float64; a smaller type is computed in float32 and rounded.
    kind : {"normal", "fast"}
        Normal, or the centred and scaled number of ones among 32 random bits.
    offset : int
        Position of the first element: the draw is ``[offset:]`` of one that starts at 0. Static or traced.

    Returns
    -------
    jax.Array, shape (size,)

    Notes
    -----
    Both kinds are symmetric. In float32, "normal" takes a sign and 31 bits of a floating tail probability: it
    reaches 6.3, with the right frequencies up to there. (Uniforms of 23 or 24 bits pushed through `erf_inv`
    end at 5.3 or 5.4, in coarse steps from about 5 on.) Its error against the exact inverse is below 5e-6. In
    float64 it takes 52 bits of two hashes, and reaches 8.2.
    """
    a, b = mix(words, counter)
    position = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32(offset)
    bits = hash_bits(a, b, position)
    if kind == "fast":
        wide = jnp.promote_types(dtype, jnp.float32)
        ones = jax.lax.population_count(bits).astype(wide)
        return ((ones - 16) * wide.type(8**-0.5)).astype(dtype)
    if jnp.dtype(dtype) != jnp.float64:
        return _to_normal(bits).astype(dtype)
    high = jax.lax.bitcast_convert_type(bits, jnp.int32).astype(dtype)
    low = (hash_bits(b, a, position) >> 12).astype(dtype)
    return np.sqrt(2) * jax.lax.erf_inv(high * 2.0**-31 + (low + 0.5) * 2.0**-51)


def mix(words: Array, counter: Array) -> tuple[Array, Array]:
    """Key words (a, b), uint32, of the stream ``counter`` of the seed ``words``."""
    a = _hash(words[0] ^ _hash(counter.astype(jnp.uint32) + _GOLDEN))
    b = _hash(words[1] + _hash(a ^ _GOLDEN))
    return _hash(a + b), b


def hash_bits(a: Array, b: Array, position: Array) -> Array:
    """Random bits, uint32, at ``position`` (uint32) of the stream with the key words ``a`` and ``b``."""
    start = position * _GOLDEN + a
    return start + _hash(start, b)


def _hash(x: Array, key: Array | int = 0) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = ((x ^ (x >> 15)) + key) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _to_normal(bits: Array) -> Array:
    # Instead of erf_inv, which costs over twice as much on a CPU: log1p is slow, and both branches run.
    signed = jax.lax.bitcast_convert_type(bits, jnp.int32)
    tail = ((signed & 0x7FFFFFFF).astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-32)
    pattern = jax.lax.bitcast_convert_type(tail, jnp.int32)
    exponent = (pattern - 0x3F3504F3) >> 23  # tail = 2^exponent (1 + m), 1 + m in [sqrt(1/2), sqrt(2))
    m = jax.lax.bitcast_convert_type(pattern - (exponent << 23), jnp.float32) - 1
    log_tail = exponent.astype(jnp.float32) * np.float32(np.log(2)) + m * _polynomial(_LOG, m)
    t = jnp.sqrt(-2 * log_tail)
    z = _polynomial(_NUMERATOR, t) / _polynomial(_DENOMINATOR, t)
    return jnp.where(signed < 0, -z, z)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value: Any = np.float32(coefficients[0])
    for c in coefficients[1:]:
        value = value * x + np.float32(c)
    return value
