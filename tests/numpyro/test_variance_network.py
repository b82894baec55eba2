"""Variance networks in NumPyro's SVI; mirrors tests/pyro/test_variance_network.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoGuideList, AutoNormal

from bnn_ppl.numpyro import AutoVarianceNetwork, ImproperLogUniform
from bnn_ppl.numpyro.variational_dropout import DropoutNormal
from tests import variance


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def log_uniform():
    w = numpyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    numpyro.sample("y", dist.Normal(w.sum(), 1.0), obs=0.0)


def test_distribution_and_divergence():
    """N(0, sigma^2), also of a negative sigma, whose divergence from the log-uniform prior is 0 with no gradient."""
    guide = AutoVarianceNetwork(log_uniform)
    svi = SVI(log_uniform, guide, optax.sgd(0.0), TraceMeanField_ELBO())
    start = svi.get_params(svi.init(random.key(0)))
    assert {name: value.shape for name, value in start.items()} == {"w_auto_sigma": (2, 3)}
    params = {"w_auto_sigma": jnp.asarray(variance.SIGMA)}
    assert not np.any(guide.median(params)["w"])
    high = guide.quantiles(params, [0.5, dist.Normal().cdf(2.0)])["w"]
    np.testing.assert_allclose(high, [0 * variance.SIGMA, 2 * np.abs(variance.SIGMA)], rtol=1e-6, atol=1e-12)
    variance.check_draws(np.asarray(guide.sample_posterior(random.key(1), params, sample_shape=(20_000,))["w"]))

    def divergence(params):
        q = handlers.trace(handlers.substitute(handlers.seed(guide, 0), params)).get_trace()["w"]["fn"]
        return kl_divergence(q, ImproperLogUniform().expand([2, 3]).to_event(2))

    value, slope = jax.value_and_grad(divergence)(params)
    assert float(value) == 0
    assert not np.any(slope["w_auto_sigma"])


def test_a_scale_of_zero():
    """Which training passes through: the weight is 0, and the loss and its gradient stay finite."""
    guide = AutoVarianceNetwork(log_uniform)
    with handlers.seed(rng_seed=0):
        guide()
    params = {"w_auto_sigma": jnp.asarray(variance.SIGMA).at[0, 0].set(0.0)}
    assert guide.sample_posterior(random.key(0), params)["w"][0, 0] == 0
    elbo = TraceMeanField_ELBO()
    loss, slope = jax.value_and_grad(lambda p: elbo.loss(random.key(1), p, log_uniform, guide))(params)
    assert np.isfinite(loss)
    assert np.isfinite(slope["w_auto_sigma"]).all()


@pytest.mark.parametrize("name", variance.FAN_IN)
def test_published_start(name):
    def model():
        numpyro.sample(name, dist.Normal(0.0, 1.0).expand([40, 50]).to_event(2))

    with handlers.seed(rng_seed=0):
        trace = handlers.trace(AutoVarianceNetwork(model)).get_trace()
    variance.check_uniform(np.asarray(trace[f"{name}_auto_sigma"]["value"]), variance.FAN_IN[name] ** -0.5)


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def test_conjugate_optimum():
    """sigma^2 = 1 / (1 + sum x^2), whatever the observations are."""
    guide = AutoVarianceNetwork(regression)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, 1000))
    svi = SVI(regression, guide, optimiser, TraceMeanField_ELBO(num_particles=500))
    found = svi.run(random.key(0), 1000, variance.X, variance.Y, progress_bar=False).params["w_auto_sigma"]
    np.testing.assert_allclose(np.abs(found), variance.conjugate(), rtol=0.05)


@pytest.mark.parametrize("alpha", [1.0, 10.0, 100.0, 1e4])
def test_limit_of_variational_dropout(alpha):
    """For D weights that share alpha the divergence is D / (2 alpha), the total variation erf(sqrt(D / (8 alpha)))."""
    loc = jnp.asarray(variance.LOC)
    q, p = DropoutNormal(loc, jnp.log(alpha)), dist.Normal(0.0, jnp.sqrt(alpha) * jnp.abs(loc))
    assert float(kl_divergence(q, p).sum()) == pytest.approx(variance.DIMENSIONS / (2 * alpha), rel=1e-9)
    draws = q.sample(random.key(0), (200_000,))
    variance.check_total_variation(np.asarray((p.log_prob(draws) - q.log_prob(draws)).sum(-1)), alpha)


def test_beside_a_guide_of_the_host():
    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w + b, 1.0), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoVarianceNetwork(model, sites=["w"]))
    guide.append(AutoNormal(handlers.block(model, hide=["w"])))
    svi = SVI(model, guide, optax.adam(1e-2), TraceMeanField_ELBO())
    result = svi.run(random.key(0), 20, variance.X, variance.Y, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert set(guide.median(result.params)) == {"w", "b"}


@pytest.mark.parametrize(("arguments", "message"), variance.BAD)
def test_bad_input(arguments, message):
    def model():
        numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        numpyro.sample("noise", dist.HalfNormal(1.0))
        with numpyro.plate("rows", 4):
            numpyro.sample("local", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=message), handlers.seed(rng_seed=0):
        AutoVarianceNetwork(model, **arguments)()
