"""From a NumPyro model to its minibatch potential: equal to the host's, unbiased, tempered, for every kind of model."""

import itertools
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import random_eqx_module, random_flax_module, random_nnx_module
from numpyro.distributions import biject_to, constraints
from numpyro.infer import MCMC, Predictive, init_to_median, init_to_uniform, init_to_value, log_likelihood
from numpyro.infer.initialization import init_to_feasible, init_to_mean, init_to_sample
from numpyro.infer.util import potential_energy
from scipy.stats import norm

from bnn_ppl.numpyro import SGHMC, SGLD, full_data, init_to_prior_center, potential
from bnn_ppl.numpyro import layout as layouts
from bnn_ppl.numpyro.plates import as_arrays

N, B = 12, 4
rng = np.random.default_rng(0)
X = rng.normal(size=(N, 2))
Y = X @ [1.0, -0.5] + 0.3 * rng.normal(size=N)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Looked:
    """A model, its arguments, and what `inspect_model` found in it."""

    def __init__(self, model, *args, batch_size=None, **kwargs):
        self.model, self.batch_size = model, batch_size
        self.args, self.kwargs = as_arrays((args, kwargs))
        self.layout = layouts.inspect_model(model, self.args, self.kwargs, batch_size)

    def energy(self, z, batch, temperature=1.0):
        return potential.potential_energy(self.model, self.layout, z, temperature, batch, self.args, self.kwargs)

    def start(self):
        """Unconstrained values away from any special point."""
        start = jax.jit(
            lambda key: potential.initial_values(
                self.model, self.layout, key, init_to_uniform(radius=1.0), self.args, self.kwargs
            )
        )
        return start(random.key(1))

    def disjoint_batches(self):
        """Every choice of one part of each plate, the parts of a plate being disjoint and together all its rows."""
        parts = {}
        for name, plate in self.layout.subsampled.items():
            order = np.random.default_rng(plate.size).permutation(plate.size)
            assert plate.size % plate.batch_size == 0
            parts[name] = [jnp.asarray(p) for p in order.reshape(-1, plate.batch_size)]
        return [dict(zip(parts, chosen, strict=True)) for chosen in itertools.product(*parts.values())]

    def assert_unbiased(self, host_model, *args, at_least=2, differentiate=jax.value_and_grad, **kwargs):
        """The mean over disjoint minibatches is the host's potential on all rows, gradient included."""
        z = self.start()
        batches = self.disjoint_batches()
        assert len(batches) >= at_least
        evaluate = jax.jit(differentiate(self.energy))
        values = [evaluate(z, batch) for batch in batches]
        assert np.ptp([jax.tree.leaves(value)[0] for value in values]) > 1e-6  # the minibatches do matter
        mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *values)
        args, kwargs = as_arrays((args, kwargs))
        expected = jax.jit(differentiate(lambda z: potential_energy(host_model, args, kwargs, z)))(z)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), mean, expected)


def refuses(words, model, *args, batch_size=None, **kwargs):
    with pytest.raises(ValueError) as caught:
        Looked(model, *args, batch_size=batch_size, **kwargs)
    for word in words:
        assert word in str(caught.value)


def run(model, *args, num_samples=3, extra_fields=(), **options):
    """A short chain, with few compilations."""
    kernel = SGLD(model, **{"step_size": 1e-3} | options)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=num_samples, progress_bar=False)
    mcmc.run(random.key(0), *args, extra_fields=extra_fields)
    return mcmc.get_samples()


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


# Plates


def linear(x, y=None, subsample_size=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
        numpyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=None if y is None else y[idx])


def linear_by_subsample(x, y=None, subsample_size=None):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x), subsample_size=subsample_size):
        batch = numpyro.subsample(x, event_dim=1)
        obs = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(batch @ w, scale), obs=obs)


@pytest.mark.parametrize("model", [linear, linear_by_subsample])
def test_minibatches_by_index_and_by_subsample(model):
    looked = Looked(model, X, Y, subsample_size=B)
    assert looked.layout.subsampled["data"].size == N
    assert looked.layout.subsampled["data"].batch_size == B
    looked.assert_unbiased(linear, X, Y, at_least=3)


def test_no_plates():
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)

    looked = Looked(model, Y)
    z = looked.start()
    assert looked.layout.plates == {}
    np.testing.assert_allclose(looked.energy(z, {}), potential_energy(model, (jnp.asarray(Y),), {}, z))


def test_two_plates_of_different_sizes():
    def model(a, b, sizes=(None, None)):
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        with numpyro.plate("long", len(a), subsample_size=sizes[0]) as idx:
            numpyro.sample("a", dist.Normal(mean, 1.0), obs=a[idx])
        with numpyro.plate("short", len(b), subsample_size=sizes[1]):
            numpyro.sample("b", dist.StudentT(5.0, mean, 0.5), obs=numpyro.subsample(b, event_dim=0))

    b = Y[:6] + 1
    looked = Looked(model, Y, b, sizes=(B, 2))
    looked.assert_unbiased(model, Y, b, at_least=9)
    z, batch = looked.start(), looked.disjoint_batches()[0]
    terms = looked.energy(z, batch)
    by_hand = -dist.Normal(0.0, 2.0).log_prob(z["mean"])
    by_hand -= N / B * dist.Normal(z["mean"], 1.0).log_prob(Y[batch["long"]]).sum()
    by_hand -= 6 / 2 * dist.StudentT(5.0, z["mean"], 0.5).log_prob(b[batch["short"]]).sum()
    np.testing.assert_allclose(terms, by_hand)


TABLE = rng.normal(size=(6, 4))


def nested(table, sizes=(None, None)):
    """Rows and columns, both subsampled; the prior of `effect` lies inside a third plate, of groups."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    with numpyro.plate("groups", 3):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
    rows = numpyro.plate("rows", table.shape[0], subsample_size=sizes[0], dim=-2)
    columns = numpyro.plate("columns", table.shape[1], subsample_size=sizes[1], dim=-1)
    with rows as i, columns as j:
        loc = mean + effect[i % 3][:, None]
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=table[i][:, j])


@pytest.mark.parametrize("sizes", [(3, 2), (3, None), (None, 2)])
def test_nested_plates_count_the_prior_once(sizes):
    looked = Looked(nested, TABLE, sizes=sizes)
    looked.assert_unbiased(nested, TABLE, at_least=2)
    z, batch = looked.start(), looked.disjoint_batches()[0]
    rows, columns = (np.asarray(batch.get(name, np.arange(n))) for name, n in (("rows", 6), ("columns", 4)))
    loc = np.asarray(z["mean"] + z["effect"])[rows % 3, None]
    data = norm.logpdf(TABLE[np.ix_(rows, columns)], loc).sum()
    no_data = looked.energy(z, batch) + 6 / len(rows) * 4 / len(columns) * data
    prior = dist.Normal(0.0, 2.0).log_prob(z["mean"]) + dist.Normal(0.0, 1.0).log_prob(z["effect"]).sum()
    np.testing.assert_allclose(no_data, -prior)


def test_a_scaled_prior_has_an_unscaled_jacobian():
    def model(x, y, subsample_size=None):
        with numpyro.handlers.scale(scale=0.25):
            scale = numpyro.sample("scale", dist.HalfNormal(1.5))
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            numpyro.sample("y", dist.Normal(x[idx, 0], scale), obs=y[idx])

    looked = Looked(model, X, Y, subsample_size=B)
    z, batch = {"scale": jnp.float64(0.4)}, looked.disjoint_batches()[1]
    theta = np.exp(0.4)
    likelihood = dist.Normal(X[batch["data"], 0], theta).log_prob(Y[batch["data"]]).sum()
    expected = -(0.25 * dist.HalfNormal(1.5).log_prob(theta) + N / B * likelihood + 0.7 * 0.4)
    np.testing.assert_allclose(looked.energy(z, batch, 0.7), expected)


def test_scale_around_the_likelihood_multiplies_the_plates_scale():
    def model(x, y, subsample_size=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx, numpyro.handlers.scale(scale=0.5):
            numpyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])

    Looked(model, X, Y, subsample_size=B).assert_unbiased(model, X, Y, at_least=3)


def test_masks_and_factors():
    keep = np.arange(N) % 3 != 0

    def model(x, y, keep, subsample_size=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).mask(False))
        numpyro.factor("ridge", -2.0 * w**2)
        with numpyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            with numpyro.handlers.mask(mask=keep[idx]):
                numpyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])
            numpyro.factor("per_row", -jnp.abs(w * x[idx, 1]))

    looked = Looked(model, X, Y, keep, subsample_size=B)
    looked.assert_unbiased(model, X, Y, keep, at_least=3)
    w = jnp.float64(0.3)
    likelihood = dist.Normal(w * X[keep, 0], 1.0).log_prob(Y[keep]).sum()
    expected = -(likelihood - 2.0 * w**2 - np.abs(w * X[:, 1]).sum())
    mean = np.mean([looked.energy({"w": w}, batch) for batch in looked.disjoint_batches()])
    np.testing.assert_allclose(mean, expected)


def test_a_scan_over_time():
    series = jnp.asarray(rng.normal(size=5))

    def model(y):
        decay = numpyro.sample("decay", dist.Beta(2.0, 2.0))

        def step(state, now):
            state = numpyro.sample("state", dist.LogNormal(decay * state, 0.5))
            numpyro.sample("y", dist.Normal(state, 1.0), obs=now)
            return state, None

        scan(step, jnp.asarray(0.0), y)

    looked = Looked(model, series)
    assert looked.layout.shapes["state"] == (5,)
    z = looked.start()
    assert z["state"].shape == (5,)
    energy = jax.jit(looked.energy)
    np.testing.assert_allclose(energy(z, {}, 1.0), jax.jit(lambda z: potential_energy(model, (series,), {}, z))(z))
    # At another temperature, the log-Jacobian of exp is the sum of all the states' unconstrained values.
    log_jacobian = jnp.sum(z["state"]) + jnp.log(jax.nn.sigmoid(z["decay"]) * jax.nn.sigmoid(-z["decay"]))
    np.testing.assert_allclose(energy(z, {}, 3.0), energy(z, {}, 1.0) - 2.0 * log_jacobian)
    values = potential.constrain(model, looked.layout, z, looked.args, looked.kwargs)
    np.testing.assert_allclose(values["state"], np.exp(z["state"]))
    assert run(model, series)["state"].shape == (3, 5)


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


# batch_size= on full-data plates


@pytest.mark.parametrize("model", [linear, linear_by_subsample])
@pytest.mark.parametrize("batch_size", [B, {"data": B}, np.int64(B)])
def test_batch_size_cuts_a_full_data_plate(model, batch_size):
    looked = Looked(model, X, Y, batch_size=batch_size)
    assert looked.layout.subsampled["data"].batch_size == B
    looked.assert_unbiased(linear, X, Y, at_least=3)
    same = Looked(model, X, Y, subsample_size=B)
    z, batch = looked.start(), looked.disjoint_batches()[2]
    np.testing.assert_allclose(looked.energy(z, batch), same.energy(z, batch))


def test_batch_size_by_plate_on_nested_plates():
    looked = Looked(nested, TABLE, batch_size={"rows": 3, "columns": 2})
    looked.assert_unbiased(nested, TABLE, at_least=4)
    half = Looked(nested, TABLE, sizes=(3, None), batch_size={"columns": 2})
    half.assert_unbiased(nested, TABLE, at_least=4)


def test_batch_size_of_all_rows_is_the_full_potential():
    looked = Looked(linear, X, Y, batch_size=N)
    z = looked.start()
    assert not looked.layout.subsampled
    expected = potential_energy(linear, (jnp.asarray(X), jnp.asarray(Y)), {}, z)
    np.testing.assert_allclose(looked.energy(z, {}), expected)


def test_batch_size_leaves_a_plate_of_latents_alone():
    looked = Looked(nested, TABLE[:, :1], batch_size={"rows": 2})  # an int would be ambiguous: rows and columns
    assert set(looked.layout.subsampled) == {"rows"}

    def one_data_plate(y):
        with numpyro.plate("groups", 3):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)) as idx:
            numpyro.sample("y", dist.Normal(effect[idx % 3], 1.0), obs=y[idx])

    assert set(Looked(one_data_plate, Y, batch_size=B).layout.subsampled) == {"data"}


def test_bad_batch_sizes():
    def whole(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    def whole_inputs(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)) as idx:
            numpyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y[idx])

    def no_plate(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    def per_row(x, y):
        with numpyro.plate("data", len(x)) as idx:
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])

    refuses(["batch_size=4", "'data'", "numpyro.subsample", "x[idx]"], whole, X, Y, batch_size=B)
    refuses(["batch_size=4", "'data'", "numpyro.subsample", "inputs"], whole_inputs, X, Y, batch_size=B)
    refuses(["batch_size=4", "plate"], no_plate, X, Y, batch_size=B)
    refuses(["batch_size=4", "dict by plate name", "rows", "columns"], nested, TABLE, batch_size=4)
    refuses(["batch_size", "'rwos'", "rows"], nested, TABLE, batch_size={"rwos": 2})
    refuses(["batch_size=13", "larger", "12"], linear, X, Y, batch_size=N + 1)
    refuses(["batch_size=2", "subsample_size=4"], linear, X, Y, batch_size={"data": 2}, subsample_size=B)
    refuses(["'w'", "'data'", "before the plate"], per_row, X, Y, batch_size={"data": B})
    refuses(["subsample_size=13", "12"], linear, X, Y, subsample_size=N + 1)


# The full-data view


def test_the_full_data_view_has_all_rows_at_scale_one():
    view = full_data(linear)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(view, 0)).get_trace(X, jnp.asarray(Y), subsample_size=B)
    assert trace["y"]["fn"].batch_shape == (N,)
    assert trace["y"]["scale"] in (None, 1.0)
    np.testing.assert_array_equal(trace["data"]["value"], np.arange(N))
    assert full_data(view) is view
    assert SGLD(linear, step_size=0.1).model == view
    assert pickle.loads(pickle.dumps(view)) == view


def test_the_hosts_predictive_and_log_likelihood_on_the_full_data_view():
    draws = {"w": rng.normal(size=(5, 2)), "scale": np.full(5, 0.5)}
    x, y = jnp.asarray(X), jnp.asarray(Y)
    view = full_data(linear)
    by_row = log_likelihood(view, draws, x, y, subsample_size=B)["y"]
    expected = dist.Normal(draws["w"] @ X.T, 0.5).log_prob(Y)
    np.testing.assert_allclose(by_row, expected)
    assert Predictive(view, draws)(random.key(0), x, subsample_size=B)["y"].shape == (5, N)
    by_subsample = Predictive(full_data(linear_by_subsample), draws)(random.key(0), x, subsample_size=B)["y"]
    assert by_subsample.shape == (5, N)


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
