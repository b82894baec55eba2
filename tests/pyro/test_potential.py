"""From a Pyro model to its minibatch potential: supports, sites that are not sampled, where chains start."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import (
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch.distributions import biject_to

from bnn_ppl.pyro import SGHMC, full_data, init_to_prior_center
from tests.pyro.potentials import B, Looked, N, X, Y, linear, refuses, run


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


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
