"""Chains that start from a guide, an optimiser's result or earlier draws, and sites that are held fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.handlers import condition
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.infer.util import unconstrain_fn

from bnn_ppl.numpyro import SGHMC, SGLD, full_data

N, B = 24, 8
KEY = random.key(3)
STILL = {"step_size": 1e-9, "temperature": 0.0}
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5] + 0.3 * rng.normal(size=N)
SHAPES = {"b": (3,), "scale": (), "w": (2,)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def model(x, y):
    w = numpyro.sample("w", dist.Normal(5.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(1.0, 0.5))
    with numpyro.plate("columns", 3):
        b = numpyro.sample("b", dist.Normal(-5.0, 1.0))
    with numpyro.plate("data", len(x), subsample_size=B) as idx:
        numpyro.sample("y", dist.Normal(x[idx] @ w + b.mean(), scale), obs=y[idx])


def run(kernel, *args, num_samples=1, init_params=None, **options):
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_samples, progress_bar=False, **options)
    mcmc.run(KEY, *(args or (X, Y)), init_params=init_params)
    return mcmc


def first_draws(mcmc):
    """Shapes (chains, ...)."""
    return {name: np.asarray(value[:, 0]) for name, value in mcmc.get_samples(group_by_chain=True).items()}


def starts(values, model=model):
    """Where a chain starts, by site."""
    kernel = SGLD(model, init_strategy=values, **STILL)
    state = kernel.init(KEY, 0, None, (X, Y), {})
    return {name: np.asarray(value) for name, value in kernel.postprocess_fn((X, Y), {})(state.z).items()}


def assert_starts(values, found):
    for name, value in values.items():
        np.testing.assert_allclose(found[name], np.broadcast_to(value, found[name].shape), atol=1e-5, err_msg=name)


def fit(guide, steps=20):
    svi = SVI(model, guide, optax.adam(0.05), Trace_ELBO())
    return svi.run(KEY, steps, jnp.asarray(X), jnp.asarray(Y), progress_bar=False).params


VALUES = {"b": np.array([3.0, 2.0, 1.0]), "scale": 1.5, "w": np.array([-1.0, 2.0])}


@pytest.mark.parametrize("count", [1, 2])
def test_all_sites_start_where_told(count):
    kernel = SGLD(model, init_strategy=VALUES, **STILL)
    found = first_draws(run(kernel, num_chains=count, chain_method="vectorized"))
    assert {name: value.shape for name, value in found.items()} == {n: (count, *s) for n, s in SHAPES.items()}
    assert_starts(VALUES, found)


@pytest.mark.parametrize("site", VALUES)
def test_other_sites_start_near_the_prior_s_centre(site):
    given = {site: VALUES[site]}
    found = starts(given)
    assert_starts(given, found)
    centre = {"b": -5.0, "scale": np.exp(1 + 0.5**2 / 2), "w": 5.0}  # the prior's means
    for name in set(found) - {site}:
        assert np.all(np.abs(found[name] - centre[name]) < 4.0 / np.sqrt(2))
        assert np.all(np.abs(found[name] - VALUES[name]) > 0.5)


@pytest.mark.parametrize("value", [1, np.array([1, 2]), np.array([1.0, 2.0], np.float32)])
def test_numbers_of_any_type(value):
    site = "w" if np.ndim(value) else "scale"
    assert_starts({site: value}, starts({site: value}))


def test_a_site_of_a_sample_shape():
    def with_sample_shape(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0), sample_shape=(2,))
        with numpyro.plate("data", len(x), subsample_size=B) as idx:
            numpyro.sample("y", dist.Normal(x[idx] @ w, 1.0), obs=y[idx])

    assert_starts({"w": VALUES["w"]}, starts({"w": VALUES["w"]}, with_sample_shape))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"v": 1.0, "w": VALUES["w"]},
            r"has values for \['v'\], and the latent sites are \['b', 'scale', 'w'\]",
        ),
        ({"y": Y}, r"has values for \['y'\]"),
        ({"w": np.zeros(3)}, r"a value of shape \(3,\) for site 'w' of shape \(2,\): give one value"),
        ({"w": np.zeros((10, 2))}, r"a value of shape \(10, 2\) for site 'w' of shape \(2,\)"),
        ({"b": 1.0}, r"a value of shape \(\) for site 'b' of shape \(3,\)"),
        ({"scale": -1.0}, "not finite where the chain starts, because of .*'scale'"),
        ({"w": np.array([1.0, np.nan])}, "not finite where the chain starts, because of .*'w'"),
    ],
    ids=["unknown", "observed", "shape", "all draws", "plate", "support", "NaN"],
)
def test_values_that_cannot_be(values, match):
    with pytest.raises(ValueError, match=match):
        starts(values)


# Where values come from


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_from_a_guide(guide):
    guide = guide(model)
    median = guide.median(fit(guide))
    assert set(median) == set(SHAPES)
    assert_starts(median, starts(median))


@pytest.fixture(scope="module")
def earlier():
    """Two chains of another kernel."""
    with jax.enable_x64(True):
        kernel = SGHMC(model, step_size=0.02, friction=5.0, steps_per_draw=5)
        return run(kernel, num_samples=4, num_chains=2, chain_method="vectorized")


def test_from_the_last_draw(earlier):
    last = {name: value[-1] for name, value in earlier.get_samples().items()}
    assert_starts(last, starts(last))


def test_chains_from_different_draws(earlier):
    chosen = {name: value[1:6:2] for name, value in earlier.get_samples().items()}
    assert len(np.unique(chosen["w"])) == 6
    unconstrained = jax.vmap(lambda draw: unconstrain_fn(full_data(model), (X, Y), {}, draw))(chosen)
    several = run(SGLD(model, **STILL), init_params=unconstrained, num_chains=3, chain_method="vectorized")
    assert_starts(chosen, first_draws(several))


def test_chains_from_where_chains_ended(earlier):
    ends = {name: value[:, -1] for name, value in earlier.get_samples(group_by_chain=True).items()}
    again = run(SGLD(model, **STILL), init_params=earlier.last_state.z, num_chains=2, chain_method="vectorized")
    assert_starts(ends, first_draws(again))


# Sites held fixed


@pytest.mark.parametrize("name", ["SGLD", "SGHMC"])
def test_conditioned_sites_are_held(name):
    options = {"step_size": 0.002, "steps_per_draw": 3} | ({} if name == "SGLD" else {"friction": 5.0})
    make = {"SGLD": SGLD, "SGHMC": SGHMC}[name]

    def by_hand(x, y):
        w = numpyro.sample("w", dist.Normal(5.0, 1.0).expand([2]).to_event(1))
        with numpyro.plate("columns", 3):
            b = numpyro.sample("b", dist.Normal(-5.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=B) as idx:
            numpyro.sample("y", dist.Normal(x[idx] @ w + b.mean(), 0.7), obs=y[idx])

    start = {"b": VALUES["b"], "w": VALUES["w"]}
    held, expected = (
        run(make(m, init_strategy=start, **options), num_samples=5).get_samples()
        for m in (condition(model, {"scale": 0.7}), by_hand)
    )
    assert set(held) == set(expected) == {"b", "w"}
    for site in held:
        np.testing.assert_allclose(held[site], expected[site], rtol=1e-10)
        assert (np.diff(held[site], axis=0) != 0).all()
