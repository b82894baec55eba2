"""Pruned networks under NumPyro's predict; mirrors tests/pyro/test_sparsity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoGuideList, AutoNormal

from bnn_ppl.diagnostics import log_alpha, prune, signal_to_noise, sparsity
from bnn_ppl.numpyro import AutoVariationalDropout, ImproperLogUniform, predict

RNG = np.random.default_rng(0)
X = RNG.normal(size=(9, 4))
LOC, SD = np.array([1.0, -0.01, 2.0, 0.0]), np.array([0.1, 0.5, 0.3, 0.4])
KEPT = np.array([1.0, 0.0, 2.0, 0.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def model(x, y=None):
    w = numpyro.sample("w", ImproperLogUniform().expand([4]).to_event(1))
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w + offset, 1.0), obs=y)


def test_pruned_model_predicts():
    dropout = AutoVariationalDropout(model, sites=["w"], parameterization="additive")
    guide = AutoGuideList(model)
    guide.append(dropout)
    guide.append(AutoNormal(handlers.block(model, hide=["w"])))
    svi = SVI(model, guide, optax.sgd(0.0), TraceMeanField_ELBO())
    params = svi.get_params(svi.init(random.key(0), X, X @ LOC))
    params |= {"w_auto_loc": jnp.asarray(LOC), "w_auto_log_sigma": jnp.log(SD), "offset_auto_loc": jnp.asarray(0.7)}
    alpha = dropout.log_alpha(params)
    assert sparsity(alpha).loc["w", "kept"] == 2
    np.testing.assert_allclose(signal_to_noise(alpha)["w"], np.abs(LOC) / SD)
    pruned = prune(guide.median(params), alpha)
    np.testing.assert_array_equal(pruned["w"], [KEPT])
    found = predict(pruned, X, X @ LOC, model=model)
    np.testing.assert_allclose(found["mean"], X @ KEPT + 0.7, rtol=1e-12)
    np.testing.assert_allclose(found["sd"], 1)
    assert found.attrs["num_draws"] == 1


def test_log_alpha_of_a_guide_of_the_host():
    loc, sd = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array([0.2, 0.1, 0.3, 0.5])
    guide = AutoNormal(lambda: numpyro.sample("w", dist.Normal(jnp.zeros(4), 1.0).to_event(1)))
    with handlers.seed(rng_seed=0):
        guide()
    draws = guide.sample_posterior(
        random.key(0), {"w_auto_loc": loc, "w_auto_scale": sd}, sample_shape=(20_000,)
    )  # fmt: skip
    alpha = (sd / loc) ** 2
    z = (log_alpha(draws)["w"] - np.log(alpha)) / np.sqrt((2 + 4 * alpha) / 20_000)
    assert np.abs(z).max() < 4


def test_half_precision():
    draws = {"w": jnp.array([[0.5, 2.0], [1.5, 2.0]], jnp.bfloat16)}
    np.testing.assert_allclose(log_alpha(draws)["w"], [np.log(0.5), -np.inf])
    found = prune({"w": draws["w"][0]}, {"w": jnp.array([4.0, 0.0], jnp.bfloat16)})["w"]
    assert jnp.asarray(found).dtype == jnp.bfloat16
    assert found.astype(np.float32).tolist() == [[0, 2]]
