"""From a NumPyro model to its minibatch potential: supports, sites that are not sampled, where chains start."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax import random
from numpyro.contrib.module import random_eqx_module, random_flax_module, random_nnx_module
from numpyro.distributions import biject_to, constraints
from numpyro.infer import init_to_median, init_to_uniform, init_to_value
from numpyro.infer.initialization import init_to_feasible, init_to_mean, init_to_sample

from bnn_ppl.numpyro import SGHMC, SGLD, init_to_prior_center, potential
from tests.numpyro.potentials import B, Looked, N, X, Y, linear, refuses, run


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Supports, transforms and temperature

SUPPORTS = {
    "real": lambda: dist.Normal(0.3, 1.2).expand([2]).to_event(1),
    "positive": lambda: dist.Gamma(2.0, 3.0).expand([2]),
    "half_cauchy": lambda: dist.HalfCauchy(0.7),
    "interval": lambda: dist.Uniform(-1.0, 2.0),
    "unit_interval": lambda: dist.Beta(2.0, 3.0),
    "greater_than": lambda: dist.Pareto(1.5, 3.0),
    "simplex": lambda: dist.Dirichlet(jnp.array([1.5, 2.0, 3.0])),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
    "corr_matrix": lambda: dist.LKJ(3, 2.0),
    "lower_cholesky": lambda: dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)),
    "ordered": lambda: dist.ImproperUniform(constraints.ordered_vector, (), (3,)),
    "transformed": lambda: dist.LogNormal(0.2, 0.7).expand([2, 2]).to_event(2),
}
# The coordinates in which the density on each support is meant, where they are fewer than the entries.
COORDINATES = {
    "simplex": lambda v: v[:-1],
    "corr_cholesky": lambda v: v[jnp.tril_indices(3, -1)],
    "corr_matrix": lambda v: v[jnp.tril_indices(3, -1)],
    "lower_cholesky": lambda v: v[jnp.tril_indices(2)],
}


def support_model(prior):
    def model(x, y, subsample_size=None):
        value = numpyro.sample("value", prior())
        weights = jnp.arange(1.0, jnp.size(value) + 1).reshape(jnp.shape(value))
        slope = jnp.sum(weights * value)
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            numpyro.sample("y", dist.Normal(slope * x[idx, 0], 2.0), obs=y[idx])

    return model


@pytest.mark.parametrize("support", SUPPORTS)
def test_every_support_as_the_host_and_unbiased(support):
    model = support_model(SUPPORTS[support])
    Looked(model, X, Y, subsample_size=B).assert_unbiased(model, X, Y, at_least=3)


@pytest.mark.parametrize("support", SUPPORTS)
def test_the_temperature_weighs_the_log_jacobian_only(support):
    prior = SUPPORTS[support]()
    looked = Looked(support_model(SUPPORTS[support]), X, Y)
    z = looked.start()
    transform = biject_to(prior.support)
    coordinates = COORDINATES.get(support, jnp.ravel)
    shape = jnp.shape(z["value"])
    jacobian = jax.jacfwd(lambda flat: coordinates(transform(flat.reshape(shape))).ravel())(z["value"].ravel())
    log_jacobian = np.linalg.slogdet(jacobian)[1]
    energy = jax.jit(looked.energy)
    at_one = energy(z, {}, 1.0)
    for temperature in (0.0, 0.1, 3.0):
        expected = at_one + (1.0 - temperature) * log_jacobian
        np.testing.assert_allclose(energy(z, {}, temperature), expected, rtol=1e-9, atol=1e-9)
    assert (abs(log_jacobian) > 1e-3) == (support != "real")


def test_initial_values_and_constrain_are_inverse_to_each_other():
    looked = Looked(support_model(SUPPORTS["simplex"]), X, Y)
    z = looked.start()
    value = potential.constrain(looked.model, looked.layout, z, looked.args, looked.kwargs)["value"]
    np.testing.assert_allclose(value, biject_to(constraints.simplex)(z["value"]))


def test_a_support_that_depends_on_another_site():
    def model(x, y, subsample_size=None):
        low = numpyro.sample("low", dist.Normal(0.0, 1.0))
        value = numpyro.sample("value", dist.Uniform(low, low + 2.0))
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            numpyro.sample("y", dist.Normal(value * x[idx, 0], 2.0), obs=y[idx])

    looked = Looked(model, X, Y, subsample_size=B)
    looked.assert_unbiased(model, X, Y, at_least=3)
    z = {"low": jnp.float64(0.7), "value": jnp.float64(0.0)}
    values = potential.constrain(model, looked.layout, z, looked.args, looked.kwargs)
    np.testing.assert_allclose(values["value"], 1.7)  # the middle of (low, low + 2)
    np.testing.assert_allclose(
        looked.energy(z, looked.disjoint_batches()[0], 3.0) - looked.energy(z, looked.disjoint_batches()[0], 0.0),
        -3.0 * np.log(2.0 * 0.25),  # dvalue/dz = 2 sigmoid'(0)
    )


# Sites that are not sampled


def test_param_sites_are_held_and_named():
    def model(y):
        offset = numpyro.param("offset", lambda key: 3.0 + random.normal(key))
        mean = numpyro.sample("mean", dist.Normal(offset, 1.0))
        numpyro.sample("y", dist.Normal(mean, numpyro.param("noise", 1.0)), obs=y)

    looked = Looked(model, Y)
    held = looked.layout.held
    assert set(held) == {"offset", "noise"}
    z = {"mean": jnp.float64(0.2)}
    expected = -(dist.Normal(held["offset"], 1.0).log_prob(0.2) + dist.Normal(0.2, 1.0).log_prob(Y).sum())
    for _ in range(2):  # not redrawn
        np.testing.assert_allclose(looked.energy(z, {}), expected)
    with pytest.warns(UserWarning, match=r"\['offset', 'noise'\] are held .*\(numpyro.sample\)"):
        assert set(run(model, Y)) == {"mean"}


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.tanh(linen.Dense(3)(x)))[..., 0]


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))[..., 0]


def networks():
    equinox = pytest.importorskip("equinox")
    net = equinox.nn.MLP(2, "scalar", 3, 1, key=random.key(0))
    priors = dist.Normal(0.0, 1.0)
    return {
        "linen": lambda: random_flax_module("nn", LinenNet(), prior=priors, input_shape=(1, 2)),
        "nnx": lambda: random_nnx_module("nn", NNXNet(nnx.Rngs(0)), prior=priors),
        "equinox": lambda: jax.vmap(random_eqx_module("nn", net, prior=priors)),
    }


def network_model(name):
    make = networks()[name]

    def model(x, y, subsample_size=None):
        net = make()
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            numpyro.sample("y", dist.Normal(net(x[idx]), 0.5), obs=y[idx])

    return model


@pytest.mark.parametrize("name", ["linen", "nnx", "equinox"])
def test_networks_of_the_hosts_modules(name):
    model = network_model(name)
    looked = Looked(model, X, Y, subsample_size=B)
    assert sum(np.prod(shape, dtype=int) for shape in looked.layout.shapes.values()) == 13
    looked.assert_unbiased(model, X, Y, at_least=3, differentiate=lambda energy: energy)
    assert not looked.layout.warned_params
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither nn$params nor nn$state is a user's parameter
        samples = run(lambda x, y: model(x, y, subsample_size=B), X, Y)
    assert {k for k in samples if k.startswith("nn/")} == set(looked.layout.shapes)
    assert all(np.isfinite(v).all() and v.shape[0] == 3 for v in samples.values())
    assert all((v[1] != v[0]).any() for k, v in samples.items() if k in looked.layout.shapes)


@pytest.mark.parametrize("subsample_size", [B, None])
@pytest.mark.parametrize("name", ["linen", "nnx", "equinox"])
def test_a_network_inside_the_data_plate_is_refused(name, subsample_size):
    make = networks()[name]

    def model(x, y):
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            numpyro.sample("y", dist.Normal(make()(x[idx]), 0.5), obs=y[idx])

    refuses(["'nn/", "'data'", "outside the data plate"], model, X, Y)


def test_a_module_outside_the_plate_named_like_a_site_inside_is_no_network():
    def model(x, y):
        net = networks()["linen"]()
        with numpyro.plate("data", len(x)) as idx:
            offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))  # a latent variable per row, all rows there
            numpyro.sample("y", dist.Normal(net(x[idx]) + offset, 0.5), obs=y[idx])

    assert Looked(model, X, Y).layout.shapes["offset"] == (N,)


def test_random_keys_of_the_model_are_refused():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        keep = random.bernoulli(numpyro.prng_key(), 0.5, (len(x),))
        numpyro.sample("y", dist.Normal(w * keep, 1.0), obs=y)

    refuses(["prng_key", "dropout"], model, X, Y)


def test_deterministics_outside_subsampled_plates_only():
    def model(x, y):
        w = numpyro.deterministic("w", 2.0 * numpyro.sample("half", dist.HalfNormal(1.0)))
        with numpyro.plate("groups", 3):
            numpyro.deterministic("by_group", w * jnp.arange(3.0))
        with numpyro.plate("data", len(x), subsample_size=B) as idx:
            loc = numpyro.deterministic("loc", w * x[idx, 0])
            numpyro.sample("y", dist.Normal(loc, 1.0), obs=y[idx])

    samples = run(model, X, Y, extra_fields=("z.half",))
    assert set(samples) == {"half", "w", "by_group"}
    np.testing.assert_allclose(samples["w"], 2.0 * samples["half"])
    np.testing.assert_allclose(samples["by_group"], samples["w"][:, None] * np.arange(3.0))


# Where chains start

PRIORS = {
    "normal": lambda: dist.Normal(2.0, 0.3),
    "half_cauchy": lambda: dist.HalfCauchy(1.0),
    "cauchy": lambda: dist.Cauchy(4.0, 0.1),
    "student_t": lambda: dist.StudentT(1.0, 0.0, 1.0),
    "student_t_2": lambda: dist.StudentT(2.0, 0.0, 1.0),
    "log_normal": lambda: dist.LogNormal(0.0, 1.0),
    "dirichlet": lambda: dist.Dirichlet(jnp.ones(4)),
    "lkj": lambda: dist.LKJCholesky(3, 1.0),
    "lkj_matrix": lambda: dist.LKJ(3, 1.0),
    "improper": lambda: dist.ImproperUniform(constraints.real, (), (3,)),
    "improper_positive": lambda: dist.ImproperUniform(constraints.positive, (), (3,)),
    "gamma": lambda: dist.Gamma(2.0, 2.0),
    "inverse_gamma": lambda: dist.InverseGamma(0.5, 1.0),
    "inverse_gamma_3": lambda: dist.InverseGamma(3.0, 1.0),
    "horseshoe": lambda: dist.HalfCauchy(jnp.array([1e-3, 1.0, 1e3])).to_event(1),
    "uniform": lambda: dist.Uniform(-3.0, 5.0),
    "beta": lambda: dist.Beta(0.5, 0.5),
    "pareto": lambda: dist.Pareto(1.0, 0.5),
    "multivariate": lambda: dist.MultivariateNormal(jnp.array([1.0, 5.0]), 0.04 * jnp.eye(2)),
    "low_rank": lambda: dist.LowRankMultivariateNormal(jnp.zeros(3), jnp.ones((3, 1)), jnp.ones(3)),
    "weibull": lambda: dist.Weibull(1.0, 2.0),
    "truncated": lambda: dist.TruncatedNormal(1.0, 1.0, low=0.5, high=2.0),
    "circular": lambda: dist.VonMises(0.0, 1.0),
}


def started(prior, seed, strategy=None, sample_shape=()):
    def model():
        return numpyro.sample("value", prior, sample_shape=sample_shape)

    seeded = numpyro.handlers.seed(model, random.key(seed))
    return numpyro.handlers.substitute(seeded, substitute_fn=strategy or init_to_prior_center())()


@pytest.mark.parametrize("name", PRIORS)
def test_starts_are_finite_and_in_the_support(name):
    prior = PRIORS[name]()
    for seed in range(3):
        value = started(prior, seed)
        assert value.shape == prior.shape()
        assert jnp.isfinite(value).all()
        assert jnp.all(prior.support(value))
        assert jnp.isfinite(prior.log_prob(value)).all()
    assert not np.array_equal(started(prior, 0), started(prior, 1))


def test_starts_are_near_the_priors_centre():
    assert abs(started(dist.Normal(2.0, 0.01), 0) - 2.0) < 0.05
    assert 1.2 < started(dist.Gamma(200.0, 100.0), 0) < 3.3
    assert abs(started(dist.Cauchy(40.0, 0.1), 0) - 40.0) < 4.0


@pytest.mark.parametrize(
    ("shape", "fan_in"), [((4000,), 4000), ((400, 10), 400), ((3, 3, 25, 40), 225), ((), 1), ((7, 1000), 1000)]
)
def test_the_spread_of_a_network_is_fan_in_sized(shape, fan_in):
    wide = dist.Normal(0.0, 10.0).expand(shape)
    for prior, sample_shape in ((wide, ()), (wide.to_event(len(shape)), ()), (dist.Normal(0.0, 10.0), shape)):
        values = np.stack([started(prior, seed, sample_shape=sample_shape) for seed in range(400 if not shape else 1)])
        spread = values.std() * np.sqrt(fan_in)
        assert abs(spread - 1.0) < 4.0 / np.sqrt(2.0 * values.size)
    narrow = started(dist.Normal(0.0, 1e-4).expand(shape), 0)  # never wider than the prior
    assert np.abs(narrow).max() < 1e-3


def test_the_hosts_init_strategies():
    strategies = [
        init_to_median(),
        init_to_median,
        init_to_mean(),
        init_to_sample(),
        init_to_feasible(),
        init_to_uniform(radius=0.1),
        init_to_uniform,
        init_to_value(values={"w": jnp.array([0.5, -0.25]), "scale": 2.0}),
        init_to_prior_center(),
        init_to_prior_center,
    ]
    looked = Looked(linear, X, Y)
    for strategy in strategies:
        taken = SGLD(linear, step_size=1e-3, init_strategy=strategy)._init_strategy
        z = potential.initial_values(linear, looked.layout, random.key(0), taken, looked.args, looked.kwargs)
        assert jnp.isfinite(looked.energy(z, {}))
        assert {name: jnp.shape(value) for name, value in z.items()} == {"w": (2,), "scale": ()}
    values = {"w": jnp.array([0.5, -0.25]), "scale": 2.0}  # a Python number, of weak type
    kernel = SGHMC(linear, step_size=1e-3, friction=1.0, init_strategy=init_to_value(values=values))
    z = kernel.init(random.key(0), 0, None, (X, Y), {"subsample_size": B}).z
    np.testing.assert_allclose(z["w"], [0.5, -0.25])
    np.testing.assert_allclose(z["scale"], np.log(2.0))
    assert not z["scale"].weak_type
