"""Laws of the index stream, exact where they are exact, by chi-square elsewhere. Seeds are fixed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_ppl.numpyro import minibatches
from bnn_ppl.numpyro.noise import seed_words

WORDS = seed_words(jax.random.key(0))
SUBSAMPLING = ("epoch", "without_replacement", "with_replacement")
JUST_ABOVE = minibatches._RANKED_UP_TO + 1


@functools.partial(jax.jit, static_argnames=("size", "batch_size", "subsampling"))
def _indices(words, epoch, offset, step, **static):
    return minibatches.indices(words, epoch, offset, step, **static)


def indices(words=WORDS, epoch=0, offset=0, step=0, **static):
    return np.asarray(_indices(words, jnp.int32(epoch), jnp.int32(offset), jnp.int32(step), **static))


@functools.partial(jax.jit, static_argnames=("count", "size", "batch_size", "subsampling"))
def _many(words, first, count, **static):
    """Batches of shape (count, batch_size): of successive epochs, read from their start, and steps."""
    counters = first + jnp.arange(count)
    return jax.vmap(lambda c: minibatches.indices(words, c, jnp.int32(0), c, **static))(counters)


def many(count, first=0, words=WORDS, **static):
    return np.asarray(_many(words, first, count, **static))


def assert_uniform(counts):
    expected = counts.sum() / counts.size
    chi2 = np.sum((counts - expected) ** 2 / expected)
    assert abs(chi2 - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1)) < 5


def pairs(first, second, size):
    return np.bincount(first.astype(np.int64) * size + second, minlength=size**2).reshape(size, size)


@pytest.mark.parametrize("size", [1, 2, 5, 7, 32, 33, 64, 100, 1000, 60000])
def test_an_epoch_is_a_permutation(size):
    for epoch in (0, 1, 2**31 - 2):
        order = indices(epoch=epoch, size=size, batch_size=size, subsampling="epoch")
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize(("size", "batch_size"), [(1, 1), (5, 3), (7, 7), (64, 10), (100, 32), (1000, 128)])
def test_each_index_once_per_epoch(size, batch_size):
    sizes = {"size": size, "batch_size": batch_size}

    @jax.jit
    def run():
        def body(carry, step):
            batch = minibatches.indices(WORDS, *carry, step, **sizes, subsampling="epoch")
            return minibatches.advance(*carry, **sizes), (*carry, batch)

        return jax.lax.scan(body, (jnp.int32(0), jnp.int32(0)), jnp.arange(4 * size))[1]

    epochs, offsets, batches = (np.asarray(x) for x in run())
    start = np.arange(4 * size) * batch_size
    np.testing.assert_array_equal(epochs, start // size)
    np.testing.assert_array_equal(offsets, start % size)
    rows = batches.reshape(4 * batch_size, size)  # one epoch a row
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(size), (4 * batch_size, 1)))
    if size > 30:
        assert len({tuple(row) for row in rows}) == len(rows)
    whole = indices(epoch=2, size=size, batch_size=size, subsampling="epoch")
    np.testing.assert_array_equal(rows[2], whole)  # a batch's place does not change the order


@pytest.mark.parametrize("subsampling", ["epoch", "without_replacement"])
@pytest.mark.parametrize("size", [5, JUST_ABOVE])
def test_permutations_are_uniform(size, subsampling):
    order = np.concatenate(
        [many(1 << 15, i << 15, size=size, batch_size=size, subsampling=subsampling) for i in range(32)]
    )
    for i, j in ((0, 1), (0, size // 2), (1, size - 1), (size - 2, size - 1)):
        assert_uniform(np.bincount(order[:, i], minlength=size))
        counts = pairs(order[:, i], order[:, j], size)
        assert np.trace(counts) == 0
        assert_uniform(counts[~np.eye(size, dtype=bool)])
    # the same place in successive epochs or steps
    assert_uniform(pairs(order[1:, 0], order[:-1, 0], size).ravel())
    if size == 5:
        code = order @ 5 ** np.arange(5)
        assert np.unique(code).size == 120
        assert_uniform(np.unique(code, return_counts=True)[1])


def test_large_epochs_are_uniform():
    size, batch_size = 60000, 128
    order = many(1 << 13, size=size, batch_size=batch_size, subsampling="epoch")
    assert_uniform(np.bincount(order.ravel() // 60, minlength=1000))
    assert_uniform(np.bincount(order.ravel() % 245, minlength=245))  # the columns of the grid
    for lag in (1, 2, 64):
        assert_uniform(pairs(order[:, lag:].ravel() // 2000, order[:, :-lag].ravel() // 2000, 30).ravel())


def test_without_replacement():
    batches = many(1 << 14, size=1000, batch_size=20, subsampling="without_replacement")
    assert all(np.unique(row).size == 20 for row in batches)
    assert_uniform(np.bincount(batches.ravel(), minlength=1000))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_with_replacement(size):
    batches = many(1 << 15, size=size, batch_size=min(size, 32), subsampling="with_replacement")
    assert batches.min() == 0
    assert batches.max() == size - 1
    if size > 1:
        coarse = batches * 5 // size if size > 5 else batches
        cells = min(size, 5)
        assert_uniform(np.bincount(batches.ravel(), minlength=size))
        assert_uniform(pairs(coarse[:, 0], coarse[:, -1], cells).ravel())
        assert_uniform(pairs(coarse[1:, 0], coarse[:-1, 0], cells).ravel())


def test_with_replacement_up_to_the_largest_size():
    high = np.array([0, 2**32 - 1, 2**31, 123456789, 1, 0xFFFF0001], np.uint32)
    low = np.array([0, 2**32 - 1, 0, 2**32 - 7, 2**32 - 1, 0xFFFF], np.uint32)
    rng = np.random.default_rng(0)
    high, low = (np.concatenate([x, rng.integers(0, 2**32, 2000, dtype=np.uint32)]) for x in (high, low))
    for size in (2**31 - 1, 2**30 + 1, 65537, 65536, 3):
        exact = [((int(h) << 32) + int(w)) * size >> 64 for h, w in zip(high, low, strict=True)]
        np.testing.assert_array_equal(minibatches._uniform(jnp.asarray(high), jnp.asarray(low), size), exact)
    size = 3 * 2**29  # 32 bits modulo this size would hit the lower two thirds twice as often
    batches = many(1 << 10, size=size, batch_size=256, subsampling="with_replacement")
    assert_uniform(np.bincount(batches.ravel() // 2**24, minlength=96))


@pytest.mark.parametrize("subsampling", SUBSAMPLING)
def test_streams_differ(subsampling):
    options = {"size": 60000, "batch_size": 128, "subsampling": subsampling}
    base = indices(**options)
    np.testing.assert_array_equal(base, indices(**options))
    assert np.mean(base == indices(words=WORDS.at[0].add(1), **options)) < 0.1
    assert np.mean(base == indices(words=WORDS.at[1].add(1), **options)) < 0.1
    same_epoch, same_step = indices(step=1, **options), indices(epoch=1, offset=5, **options)
    assert np.array_equal(base, same_epoch) == (subsampling == "epoch")
    assert np.array_equal(base, same_step) == (subsampling != "epoch")
    assert np.mean(base == indices(epoch=1, step=1, **options)) < 0.1


@pytest.mark.parametrize("subsampling", SUBSAMPLING)
@pytest.mark.parametrize("size", [20, 1000])
def test_chains_in_parallel(size, subsampling):
    options = {"size": size, "batch_size": 16, "subsampling": subsampling}
    words, place = jnp.stack([WORDS, WORDS + 1, WORDS[::-1]]), jnp.array([3, 10, size - 1])
    batched = jax.jit(jax.vmap(lambda w, i: minibatches.indices(w, i, i, i, **options)))(words, place)
    loop = [indices(w, i, i, i, **options) for w, i in zip(words, place, strict=True)]
    np.testing.assert_array_equal(batched, loop)


def test_limits_of_int32():
    size = 2**31 - 1
    batch = indices(epoch=2**31 - 1, offset=size - 3, step=-1, size=size, batch_size=64, subsampling="epoch")
    assert batch.min() >= 0
    assert batch.max() < size
    assert np.unique(batch[:3]).size == 3
    assert np.unique(batch[3:]).size == 61
    epoch, offset = minibatches.advance(jnp.int32(2**31 - 2), jnp.int32(size - 3), size=size, batch_size=64)
    assert (int(epoch), int(offset)) == (2**31 - 1, 61)
    assert epoch.dtype == offset.dtype == jnp.int32
