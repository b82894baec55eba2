"""KL annealing in NumPyro's SVI; mirrors tests/pyro/test_annealed_elbo.py."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.infer import SVI, TraceMeanField_ELBO

from bnn_ppl.numpyro import AnnealedELBO
from tests import annealed

X = jnp.linspace(-1, 1, 8)


def model(x, y=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    numpyro.factor("penalty", -(w**2))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x * w, 1.0), obs=y)


def guide(x, y=None):
    scale = numpyro.param("scale", annealed.SCALE, constraint=dist.constraints.positive)
    numpyro.sample("w", dist.Normal(numpyro.param("loc", annealed.LOC), scale))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


PARAMS = {"loc": annealed.LOC, "scale": annealed.SCALE}


@pytest.mark.parametrize("kl_weight", annealed.WEIGHTS)
@pytest.mark.parametrize("particles", [1, 3])
def test_value_of_the_elbo_and_gradient_of_the_weighted_one(kl_weight, particles):
    def loss(elbo, **kwargs):
        return jax.value_and_grad(lambda p: elbo.loss(random.key(1), p, model, guide, X, 2 * X, **kwargs))(PARAMS)

    value, slope = loss(TraceMeanField_ELBO(particles))
    found, changed = loss(AnnealedELBO(particles), kl_weight=kl_weight)
    assert float(found) == pytest.approx(float(value), rel=1e-12)
    for name, lack in zip(("loc", "scale"), annealed.missing(kl_weight), strict=True):
        assert float(changed[name]) == pytest.approx(float(slope[name]) + lack, rel=1e-9)


def test_in_svi():
    """The weight may change in a compiled step, and is 1 where it is left out."""
    svi = SVI(model, guide, optax.sgd(0.1), AnnealedELBO())
    state = svi.init(random.key(0), X, 2 * X)
    update = jax.jit(svi.update)
    moved = {}
    for kl_weight in (0.0, 1.0):
        changed, loss = update(state, X, 2 * X, kl_weight=kl_weight)
        moved[kl_weight] = float(svi.get_params(changed)["loc"]), float(loss)
    assert moved[0.0][0] - moved[1.0][0] == pytest.approx(0.1 * annealed.LOC, rel=1e-6)
    assert moved[0.0][1] == moved[1.0][1]
    plain, _ = svi.update(state, X, 2 * X)
    assert float(svi.get_params(plain)["loc"]) == pytest.approx(moved[1.0][0], rel=1e-12)
    assert np.isfinite(svi.run(random.key(0), 3, X, 2 * X, progress_bar=False).losses).all()
    found = svi.run(random.key(0), 1, X, 2 * X, kl_weight=0.0, progress_bar=False, init_state=state).params["loc"]
    assert float(found) == pytest.approx(moved[0.0][0], rel=1e-12)
    found, _ = jax.lax.scan(lambda s, kl_weight: svi.update(s, X, 2 * X, kl_weight=kl_weight), state, jnp.zeros(1))
    assert float(svi.get_params(found)["loc"]) == pytest.approx(moved[0.0][0], rel=1e-12)


@pytest.mark.parametrize("kl_weight", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_bad_weights(kl_weight):
    svi = SVI(model, guide, optax.sgd(0.1), AnnealedELBO())
    state = svi.init(random.key(0), X, 2 * X)
    with pytest.raises(ValueError, match="kl_weight must be a finite number of at least 0, got"):
        svi.update(state, X, 2 * X, kl_weight=kl_weight)
