"""From a Pyro model to its minibatch potential: equal to the host's, unbiased, tempered, for every kind of model."""

import itertools
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, Predictive
from pyro.infer.autoguide.initialization import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.distributions import biject_to

from bnn_ppl.pyro import SGHMC, SGLD, full_data, init_to_prior_center, potential
from bnn_ppl.pyro import layout as layouts

N, B = 12, 4
rng = np.random.default_rng(0)
X = torch.tensor(rng.normal(size=(N, 2)))
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.3 * torch.tensor(rng.normal(size=N))
TABLE = torch.tensor(rng.normal(size=(6, 4)))


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


class Looked:
    """A model, its arguments, and what `inspect_model` found in it."""

    def __init__(self, model, *args, batch_size=None, **kwargs):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.layout = layouts.inspect_model(model, init_to_prior_center, args, kwargs, batch_size)

    def energy(self, z, batch, temperature=1.0):
        return potential.potential_energy(self.model, self.layout, z, temperature, batch, self.args, self.kwargs)

    def start(self):
        """Unconstrained values away from any special point."""
        return self.layout.initial

    def disjoint_batches(self):
        """Every choice of one part of each plate, the parts of a plate being disjoint and together all its rows."""
        parts = {}
        for name, plate in self.layout.subsampled.items():
            order = np.random.default_rng(plate.size).permutation(plate.size)
            assert plate.size % plate.batch_size == 0
            parts[name] = [torch.tensor(p) for p in order.reshape(-1, plate.batch_size)]
        return [dict(zip(parts, chosen, strict=True)) for chosen in itertools.product(*parts.values())]

    def assert_unbiased(self, host_model, *args, at_least=2, **kwargs):
        """The mean over disjoint minibatches is the host's potential on all rows, gradient included."""
        z = self.start()
        batches = self.disjoint_batches()
        assert len(batches) >= at_least
        values = [value_and_gradient(lambda z, batch=batch: self.energy(z, batch), z) for batch in batches]
        assert np.ptp([v for v, _ in values]) > 1e-6  # the minibatches do matter
        expected, expected_gradient = value_and_gradient(host_potential(host_model, z, *args, **kwargs), z)
        np.testing.assert_allclose(np.mean([v for v, _ in values]), expected, rtol=1e-10)
        for name in z:
            mean = np.mean([g[name] for _, g in values], axis=0)
            np.testing.assert_allclose(mean, expected_gradient[name], rtol=1e-9, atol=1e-9)


def value_and_gradient(energy, z):
    z = {name: value.clone().requires_grad_() for name, value in z.items()}
    value = energy(z)
    gradient = torch.autograd.grad(value, list(z.values()))
    return value.item(), {name: g.numpy() for name, g in zip(z, gradient, strict=True)}


def host_potential(model, z, *args, **kwargs):
    """The host's potential; by its log density for the improper priors, on which its initialize_model fails."""
    try:
        return initialize_model(model, model_args=args, model_kwargs=kwargs, initial_params=z)[1]
    except NotImplementedError:
        sites = poutine.trace(poutine.condition(model, z)).get_trace(*args, **kwargs).nodes
        transforms = {name: biject_to(sites[name]["fn"].support) for name in z}

    def energy(z):
        values = {name: transforms[name](z[name]) for name in z}
        jacobians = [transforms[name].log_abs_det_jacobian(z[name], values[name]).sum() for name in z]
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
        return -trace.log_prob_sum() - sum(jacobians)

    return energy


def refuses(words, model, *args, batch_size=None, **kwargs):
    with pytest.raises(ValueError) as caught:
        Looked(model, *args, batch_size=batch_size, **kwargs)
    for word in words:
        assert word in str(caught.value)


def run(model, *args, num_samples=3, **options):
    """A short chain."""
    mcmc = MCMC(SGLD(model, **{"step_size": 1e-3} | options), num_samples, warmup_steps=0, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()


# Supports, transforms and temperature

SUPPORTS = {
    "real": lambda: dist.Normal(0.3, 1.2).expand([2]).to_event(1),
    "positive": lambda: dist.Gamma(2.0, 3.0).expand([2]).to_event(1),
    "half_cauchy": lambda: dist.HalfCauchy(0.7),
    "interval": lambda: dist.Uniform(-1.0, 2.0),
    "unit_interval": lambda: dist.Beta(2.0, 3.0),
    "greater_than": lambda: dist.Pareto(1.5, 3.0),
    "simplex": lambda: dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])),
    "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
    "ordered": lambda: dist.ImproperUniform(constraints.ordered_vector, (), (3,)),
    "transformed": lambda: dist.LogNormal(0.2, 0.7).expand([2, 2]).to_event(2),
}
# The coordinates in which the density on each support is meant, where they are fewer than the entries.
COORDINATES = {
    "simplex": lambda v: v[:-1],
    "corr_cholesky": lambda v: v[[1, 2, 2], [0, 0, 1]],
}


def support_model(prior):
    def model(x, y, subsample_size=None):
        value = pyro.sample("value", prior())
        slope = (torch.arange(1.0, value.numel() + 1).reshape(value.shape) * value).sum()
        with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            pyro.sample("y", dist.Normal(slope * x[idx, 0], 2.0), obs=y[idx])

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
    transform, shape = biject_to(prior.support), z["value"].shape
    coordinates = COORDINATES.get(support, lambda v: v)
    jacobian = torch.autograd.functional.jacobian(
        lambda flat: coordinates(transform(flat.reshape(shape))).reshape(-1), z["value"].reshape(-1)
    )
    log_jacobian = torch.linalg.slogdet(jacobian)[1].item()
    at_one = looked.energy(z, {})
    for temperature in (0.0, 0.1, 3.0):
        expected = at_one + (1.0 - temperature) * log_jacobian
        np.testing.assert_allclose(looked.energy(z, {}, temperature), expected, rtol=1e-9, atol=1e-9)
    assert (abs(log_jacobian) > 1e-3) == (support != "real")


def test_the_hosts_samples_are_in_the_users_coordinates():
    samples = run(support_model(SUPPORTS["simplex"]), X, Y)
    assert samples["value"].shape == (3, 3)
    np.testing.assert_allclose(samples["value"].sum(-1), 1.0)


def test_a_support_that_depends_on_another_site_is_refused():
    def model(x, y):
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        value = pyro.sample("value", dist.Uniform(low, low + 2.0))
        with pyro.plate("data", len(x), subsample_size=B) as idx:
            pyro.sample("y", dist.Normal(value * x[idx, 0], 2.0), obs=y[idx])

    refuses(["'value'", "depends on another latent site", "fixed support"], model, X, Y)


def test_a_support_without_a_bijection_names_the_site():
    def model():  # torch has none for it, and Pyro's own HMC fails on it too
        pyro.sample("covariance", dist.Wishart(torch.tensor(4.0), torch.eye(2)))

    refuses(["'covariance'", "biject_to"], model)


# Plates


def linear(x, y=None, subsample_size=None):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
        pyro.sample("y", dist.Normal(x[idx] @ w, scale), obs=None if y is None else y[idx])


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


# Sites that are not sampled


def test_param_sites_are_held_and_named():
    def model(y):
        offset = pyro.param("offset", lambda: 3.0 + torch.randn(()))
        mean = pyro.sample("mean", dist.Normal(offset, 1.0))
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("y", dist.Normal(mean, noise).expand([len(y)]).to_event(1), obs=y)

    looked = Looked(model, Y)
    held = looked.layout.held
    assert set(held) == {"offset", "noise"}
    z = {"mean": torch.tensor(0.2)}
    expected = -(dist.Normal(held["offset"], 1.0).log_prob(z["mean"]) + dist.Normal(0.2, 1.0).log_prob(Y).sum())
    for _ in range(2):  # neither redrawn nor moved by others
        np.testing.assert_allclose(looked.energy(z, {}), expected)
        pyro.clear_param_store()
    with pytest.warns(UserWarning, match=r"\['offset', 'noise'\] are held .*PyroSample"):
        assert set(run(model, Y)) == {"mean"}


class PyroNet(PyroModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = PyroModule[torch.nn.Linear](2, 3), PyroModule[torch.nn.Linear](3, 1)
        for layer in (self.first, self.second):
            for name, value in list(layer.named_parameters()):
                setattr(layer, name, PyroSample(dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())))

    def forward(self, x, y=None, subsample_size=None):
        with pyro.plate("data", len(x), subsample_size=subsample_size):
            x = pyro.subsample(x, event_dim=1)
            y = None if y is None else pyro.subsample(y, event_dim=0)
        out = self.second(torch.tanh(self.first(x)))[..., 0]
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(out, 0.5), obs=y)


class PlatedNet(PyroNet):
    """The network outside the data plate, on a batch taken by the plate's indices."""

    def forward(self, x, y=None, subsample_size=None):
        plate = pyro.plate("data", len(x), subsample_size=subsample_size)
        with plate as idx:
            pass
        out = self.second(torch.tanh(self.first(x[idx])))[..., 0]
        with plate:
            return pyro.sample("y", dist.Normal(out, 0.5), obs=None if y is None else y[idx])


def lifted():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    to_pyro_module_(net)
    for layer in net.modules():
        for name, value in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, PyroSample(dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())))

    def model(x, y=None, subsample_size=None):
        plate = pyro.plate("data", len(x), subsample_size=subsample_size)
        with plate as idx:
            batch = x[idx]
        out = net(batch)[..., 0]
        with plate:
            return pyro.sample("y", dist.Normal(out, 0.5), obs=None if y is None else y[idx])

    return model


@pytest.mark.parametrize("make", [PlatedNet, lifted])
def test_networks_of_pyro_modules(make):
    model = make()
    looked = Looked(model, X, Y, subsample_size=B)
    assert sum(shape.numel() for shape in looked.layout.shapes.values()) == 13
    looked.assert_unbiased(model, X, Y, at_least=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = run(lambda x, y: model(x, y, subsample_size=B), X, Y)
    assert set(samples) == set(looked.layout.shapes)
    assert all(torch.isfinite(v).all() and (v[1] != v[0]).any() for v in samples.values())
    predicted = Predictive(full_data(model), samples)(X, subsample_size=B)["y"]
    assert predicted.shape == (3, N)


@pytest.mark.parametrize("subsample_size", [B, None])
def test_a_network_inside_the_data_plate_is_refused(subsample_size):
    net = PyroNet()

    def model(x, y):
        with pyro.plate("data", len(x), subsample_size=subsample_size) as idx:
            out = torch.tanh(net.first(x[idx])).sum(-1)
            pyro.sample("y", dist.Normal(out, 0.5), obs=y[idx])

    refuses(["first.", "'data'", "outside the data plate"], model, X, Y)


def test_torch_parameters_of_a_module_are_held_without_a_warning_about_them():
    class Half(PyroNet):
        def __init__(self):
            super().__init__()
            self.first = PyroModule[torch.nn.Linear](2, 3)

    model = Half()
    looked = Looked(model, X, Y)
    assert all(name.startswith("second") for name in looked.layout.shapes)


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


# Where chains start

PRIORS = {
    "normal": lambda: dist.Normal(2.0, 0.3),
    "half_cauchy": lambda: dist.HalfCauchy(1.0),
    "cauchy": lambda: dist.Cauchy(4.0, 0.1),
    "student_t": lambda: dist.StudentT(1.0, 0.0, 1.0),
    "student_t_2": lambda: dist.StudentT(2.0, 0.0, 1.0),
    "log_normal": lambda: dist.LogNormal(0.0, 1.0),
    "dirichlet": lambda: dist.Dirichlet(torch.ones(4)),
    "lkj": lambda: dist.LKJCholesky(3, 1.0),
    "lkj_matrix": lambda: dist.LKJ(3, 1.0),
    "improper": lambda: dist.ImproperUniform(constraints.real, (), (3,)),
    "improper_positive": lambda: dist.ImproperUniform(constraints.positive, (3,), ()),
    "gamma": lambda: dist.Gamma(2.0, 2.0),
    "inverse_gamma": lambda: dist.InverseGamma(0.5, 1.0),
    "inverse_gamma_3": lambda: dist.InverseGamma(3.0, 1.0),
    "horseshoe": lambda: dist.HalfCauchy(torch.tensor([1e-3, 1.0, 1e3])).to_event(1),
    "uniform": lambda: dist.Uniform(-3.0, 5.0),
    "beta": lambda: dist.Beta(0.5, 0.5),
    "pareto": lambda: dist.Pareto(1.0, 0.5),
    "multivariate": lambda: dist.MultivariateNormal(torch.tensor([1.0, 5.0]), 0.04 * torch.eye(2)),
    "low_rank": lambda: dist.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3)),
    "weibull": lambda: dist.Weibull(1.0, 2.0),
    "von_mises": lambda: dist.VonMises(0.0, 1.0),
}


def started(prior, seed, strategy=None):
    pyro.set_rng_seed(seed)
    trace = poutine.trace(lambda: pyro.sample("value", prior)).get_trace()
    return (strategy or init_to_prior_center())(trace.nodes["value"])


@pytest.mark.parametrize("name", PRIORS)
def test_starts_are_finite_and_in_the_support(name):
    prior = PRIORS[name]()
    for seed in range(3):
        pyro.set_rng_seed(seed)
        value = init_to_prior_center({"fn": prior})
        assert value.shape == prior.shape()
        assert torch.isfinite(value).all()
        assert prior.support.check(value).all()
        assert torch.isfinite(prior.log_prob(value)).all()
    assert not torch.equal(init_to_prior_center({"fn": prior}), init_to_prior_center({"fn": prior}))


def test_starts_are_near_the_priors_centre():
    assert abs(started(dist.Normal(2.0, 0.01), 0) - 2.0) < 0.05
    assert 1.2 < started(dist.Gamma(200.0, 100.0), 0) < 3.3
    assert abs(started(dist.Cauchy(40.0, 0.1), 0) - 40.0) < 4.0


@pytest.mark.parametrize(
    ("shape", "fan_in"), [((4000,), 4000), ((10, 400), 400), ((40, 25, 3, 3), 225), ((), 1), ((1000, 7), 1000)]
)
def test_the_spread_of_a_network_is_fan_in_sized(shape, fan_in):
    wide = dist.Normal(0.0, 10.0).expand(shape)
    for prior in (wide, wide.to_event(len(shape))):
        values = np.stack([started(prior, seed) for seed in range(400 if not shape else 1)])
        spread = values.std() * np.sqrt(fan_in)
        assert abs(spread - 1.0) < 4.0 / np.sqrt(2.0 * values.size)
    narrow = started(dist.Normal(0.0, 1e-4).expand(shape), 0)  # never wider than the prior
    assert narrow.abs().max() < 1e-3


def test_the_hosts_init_strategies():
    values = {"w": torch.tensor([0.5, -0.25]), "scale": torch.tensor(2.0)}
    strategies = [
        init_to_median(num_samples=5),
        init_to_median,
        init_to_mean(),
        init_to_mean,
        init_to_sample,
        init_to_feasible(),
        init_to_feasible,
        init_to_uniform(radius=0.1),
        init_to_uniform,
        init_to_value(values=values),
        init_to_prior_center(),
        init_to_prior_center,
    ]
    for strategy in strategies:
        kernel = SGHMC(linear, step_size=1e-3, friction=1.0, init_strategy=strategy)
        kernel.setup(0, X, Y, subsample_size=B)
        z = kernel.initial_params
        assert {name: value.shape for name, value in z.items()} == {"w": (2,), "scale": ()}
        assert all(torch.isfinite(value).all() for value in z.values())
    kernel = SGHMC(linear, step_size=1e-3, friction=1.0, init_strategy=init_to_value(values=values))
    kernel.setup(0, X, Y)
    np.testing.assert_allclose(kernel.initial_params["w"], [0.5, -0.25])
    np.testing.assert_allclose(kernel.initial_params["scale"], np.log(2.0))
