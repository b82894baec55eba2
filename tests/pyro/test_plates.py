"""Minibatches by the plates of a Pyro model: unbiased for every kind of plate, batch_size=, the full-data view."""

import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive

from bnn_ppl.pyro import SGLD, full_data
from tests.pyro.potentials import TABLE, B, Looked, N, X, Y, host_potential, linear, refuses, rng, run


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


# Plates


def linear_by_subsample(x, y=None, subsample_size=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size):
        batch = pyro.subsample(x, event_dim=1)
        obs = None if y is None else pyro.subsample(y, event_dim=0)
        pyro.sample("y", dist.Normal(batch @ w, scale), obs=obs)


@pytest.mark.parametrize("model", [linear, linear_by_subsample])
def test_minibatches_by_index_and_by_subsample(model):
    looked = Looked(model, X, Y, subsample_size=B)
    assert looked.layout.subsampled["data"].size == N
    assert looked.layout.subsampled["data"].batch_size == B
    looked.assert_unbiased(linear, X, Y, at_least=3)


def test_no_plates():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(mean, scale).expand([len(y)]).to_event(1), obs=y)

    looked = Looked(model, Y)
    assert looked.layout.plates == {}
    z = looked.start()
    np.testing.assert_allclose(looked.energy(z, {}), host_potential(model, z, Y)(z))


def test_two_plates_of_different_sizes():
    def model(a, b, sizes=(None, None)):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("long", len(a), subsample_size=sizes[0]) as idx:
            pyro.sample("a", dist.Normal(mean, 1.0), obs=a[idx])
        with pyro.plate("short", len(b), subsample_size=sizes[1]):
            pyro.sample("b", dist.StudentT(5.0, mean, 0.5), obs=pyro.subsample(b, event_dim=0))

    b = Y[:6] + 1
    looked = Looked(model, Y, b, sizes=(B, 2))
    looked.assert_unbiased(model, Y, b, at_least=9)
    z, batch = looked.start(), looked.disjoint_batches()[0]
    by_hand = -dist.Normal(0.0, 2.0).log_prob(z["mean"])
    by_hand -= N / B * dist.Normal(z["mean"], 1.0).log_prob(Y[batch["long"]]).sum()
    by_hand -= 6 / 2 * dist.StudentT(5.0, z["mean"], 0.5).log_prob(b[batch["short"]]).sum()
    np.testing.assert_allclose(looked.energy(z, batch), by_hand)


def nested(table, sizes=(None, None)):
    """Rows and columns, both subsampled; the prior of `effect` lies inside a third plate, of groups."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    rows = pyro.plate("rows", table.shape[0], subsample_size=sizes[0], dim=-2)
    columns = pyro.plate("columns", table.shape[1], subsample_size=sizes[1], dim=-1)
    with rows as i, columns as j:
        loc = mean + effect[i % 3][:, None]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=table[i][:, j])


@pytest.mark.parametrize("sizes", [(3, 2), (3, None), (None, 2)])
def test_nested_plates_count_the_prior_once(sizes):
    looked = Looked(nested, TABLE, sizes=sizes)
    looked.assert_unbiased(nested, TABLE, at_least=2)
    z, batch = looked.start(), looked.disjoint_batches()[0]
    rows, columns = batch.get("rows", torch.arange(6)), batch.get("columns", torch.arange(4))
    data = dist.Normal((z["mean"] + z["effect"])[rows % 3, None], 1.0).log_prob(TABLE[rows][:, columns]).sum()
    no_data = looked.energy(z, batch) + 6 / len(rows) * 4 / len(columns) * data
    prior = dist.Normal(0.0, 2.0).log_prob(z["mean"]) + dist.Normal(0.0, 1.0).log_prob(z["effect"]).sum()
    np.testing.assert_allclose(no_data, -prior)


def test_sequential_plates():
    def model(x, y, subsample_size=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x), subsample_size=subsample_size):
            pyro.sample(f"y_{i}", dist.Normal(w * x[i, 0], 1.0), obs=y[i])

    looked = Looked(model, X, Y, subsample_size=B)
    looked.assert_unbiased(model, X, Y, at_least=3)


def test_a_scaled_prior_has_an_unscaled_jacobian():
    def model(x, y, subsample_size=None):
        with poutine.scale(scale=0.25):
            scale = pyro.sample("scale", dist.HalfNormal(1.5))
        with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            pyro.sample("y", dist.Normal(x[idx, 0], scale), obs=y[idx])

    looked = Looked(model, X, Y, subsample_size=B)
    z, batch = {"scale": torch.tensor(0.4)}, looked.disjoint_batches()[1]
    theta = np.exp(0.4)
    likelihood = dist.Normal(X[batch["data"], 0], theta).log_prob(Y[batch["data"]]).sum()
    prior = dist.HalfNormal(1.5).log_prob(torch.tensor(theta))
    np.testing.assert_allclose(looked.energy(z, batch, 0.7), -(0.25 * prior + N / B * likelihood + 0.7 * 0.4))


def test_scale_around_the_likelihood_multiplies_the_plates_scale():
    def model(x, y, subsample_size=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=subsample_size) as idx, poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])

    Looked(model, X, Y, subsample_size=B).assert_unbiased(model, X, Y, at_least=3)


def test_masks_and_factors():
    keep = torch.arange(N) % 3 != 0

    def model(x, y, keep, subsample_size=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).mask(False))
        pyro.factor("ridge", -2.0 * w**2)
        with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            with poutine.mask(mask=keep[idx]):
                pyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])
            pyro.factor("per_row", -(w * x[idx, 1]).abs())

    looked = Looked(model, X, Y, keep, subsample_size=B)
    looked.assert_unbiased(model, X, Y, keep, at_least=3)
    w = torch.tensor(0.3)
    likelihood = dist.Normal(w * X[keep, 0], 1.0).log_prob(Y[keep]).sum()
    expected = -(likelihood - 2.0 * w**2 - (w * X[:, 1]).abs().sum())
    np.testing.assert_allclose(np.mean([looked.energy({"w": w}, b) for b in looked.disjoint_batches()]), expected)


def test_observed_by_condition_and_deterministics():
    def free(x, subsample_size=None):
        w = pyro.deterministic("twice", 2.0 * pyro.sample("w", dist.Normal(0.0, 1.0)))
        with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            loc = pyro.deterministic("loc", w * x[idx, 0])
            pyro.sample("y", dist.Normal(loc, 1.0))

    model = poutine.condition(free, {"y": Y})
    looked = Looked(model, X)
    assert set(looked.layout.shapes) == {"w"}
    z = looked.start()
    np.testing.assert_allclose(looked.energy(z, {}), host_potential(model, z, X)(z))
    assert set(run(model, X)) == {"w"}


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
    np.testing.assert_allclose(looked.energy(z, {}), host_potential(linear, z, X, Y)(z))


def test_batch_size_leaves_a_plate_of_latents_alone():
    def one_data_plate(y):
        with pyro.plate("groups", 3):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)) as idx:
            pyro.sample("y", dist.Normal(effect[idx % 3], 1.0), obs=y[idx])

    assert set(Looked(one_data_plate, Y, batch_size=B).layout.subsampled) == {"data"}


def test_bad_batch_sizes():
    def whole(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    def whole_inputs(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)) as idx:
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y[idx])

    def no_plate(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w * x[:, 0], 1.0).to_event(1), obs=y)

    def per_row(x, y):
        with pyro.plate("data", len(x)) as idx:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])

    def own_rows(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample=torch.arange(3)) as idx:
            pyro.sample("y", dist.Normal(w * x[idx, 0], 1.0), obs=y[idx])

    refuses(["batch_size=4", "'data'", "pyro.subsample", "x[idx]"], whole, X, Y, batch_size=B)
    refuses(["batch_size=4", "'data'", "pyro.subsample", "inputs"], whole_inputs, X, Y, batch_size=B)
    refuses(["batch_size=4", "plate"], no_plate, X, Y, batch_size=B)
    refuses(["batch_size=4", "dict by plate name", "rows", "columns"], nested, TABLE, batch_size=4)
    refuses(["batch_size", "'rwos'", "rows"], nested, TABLE, batch_size={"rwos": 2})
    refuses(["batch_size=13", "larger", "12"], linear, X, Y, batch_size=N + 1)
    refuses(["batch_size=2", "subsample_size=4"], linear, X, Y, batch_size={"data": 2}, subsample_size=B)
    refuses(["'w'", "'data'", "before the plate"], per_row, X, Y, batch_size={"data": B})
    refuses(["subsample_size=13", "12"], linear, X, Y, subsample_size=N + 1)
    refuses(["'data'", "subsample=", "subsample_size="], own_rows, X, Y)


# The full-data view


def test_the_full_data_view_has_all_rows_at_scale_one():
    view = full_data(linear)
    trace = poutine.trace(view).get_trace(X, Y, subsample_size=B)
    assert trace.nodes["y"]["fn"].batch_shape == (N,)
    assert trace.nodes["y"]["scale"] == 1.0
    np.testing.assert_array_equal(trace.nodes["data"]["value"], np.arange(N))
    assert full_data(view) is view
    assert SGLD(linear, step_size=0.1).model == view
    assert pickle.loads(pickle.dumps(view)) == view
    # The change to Pyro's plates ends with the view.
    with pyro.plate("data", N, subsample_size=B) as idx:
        assert len(idx) == B
    with pytest.raises(ValueError, match="subsample_size"):
        poutine.condition(linear, {"data": torch.arange(3)})(X, Y, subsample_size=B)


def test_the_hosts_predictive_and_log_density_on_the_full_data_view():
    draws = {"w": torch.tensor(rng.normal(size=(5, 2))), "scale": torch.full((5,), 0.5)}
    for model in (linear, linear_by_subsample):
        view = full_data(model)
        assert Predictive(view, draws)(X, subsample_size=B)["y"].shape == (5, N)
        values = {name: value[0] for name, value in draws.items()}
        trace = poutine.trace(poutine.condition(view, values)).get_trace(X, Y, subsample_size=B)
        trace.compute_log_prob()
        expected = dist.Normal(X @ draws["w"][0], 0.5).log_prob(Y)
        np.testing.assert_allclose(trace.nodes["y"]["log_prob"], expected)
