"""Averages where models and guides have parameters and arguments of their own, on NumPyro."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from bnn_ppl import to_arviz
from bnn_ppl.numpyro import FGE, HWASVI, SWAG, predict

X = np.linspace(-1.0, 1.0, 40).reshape(20, 2)
Y = X @ np.array([1.5, -0.5])


def linear(x, y=None):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def with_param(x, y=None):
    """Weights that SVI learns, and a random offset."""
    weight = numpyro.param("weight", jnp.array([0.1, 0.2]))
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(x @ weight + offset, 1.0), obs=y)


def trained(cls, model, guide, steps=12, **settings):
    svi = cls(model, guide, optax.sgd(0.01), Trace_ELBO(), start=4, cycle_length=2, **settings)
    return svi, svi.run(random.key(0), steps, X, Y, progress_bar=False).state


def test_median_of_averaged_parameters():
    """Not a draw: the guide has a scale of 1."""
    svi, state = trained(HWASVI, linear, AutoNormal(linear, init_scale=1.0), covariance="parameters")
    averaged = svi.averaged_guide(state)
    expected = svi.averaged_params(state)["w_auto_loc"]
    np.testing.assert_array_equal(averaged.median()["w"], expected)
    found = predict(averaged, X, model=linear, scheme="deterministic")["mean"].values
    np.testing.assert_allclose(found, X @ expected, rtol=1e-5)


def test_averaged_parameters_of_the_model():
    """Predictions and log likelihoods have the averages, not what the last step has."""
    svi, state = trained(HWASVI, with_param, AutoDelta(with_param))
    weight = svi.averaged_params(state)["weight"]
    assert not np.allclose(weight, svi.get_params(state)["weight"])
    mean, averaged = X @ weight, svi.averaged_guide(state)
    found = predict(averaged, X, model=with_param, scheme="deterministic")["mean"].values
    np.testing.assert_allclose(found, mean + averaged.median(None, X, Y)["offset"], rtol=1e-5)
    tree = to_arviz(svi, svi_result=state, model_args=(X, Y), num_samples=3, log_likelihood=True)
    draws = tree["posterior"]["offset"].values[0]
    expected = dist.Normal(mean + draws[:, None], 1.0).log_prob(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"].values[0], expected, rtol=1e-5)


def test_snapshots_with_parameters_of_the_model():
    svi, state = trained(FGE, with_param, AutoDelta(with_param))
    with pytest.raises(ValueError, match=r"param sites \['weight'\] .* snapshot_params"):
        svi.snapshots(state, X, Y)


@pytest.mark.parametrize(("cls", "settings"), [(SWAG, {"rank": 3}), (FGE, {"num_snapshots": 3})])
def test_resume_with_other_settings(cls, settings):
    _, state = trained(cls, linear, AutoDelta(linear), **settings)
    (name,) = settings
    other = cls(linear, AutoDelta(linear), optax.sgd(0.01), Trace_ELBO(), start=4, cycle_length=2, **{name: 5})
    message = f"a run with {name}=3, and this object has {name}=5"
    with pytest.raises(ValueError, match=message):
        other.run(random.key(0), 3, X, Y, init_state=state, progress_bar=False)
    with pytest.raises(ValueError, match=message):
        other.update(state, X, Y)


def test_resume_in_a_new_object():
    """``run`` sets it up by itself; other methods say that it is not."""
    svi, state = trained(SWAG, linear, AutoDelta(linear), rank=3)
    expected = svi.run(random.key(0), 3, X, Y, init_state=state, progress_bar=False)
    other = SWAG(linear, AutoDelta(linear), optax.sgd(0.01), Trace_ELBO(), start=4, cycle_length=2, rank=3)
    with pytest.raises(ValueError, match="call its init or run first"):
        other.averaged_guide(state)
    found = other.run(random.key(9), 3, X, Y, init_state=state, progress_bar=False)
    np.testing.assert_array_equal(found.losses, expected.losses)
    np.testing.assert_array_equal(found.state.kept.mean["w"], expected.state.kept.mean["w"])


def scales(x, y=None):
    """A guide without location parameters."""
    scale = numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)
    numpyro.sample("w", dist.Normal(jnp.zeros(2), scale).to_event(1))


def test_guide_without_location_parameters():
    """Its variances are averaged; a variance of locations it has not."""
    with pytest.raises(ValueError, match=r"moves the location of the sites \['w'\], and covariance='iterate'"):
        trained(HWASVI, linear, scales, covariance="iterate")
    svi, state = trained(HWASVI, linear, scales, covariance="mixture")
    mean, variance = svi.averaged_moments(state)["w"]
    assert not mean.any()
    assert (variance > 0.1).all()


def test_guide_without_median():
    svi, state = trained(HWASVI, linear, scales, covariance="parameters")
    with pytest.raises(ValueError, match="the guide scales, whose parameters were averaged, has no median"):
        predict(svi.averaged_guide(state), X, model=linear, scheme="deterministic")


def test_snapshots_for_arviz():
    svi, state = trained(FGE, linear, AutoDelta(linear), steps=8, num_snapshots=2)
    tree = to_arviz(svi, svi_result=state, model_args=(X, Y))
    np.testing.assert_array_equal(tree["posterior"]["w"].values[0], svi.snapshots(state, X, Y)["w"])
    np.testing.assert_array_equal(tree["sample_stats"]["averaging_weight"].values, [[0.5, 0.5]])


def test_guide_that_reads_its_arguments():
    def local(x, y=None):
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y=None):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(shift + x[:, 0], 0.1))

    with pytest.raises(ValueError, match="site 'z' of the guide has a law that depends on the arguments of the guide"):
        trained(HWASVI, local, guide)


def test_multiplier_that_looks_at_its_argument():
    with pytest.raises(ValueError, match=r"multiplier=.* write it with jax\.numpy"):
        trained(HWASVI, linear, AutoNormal(linear), multiplier=lambda n: max(1 / (n + 1), 0.1))


def test_several_runs_at_once():
    svi = HWASVI(linear, AutoNormal(linear), optax.sgd(0.01), Trace_ELBO(), start=4, cycle_length=2)
    with pytest.raises(ValueError, match=r"outside jax\.jit and jax\.vmap, or take covariance='parameters'"):
        jax.vmap(lambda key: svi.init(key, X, Y))(random.split(random.key(0), 2))
