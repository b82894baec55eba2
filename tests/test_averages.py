"""Running averages: against sums by hand, of independent snapshots, in single precision, and with other weights."""

import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from bnn_ppl import averages, snapshots
from bnn_ppl.averages import add_to_mean, add_to_spread, weight_of, weights_in_mean
from bnn_ppl.schedules import CosineRestarts, LinearRamp, Triangular
from bnn_ppl.snapshots import check_learning_rate
from tests import averaged

RNG = np.random.default_rng(0)
BACKENDS = {"numpy": np.asarray, "numpyro": jnp.asarray, "pyro": torch.as_tensor}


def follow(path, multiplier=None):
    """Mean and variance over the first axis."""
    mean, spread = 0 * path[0], 0 * path[0]
    for number, value in enumerate(path):
        weight = 1.0 if number == 0 else weight_of(multiplier, number)
        spread = add_to_spread(spread, mean, value, weight)
        mean = add_to_mean(mean, value, weight)
    return mean, spread


def test_equal_weights():
    path = RNG.normal(size=(20, 7))
    mean, spread = follow(path)
    np.testing.assert_allclose(mean, path.mean(0), rtol=1e-13)
    np.testing.assert_allclose(spread, path.var(0), rtol=1e-13)
    # The published recursion goes negative here.
    np.testing.assert_allclose([follow(np.arange(1.0, n))[1] for n in (3, 4, 5, 6)], [0.25, 2 / 3, 1.25, 2])
    np.testing.assert_array_equal(follow(np.full((5, 3), 1 / 3)), [[1 / 3] * 3, [0.0] * 3])


@pytest.mark.parametrize("multiplier", [lambda n: 0.3, lambda n: 1.0, lambda n: (n + 1) ** -0.7, None])
def test_other_weights(multiplier):
    """By the recursion of METHODS, and by the weights that it comes to."""
    path = RNG.normal(size=(9, 4))
    m, s = path[0], np.zeros(4)
    for n in range(1, 9):
        w = 1 / (n + 1) if multiplier is None else multiplier(n)
        d = path[n] - m
        m, s = m + w * d, (1 - w) * (s + w * d**2)
    mean, spread = follow(path, multiplier)
    np.testing.assert_allclose(mean, m, rtol=1e-13)
    np.testing.assert_allclose(spread, s, rtol=1e-13, atol=1e-30)
    weights = weights_in_mean(multiplier, 9)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(mean, weights @ path, rtol=1e-12)
    np.testing.assert_allclose(spread, weights @ (path - mean) ** 2, rtol=1e-11, atol=1e-30)
    assert weights_in_mean(multiplier, 0).shape == (0,)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_independent_snapshots(count):
    """E S = variance (n - 1) / n."""
    dimensions, variance = 200_000, 2.5
    path = RNG.normal(3.0, variance**0.5, size=(count, dimensions))
    mean, spread = follow(path)
    error = variance * (2 * (count - 1)) ** 0.5 / count / dimensions**0.5
    assert abs(spread.mean() - variance * (count - 1) / count) < 4 * error
    assert abs(mean.mean() - 3) < 4 * (variance / count / dimensions) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_precision(backend):
    """Of N(1, 1e-8), where a second moment minus a squared mean is wrong by tens."""
    path = RNG.normal(1.0, 1e-4, size=(1000, 50)).astype(np.float32)
    mean, spread = follow(BACKENDS[backend](path))
    assert str(spread.dtype).endswith("float32")
    truth = path.astype(np.float64).var(0)
    np.testing.assert_allclose(spread, truth, rtol=0.03)
    np.testing.assert_allclose(mean, path.astype(np.float64).mean(0), atol=3e-6)
    assert np.abs((path**2).mean(0) - path.mean(0) ** 2 - truth).max() > truth.max()


def test_affine_coordinates():
    path, scale, shift = RNG.normal(size=(9, 4)), np.array([2.0, -3.0, 0.1, 1e4]), 5.0
    (mean, spread), (moved, stretched) = follow(path), follow(shift + scale * path)
    np.testing.assert_allclose(moved, shift + scale * mean, rtol=1e-12)
    np.testing.assert_allclose(stretched, scale**2 * spread, rtol=1e-10)


def test_variances_of_the_covariances():
    found = {name: averages.variance(name, 3.0, 0.5) for name in averages.COVARIANCES if name != "parameters"}
    assert found == {"mixture": 3.5, "iterate": 0.5, "low_rank": 3.25}
    assert [averages.columns_scale(k) ** 2 for k in (0, 1, 2, 5)] == pytest.approx([0, 0, 0.5, 0.125])


@pytest.mark.parametrize("start", [0, 1, 3, 10])
@pytest.mark.parametrize("cycle_length", [1, 4])
def test_runs_without_a_snapshot(start, cycle_length):
    """There is a warning for just these."""
    for before in range(13):
        for steps in range(1, 6):
            taken = averaged.steps_of(start or cycle_length, cycle_length, before + steps)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                snapshots.warn_no_snapshot(before, steps, start, cycle_length)
            assert bool(caught) == (not any(step > before for step in taken))


def test_learning_rates():
    """Those that do not belong to averages are said, with what to do; the others pass."""
    right = [
        (0.1, 7, 3),
        (lambda step: 0.1, 7, 3),
        (LinearRamp(0.1, 0.01, 400, begin=500), 901, 50),
        (Triangular(0.05, 0.01, 100, begin=200), 251, 100),
        (CosineRestarts(0.1, 50, floor=0.01), 50, 50),
        (CosineRestarts(0.1, 50), 50, 50),
        (optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.01)], [20]), 21, 5),
        (lambda step: jnp.where(step < 20, 0.1, 0.01), 21, 5),
    ]
    for arguments in right:
        check_learning_rate(*arguments)
    changed = [
        (LinearRamp(0.1, 0.01, 400, begin=500), 700, 50),
        (CosineRestarts(0.1, 50, floor=0.01), 50, 40),
        (optax.exponential_decay(0.1, 100, 0.5), 10, 10),
    ]
    for rate, start, cycle_length in changed:
        check_learning_rate(rate, start, cycle_length)
        with pytest.warns(
            UserWarning, match=r"learning_rate is .* at the first snapshot \(step \d+\) and .* mixes laws"
        ):
            assert snapshots.warn_changed_rate(rate, start, start + cycle_length)
    assert not snapshots.warn_changed_rate(lambda step: 1e-9, 5, 50)
    with pytest.warns(UserWarning, match="1e-08 at the first snapshot .* 1e-09 at a later one"):
        snapshots.warn_changed_rate(lambda step: 1e-8 if step < 10 else 1e-9, 5, 50)
    rates = [0.1] * 30
    check_learning_rate(lambda step: rates[step], 25, 10)  # ends with the run
    with pytest.raises(ValueError, match=r"learning_rate must be a number or a callable of the step.*fails at step 34"):
        check_learning_rate(lambda step: rates[step], 35, 10)
    message = r"0\.05 at the first snapshot \(step 200\), and as low as 0\.01 at step 250: .* lowest, with start=251"
    with pytest.warns(UserWarning, match=message):
        check_learning_rate(Triangular(0.05, 0.01, 100, begin=200), 201, 100)
    with pytest.raises(ValueError, match="learning_rate must return finite values"):
        check_learning_rate(lambda step: float("nan"), 1, 1)
