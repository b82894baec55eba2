"""Minibatches by the plates of a NumPyro model: unbiased for every kind of plate, batch_size=, the full-data view."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive, log_likelihood
from numpyro.infer.util import potential_energy
from scipy.stats import norm

from bnn_ppl.numpyro import SGLD, full_data, potential
from tests.numpyro.potentials import TABLE, B, Looked, N, X, Y, linear, refuses, rng, run


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Plates


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
