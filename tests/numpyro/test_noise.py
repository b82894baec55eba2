"""A statistical battery for the counter-based noise. Seeds are fixed: a failure is a change of the generator.

Every statistic is a z-score under independence, held below 4.5 to 5 (the more of them in a test, the higher).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from bnn_ppl.numpyro import noise

KINDS = ("normal", "fast")
SIZE, STEPS = 1 << 18, 32
WORDS = noise.seed_words(jax.random.key(0))
_draw = jax.jit(noise.normal, static_argnums=(2, 3, 4))
_bits = jax.jit(lambda words, counter, position: noise.hash_bits(*noise.mix(words, counter), position))
POSITIONS = jnp.arange(SIZE, dtype=jnp.uint32)


def draw(words=WORDS, counter=0, size=SIZE, dtype="float32", kind="normal"):
    return np.asarray(_draw(words, jnp.int32(counter), size, dtype, kind), float)


def bits(words=WORDS, counter=0, position=POSITIONS):
    return np.asarray(_bits(words, jnp.int32(counter), position))


@pytest.fixture(scope="module", params=KINDS)
def draws(request):
    return request.param, np.stack([draw(counter=c, kind=request.param) for c in range(STEPS)])


def assert_uncorrelated(x, y):
    # the products of powers 1 and 2 see a linear dependence and one of scales
    assert abs(np.mean(x * y)) * np.sqrt(x.size) < 4.5
    x, y = x**2 - 1, y**2 - 1
    assert abs(np.mean(x * y)) / np.mean(x**2) * np.sqrt(x.size) < 4.5


def assert_uniform(counts, limit=5.0):
    expected = counts.sum() / counts.size
    chi2 = np.sum((counts - expected) ** 2 / expected)
    assert abs(chi2 - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1)) < limit


def test_moments(draws):
    kind, z = draws
    law = stats.norm() if kind == "normal" else stats.binom(32, 0.5)
    scale = 1.0 if kind == "normal" else 8**-0.5
    moments = [law.expect(lambda k, j=j: ((k - law.mean()) * scale) ** j) for j in range(1, 9)]
    np.testing.assert_allclose(moments[:4], [0, 1, 0, 3 if kind == "normal" else 2.9375], atol=1e-8)
    for j in range(1, 5):
        variance = moments[2 * j - 1] - moments[j - 1] ** 2
        assert abs(np.mean(z**j) - moments[j - 1]) / np.sqrt(variance / z.size) < 4.5
    # each step and each element as well, not the whole alone
    assert np.abs(z.mean(1) * np.sqrt(SIZE)).max() < 4.5
    assert np.abs(z.mean(0) * np.sqrt(STEPS)).max() < 6


def test_whole_distribution(draws):
    kind, z = draws
    if kind == "normal":
        assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
        assert min(stats.kstest(row, "norm").pvalue for row in z) > 1e-5
    else:
        values = np.arange(6, 27)
        ones = np.clip(np.rint(z.ravel() * np.sqrt(8)) + 16, 6, 26)
        cdf = stats.binom(32, 0.5).cdf(values)
        cdf[-1] = 1.0
        expected = np.diff(cdf, prepend=0) * z.size
        assert stats.chisquare([np.sum(ones == v) for v in values], expected).pvalue > 1e-4


def test_tail_frequencies():
    @jax.jit
    def exceedances(words):
        def body(count, c):
            z = noise.normal(words, c, 1 << 20, "float32")
            above = jnp.stack([jnp.sum(s * z > b) for s in (1, -1) for b in (3.0, 4.0, 5.0, 5.5)])
            return count + above, None

        return jax.lax.scan(body, jnp.zeros(8, jnp.int32), jnp.arange(400))[0]

    n = 400 << 20
    expected = n * stats.norm.sf([3.0, 4.0, 5.0, 5.5] * 2)  # 120 and 8 at the end
    tails = np.asarray(exceedances(WORDS))
    assert np.all(np.abs(tails - expected) < 4.5 * np.sqrt(expected))


def test_inverse_distribution_function():
    grid = np.linspace(0, 2**31 - 1, 1 << 20).astype(np.int64)
    magnitude = np.concatenate([np.arange(4096), grid, 2**31 - 1 - np.arange(4096)])
    positive = np.asarray(jax.jit(noise._to_normal)(magnitude.astype(np.uint32)))
    negative = np.asarray(jax.jit(noise._to_normal)((magnitude + 2**31).astype(np.uint32)))
    np.testing.assert_array_equal(positive, -negative)
    np.testing.assert_allclose(positive, -ndtri((magnitude + 0.5) * 2.0**-32), atol=5e-6, rtol=0)
    assert positive[0] > 6.3


def test_bit_balance():
    ones = sum(((bits(counter=c)[:, None] >> np.arange(32)) & 1).sum(0) for c in range(8))
    assert np.abs((ones - 4 * SIZE) / np.sqrt(2 * SIZE)).max() < 4.5
    b = ((bits()[:, None] >> np.arange(32)) & 1) * 2.0 - 1
    assert np.abs((b.T @ b - SIZE * np.eye(32)) / np.sqrt(SIZE)).max() < 4.8  # pairs of bits of one word


@pytest.mark.parametrize("which", ["word0", "word1", "counter", "position"])
def test_avalanche(which):
    for flipped in range(32 if which != "position" else 20):
        flip = np.uint32(1 << flipped)
        change = jnp.uint32(flip)
        if which == "position":
            other, before = bits(position=POSITIONS ^ change), bits()
            keep = (np.asarray(POSITIONS) & flip) == 0  # each pair once
            difference = (before ^ other)[keep]
        elif which == "counter":
            difference = bits() ^ bits(counter=change.astype(jnp.int32))
        else:
            difference = bits() ^ bits(words=WORDS.at[int(which[-1])].set(WORDS[int(which[-1])] ^ change))
        ones = ((difference[:, None] >> np.arange(32)) & 1).sum(0)
        assert np.abs((ones - difference.size / 2) / np.sqrt(difference.size / 4)).max() < 4.8


def test_serial_correlation(draws):
    _, z = draws
    for lag in (1, 2, 3, 4, 5, 8, 10, 16, 32, 64, 100, 128, 784, 1000, 1024, 1597, 4096, 17711, 78400):
        assert_uncorrelated(z[:, lag:], z[:, :-lag])


def test_steps_are_independent(draws):
    _, z = draws
    for lag in (1, 2, 3, 8, 16):
        assert_uncorrelated(z[lag:], z[:-lag])
        assert_uncorrelated(z[lag:, 1:], z[:-lag, :-1])


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_independent(kind):
    reference = draw(kind=kind)
    for word in (0, 1):
        for bit in range(0, 32, 3):
            words = WORDS.at[word].set(WORDS[word] ^ jnp.uint32(1 << bit))
            assert_uncorrelated(reference, draw(words, kind=kind))
    keys = [noise.seed_words(jax.random.fold_in(jax.random.key(1), i)) for i in range(16)]
    folded = np.stack([draw(words, kind=kind) for words in keys])
    assert_uncorrelated(folded[1:], folded[:-1])
    pairs = np.corrcoef(folded)[np.triu_indices(16, 1)] * np.sqrt(SIZE)
    assert np.abs(pairs).max() < 4.5
    assert_uncorrelated(draw(WORDS, 1, kind=kind), draw(WORDS[::-1], 1, kind=kind))


@pytest.mark.parametrize("shift", [0, 12, 24])
def test_pairs_fill_the_square(shift):
    b = np.stack([(bits(counter=c) >> shift) & 255 for c in range(8)]).astype(np.int64)
    for first, second in ((b[:, ::2], b[:, 1::2]), (b[::2], b[1::2])):  # neighbours, and successive steps
        assert_uniform(np.bincount((first * 256 + second).ravel(), minlength=1 << 16))


def test_repeated_values():
    pairs = 0
    for c in range(64):
        pairs += SIZE - np.unique(bits(counter=c)).size
    expected = 64 * SIZE**2 / 2**33  # 512; a permutation of the 32-bit words would give none
    assert abs(pairs - expected) < 4.5 * np.sqrt(expected)


def test_birthday_spacings():
    repeats, days, people = 0, 2**32, 4096
    every = np.stack([bits(counter=c).reshape(-1, people) for c in range(8)]).reshape(-1, people)
    for row in every:
        spacings = np.sort(np.diff(np.sort(row.astype(np.int64))))
        repeats += np.sum(spacings[1:] == spacings[:-1])
    expected = len(every) * people**3 / (4 * days)
    assert abs(repeats - expected) < 4.5 * np.sqrt(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_same_draw_however_it_is_called(kind):
    size, counters = 1003, jnp.arange(4)
    plain = np.stack([noise.normal(WORDS, c, size, "float32", kind) for c in counters])

    def one(counter):
        return noise.normal(WORDS, counter, size, "float32", kind)

    batched = jax.jit(jax.vmap(one))(counters)
    scanned = jax.lax.scan(lambda _, c: (None, one(c)), None, counters)[1]
    seeds = jnp.stack([WORDS, WORDS + 1])
    chains = jax.vmap(lambda w: noise.normal(w, counters[1], size, "float32", kind))(seeds)
    for other, expected in ((batched, plain), (scanned, plain), (chains[0], plain[1])):
        np.testing.assert_allclose(other, expected, atol=5e-6)  # fused multiplications may round differently
    assert np.abs(chains[1] - chains[0]).max() > 1
    part = noise.normal(WORDS, counters[2], 100, "float32", kind, offset=57)
    np.testing.assert_allclose(part, plain[2, 57:157], atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    with jax.enable_x64(True):
        z = jax.jit(lambda c: noise.normal(WORDS, c, SIZE, "float64", kind))(jnp.int32(3))
        assert z.dtype == jnp.float64
        z = np.asarray(z)
    assert abs(z.mean()) * np.sqrt(SIZE) < 4.5
    assert abs(np.mean(z**2) - 1) * np.sqrt(SIZE / 2) < 4.5
    assert_uncorrelated(z[1:], z[:-1])
    if kind == "normal":
        assert stats.kstest(z, "norm").pvalue > 1e-4
        fine = (stats.norm.cdf(z) * 2.0**31) % 1  # what the second hash decides
        assert stats.kstest(fine, "uniform").pvalue > 1e-4
        assert_uncorrelated((fine - 0.5) * np.sqrt(12), z)


def test_seed_words():
    typed = noise.seed_words(jax.random.key(7))
    assert typed.shape == (2,)
    assert typed.dtype == jnp.uint32
    np.testing.assert_array_equal(typed, noise.seed_words(jax.random.PRNGKey(7)))
    assert noise.seed_words(jax.random.key(7, impl="rbg")).shape == (2,)
    assert np.any(typed != noise.seed_words(jax.random.key(8)))
