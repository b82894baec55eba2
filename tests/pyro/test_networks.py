"""Networks from torch modules: the densities of models written by hand, modules left alone, what has no prior."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_

from bnn_ppl.pyro import SGHMC, priors, random_torch_module
from tests.pyro.networks import NAMES, NORMAL, PRIORS, SITES, B, N, X, Y, learned, looked, model_of, perceptron, run


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


def by_hand(x, y=None, subsample_size=None):
    w0 = pyro.sample("net.0.weight", dist.Normal(0.0, 0.7).expand([3, 2]).to_event(2))
    b0 = pyro.sample("net.0.bias", dist.StudentT(3.0, 0.1, 0.5).expand([3]).to_event(1))
    w1 = pyro.sample("net.2.weight", PRIORS["2.weight"].expand([1]).to_event(1))
    b1 = pyro.sample("net.2.bias", dist.LogNormal(-1.0, 0.5).expand([1]).to_event(1))
    with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
        mean = (torch.tanh(x[rows] @ w0.T + b0) @ w1.T + b1)[:, 0]
        pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y[rows])


class Lifted(PyroModule):
    """The same by Pyro's own lifting, which changes the module."""

    def __init__(self):
        super().__init__()
        net = perceptron()
        to_pyro_module_(net)
        for key in NAMES:
            layer, name = net[int(key[0])], key[2:]
            shape = getattr(layer, name).shape
            batch = shape[: len(shape) - PRIORS[key].event_dim]
            setattr(layer, name, PyroSample(PRIORS[key].expand(batch).to_event(len(batch))))
        self.net = net

    def forward(self, x, y=None, subsample_size=None):
        plate = pyro.plate("data", len(x), subsample_size=subsample_size)
        with plate as rows:
            pass
        mean = self.net(x[rows]).squeeze(-1)
        with plate:
            pyro.sample("y", dist.Normal(mean, 0.5), obs=None if y is None else y[rows])


def unchanged(module, before):
    """Whether a module is what its deep copy `before` is, bit for bit."""
    state, expected = module.state_dict(), before.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[k], expected[k]) and state[k].dtype == expected[k].dtype for k in state)
    for (name, value), (other, twin) in zip(module.named_parameters(), before.named_parameters(), strict=True):
        assert (name, value.requires_grad, value.grad) == (other, twin.requires_grad, None)
        assert type(value) is torch.nn.Parameter
    for one, other in zip(module.modules(), before.modules(), strict=True):
        assert type(one) is type(other)
        assert one.training == other.training
    return True


# The same density as models written otherwise


@pytest.mark.parametrize("reference", [by_hand, Lifted])
def test_log_joint_and_gradient_of_other_ways_to_write_it(reference):
    reference = reference() if isinstance(reference, type) else reference
    layout, evaluate = looked(model_of(perceptron(), PRIORS), X, Y, subsample_size=B)
    expected_layout, expected = looked(reference, X, Y, subsample_size=B)
    assert layout.shapes == expected_layout.shapes
    assert set(layout.shapes) == SITES
    for seed in range(3):
        torch.manual_seed(seed)
        z = {name: torch.randn(shape) for name, shape in layout.shapes.items()}
        batch = {"data": torch.randperm(N)[:B]}
        for temperature in (1.0, 0.3):
            energy, gradient = evaluate(z, batch, temperature)
            expected_energy, expected_gradient = expected(z, batch, temperature)
            np.testing.assert_allclose(energy, expected_energy, rtol=1e-12)
            for name in SITES:
                np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-10, atol=1e-12)
                assert gradient[name].abs().max() > 1e-3


def test_every_form_of_a_prior():
    def at(prior):
        sites = poutine.trace(model_of(perceptron(), prior)).get_trace(X).nodes
        scales = {}
        for name in NAMES:
            site = sites.get(f"net.{name}")
            if site is not None:
                assert site["fn"].event_dim == site["value"].dim()
                scales[name] = site["fn"].base_dist.scale.flatten()[0].item()
            assert (site is None) == (f"net$$${name}" in sites)
        return scales

    one, two, three = (dist.Normal(0.0, scale) for scale in (1.0, 2.0, 3.0))
    calls = []

    def by_name(name, shape):
        calls.append((name, shape))
        return one if name == "0.bias" else two if name == "2.weight" else None

    assert at(one) == dict.fromkeys(NAMES, 1.0)
    assert at({"0.bias": one}) == {"0.bias": 1.0}
    assert at({"*": one, "0.bias": two}) == {"0.weight": 1.0, "0.bias": 2.0, "2.weight": 1.0, "2.bias": 1.0}
    assert at({"*.weight": one, "2.*": two}) == {"0.weight": 1.0, "2.weight": 1.0, "2.bias": 2.0}
    assert at({"[0]*": None, "*.bias": three}) == {"2.bias": 3.0}
    assert at(by_name) == {"0.bias": 1.0, "2.weight": 2.0}
    assert calls == [("0.weight", (3, 2)), ("0.bias", (3,)), ("2.weight", (1, 3)), ("2.bias", (1,))]
    assert all(type(shape) is tuple for _, shape in calls)
    assert at({"2.*": lambda name, shape: dist.Normal(0.0, float(sum(shape)))}) == {"2.weight": 4.0, "2.bias": 1.0}


def test_a_distribution_with_axes_is_broadcast_from_the_right():
    scale = torch.tensor([0.5, 2.0])
    sites = poutine.trace(model_of(perceptron(), {"0.weight": dist.Normal(0.0, scale)})).get_trace(X).nodes
    torch.testing.assert_close(sites["net.0.weight"]["fn"].base_dist.scale, scale.expand(3, 2))


def test_modules_with_arguments_of_their_own():
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope, self.torch_module = torch.nn.Parameter(torch.ones(())), torch.nn.Linear(2, 1)

        def forward(self, x, *, values, shift=0.0):  # `values` is a name of ours too
            return self.slope * self.torch_module(x) + values + shift

    module = Shifted()
    model = model_of(module, dist.Normal(0.0, 1.0), values=1.0, shift=2.0)
    sites = poutine.trace(model).get_trace(X).nodes
    w, b = (sites[f"net.torch_module.{name}"]["value"] for name in ("weight", "bias"))
    expected = sites["net.slope"]["value"] * (X @ w.T + b)[:, 0] + 3.0
    torch.testing.assert_close(sites["y"]["fn"].mean, expected)


# Modules are left alone


def test_modules_stay_as_they_were():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    module[0].bias.requires_grad_(False)
    before = copy.deepcopy(module)
    model = model_of(module, {"*.weight": NORMAL})
    model(X)
    learned(model, AutoNormal(model), X, Y, steps=3)
    pyro.clear_param_store()
    held = poutine.block(model, hide_types=["param"])
    for jit_compile in (False, True):
        run(held, X, Y, jit_compile=jit_compile)
    assert unchanged(module, before)


@pytest.mark.parametrize("training", [False, True])
def test_batch_normalisation(training):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    module[1].running_mean.normal_()
    module.train(training)
    before = copy.deepcopy(module)
    model = model_of(module, NORMAL)
    for jit_compile in (False, True):
        run(model, X, Y, jit_compile=jit_compile)
    sites = poutine.trace(model).get_trace(X).nodes
    w = {name: sites[f"net.{name}"]["value"] for name, _ in module.named_parameters()}
    hidden = X @ w["0.weight"].T + w["0.bias"]
    mean = hidden.mean(0) if training else before[1].running_mean
    variance = hidden.var(0, unbiased=False) if training else before[1].running_var
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * w["1.weight"] + w["1.bias"]
    torch.testing.assert_close(sites["y"]["fn"].mean, (hidden @ w["2.weight"].T + w["2.bias"])[:, 0])
    assert unchanged(module, before)


def test_dropout():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
    model = model_of(module, NORMAL)
    with pytest.raises(ValueError, match=r"random numbers of its own, as dropout does.*module\.eval\(\)"):
        run(model, X, Y)
    module.eval()
    assert set(run(model, X, Y).get_samples()) == SITES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sites_have_the_type_of_the_module(dtype):
    module = perceptron().to(dtype)
    x, y = X.to(dtype), Y.to(dtype)
    other = torch.float32 if dtype is torch.float64 else torch.float64
    torch.set_default_dtype(other)
    torch.manual_seed(0)
    given = [
        dist.Normal(0.0, 1.0),
        PRIORS,
        dist.HalfCauchy(torch.ones((), dtype=other)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
        priors.horseshoe(),
    ]
    for prior in given:
        model = model_of(module, prior)
        sites = poutine.trace(model).get_trace(x).nodes
        assert all(site["value"].dtype == dtype for name, site in sites.items() if name.startswith("net"))
        sites["net.0.weight"]["fn"].log_prob(sites["net.0.weight"]["value"])
    assert all(value.dtype == dtype for value in run(model, x, y).get_samples().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_sites_lie_where_the_module_does(jit_compile):
    def model(x, y):
        net = random_torch_module("net", module, priors.hierarchical_normal())
        with pyro.plate("data", len(x), subsample_size=B, device=x.device) as rows:
            pyro.sample("y", dist.Normal(net(x[rows]).squeeze(-1), 0.5), obs=y[rows])

    module = perceptron().cuda()
    samples = run(model, X.cuda(), Y.cuda(), jit_compile=jit_compile).get_samples()
    assert all(value.device.type == "cuda" for value in samples.values())


# Parameters that are not random


def test_svi_learns_what_has_no_prior():
    module = perceptron()
    before = copy.deepcopy(module)
    model = model_of(module, {"2.*": dist.Normal(0.0, 1.0), "0.bias": None})
    names = {"net$$$0.weight", "net$$$0.bias"}
    assert set(poutine.trace(model).get_trace(X).param_nodes) == names
    for name in names:
        assert torch.equal(pyro.param(name), before.get_parameter(name.partition("$$$")[2]))
    losses = learned(model, AutoNormal(model, init_scale=0.01), X, Y)
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    for name in names:
        assert (pyro.param(name) - before.get_parameter(name.partition("$$$")[2])).abs().max() > 0.1
    assert unchanged(module, before)


def test_kernels_hold_what_has_no_prior_silently():
    module = perceptron()
    model = model_of(module, {"2.*": NORMAL})
    learned(model, AutoDelta(model), X, Y, steps=3)
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items() if "$$$" in name}
    assert len(store) == 2
    samples = run(model, X, Y, kernel=SGHMC, friction=1.0).get_samples()
    assert set(samples) == {"net.2.weight", "net.2.bias"}
    assert all(torch.equal(pyro.param(name), value) for name, value in store.items())
    layout, evaluate = looked(model, X, Y)
    assert all(torch.equal(layout.held[name], value) for name, value in store.items())
    z = {"net.2.weight": torch.randn(1, 3), "net.2.bias": torch.randn(1)}
    hidden = torch.tanh(X @ store["net$$$0.weight"].T + store["net$$$0.bias"])
    mean = (hidden @ z["net.2.weight"].T + z["net.2.bias"])[:, 0]
    expected = -sum(dist.Normal(0.0, 1.0).log_prob(value).sum() for value in z.values())
    np.testing.assert_allclose(evaluate(z, {})[0], expected - dist.Normal(mean, 0.5).log_prob(Y).sum())


def test_frozen_parameters_are_neither_random_nor_learned():
    module = perceptron()
    module[0].requires_grad_(False)
    model = model_of(module, {"2.*": NORMAL})
    trace = poutine.trace(model).get_trace(X)
    assert not trace.param_nodes
    hidden = torch.tanh(module[0](X))
    w, b = (trace.nodes[f"net.2.{name}"]["value"] for name in ("weight", "bias"))
    torch.testing.assert_close(trace.nodes["y"]["fn"].mean, (hidden @ w.T + b)[:, 0])
    assert set(run(model, X, Y).get_samples()) == {"net.2.weight", "net.2.bias"}
    assert set(poutine.trace(model_of(module, NORMAL)).get_trace(X).stochastic_nodes) > SITES  # a prior outweighs it
