"""Variational dropout in NumPyro's SVI; mirrors tests/pyro/test_variational_dropout.py."""

import re

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
from numpyro.infer.initialization import init_to_value

from bnn_ppl.numpyro import AutoVarianceNetwork, AutoVariationalDropout, ImproperLogUniform, predict
from tests import dropout


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def model():
    w = numpyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    numpyro.sample("y", dist.Normal(w.sum(), 1.0), obs=0.0)


START = init_to_value(values={"w": dropout.WEIGHT})


def started(parameterization):
    """Guide and parameters where training starts."""
    guide = AutoVariationalDropout(
        model, parameterization=parameterization, init_log_alpha=dropout.LOG_ALPHA, init_loc_fn=START
    )
    svi = SVI(model, guide, optax.sgd(0.0), TraceMeanField_ELBO())
    return guide, svi.get_params(svi.init(random.key(0)))


@pytest.mark.parametrize("parameterization", dropout.PARAMETERIZATIONS)
def test_distribution_and_divergence(parameterization):
    guide, params = started(parameterization)
    noise = params["w_auto_log_sigma" if parameterization == "additive" else "w_auto_log_alpha"]
    assert noise.shape == dropout.SHAPES[parameterization]
    sd = dropout.sd(parameterization)
    np.testing.assert_allclose(guide.median(params)["w"], dropout.WEIGHT)
    high = guide.quantiles(params, [0.5, dist.Normal().cdf(2.0)])["w"]
    np.testing.assert_allclose(high, [dropout.WEIGHT, dropout.WEIGHT + 2 * sd], rtol=1e-6)
    np.testing.assert_allclose(guide.log_alpha(params)["w"], 2 * np.log(sd / np.abs(dropout.WEIGHT)), rtol=1e-6)
    draws = guide.sample_posterior(random.key(1), params, sample_shape=(20_000,))["w"]
    assert np.abs((draws.mean(0) - dropout.WEIGHT) / sd).max() < 5 / 20_000**0.5
    assert np.abs(draws.std(0) / sd - 1).max() < 5 / 40_000**0.5
    q = handlers.trace(handlers.substitute(handlers.seed(guide, 0), params)).get_trace()["w"]["fn"]
    prior = ImproperLogUniform().expand([2, 3]).to_event(2)
    assert float(kl_divergence(q, prior)) == pytest.approx(dropout.divergence(parameterization), rel=1e-9)


@pytest.mark.parametrize("parameterization", dropout.PARAMETERIZATIONS)
def test_loss_and_its_gradient(parameterization):
    """By differences with common random numbers: with means of weights, and a gradient in every parameter."""
    guide, params = started(parameterization)

    def loss(params):
        return TraceMeanField_ELBO().loss(random.key(3), params, model, guide)

    slopes = jax.grad(loss)(params)
    for name, slope in slopes.items():
        for index in np.ndindex(slope.shape):
            moved = [loss(params | {name: params[name].at[index].add(sign * 1e-6)}) for sign in (1, -1)]
            assert float(slope[index]) == pytest.approx(float((moved[0] - moved[1]) / 2e-6), rel=1e-5, abs=1e-7)
            assert slope[index] != 0


def test_weights_of_mean_zero():
    """alpha mu^2 = 0 there: the divergence depends on alpha alone and stays finite, its gradient too."""
    guide, params = started("neuron")
    params |= {"w_auto_loc": jnp.zeros((2, 3))}
    loss, slopes = jax.value_and_grad(lambda p: TraceMeanField_ELBO().loss(random.key(3), p, model, guide))(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(slope).all() for slope in slopes.values())


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("parameterization", ["weight", "additive"])
def test_conjugate_optimum(parameterization):
    start = init_to_value(values={"w": jnp.asarray(dropout.START)})
    guide = AutoVariationalDropout(regression, parameterization=parameterization, init_loc_fn=start)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.03, 4000))
    svi = SVI(regression, guide, optimiser, TraceMeanField_ELBO(num_particles=8))
    params = svi.run(random.key(0), 4000, dropout.X, dropout.Y, progress_bar=False).params
    mean, sd = dropout.conjugate()
    np.testing.assert_allclose(guide.median(params)["w"], mean, atol=0.1 * sd.min())
    found = np.abs(guide.median(params)["w"]) * np.exp(0.5 * guide.log_alpha(params)["w"])
    np.testing.assert_allclose(found, sd, rtol=0.1)
    predicted = predict(guide, dropout.X, model=regression, params=params, num_draws=500)["mean"].values
    np.testing.assert_allclose(predicted, dropout.X @ mean, atol=0.1)


def mixed(y=None):
    w = numpyro.sample("w", ImproperLogUniform().expand([2, 3]).to_event(2))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 4):
        local = numpyro.sample("local", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(w.sum() + slope + local, noise), obs=y)


def test_beside_a_guide_of_the_host():
    guide = AutoGuideList(mixed)
    guide.append(AutoVariationalDropout(mixed, sites=["w"], parameterization="layer"))
    guide.append(AutoNormal(handlers.block(mixed, hide=["w"])))
    svi = SVI(mixed, guide, optax.adam(1e-2), TraceMeanField_ELBO())
    y = jnp.arange(4.0)
    result = svi.run(random.key(0), 20, y, progress_bar=False)
    assert np.isfinite(result.losses).all()
    chosen = AutoVariationalDropout(mixed, sites=lambda name, shape: len(shape) == 2)
    with handlers.seed(rng_seed=0):
        assert set(chosen(y)) == {"w"}


@pytest.mark.parametrize(("arguments", "message"), dropout.BAD)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message), handlers.seed(rng_seed=0):
        AutoVariationalDropout(mixed, **arguments)(jnp.arange(4.0))


@pytest.mark.parametrize(
    ("cls", "names"),
    [(AutoVariationalDropout, ["w_auto_loc", "w_auto_log_alpha"]), (AutoVarianceNetwork, ["w_auto_sigma"])],
)
def test_before_training_and_with_other_params(cls, names):
    guide = cls(lambda: numpyro.sample("w", ImproperLogUniform()))
    asks = [
        *([guide.log_alpha] if cls is AutoVariationalDropout else []),
        guide.median,
        lambda params: guide.quantiles(params, [0.5]),
        lambda params: guide.sample_posterior(random.key(0), params),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match=f"the guide {cls.__name__} has not been trained: run SVI with it first"):
            ask({})
    svi = SVI(guide.model, guide, optax.sgd(0.1), TraceMeanField_ELBO())
    result = svi.run(random.key(0), 1, progress_bar=False)
    for ask in asks:
        assert jnp.isfinite(jax.tree.leaves(ask(result.params))[0]).all()
        for given in (result, None):
            with pytest.raises(
                TypeError, match=f"params must be a dict .* got {type(given).__name__}: .*result.params"
            ):
                ask(given)
        with pytest.raises(ValueError, match=rf"no values for {re.escape(str(names))}.* for \['v'\]: give"):
            ask({"v": 1.0})
