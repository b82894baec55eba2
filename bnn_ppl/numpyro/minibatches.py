r"""The index stream of a subsampled plate: which rows of the data make the batch of a step.

Every epoch has its own permutation pi of [0, N), and the batch at position ``o`` of epoch ``e`` is

.. math:: \pi_e(o), \ldots, \pi_e(o + B - 1), \qquad \pi_e(N + k) := \pi_{e+1}(k),

so that each index comes exactly once per epoch even where a batch straddles two. The permutation is stored
nowhere: it is a Feistel network on the smallest nearly square grid rows x columns >= N (Black and Rogaway's
generalised Feistel cipher, alternately row += F(column) mod rows and column += F(row) mod columns) with
"cycle walking" back into [0, N). Such a grid exceeds N by less than its side, so that hardly any index
walks; a power of two, the usual domain, can be twice N and then costs twice the time. For few points, where
pairs are biased, pi(i) is the rank of the i-th of N random words: a random permutation.

References
----------
- J. Black, P. Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from bnn_ppl.layout import Plate
from bnn_ppl.numpyro.noise import hash_bits, mix, seed_words

# Chi-square of pairs finds a bias for N below 50 with 8 rounds (2^23 keys), below about 20 with 10. Ranking
# 32 words costs less than the network, ranking 64 several times as much.
_RANKED_UP_TO = 32
_ROUNDS = 10


Stream = dict[str, tuple[Array, Array]]  # epoch and offset, int32 scalars, by plate


def start_stream(plates: Mapping[str, Plate]) -> Stream:
    """Where a chain's minibatches begin."""
    return {name: (jnp.int32(0), jnp.int32(0)) for name in plates}


def next_rows(
    plates: Mapping[str, Plate], rng_key: Array, stream: Stream, step: Array, subsampling: str
) -> tuple[dict[str, Array], Stream]:
    """Rows of each plate at a gradient step, and the stream past them."""
    batch, rest = {}, {}
    for i, (name, plate) in enumerate(sorted(plates.items())):
        epoch, offset = stream[name]
        shape = {"size": plate.size, "batch_size": plate.batch_size}
        words = seed_words(random.fold_in(rng_key, i))
        batch[name] = indices(words, epoch, offset, step, **shape, subsampling=subsampling)
        rest[name] = advance(epoch, offset, **shape)
    return batch, rest


def indices(
    words: Array, epoch: Array, offset: Array, step: Array, *, size: int, batch_size: int, subsampling: str
) -> Array:
    """Indices of one batch.

    Parameters
    ----------
    words : jax.Array, uint32, shape (2,)
        The seed of this plate and chain, from `noise.seed_words`; not one that also serves for noise.
    epoch, offset : jax.Array, int32, scalars
        The epoch, and the position in it; 0 <= offset < size. Read by "epoch" only.
    step : jax.Array, int32, scalar
        The gradient step. Read by the other two only.
    size, batch_size : int
        N and B, static, B <= N < 2^31.
    subsampling : {"epoch", "without_replacement", "with_replacement"}
        A fresh permutation every epoch, a fresh random subset every step, or independent uniform indices.

    Returns
    -------
    jax.Array, int32, shape (batch_size,)
    """
    position = jnp.arange(batch_size, dtype=jnp.uint32)
    if subsampling == "with_replacement":
        a, b = mix(words, step)
        return _uniform(hash_bits(a, b, position), hash_bits(b, a, position), size).astype(jnp.int32)
    if subsampling == "without_replacement":
        a, b = mix(words, step)
        return _permutation(a, b, position, size).astype(jnp.int32)
    position += offset.astype(jnp.uint32)
    beyond = position >= size
    (a, b), (next_a, next_b) = mix(words, epoch), mix(words, epoch + 1)
    a, b = jnp.where(beyond, next_a, a), jnp.where(beyond, next_b, b)
    return _permutation(a, b, jnp.where(beyond, position - size, position), size).astype(jnp.int32)


def advance(epoch: Array, offset: Array, *, size: int, batch_size: int) -> tuple[Array, Array]:
    """Epoch and offset, int32 scalars, of the batch after the one at ``epoch`` and ``offset``."""
    left = size - batch_size  # offset + batch_size can exceed an int32
    wraps = offset >= left
    return epoch + wraps.astype(epoch.dtype), jnp.where(wraps, offset - left, offset + batch_size)


def _permutation(a: Array, b: Array, x: Array, size: int) -> Array:
    """Values at the points x (uint32, shape (B,)) of the permutation of [0, size) with key words a and b."""
    a, b = jnp.broadcast_to(a, x.shape), jnp.broadcast_to(b, x.shape)
    if size <= _RANKED_UP_TO:
        every = jnp.arange(size, dtype=jnp.uint32)
        own, others = hash_bits(a, b, x)[:, None], hash_bits(a[:, None], b[:, None], every)
        before = (others < own) | ((others == own) & (every < x[:, None]))
        return jnp.sum(before, axis=1, dtype=jnp.uint32)
    placed = _feistel(a, b, x, size)
    return jax.lax.while_loop(
        lambda y: jnp.any(y >= size), lambda y: jnp.where(y >= size, _feistel(a, b, y, size), y), placed
    )


def _feistel(a: Array, b: Array, x: Array, size: int) -> Array:
    side = math.isqrt(size - 1) + 1
    rows, columns = np.uint32(side), np.uint32(-(-size // side))
    row, column = x // columns, x % columns
    for i in range(_ROUNDS):  # row and column are below 2^16, so the rounds hash different positions
        this_round = np.uint32(i << 16)
        if i % 2:
            column = (column + hash_bits(a, b, row + this_round) % columns) % columns
        else:
            row = (row + hash_bits(a, b, column + this_round) % rows) % rows
    return row * columns + column


def _uniform(high: Array, low: Array, size: int) -> Array:
    """Integer part of size * (high 2^32 + low) / 2^64, without 64-bit integers; biased by size / 2^64."""
    product = high * np.uint32(size)
    return _high_word(high, size) + (product + _high_word(low, size) < product)


def _high_word(x: Array, n: int) -> Array:
    """Integer part of x n / 2^32 for x uint32 and a static n < 2^32, by 16-bit halves."""
    n_high, n_low = np.uint32(n >> 16), np.uint32(n & 0xFFFF)
    high, low = x >> 16, x & 0xFFFF
    middle = high * n_low + ((low * n_low) >> 16)
    return high * n_high + (middle >> 16) + ((low * n_high + (middle & 0xFFFF)) >> 16)
