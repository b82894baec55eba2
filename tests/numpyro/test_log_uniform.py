"""The log-uniform prior in NumPyro's ELBO; mirrors tests/pyro/test_log_uniform.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import TraceMeanField_ELBO

from bnn_ppl import divergences
from bnn_ppl.numpyro import ImproperLogUniform
from tests.test_divergences import ALPHA, EXACT, SLOPE


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def divergence(log_alpha, kl="exact", loc=1.0):
    return kl_divergence(dist.Normal(loc, jnp.exp(0.5 * log_alpha) * jnp.abs(loc)), ImproperLogUniform(kl))


def test_table_and_its_gradient(float64):
    log_alpha = jnp.log(jnp.asarray(ALPHA))
    np.testing.assert_allclose(divergence(log_alpha, loc=-0.3), EXACT, rtol=1e-10)
    np.testing.assert_allclose(jax.vmap(jax.grad(divergence))(log_alpha), SLOPE, rtol=3e-10)


def test_table_in_single_precision():
    log_alpha = jnp.log(jnp.asarray(ALPHA, "float32"))
    assert divergence(log_alpha).dtype == jnp.float32
    np.testing.assert_allclose(divergence(log_alpha), EXACT, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(divergence))(log_alpha), SLOPE, rtol=1e-5)


@pytest.mark.parametrize("kl", divergences.KINDS)
def test_gradients_by_differences(float64, kl):
    log_alpha = jnp.linspace(-8.0, 6.0, 41) + 1e-3
    numeric = (divergence(log_alpha + 1e-6, kl) - divergence(log_alpha - 1e-6, kl)) / 2e-6
    np.testing.assert_allclose(jax.vmap(jax.grad(divergence), (0, None))(log_alpha, kl), numeric, rtol=1e-6, atol=1e-8)
    second = jax.vmap(jax.grad(jax.grad(divergence)))(log_alpha)
    slope = jax.vmap(jax.grad(divergence))
    np.testing.assert_allclose(second, (slope(log_alpha + 1e-6) - slope(log_alpha - 1e-6)) / 2e-6, atol=1e-8)


@pytest.mark.parametrize("kl", divergences.KINDS)
def test_weights_of_mean_zero_have_finite_gradients(kl):
    value, slope = jax.value_and_grad(lambda loc: kl_divergence(dist.Normal(loc, 2.0), ImproperLogUniform(kl)))(0.0)
    assert slope == 0
    assert value == pytest.approx(0.0 if kl != "cubic" else divergences.cubic(np.zeros(1))[0])


LOC, SCALE = np.array([[0.5, -1.0, 2.0], [0.1, 0.0, -0.2]]), np.array([0.2, 1.0, 3.0])


def model():
    w = numpyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    numpyro.sample("y", dist.Normal(w.sum(), 1.0), obs=0.0)


def guide():
    numpyro.sample("w", dist.Normal(LOC, SCALE).to_event(2))


def test_divergence_in_the_elbo(float64):
    """Summed over the weights, in the place of log densities."""
    loss = TraceMeanField_ELBO().loss(random.key(0), {}, model, guide)
    seeded = handlers.seed(guide, random.split(random.key(0))[1])
    w = handlers.trace(seeded).get_trace()["w"]["value"]
    density = dist.Normal(w.sum(), 1.0).log_prob(0.0)
    expected = divergences.exact(0.5 * (LOC / SCALE) ** 2).sum() - density
    assert float(loss) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("loc", [0.0, 0.5, 3.0])
def test_constant_between_divergence_and_density(float64, loc):
    q, prior = dist.Normal(loc, 0.7), ImproperLogUniform()
    w = loc + 0.7 * (jnp.arange(-12e5, 12e5) + 0.5) * 1e-5
    expected = 0.7e-5 * (jnp.exp(q.log_prob(w)) * (q.log_prob(w) - prior.log_prob(w))).sum()
    constant = 0.5 * (1 + np.euler_gamma + np.log(4 * np.pi))
    assert constant == pytest.approx(2.0541, abs=5e-5)
    assert float(kl_divergence(q, prior) - expected) == pytest.approx(constant, abs=1e-4)


def test_density_and_support():
    prior = ImproperLogUniform().expand([2, 3]).to_event(1)
    assert (prior.batch_shape, prior.event_shape) == ((2,), (3,))
    np.testing.assert_allclose(prior.log_prob(LOC + 0.3), -np.log(np.abs(LOC + 0.3)).sum(1), rtol=1e-6)
    draws = np.abs(prior.sample(random.key(0), (4000,)))
    assert draws.shape == (4000, 2, 3)
    assert 0.001 <= draws.min() < 0.00102
    assert 0.99 < draws.max() <= 1
    np.testing.assert_allclose(np.log(draws).mean(), 0.5 * np.log(1e-3), atol=5 * 2 / 24_000**0.5)
    with pytest.raises(ValueError, match="kl must be one of 'exact', 'sigmoid', 'cubic', 'ard', got 'fit'"):
        ImproperLogUniform("fit")
    with pytest.raises(NotImplementedError, match="Could not find signature"):
        kl_divergence(dist.Laplace(0.0, 1.0), ImproperLogUniform())
