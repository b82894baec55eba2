"""SWA and SWAG along NumPyro's SVI; mirrors tests/pyro/test_swa.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from bnn_ppl.numpyro import SWA, SWAG
from bnn_ppl.schedules import CosineRestarts, LinearRamp
from tests import averaged, averaged_checks
from tests.averaging_hosts import NumPyro as HOST


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_average_of_optax():
    """Its incremental update, with the weights of a mean, from the same path."""
    run = averaged_checks.train(HOST, "AutoDelta", 11, SWA, model=averaged_checks.real, start=2, cycle_length=3)
    path = averaged_checks.at_snapshots(run)
    average = path[0]
    for number, params in enumerate(path[1:], 1):
        average = optax.incremental_update(params, average, 1 / (number + 1))
    found = run.get("averaged_params")
    assert set(found) == set(average)
    for name, value in found.items():
        np.testing.assert_allclose(value, average[name], rtol=1e-13)
        np.testing.assert_allclose(value, np.mean([params[name] for params in path], 0), rtol=1e-13)


def test_average_of_any_guide():
    averaged_checks.average_of_parameters(HOST)


@pytest.mark.parametrize("rank", [0, 3, 10])
def test_moments_of_swag(rank):
    averaged_checks.point_guide(HOST, rank)


def test_covariance_across_layers():
    averaged_checks.across_layers(HOST, 20_000)


def test_guides_with_noise():
    averaged_checks.guides_with_noise(HOST)


@pytest.mark.parametrize("cls", [SWA, SWAG])
def test_bad_input(cls):
    model = averaged.small(HOST)
    pair = model, AutoDelta(model), HOST.adam(0.1), Trace_ELBO()
    with pytest.raises(ValueError, match="cycle_length must be an integer of at least 1, got 0"):
        cls(*pair, start=1, cycle_length=0)
    svi = cls(*pair, start=5, cycle_length=5, learning_rate=LinearRamp(0.1, 0.01, 100))
    with pytest.warns(UserWarning, match="learning_rate is .* at the first snapshot"):
        svi.run(random.key(0), 10, *averaged.data(HOST), progress_bar=False)
    if cls is SWAG:
        with pytest.raises(ValueError, match="rank must be at least 2, for one deviation tells no covariance, got 1"):
            cls(*pair, start=1, cycle_length=1, rank=1)
        for rank in (-1, 2.5, False, "20"):
            with pytest.raises(ValueError, match=f"rank must be an integer of at least 0.* got {rank!r}"):
                cls(*pair, start=1, cycle_length=1, rank=rank)


def test_schedules_in_the_optimiser():
    """Optax takes them as they are; of the published one, half of the steps before `start` are at the first rate."""
    start = 40
    ramp = LinearRamp(0.05, 0.01, length=16, begin=20)
    pieces = [optax.constant_schedule(0.05), optax.linear_schedule(0.05, 0.01, 16)]
    published = optax.join_schedules(pieces, [20])
    steps = jnp.arange(60)
    np.testing.assert_allclose(jax.vmap(ramp)(steps), jax.vmap(published)(steps), rtol=1e-6)
    assert float(ramp(start - 4)) == pytest.approx(0.01)
    cosine = CosineRestarts(0.05, 10, floor=0.01)
    expected = 0.01 + 0.02 * (1 + np.cos(np.pi * (np.arange(60) % 10) / 10))
    np.testing.assert_allclose(jax.vmap(cosine)(steps), expected, rtol=1e-12)
    for rate in (ramp, cosine):
        optimiser = optax.sgd(rate)
        state, moved = optimiser.init(jnp.zeros(())), []
        for _ in range(12):
            update, state = optimiser.update(jnp.ones(()), state)
            moved.append(-float(update))
        np.testing.assert_allclose(moved, [float(rate(k)) for k in range(12)], rtol=1e-6)
